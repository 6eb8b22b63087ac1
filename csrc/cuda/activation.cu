// Activations, element by element, and the sums over all but the channel axis that their gradients and those of biases
// need.
//
//   relu         y = x < 0 ? 0 : x             gx = y <= 0 ? 0 : gy
//   leaky_relu   y = x > 0 ? x : x*slope       gx = kept > 0 ? gy : gy*slope
//   prelu        y = x > 0 ? x : x*w[c]        gx = x > 0 ? gy : gy*w[c]       gw[c] = sum of x > 0 ? 0 : gy*x
//
// NaN takes the branch that keeps it. An element-wise kernel moves memory and nothing else, so it wants many loads on
// their way at once: a thread takes 4 elements, a block's width apart, and reads them all before it writes one.
//
// A sum is one block per channel: each thread adds every 512th element in 4 interleaved sums, and a tree adds up the
// threads. Which element goes where depends on the shape alone.
#include "device.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kBlock = kThreads * kUnroll;  // elements of a block
constexpr int kSumThreads = 512;

/// y[i] = function(i) for all i. `function` may read what y overwrites, at i.
template <class T, class Function>
__global__ void map_kernel(int64_t size, Function function, T* y) {
  for (int64_t first = blockIdx.x * kBlock; first < size; first += gridDim.x * kBlock) {
    T results[kUnroll];
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

template <class T, class Function>
void map(const char* name, int64_t size, const Function& function, T* y, Stream stream) {
  launch(name, map_kernel<T, Function>, ceil_div(size, kBlock), kThreads, 0, stream, size, function, y);
}

template <class T>
struct Relu {
  const T* x;
  __device__ T operator()(int64_t i) const { return x[i] < 0 ? T(0) : x[i]; }
};

template <class T>
struct ReluBackward {
  const T *gy, *y;
  __device__ T operator()(int64_t i) const { return y[i] <= 0 ? T(0) : gy[i]; }
};

/// values[i] where kept[i] > 0, a fraction of it elsewhere: leaky_relu forward (both x) and backward.
template <class T>
struct Leaky {
  const T *values, *kept;
  T slope;
  __device__ T operator()(int64_t i) const { return kept[i] > 0 ? values[i] : values[i] * slope; }
};

/// The same with a slope per channel; Index is wide enough for every element.
template <class T, class Index>
struct ChannelLeaky {
  const T *values, *kept, *slopes;
  int64_t channels, inner;
  __device__ T operator()(int64_t i) const {
    const Index channel = static_cast<Index>(i) / static_cast<Index>(inner) % static_cast<Index>(channels);
    const T value = values[i], slope = slopes[channel];
    return kept[i] > 0 ? value : value * slope;
  }
};

template <class T>
struct Value {
  const T* x;
  __device__ T operator()(int64_t i) const { return x[i]; }
};

template <class T>
struct PreluGradWeight {
  const T *gy, *x;
  __device__ T operator()(int64_t i) const { return x[i] > 0 ? T(0) : gy[i] * x[i]; }
};

/// sums[c] = sum of term(i) over the elements i of channel c.
template <class T, class Term>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(int64_t n, int64_t channels, int64_t inner, Term term, T* sums) {
  T* partial = shared_memory<T>();
  const int64_t step_n = kSumThreads / inner, step_i = kSumThreads % inner;
  for (int64_t c = blockIdx.x; c < channels; c += gridDim.x) {
    int64_t image = threadIdx.x / inner, i = threadIdx.x % inner;
    T sum[kUnroll] = {};
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
    if (threadIdx.x == 0) sums[c] = partial[0];
    sync_block();
  }
}

template <class T, class Term>
void sum_channels(const char* name, int64_t n, int64_t channels, int64_t inner, const Term& term, T* sums,
                  Stream stream) {
  // Nothing to add leaves zeros, and `inner` must not be zero to divide by.
  launch(name, sum_kernel<T, Term>, channels, kSumThreads, kSumThreads * sizeof(T), stream, inner ? n : 0, channels,
         larger<int64_t>(inner, 1), term, sums);
}

template <class T>
void relu(const T* x, T* y, int64_t size, Stream stream) {
  map("relu", size, Relu<T>{x}, y, stream);
}

template <class T>
void relu_backward(const T* gy, const T* y, T* gx, int64_t size, Stream stream) {
  map("relu_backward", size, ReluBackward<T>{gy, y}, gx, stream);
}

template <class T>
void leaky_relu(const T* x, T slope, T* y, int64_t size, Stream stream) {
  map("leaky_relu", size, Leaky<T>{x, x, slope}, y, stream);
}

template <class T>
void leaky_relu_backward(const T* gy, const T* kept, T slope, T* gx, int64_t size, Stream stream) {
  map("leaky_relu_backward", size, Leaky<T>{gy, kept, slope}, gx, stream);
}

template <class T>
void prelu_backward(const T* gy, const T* x, const T* w, int64_t channels, int64_t inner, T* gx, int64_t size,
                    Stream stream) {
  if (size < index_limit()) {
    map("prelu", size, ChannelLeaky<T, uint32_t>{gy, x, w, channels, inner}, gx, stream);
  } else {
    map("prelu", size, ChannelLeaky<T, int64_t>{gy, x, w, channels, inner}, gx, stream);
  }
}

template <class T>
void prelu(const T* x, const T* w, int64_t channels, int64_t inner, T* y, int64_t size, Stream stream) {
  prelu_backward(x, x, w, channels, inner, y, size, stream);  // x itself instead of gy
}

template <class T>
void channel_sum(const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, Stream stream) {
  sum_channels("channel_sum", n, channels, inner, Value<T>{x}, sums, stream);
}

template <class T>
void prelu_grad_weight(const T* gy, const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, Stream stream) {
  sum_channels("prelu_grad_weight", n, channels, inner, PreluGradWeight<T>{gy, x}, sums, stream);
}

}  // namespace

template <class T>
void add_activation(Kernels<T>& kernels) {
  kernels.relu = relu<T>;
  kernels.relu_backward = relu_backward<T>;
  kernels.leaky_relu = leaky_relu<T>;
  kernels.leaky_relu_backward = leaky_relu_backward<T>;
  kernels.prelu = prelu<T>;
  kernels.prelu_backward = prelu_backward<T>;
  kernels.channel_sum = channel_sum<T>;
  kernels.prelu_grad_weight = prelu_grad_weight<T>;
}

template void add_activation(Kernels<float>&);
template void add_activation(Kernels<double>&);

}  // namespace cnnops::cuda
