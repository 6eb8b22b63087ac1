// Every CUDA launcher on one page.
//
// A launcher gets a geometry, device pointers to contiguous NCHW data and a stream; it starts kernels on that stream
// and returns at once. It allocates nothing and synchronises nothing, so CUDA graphs can capture it. Like on the CPU,
// threads split outputs, never one output's sum (or split it by a rule that looks at the geometry alone and add the
// parts in a fixed order): the bits do not depend on the batch size, the run or the stream. No float atomics.
//
// Nothing here needs CUDA's headers: a stream is passed as the opaque pointer that it is.
#pragma once

#include "../algorithm.h"

namespace cnnops::cuda {

using Stream = void*;  // a cudaStream_t

template <class T>
struct Conv2dRun {
  int64_t (*workspace)(const Conv2dGeometry&);  // elements of T for the whole launch
  void (*run)(const Conv2dGeometry&, const Conv2dOperands<T>&, T* workspace, Stream);
};

/// The kernels of one type of number; the meaning of each is said in cpu/kernels.h.
template <class T>
struct Kernels {
  Table<Conv2dAlgorithm<Conv2dRun<T>>> conv2d;

  template <class Position>
  struct MaxPool2d {
    void (*forward)(const Pool2dGeometry&, const T* x, T* y, Position* positions, Stream);
    void (*backward)(const Pool2dGeometry&, const T* gy, const Position* positions, T* gx, Stream);
    void (*gather)(const Pool2dGeometry&, const T* x, const Position* positions, T* y, Stream);
  };
  MaxPool2d<uint8_t> max_pool2d;
  MaxPool2d<int32_t> max_pool2d_wide;
  void (*avg_pool2d)(const Pool2dGeometry&, Divisor, const T* x, T* y, Stream);
  void (*avg_pool2d_backward)(const Pool2dGeometry&, Divisor, const T* gy, T* gx, Stream);

  void (*relu)(const T* x, T* y, int64_t size, Stream);
  void (*relu_backward)(const T* gy, const T* y, T* gx, int64_t size, Stream);
  void (*leaky_relu)(const T* x, T slope, T* y, int64_t size, Stream);
  void (*leaky_relu_backward)(const T* gy, const T* kept, T slope, T* gx, int64_t size, Stream);
  void (*prelu)(const T* x, const T* w, int64_t channels, int64_t inner, T* y, int64_t size, Stream);
  void (*prelu_backward)(const T* gy, const T* x, const T* w, int64_t channels, int64_t inner, T* gx, int64_t size,
                         Stream);

  void (*channel_sum)(const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, Stream);
  void (*prelu_grad_weight)(const T* gy, const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, Stream);
};

/// Defined for float and double.
template <class T>
const Kernels<T>& kernels();

}  // namespace cnnops::cuda
