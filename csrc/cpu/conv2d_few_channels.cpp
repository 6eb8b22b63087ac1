// Convolution of few input channels, which are copied more often than outputs are written. Forward, and the row.
//
//   y[k, q]  =  sum over t of w[k, t] * line[t][q]            q = oh*OW + ow, t = (c, kw, kh)
//
// A first layer has one or three channels, and up to 64 filters for each: its input is small, its output is what
// memory sees. So the input may be copied more than once if the output is then written where it stands, in order, in
// whole lines of the cache: past the cache, half lines take five times as long. There are two ways.
//
// By lines, contiguous layers of few taps: a plane of outputs is a line as well, and a register tile is M filters x V
// vectors of places.
//
// By pixels, where vectors hold filters: M places x V vectors. What a place sees through a tap is one number,
// broadcast, so x need not be laid out as lines; the rows under a band are copied once, with their border. In
// channels_last that is y as it stands. Contiguous layers of many taps do it too, and turn the results: less work than
// their lines would be.
//
// A task is a band of rows for at most 64 filters. Zeros of the border are multiplied: an infinite or NaN weight or
// gradient gives NaN there, where plain loops would skip it. Refuses groups, more than 4 input channels, filters of
// more than 512 numbers, and layers of which a band of one row overflows the buffer.
#include "few_channels.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kFewInputs = 4;
constexpr int64_t kTaskFilters = 64, kTurnedPlaces = 96;
constexpr int64_t kManyTaps = 64;       // for lines
constexpr int64_t kManyPixelTaps = 96;  // their weights for 64 filters would fill the first-level cache

/// Calls put(write), where write(to, vector, whether it is the row's last) stores its first `lanes`, or all. Inlined,
/// all of it, or GCC keeps the sums in memory.
template <class S, class Put>
[[gnu::always_inline]] static inline void write_vectors(int64_t lanes, bool past, const Put& put) {
  if (lanes < kLanes<Sum<S>>) {
    put([&](S* to, Vec<Sum<S>> v, bool last) { last ? store_first(to, v, lanes) : store(to, v); });
    return;
  }
  if constexpr (std::is_same_v<S, Sum<S>>) {
    if (past) return put([](S* to, Vec<S> v, bool) { store_past_cache(to, v); });
  }
  put([](S* to, Vec<Sum<S>> v, bool) { store(to, v); });
}

/// M filters x V vectors of places from `lines` on; the first `filters` are kept, and `lanes` of the last vector.
template <class S, int M, int V>
void planes_tile(int64_t taps, const int64_t* at, const Sum<S>* lines, const Sum<S>* weights, const Sum<S>* bias, S* y,
                 int64_t plane, int64_t filters, int64_t lanes, bool past) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[M][V]{};
  for (int64_t t = 0; t < taps; ++t, weights += M) {
    const T* x = lines + at[t];
    Vec<T> seen[V];
    for (int v = 0; v < V; ++v) seen[v] = load(x + v * L);
    for (int m = 0; m < M; ++m) {
      const Vec<T> w = broadcast(weights[m]);
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(w, seen[v], sum[m][v]);
    }
  }
  write_vectors<S>(lanes, past, [&](auto write) __attribute__((always_inline)) {
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
    for (int m = 0; m < M; ++m) {
      if (m == filters) break;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) write(y + m * plane + v * L, sum[m][v] + broadcast(bias[m]), v == V - 1);
    }
  });
}

/// M places x V vectors of filters, where place m sees x[m][at[t]] through tap t; the first `places` are kept, and
/// `lanes` of the last vector.
template <class S, int M, int V>
void pixels_tile(int64_t taps, const int64_t* at, const Sum<S>* const* seen_from, const Sum<S>* weights,
                 const Sum<S>* bias, S* y, int64_t filters, int64_t places, int64_t lanes, bool past) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const T* x[M];
  for (int m = 0; m < M; ++m) x[m] = seen_from[m];
  Vec<T> sum[M][V]{};
  for (int64_t t = 0; t < taps; ++t, weights += V * L) {
    const int64_t tap = at[t];
    Vec<T> weight[V];
    for (int v = 0; v < V; ++v) weight[v] = load(weights + v * L);
    for (int m = 0; m < M; ++m) {
      const Vec<T> seen = broadcast(x[m][tap]);
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(seen, weight[v], sum[m][v]);
    }
  }
  write_vectors<S>(lanes, past, [&](auto write) __attribute__((always_inline)) {
#pragma GCC unroll 32  // early, or GCC keeps the sums in memory
    for (int m = 0; m < M; ++m) {
      if (m == places) break;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) write(y + m * filters + v * L, sum[m][v] + load(bias + v * L), v == V - 1);
    }
  });
}

