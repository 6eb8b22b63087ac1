// ReLU and its relatives, element by element; and the sums per channel that biases and slopes need.
//
//   relu        y = x < 0 ? 0 : x             gx = y <= 0 ? 0 : gy            (NaN stays NaN)
//   leaky_relu  y = x > 0 ? x : slope*x       gx = kept > 0 ? gy : slope*gy   (`kept`: y, or x for a negative slope)
//   prelu       y = x > 0 ? x : w[c]*x        gx = x > 0 ? gy : w[c]*gy       gw[c] = sum of gy*x where x <= 0
//
// The loops are left to the compiler, which turns each into a few vector instructions; memory is the limit. A sum runs
// over each image's plane in eight interleaved parts kept in double, adds the parts, then the images in their order:
// that order is the same however many threads there are, as each channel is one task.
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

template <class T>
void relu(const T* x, T* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) y[i] = x[i] < 0 ? T(0) : x[i];
}

template <class T>
void relu_backward(const T* gy, const T* y, T* gx, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) gx[i] = y[i] <= 0 ? T(0) : gy[i];
}

template <class T>
void leaky_relu(const T* x, T slope, T* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) y[i] = x[i] > 0 ? x[i] : x[i] * slope;
}

template <class T>
void leaky_relu_backward(const T* gy, const T* kept, T slope, T* gx, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) gx[i] = kept[i] > 0 ? gy[i] : gy[i] * slope;
}

/// Calls run(c, from, to) for the stretches of one channel that make up the elements [begin, end).
template <class Run>
void for_channels(int64_t channels, int64_t inner, int64_t begin, int64_t end, const Run& run) {
  for (int64_t i = begin; i < end;) {
    const int64_t to = (i / inner + 1) * inner;
    run(i / inner % channels, i, to < end ? to : end);
    i = to;
  }
}

template <class T>
void prelu(const T* x, const T* w, int64_t channels, int64_t inner, T* y, int64_t begin, int64_t end) {
  for_channels(channels, inner, begin, end,
               [=](int64_t c, int64_t from, int64_t to) { leaky_relu(x, w[c], y, from, to); });
}

template <class T>
void prelu_backward(const T* gy, const T* x, const T* w, int64_t channels, int64_t inner, T* gx, int64_t begin,
                    int64_t end) {
  for_channels(channels, inner, begin, end,
               [=](int64_t c, int64_t from, int64_t to) { leaky_relu_backward(gy, x, w[c], gx, from, to); });
}

/// sums[c] = sum over n and i of term(index of element (n, c, i)).
template <class T, class Term>
void sum_channels(int64_t n_count, int64_t channels, int64_t inner, T* sums, int64_t begin, int64_t end,
                  const Term& term) {
  for (int64_t c = begin; c < end; ++c) {
    double total = 0;
    for (int64_t n = 0; n < n_count; ++n) {
      const int64_t first = (n * channels + c) * inner;
      double part[8] = {};
      int64_t i = 0;
      for (; i + 8 <= inner; i += 8)
        for (int j = 0; j < 8; ++j) part[j] += term(first + i + j);
      for (int j = 0; i < inner; ++i, ++j) part[j] += term(first + i);
      total += ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
    }
    sums[c] = T(total);
  }
}

template <class T>
void channel_sum(const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, int64_t begin, int64_t end) {
  sum_channels(n, channels, inner, sums, begin, end, [=](int64_t i) { return double(x[i]); });
}

template <class T>
void prelu_grad_weight(const T* gy, const T* x, int64_t n, int64_t channels, int64_t inner, T* sums, int64_t begin,
                       int64_t end) {
  sum_channels(n, channels, inner, sums, begin, end,
               [=](int64_t i) { return x[i] > 0 ? 0.0 : double(gy[i]) * double(x[i]); });
}

}  // namespace

template <class T>
void set_activation(Kernels<T>& k) {
  k.relu = relu<T>;
  k.relu_backward = relu_backward<T>;
  k.leaky_relu = leaky_relu<T>;
  k.leaky_relu_backward = leaky_relu_backward<T>;
  k.prelu = prelu<T>;
  k.prelu_backward = prelu_backward<T>;
  k.channel_sum = channel_sum<T>;
  k.prelu_grad_weight = prelu_grad_weight<T>;
}

template void set_activation(Kernels<float>&);
template void set_activation(Kernels<double>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
