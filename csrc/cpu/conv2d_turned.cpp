// Convolution of contiguous tensors by the kernels for channels_last ones.
//
// In (n, h, w, c) a window is read where it stands, whatever the stride, the dilation and the size of the image, and
// taps that see nothing but the border are left out (conv2d_channels_last.cpp). In (n, c, h, w) none of this holds. So
// a strip of an image, or some small images, are turned round into a buffer (turn.h), and so are the weights of a block
// of channels; there the other layout's kernel computes, and its result is turned back. A number is turned once for as
// many multiply-adds as there are taps and output channels: for a few dozens of channels that is little against what
// im2col's packing of every tap costs. The 16-bit floats are widened as they are turned: once for all taps.
//
// A strip is an image with so many rows, fewer or no rows of border above, and a gradient's strip is one of x's. A task
// is a strip for a block of produced channels (forward, grad_input), or a block of the weights for all strips, whose
// sums are added in order (grad_weight). If such blocks are few, the strips are dealt to parts, tasks of their own.
//
// Refuses what is channels_last, few channels, borders that show pixels, filters and rows that overflow its
// buffers, and 1x1 kernels, which are a plain matrix product.
#include "channels_last.h"
#include "turn.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kStripPixels = 1000;  // of a strip's results at most: less than two of the parts of a sum
template <class T>
constexpr int64_t kStripNumbers = (9 << 18) / int64_t(sizeof(T));  // of a strip, of all channels
template <class T>
constexpr int64_t kFilterNumbers = (3 << 20) / int64_t(sizeof(T));  // of a task's weights
template <class T>
constexpr int64_t kGradientNumbers = (5 << 17) / int64_t(sizeof(T));  // of a task's gradients of weights
constexpr int64_t kMostChannels = 128, kGoodChannels = 64, kFewChannels = 32, kLeastChannels = 16;  // of a block
constexpr int64_t kFewTasks = 4, kPartNumbers = 1 << 19;  // of all parts together

template <class S>
const Conv2dAlgorithm<Conv2dRun<S>>& channels_last() {
  static const auto row = conv2d_channels_last<S>();
  return row;
}

/// How images are cut into strips of `rows` rows of results and put together in groups of `images`.
template <class T>
struct Strips {
  int64_t rows, per_image, images, groups;

  /// For `in_channels` channels of what is read.
  Strips(const Conv2dGeometry& g, Pass pass, int64_t in_channels) {
    const bool backward = pass == Pass::grad_input, sums = pass == Pass::grad_weight;
    const int64_t pixels = sums ? kStripPixels : 512, numbers_together = sums ? 1 << 18 : 1 << 17;  // of small images
    const int64_t *in = backward ? g.out : g.in, *out = backward ? g.in : g.out;
    const int64_t width = larger(1, out[1]);
    rows = larger(1, smaller(out[0], kStripPixels / width));
    while (rows > 1 && numbers(g, pass, rows, in_channels) > kStripNumbers<T>) --rows;
    per_image = ceil_div(out[0], rows);
    rows = larger(1, ceil_div(out[0], larger(1, per_image)));
    const int64_t image = larger(1, in[0] * in[1] * in_channels);
    images = per_image > 1 ? 1 : larger(1, smaller(pixels / (rows * width), numbers_together / image));
    groups = ceil_div(g.n, images);
    if (!sums && groups > 1) {
      groups = round_up(groups, 2);
      images = ceil_div(g.n, groups);
      groups = ceil_div(g.n, images);
    }
  }

  int64_t count() const { return groups * per_image; }
  /// How many numbers so many rows of results see.
  static int64_t numbers(const Conv2dGeometry& g, Pass pass, int64_t rows, int64_t in_channels) {
    const int64_t reach = (g.kernel[0] - 1) * g.dilation[0];
    if (pass == Pass::grad_input) return smaller((rows + reach) / g.stride[0] + 1, g.out[0]) * g.out[1] * in_channels;
    return smaller((rows - 1) * g.stride[0] + reach + 1, g.in[0]) * g.in[1] * in_channels;
  }
};

/// Some images' rows of x, [h0, h1), and of y, [o0, o1), as images of their own.
struct Strip {
  int64_t n, h0, h1, o0, o1;
  Conv2dGeometry geometry;

