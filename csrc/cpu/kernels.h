// What torch/ calls of the CPU kernels, on one page; and at the end, what the files of an instruction set are called.
//
// A kernel gets a geometry, raw pointers to dense data in the geometry's layout and a range of tasks. A task is a set
// of outputs that no other task writes, computed whole, sums included: so any split of the tasks over threads gives the
// same bits. A kernel allocates nothing, starts no thread and checks nothing.
//
// Every file of this folder is compiled once per instruction set (setup.py's table: base, avx2, avx512), each time into
// a namespace of that name; `Kernels` is one such set, and kernels() picks the widest that this processor runs.
#pragma once

#include <tuple>

#include "../algorithm.h"
#include "../numbers.h"

namespace cnnops::cpu {

template <class S>
struct Conv2dRun {
  int64_t (*tasks)(const Conv2dGeometry&);
  int64_t (*workspace)(const Conv2dGeometry&);  // elements of Sum<S> that each thread wants, aligned to 64 bytes
  void (*run)(const Conv2dGeometry&, const Conv2dOperands<S>&, Sum<S>* workspace, int64_t task_begin, int64_t task_end);

  /// Long sums of few results are made in so many parts, by tasks of their own: `run` leaves each as an array of
  /// `numbers` in operands.parts, and then they are added up in order. nullptr for one part, which is the result.
  int64_t (*parts)(const Conv2dGeometry&) = nullptr;
  void (*add_parts)(const Sum<S>* parts, int64_t count, int64_t numbers, S* out, int64_t begin, int64_t end) = nullptr;
};

/// The kernels of one instruction set and one type of stored number. Entries are nullptr where there is nothing to
/// compute for a type: integers have max_pool2d, relu and hardtanh only, int64 avg_pool2d as well.
template <class S>
struct Kernels {
  using T = Sum<S>;
  Table<Conv2dAlgorithm<Conv2dRun<S>>> conv2d;

  /// The gradient of x from that of x with its border written out (`padded`, planes of (out-1)*stride +
  /// (kernel-1)*dilation + 1 rows and columns alike): each pixel adds up all places that show it. A task is one row of
  /// gx: one of n*c*h, or n*h in channels_last.
  void (*fold_border)(const Conv2dGeometry&, const S* padded, S* gx, int64_t begin, int64_t end);

  // Pooling. A task is one output row for the forward kernels, one input row for the backward ones: one of n*c*rows, or
  // in channels_last, where it holds all channels, one of n*rows.
  // `Position` is the place of the maximum within its window, kh*KW + kw: uint8_t, or int32_t for windows over 256.
  template <class Position>
  struct MaxPool2d {
    void (*forward)(const Pool2dGeometry&, const S* x, S* y, Position* positions, int64_t begin, int64_t end);
    void (*backward)(const Pool2dGeometry&, const S* gy, const Position* positions, S* gx, int64_t begin, int64_t end);
    /// y[n,c,oh,ow] = x at the position that won there: the backward's own backward, and max pooling's derivative.
    void (*gather)(const Pool2dGeometry&, const S* x, const Position* positions, S* y, int64_t begin, int64_t end);
  };
  MaxPool2d<uint8_t> max_pool2d;
  MaxPool2d<int32_t> max_pool2d_wide;
  void (*avg_pool2d)(const Pool2dGeometry&, Divisor, const S* x, S* y, int64_t begin, int64_t end);
  void (*avg_pool2d_backward)(const Pool2dGeometry&, Divisor, const S* gy, S* gx, int64_t begin, int64_t end);

  /// A task is one image in channels_last, otherwise one plane of n*c.
  void (*max_unpool2d)(const Unpool2dGeometry&, const S* x, const int64_t* indices, S* y, int64_t begin, int64_t end);

  // Activations; y may be x, and gx may be gy. A task is one element; prelu sees channel c = (i / inner) % channels of
  // element i.
  void (*relu)(const S* x, S* y, int64_t begin, int64_t end);
  void (*relu_backward)(const S* gy, const S* y, S* gx, int64_t begin, int64_t end);
  void (*hardtanh)(const S* x, T low, T high, S* y, int64_t begin, int64_t end);
  void (*hardtanh_backward)(const S* gy, const S* y, T low, T high, S* gx, int64_t begin, int64_t end);
  void (*leaky_relu)(const S* x, T slope, S* y, int64_t begin, int64_t end);
  void (*leaky_relu_backward)(const S* gy, const S* kept, T slope, S* gx, int64_t begin, int64_t end);
  void (*prelu)(const S* x, const S* w, int64_t channels, int64_t inner, S* y, int64_t begin, int64_t end);
  void (*prelu_backward)(const S* gy, const S* x, const S* w, int64_t channels, int64_t inner, S* gx, int64_t begin,
                         int64_t end);

  // Sums over all but the channel axis of an (n, channels, inner) array. A task is one channel; the order of each sum
  // is fixed: along `inner` first, then over n.
  void (*channel_sum)(const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, int64_t begin, int64_t end);
  /// sums[c] = sum of gy * x where x <= 0: the gradient of prelu's weight.
  void (*prelu_grad_weight)(const S* gy, const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, int64_t begin,
                            int64_t end);
};

template <class... S>
using KernelsOf = std::tuple<const Kernels<S>& (*)()...>;
/// The kernels of one instruction set for every type of number, each made when first asked for.
using KernelSet = ForNumbers<KernelsOf>;

/// One compiled instruction set.
struct InstructionSet {
  const char* name;
  bool (*supported)();  // by this processor
  KernelSet (*kernels)();
};

/// All sets in this build, widest first.
Table<InstructionSet> instruction_sets();

}  // namespace cnnops::cpu

// The files of one instruction set, from here on: each kernel file fills in its part, table.cpp puts them together.
#ifdef CNNOPS_ISA
namespace cnnops::cpu::CNNOPS_ISA {

/// One filter per channel, channels_last.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_channels_last();
template <class S>
Conv2dRun<S> depthwise_grad_weight();
/// Small groups, channels_last.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_groups();
/// Small groups of several channels, contiguous.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_turned();
/// One or several filters per channel, contiguous.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_contiguous();
/// One filter per channel, contiguous, of small images; of what depthwise_contiguous() accepts.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_small();

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_winograd_groups();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_winograd();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_dot_products();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_turned();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_direct();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_planar();
/// A part of it, in a file of its own.
template <class S>
Conv2dRun<S> planar_grad_weight();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_channels_last();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_fold();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_few_channels();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_im2col();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_reference();
template <class S>
void set_border(Kernels<S>&);
template <class S>
void set_pool2d(Kernels<S>&);
template <class S>
void set_activation(Kernels<S>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
#endif
