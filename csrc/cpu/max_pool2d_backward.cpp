// Max pooling, backward: a pixel gets gy of those outputs that see it through the tap at which they found their
// maximum, added up in the order of the taps.
#include "pool2d.h"
#include "pool2d_overlaps.h"
#include "pool2d_pixels.h"
#include "pool2d_positions.h"
#include "pool2d_rows.h"
#include "pool2d_squares.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// What lanes [begin, end) of a vector, or all if it is `whole`, get from the outputs `out`, out + 1, ... if these
/// found their maxima at tap `place`.
template <bool whole, class S, class Position>
Vec<Sum<S>> terms_of(const S* gy, const Position* positions, int64_t out, int64_t place, int64_t begin, int64_t end) {
  using T = Sum<S>;
  // The positions first: the other order makes GCC's code for AVX2 half as fast.
  const auto won = load_places<T>(positions + out, whole ? 0 : begin, whole ? kLanes<T> : end);
  const Vec<T> terms = whole ? load(gy + out) : load_between(gy + out, begin, end, T(0));
  return where_won<T>(won, Place<T, Position>{} + Position(place), terms);
}

/// In contiguous layout, for strides 1 and 2: each vector holds pixels `stride` apart, whose outputs are neighbours.
/// The last vectors of a row begin early enough to be whole, or run over into the next row, which is written later.
template <class S, class Position>
void max_backward_of_rows(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                          int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  struct Tap {
    int64_t kw, start;
    Lanes lanes;
  };
  Tap taps[2][kMostTaps];  // those that the pixels of sums[0] are seen through, and of sums[1]
  const int64_t s = g.stride[1], width = g.in[1];
  for (int64_t task = begin; task < end;) {
    const int64_t image = task / g.in[0],
                  next = smaller(smaller(end, task + rows_together<T>(g)), (image + 1) * g.in[0]);
    for (int64_t i = 0; i < width; i += s * L) {
      const int64_t iw = larger(0, smaller(i, width - s * L));
      int count[2] = {};
      bool all_whole = true;
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
        const int64_t reach = iw + g.padding[1] - kw * g.dilation[1], odd = s == 2 ? reach & 1 : 0;
        const int64_t start = s == 2 ? (reach + odd) >> 1 : reach;
        const Lanes lanes = lanes_inside<T>(start, g.out[1]);
        if (lanes.begin < lanes.end) taps[odd][count[odd]++] = {kw, start, lanes};
        all_whole &= lanes.end - lanes.begin == L;
      }
      const auto run = [&](auto whole) {
        for (int64_t row = task; row < next; ++row) {
          const int64_t ih = row - image * g.in[0];
          Vec<T> sums[2] = {};
          for_outputs_over(g, 0, ih, outputs_over(g, 0, ih), [&](int64_t oh, int64_t kh) {
            const int64_t out = (image * g.out[0] + oh) * g.out[1], place = kh * g.kernel[1];
            const auto add = [&](Vec<T>& sum, const Tap& tap) {
              sum +=
                  terms_of<whole.value>(gy, positions, out + tap.start, place + tap.kw, tap.lanes.begin, tap.lanes.end);
            };
            for (int k = 0; k < count[0]; ++k) add(sums[0], taps[0][k]);
            for (int k = 0; k < count[1]; ++k) add(sums[1], taps[1][k]);
          });
          put_by_turns(gx + row * width + iw, sums, s, pixels_to_put<T>(g, iw, end - row),
                       std::make_integer_sequence<int, int(L)>());
        }
      };
      all_whole ? run(std::true_type()) : run(std::false_type());
    }
    task = next;
  }
}

/// The same for windows of 2x2 that do not overlap.
template <class S, class Position>
void max_backward_of_squares(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                             int64_t end) {
  using T = Sum<S>;
  const auto give = [&](int64_t out, auto count) {
    const bool whole = count == kLanes<T>;
    const Vec<T> grad = Vec<T>{} + (whole ? load(gy + out) : load_first(gy + out, count));  // -0 gives 0, as in a sum
    const auto won = load_positions<T>(positions + out, 0, count);
    Square<T> square;
    for (int place = 0; place < 4; ++place) square.tap[place / 2][place % 2] = won == Word<T>(place) ? grad : Vec<T>{};
    return square;
  };
  backward_squares(g, give, gx, begin, end);
}

/// The same for windows of 3x3 that are two apart.
template <class S, class Position>
struct MaxOverlaps {
  using T = Sum<S>;
  const Pool2dGeometry& g;
  const S* gy;
  const Position* positions;
  int64_t first_output;
  struct Given {
    Vec<T> grad;
    Place<T, Position> won;
    Given& operator=(const Given& from) {  // not the padding too: a load wider than the store before it waits
      grad = from.grad, won = from.won;
      return *this;
    }
  };

