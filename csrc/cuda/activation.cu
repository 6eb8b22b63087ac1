// Activations, element by element, and the sums over all but the channel axis that their gradients and those of biases
// need.
//
//   relu         y = x < 0 ? 0 : x                      gx = y <= 0 ? 0 : gy
//   hardtanh     y = x < low ? low : min(x, high)       gx = y <= low or y >= high ? 0 : gy
//   leaky_relu   y = x > 0 ? x : x*slope                gx = kept > 0 ? gy : gy*slope
//   prelu        y = x > 0 ? x : x*w[c]                 gx = x > 0 ? gy : gy*w[c]       gw[c] = sum of x > 0 ? 0 : gy*x
//
// NaN takes the branch that keeps it. hardtanh's bounds are rounded like its results first, or a 16-bit y that was cut
// off at a bound would not look so. An element-wise kernel moves memory and nothing else, so it wants many bytes on
// their way at once: where all tensors are aligned to 16 bytes a thread takes two vectors of as many, elsewhere four
// numbers, a block's width apart, and reads them all before it writes one.
//
// A sum is one block per channel: each thread adds every 512th element in 4 interleaved sums, and a tree adds up the
// threads. Which element goes where depends on the shape alone.
#include "epilogue.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 256, kSumThreads = 512, kUnroll = 4;

/// How many vectors of a width a thread takes at once.
template <int kWidth>
constexpr int kVectors = kWidth == 1 ? 4 : 2;
template <int kWidth>
constexpr int64_t kBlock = kThreads * kVectors<kWidth> * kWidth;

/// A number's place: number `lane` of the vector that begins at number `first`.
struct Place {
  int64_t first;
  int lane;
};

/// y[i] = function(a[i], b[i], its place) for all i, by vectors of kWidth. y may be a or b.
template <int kWidth, class S, class Function>
__global__ void __launch_bounds__(kThreads) map_kernel(int64_t size, Function function, const S* a, const S* b, S* y) {
  constexpr int kCount = kVectors<kWidth>;
  for (int64_t block = blockIdx.x * kBlock<kWidth>; block < size; block += gridDim.x * kBlock<kWidth>) {
    S from_a[kCount][kWidth], from_b[kCount][kWidth];
    const auto first = [&](int v) { return block + (v * kThreads + static_cast<int>(threadIdx.x)) * kWidth; };
    CNNOPS_UNROLL
    for (int v = 0; v < kCount; ++v) {
      if (first(v) + kWidth > size) continue;
      load_whole<kWidth>(from_a[v], a + first(v));
      load_whole<kWidth>(from_b[v], b + first(v));
    }
    CNNOPS_UNROLL
    for (int v = 0; v < kCount; ++v) {
      if (first(v) + kWidth > size) continue;
      S results[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) {
        results[lane] = function(from_a[v][lane], from_b[v][lane], Place{first(v), lane});
      }
      store_whole<kWidth>(y + first(v), results);
    }
  }
  const int64_t left = size / kWidth * kWidth + threadIdx.x;  // fewer than a vector
  if (kWidth > 1 && blockIdx.x == 0 && left < size) y[left] = function(a[left], b[left], Place{left, 0});
}

template <int kWidth, class S, class Function>
void launch_map(const char* name, const Function& function, const S* a, const S* b, S* y, int64_t size, Stream stream) {
  launch(name, map_kernel<kWidth, S, Function>, ceil_div(size, kBlock<kWidth>), kThreads, 0, stream, size, function, a,
         b, y);
}

/// A function of one tensor gets it twice: what it does not look at is not read. `vectors`: whether it knows what to do
/// with lanes.
template <class S, class Function>
void map(const char* name, const Function& function, const S* a, const S* b, S* y, int64_t size, Stream stream,
         bool vectors = true) {
  constexpr int kWidth = Vector<S>::size;
  if (vectors && aligned<kWidth>(a, b, y)) {
    launch_map<kWidth>(name, function, a, b, y, size, stream);
  } else {
    launch_map<1>(name, function, a, b, y, size, stream);
  }
}

