// The gradient of the weight of a depthwise convolution, one filter per channel, of channels_last tensors.
//
//   gw[c, tap]  =  sum over p of x[pixel of (p, tap), c] * gy[p, c]
//
// Tiles are those of conv2d_depthwise_channels_last.cpp: of a 3x3 filter's, the 8 gradients and 9 sums stay in
// registers, and each pixel is loaded once.
//
// A task is a row of a filter's taps for a vector of channels; neighbouring tasks are computed together. There a thread
// sees a few lines of every pixel, which processors do not read ahead by themselves, so it asks for the next tile's.
// Where pixels are many, the sums are made in parts, of some rows of tiles each: threads that part the channels of a
// pixel would load pieces too short to be read ahead of. Sums are made over the 8 pixels of a tile, over the tiles of
// some rows, over the rows of a part, and over the parts, in this order, lane by lane. Zeros of the border are
// multiplied, and refused is what conv2d_depthwise_channels_last.cpp refuses.
#include "channels_last_tile.h"
#include "conv2d_depthwise_tiles.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostParts = 16, kPartPixels = 512, kPartNumbers = 1 << 16;
constexpr int64_t kSumPixels = 128;  // about as many are summed before they are added to the total

/// sums[th - th0][tw][block] += sum over a tile of what TH rows of taps see * gy, for the whole vectors of [c, end).
template <class S, int TH, int K, int stride>
int64_t dense_sums(const Tiles<S>& tiles, const S* const* gy, int64_t th0, int64_t c, int64_t end, int64_t block,
                   Sum<S>* sums) {
  using T = Sum<S>;
  constexpr int rows = (kTileH - 1) * stride + TH, columns = (kTileW - 1) * stride + K;
  const S* const* seen = tiles.seen + th0 * columns;
  const int64_t shift = tiles.in_shift, gy_below = kTileH * tiles.t.out_width * tiles.t.out_channels;
  for (; c + kLanes<T> <= end; c += kLanes<T>) {
    Vec<T> sum[TH * K]{}, grad[kTile];
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) grad[o] = load(gy[o] + c);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        const Vec<T> x = load(seen[i * columns + j] + shift + c);
#pragma GCC unroll 8
        for (int o = 0; o < kTile; ++o) {
          const int th = i - o / kTileW * stride, tw = j - o % kTileW * stride;
          if (th >= 0 && th < TH && tw >= 0 && tw < K) sum[th * K + tw] = multiply_add(x, grad[o], sum[th * K + tw]);
        }
      }
    if (c % kLineNumbers<S> == 0) prefetch_next<S, rows, columns, stride>(tiles, seen, c);
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) __builtin_prefetch(gy[o] + gy_below + c, 0, 2);
#pragma GCC unroll 16
    for (int tap = 0; tap < TH * K; ++tap) store(sums + tap * block + c, load(sums + tap * block + c) + sum[tap]);
  }
  return c;
}

/// sums[W taps of a row][block] += sum over so many outputs of what each sees * gy, for channels from c on.
template <class S, int W>
void sum_outputs(int64_t outputs, const S* const* const* seen, const S* const* gy, int64_t shift, int64_t c,
                 int64_t channels, int64_t block, Sum<S>* sums) {
  using T = Sum<S>;
  for (; c < channels; c += kLanes<T>) {
    Vec<T> sum[W]{};
    const auto add = [&](auto get) {
      for (int64_t o = 0; o < outputs; ++o) {
        const Vec<T> grad = get(gy[o] + c);
        for (int w = 0; w < W; ++w) sum[w] = multiply_add(get(seen[o][w] + shift + c), grad, sum[w]);
      }
    };
    const int64_t lanes = channels - c;
    if (lanes >= kLanes<T>) {
      add([](const S* p) { return load(p); });
    } else {
      add([&](const S* p) { return load_first(p, lanes); });
    }
    for (int w = 0; w < W; ++w) store(sums + w * block + c, load(sums + w * block + c) + sum[w]);
  }
}

