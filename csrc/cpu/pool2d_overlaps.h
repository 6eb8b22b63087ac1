// Backward pooling for windows of 3x3 pixels two apart, the other common kind, in contiguous layout.
//
// Pixels are taken by squares of 2x2. Along an axis, pixels 2m and 2m + 1 are seen by outputs m + padding - 1 and m +
// padding alone, so a square is seen by 2 x 2 outputs, each through the taps that tap_of() names. A vector holds
// neighbouring squares' numbers: what the outputs have to give is loaded once for all pixels, and what the lower two
// outputs of a square had to give is kept for the next square below.
#pragma once

#include "pool2d_rows.h"

namespace cnnops::cpu::CNNOPS_ISA {

static inline bool goes_by_overlaps(const Pool2dGeometry& g) {
  bool so = g.layout == Layout::contiguous && !g.adaptive && g.padding[0] == g.padding[1];
  for (int dim = 0; dim < 2; ++dim) so &= g.kernel[dim] == 3 && g.stride[dim] == 2 && g.dilation[dim] == 1;
  return so;
}

/// Through which tap output m + padding - 1 + later sees pixel 2m + odd: if through none, it is not one of 0, 1, 2.
static constexpr int tap_of(int padding, int odd, int later) { return odd - 2 * later + 2 - padding; }
static constexpr bool is_tap(int tap) { return tap >= 0 && tap < 3; }

template <class S>
static inline Vec<Sum<S>> load_outputs(const S* p, Lanes lanes) {
  if (lanes.end - lanes.begin == kLanes<Sum<S>>) return load(p);
  return load_between(p, lanes.begin, lanes.end, Sum<S>(0));
}

/// Rows [begin, end) of pixels. rule.at(oh, ow, lanes), for outputs (oh, ow), (oh, ow + 1), ... of the plane
/// rule.begin() was told, is a Rule::Given; rule.give(given, sums) adds to the pixels what they get from the outputs.
/// Both arrays are indexed by row and column. `most` blocks of 2*L columns are kept at a time: one lives in registers.
template <int padding, int most, class S, class Rule>
static void backward_overlaps_of(const Pool2dGeometry& g, Rule rule, S* gx, int64_t begin, int64_t end) {
  using T = Sum<S>;
  using Given = typename Rule::Given;
  constexpr int64_t L = kLanes<T>;
  constexpr auto sequence = std::make_integer_sequence<int, int(L)>();
  const int64_t height = g.in[0], width = g.in[1];
  const bool past = past_cache(gx, g.n * g.c * height * width) && width % L == 0;
  const auto put = [&](S* to, Vec<T> v) {
    if constexpr (std::is_same_v<S, T>) {
      if (past) return store_past_cache(to, v);
    }
    store(to, v);
  };
  struct Block {
    int64_t iw, ow;
    Lanes lanes[2];
  };
  const auto outputs_at = [&](int64_t oh, const Block& block, Given* given) {
    const bool exist = oh >= 0 && oh < g.out[0];
    for (int later = 0; later < 2; ++later)
      given[later] = exist ? rule.at(oh, block.ow + later, block.lanes[later]) : Given{};
  };
  for (int64_t plane = begin / height; plane * height < end; ++plane) {
    const int64_t first = larger(begin - plane * height, 0), last = smaller(end - plane * height, height);
    rule.begin(plane);
    for (int64_t from = 0; from < width; from += most * 2 * L) {
      const int64_t blocks = most == 1 ? 1 : smaller(most, ceil_div(width - from, 2 * L));
      Block block[most];
      Given above[most][2], given[2][2];
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t i = from + b * 2 * L, iw = past || width % 2 ? i : larger(0, smaller(i, width - 2 * L));
        const int64_t ow = iw / 2 + padding - 1;
        block[b] = {iw, ow, {lanes_inside<T>(ow, g.out[1]), lanes_inside<T>(ow + 1, g.out[1])}};
        outputs_at(first / 2 + padding - 1, block[b], above[b]);
      }
      for (int64_t ih = first / 2 * 2; ih < last; ih += 2) {
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t iw = block[b].iw;
          outputs_at(ih / 2 + padding, block[b], given[1]);
          for (int later = 0; later < 2; ++later) {
            given[0][later] = above[b][later];
            above[b][later] = given[1][later];
          }
          Vec<T> sums[2][2] = {};
          rule.template give<padding>(given, sums);
          for (int64_t odd = 0; odd < 2; ++odd) {
            if (ih + odd < first || ih + odd >= last) continue;
            S* to = gx + ((plane * height + ih + odd) * width + iw);
            const int64_t count = width < 2 * L ? pixels_to_put<T>(g, iw, last - ih - odd) : smaller(width - iw, 2 * L);
            const Vec<T> low = by_turns<T>(sums[odd][0], sums[odd][1], false, sequence);
            const Vec<T> high = by_turns<T>(sums[odd][0], sums[odd][1], true, sequence);
            count >= L ? put(to, low) : store_first(to, low, count);
            if (count == 2 * L) {
              put(to + L, high);
            } else if (count > L) {
              store_first(to + L, high, count - L);
            }
          }
        }
      }
    }
  }
  if (past) stores_done();
}

template <class S, class Rule>
static void backward_overlaps(const Pool2dGeometry& g, const Rule& rule, S* gx, int64_t begin, int64_t end) {
  const bool padded = g.padding[0] == 1, narrow = g.in[1] <= 2 * kLanes<Sum<S>>;
  const auto run = padded   ? narrow ? backward_overlaps_of<1, 1, S, Rule> : backward_overlaps_of<1, 16, S, Rule>
                   : narrow ? backward_overlaps_of<0, 1, S, Rule>
                            : backward_overlaps_of<0, 16, S, Rule>;
  run(g, rule, gx, begin, end);
}

}  // namespace cnnops::cpu::CNNOPS_ISA