  void begin(int64_t plane) { first_output = plane * g.out[0] * g.out[1]; }
  Given at(int64_t oh, int64_t ow, Lanes lanes) const {
    const int64_t out = first_output + oh * g.out[1] + ow;
    return {load_outputs(gy + out, lanes), load_places<T>(positions + out, lanes.begin, lanes.end)};
  }
  template <int padding>
  void give(const Given (&given)[2][2], Vec<T> (&sums)[2][2]) const {
    for (int lower = 1; lower >= 0; --lower)
      for (int later = 1; later >= 0; --later)
        for (int row = 0; row < 2; ++row)
          for (int column = 0; column < 2; ++column) {
            const int kh = tap_of(padding, row, lower), kw = tap_of(padding, column, later);
            if (!is_tap(kh) || !is_tap(kw)) continue;
            const Given& from = given[lower][later];
            sums[row][column] += where_won<T>(from.won, Place<T, Position>{} + Position(kh * 3 + kw), from.grad);
          }
  }
};

constexpr int64_t kPiece = 256;

/// Row ih of a plane, otherwise: from each output to the pixel where it found its maximum.
template <class S, class Position>
void max_backward_by_outputs(const Pool2dGeometry& g, const S* gy, const Position* positions, int64_t ih,
                             int64_t first_output, S* gx) {
  const Range rows = outputs_over(g, 0, ih);
  for (int64_t begin = 0; begin < g.in[1]; begin += kPiece) {
    const int64_t end = smaller(begin + kPiece, g.in[1]);
    const int64_t first = outputs_over(g, 1, begin).begin, last = outputs_over(g, 1, end - 1).end - 1;
    Sum<S> sums[kPiece] = {};
    for_outputs_over(g, 0, ih, rows, [&](int64_t oh, int64_t kh) {
      for (int64_t ow = last; ow >= first; --ow) {
        const int64_t out = first_output + oh * g.out[1] + ow, kw = positions[out] - kh * g.kernel[1];
        const int64_t iw = window_at(g, 1, ow).start + kw * g.dilation[1];
        if (kw >= 0 && kw < g.kernel[1] && iw >= begin && iw < end) sums[iw - begin] += value(gy[out]);
      }
    });
    for (int64_t iw = begin; iw < end; ++iw) gx[iw] = rounded<S>(sums[iw - begin]);
  }
}

/// Row ih of an image in channels_last.
template <class S, class Position>
void max_backward_by_pixels(const Pool2dGeometry& g, const S* gy, const Position* positions, int64_t ih,
                            int64_t first_output, S* gx) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Range rows = outputs_over(g, 0, ih);
  for (int64_t iw = 0; iw < g.in[1]; ++iw) {
    const Range columns = outputs_over(g, 1, iw);
    for (int64_t c = 0; c < g.c; c += L) {
      const int64_t channels = smaller(g.c - c, L);
      Vec<T> sum{};
      for_outputs_over(g, 0, ih, rows, [&](int64_t oh, int64_t kh) {
        for_outputs_over(g, 1, iw, columns, [&](int64_t ow, int64_t kw) {
          const int64_t out = (first_output + oh * g.out[1] + ow) * g.c + c;
          sum += terms_of<false>(gy, positions, out, kh * g.kernel[1] + kw, 0, channels);
        });
      });
      store_first(gx + iw * g.c + c, sum, channels);
    }
  }
}

/// Backward in channels_last, for dilation 1. Pixels whose distance is the stride are seen through the same taps: so
/// these are found once a row for each of `stride` phases, and pixels far from the border take them as they are.
constexpr int kMostSeers = 16;
struct Seer {
  int64_t offset, back, place;  // output q - back, if q is the last whose window begins at or before the pixel
};

/// The outputs that see the pixels of one phase of row ih.
int seers_of(const Pool2dGeometry& g, int64_t ih, int64_t phase, Seer* seers) {
  int count = 0;
  for_outputs_over(g, 0, ih, outputs_over(g, 0, ih), [&](int64_t oh, int64_t kh) {
    for (int64_t kw = phase, back = 0; kw < g.kernel[1]; kw += g.stride[1], ++back)
      seers[count++] = {(oh * g.out[1] - back) * g.c, back, kh * g.kernel[1] + kw};
  });
  return count;
}

