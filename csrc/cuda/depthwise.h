// What the kernels of depthwise convolution share: how threads find their places, and what they read at once.
#pragma once

#include "conv2d.h"

namespace cnnops::cuda {

constexpr int kDepthwiseThreads = 128;
constexpr int kBlockChannels = 48;  // that neighbouring threads share out in channels_last, at most

/// Divides by a number that is known before the kernel starts: numbers of 31 bits by one multiplication.
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    while (shift_ < 62 && int64_t{1} << (shift_ - 31) < divisor) ++shift_;
    magic_ = static_cast<uint32_t>((uint64_t{1} << shift_) / static_cast<uint64_t>(divisor) + 1);
  }

  /// `number` becomes the remainder.
  __device__ int divide(int& number) const {
    const auto quotient = static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(number)) * magic_ >> shift_);
    number -= quotient * static_cast<int>(divisor_);
    return quotient;
  }
  __device__ int64_t divide(int64_t& number) const {
    if (number <= 0x7fffffff && divisor_ <= 0x7fffffff) {
      int narrow = static_cast<int>(number);
      const int quotient = divide(narrow);
      number = narrow;
      return quotient;
    }
    const int64_t quotient = number / divisor_;
    number -= quotient * divisor_;
    return quotient;
  }

 private:
  int64_t divisor_;
  int shift_ = 31;
  uint32_t magic_;
};

/// The channels that a thread takes in channels_last: as many as it has registers for the weights of.
template <class S, int kKernel>
constexpr int kLanes = kKernel > 5 ? 1 : (kKernel > 3 ? 8 : 16) / static_cast<int>(sizeof(Sum<S>));

/// Blocks that should fit a processor together, by their registers: as many as spill none.
template <class S, int kKernel>
constexpr int kDepthwiseBlocks = kKernel > 3 && (sizeof(S) == 2 || kKernel * sizeof(S) > 40) ? 2 : 3;

/// How a block's threads spread over an image: in channels_last over `vectors` of `size` channels, times places; in the
/// contiguous layout over places alone, and a place has its channel.
struct Spread {
  int vectors, places, chunks;  // of a block; blocks that cover all channels
  Divider by_vectors, by_chunks;

  Spread(const Conv2dGeometry& g, int64_t channels, int size)
      : vectors(g.layout == Layout::contiguous ? 1 : even(channels / size, kBlockChannels / size)),
        places(kDepthwiseThreads / vectors),
        chunks(g.layout == Layout::contiguous ? 1 : static_cast<int>(ceil_div(channels / size, vectors))),
        by_vectors(vectors),
        by_chunks(chunks) {}

 private:
  static int even(int64_t count, int64_t most) { return static_cast<int>(ceil_div(count, ceil_div(count, most))); }
};

inline bool square(const Conv2dGeometry& g, int64_t kernel, int64_t stride) {
  return g.kernel[0] == kernel && g.kernel[1] == kernel && g.stride[0] == stride && g.stride[1] == stride &&
         g.dilation[0] == 1 && g.dilation[1] == 1 && g.border == Border::zeros;
}

/// The gradient of the weights: conv2d_depthwise_weight.cu.
template <class S>
int64_t depthwise_weight_workspace(const Conv2dGeometry&);
template <class S>
void depthwise_weight(const Conv2dGeometry&, const Conv2dOperands<S>&, Sum<S>* workspace, Stream);

}  // namespace cnnops::cuda
