// Convolution of bfloat16 tensors by an instruction that adds up two products at once (bfloat16.h), in both layouts.
//
//   y[p, k]    = bias[k] + sum over (kh,kw,c) of window[p, (kh,kw,c)] * w[k, (kh,kw,c)]       p = (n, oh, ow)
//
// Forward, the rows of a tile are pixels and its vectors lie along output channels. A strip of the image is copied with
// its border so that a pixel's channels follow each other, pixel after pixel: then what a pixel sees through a tap, or
// through a whole row of taps, is a run of numbers at a distance that is the same for all pixels, and pairs are made
// of neighbours in such a run. (A channels_last image that needs no border is read where it stands.) Weights are packed
// to match, once for all strips of a thread. The gradient of the input is forward with other taps (../correlation.h).
//
// A task is a strip for a block of output channels. A sum is made in one order, whatever the batch. Zeros of the border
// are multiplied: an infinite or NaN weight gives NaN there, where plain loops would skip it. Subnormal numbers count
// as zeros. Refuses other types than bfloat16, processors without AVX512_BF16, and filters too large for its scratch
// memory. The gradient of the weight is in conv2d_bfloat16_grad_weight.cpp.
#include "bfloat16_strips.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int64_t kMostDepth = 32768;                  // numbers of a filter
constexpr int64_t kWeightNumbers = 1 << 18;            // about as many packed weights in a block of output channels
constexpr int64_t kStripNumbers = 3 << 16;             // at most, in a strip
constexpr int64_t kMostPixels = 480, kFewPixels = 96;  // of a strip
constexpr int64_t kGoodTasks = 32;
constexpr int64_t kPixelRoom = kMostPixels + kDotRows;

/// Whether all windows lie inside the image.
bool inside(const Axis& a) {
  return a.taps == 0 || (a.offset0 >= 0 && a.offset0 + seen_places(a, a.count) <= a.in_size);
}

/// A correlation: forward, or the gradient of the input.
struct Layer {
  Pass pass;
  int64_t n, groups, classes_h, classes_w;
  int64_t channels, rows;  // of a group: summed over, and produced
  Strides<> in, out;
  int64_t weight_group, weight_row, weight_channel, weight_tap, kernel_width, kernel_plane;
  Border border;
  bool in_place;  // read the input where it stands

  Layer(const Conv2dGeometry& g, Pass pass)
      : pass(pass),
        n(g.n),
        groups(g.groups),
        classes_h(axis_classes(g, pass, 0)),
        classes_w(axis_classes(g, pass, 1)),
        channels((pass == Pass::forward ? g.c : g.k) / g.groups),
        rows((pass == Pass::forward ? g.k : g.c) / g.groups),
        in(g.layout, channels * g.groups, pass == Pass::forward ? g.in : g.out),
        out(g.layout, rows * g.groups, pass == Pass::forward ? g.out : g.in),
        border(g.border) {
    const bool planes = g.layout == Layout::contiguous;
    const int64_t c_group = g.c / g.groups;
    kernel_width = g.kernel[1];
    kernel_plane = g.kernel[0] * g.kernel[1];
    const int64_t filter = c_group * kernel_plane, channel = planes ? kernel_plane : 1;
    weight_group = g.k / g.groups * filter;
    weight_row = pass == Pass::forward ? filter : channel;
    weight_channel = pass == Pass::forward ? channel : filter;
    weight_tap = planes ? 1 : c_group;
    in_place = !planes && (g.groups == 1 || channels % 2 == 0);  // or a copy would make other pairs of its numbers
    for (int64_t cls = 0; cls < classes_h; ++cls) in_place &= inside(in_memory_order(make_axis(g, pass, 0, cls)));
    for (int64_t cls = 0; cls < classes_w; ++cls) in_place &= inside(in_memory_order(make_axis(g, pass, 1, cls)));
  }
  int64_t classes() const { return classes_h * classes_w; }
  int64_t depth() const { return channels * kernel_plane; }
};

// ---- forward and grad_input ----

/// The axes that a strip is planned by: all classes have at most so many outputs and reach at most so far.
Axis widest(const Conv2dGeometry& g, Pass pass, int dim) {
  Axis widest = in_memory_order(make_axis(g, pass, dim, 0));
  for (int64_t cls = 1; cls < axis_classes(g, pass, dim); ++cls) {
    const Axis a = in_memory_order(make_axis(g, pass, dim, cls));
    if (reach(a) > reach(widest)) widest.taps = a.taps, widest.offset_step = a.offset_step;
  }
  return widest;
}

