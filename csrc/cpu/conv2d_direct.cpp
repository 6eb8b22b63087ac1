// Convolution where it stands: register tiles over a strip of the image, every tap a constant shift.
//
//   y[k, oh, ow]  +=  w[k, c, kh, kw] * x[c, oh + kh*dilation - padding, ow + kw*dilation - padding]       (stride 1)
//
// Lay the rows of x one behind the other, with the image's border, at a pitch P that is wider than a row of y by what
// the kernel reaches. Then output (oh, ow) is place q = oh*P + ow of a long line, and what it sees through a tap is
// place q + kh*dilation*P + kw*dilation of x's line: the same shift for all outputs. So vectors run along the line,
// over the ends of rows, whatever the width of the image; only the few places between two rows are computed in vain.
//
// A strip of rows of all input channels is copied so, once, to a buffer that fits the second-level cache. Each row is
// copied with all that its outputs see to the left and right, so any border is filled in there. From the buffer a
// register tile of M output channels x V vectors takes V loads for M*V multiply-adds, and no edge is left to test for.
// Every copied number serves all taps and all output channels, where `im2col` packs it once for each tap: that is why
// `direct` is ahead where it can be used. The gradient of the input is the same with the taps mirrored
// (../correlation.h).
//
// For the gradient of the weight, gy is laid out at the same pitch, zeros between its rows, and
//   gw[k, c, kh, kw] = sum over q of gy[k, q] * x[c, q + shift of (kh, kw)]
// is a product of two lines. A register tile holds M filters x F taps; its lanes are added up at the very end. Sums run
// over a strip (of several images, if they are small), then over strips and images in their order.
//
// A task is a strip of an image for at most 64 output channels (forward, grad_input), or M filters of 8 input channels
// (grad_weight). Zeros of a border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain
// loops would skip it. 16-bit numbers are widened by the copying, weights too; sums are kept in float and rounded once.
// Refuses channels_last, strides, 1x1 kernels, kernels that reach further than a row is wide, and layers whose
// shortest strip overflows the buffer.
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kMaxVectors = 3;
constexpr int64_t kTaskRows = 64;         // output channels of a task
constexpr int64_t kWidestPiece = 256;     // columns; wider images are cut
constexpr int64_t kStripPlaces = 640;     // about as many places of the line in a strip
constexpr int64_t kGoodBuffer = 1 << 17;  // numbers in a strip of all channels
constexpr int64_t kLargestBuffer = 1 << 18;
constexpr int64_t kMostWidened = 1 << 20;               // of the 16-bit weights of a task
constexpr int64_t kSumChannels = 8, kSumPlaces = 1024;  // grad_weight: input channels of a task, places of a strip

/// How images are cut into strips of `rows` x `columns` outputs, and how a strip lies in the buffer.
struct Strips {
  int64_t down, across;      // strips of an image
  int64_t rows, columns;     // outputs of a strip
  int64_t reach_h, reach_w;  // how far the kernel reaches
  int64_t first_h, first_w;  // offset of the tap furthest up and to the left
  int64_t pitch;             // P
  int64_t plane;             // numbers of a channel, with room for the last vectors to read beyond

  int64_t shift(const Correlation& t, int64_t th, int64_t tw) const {
    return (t.h.offset0 + th * t.h.offset_step - first_h) * pitch + t.w.offset0 + tw * t.w.offset_step - first_w;
  }
};

/// Strips of at most `places` places, lower still if so many channels would not fit `buffer` numbers.
template <class T>
Strips make_strips(const Axis& h, const Axis& w, int64_t channels, int64_t places, int64_t buffer) {
  Strips s;
  const int64_t down = (h.taps - 1) * h.offset_step, right = (w.taps - 1) * w.offset_step;
  s.reach_h = larger(down, -down);
  s.reach_w = larger(right, -right);
  s.first_h = h.offset0 + smaller(down, 0);
  s.first_w = w.offset0 + smaller(right, 0);
  s.across = ceil_div(w.count, kWidestPiece);
  s.columns = ceil_div(w.count, s.across);
  s.pitch = s.columns + s.reach_w;
  const int64_t slack = kMaxVectors * kLanes<T> + s.reach_w;
  const int64_t fitting = (buffer / channels - slack) / s.pitch - s.reach_h;
  const int64_t most = smaller(h.count, larger(1, smaller(places / s.pitch, fitting)));
  s.down = ceil_div(h.count, most);
  s.rows = ceil_div(h.count, s.down);
  s.plane = round_up((s.rows + s.reach_h) * s.pitch + slack, kLanes<T>);
  return s;
}