/// A row of any taps, and those outputs of a tile that exist.
template <class S>
void any_sums(const Tiles<S>& tiles, const S* const* gy, int64_t th, int64_t c, int64_t channels, int64_t block,
              Sum<S>* sums) {
  const Windows& t = tiles.t;
  const int64_t step_h = tiles.w.count * (tiles.dense ? t.h.in_step : t.h.taps);
  const int64_t step_w = tiles.dense ? t.w.in_step : t.w.taps;
  const S *const *seen[kTile], *grads[kTile];
  int64_t outputs = 0;
  for (int o = 0; o < kTile; ++o)
    if (gy[o]) {
      seen[outputs] = tiles.seen + th * tiles.w.count + o / kTileW * step_h + o % kTileW * step_w;
      grads[outputs++] = gy[o];
    }
  const auto run = [&](auto w) {
    sum_outputs<S, w>(outputs, seen, grads, tiles.in_shift, c, channels, block, sums);
    for (int64_t o = 0; o < outputs; ++o) seen[o] += w;
    sums += w * block;
  };
  int64_t tw = 0;
  for (; tw + 3 <= t.w.taps; tw += 3) run(std::integral_constant<int, 3>());
  for (; tw < t.w.taps; ++tw) run(std::integral_constant<int, 1>());
}

/// Rows [th0, th1) of an unrolled filter: those of 3x3 together, others one by one.
template <class S>
int64_t all_dense_sums(const Tiles<S>& tiles, const S* const* gy, int64_t th0, int64_t th1, int64_t c, int64_t end,
                       int64_t block, Sum<S>* sums) {
  const int64_t K = tiles.t.w.taps, stride = tiles.t.w.in_step;
  int64_t done = c;
  const auto run = [&](auto kernel, int64_t th) {
    done = kernel(tiles, gy, th, c, end, block, sums + (th - th0) * K * block);
  };
  if (K == 3) {
    const int64_t rows = th1 - th0;
    run(stride == 1 ? (rows == 3   ? dense_sums<S, 3, 3, 1>
                       : rows == 2 ? dense_sums<S, 2, 3, 1>
                                   : dense_sums<S, 1, 3, 1>)
                    : (rows == 3   ? dense_sums<S, 3, 3, 2>
                       : rows == 2 ? dense_sums<S, 2, 3, 2>
                                   : dense_sums<S, 1, 3, 2>),
        th0);
  } else {
    for (int64_t th = th0; th < th1; ++th)
      run(K == 7 ? dense_sums<S, 1, 7, 1> : stride == 1 ? dense_sums<S, 1, 5, 1> : dense_sums<S, 1, 5, 2>, th);
  }
  return done;
}

/// Long sums are made in parts of the images' rows of tiles, so that threads need not part the channels.
struct Parts {
  int64_t tasks, rows, count;  // of one part; of all; parts
  template <class T>
  static Parts of(const Conv2dGeometry& g) {
    const int64_t numbers = g.c * g.kernel[0] * g.kernel[1], pixels = g.n * g.out[0] * g.out[1];
    Parts p{ceil_div(g.c, kLanes<T>) * g.kernel[0], g.n * tile_rows(g, Pass::forward), 1};
    while (p.count < kMostParts && pixels >= 2 * p.count * kPartPixels && 2 * p.count * numbers <= kPartNumbers)
      p.count *= 2;
    return p;
  }
};

/// Zeros, and two sums for every weight of a block: of some rows, and of all.
template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  return kBlock<T> * (1 + 2 * g.kernel[0] * g.kernel[1]);
}

/// Neighbouring vectors of channels, and the rows of taps that are summed for them.
struct Segment {
  int64_t v0, v1, th0, th1;
};

/// Tasks are numbered (vector of channels, row of taps).
struct WeightTasks {
  int64_t rows;
  int64_t th(int64_t task, int64_t v) const {  // the first row of taps of vector v that is not before the task
    return smaller(larger(task - v * rows, 0), rows);
  }
  /// The next segment of the tasks [begin, end) from vector v0 on, of at most kBlockVectors; empty if v0 == v1.
  Segment segment(int64_t begin, int64_t end, int64_t v0, int64_t limit) const {
    while (v0 < limit && th(begin, v0) == th(end, v0)) ++v0;
    Segment s{v0, v0, th(begin, v0), th(end, v0)};
    while (s.v1 < limit && th(begin, s.v1) == s.th0 && th(end, s.v1) == s.th1) ++s.v1;
    return s;
  }
};

/// A segment's sums for one tile.
template <class S>
void sum_tile(const Tiles<S>& tiles, const S* const* gy, const Segment& s, int64_t end, int64_t block, Sum<S>* sums) {
  const int64_t row = tiles.t.w.taps * block;
  const int64_t c = tiles.dense && tiles.whole ? all_dense_sums(tiles, gy, s.th0, s.th1, 0, end, block, sums) : 0;
  for (int64_t th = s.th0; th < s.th1; ++th) any_sums(tiles, gy, th, c, end, block, sums + (th - s.th0) * row);
}

