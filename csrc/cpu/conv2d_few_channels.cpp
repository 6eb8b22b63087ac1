// Convolution of few input channels, forward and the gradient of the weight: every column of taps laid out as a line.
//
//   y[k, q]  =  sum over t of w[k, t] * line[t][q]            q = oh*OW + ow, t = (c, kw, kh)
//   gw[k, t] =  sum over q of gy[k, q] * line[t][q]           line[t][q] = x[c, oh*stride + kh*dilation - padding, ...]
//
// A first layer has one or three channels, and up to 64 filters for each: its input is small, its output is what
// memory sees. So the input may be copied more than once if the output is then read or written where it stands, in
// order, in whole vectors. For each channel and each column kw of the kernel, the pixels that the outputs of a band of
// rows see through it are written one after the other, at the pitch of the *output*: no border, no stride and no row
// end is left. Rows of the kernel are shifts by whole rows (rows of the input are sorted by their remainder modulo
// the stride), so a band is copied KW times, not KH*KW times as `im2col` would.
//
// Contiguous, a plane of outputs is a line as well. Forward, a register tile is M filters x V vectors of places; the
// gradient of the weight is dot products of two lines, M filters x F taps at a time, whose lanes are added at the end.
// In channels_last the vectors hold filters: forward M places x V vectors, a place's number broadcast; for the gradient
// of the weight F taps x V vectors, and gy is read once for all of them.
//
// A task is a band of rows for at most 64 filters (forward), or the weights of a few filters or taps (grad_weight), whose
// sums are made for each band, or 128 places of it, from a fresh zero and added in the order of bands and images. Zeros of the border are
// multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would skip it. Refuses the
// gradient of the input (see `fold`), groups, more than 4 input channels, filters of more than 512 numbers, and layers of which
// a band of one row overflows the buffer.
#include "channels_last_tile.h"
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kFewInputs = 4, kMostTaps = 512;
constexpr int64_t kTaskFilters = 64;
constexpr int64_t kWidestBand = 512;                           // columns; wider images are cut
constexpr int64_t kGoodLines = 1 << 16, kMostLines = 1 << 17;  // numbers of a band
constexpr int64_t kLongestRow = 1 << 13;                       // numbers of a row of x under a band
constexpr int64_t kForwardPlaces = 512, kWeightPlaces = 1024;  // about as many in a band
constexpr int64_t kSumPlaces = 128;                            // of a sum in channels_last
constexpr int64_t kFewTasks = 4;
constexpr int kMostPlaces = 12;  // in a tile of channels_last

/// How the outputs are cut into bands of `rows` x `columns`, one row if an image is cut across; and how the lines of one lie.
struct Bands {
  int64_t rows, columns, down, across;
  int64_t phase_rows,
      phase_row;  // rows of x under a band, and numbers of such a row, for each remainder modulo the stride
  int64_t line;   // numbers of a channel and a column of taps