template <class T>
Strips correlation_strips(const Correlation& t) {
  return make_strips<T>(t.h, t.w, t.channels, kStripPlaces, kGoodBuffer);
}

/// One line of a strip: rows [row0, row0 + rows) x columns [column0, column0 + columns) of a plane, at pitch P. What
/// lies between two rows is left as it was: nothing that is kept is computed from it.
template <class S>
void copy_strip(const S* plane, int64_t height, int64_t width, Border border, int64_t row0, int64_t column0,
                int64_t rows, int64_t columns, int64_t pitch, Sum<S>* to) {
  for (int64_t i = 0; i < rows; ++i, to += pitch) {
    const int64_t row = pixel_at(row0 + i, height, border);
    const bool inside = row >= 0;
    copy_padded(plane + (inside ? row : 0) * width, inside ? width : 0, column0, 1, columns, border, to);
  }
}

// ---- forward and grad_input ----

/// M output channels x V vectors of the line, for all input channels and taps; to sums[m][V * lanes].
template <class T, int M, int V>
void line_tile(const Correlation& t, const Strips& s, const T* line, const T* weight, T* sums) {
  Vec<T> sum[M][V]{};
  for (int64_t c = 0; c < t.channels; ++c, line += s.plane)
    for (int64_t th = 0; th < t.h.taps; ++th) {
      const T* filter = weight + c * t.weight_channel + t.weight_tap(th, 0);
      const T* x = line + s.shift(t, th, 0);
      for (int64_t tw = 0; tw < t.w.taps; ++tw, filter += t.w.k_step, x += t.w.offset_step) {
        Vec<T> seen[V];
        for (int v = 0; v < V; ++v) seen[v] = load(x + v * kLanes<T>);
        for (int m = 0; m < M; ++m) {
          const Vec<T> w = broadcast(filter[m * t.weight_row]);
          for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(w, seen[v], sum[m][v]);
        }
      }
    }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(sums + (m * V + v) * kLanes<T>, sum[m][v]);
}

template <class T, int M>
auto line_tile_of(int64_t vectors) {
  return vectors == 1 ? line_tile<T, M, 1> : vectors == 2 ? line_tile<T, M, 2> : line_tile<T, M, 3>;
}

/// Tasks are numbered (group, block of output channels, n, strip down, strip across).
struct Tasks {
  int64_t blocks, per_image, total;
  Tasks(const Conv2dGeometry& g, const Correlation& t, const Strips& s)
      : blocks(ceil_div(t.rows, kTaskRows)), per_image(s.down * s.across), total(g.groups * blocks * g.n * per_image) {}
};

/// How many weights a task has to widen: those of its block of output channels.
template <class S>
int64_t widened_weights(const Correlation& t) {
  return std::is_same_v<S, Sum<S>> ? 0 : smaller(kTaskRows, t.rows) * t.depth();
}

/// The weights of the output channels from row0 on, as numbers that are computed with: where they are, or widened to
/// `to`, which is `filled` already if the last task had the same. Forward they follow each other; in grad_input each
/// channel's do, and the copy leaves out what stands between, so that t's stride changes.
template <class S, Pass pass>
const Sum<S>* block_weights(Correlation& t, const S* weight, int64_t row0, bool filled, Sum<S>* to) {
  const S* from = weight + t.weight0 + row0 * t.weight_row;
  if constexpr (std::is_same_v<S, Sum<S>>) {
    return from;
  } else {
    const int64_t run = smaller(kTaskRows, t.rows - row0) * t.weight_row;
    const int64_t runs = filled ? 0 : pass == Pass::forward ? 1 : t.channels;
    for (int64_t c = 0; c < runs; ++c)
      copy_padded(from + c * t.weight_channel, run, 0, 1, run, Border::zeros, to + c * run);
    if (pass == Pass::grad_input) t.weight_channel = run;
    return to;
  }
}

