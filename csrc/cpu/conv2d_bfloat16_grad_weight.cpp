// The gradient of the weights of a bfloat16 convolution, by products of pairs (bfloat16.h), in both layouts.
//
//   gw[k, r] = sum over p of gy[p, k] * x[r, p]          p = (n, oh, ow), r = (c, kh, kw)
//
// A pair is two neighbours in a row of outputs. Strips of x are copied as planes, column by column apart as far as the
// stride (columns 0, s, 2s, .. and then 1, s+1, ..), so that what a row of outputs sees through a tap is a run; gy is
// packed. The rows of a tile are taps, its vectors lie along output channels.
//
// A task is a block of the filters' channels for a block of output channels. It adds up strip by strip, in one order
// whatever the batch. Refuses filters of more taps than its scratch memory holds.
#include "bfloat16_strips.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {

#if defined(__AVX512F__)

namespace {

constexpr int64_t kSumRows = 160;  // weights of one output channel in a task
constexpr int64_t kSumPanels = 8;  // panels of output channels in a task
constexpr int64_t kMostTaps = 4096;
constexpr int64_t kFewTasks = 8;
constexpr int64_t kSumPixels = 512;         // of a strip
constexpr int64_t kPlaneNumbers = 1 << 18;  // at most, in a strip of x

/// Tasks are numbered (group, block of output channels, block of channels).
struct WeightPlan {
  int64_t n, k_group, c_group, taps, kernel_width;
  bool planes;
  Border border;
  Strides<> x, gy;
  Axis h, w;
  Cut channels, blocks;    // of channels, of panels
  int64_t phases, beyond;  // columns a stride apart stand together: so many lists, longer than a row of outputs by that
  ClassStrips strips;

  explicit WeightPlan(const Conv2dGeometry& g)
      : n(g.n),
        k_group(g.k / g.groups),
        c_group(g.c / g.groups),
        taps(g.kernel[0] * g.kernel[1]),
        kernel_width(g.kernel[1]),
        planes(g.layout == Layout::contiguous),
        border(g.border),
        x(g.layout, g.c, g.in),
        gy(g.layout, g.k, g.out),
        h(make_axis(g, Pass::forward, 0, 0)),
        w(make_axis(g, Pass::forward, 1, 0)),
        channels(c_group, kSumRows / taps),
        blocks(ceil_div(k_group, kPanel), kSumPanels * kSumRows / larger(taps, kSumRows)),
        phases(smaller(w.in_step, reach(w) + 1)),
        beyond(reach(w) / w.in_step),
        strips(h, w, g.n, kSumPixels, channels.size, kPlaneNumbers) {
    if (g.groups * channels.count * blocks.count < kFewTasks) blocks = Cut(ceil_div(k_group, kPanel), 1);
  }
  int64_t tasks(int64_t groups) const { return groups * blocks.count * channels.count; }

  int64_t row(int64_t columns) const { return phases * (columns + beyond); }
  int64_t image(const ClassStrip& s) const { return seen_places(h, s.rows) * row(s.columns); }
  /// Where what the first output sees through a tap lies in a plane.
  int64_t shift(int64_t tap, int64_t columns) const {
    const int64_t th = tap / kernel_width * h.offset_step, tw = tap % kernel_width * w.offset_step;
    return th * row(columns) + tw % w.in_step * (columns + beyond) + tw / w.in_step;
  }
  /// The rows of outputs of a strip; they are one if no row sees more than its own columns.
  Steps steps(const ClassStrip& s) const {
    const bool whole = row(s.columns) == s.columns && h.in_step == 1 && strips.across == 1;
    return {s.images, image(s), whole ? 1 : s.rows, h.in_step * row(s.columns), whole ? s.rows * s.columns : s.columns};
  }