  Bands(const Conv2dGeometry& g, int64_t places) {
    across = ceil_div(g.out[1], kWidestBand);
    columns = ceil_div(g.out[1], across);
    rows = across > 1 ? 1 : smaller(g.out[0], larger(1, places / columns));
    for (;; --rows) {
      down = ceil_div(g.out[0], rows);
      rows = ceil_div(g.out[0], down);
      phase_rows = ceil_div((rows - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1, g.stride[0]);
      line = g.stride[0] * phase_rows * columns;
      if (rows == 1 || g.c * g.kernel[1] * line <= kGoodLines) break;
    }
    phase_row = ceil_div((columns - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1, g.stride[1]);
  }
  int64_t count() const { return down * across; }
};

/// One band of an image: outputs [oh, oh + rows) x [ow, ow + columns).
struct Band {
  int64_t oh, ow, rows, columns;
  int64_t places() const { return rows * columns; }
  Band(const Conv2dGeometry& g, const Bands& b, int64_t i)
      : oh(i / b.across * b.rows),
        ow(i % b.across * b.columns),
        rows(smaller(b.rows, g.out[0] - oh)),
        columns(smaller(b.columns, g.out[1] - ow)) {}
};

int64_t taps_of(const Conv2dGeometry& g) { return g.c * g.kernel[0] * g.kernel[1]; }

/// Where tap t = (c, kw, kh) stands in a filter.
int64_t number_of(const Conv2dGeometry& g, int64_t t) {
  const int64_t kh = t % g.kernel[0], kw = t / g.kernel[0] % g.kernel[1], c = t / g.kernel[0] / g.kernel[1];
  return g.layout == Layout::contiguous ? (c * g.kernel[0] + kh) * g.kernel[1] + kw : (kh * g.kernel[1] + kw) * g.c + c;
}

/// Where the line of tap t begins, in a band of so many columns.
int64_t line_of(const Conv2dGeometry& g, const Bands& b, int64_t t, int64_t columns) {
  const int64_t down = t % g.kernel[0] * g.dilation[0];
  return t / g.kernel[0] * b.line + (down % g.stride[0] * b.phase_rows + down / g.stride[0]) * columns;
}

/// A row of a channel: to[phase][i] = the pixel that column i*stride + phase of so many shows, from column `start` on.
template <class S>
void copy_row(const Conv2dGeometry& g, const S* row, int64_t step, int64_t start, int64_t columns, int64_t phase_row,
              Sum<S>* to) {
  const int64_t stride = g.stride[1], size = g.in[1];
  for (int64_t phase = 0; phase < smaller(stride, columns); ++phase, to += phase_row) {
    const int64_t first = start + phase, count = stride == 1 ? columns : ceil_div(columns - phase, stride);
    if (step == 1 && stride <= 2) {
      copy_padded(row, size, first, stride, count, g.border, to);
      continue;
    }
    const int64_t begin = smaller(count, first >= 0 ? 0 : ceil_div(-first, stride));
    const int64_t end = larger(begin, smaller(count, ceil_div(size - first, stride)));
    const auto show = [&](int64_t i) {
      const int64_t at = pixel_at(first + i * stride, size, g.border);
      to[i] = at < 0 ? Sum<S>(0) : value(row[at * step]);
    };
    for (int64_t i = 0; i < begin; ++i) show(i);
    for (int64_t i = begin; i < end; ++i) to[i] = value(row[(first + i * stride) * step]);
    for (int64_t i = end; i < count; ++i) show(i);
  }
}

/// The lines of (channel, column of taps) number [line0, line1), each where line_of() says.
template <class S>
void copy_lines(const Conv2dGeometry& g, const Bands& b, const Band& band, const S* image, int64_t line0, int64_t line1,
                Sum<S>* row, Sum<S>* lines) {
  const bool planes = g.layout == Layout::contiguous;
  const int64_t step = planes ? 1 : g.c, kernel_w = g.kernel[1];
  const int64_t rows = (band.rows - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1;
  const int64_t columns = (band.columns - 1) * g.stride[1] + (kernel_w - 1) * g.dilation[1] + 1;
  const int64_t h0 = band.oh * g.stride[0] - g.padding[0], w0 = band.ow * g.stride[1] - g.padding[1];
  int64_t from[kMostTaps];  // where a column of taps begins in a row
  for (int64_t kw = 0; kw < kernel_w; ++kw) {
    const int64_t right = kw * g.dilation[1];
    from[kw] = right % g.stride[1] * b.phase_row + right / g.stride[1];
  }
  for (int64_t c = line0 / kernel_w; c * kernel_w < line1; ++c) {
    const S* channel = image + (planes ? c * g.in[0] * g.in[1] : c);
    const int64_t kw0 = larger(0, line0 - c * kernel_w), kw1 = smaller(kernel_w, line1 - c * kernel_w);
    Sum<S>* to = lines + c * kernel_w * b.line;
    for (int64_t phase = 0; phase < smaller(g.stride[0], rows); ++phase, to += b.phase_rows * band.columns)
      for (int64_t r = phase, place = 0; r < rows; r += g.stride[0], place += band.columns) {
        const int64_t h = pixel_at(h0 + r, g.in[0], g.border);
        if (h < 0) {
          for (int64_t kw = kw0; kw < kw1; ++kw)
            for (int64_t j = 0; j < band.columns; ++j) to[kw * b.line + place + j] = 0;
          continue;
        }
        copy_row(g, channel + h * g.in[1] * step, step, w0, columns, b.phase_row, row);
        for (int64_t kw = kw0; kw < kw1; ++kw) copy_numbers(row + from[kw], band.columns, to + kw * b.line + place);
      }
  }
}

// ---- forward ----

/// M filters x V vectors of places from `lines` on; the first `filters` and `places` of them are kept.
template <class S, int M, int V>
void planes_tile(int64_t taps, const int64_t* at, const Sum<S>* lines, const Sum<S>* weights, const S* bias, S* y,
                 int64_t plane, int64_t filters, int64_t places, bool past) {
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
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m) {
    if (m == filters) break;
    const Vec<T> added = broadcast(bias ? value(bias[m]) : T(0));
    for (int v = 0; v < V; ++v) {
      if constexpr (std::is_same_v<S, T>) {
        if (past) {
          store_past_cache(y + m * plane + v * L, sum[m][v] + added);
          continue;
        }
      }
      if (places >= (v + 1) * L) {
        store(y + m * plane + v * L, sum[m][v] + added);
      } else {
        store_first(y + m * plane + v * L, sum[m][v] + added, larger(0, places - v * L));
      }
    }
  }
}

/// M places x V vectors of filters; the first `places` are kept, and `lanes` of the last vector.
template <class S, int M, int V>
void pixels_tile(int64_t taps, const int64_t* at, const Sum<S>* lines, const Sum<S>* weights, const S* bias, S* y,
                 int64_t filters, int64_t places, int64_t lanes, bool past) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[M][V]{};
  for (int64_t t = 0; t < taps; ++t, weights += V * L) {
    const T* x = lines + at[t];
    Vec<T> weight[V];
    for (int v = 0; v < V; ++v) weight[v] = load(weights + v * L);
    for (int m = 0; m < M; ++m) {
      const Vec<T> seen = broadcast(x[m]);
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(seen, weight[v], sum[m][v]);
    }
  }
  Vec<T> added[V];
  for (int v = 0; v < V; ++v) added[v] = bias ? load_first(bias + v * L, v < V - 1 ? L : lanes) : Vec<T>{};
#pragma GCC unroll 32  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m) {
    if (m == places) break;
    for (int v = 0; v < V; ++v) {
      if constexpr (std::is_same_v<S, T>) {
        if (past) {
          store_past_cache(y + m * filters + v * L, sum[m][v] + added[v]);
          continue;
        }
      }
      if (v < V - 1 || lanes == L) {
        store(y + m * filters + v * L, sum[m][v] + added[v]);
      } else {
        store_first(y + m * filters + v * L, sum[m][v] + added[v], lanes);
      }
    }
  }
}