  template <class T>
  Strip(const Conv2dGeometry& g, Pass pass, const Strips<T>& strips, int64_t group, int64_t strip, int64_t c,
        int64_t k) {
    const int64_t reach = (g.kernel[0] - 1) * g.dilation[0];
    const auto clamp = [](int64_t i, int64_t size) { return larger(0, smaller(i, size)); };
    n = group * strips.images;
    if (pass == Pass::grad_input) {
      h0 = strip * strips.rows;
      h1 = smaller(h0 + strips.rows, g.in[0]);
      const int64_t first = h0 + g.padding[0] - reach, last = h1 - 1 + g.padding[0];
      o0 = clamp(first > 0 ? ceil_div(first, g.stride[0]) : 0, g.out[0] - 1);
      o1 = larger(o0 + 1, clamp(last / g.stride[0] + 1, g.out[0]));
    } else {
      o0 = strip * strips.rows;
      o1 = smaller(o0 + strips.rows, g.out[0]);
      h0 = clamp(o0 * g.stride[0] - g.padding[0], g.in[0] - 1);
      h1 = larger(h0 + 1, clamp((o1 - 1) * g.stride[0] - g.padding[0] + reach + 1, g.in[0]));
    }
    geometry = g;
    geometry.layout = geometry.filters = Layout::channels_last;
    geometry.groups = 1;
    geometry.n = smaller(strips.images, g.n - n);
    geometry.c = c;
    geometry.k = k;
    geometry.in[0] = h1 - h0;
    geometry.out[0] = o1 - o0;
    geometry.padding[0] = g.padding[0] + h0 - o0 * g.stride[0];
  }
};

/// Turns a strip's rows, `count` from `first` on, of `channels` channels from `channel0` on of all `all`.
template <class S>
void turn_rows(const S* from, const Strip& s, int64_t all, const int64_t* size, int64_t first, int64_t count,
               int64_t channel0, int64_t channels, Sum<S>* to) {
  const int64_t plane = size[0] * size[1];
  for (int64_t n = 0; n < s.geometry.n; ++n)
    turn(from + ((s.n + n) * all + channel0) * plane + first * size[1], plane, count * size[1], channels, channels,
         to + n * count * size[1] * channels);
}

// ---- forward and grad_input ----

/// Tasks are numbered (group, block of produced channels, group of images, strip).
template <class T>
struct Tasks {
  int64_t channels, rows, taps;  // summed over and produced, of a group
  Strips<T> strips;
  int64_t block, blocks, total;

  Tasks(const Conv2dGeometry& g, Pass pass)
      : channels((pass == Pass::forward ? g.c : g.k) / g.groups),
        rows((pass == Pass::forward ? g.k : g.c) / g.groups),
        taps(g.kernel[0] * g.kernel[1]),
        strips(g, pass, channels) {
    // An element's order of summation depends on the block, so the block does not look at the batch; strips may.
    block = smaller(kMostChannels, rows);
    while (block > kLeastChannels && (block * taps * channels > kFilterNumbers<T> ||
                                      (g.groups * ceil_div(rows, block) < kFewTasks && block > kGoodChannels)))
      block = ceil_div(block, 2 * kLeastChannels) * kLeastChannels;
    blocks = ceil_div(rows, larger(1, block));
    while (strips.rows > 1 && g.groups * blocks * strips.count() < kFewTasks) {
      strips.rows = ceil_div(strips.rows, 2);
      strips.per_image = ceil_div((pass == Pass::forward ? g.out : g.in)[0], strips.rows);
    }
    total = g.groups * blocks * strips.count();
  }
};

/// Numbers of the buffers: what is read, what is made, weights, what is added to it.
template <class T>
struct Buffers {
  int64_t in, out, filters, bias;
  Buffers(const Conv2dGeometry& g, Pass pass, const Tasks<T>& t) {
    const int64_t* size = pass == Pass::forward ? g.out : g.in;
    const int64_t* in_size = pass == Pass::forward ? g.in : g.out;
    in = larger(Strips<T>::numbers(g, pass, t.strips.rows, t.channels),
                t.strips.images > 1 ? t.strips.images * in_size[0] * in_size[1] * t.channels : 0);
    in = round_up(in, 64);
    out = round_up(t.strips.images * t.strips.rows * size[1] * t.block + kLanes<T>, 64);
    filters = round_up(t.block * t.taps * t.channels, 64);
    bias = round_up(t.block, 64);
  }
  int64_t total() const { return in + out + filters + bias; }
};