template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* buffer, int64_t begin, int64_t end) {
  using T = Sum<S>;
  Correlation t = make_correlation(g, pass, 0, 0, 0);
  const Strips s = correlation_strips<T>(t);
  const Tasks tasks(g, t, s);
  int64_t last_filters = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t strip = task % tasks.per_image, n = task / tasks.per_image % g.n;
    const int64_t filters = task / tasks.per_image / g.n, block = filters % tasks.blocks;
    t = make_correlation(g, pass, filters / tasks.blocks, 0, 0);
    const int64_t first = block * kTaskRows, last = smaller(first + kTaskRows, t.rows);
    const T* weight = block_weights<S, pass>(t, o.b, first, filters == last_filters, buffer + t.channels * s.plane);
    last_filters = filters;
    const int64_t i0 = strip / s.across * s.rows, rows = smaller(s.rows, t.h.count - i0);
    const int64_t j0 = strip % s.across * s.columns, columns = smaller(s.columns, t.w.count - j0);

    for (int64_t c = 0; c < t.channels; ++c)
      copy_strip(o.a + (n * t.in_channels + t.in_channel0 + c) * t.in_plane, t.h.in_size, t.w.in_size, t.border,
                 i0 + s.first_h, j0 + s.first_w, rows + s.reach_h, columns + s.reach_w, s.pitch, buffer + c * s.plane);

    const int64_t places = (rows - 1) * s.pitch + columns;
    for (int64_t q = 0; q < places;) {
      const int64_t vectors = smaller(kMaxVectors, ceil_div(places - q, kLanes<T>)), width = vectors * kLanes<T>;
      for (int64_t m = first; m < last;) {
        const int64_t left = last - m, channel = t.out_channel0 + m;
        const int64_t size = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const auto run = size == kTileRows ? line_tile_of<T, kTileRows>(vectors)
                         : size == 4       ? line_tile_of<T, 4>(vectors)
                         : size == 2       ? line_tile_of<T, 2>(vectors)
                                           : line_tile_of<T, 1>(vectors);
        T sums[kTileRows * kMaxVectors * kLanes<T>];
        run(t, s, buffer + q, weight + (m - first) * t.weight_row, sums);

        // From places of the line to rows of the image.
        for (int64_t i = q / s.pitch, j = q % s.pitch, at = 0; at < width && i < rows; ++i, j = 0) {
          const int64_t count = smaller(columns - j, width - at);
          S* row = o.out + (n * t.out_channels + channel) * t.out_plane + (i0 + i) * t.out_width + j0 + j;
          for (int64_t r = 0; r < size && count > 0; ++r) {
            const Vec<T> bias = broadcast(o.bias ? value(o.bias[channel + r]) : T(0));
            for (int64_t v = 0; v < count; v += kLanes<T>)
              store_first(row + r * t.out_plane + v,
                          load_first(sums + r * width + at + v, smaller(count - v, kLanes<T>)) + bias,
                          smaller(count - v, kLanes<T>));
          }
          at += s.pitch - j;
        }
        m += size;
      }
      q += width;
    }
  }
}

template <class T>
int64_t correlation_buffer(const Correlation& t) {
  return t.channels * correlation_strips<T>(t).plane;
}

template <class S, Pass pass>
int64_t correlation_workspace(const Conv2dGeometry& g) {
  const Correlation t = make_correlation(g, pass, 0, 0, 0);
  return correlation_buffer<Sum<S>>(t) + widened_weights<S>(t);
}

// ---- grad_weight ----

constexpr int kTapsPerTile = 3;  // F: with M = kTileRows, 24 of 32 registers hold sums, or 12 of 16

/// Lines of several images: [channel][image][plane], each with so many places to sum over.
struct Lines {
  int64_t images, plane, places;
};

/// totals[m][f] += sum over the lines of gy[m] * x shifted by tap f, lane by lane. The mask blanks what x has
/// between two rows: gy is zero there, but zero times infinity would not be.
template <class T, int M, int F>
void product_tile(const Lines& lines, const T* mask, const T* gy, const T* x, int64_t tap_shift, Vec<T>* totals) {
  Vec<T> sum[M][F]{};
  for (int64_t image = 0; image < lines.images; ++image, gy += lines.plane, x += lines.plane)
    for (int64_t q = 0; q < lines.places; q += kLanes<T>) {
      Vec<T> seen[F];
      for (int f = 0; f < F; ++f) seen[f] = keep<T>(load(x + q + f * tap_shift), load(mask + q));
      for (int m = 0; m < M; ++m) {
        const Vec<T> grad = load(gy + m * lines.images * lines.plane + q);
        for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(grad, seen[f], sum[m][f]);
      }
    }
  for (int m = 0; m < M; ++m)
    for (int f = 0; f < F; ++f) totals[m * F + f] += sum[m][f];
}

template <class T, int M>
auto product_tile_of(int64_t taps) {
  return taps == 1 ? product_tile<T, M, 1> : taps == 2 ? product_tile<T, M, 2> : product_tile<T, M, 3>;
}

