// The gradient of the input as a matrix product that is folded back: every pixel of gy hands out what it owes.
//
//   P[(c,kh,kw), p]  =  sum over k of w[k, c, kh, kw] * gy[k, p]                                   p = (oh, ow)
//   gx[c, oh*stride + kh*dilation - padding, ow*stride + kw*dilation - padding]  +=  P[(c,kh,kw), (oh, ow)]
//
// The other algorithms ask for each pixel of gx what it has to collect. That is a sum for one vector of pixels or of
// channels at a time: a layer with one or three input channels fills a small part of it, and beyond gy's border, where
// padding is less than the kernel's reach, zeros are collected. Here channels and taps together are the rows of one
// product (gemm.h), nothing outside gy is touched, and what is added afterwards is cheap where k is not small.
//
// gx is added up in scratch memory (phases.h), so that a row of P is added to consecutive numbers. Blocks of columns of
// P are whole rows of gy (of a row too wide, pieces cut at the same places always), added from the first to the last,
// their taps in one order: the same sum for every pixel, wherever its image lies in the batch.
//
// A task is a band of rows of gx, for a few channels, of one image, or of several that are small. Each row of gy meets
// a band through some rows of the kernel; P is made of these alone. Refuses what it is not good for: forward,
// grad_weight, 1x1 kernels, kernels of more than 128 taps, few output channels, and layers of more than four input
// channels if there is little border beyond gy, or in channels_last, where `direct` leaves out the border as well.
#include "gemm.h"
#include "phases.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kFoldNumbers = 1 << 15;  // sums of a task: its part of gx
constexpr int64_t kBands = 8;              // that a large image is cut into at least
constexpr int64_t kFewRows = 28;           // of a band
constexpr int64_t kFewInputs = 4, kFewOutputs = 4;

/// Tasks are numbered (group, block of channels, block of images, band).
struct Folds {
  Phases phases;
  int64_t channels, blocks, images, image_blocks, rows, bands, tasks;

  explicit Folds(const Conv2dGeometry& g) : phases(g) {
    const int64_t c_group = g.c / g.groups, taps = g.kernel[0] * g.kernel[1];
    blocks = larger(1, ceil_div(c_group, larger(1, kBlockRows / taps)));
    channels = larger(1, ceil_div(c_group, blocks));
    blocks = ceil_div(c_group, channels);
    const int64_t fitting = larger(1, kFoldNumbers / (channels * phases.row_numbers()));
    rows = smaller(smaller(g.in[0], fitting), larger(kFewRows, ceil_div(g.in[0], kBands)));
    bands = ceil_div(g.in[0], rows);
    const int64_t small = kBlockColumns / (g.out[0] * g.out[1]);
    images = bands > 1 ? 1 : larger(1, smaller(small, fitting / rows));
    image_blocks = ceil_div(g.n, images);
    tasks = g.groups * blocks * image_blocks * bands;
  }
};

/// One row of P: where its weights stand in the filters, and how far from a pixel's own row and column it is added.
struct FilterNumber {
  int64_t at, to;
};

/// Rows [oh0, oh1) of gy for some images, and the rows [kh0, kh1) of the kernel through which all of them meet the
/// band.
struct Meeting {
  int64_t n0, images, oh0, oh1, kh0, kh1;
};

/// The numbers of channels [c0, c0 + channels) and the meeting's rows of the kernel, in the order of memory; and an
/// order to add them in, where those of one row of taps stand apart: they are added to places that overlap, and a
/// processor reads what it has just written slowly if it was not written as a whole.
int64_t list_numbers(const Conv2dGeometry& g, const Folds& f, const Meeting& meet, int64_t c0, int64_t channels,
                     int64_t rows, FilterNumber* list, int64_t* order) {
  const bool planes = g.layout == Layout::contiguous;
  const int64_t c_group = g.c / g.groups, kernel_h = g.kernel[0], kernel_w = g.kernel[1];
  const int64_t count = channels * (meet.kh1 - meet.kh0) * kernel_w;
  for (int64_t kw = 0, i = 0; kw < kernel_w; ++kw)
    for (int64_t kh = meet.kh0; kh < meet.kh1; ++kh)
      for (int64_t c = 0; c < channels; ++c, ++i) {
        const int64_t m = planes ? (c * (meet.kh1 - meet.kh0) + kh - meet.kh0) * kernel_w + kw
                                 : ((kh - meet.kh0) * kernel_w + kw) * channels + c;
        list[m] = {planes ? ((c0 + c) * kernel_h + kh) * kernel_w + kw : (kh * kernel_w + kw) * c_group + c0 + c,
                   (c * rows + kh * g.dilation[0]) * f.phases.row_numbers() + f.phases.place(g, kw)};
        order[i] = m;
      }
  return count;
}

