// ReLU and its relatives, element by element; and the sums per channel that biases and slopes need.
//
//   relu        y = x < 0 ? 0 : x             gx = y <= 0 ? 0 : gy            (NaN stays NaN)
//   hardtanh    y = x, in [low, high]         gx = low < y < high ? gy : 0    (NaN stays NaN)
//   leaky_relu  y = x > 0 ? x : slope*x       gx = kept > 0 ? gy : slope*gy   (`kept`: y, or x for a negative slope)
//   prelu       y = x > 0 ? x : w[c]*x        gx = x > 0 ? gy : w[c]*gy       gw[c] = sum of gy*x where x <= 0
//
// Memory is the limit, so a vector at a time is all it takes. A sum runs over each image's plane in sixteen interleaved
// parts kept in double, adds the parts, then the images in their order: that order is the same however many threads
// there are, as each channel is one task. Memory is read once, in its own order: many channels of one image, then the
// same of the next. Prelu and the sums see a channels_last tensor as one whose images are single pixels, inner = 1; a
// sum then takes four pixels at a time, all their channels.
#include "cache.h"
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// to[i] = op(from[i]...) for i < count.
template <class S, class Op, class... From>
void map_cached(int64_t count, S* to, const Op& op, const From*... from) {
  constexpr int64_t L = kLanes<Sum<S>>;
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    const Vec<Sum<S>> a = op(load(from + i)...), b = op(load(from + i + L)...);
    const Vec<Sum<S>> c = op(load(from + i + 2 * L)...), d = op(load(from + i + 3 * L)...);
    store(to + i, a);
    store(to + i + L, b);
    store(to + i + 2 * L, c);
    store(to + i + 3 * L, d);
  }
  for (; i + L <= count; i += L) store(to + i, op(load(from + i)...));
  if (i < count) store_first(to + i, op(load_first(from + i, count - i)...), count - i);
}

/// The same; what is part of something much larger than the cache is written past it, which spares reading what is
/// overwritten.
template <class S, class Op, class... From>
void map_part(int64_t whole, int64_t count, S* to, const Op& op, const From*... from) {
  if constexpr (std::is_same_v<S, Sum<S>>) {
    constexpr int64_t L = kLanes<S>;
    const int64_t beyond = reinterpret_cast<uintptr_t>(to) / sizeof(S) % L;
    const int64_t head = beyond > 0 ? L - beyond : 0;
    if (((from != to) && ...) && count > head && past_cache(to + head, whole)) {
      map_cached(head, to, op, from...);
      int64_t i = head;
      for (; i + L <= count; i += L) store_past_cache(to + i, op(load(from + i)...));
      return map_cached(count - i, to + i, op, (from + i)...);
    }
  }
  map_cached(count, to, op, from...);
}

template <class S, class Op, class... From>
void map(int64_t count, S* to, const Op& op, const From*... from) {
  map_part(count, count, to, op, from...);
  stores_done();
}

template <class S>
void relu(const S* x, S* y, int64_t begin, int64_t end) {
  using V = Vec<Sum<S>>;
  map(end - begin, y + begin, [](V x) { return x < 0 ? V{} : x; }, x + begin);
}

template <class S>
void relu_backward(const S* gy, const S* y, S* gx, int64_t begin, int64_t end) {
  using V = Vec<Sum<S>>;
  map(end - begin, gx + begin, [](V gy, V y) { return y <= 0 ? V{} : whole_load<Sum<S>>(gy); }, gy + begin, y + begin);
}

/// A bound as y has it, whose numbers may be coarser.
template <class S>
Vec<Sum<S>> bound(Sum<S> x) {
  return broadcast(value(rounded<S>(x)));
}

template <class S>
void hardtanh(const S* x, Sum<S> low, Sum<S> high, S* y, int64_t begin, int64_t end) {
  using V = Vec<Sum<S>>;
  const V least = bound<S>(low), most = bound<S>(high);
  const auto clamp = [=](V x) {
    const V raised = x < least ? least : x;
    return raised > most ? most : raised;
  };
  map(end - begin, y + begin, clamp, x + begin);
}

template <class S>
void hardtanh_backward(const S* gy, const S* y, Sum<S> low, Sum<S> high, S* gx, int64_t begin, int64_t end) {
  using V = Vec<Sum<S>>;
  const V least = bound<S>(low), most = bound<S>(high);
  const auto pass = [=](V gy, V y) { return (y <= least) | (y >= most) ? V{} : whole_load<Sum<S>>(gy); };
  map(end - begin, gx + begin, pass, gy + begin, y + begin);
}

template <class S>
void leaky_relu(const S* x, Sum<S> slope, S* y, int64_t begin, int64_t end) {
  using V = Vec<Sum<S>>;
  map(end - begin, y + begin, [=](V x) { return x > 0 ? x : x * slope; }, x + begin);
}