/// Tasks are numbered (group, block of kTileRows output channels, block of kSumChannels input channels).
struct WeightTasks {
  int64_t k_group, c_group, k_blocks, c_blocks, total;
  explicit WeightTasks(const Conv2dGeometry& g)
      : k_group(g.k / g.groups),
        c_group(g.c / g.groups),
        k_blocks(ceil_div(k_group, kTileRows)),
        c_blocks(ceil_div(c_group, kSumChannels)),
        total(g.groups * k_blocks * c_blocks) {}
};

template <class T>
Strips weight_strips(const Conv2dGeometry& g) {
  return make_strips<T>(make_axis(g, Pass::forward, 0, 0), make_axis(g, Pass::forward, 1, 0), kSumChannels, kSumPlaces,
                        kLargestBuffer);
}

/// Small images, one strip each, are summed over several at a time.
int64_t images_at_a_time(const Strips& s) {
  return s.down * s.across > 1 ? 1 : larger(1, kSumPlaces / (s.rows * s.pitch));
}

/// gy's lines, x's lines, the mask, and a vector of sums for each weight of the task.
template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  const Strips s = weight_strips<T>(g);
  return ((kTileRows + kSumChannels) * images_at_a_time(s) + 1) * s.plane +
         kTileRows * kSumChannels * g.kernel[0] * g.kernel[1] * kLanes<T>;
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const WeightTasks tasks(g);
  const Strips s = weight_strips<T>(g);
  const int64_t taps = g.kernel[0] * g.kernel[1];
  const int64_t batch = images_at_a_time(s);
  T *gy = workspace, *x = gy + kTileRows * batch * s.plane;
  T* mask = x + kSumChannels * batch * s.plane;
  Vec<T>* totals = reinterpret_cast<Vec<T>*>(mask + s.plane);
  int64_t masked_rows = 0, masked_columns = 0;  // what the mask is made for

  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / tasks.c_blocks / tasks.k_blocks;
    const int64_t k0 = task / tasks.c_blocks % tasks.k_blocks * kTileRows, c0 = task % tasks.c_blocks * kSumChannels;
    const int64_t ks = smaller(kTileRows, tasks.k_group - k0), cs = smaller(kSumChannels, tasks.c_group - c0);
    for (int64_t i = 0; i < ks * cs * taps; ++i) totals[i] = Vec<T>{};

    for (int64_t n0 = 0; n0 < g.n; n0 += batch)
      for (int64_t i0 = 0; i0 < g.out[0]; i0 += s.rows)
        for (int64_t j0 = 0; j0 < g.out[1]; j0 += s.columns) {
          const int64_t rows = smaller(s.rows, g.out[0] - i0), columns = smaller(s.columns, g.out[1] - j0);
          const Lines lines{smaller(batch, g.n - n0), s.plane, round_up(rows * s.pitch, kLanes<T>)};
          if (rows != masked_rows || columns != masked_columns) {
            masked_rows = rows;
            masked_columns = columns;
            for (int64_t q = 0; q < lines.places; ++q)
              mask[q] = q % s.pitch < columns && q < rows * s.pitch ? all_ones<T>() : T(0);
          }
          for (int64_t n = n0; n < n0 + lines.images; ++n) {
            for (int64_t k = 0; k < ks; ++k) {
              T* line = gy + (k * lines.images + n - n0) * s.plane;
              copy_strip(o.a + (n * g.k + group * tasks.k_group + k0 + k) * g.out[0] * g.out[1], g.out[0], g.out[1],
                         Border::zeros, i0, j0, rows, columns, s.pitch, line);
              for (int64_t q = 0; q < lines.places; q += kLanes<T>)
                store(line + q, keep<T>(load(line + q), load(mask + q)));
            }
            for (int64_t c = 0; c < cs; ++c) {
              T* line = x + (c * lines.images + n - n0) * s.plane;
              copy_strip(o.b + (n * g.c + group * tasks.c_group + c0 + c) * g.in[0] * g.in[1], g.in[0], g.in[1],
                         g.border, i0 + s.first_h, j0 + s.first_w, rows + s.reach_h, columns + s.reach_w, s.pitch,
                         line);
              for (int64_t q = (rows + s.reach_h) * s.pitch; q < s.plane; ++q) line[q] = 0;
            }
          }

          Vec<T>* sums = totals;
          for (int64_t c = 0; c < cs; ++c)
            for (int64_t kh = 0; kh < g.kernel[0]; ++kh)
              for (int64_t kw = 0; kw < g.kernel[1]; kw += kTapsPerTile) {
                const int64_t f = smaller(kTapsPerTile, g.kernel[1] - kw);
                const T* seen = x + c * lines.images * s.plane + kh * g.dilation[0] * s.pitch + kw * g.dilation[1];
                for (int64_t k = 0; k < ks;) {
                  const int64_t left = ks - k, size = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                  const auto run = size == kTileRows ? product_tile_of<T, kTileRows>(f)
                                   : size == 4       ? product_tile_of<T, 4>(f)
                                   : size == 2       ? product_tile_of<T, 2>(f)
                                                     : product_tile_of<T, 1>(f);
                  run(lines, mask, gy + k * lines.images * s.plane, seen, g.dilation[1], sums);
                  sums += size * f;
                  k += size;
                }
              }
        }

    // The sums stand in the order in which they were made: (c, kh, taps of a tile, k, tap).
    const Vec<T>* sums = totals;
    for (int64_t c = 0; c < cs; ++c)
      for (int64_t kh = 0; kh < g.kernel[0]; ++kh)
        for (int64_t kw = 0; kw < g.kernel[1]; kw += kTapsPerTile)
          for (int64_t k = 0; k < ks; ++k)
            for (int64_t f = 0; f < smaller(kTapsPerTile, g.kernel[1] - kw); ++f)
              o.out[(((group * tasks.k_group + k0 + k) * tasks.c_group + c0 + c) * g.kernel[0] + kh) * g.kernel[1] +
                    kw + f] = rounded<S>(sum_lanes<T>(*sums++));
  }
}