/// Tasks are numbered (group, class, block of output channels, strip), so that those with the same weights are
/// together.
struct Plan {
  Layer t;
  Cut blocks;  // of panels
  Axis h, w;
  ClassStrips strips;
  int64_t most_pairs;  // steps of a filter

  Plan(const Conv2dGeometry& g, Pass pass)
      : t(g, pass),
        blocks(ceil_div(t.rows, kPanel), kWeightNumbers / (t.depth() * kPanel)),
        h(widest(g, pass, 0)),
        w(widest(g, pass, 1)),
        strips(h, w, g.n, pixels_of_task(), t.channels, t.in_place ? INT64_MAX : kStripNumbers),
        most_pairs(t.kernel_plane * ceil_div(t.channels, 2)) {}
  int64_t pixels_of_task() const {
    const int64_t all = t.n * h.count * w.count * t.groups * t.classes() * blocks.count;
    return smaller(larger(all / kGoodTasks, kFewPixels), kMostPixels);
  }
  int64_t tasks() const { return t.groups * t.classes() * blocks.count * strips.count(); }

  int64_t block_weights() const { return blocks.size * most_pairs * 2 * kPanel; }
  int64_t lines() const { return t.depth() * kPanel; }
  int64_t strip() const { return t.in_place ? 0 : round_up(kStripNumbers, 32); }
  int64_t workspace() const { return (block_weights() + lines() + strip()) / 2 + kPixelRoom * kPanel; }
};

/// The steps that a filter's taps of one class take through the input.
Steps filter_steps(const Layer& t, const Axis& h, const Axis& w, int64_t row, int64_t column) {
  const bool together = w.offset_step == 1 && column == t.channels;
  return {h.taps, h.offset_step * row,
          w.taps == 0 ? 0
          : together  ? 1
                      : w.taps,
          w.offset_step * column, together ? w.taps * t.channels : t.channels};
}

/// lines[r][lane] = number r of the filters of a panel of channels, r in the order in which they lie in memory.
void gather_lines(const Layer& t, const BFloat16* weight, int64_t lanes, BFloat16* lines) {
  const int64_t run = t.weight_row == t.depth() ? t.depth() : t.kernel_plane;
  for (int64_t c = 0; c * run < t.depth(); ++c)
    for (int64_t r = 0; r < run; r += kDotLanes) {
      const int64_t count = smaller(kDotLanes, run - r);
      transpose_words(
          lanes, count,
          [&](int64_t i) { return load_words(weight + c * t.weight_channel + i * t.weight_row + r, 0, count); },
          [&](int64_t j, Vec<uint32_t> words) { store_words(lines + (c * run + r + j) * kPanel, words, kPanel); });
    }
}

/// The weights of a panel of output channels in the order of the steps, in pairs.
template <int V>
void pack_weights(const Layer& t, const Axis& h, const Axis& w, const Steps& steps, const BFloat16* weight,
                  int64_t lanes, BFloat16* lines, BFloat16* to) {
  const bool gathered = t.weight_row != 1;
  if (gathered) gather_lines(t, weight, lanes, lines);
  const bool filters = t.weight_row == t.depth();  // lines are whole filters, otherwise one for each channel
  const int64_t channel = filters ? t.weight_channel : t.kernel_plane, tap = filters ? t.weight_tap : 1;
  const auto line = [&](int64_t th, int64_t tw, int64_t c) {
    const int64_t at = (h.k0 + th * h.k_step) * t.kernel_width + w.k0 + tw * w.k_step;
    return gathered ? load_first_words(lines + (c * channel + at * tap) * kPanel, kPanel)
                    : load_first_words(weight + c * t.weight_channel + at * t.weight_tap, lanes);
  };
  for (int64_t th = 0; th < steps.outer; ++th)
    for (int64_t j = 0; j < steps.inner; ++j) {
      int64_t tw = j, c = 0;
      const auto next = [&](int64_t r) {
        if (r >= steps.length) return Words{};
        const Words words = line(th, tw, c);
        if (++c == t.channels) c = 0, ++tw;
        return words;
      };
      for (int64_t r = 0; r < steps.length; r += 2, to += V * 2 * kDotLanes) {
        const Words first = next(r);
        store_pairs<V>(first, next(r + 1), to);
      }
    }
}