template <class T>
int64_t packed_filters(int64_t filters) {
  return round_up(filters, larger(kPlaneFilters, kMostVectors * kLanes<T>));
}

/// to[t][lane] = the weight of filter `lane` for number t, zero beyond `filters`. By lines, t is a tap of a line.
template <class S>
void pack_filters(const Conv2dGeometry& g, bool lines, const S* weight, int64_t filters, int64_t width, Sum<S>* to) {
  const int64_t taps = taps_of(g);
  for (int64_t t = 0; t < taps; ++t, to += width) {
    const S* from = weight + (lines ? number_of(g, t) : t);
    for (int64_t k = 0; k < width; ++k) to[k] = k < filters ? value(from[k * taps]) : Sum<S>(0);
  }
}

/// Planes of outputs from `filters` numbers of each place, a line of the cache at a time.
template <class S>
void turn(const Sum<S>* from, int64_t width, int64_t places, int64_t filters, S* y, int64_t plane, bool past) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t q = 0; q < places; q += kLineVectors * L)
    for (int64_t k = 0; k < filters; k += L) {
      const int64_t vectors = smaller(kLineVectors, ceil_div(places - q, L)), lanes = places - q - (vectors - 1) * L;
      Vec<T> squares[kLineVectors][L];
      for (int v = 0; v < kLineVectors; ++v) {
        for (int64_t i = 0; i < L; ++i) squares[v][i] = load(from + (q + v * L + i) * width + k);
        transpose<T>(squares[v]);
      }
      write_vectors<S>(lanes, past, [&](auto write) __attribute__((always_inline)) {
        for (int64_t i = 0; i < smaller(L, filters - k); ++i)
          for (int v = 0; v < kLineVectors; ++v)
            if (v < vectors) write(y + (k + i) * plane + q + v * L, squares[v][i], v == vectors - 1);
      });
    }
}

/// The last tile of a band begins early, so that it is whole: what it writes again is the same.
int64_t tile_start(int64_t q, int64_t places, int64_t size) { return larger(0, smaller(q, places - size)); }

bool by_lines(const Conv2dGeometry& g) { return g.layout == Layout::contiguous && taps_of(g) < kManyTaps; }