template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  constexpr bool forward = pass == Pass::forward;
  using T = Sum<S>;
  const Tasks<T> t(g, pass);
  const Buffers<T> buffers(g, pass, t);
  T *const in = workspace, *const out = in + buffers.in, *const filters = out + buffers.out;
  T* const bias = filters + buffers.filters;
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups;
  int64_t turned = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t strip = task % t.strips.per_image, images = task / t.strips.per_image % t.strips.groups;
    const int64_t block = task / t.strips.per_image / t.strips.groups, group = block / t.blocks;
    const int64_t row0 = block % t.blocks * t.block, rows = smaller(t.block, t.rows - row0);
    if (turned != block) {
      turned = block;
      if (o.bias) copy_numbers(o.bias + group * t.rows + row0, rows, bias);
      const int64_t c0 = forward ? 0 : row0, cs = forward ? c_group : rows;
      const int64_t k0 = group * k_group + (forward ? row0 : 0), ks = forward ? rows : k_group;
      for (int64_t k = 0; k < ks; ++k)
        turn(o.b + ((k0 + k) * c_group + c0) * t.taps, t.taps, t.taps, cs, cs, filters + k * t.taps * cs);
    }
    const Strip s(g, pass, t.strips, images, strip, forward ? c_group : rows, forward ? rows : k_group);
    const int64_t* size = forward ? g.out : g.in;
    const int64_t first = forward ? s.o0 : s.h0, length = (forward ? s.o1 - s.o0 : s.h1 - s.h0) * size[1];
    if (forward)
      turn_rows(o.a, s, g.c, g.in, s.h0, s.h1 - s.h0, group * c_group, c_group, in);
    else
      turn_rows(o.a, s, g.k, g.out, s.o0, s.o1 - s.o0, group * k_group, k_group, in);
    channels_last_alone<T>(s.geometry, pass, {in, filters, o.bias ? bias : nullptr, out}, workspace + buffers.total());
    const int64_t plane = size[0] * size[1];
    for (int64_t n = 0; n < s.geometry.n; ++n)
      turn_back(out + n * length * rows, rows, length, rows,
                o.out + ((s.n + n) * (forward ? g.k : g.c) + group * t.rows + row0) * plane + first * size[1], plane);
  }
}

// ---- grad_weight ----

/// Tasks are numbered (group, block of output channels, block of input channels, part): if blocks are few, their strips
/// are dealt to so many parts.
template <class S>
struct Gradients {
  int64_t taps, k, c, k_blocks, c_blocks, parts, total;
  Strips<S> strips;

  explicit Gradients(const Conv2dGeometry& g)
      : taps(g.kernel[0] * g.kernel[1]),
        k(smaller(kMostChannels, g.k / g.groups)),
        c(smaller(kMostChannels, g.c / g.groups)),
        strips(g, Pass::grad_weight, kMostChannels) {
    const int64_t numbers = g.k * (g.c / g.groups) * taps;
    const auto cut = [&] {
      k_blocks = ceil_div(g.k / g.groups, larger(1, k));
      c_blocks = ceil_div(g.c / g.groups, larger(1, c));
      parts = 1;
      total = g.groups * k_blocks * c_blocks;
      for (; total < kFewTasks && 2 * parts <= strips.count() && 2 * parts * numbers <= kPartNumbers; parts *= 2)
        total *= 2;
    };
    for (cut(); larger(k, c) > kLeastChannels &&
                (k * c * taps > kGradientNumbers<S> || (total < kFewTasks && larger(k, c) > kFewChannels));
         cut()) {
      int64_t& longer = k > c ? k : c;
      longer = ceil_div(longer, 2 * kLeastChannels) * kLeastChannels;
    }
  }
};