template <class S, class Position>
void max_backward_of_pixels(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                            int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const bool past = pixels_past_cache(g, g.in, gx);
  /// Pixels q of a phase, `step` apart from gx[to] on, seen by `count` outputs; `known` is count or, if that is
  /// unusual, 0.
  const auto run = [&](auto known, const Seer* see, int count, int64_t from, int64_t to, int64_t pixels) {
    constexpr int most = known.value ? known.value : kMostSeers;
    for_stretches<T>(g.c, past, [&](auto channels) {
      constexpr int size = channels.size;
      const int seeing = known.value ? known.value : count;
      const int64_t lanes = channels.is_whole ? L : channels.lanes;
      Place<T, Position> places[most];
      for (int s = 0; s < seeing; ++s) places[s] = Place<T, Position>{} + Position(see[s].place);
      for (int64_t q = 0; q < pixels; ++q) {
        Vec<T> sums[size] = {};
        for (int s = 0; s < seeing; ++s) {
          const int64_t out = from + q * g.c + see[s].offset;
          for (int i = 0; i < size; ++i)
            sums[i] += where_won<T>(load_places<T>(positions + out + channels.c + i * L, 0, lanes), places[s],
                                    channels.load(gy + out, i));
        }
        for (int i = 0; i < size; ++i) channels.store(gx + to + q * g.stride[1] * g.c, i, sums[i]);
      }
    });
  };
  Seer seers[kMostSeers], inside[kMostSeers];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t ih = task % g.in[0], first = task / g.in[0] * g.out[0] * g.out[1] * g.c;
    for (int64_t phase = 0; phase < g.stride[1]; ++phase) {
      const int count = phase < g.kernel[1] ? seers_of(g, ih, phase, seers) : 0;
      const int64_t most = ceil_div(larger(g.kernel[1] - phase, 0), g.stride[1]);  // windows over a pixel
      int64_t q = phase < g.padding[1] ? ceil_div(g.padding[1] - phase, g.stride[1]) : 0;
      int64_t iw = q * g.stride[1] + phase - g.padding[1];
      while (iw < g.in[1]) {
        const int64_t from = first + q * g.c, to = (task * g.in[1] + iw) * g.c;
        int64_t pixels = smaller(ceil_div(g.in[1] - iw, g.stride[1]), g.out[1] - q);
        if (q + 1 < most || pixels <= 0) {
          int seeing = 0;
          for (int i = 0; i < count; ++i)
            if (q - seers[i].back >= 0 && q - seers[i].back < g.out[1]) inside[seeing++] = seers[i];
          run(std::integral_constant<int, 0>(), inside, seeing, from, to, pixels = 1);
        } else if (count == 1) {
          run(std::integral_constant<int, 1>(), seers, count, from, to, pixels);
        } else if (count == 2) {
          run(std::integral_constant<int, 2>(), seers, count, from, to, pixels);
        } else if (count == 4) {
          run(std::integral_constant<int, 4>(), seers, count, from, to, pixels);
        } else {
          run(std::integral_constant<int, 0>(), seers, count, from, to, pixels);
        }
        q += pixels;
        iw += pixels * g.stride[1];
      }
    }
  }
  if (past) stores_done();
}

template <class S, class Position>
void max_pool2d_backward(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                         int64_t end) {
  const int64_t depth = depth_of(g);
  const bool plain = !g.adaptive && g.dilation[0] == 1 && g.dilation[1] == 1;
  const int64_t most = plain ? ceil_div(g.kernel[0], g.stride[0]) * ceil_div(g.kernel[1], g.stride[1]) : kMostSeers + 1;
  if (depth > 1 && most <= kMostSeers) return max_backward_of_pixels(g, gy, positions, gx, begin, end);
  if (goes_by_squares(g)) return max_backward_of_squares(g, gy, positions, gx, begin, end);
  if (goes_by_overlaps(g)) return backward_overlaps(g, MaxOverlaps<S, Position>{g, gy, positions, 0}, gx, begin, end);
  if (depth == 1 && !g.adaptive && g.stride[1] <= 2 && g.kernel[1] <= kMostTaps)
    return max_backward_of_rows(g, gy, positions, gx, begin, end);
  const auto run = depth > 1 ? max_backward_by_pixels<S, Position> : max_backward_by_outputs<S, Position>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.in[0];
    run(g, gy, positions, task % g.in[0], image * g.out[0] * g.out[1], gx + task * g.in[1] * depth);
  }
}

}  // namespace

template <class S>
void set_max_pool2d_backward(Kernels<S>& k) {
  k.max_pool2d.backward = max_pool2d_backward<S, uint8_t>;
  k.max_pool2d_wide.backward = max_pool2d_backward<S, int32_t>;
}

template void set_max_pool2d_backward(Kernels<float>&);
template void set_max_pool2d_backward(Kernels<double>&);
template void set_max_pool2d_backward(Kernels<BFloat16>&);
template void set_max_pool2d_backward(Kernels<Float16>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
