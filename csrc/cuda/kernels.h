// Every CUDA launcher on one page.
//
// A launcher gets a geometry, device pointers to dense data in the geometry's layout and a stream; it starts kernels on
// that stream and returns at once. It allocates nothing and synchronises nothing, so CUDA graphs can capture it. Like
// on the CPU, threads split outputs, never one output's sum (or split it by a rule that looks at the geometry alone and
// add the parts in a fixed order): the bits do not depend on the batch size, the run or the stream. No float atomics.
//
// Nothing here needs CUDA's headers: a stream is passed as the opaque pointer that it is.
#pragma once

#include <limits>

#include "../algorithm.h"
#include "../numbers.h"

namespace cnnops::cuda {

using Stream = void*;  // a cudaStream_t

/// What a fused convolution does with its results, rounded, before it writes them. NaN stands for nothing to be done.
template <class S>
struct Epilogue {
  static constexpr Sum<S> kNone = std::numeric_limits<Sum<S>>::quiet_NaN();

  Sum<S> low = kNone, high = kNone;  // the bounds of hardtanh, and of relu, which has one
  Sum<S> slope = kNone;              // that of leaky_relu, instead of bounds

  /// For max_pool2d of windows of 2 x 2, without padding: positions as that has them. Then `out` is the pooled tensor,
  /// of (out[0] / 2) x (out[1] / 2) pixels.
  uint8_t* positions = nullptr;
};

template <class S>
struct Conv2dRun {
  int64_t (*workspace)(const Conv2dGeometry&);  // elements of Sum<S> for the whole launch
  void (*run)(const Conv2dGeometry&, const Conv2dOperands<S>&, Sum<S>* workspace, Stream);
  /// Forward with an epilogue; nullptr for an algorithm that has none. The bits are those of one after the other.
  void (*fused)(const Conv2dGeometry&, const Conv2dOperands<S>&, const Epilogue<S>&, Sum<S>* workspace,
                Stream) = nullptr;
};

/// The kernels of one type of stored number; the meaning of each is said in cpu/kernels.h. Entries are nullptr where
/// there is nothing to compute for a type: integers have relu and hardtanh only.
template <class S>
struct Kernels {
  using T = Sum<S>;
  Table<Conv2dAlgorithm<Conv2dRun<S>>> conv2d;
  void (*fold_border)(const Conv2dGeometry&, const S* padded, S* gx, Stream);

  template <class Position>
  struct MaxPool2d {
    void (*forward)(const Pool2dGeometry&, const S* x, S* y, Position* positions, Stream);
    void (*backward)(const Pool2dGeometry&, const S* gy, const Position* positions, S* gx, Stream);
    void (*gather)(const Pool2dGeometry&, const S* x, const Position* positions, S* y, Stream);
  };
  MaxPool2d<uint8_t> max_pool2d;
  MaxPool2d<int32_t> max_pool2d_wide;

  /// The gradient of what an epilogue with positions was given, from that of what it wrote, y. The geometry is
  /// pooling's.
  void (*epilogue_backward)(const Pool2dGeometry&, const Epilogue<S>&, const S* gy, const S* y, S* gx, Stream);

  void (*avg_pool2d)(const Pool2dGeometry&, Divisor, const S* x, S* y, Stream);
  void (*avg_pool2d_backward)(const Pool2dGeometry&, Divisor, const S* gy, S* gx, Stream);

  /// `workspace`: one int64_t for each number of y. Of several numbers with one index the last stays, as on the CPU.
  void (*max_unpool2d)(const Unpool2dGeometry&, const S* x, const int64_t* indices, int64_t* workspace, S* y, Stream);

  void (*relu)(const S* x, S* y, int64_t size, Stream);
  void (*relu_backward)(const S* gy, const S* y, S* gx, int64_t size, Stream);
  void (*hardtanh)(const S* x, T low, T high, S* y, int64_t size, Stream);
  void (*hardtanh_backward)(const S* gy, const S* y, T low, T high, S* gx, int64_t size, Stream);
  void (*leaky_relu)(const S* x, T slope, S* y, int64_t size, Stream);
  void (*leaky_relu_backward)(const S* gy, const S* kept, T slope, S* gx, int64_t size, Stream);
  void (*prelu)(const S* x, const S* w, int64_t channels, int64_t inner, S* y, int64_t size, Stream);
  void (*prelu_backward)(const S* gy, const S* x, const S* w, int64_t channels, int64_t inner, S* gx, int64_t size,
                         Stream);

  void (*channel_sum)(const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, Stream);
  void (*prelu_grad_weight)(const S* gy, const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, Stream);
};

/// Defined for all ForNumbers.
template <class S>
const Kernels<S>& kernels();

}  // namespace cnnops::cuda