template <class T>
int64_t packed_filters(int64_t filters) {
  return round_up(filters, larger(kTileRows, kMostVectors * kLanes<T>));
}

/// to[t][lane] = the weight of filter `lane` for tap t, zero beyond `filters`.
template <class S>
void pack_filters(const Conv2dGeometry& g, const S* weight, int64_t filters, int64_t width, Sum<S>* to) {
  const int64_t taps = taps_of(g);
  for (int64_t t = 0; t < taps; ++t, to += width) {
    const S* from = weight + number_of(g, t);
    for (int64_t k = 0; k < width; ++k) to[k] = k < filters ? value(from[k * taps]) : Sum<S>(0);
  }
}

/// Calls f(first, width) for tiles of `count` filters: kTileRows of them, or half as many.
template <class F>
void for_filters(int64_t count, const F& f) {
  constexpr int M = kTileRows;
  for (int64_t k = 0; k < count;) {
    if (count - k > M / 2) {
      f(k, std::integral_constant<int, M>());
      k += M;
    } else {
      f(k, std::integral_constant<int, M / 2>());
      k += M / 2;
    }
  }
}

/// Tasks are numbered (block of filters, n, band).
template <class S>
void forward(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Bands bands(g, kForwardPlaces);
  const int64_t taps = taps_of(g), plane = g.out[0] * g.out[1];
  const bool planes = g.layout == Layout::contiguous;
  const bool past = past_cache(o.out, g.n * g.k * plane) && (planes ? plane : g.k) % L == 0;
  T *lines = workspace, *row = lines + kMostLines, *weights = row + kLongestRow;
  int64_t at[kMostTaps], packed = -1, columns = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Band band(g, bands, task % bands.count());
    const int64_t n = task / bands.count() % g.n, k0 = task / bands.count() / g.n * kTaskFilters;
    const int64_t filters = smaller(kTaskFilters, g.k - k0), places = band.places(),
                  first = band.oh * g.out[1] + band.ow;
    const S* bias = o.bias ? o.bias + k0 : nullptr;
    const Panels<T> panels(filters);
    if (k0 != packed) {
      const S* from = o.b + k0 * taps;
      if (planes) {
        for_filters(filters, [&](int64_t k, auto m) {
          pack_filters(g, from + k * taps, smaller(m, filters - k), m, weights + k * taps);
        });
      } else {
        for (int64_t k = 0; k < filters; k += panels.width) {
          const int64_t count = smaller(panels.width, filters - k);
          pack_filters(g, from + k * taps, count, round_up(count, L), weights + k * taps);
        }
      }
      packed = k0;
    }
    if (band.columns != columns) {
      columns = band.columns;
      for (int64_t t = 0; t < taps; ++t) at[t] = line_of(g, bands, t, columns);
    }
    copy_lines(g, bands, band, o.a + n * g.c * g.in[0] * g.in[1], 0, g.c * g.kernel[1], row, lines);

    // The last tile of a band begins early, so that it is whole: what it writes again is the same.
    if (planes) {
      const bool stream = past && first % L == 0 && places % L == 0;
      S* y = o.out + (n * g.k + k0) * plane + first;
      for (int64_t q = 0; q < places;) {
        const int64_t vectors = smaller(3, ceil_div(places - q, L));
        const int64_t start = larger(0, smaller(q, places - vectors * L));
        for_filters(filters, [&](int64_t k, auto m) {
          const auto run = vectors == 1   ? planes_tile<S, m, 1>
                           : vectors == 2 ? planes_tile<S, m, 2>
                                          : planes_tile<S, m, 3>;
          run(taps, at, lines + start, weights + k * taps, bias ? bias + k : nullptr, y + k * plane + start, plane,
              smaller(m, filters - k), places - start, stream);
        });
        q += vectors * L;
      }
    } else {
      S* y = o.out + (n * plane + first) * g.k + k0;
      for (int64_t k = 0; k < filters; k += panels.width)
        with_vectors<T>(smaller(panels.width, filters - k), [&](auto v) {
          constexpr int M = kSums / v < kMostPlaces ? kSums / v : kMostPlaces;
          for (int64_t q = 0; q < places; q += M) {
            const int64_t start = larger(0, smaller(q, places - M));
            pixels_tile<S, M, v>(taps, at, lines + start, weights + k * taps, bias ? bias + k : nullptr,
                                 y + start * g.k + k, g.k, places - start, smaller(L, filters - k - (v - 1) * L), past);
          }
        });
    }
  }
  if (past) stores_done();
}