  int64_t room_x() const { return round_up(channels.size * strips.images * strips.in_rows * row(strips.columns), 32); }
  int64_t room_gy() const { return strips.images * strips.rows * round_up(strips.columns, 2) * kPanel; }
  int64_t room_sums() const { return blocks.size * round_up(channels.size * taps, kDotRows) * kPanel; }
  int64_t workspace() const { return room_sums() + (room_x() + room_gy()) / 2; }
};

/// The planes of channels [c0, c0 + channels) that a strip of outputs sees: [c][image][row][column % stride][column].
void copy_planes(const WeightPlan& t, const ClassStrip& s, const BFloat16* x, int64_t channels, BFloat16* to) {
  const int64_t length = s.columns + t.beyond, plane = s.images * t.image(s), rows = seen_places(t.h, s.rows);
  const int64_t h0 = s.i * t.h.in_step + t.h.offset0, w0 = s.j * t.w.in_step + t.w.offset0;
  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t phase = 0; phase < t.phases; ++phase, to += length) {
        const int64_t ih = pixel_at(h0 + i, t.h.in_size, t.border);
        const BFloat16* row = x + (s.n + n) * t.x.n + ih * t.x.h;
        const auto column = [&](int64_t j) {
          return ih < 0 ? -1 : pixel_at(w0 + phase + j * t.w.in_step, t.w.in_size, t.border);
        };
        if (t.planes) {
          const int64_t first = w0 + phase, begin = smaller(larger(-first, 0), length);
          const int64_t end = larger(smaller(t.w.in_size - first, length), begin);
          for (int64_t c = 0; c < channels; ++c) {
            const BFloat16* from = row + c * t.x.c;
            BFloat16* line = to + c * plane;
            const bool straight = t.w.in_step == 1 && ih >= 0;
            if (straight) __builtin_memcpy(line + begin, from + first + begin, (end - begin) * sizeof *to);
            for (int64_t j = 0; j < length; ++j) {
              if (straight && j == begin && end > begin) j = end;
              if (j < length) line[j] = column(j) < 0 ? BFloat16{} : from[column(j)];
            }
          }
        } else {
          for (int64_t j = 0; j < length; j += kPanel)
            for (int64_t c = 0; c < channels; c += kDotLanes) {
              const int64_t pixels = smaller(kPanel, length - j), some = smaller(kDotLanes, channels - c);
              transpose_words(
                  pixels, some,
                  [&](int64_t i) {
                    const int64_t iw = column(j + i);
                    return iw < 0 ? Vec<uint32_t>{} : load_words(row + iw * t.x.w + c, 0, some);
                  },
                  [&](int64_t i, Vec<uint32_t> words) { store_words(to + (c + i) * plane + j, words, pixels); });
            }
        }
      }
}

/// A panel of gy in the order of the steps, in pairs.
template <int V>
void pack_gradient(const WeightPlan& t, const ClassStrip& s, const Steps& steps, const BFloat16* gy, int64_t lanes,
                   BFloat16* to) {
  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t i = 0; i < steps.inner; ++i, to += steps.run_pairs() * V * 2 * kDotLanes) {
      const BFloat16* from = gy + (s.n + n) * t.gy.n + (s.i + i) * t.gy.h + s.j * t.gy.w;
      if (!t.planes) {
        for (int64_t p = 0; p < steps.length; p += 2)
          store_pairs<V>(load_first_words(from + p * t.gy.w, lanes),
                         p + 1 < steps.length ? load_first_words(from + (p + 1) * t.gy.w, lanes) : Words{},
                         to + p * V * kDotLanes);
        continue;
      }
      for (int64_t p = 0; p < steps.length; p += 2 * kDotLanes)
        for (int64_t v = 0; v < V; ++v) {
          const int64_t count = smaller(2 * kDotLanes, steps.length - p);
          Vec<uint32_t> square[kDotLanes];
          for (int64_t k = 0; k < kDotLanes; ++k)
            square[k] = v * kDotLanes + k < lanes
                            ? (Vec<uint32_t>)load_first_words(from + (v * kDotLanes + k) * t.gy.c + p, count)
                            : Vec<uint32_t>{};
          transpose<uint32_t>(square);
          for (int64_t j = 0; 2 * j < count; ++j)
            store_words(to + ((p / 2 + j) * V + v) * 2 * kDotLanes, square[j], 2 * kDotLanes);
        }
    }
}