template <class S>
struct GradientBuffers {
  int64_t x, gy, numbers;
  GradientBuffers(const Conv2dGeometry& g, const Gradients<S>& t) {
    x = larger(Strips<S>::numbers(g, Pass::grad_weight, t.strips.rows, t.c),
               t.strips.images > 1 ? t.strips.images * g.in[0] * g.in[1] * t.c : 0);
    x = round_up(x, 64);
    gy = round_up(t.strips.images * t.strips.rows * g.out[1] * t.k, 64);
    numbers = round_up(t.k * t.c * t.taps + kLanes<S>, 64);
  }
  int64_t total() const { return x + gy + 2 * numbers; }
};

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Gradients<T> t(g);
  const GradientBuffers<T> buffers(g, t);
  const Conv2dRun<T>& run = channels_last<T>().grad_weight;
  T *const x = workspace, *const gy = x + buffers.x, *const sum = gy + buffers.gy, *const sums = sum + buffers.numbers;
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % t.parts, block = task / t.parts;
    const int64_t c0 = block % t.c_blocks * t.c, cs = smaller(t.c, c_group - c0);
    const int64_t k0 = block / t.c_blocks % t.k_blocks * t.k, ks = smaller(t.k, k_group - k0);
    const int64_t group = block / t.c_blocks / t.k_blocks;
    for (int64_t i = 0; i < buffers.numbers; i += L) store(sums + i, Vec<T>{});
    for (int64_t i = t.strips.count() * part / t.parts; i < t.strips.count() * (part + 1) / t.parts; ++i) {
      const Strip s(g, Pass::grad_weight, t.strips, i / t.strips.per_image, i % t.strips.per_image, cs, ks);
      turn_rows(o.a, s, g.k, g.out, s.o0, s.o1 - s.o0, group * k_group + k0, ks, gy);
      turn_rows(o.b, s, g.c, g.in, s.h0, s.h1 - s.h0, group * c_group + c0, cs, x);
      run.run(s.geometry, {gy, x, nullptr, sum}, workspace + buffers.total(), 0, run.tasks(s.geometry));
      for (int64_t j = 0; j < buffers.numbers; j += L) store(sums + j, load(sums + j) + load(sum + j));
    }
    for (int64_t k = 0; k < ks; ++k) {
      const T* from = sums + k * t.taps * cs;
      const int64_t to = ((group * k_group + k0 + k) * c_group + c0) * t.taps;
      if (t.parts == 1)
        turn_back(from, cs, t.taps, cs, o.out + to, t.taps);
      else
        turn_back(from, cs, t.taps, cs, o.parts + part * g.k * c_group * t.taps + to, t.taps);
    }
  }
}

// ---- the row of the table ----

template <class S>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (g.layout != Layout::contiguous) return "it turns planes round, and in channels_last there are none";
  if (is_connected(g) && pass != Pass::grad_input) return "a window as large as the image is a plain matrix product";
  if (g.border != Border::zeros) return "a strip's border shows pixels of other strips, unless it is zeros";
  if (g.in[0] * g.in[1] * g.out[0] * g.out[1] == 0) return "there are no pixels to turn";
  if (smaller(g.c, g.k) / g.groups < kLeastChannels)
    return "with less than 16 channels most of its vectors' lanes idle";
  const int64_t taps = g.kernel[0] * g.kernel[1];
  if (taps == 1) return "a 1x1 kernel has no taps to share a turned pixel: it is a plain matrix product";
  const int64_t channels = (pass == Pass::forward ? g.c : g.k) / g.groups;
  if (pass == Pass::grad_weight) {
    if (taps * kLeastChannels * kLeastChannels > kGradientNumbers<Sum<S>>)
      return "16 x 16 filters pass its buffer of 640 KiB";
  } else if (taps * channels * kLeastChannels > kFilterNumbers<Sum<S>>) {
    return "filters of 16 channels pass its buffer of 3 MiB";
  }
  if (Strips<Sum<S>>::numbers(g, pass, 1, pass == Pass::grad_weight ? kMostChannels : channels) >
          kStripNumbers<Sum<S>> ||
      larger(g.in[1], g.out[1]) > kStripPixels)
    return "what a row of results sees passes its buffer of 2.25 MiB";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  return {[](const Conv2dGeometry& g) { return Tasks<Sum<S>>(g, pass).total; },
          [](const Conv2dGeometry& g) {
            return Buffers<Sum<S>>(g, pass, Tasks<Sum<S>>(g, pass)).total() +
                   channels_last<Sum<S>>().run(pass).workspace(g);
          },
          correlate<S, pass>};
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_turned() {
  return {"turned",
          "strips turned round, then the kernels for channels_last; contiguous tensors",
          refuses<S>,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          {[](const Conv2dGeometry& g) { return Gradients<Sum<S>>(g).total; },
           [](const Conv2dGeometry& g) {
             return GradientBuffers<Sum<S>>(g, Gradients<Sum<S>>(g)).total() +
                    channels_last<Sum<S>>().grad_weight.workspace(g);
           },
           grad_weight<S>, [](const Conv2dGeometry& g) { return Gradients<Sum<S>>(g).parts; },
           channels_last<S>().grad_weight.add_parts},
          false};  // its gradient of the weight errs up to 2.5 times as much as `direct` does in contiguous tensors
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_turned();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_turned();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_turned();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_turned();

}  // namespace cnnops::cpu::CNNOPS_ISA