/// Tasks are numbered (block of filters, n, band).
template <class S>
void forward(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Bands bands(g);
  const int64_t taps = taps_of(g), plane = g.out[0] * g.out[1];
  const bool planes = g.layout == Layout::contiguous, lines = by_lines(g);
  // By lines, a place's outputs lie in as many planes as there are filters: such stores miss the cache dearly, and go
  // past it from half the size on.
  const bool past = past_cache(o.out, g.n * g.k * plane * (lines ? 2 : 1)) && (planes ? plane : g.k) % L == 0;
  T *x = workspace, *row = x + kMostLines, *results = row + kLongestRow;
  T *biases = results + kTurnedPlaces * kMostVectors * L, *weights = biases + packed_filters<T>(kTaskFilters);
  const T* seen_from[kWidestBand + kMostPlaces];
  int64_t at[kMostTaps], packed = -1, columns = -1, band_rows = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Band band(g, bands, task % bands.count());
    const int64_t n = task / bands.count() % g.n, k0 = task / bands.count() / g.n * kTaskFilters;
    const int64_t filters = smaller(kTaskFilters, g.k - k0), places = band.places(),
                  first = band.oh * g.out[1] + band.ow;
    const S* image = o.a + n * g.c * g.in[0] * g.in[1];
    const bool narrow = taps >= kManyPixelTaps || (kMostVectors % kLineVectors > 0 && filters > kMostVectors * L);
    const Panels<T> panels(filters, narrow ? 2 : kMostVectors);
    if (k0 != packed) {
      const S* from = o.b + k0 * taps;
      if (lines) {
        for_filters(filters, [&](int64_t k, auto m) {
          pack_filters(g, lines, from + k * taps, smaller(m, filters - k), m, weights + k * taps);
        });
      } else {
        for (int64_t k = 0; k < filters; k += panels.width) {
          const int64_t count = smaller(panels.width, filters - k);
          pack_filters(g, lines, from + k * taps, count, round_up(count, L), weights + k * taps);
        }
      }
      for (int64_t k = 0; k < packed_filters<T>(kTaskFilters); ++k)
        biases[k] = o.bias && k < filters ? value(o.bias[k0 + k]) : T(0);
      packed = k0;
    }
    const bool stream = past && (!planes || (first % L == 0 && places % L == 0));
    S* y = o.out + (planes ? (n * g.k + k0) * plane + first : (n * plane + first) * g.k + k0);
    if (lines) {
      if (band.columns != columns) {
        columns = band.columns;
        for (int64_t t = 0; t < taps; ++t) at[t] = line_of(g, bands, t, columns);
      }
      copy_lines(g, bands, band, image, 0, g.c * g.kernel[1], row, x);
      for (int64_t q = 0; q < places;) {
        const int64_t vectors = smaller(kPlaneVectors, ceil_div(places - q, L)),
                      start = tile_start(q, places, vectors * L);
        for_filters(filters, [&](int64_t k, auto m) {
          with_count<kPlaneVectors>(vectors, [&](auto v) {
            planes_tile<S, m, v>(taps, at, x + start, weights + k * taps, biases + k, y + k * plane + start, plane,
                                 smaller(m, filters - k), places - start - (v - 1) * L, stream);
          });
        });
        q += vectors * L;
      }
      continue;
    }

    const int64_t x_rows = seen_by(g, 0, band.rows), x_columns = seen_by(g, 1, band.columns);
    if (band.columns != columns || band.rows != band_rows) {
      columns = band.columns;
      band_rows = band.rows;
      find_numbers(g, x_rows, x_columns, at);
      for (int64_t i = 0; i < places + kMostPlaces; ++i) {
        const int64_t q = smaller(i, places - 1);
        seen_from[i] = x + (q / columns * g.stride[0] * x_columns + q % columns * g.stride[1]) * (planes ? 1 : g.c);
      }
    }
    copy_rows(g, image, band.oh * g.stride[0] - g.padding[0], band.ow * g.stride[1] - g.padding[1], x_rows, x_columns,
              x);
    const int64_t stretch = planes ? kTurnedPlaces : places;
    for (int64_t q0 = 0; q0 < places; q0 += stretch)
      for (int64_t k = 0; k < filters; k += panels.width)
        with_vectors<T>(smaller(panels.width, filters - k), [&](auto v) {
          constexpr int M = kSums / v < kMostPlaces ? kSums / v : kMostPlaces;
          const int64_t count = smaller(panels.width, filters - k), some = smaller(stretch, places - q0);
          for (int64_t q = 0; q < some; q += M) {
            const int64_t start = tile_start(q, some, M), left = some - start;
            const auto from = seen_from + q0 + start;
            if (planes)
              pixels_tile<T, M, v>(taps, at, from, weights + k * taps, biases + k, results + start * v * L, v * L, left,
                                   L, false);
            else
              pixels_tile<S, M, v>(taps, at, from, weights + k * taps, biases + k, y + (q0 + start) * g.k + k, g.k,
                                   left, count - (v - 1) * L, past);
          }
          if (planes) turn(results, v * L, some, count, y + k * plane + q0, plane, stream);
        });
  }
  if (past) stores_done();
}

// ---- the row of the table ----

const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (g.groups != 1) return "it has one group of input channels only";
  if (g.c > kFewInputs) return "more than 4 input channels are too many to be copied so often";
  if (g.c < 1 || g.k < 1) return "there are no channels";
  if (taps_of(g) > kMostTaps) return "a filter of more than 512 numbers passes its list";
  if (pass == Pass::grad_input) return few_channels_grad_input_refuses(g);
  if (pass == Pass::grad_weight) return few_channels_grad_weight_refuses(g);
  const Bands b(g);
  const int64_t seen = g.c * seen_by(g, 0, b.rows) * seen_by(g, 1, b.columns);
  if (by_lines(g)
          ? g.c * g.kernel[1] * b.line + 4 * kLanes<float> > kMostLines || b.phase_row * g.stride[1] > kLongestRow
          : seen > kMostLines)
    return "the rows under one row of outputs pass its buffer of 2^17 numbers";
  return nullptr;
}

template <class S>
int64_t forward_tasks(const Conv2dGeometry& g) {
  return ceil_div(g.k, kTaskFilters) * g.n * Bands(g).count();
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_few_channels() {
  using T = Sum<S>;
  const Conv2dRun<S> y{forward_tasks<S>,
                       [](const Conv2dGeometry& g) {
                         return kMostLines + kLongestRow + kTurnedPlaces * kMostVectors * kLanes<T> +
                                (taps_of(g) + 1) * packed_filters<T>(kTaskFilters);
                       },
                       forward<S>};
  return {"few_channels",
          "at most 4 input channels, copied so that outputs are written once, where they stand",
          refuses,
          y,
          few_channels_grad_input<S>(),
          few_channels_grad_weight<S>()};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_few_channels();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_few_channels();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_few_channels();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_few_channels();

}  // namespace cnnops::cpu::CNNOPS_ISA