/// sums[row][V vectors] to the filters of a panel of output channels, from channel c0 of each on.
template <int V>
void store_filters(const WeightPlan& t, const float* sums, int64_t channels, int64_t c0, int64_t lanes, BFloat16* out) {
  const int64_t runs = t.planes ? 1 : t.taps, length = channels * t.taps / runs;
  for (int64_t run = 0; run < runs; ++run, sums += length * V * kDotLanes) {
    BFloat16* to = out + (t.planes ? c0 * t.taps : run * t.c_group + c0);
    store_transposed<V>(sums, length, lanes, nullptr, 1, t.c_group * t.taps, to);
  }
}

void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<BFloat16>& o, float* workspace, int64_t begin,
                 int64_t end) {
  const WeightPlan plan(g);
  float* sums = workspace;
  BFloat16 *gy = reinterpret_cast<BFloat16*>(sums + plan.room_sums()), *x = gy + plan.room_gy();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t c0 = task % plan.channels.count * plan.channels.size;
    const int64_t channels = smaller(plan.channels.size, plan.c_group - c0), rows = channels * plan.taps;
    const int64_t k0 = task / plan.channels.count % plan.blocks.count * plan.blocks.size * kPanel;
    const int64_t group = task / plan.channels.count / plan.blocks.count;
    const int64_t ks = smaller(plan.blocks.size * kPanel, plan.k_group - k0), panel = round_up(rows, kDotRows) * kPanel;
    const int64_t channel = group * plan.k_group + k0;
    __builtin_memset(sums, 0, plan.room_sums() * sizeof *sums);

    for (int64_t number = 0; number < plan.strips.count(); ++number) {
      const ClassStrip s(plan.strips, number, plan.h, plan.w, g.n);
      const Steps steps = plan.steps(s);
      copy_planes(plan, s, o.b + (group * plan.c_group + c0) * plan.x.c, channels, x);
      for (int64_t k = 0; k < ks; k += kPanel)
        with_panel(ks - k, [&](auto v) {
          pack_gradient<v>(plan, s, steps, o.a + (channel + k) * plan.gy.c, smaller(kPanel, ks - k), gy);
          for_tiles<kDotRows>(0, rows, [&](int64_t r, auto height) {
            const BFloat16* row[height];
            for (int64_t m = 0; m < height; ++m) {
              const int64_t at = smaller(r + m, rows - 1);
              const int64_t c = plan.planes ? at / plan.taps : at % channels;
              const int64_t tap = plan.planes ? at % plan.taps : at / channels;
              row[m] = x + c * s.images * plan.image(s) + plan.shift(tap, s.columns);
            }
            dot_tile<height, v>(steps, row, gy, sums + k / kPanel * panel + r * v * kDotLanes, true);
          });
        });
    }

    for (int64_t k = 0; k < ks; k += kPanel)
      with_panel(ks - k, [&](auto v) {
        store_filters<v>(plan, sums + k / kPanel * panel, channels, c0, smaller(kPanel, ks - k),
                         o.out + (channel + k) * plan.c_group * plan.taps);
      });
  }
}
}  // namespace

const char* refuses_dot_products_grad_weight(const Conv2dGeometry& g) {
  if (g.kernel[0] * g.kernel[1] > kMostTaps) return "its filters are too large for its scratch memory";
  return WeightPlan(g).strips.fits ? nullptr : "what an output sees overflows its scratch memory";
}

Conv2dRun<BFloat16> dot_products_grad_weight() {
  return {[](const Conv2dGeometry& g) { return WeightPlan(g).tasks(g.groups); },
          [](const Conv2dGeometry& g) { return WeightPlan(g).workspace(); }, grad_weight};
}

#endif

}  // namespace cnnops::cpu::CNNOPS_ISA
