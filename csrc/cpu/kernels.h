// Every CPU kernel on one page.
//
// A kernel gets a geometry, raw pointers to contiguous NCHW data and a range of tasks. A task is a set of outputs that
// no other task writes, computed whole, sums included: so any split of the tasks over threads gives the same bits. A
// kernel allocates nothing, starts no thread and checks nothing.
//
// Every file of this folder is compiled once per instruction set (setup.py's table: base, avx2, avx512), each time into
// a namespace of that name; `Kernels` is one such set, and kernels() picks the widest that this processor runs.
#pragma once

#include "../algorithm.h"

namespace cnnops::cpu {

template <class T>
struct Conv2dRun {
  int64_t (*tasks)(const Conv2dGeometry&);
  int64_t (*workspace)(const Conv2dGeometry&);  // elements of T that each thread wants, aligned to 64 bytes
  void (*run)(const Conv2dGeometry&, const Conv2dOperands<T>&, T* workspace, int64_t task_begin, int64_t task_end);
};

/// The kernels of one instruction set and one type of number.
template <class T>
struct Kernels {
  Table<Conv2dAlgorithm<Conv2dRun<T>>> conv2d;

  // Pooling. A task is one output row for the forward kernels, one input row for the backward ones, one of n*c*rows.
  // `Position` is the place of the maximum within its window, kh*KW + kw: uint8_t, or int32_t for windows over 256.
  template <class Position>
  struct MaxPool2d {
    void (*forward)(const Pool2dGeometry&, const T* x, T* y, Position* positions, int64_t begin, int64_t end);
    void (*backward)(const Pool2dGeometry&, const T* gy, const Position* positions, T* gx, int64_t begin, int64_t end);
    /// y[n,c,oh,ow] = x at the position that won there: the backward's own backward, and max pooling's derivative.
    void (*gather)(const Pool2dGeometry&, const T* x, const Position* positions, T* y, int64_t begin, int64_t end);
  };
  MaxPool2d<uint8_t> max_pool2d;
  MaxPool2d<int32_t> max_pool2d_wide;
  void (*avg_pool2d)(const Pool2dGeometry&, Divisor, const T* x, T* y, int64_t begin, int64_t end);
  void (*avg_pool2d_backward)(const Pool2dGeometry&, Divisor, const T* gy, T* gx, int64_t begin, int64_t end);

  // Activations. A task is one element; prelu sees channel c = (i / inner) % channels of element i.
  void (*relu)(const T* x, T* y, int64_t begin, int64_t end);
  void (*relu_backward)(const T* gy, const T* y, T* gx, int64_t begin, int64_t end);
  void (*leaky_relu)(const T* x, T slope, T* y, int64_t begin, int64_t end);
  void (*leaky_relu_backward)(const T* gy, const T* kept, T slope, T* gx, int64_t begin, int64_t end);
  void (*prelu)(const T* x, const T* w, int64_t channels, int64_t inner, T* y, int64_t begin, int64_t end);
  void (*prelu_backward)(const T* gy, const T* x, const T* w, int64_t channels, int64_t inner, T* gx, int64_t begin,
                         int64_t end);

  // Sums over all but the channel axis of an (n, channels, inner) array. A task is one channel; the order of each sum
  // is fixed: along `inner` first, then over n.
  void (*channel_sum)(const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, int64_t begin, int64_t end);
  /// sums[c] = sum of gy * x where x <= 0: the gradient of prelu's weight.
  void (*prelu_grad_weight)(const T* gy, const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, int64_t begin,
                            int64_t end);
};

/// One compiled instruction set.
struct InstructionSet {
  const char* name;
  bool (*supported)();  // by this processor
  const Kernels<float>& (*float32)();
  const Kernels<double>& (*float64)();
};

/// All sets in this build, widest first.
Table<InstructionSet> instruction_sets();

}  // namespace cnnops::cpu

// The files of one instruction set, from here on: each kernel file fills in its part, table.cpp puts them together.
#ifdef CNNOPS_ISA
namespace cnnops::cpu::CNNOPS_ISA {

template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_direct();
template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_im2col();
template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_reference();
template <class T>
void set_pool2d(Kernels<T>&);
template <class T>
void set_activation(Kernels<T>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
#endif