/// Sums over rows [row0, row1) of tiles, of [tap of a segment][channel of a block], segment after segment; to `out` as
/// T or S.
template <class S, class Out>
void sum_rows(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end,
              int64_t row0, int64_t row1, Out* out) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Windows t = make_windows(g, Pass::grad_weight, 0, 0);
  const WeightTasks tasks{t.h.taps};
  const int64_t vectors = ceil_div(g.c, L), rows = tile_rows(g, Pass::forward);
  const int64_t filter = t.h.taps * t.w.taps;
  Tiles<S> tiles(t, unrolled(t) > 0);
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t c = 0; c < kBlock<T>; ++c) zeros[c] = S{};
  tiles.zeros = zeros;
  T *const sums = workspace + kBlock<T>, *const totals = sums + kBlock<T> * filter;

  for (int64_t v0 = 0; v0 < vectors; v0 += kBlockVectors) {
    Segment segments[kBlockVectors];
    int64_t count = 0, used = 0;
    const int64_t last = smaller(v0 + kBlockVectors, vectors);
    for (Segment s = tasks.segment(begin, end, v0, last); s.v0 < s.v1; s = tasks.segment(begin, end, s.v1, last)) {
      segments[count++] = s;
      used += (s.v1 - s.v0) * L * (s.th1 - s.th0) * t.w.taps;
    }
    if (count == 0) continue;
    tiles.read_ahead((segments[count - 1].v1 - segments[0].v0) * L);
    for (int64_t i = 0; i < used; ++i) sums[i] = totals[i] = 0;
    int64_t pixels = 0;
    const auto add_up = [&] {
      for (int64_t i = 0; i < used; i += L) {
        store(totals + i, load(totals + i) + load(sums + i));
        store(sums + i, Vec<T>{});
      }
      pixels = 0;
    };
    tiles.in = o.b + v0 * L;
    for (int64_t row = row0; row < row1; ++row) {
      tiles.each(row / rows, row % rows * kTileH, [&] {
        T* to = sums;
        for (int64_t i = 0; i < count; ++i) {
          const Segment& s = segments[i];
          const int64_t c0 = s.v0 * L, block = (s.v1 - s.v0) * L;
          const S* gy[kTile];
          for (int m = 0; m < kTile; ++m)
            gy[m] = tiles.places[m] < 0 ? nullptr : o.a + (tiles.places[m] + tiles.place_shift) * g.k + c0;
          tiles.in_shift += c0 - v0 * L;
          sum_tile(tiles, gy, s, smaller(block, g.c - c0), block, to);
          tiles.in_shift -= c0 - v0 * L;
          to += block * (s.th1 - s.th0) * t.w.taps;
        }
      });
      pixels += kTileH * t.w.count;
      if (pixels >= kSumPixels) add_up();
    }
    add_up();
    const T* from = totals;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t tap = segments[i].th0 * t.w.taps; tap < segments[i].th1 * t.w.taps; ++tap)
        for (int64_t c = segments[i].v0 * L; c < segments[i].v1 * L; ++c, ++from)
          if (c < g.c) out[c * filter + tap] = rounded<Out>(*from);
  }
}

/// Tasks are numbered (part, task of it).
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  const Parts all = Parts::of<Sum<S>>(g);
  if (all.count == 1) return sum_rows(g, o, workspace, begin, end, 0, all.rows, o.out);
  for (int64_t part = begin / all.tasks; part * all.tasks < end; ++part) {
    const int64_t first = part * all.tasks;
    sum_rows(g, o, workspace, larger(begin - first, 0), smaller(end - first, all.tasks), all.rows * part / all.count,
             all.rows * (part + 1) / all.count, o.parts + part * g.c * g.kernel[0] * g.kernel[1]);
  }
}

}  // namespace

template <class S>
Conv2dRun<S> depthwise_grad_weight() {
  return {[](const Conv2dGeometry& g) {
            const Parts all = Parts::of<Sum<S>>(g);
            return all.tasks * all.count;
          },
          weight_workspace<Sum<S>>, grad_weight<S>, [](const Conv2dGeometry& g) { return Parts::of<Sum<S>>(g).count; },
          channels_last_grad_weight<S>().add_parts};
}

template Conv2dRun<float> depthwise_grad_weight();
template Conv2dRun<double> depthwise_grad_weight();
template Conv2dRun<BFloat16> depthwise_grad_weight();
template Conv2dRun<Float16> depthwise_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
