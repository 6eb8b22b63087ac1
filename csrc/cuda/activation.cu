// Activations, element by element, and the sums over all but the channel axis that their gradients and those of biases
// need.
//
//   relu         y = x < 0 ? 0 : x                      gx = y <= 0 ? 0 : gy
//   hardtanh     y = x < low ? low : min(x, high)       gx = y <= low or y >= high ? 0 : gy
//   leaky_relu   y = x > 0 ? x : x*slope                gx = kept > 0 ? gy : gy*slope
//   prelu        y = x > 0 ? x : x*w[c]                 gx = x > 0 ? gy : gy*w[c]       gw[c] = sum of x > 0 ? 0 : gy*x
//
// NaN takes the branch that keeps it. hardtanh's bounds are rounded like its results first, or a 16-bit y that was cut
// off at a bound would not look so. An element-wise kernel moves memory and nothing else, so it wants many loads on
// their way at once: a thread takes 4 elements, a block's width apart, and reads them all before it writes one.
//
// A sum is one block per channel: each thread adds every 512th element in 4 interleaved sums, and a tree adds up the
// threads. Which element goes where depends on the shape alone.
#include "epilogue.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kBlock = kThreads * kUnroll;  // elements of a block
constexpr int kSumThreads = 512;

/// y[i] = function(i) for all i. `function` may read what y overwrites, at i.
template <class S, class Function>
__global__ void map_kernel(int64_t size, Function function, S* y) {
  for (int64_t first = blockIdx.x * kBlock; first < size; first += gridDim.x * kBlock) {
    S results[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads + threadIdx.x;
      if (i < size) results[u] = function(i);
    }
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads + threadIdx.x;
      if (i < size) y[i] = results[u];
    }
  }
}

template <class S, class Function>
void map(const char* name, int64_t size, const Function& function, S* y, Stream stream) {
  launch(name, map_kernel<S, Function>, ceil_div(size, kBlock), kThreads, 0, stream, size, function, y);
}

template <class S>
struct Relu {
  const S* x;
  __device__ S operator()(int64_t i) const { return value(x[i]) < 0 ? S{} : x[i]; }
};

template <class S>
struct ReluBackward {
  const S *gy, *y;
  __device__ S operator()(int64_t i) const { return value(y[i]) <= 0 ? S{} : gy[i]; }
};

template <class S>
struct Hardtanh {
  const S* x;
  Sum<S> low, high;
  __device__ S operator()(int64_t i) const { return clipped(x[i], low, high); }
};

template <class S>
struct HardtanhBackward {
  const S *gy, *y;
  Sum<S> low, high;
  __device__ S operator()(int64_t i) const { return clipped_gradient(gy[i], y[i], low, high); }
};

/// leaky_relu forward, where both are x, and backward.
template <class S>
struct Leaky {
  const S *values, *kept;
  Sum<S> slope;
  __device__ S operator()(int64_t i) const { return leaky(values[i], kept[i], slope); }
};

/// The same with a slope per channel; Index is wide enough for every element.
template <class S, class Index>
struct ChannelLeaky {
  const S *values, *kept, *slopes;
  int64_t channels, inner;
  __device__ S operator()(int64_t i) const {
    const Index channel = static_cast<Index>(i) / static_cast<Index>(inner) % static_cast<Index>(channels);
    return leaky(values[i], kept[i], value(slopes[channel]));
  }
};

template <class S>
struct Value {
  const S* x;
  __device__ Sum<S> operator()(int64_t i) const { return value(x[i]); }
};

template <class S>
struct PreluGradWeight {
  const S *gy, *x;
  __device__ Sum<S> operator()(int64_t i) const {
    const Sum<S> here = value(x[i]);
    return here > 0 ? 0 : value(gy[i]) * here;
  }
};

/// sums[c] = sum of term(i) over the elements i of channel c.
template <class S, class Term>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(int64_t n, int64_t channels, int64_t inner, Term term, S* sums) {
  Sum<S>* partial = shared_memory<Sum<S>>();
  const int64_t step_n = kSumThreads / inner, step_i = kSumThreads % inner;
  for (int64_t c = blockIdx.x; c < channels; c += gridDim.x) {
    int64_t image = threadIdx.x / inner, i = threadIdx.x % inner;
    Sum<S> sum[kUnroll] = {};
    while (image < n) {
      for (int u = 0; u < kUnroll; ++u) {
        if (image < n) sum[u] += term((image * channels + c) * inner + i);
        image += step_n;
        i += step_i;
        if (i >= inner) {
          i -= inner;
          ++image;
        }
      }
    }
    partial[threadIdx.x] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int half = kSumThreads / 2; half > 0; half /= 2) {
      sync_block();
      if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[c] = rounded<S>(partial[0]);
    sync_block();
  }
}