template <class S>
struct Relu {
  __device__ S operator()(S x, S, Place) const { return value(x) < 0 ? S{} : x; }
};

template <class S>
struct ReluBackward {
  __device__ S operator()(S gy, S y, Place) const { return value(y) <= 0 ? S{} : gy; }
};

template <class S>
struct Hardtanh {
  Sum<S> low, high;
  __device__ S operator()(S x, S, Place) const { return clipped(x, low, high); }
};

template <class S>
struct HardtanhBackward {
  Sum<S> low, high;
  __device__ S operator()(S gy, S y, Place) const { return clipped_gradient(gy, y, low, high); }
};

/// leaky_relu forward, where both are x, and backward.
template <class S>
struct Leaky {
  Sum<S> slope;
  __device__ S operator()(S x, S kept, Place) const { return leaky(x, kept, slope); }
};

/// The same with a slope per channel; Index is wide enough for every element. A vector lies within one channel, or,
/// where channels are densest (`inner` is 1), within one pixel.
template <class S, class Index>
struct ChannelLeaky {
  const S* slopes;
  Index channels, inner;

  ChannelLeaky(const S* slopes, int64_t channels, int64_t inner)
      : slopes(slopes), channels(static_cast<Index>(channels)), inner(static_cast<Index>(inner)) {}

  bool takes_vectors() const { return (inner == 1 ? channels : inner) % Vector<S>::size == 0; }

  __device__ S operator()(S x, S kept, Place place) const {
    const Index first = static_cast<Index>(place.first);
    const Index channel = inner == 1 ? first % channels + place.lane : first / inner % channels;
    return leaky(x, kept, value(slopes[channel]));
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
  map("relu", Relu<S>{}, x, x, y, size, stream);
}

template <class S>
void relu_backward(const S* gy, const S* y, S* gx, int64_t size, Stream stream) {
  map("relu_backward", ReluBackward<S>{}, gy, y, gx, size, stream);
}

/// A bound of hardtanh as S has it. Integers need no rounding, and a bound beyond their range has to stay there.
template <class S>
Sum<S> bound(Sum<S> x) {
  if constexpr (kReal<S>) return value(rounded<S>(x));
  return x;
}

template <class S>
void hardtanh(const S* x, Sum<S> low, Sum<S> high, S* y, int64_t size, Stream stream) {
  map("hardtanh", Hardtanh<S>{bound<S>(low), bound<S>(high)}, x, x, y, size, stream);
}

template <class S>
void hardtanh_backward(const S* gy, const S* y, Sum<S> low, Sum<S> high, S* gx, int64_t size, Stream stream) {
  map("hardtanh_backward", HardtanhBackward<S>{bound<S>(low), bound<S>(high)}, gy, y, gx, size, stream);
}

template <class S>
void leaky_relu_backward(const S* gy, const S* kept, Sum<S> slope, S* gx, int64_t size, Stream stream) {
  map("leaky_relu", Leaky<S>{slope}, gy, kept, gx, size, stream);
}

template <class S>
void leaky_relu(const S* x, Sum<S> slope, S* y, int64_t size, Stream stream) {
  leaky_relu_backward(x, x, slope, y, size, stream);  // x itself instead of gy
}

template <class S>
void prelu_backward(const S* gy, const S* x, const S* w, int64_t channels, int64_t inner, S* gx, int64_t size,
                    Stream stream) {
  const auto run = [&](const auto& function) {
    map("prelu", function, gy, x, gx, size, stream, function.takes_vectors());
  };
  if (size < index_limit()) {
    run(ChannelLeaky<S, uint32_t>(w, channels, inner));
  } else {
    run(ChannelLeaky<S, int64_t>(w, channels, inner));
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