// ---- the row of the table ----

/// What is accepted forwards is accepted backwards, where borders other than zeros are written out (conv2d_border.cpp).
template <class T>
bool overflows(const Conv2dGeometry& g) {
  return correlation_buffer<T>(make_correlation(g, Pass::forward, 0, 0, 0)) > kLargestBuffer ||
         correlation_buffer<T>(make_correlation(written_out(g), Pass::grad_input, 0, 0, 0)) > kLargestBuffer ||
         weight_workspace<T>(g) > kLargestBuffer;
}

template <class S>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  const int64_t reach = (g.kernel[1] - 1) * g.dilation[1];
  if (g.layout != Layout::contiguous) return "it reads contiguous planes; in channels_last a plane's pixels lie apart";
  if (g.stride[0] != 1 || g.stride[1] != 1)
    return "its neighbouring lanes see neighbouring pixels, so strides must be 1";
  if (g.kernel[0] * g.kernel[1] == 1)
    return "a 1x1 kernel has no taps to share a copied pixel: it is a plain matrix product";
  if (g.in[1] < reach || (pass != Pass::grad_input && g.out[1] < reach))
    return "the kernel reaches further than a row is wide, so most of its vectors would fall between rows";
  if (larger(widened_weights<S>(make_correlation(g, Pass::forward, 0, 0, 0)),
             widened_weights<S>(make_correlation(g, Pass::grad_input, 0, 0, 0))) > kMostWidened)
    return "the filters of 64 channels, widened, pass its buffer of 2^20 numbers";
  if (overflows<Sum<S>>(g))
    return "the rows under one row of results, of all channels, pass its buffer of 2^18 numbers";
  return nullptr;
}

/// The gradient of many weights is a product large enough to be worth im2col's packing.
bool yields(const Conv2dGeometry& g, Pass pass) {
  return pass == Pass::grad_weight && g.k / g.groups >= 64 && g.c / g.groups * g.kernel[0] * g.kernel[1] >= 256;
}

template <class T, Pass pass>
int64_t correlation_tasks(const Conv2dGeometry& g) {
  const Correlation t = make_correlation(g, pass, 0, 0, 0);
  return Tasks(g, t, correlation_strips<T>(t)).total;
}

template <class S, Pass pass>
constexpr Conv2dRun<S> kCorrelation = {correlation_tasks<Sum<S>, pass>, correlation_workspace<S, pass>,
                                       correlate<S, pass>};

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_direct() {
  return {"direct",
          "register tiles along strips of the image; stride 1",
          refuses<S>,
          kCorrelation<S, Pass::forward>,
          kCorrelation<S, Pass::grad_input>,
          {[](const Conv2dGeometry& g) { return WeightTasks(g).total; }, weight_workspace<Sum<S>>, grad_weight<S>},
          true,
          yields};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_direct();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_direct();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_direct();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_direct();

}  // namespace cnnops::cpu::CNNOPS_ISA