// ---- grad_weight ----

/// totals[f][m] += the products of line f and plane m of gy, lane by lane.
template <class S, int M, int F>
void planes_product(const int64_t* at, const Sum<S>* lines, const S* gy, int64_t plane, int64_t filters, int64_t places,
                    int64_t width, Vec<Sum<S>>* totals) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const S* grads[M];
  const T* x[F];
  for (int m = 0; m < M; ++m) grads[m] = gy + smaller(m, filters - 1) * plane;
  for (int f = 0; f < F; ++f) x[f] = lines + at[f];
  Vec<T> sum[M][F]{};
  int64_t q = 0;
  for (; q + L <= places; q += L) {
    Vec<T> seen[F];
    for (int f = 0; f < F; ++f) seen[f] = load(x[f] + q);
    for (int m = 0; m < M; ++m) {
      const Vec<T> grad = load(grads[m] + q);
      for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(grad, seen[f], sum[m][f]);
    }
  }
  if (q < places) {
    for (int m = 0; m < M; ++m) {
      const Vec<T> grad = load_first(grads[m] + q, places - q);
      for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(grad, load_first(x[f] + q, places - q), sum[m][f]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int f = 0; f < F; ++f) totals[f * width + m] += sum[m][f];
}

/// totals[f][V vectors] += the products of line f and V vectors of gy's filters, place by place.
template <class S, int F, int V>
void pixels_product(const int64_t* at, const Sum<S>* lines, const S* gy, int64_t filters, int64_t places, int64_t lanes,
                    Vec<Sum<S>>* totals) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const T* x[F];
  for (int f = 0; f < F; ++f) x[f] = lines + at[f];
  Vec<T> sum[F][V]{};
  for (int64_t q = 0; q < places; ++q, gy += filters) {
    Vec<T> grad[V];
    for (int v = 0; v < V - 1; ++v) grad[v] = load(gy + v * L);
    grad[V - 1] = load_first(gy + (V - 1) * L, lanes);
    for (int f = 0; f < F; ++f) {
      const Vec<T> seen = broadcast(x[f][q]);
      for (int v = 0; v < V; ++v) sum[f][v] = multiply_add(seen, grad[v], sum[f][v]);
    }
  }
#pragma GCC unroll 16
  for (int f = 0; f < F; ++f)
    for (int v = 0; v < V; ++v) totals[f * V + v] += sum[f][v];
}