template <class S, class Term>
void sum_channels(const char* name, int64_t n, int64_t channels, int64_t inner, const Term& term, S* sums,
                  Stream stream) {
  // Nothing to add leaves zeros, and `inner` must not be zero to divide by.
  launch(name, sum_kernel<S, Term>, channels, kSumThreads, kSumThreads * sizeof(Sum<S>), stream, inner ? n : 0,
         channels, larger<int64_t>(inner, 1), term, sums);
}

template <class S>
void relu(const S* x, S* y, int64_t size, Stream stream) {
  map("relu", size, Relu<S>{x}, y, stream);
}

template <class S>
void relu_backward(const S* gy, const S* y, S* gx, int64_t size, Stream stream) {
  map("relu_backward", size, ReluBackward<S>{gy, y}, gx, stream);
}

/// A bound of hardtanh as S has it. Integers need no rounding, and a bound beyond their range has to stay there.
template <class S>
Sum<S> bound(Sum<S> x) {
  if constexpr (kReal<S>) return value(rounded<S>(x));
  return x;
}

template <class S>
void hardtanh(const S* x, Sum<S> low, Sum<S> high, S* y, int64_t size, Stream stream) {
  map("hardtanh", size, Hardtanh<S>{x, bound<S>(low), bound<S>(high)}, y, stream);
}

template <class S>
void hardtanh_backward(const S* gy, const S* y, Sum<S> low, Sum<S> high, S* gx, int64_t size, Stream stream) {
  map("hardtanh_backward", size, HardtanhBackward<S>{gy, y, bound<S>(low), bound<S>(high)}, gx, stream);
}

template <class S>
void leaky_relu(const S* x, Sum<S> slope, S* y, int64_t size, Stream stream) {
  map("leaky_relu", size, Leaky<S>{x, x, slope}, y, stream);
}

template <class S>
void leaky_relu_backward(const S* gy, const S* kept, Sum<S> slope, S* gx, int64_t size, Stream stream) {
  map("leaky_relu_backward", size, Leaky<S>{gy, kept, slope}, gx, stream);
}

template <class S>
void prelu_backward(const S* gy, const S* x, const S* w, int64_t channels, int64_t inner, S* gx, int64_t size,
                    Stream stream) {
  if (size < index_limit()) {
    map("prelu", size, ChannelLeaky<S, uint32_t>{gy, x, w, channels, inner}, gx, stream);
  } else {
    map("prelu", size, ChannelLeaky<S, int64_t>{gy, x, w, channels, inner}, gx, stream);
  }
}

template <class S>
void prelu(const S* x, const S* w, int64_t channels, int64_t inner, S* y, int64_t size, Stream stream) {
  prelu_backward(x, x, w, channels, inner, y, size, stream);  // x itself instead of gy
}

template <class S>
void channel_sum(const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, Stream stream) {
  sum_channels("channel_sum", n, channels, inner, Value<S>{x}, sums, stream);
}

template <class S>
void prelu_grad_weight(const S* gy, const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, Stream stream) {
  sum_channels("prelu_grad_weight", n, channels, inner, PreluGradWeight<S>{gy, x}, sums, stream);
}

}  // namespace

template <class S>
void add_activation(Kernels<S>& kernels) {
  kernels.relu = relu<S>;
  kernels.hardtanh = hardtanh<S>;
  if constexpr (kReal<S>) {
    kernels.relu_backward = relu_backward<S>;
    kernels.hardtanh_backward = hardtanh_backward<S>;
    kernels.leaky_relu = leaky_relu<S>;
    kernels.leaky_relu_backward = leaky_relu_backward<S>;
    kernels.prelu = prelu<S>;
    kernels.prelu_backward = prelu_backward<S>;
    kernels.channel_sum = channel_sum<S>;
    kernels.prelu_grad_weight = prelu_grad_weight<S>;
  }
}

template void add_activation(Kernels<float>&);
template void add_activation(Kernels<double>&);
template void add_activation(Kernels<BFloat16>&);
template void add_activation(Kernels<Float16>&);
template void add_activation(Kernels<uint8_t>&);
template void add_activation(Kernels<int8_t>&);
template void add_activation(Kernels<int16_t>&);
template void add_activation(Kernels<int32_t>&);
template void add_activation(Kernels<int64_t>&);

}  // namespace cnnops::cuda