template <class S>
void leaky_relu_backward(const S* gy, const S* kept, Sum<S> slope, S* gx, int64_t begin, int64_t end) {
  using V = Vec<Sum<S>>;
  const auto pass = [=](V gy, V kept) { return kept > 0 ? gy : gy * slope; };
  map(end - begin, gx + begin, pass, gy + begin, kept + begin);
}

/// Calls run(c, from, to) for the stretches of one channel that make up the elements [begin, end).
template <class Run>
void for_channels(int64_t channels, int64_t inner, int64_t begin, int64_t end, const Run& run) {
  if (channels == 1) return run(0, begin, end);
  int64_t c = begin / inner % channels, to = (begin / inner + 1) * inner;
  for (int64_t from = begin; from < end; from = to, to += inner) {
    run(c, from, smaller(to, end));
    c = c + 1 == channels ? 0 : c + 1;
  }
}

/// Calls run(slopes, from, to) for stretches whose elements have one slope each, as inner is 1. A few slopes are
/// repeated, so that stretches are long.
template <class S, class Run>
void for_pixels(const S* w, int64_t channels, int64_t begin, int64_t end, const Run& run) {
  constexpr int64_t kLong = 1024;
  S repeated[kLong];
  int64_t known = channels;
  if (2 * channels <= kLong && 2 * channels <= end - begin) {
    const int64_t most = smaller(kLong / channels, ceil_div(end - begin, channels) + 1) * channels;
    for (int64_t i = 0; i < channels; ++i) repeated[i] = w[i];
    for (int64_t i = channels; i < most; ++i) repeated[i] = repeated[i - channels];
    w = repeated;
    known = most;
  }
  for (int64_t from = begin; from < end;) {
    const int64_t c = from % channels, to = smaller(from + known - c, end);
    run(w + c, from, to);
    from = to;
  }
}

template <class S>
void prelu(const S* x, const S* w, int64_t channels, int64_t inner, S* y, int64_t begin, int64_t end) {
  using V = Vec<Sum<S>>;
  const auto op = [](V x, V w) { return x > 0 ? x : x * w; };
  if (inner == 1 && channels > 1) {
    for_pixels(w, channels, begin, end, [=](const S* w, int64_t from, int64_t to) {
      map_part(end - begin, to - from, y + from, op, x + from, w);
    });
  } else {
    for_channels(channels, inner, begin, end, [=](int64_t c, int64_t from, int64_t to) {
      const V slope = broadcast(value(w[c]));
      map_part(end - begin, to - from, y + from, [=](V x) { return op(x, slope); }, x + from);
    });
  }
  stores_done();
}

template <class S>
void prelu_backward(const S* gy, const S* x, const S* w, int64_t channels, int64_t inner, S* gx, int64_t begin,
                    int64_t end) {
  using V = Vec<Sum<S>>;
  const auto op = [](V gy, V x, V w) { return x > 0 ? gy : gy * w; };
  if (inner == 1 && channels > 1) {
    for_pixels(w, channels, begin, end, [=](const S* w, int64_t from, int64_t to) {
      map_part(end - begin, to - from, gx + from, op, gy + from, x + from, w);
    });
  } else {
    for_channels(channels, inner, begin, end, [=](int64_t c, int64_t from, int64_t to) {
      const V slope = broadcast(value(w[c]));
      map_part(end - begin, to - from, gx + from, [=](V gy, V x) { return op(gy, x, slope); }, gy + from, x + from);
    });
  }
  stores_done();
}

/// The first lanes from memory, in double, zeros after `count` of them.
template <class S>
Vec<double> load_doubles(const S* p, int64_t count) {
  constexpr int lanes = kLanes<double>;
  Vec<double> v{};
  if (std::is_floating_point_v<S> && count >= lanes) {
    typedef std::conditional_t<std::is_floating_point_v<S>, S, float> Real;
    typedef Real Stored __attribute__((vector_size(lanes * sizeof(Real))));
    Stored stored;
    __builtin_memcpy(&stored, p, sizeof stored);
    v = __builtin_convertvector(stored, Vec<double>);
  } else {
    for (int k = 0; k < lanes; ++k)
      if (k < count) v[k] = value(p[k]);
  }
  return v;
}

/// add(sum, ...) of the numbers at from[i]... Inlined by force, or GCC keeps the sums in memory.
template <class Add, class... From>
[[gnu::always_inline]] inline void add_doubles(Vec<double>& sum, int64_t i, int64_t count, const Add& add,
                                               const From*... from) {
  add(sum, load_doubles(from + i, count)...);
}