/// Calls f(std::integral_constant n) for a `count` of 1 to `most`.
template <int most, class F>
void with_count(int64_t count, const F& f) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, f);
  }
  f(std::integral_constant<int, most>());
}

/// Tasks are numbered (block of filters, block of taps).
template <class T>
struct WeightTasks {
  int64_t filters, taps, tap_blocks, total;
  explicit WeightTasks(const Conv2dGeometry& g) {
    const bool planes = g.layout == Layout::contiguous;
    const int64_t all = taps_of(g);
    filters = !planes ? Panels<T>(g.k).width : g.k >= 2 * kFewTasks * kTileRows ? 2 * kTileRows : kTileRows;
    const int64_t blocks = ceil_div(g.k, filters), sums = planes ? kTileRows : filters / kLanes<T>;
    tap_blocks = 1;
    while (blocks * tap_blocks < kFewTasks && sums * all >= 12 * tap_blocks) tap_blocks *= 2;
    taps = ceil_div(all, tap_blocks);
    tap_blocks = ceil_div(all, taps);
    total = blocks * tap_blocks;
  }
};

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Bands bands(g, kWeightPlaces);
  const WeightTasks<T> tasks(g);
  const int64_t all = taps_of(g), plane = g.out[0] * g.out[1];
  const bool planes = g.layout == Layout::contiguous;
  T *lines = workspace, *row = lines + kMostLines;
  Vec<T>* totals = reinterpret_cast<Vec<T>*>(row + kLongestRow);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k0 = task / tasks.tap_blocks * tasks.filters, t0 = task % tasks.tap_blocks * tasks.taps;
    const int64_t filters = smaller(tasks.filters, g.k - k0), taps = smaller(tasks.taps, all - t0);
    const int64_t line0 = t0 / g.kernel[0], line1 = (t0 + taps - 1) / g.kernel[0] + 1;
    const int64_t width = planes ? tasks.filters : ceil_div(filters, L);  // vectors of a tap's sums
    for (int64_t i = 0; i < taps * width; ++i) totals[i] = Vec<T>{};
    int64_t at[kMostTaps], columns = -1;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t i = 0; i < bands.count(); ++i) {
        const Band band(g, bands, i);
        const int64_t places = band.places(), first = band.oh * g.out[1] + band.ow;
        copy_lines(g, bands, band, o.b + n * g.c * g.in[0] * g.in[1], line0, line1, row, lines);
        if (band.columns != columns) {
          columns = band.columns;
          for (int64_t t = 0; t < taps; ++t) at[t] = line_of(g, bands, t0 + t, columns);
        }
        if (planes) {
          const S* gy = o.a + (n * g.k + k0) * plane + first;
          for (int64_t t = 0; t < taps; t += 3)
            with_count<3>(smaller(3, taps - t), [&](auto f) {
              for_filters(filters, [&](int64_t k, auto m) {
                planes_product<S, m, f>(at + t, lines, gy + k * plane, plane, filters - k, places, width,
                                        totals + t * width + k);
              });
            });
        } else {
          const S* gy = o.a + (n * plane + first) * g.k + k0;
          with_vectors<T>(filters, [&](auto v) {
            constexpr int most = kSums / v < kMostPlaces ? kSums / v : kMostPlaces;
            const int64_t size = ceil_div(taps, ceil_div(taps, most));
            for (int64_t q = 0; q < places; q += kSumPlaces)
              for (int64_t t = 0; t < taps; t += size)
                with_count<most>(smaller(size, taps - t), [&](auto f) {
                  pixels_product<S, f, v>(at + t, lines + q, gy + q * g.k, g.k, smaller(kSumPlaces, places - q),
                                          filters - (v - 1) * L, totals + t * width);
                });
          });
        }
      }
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t k = 0; k < filters; ++k)
        o.out[(k0 + k) * all + number_of(g, t0 + t)] =
            rounded<S>(planes ? sum_lanes<T>(totals[t * width + k]) : totals[t * width + k / L][k % L]);
  }
}