/// to[place][c] for `columns` places of a row from w0 on, numbers of a channel or a pixel exchanged as needed.
void copy_row(const Layer& t, const BFloat16* row, int64_t size, int64_t w0, int64_t columns, BFloat16* to) {
  const int64_t C = t.channels, begin = smaller(larger(-w0, 0), columns);
  const int64_t end = larger(smaller(size - w0, columns), begin);
  if (t.in.w == 1 && C > 1) {
    for (int64_t c = 0; c < C; c += kPanel)
      for (int64_t j = 0; j < columns; j += kDotLanes) {
        const int64_t from = smaller(larger(begin - j, 0), kDotLanes), till = smaller(larger(end - j, from), kDotLanes);
        transpose_words(
            smaller(kPanel, C - c), smaller(kDotLanes, columns - j),
            [&](int64_t i) { return load_words(row + (c + i) * t.in.c + w0 + j, from, till); },
            [&](int64_t i, Vec<uint32_t> words) { store_words(to + (j + i) * C + c, words, smaller(kPanel, C - c)); });
      }
  } else {
    __builtin_memset(to, 0, begin * C * sizeof *to);
    if (t.in.w == C) {
      __builtin_memcpy(to + begin * C, row + (w0 + begin) * C, (end - begin) * C * sizeof *to);
    } else {
      for (int64_t j = begin; j < end; ++j) __builtin_memcpy(to + j * C, row + (w0 + j) * t.in.w, C * sizeof *to);
    }
    __builtin_memset(to + end * C, 0, (columns - end) * C * sizeof *to);
  }
  if (t.border == Border::zeros) return;
  for (int64_t j = 0; j < columns; ++j) {
    if (j == begin && end > begin) j = end;
    for (int64_t c = 0; c < C && j < columns; ++c)
      to[j * C + c] = row[pixel_at(w0 + j, size, t.border) * t.in.w + c * t.in.c];
  }
}

void copy_strip(const Layer& t, const Axis& h, const Axis& w, const ClassStrip& s, const BFloat16* in, BFloat16* to) {
  const int64_t rows = seen_places(h, s.rows), columns = seen_places(w, s.columns);
  const int64_t h0 = s.i * h.in_step + h.offset0, w0 = s.j * w.in_step + w.offset0;
  for (int64_t n = s.n; n < s.n + s.images; ++n)
    for (int64_t i = 0; i < rows; ++i, to += columns * t.channels) {
      const int64_t row = pixel_at(h0 + i, h.in_size, t.border);
      if (row < 0) {
        __builtin_memset(to, 0, columns * t.channels * sizeof *to);
      } else {
        copy_row(t, in + n * t.in.n + row * t.in.h, w.in_size, w0, columns, to);
      }
    }
}

/// All outputs of a strip for one panel of channels.
template <int V>
void strip_panel(const Layer& t, const Axis& h, const Axis& w, const ClassStrip& s, const Steps& steps,
                 const BFloat16* base, const int64_t* offsets, const BFloat16* weights, int64_t lanes,
                 const BFloat16* bias, float* sums, BFloat16* out) {
  const int64_t plane = s.rows * s.columns, count = s.images * plane;
  for_tiles<kDotRows>(0, count, [&](int64_t p, auto height) {
    const BFloat16* rows[height];
    for (int64_t m = 0; m < height; ++m) rows[m] = base + offsets[smaller(p + m, count - 1)];
    dot_tile<height, V>(steps, rows, weights, sums + p * V * kDotLanes, false);
  });
  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t i = 0; i < s.rows; ++i, sums += s.columns * V * kDotLanes) {
      BFloat16* row =
          out + (s.n + n) * t.out.n + (h.first + (s.i + i) * h.step) * t.out.h + (w.first + s.j * w.step) * t.out.w;
      if (t.out.w == 1) {  // rows that follow each other are one
        const bool whole = w.step == 1 && h.step == 1 && s.columns == t.out.h;
        store_transposed<V>(sums, whole ? plane : s.columns, lanes, bias, w.step, t.out.c, row);
        if (!whole) continue;
        sums += plane * V * kDotLanes;
        break;
      }
      for (int64_t j = 0; j < s.columns; ++j)
        for (int64_t k = 0; k < lanes; k += kDotLanes) {
          const int64_t some = smaller(kDotLanes, lanes - k);
          const Vec<float> add = bias ? load_first(bias + k, some) : Vec<float>{};
          store_rounded(row + j * w.step * t.out.w + k, load(sums + j * V * kDotLanes + k) + add, some);
        }
    }
}