/// The left factor: a[panel][k][row] from `weight`, the first filter of this depth.
template <class S>
void pack_filters(const FilterNumber* list, int64_t rows, const S* weight, int64_t filter, int64_t depth, Sum<S>* to) {
  for (int64_t m0 = 0; m0 < rows; m0 += kTileRows, list += kTileRows) {
    const int64_t count = smaller(kTileRows, rows - m0);
    const bool run = list[count - 1].at - list[0].at == count - 1;
    for (int64_t k = 0; k < depth; ++k, to += kTileRows) {
      const S* from = weight + k * filter;
      if (run) {
        pack_column(from + list[0].at, count, to);
      } else {
        for (int64_t m = 0; m < count; ++m) to[m] = value(from[list[m].at]);
      }
    }
  }
}

/// The right factor: b[panel][k][pixel], the meeting's pixels [p0, p0 + columns), channels [k0, k0 + depth) of gy.
template <class S>
void pack_pixels(const Conv2dGeometry& g, const Meeting& meet, const S* gy, int64_t k0, int64_t depth, int64_t p0,
                 int64_t columns, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t plane = g.out[0] * g.out[1], pixels = (meet.oh1 - meet.oh0) * g.out[1];
  const auto image = [&](int64_t p) { return meet.n0 + p / pixels; };
  const auto place = [&](int64_t p) { return meet.oh0 * g.out[1] + p % pixels; };
  const auto panel = [&](int64_t j) {
    return to + j / kTileColumns<T> * kTileColumns<T> * depth + j % kTileColumns<T>;
  };
  if (g.layout == Layout::contiguous) {
    for (int64_t j = 0, count; j < columns; j += count) {
      const int64_t p = p0 + j;
      count = smaller(smaller(pixels - p % pixels, kTileColumns<T> - j % kTileColumns<T>), columns - j);
      const S* from = gy + (image(p) * g.k + k0) * plane + place(p);
      T* row = panel(j);
      for (int64_t k = 0; k < depth; ++k, from += plane, row += kTileColumns<T>) copy_numbers(from, count, row);
    }
  } else {
    for (int64_t j = 0; j < columns; j += L) {
      const S* from[L];
      for (int64_t i = 0; i < L; ++i)
        from[i] =
            gy +
            (image(smaller(p0 + j + i, p0 + columns - 1)) * plane + place(smaller(p0 + j + i, p0 + columns - 1))) *
                g.k +
            k0;
      T* row = panel(j);
      for (int64_t k = 0; k < depth; k += L) {
        const int64_t count = smaller(L, depth - k);
        Vec<T> square[L];
        for (int64_t i = 0; i < L; ++i) square[i] = load_first(from[i] + k, count);
        transpose<T>(square);
        for (int64_t i = 0; i < count; ++i, row += kTileColumns<T>) store(row, square[i]);
      }
    }
  }
}

/// to[j] += from[j]
template <class T>
void add_row(const T* from, int64_t count, T* to) {
  constexpr int64_t L = kLanes<T>;
  int64_t j = 0;
  for (; j + L <= count; j += L) store(to + j, load(to + j) + load(from + j));
  if (j < count) store_first(to + j, load_first(to + j, count - j) + load_first(from + j, count - j), count - j);
}