// ---- the row of the table ----

const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (pass == Pass::grad_input)
    return "it lays out an input of few channels: for forward and the gradient of the weight";
  if (g.groups != 1) return "it has one group of input channels only";
  if (g.c > kFewInputs) return "more than 4 input channels are too many to copy for each column of taps";
  if (g.c < 1 || g.k < 1) return "there are no channels";
  if (taps_of(g) > kMostTaps) return "a filter of more than 512 numbers passes its list";
  for (const int64_t places : {kForwardPlaces, kWeightPlaces}) {
    const Bands b(g, places);
    if (g.c * g.kernel[1] * b.line + 4 * kVectorBytes > kMostLines || b.phase_row * g.stride[1] > kLongestRow)
      return "the rows under one row of outputs pass its buffer of 2^17 numbers";
  }
  return nullptr;
}

template <class S>
int64_t forward_tasks(const Conv2dGeometry& g) {
  return ceil_div(g.k, kTaskFilters) * g.n * Bands(g, kForwardPlaces).count();
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_few_channels() {
  using T = Sum<S>;
  const Conv2dRun<S> y{
      forward_tasks<S>,
      [](const Conv2dGeometry& g) { return kMostLines + kLongestRow + taps_of(g) * packed_filters<T>(kTaskFilters); },
      forward<S>};
  const Conv2dRun<S> gw{[](const Conv2dGeometry& g) { return WeightTasks<T>(g).total; },
                        [](const Conv2dGeometry& g) {
                          return kMostLines + kLongestRow + WeightTasks<T>(g).taps * 2 * kTileRows * kLanes<T>;
                        },
                        grad_weight<S>};
  return {"few_channels",
          "at most 4 input channels: copied for each column of taps, outputs where they stand",
          refuses,
          y,
          y,
          gw};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_few_channels();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_few_channels();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_few_channels();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_few_channels();

}  // namespace cnnops::cpu::CNNOPS_ISA