template <Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<BFloat16>& o, float* workspace, int64_t begin,
               int64_t end) {
  const Plan plan(g, pass);
  const Layer& t = plan.t;
  float* sums = workspace;
  BFloat16* weights = reinterpret_cast<BFloat16*>(sums + kPixelRoom * kPanel);
  BFloat16 *lines = weights + plan.block_weights(), *copy = lines + plan.lines();
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t filters = task / plan.strips.count(), block = filters % plan.blocks.count;
    const int64_t cls = filters / plan.blocks.count % t.classes(), group = filters / plan.blocks.count / t.classes();
    const Axis h = in_memory_order(make_axis(g, pass, 0, cls / t.classes_w));
    const Axis w = in_memory_order(make_axis(g, pass, 1, cls % t.classes_w));
    const ClassStrip s(plan.strips, task % plan.strips.count(), h, w, g.n);
    if (s.rows <= 0 || s.columns <= 0) continue;  // a smaller class than class 0

    const int64_t column = t.in_place ? t.in.w : t.channels;
    const int64_t row = t.in_place ? t.in.h : seen_places(w, s.columns) * column;
    const int64_t image = t.in_place ? t.in.n : seen_places(h, s.rows) * row;
    const Steps steps = filter_steps(t, h, w, row, column);
    const BFloat16* in = o.a + group * t.channels * t.in.c;
    const BFloat16* base = copy;
    if (steps.pairs() == 0) {
      base = in;
    } else if (t.in_place) {
      base = in + s.n * image + (s.i * h.in_step + h.offset0) * row + (s.j * w.in_step + w.offset0) * column;
    } else {
      copy_strip(t, h, w, s, in, copy);
    }
    int64_t offsets[kMostPixels], p = 0;
    for (int64_t n = 0; n < s.images; ++n)
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < s.columns; ++j) offsets[p++] = n * image + i * h.in_step * row + j * w.in_step * column;

    const int64_t size = steps.pairs() * 2 * kPanel;
    for (int64_t panel = 0; panel < plan.blocks.size; ++panel) {
      const int64_t row0 = (block * plan.blocks.size + panel) * kPanel, lanes = smaller(kPanel, t.rows - row0);
      if (lanes <= 0) break;
      const int64_t channel = group * t.rows + row0;
      with_panel(lanes, [&](auto v) {
        if (packed != filters)
          pack_weights<v>(t, h, w, steps, o.b + group * t.weight_group + row0 * t.weight_row, lanes, lines,
                          weights + panel * size);
        strip_panel<v>(t, h, w, s, steps, base, offsets, weights + panel * size, lanes,
                       o.bias ? o.bias + channel : nullptr, sums, o.out + channel * t.out.c);
      });
    }
    packed = filters;
  }
}

// ---- the row of the table ----

const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (!__builtin_cpu_supports("avx512bf16")) return "this processor has no instruction for it, AVX512_BF16";
  if (pass == Pass::grad_weight) return refuses_dot_products_grad_weight(g);
  const Plan plan(g, pass);
  if (plan.t.depth() > kMostDepth) return "its filters are too long for its scratch memory";
  return plan.strips.fits ? nullptr : "what an output sees overflows its scratch memory";
}

template <Pass pass>
Conv2dRun<BFloat16> run() {
  return {[](const Conv2dGeometry& g) { return Plan(g, pass).tasks(); },
          [](const Conv2dGeometry& g) { return Plan(g, pass).workspace(); }, correlate<pass>};
}

#endif

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_dot_products() {
  Conv2dAlgorithm<Conv2dRun<S>> row{
      "dot_products",
      "pairs of bfloat16 numbers multiplied and added by one instruction; AVX512_BF16",
      [](const Conv2dGeometry&, Pass) -> const char* {
        return std::is_same_v<S, BFloat16> ? "it needs the instruction set avx512, and a processor with AVX512_BF16"
                                           : "the processor's instruction for it takes bfloat16 numbers only";
      },
      {},
      {},
      {}};
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, BFloat16>) {
    row.refuses = refuses;
    row.forward = run<Pass::forward>();
    row.grad_input = run<Pass::grad_input>();
    row.yields = [](const Conv2dGeometry& g, Pass pass) {  // to what lays vectors along pixels, or to `fold`
      const int64_t produced = (pass == Pass::grad_input ? g.c : g.k) / g.groups;
      if (g.layout == Layout::contiguous) return produced < 8;
      return pass == Pass::grad_input && produced <= 4 && g.kernel[0] * g.kernel[1] > 1;
    };
    row.grad_weight = dot_products_grad_weight();
  }
#endif
  return row;
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_dot_products();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_dot_products();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_dot_products();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_dot_products();

}  // namespace cnnops::cpu::CNNOPS_ISA