template <class S>
void fold(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Folds f(g);
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, filter = c_group * g.kernel[0] * g.kernel[1];
  T* sums = workspace + kGemmWorkspace;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t band = task % f.bands, block = task / f.bands / f.image_blocks % f.blocks;
    const int64_t n0 = task / f.bands % f.image_blocks * f.images, images = smaller(f.images, g.n - n0);
    const int64_t group = task / f.bands / f.image_blocks / f.blocks;
    const int64_t c0 = block * f.channels, channels = smaller(f.channels, c_group - c0);
    const int64_t h0 = band * f.rows, rows = smaller(f.rows, g.in[0] - h0);
    const int64_t numbers = images * channels * rows * f.phases.row_numbers();
    for (int64_t i = 0; i < numbers; i += L) store(sums + i, Vec<T>{});

    const auto add_meeting = [&](const Meeting& meet) {
      FilterNumber list[kBlockRows];
      int64_t order[kBlockRows];
      const int64_t count = list_numbers(g, f, meet, c0, channels, rows, list, order);
      const int64_t pixels = (meet.oh1 - meet.oh0) * g.out[1], all = images * pixels;
      for (int64_t p0 = 0, columns; p0 < all; p0 += columns) {
        const int64_t w = p0 % g.out[1];
        columns = g.out[1] <= kBlockColumns ? smaller(kBlockColumns / g.out[1] * g.out[1], all - p0)
                                            : smaller(kBlockColumns, g.out[1] - w);
        const T* product = multiply_block(
            count, columns, k_group,
            [&](int64_t k0, int64_t depth, T* to) {
              pack_filters(list, count, o.b + (group * k_group + k0) * filter, filter, depth, to);
            },
            [&](int64_t k0, int64_t depth, T* to) {
              pack_pixels(g, meet, o.a, group * k_group + k0, depth, p0, columns, to);
            },
            workspace);
        for (int64_t j = 0, run; j < columns; j += run) {
          const int64_t p = p0 + j, ow = p % g.out[1], oh = meet.oh0 + p % pixels / g.out[1];
          run = smaller(g.out[1] - ow, columns - j);
          const int64_t row = p / pixels * channels * rows + oh * g.stride[0] - g.padding[0] - h0;
          T* to = sums + row * f.phases.row_numbers() + ow;
          for (int64_t i = 0; i < count; ++i)
            add_row(product + order[i] * kBlockColumns + j, run, to + list[order[i]].to);
        }
      }
    };

    // Neighbouring rows of gy that meet the band through the same rows of the kernel go together.
    Meeting meet{n0, images, 0, 0, 0, 0};
    for (int64_t oh = 0; oh < g.out[0]; ++oh) {
      const KernelRows kh(g, oh, h0, rows);
      if (kh.first != meet.kh0 || kh.last != meet.kh1) {
        if (meet.kh0 < meet.kh1 && meet.oh0 < meet.oh1) add_meeting(meet);
        meet = {n0, images, oh, oh, kh.first, kh.last};
      }
      meet.oh1 = oh + 1;
    }
    if (meet.kh0 < meet.kh1 && meet.oh0 < meet.oh1) add_meeting(meet);

    const bool planes = g.layout == Layout::contiguous;
    for (int64_t n = 0; n < images; ++n)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t channel = group * c_group + c0 + c;
        const T bias = o.bias ? value(o.bias[channel]) : T(0);
        for (int64_t i = 0; i < rows; ++i) {
          const T* from = sums + ((n * channels + c) * rows + i) * f.phases.row_numbers();
          S* to = o.out + (planes ? (((n0 + n) * g.c + channel) * g.in[0] + h0 + i) * g.in[1]
                                  : (((n0 + n) * g.in[0] + h0 + i) * g.in[1]) * g.c + channel);
          f.phases.write_row(from, bias, g.in[1], planes ? 1 : g.c, to);
        }
      }
  }
}

const char* refuses(const Conv2dGeometry& g, Pass pass) {
  const int64_t taps = g.kernel[0] * g.kernel[1];
  if (pass != Pass::grad_input) return "it folds gradients of outputs back to inputs: for the gradient of the input";
  if (taps == 1) return "a 1x1 kernel leaves nothing to fold";
  if (taps > kBlockRows) return "a kernel of more than 128 taps passes its block of rows";
  if (g.k / g.groups < kFewOutputs) return "with less than 4 output channels the adding costs more than the product";
  if (g.c / g.groups > kFewInputs && g.layout == Layout::channels_last)
    return "in channels_last more than 4 input channels fill vectors, and nothing beyond the border is collected";
  const double folded = double(g.out[0] * g.out[1]) * double(taps);
  const double collected = double(g.in[0] * g.in[1]) * double(ceil_div(g.kernel[0], g.stride[0])) *
                           double(ceil_div(g.kernel[1], g.stride[1]));
  if (g.c / g.groups > kFewInputs && folded > 0.7 * collected)
    return "more than 4 input channels fill vectors, and there is little border for the others to collect zeros from";
  const Folds f(g);
  if (f.channels * f.phases.row_numbers() > kFoldNumbers) return "a row of results passes its buffer of 2^15 numbers";
  return nullptr;
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_fold() {
  const Conv2dRun<S> run{[](const Conv2dGeometry& g) { return Folds(g).tasks; },
                         [](const Conv2dGeometry&) { return kGemmWorkspace + kFoldNumbers + kLanes<Sum<S>>; }, fold<S>};
  return {"fold",  "gradient of the input: a matrix product, its columns folded back; few channels, or no padding",
          refuses, run,
          run,     run};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_fold();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_fold();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_fold();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_fold();

}  // namespace cnnops::cpu::CNNOPS_ISA