/// totals[c] += the terms of a pixel's `count` channels, four pixels at a time: all are read as they lie in memory, and
/// additions to the even and the odd need not wait for each other. What a thread reads of a pixel may be a few lines of
/// many: no prefetcher guesses that, so they are asked for. `room` numbers may be read.
template <class Add, class... From>
void sum_pixels(int64_t pixels, int64_t channels, int64_t count, int64_t room, double* totals, const Add& add,
                const From*... from) {
  constexpr int64_t L = kLanes<double>, kLine = kLineNumbers<std::common_type_t<From...>>, kAhead = 8;
  const auto add_pixels = [&](auto together, int64_t n) {
    const int64_t first = n * channels, last = first + (together - 1) * channels;
    const auto add_vector = [&](int64_t c, int64_t room) {
      Vec<double> sums[2] = {load(totals + c)};
      for (int k = 0; k < together; ++k) add_doubles(sums[k % 2], first + k * channels + c, room, add, from...);
      store(totals + c, sums[0] + sums[1]);
    };
    for (int k = 0; k < together; ++k)
      for (int64_t c = 0; c < count; c += kLine) (__builtin_prefetch(from + first + (k + kAhead) * channels + c), ...);
    int64_t c = 0;
    for (; c + L <= count; c += L) add_vector(c, L);
    if (c < count) add_vector(c, room - last - c);
  };
  int64_t n = 0;
  for (; n + 4 <= pixels; n += 4) add_pixels(std::integral_constant<int, 4>(), n);
  for (; n < pixels; ++n) add_pixels(std::integral_constant<int, 1>(), n);
}

/// The sum of the terms of a plane's `count` numbers, in sixteen parts.
template <class Add, class... From>
double sum_plane(int64_t count, const Add& add, const From*... from) {
  constexpr int64_t L = kLanes<double>;
  Vec<double> sixteen[16 / L] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t k = 0; k < 16 / L; ++k) add_doubles(sixteen[k], i + k * L, L, add, from...);
  for (; i < count; i += 8)
    for (int64_t k = 0; k < 8 / L; ++k) add_doubles(sixteen[k], i + k * L, count - i - k * L, add, from...);
  double part[16];
  for (int64_t k = 0; k < 16 / L; ++k) store(part + k * L, sixteen[k]);
  for (int64_t half = 8; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) part[k] += part[k + half];
  return part[0];
}

/// sums[c] = sum over n and i of the terms of the numbers at (n, c, i); add(sum, numbers...) adds a vector's.
template <class S, class Add, class... From>
void sum_channels(int64_t n_count, int64_t channels, int64_t inner, S* sums, int64_t begin, int64_t end, const Add& add,
                  const From*... from) {
  constexpr int64_t kChannels = 512;  // at a time
  for (int64_t c = begin; c < end; c += kChannels) {
    const int64_t count = smaller(kChannels, end - c);
    double totals[kChannels] = {};
    if (inner == 1) {
      sum_pixels(n_count, channels, count, n_count * channels - c, totals, add, (from + c)...);
    } else {
      for (int64_t n = 0; n < n_count; ++n)
        for (int64_t j = 0; j < count; ++j)
          totals[j] += sum_plane(inner, add, (from + (n * channels + c + j) * inner)...);
    }
    for (int64_t j = 0; j < count; ++j) sums[c + j] = rounded<S>(Sum<S>(totals[j]));
  }
}

template <class S>
void channel_sum(const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, int64_t begin, int64_t end) {
  sum_channels(n, channels, inner, sums, begin, end, [](Vec<double>& sum, Vec<double> x) { sum += x; }, x);
}

template <class S>
void prelu_grad_weight(const S* gy, const S* x, int64_t n, int64_t channels, int64_t inner, S* sums, int64_t begin,
                       int64_t end) {
  using V = Vec<double>;
  const auto add = [](V& sum, V gy, V x) { sum += x > 0 ? V{} : gy * x; };
  sum_channels(n, channels, inner, sums, begin, end, add, gy, x);
}

}  // namespace

template <class S>
void set_activation(Kernels<S>& k) {
  k.relu = relu<S>;
  k.hardtanh = hardtanh<S>;
  if constexpr (kReal<S>) {
    k.relu_backward = relu_backward<S>;
    k.hardtanh_backward = hardtanh_backward<S>;
    k.leaky_relu = leaky_relu<S>;
    k.leaky_relu_backward = leaky_relu_backward<S>;
    k.prelu = prelu<S>;
    k.prelu_backward = prelu_backward<S>;
    k.channel_sum = channel_sum<S>;
    k.prelu_grad_weight = prelu_grad_weight<S>;
  }
}

template void set_activation(Kernels<float>&);
template void set_activation(Kernels<double>&);
template void set_activation(Kernels<BFloat16>&);
template void set_activation(Kernels<Float16>&);
template void set_activation(Kernels<uint8_t>&);
template void set_activation(Kernels<int8_t>&);
template void set_activation(Kernels<int16_t>&);
template void set_activation(Kernels<int32_t>&);
template void set_activation(Kernels<int64_t>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
