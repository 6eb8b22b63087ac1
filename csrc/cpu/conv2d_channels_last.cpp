// Convolution of channels_last tensors: register tiles of a few pixels x many channels, every window read in place.
//
//   y[p, k]    = bias[k] + sum over (kh,kw,c) of window[p, (kh,kw,c)] * w[k, (kh,kw,c)]       p = (n, oh, ow)
//
// A tile holds M x V vectors of sums, and a step is one number for each of its M rows, broadcast, times V vectors: the
// rows are pixels, the vectors output channels, and the steps go through the windows. The gradient of the input is
// forward with other taps (../correlation.h); that of the weight is in conv2d_channels_last_weight.cpp.
//
// Forward, a pixel's channels under a tap are consecutive numbers, and where channels are few a whole row of taps is:
// such a run is read where it stands. It is copied first, for one tile at a time, if its taps lie apart, or to widen
// 16-bit numbers. Only the weights are rearranged, in panels of at most four vectors of output channels. A thread packs
// a set of panels, 1.5 MiB at most, once for all of its tasks that want it; a task's pixels are so few that they stay
// in the second-level cache while one panel after the other passes. (A panel larger than that is packed in blocks of 64
// KiB, each for all pixels of the task.)
//
// Pixels near a border of zeros see less than a window. A task sorts its pixels by the taps through which they see
// anything, a tile holds pixels of one sort, and the taps that these miss are left out: with a wide dilation, or in the
// gradient of a layer without padding, that is most of the work. (Where a window is short, or the border shows pixels,
// what is outside is copied instead, as zeros or as what it shows.)
//
// Through a 1x1 kernel each output sees one pixel, and nothing is sorted (channels_last_single.h). Outputs too many for
// the caches are written past them, if a panel's are whole lines of the cache (where they are sums of few numbers, and
// memory sets the pace, panels are made so); otherwise panels that follow each other put lines together in the cache,
// and a tile fetches its share of them while it computes.
//
// A task is a set of panels for a block of pixels, of each class (../correlation.h): so all tasks are alike. Sums are
// made in blocks of steps, each from a fresh zero, that are then added in order; the batch size decides how pixels are
// dealt to tasks, never how one sum is made. Zeros of the border that are copied are multiplied: an infinite or NaN
// weight or gradient gives NaN there, where plain loops would skip it. Refuses the contiguous layout.
#include "channels_last_single.h"
#include "channels_last_views.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kTileMultiple = 24;    // a multiple of the number of rows of every tile
constexpr int64_t kFewPixels = 192;  // of a task, which has kMostPixels at most
constexpr int64_t kGoodTasks = 32, kGoodSets = 24;
constexpr int64_t kPackedTogether = 16;                       // summed channels, of all panels
constexpr int64_t kManyPixels = 1024;                         // for which weights may be packed by each thread
constexpr int64_t kSeenBytes = 256 << 10, kLeastPixels = 48;  // what a task sees, to be read again by each panel
constexpr int64_t kMostRuns = 64;                             // of a block
constexpr int64_t kFewSummed = 32;                            // numbers of a sum that is made faster than written

/// A window as runs: rows of taps, or taps, whose channels are cut into equal pieces where they are many.
struct Runs {
  bool rows;
  int64_t pieces, piece, count;
  Runs(const Windows& t, int64_t longest) {
    rows = (t.adjacent() || t.channels < 8) && t.w.taps * t.channels <= kShortRow;
    pieces = ceil_div(t.channels, longest);
    piece = ceil_div(t.channels, pieces);
    pieces = ceil_div(t.channels, piece);
    count = t.w.taps == 0 ? 0 : rows ? t.h.taps : t.h.taps * t.w.taps * pieces;
  }
  Run operator()(const Windows& t, int64_t i) const {
    if (rows) return make_run(t, i, 0, t.w.taps * t.channels);
    const int64_t tap = i / pieces, c = i % pieces * piece, begin = tap % t.w.taps * t.channels;
    return make_run(t, tap / t.w.taps, begin + c, begin + smaller(c + piece, t.channels));
  }
};

template <class T>
constexpr int64_t kCopies = kMostRows * kWeights<T> / kLanes<T>;
template <class T>
constexpr int64_t kWorkspace = kKept<T> + kCopies<T> + (kMostPixels + kTileMultiple) * kMostVectors * kLanes<T>;

/// What pixels that see alike see of a block of runs, and the weights of it.
template <class T>
struct SeenRuns {
  int64_t count;
  Run parts[kMostRuns];
  int64_t lengths[kMostRuns];
  const T* weights[kMostRuns];
};

/// Up to M pixels that see alike. Their sums go through `sums` from block to block of runs, and out with the last.
template <class S, int V, int M>
void correlate_tile(const Windows& t, const Conv2dOperands<S>& o, int64_t row0, const SeenRuns<Sum<S>>& runs,
                    const Pixel<S>* pixels, int64_t count, bool first, bool last, bool past, Sum<S>* copies,
                    Sum<S>* sums) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const T* a[kMostRuns * M];
  for (int64_t r = 0; r < runs.count; ++r)
    for (int64_t m = 0; m < M; ++m) {
      const Pixel<S>& pixel = pixels[smaller(m, count - 1)];
      if constexpr (std::is_same_v<S, T>) {
        if (pixel.inside && runs.parts[r].straight) {
          a[r * M + m] = pixel.image + pixel.at + runs.parts[r].offset;
          continue;
        }
      }
      copy_run(t, pixel, runs.parts[r], copies);
      a[r * M + m] = copies;
      copies += runs.lengths[r];
    }

  alignas(64) T tile[M * V * L];
  const int64_t channel = t.out_channel0 + row0, left = t.rows - row0;
  T* to[M];
  const T* bias[M];
  for (int64_t m = 0; m < M; ++m) to[m] = tile + m * V * L;
  if constexpr (std::is_same_v<S, T>) {
    if (left >= V * L) {
      for (int64_t m = 0; m < count; ++m) {
        to[m] = o.out + pixels[m].out * t.out_channels + channel;
        if (!past) fetch_to_write(to[m], V * L);
      }
      for (int64_t m = 0; m < M; ++m) bias[m] = o.bias + channel;
      multiply_tile<T, V, M>(runs.count, runs.lengths, a, 1, runs.weights, to,
                             !first   ? to
                             : o.bias ? bias
                                      : nullptr,
                             V * L, first && last && past);
      return;
    }
  }
  multiply_tile<T, V, M>(runs.count, runs.lengths, a, 1, runs.weights, to, nullptr);
  for (int64_t m = 0; m < count; ++m, sums += V * L) {
    S* out = o.out + pixels[m].out * t.out_channels + channel;
    for (int64_t j = 0; j < V * L; j += L) {
      Vec<T> v = load(to[m] + j);
      if (!first) v = load(sums + j) + v;
      const int64_t lanes = smaller(L, left - j);
      if (!last) {
        store(sums + j, v);
      } else if (lanes > 0) {
        store_first(out + j, v + (o.bias ? load_first(o.bias + channel + j, lanes) : Vec<T>{}), lanes);
      }
    }
  }
}

/// The produced channels [row0, row0 + V vectors) of some pixels.
template <class S, int V>
void correlate_panel(const Windows& t, const Conv2dOperands<S>& o, int64_t row0, const Pixel<S>* pixels,
                     const Alike* sorts, int64_t kinds, bool past, bool packed, Sum<S>* weights, Sum<S>* copies) {
  using T = Sum<S>;
  constexpr int M = kRows<V>;
  constexpr int64_t L = kLanes<T>, kDepth = kWeights<T> / (V * L);
  static_assert(kDepth >= kShortRow && kTileMultiple % M == 0);
  T* const sums = copies + kCopies<T>;
  const Runs runs(t, kDepth);
  int64_t i = 0;
  do {
    Run block[kMostRuns];
    int64_t starts[kMostRuns], blocks = 0, depth = 0;
    for (; i < runs.count && blocks < kMostRuns; ++i, ++blocks) {
      const Run run = runs(t, i);
      if (depth + run.length > kDepth) break;
      if (!packed) pack_weights<S, V>(t, o.b, row0, run, weights + depth * V * L);
      block[blocks] = run;
      starts[blocks] = depth;
      depth += run.length;
    }
    const bool first = i == blocks, last = i == runs.count;

    for (int64_t k = 0; k < kinds; ++k) {
      SeenRuns<T> runs_seen;
      runs_seen.count = 0;
      for (int64_t r = 0; r < blocks; ++r) {
        const Run part = seen_part(t, block[r], sorts[k].view, runs.rows);
        if (part.length == 0) continue;
        const int64_t skipped = runs.rows ? part.tw * t.channels : 0;
        runs_seen.parts[runs_seen.count] = part;
        runs_seen.lengths[runs_seen.count] = part.length;
        runs_seen.weights[runs_seen.count++] = weights + (starts[r] + skipped) * V * L;
      }
      for_tiles<M>(sorts[k].first, sorts[k].last, [&](int64_t p, auto rows) {
        correlate_tile<S, V, rows>(t, o, row0, runs_seen, pixels + p, smaller(sorts[k].last - p, rows), first, last,
                                   past, copies, sums + p * V * L);
      });
    }
    if (packed) weights += depth * V * L;
  } while (i < runs.count);
}

/// Numbers of a pass's outputs.
static inline int64_t outputs(const Conv2dGeometry& g, Pass pass) {
  return pass == Pass::forward ? g.n * g.k * g.out[0] * g.out[1] : g.n * g.c * g.in[0] * g.in[1];
}

/// How many vectors a panel has at most: whole lines of the cache, if these will be written past it. (So few numbers
/// are summed in one block by any panel: its width leaves their order as it is.)
template <class T>
int64_t most_vectors(const Conv2dGeometry& g, Pass pass) {
  constexpr int kWholeLines = kMostVectors / kLineVectors * kLineVectors;
  const bool few = (pass == Pass::forward ? g.c : g.k) * g.kernel[0] * g.kernel[1] <= kFewSummed * g.groups;
  const bool lines = kWholeLines > 0 && (pass == Pass::forward ? g.k : g.c) / g.groups % kLineNumbers<T> == 0;
  return few && lines && past_cache<T>(nullptr, outputs(g, pass)) ? kWholeLines : kMostVectors;
}

/// Tasks are numbered (group, set of panels, block of pixels of each class). Weights that serve several tasks are
/// packed once by a thread, for a set of panels as large as can be kept; where pixels are few, sets are small, so that
/// threads need not pack the same.
template <class T>
struct Tasks {
  int64_t classes, blocks, pixels, total;
  Panels<T> panels;
  int64_t set, sets;  // panels of a set
  bool kept;
  Tasks(const Conv2dGeometry& g, Pass pass, int64_t good = kGoodTasks)
      : classes(cpu::CNNOPS_ISA::classes(g, pass)),
        panels((pass == Pass::forward ? g.k : g.c) / g.groups, most_vectors<T>(g, pass)) {
    const int64_t most = g.n * make_windows(g, pass, 0, 0).pixels();  // class 0 has the most outputs
    const int64_t channels = larger(1, (pass == Pass::forward ? g.c : g.k) / g.groups);
    const int64_t fit = kKept<T> / (channels * g.kernel[0] * g.kernel[1] * larger(1, panels.width));
    kept = fit > 0 && most * g.kernel[0] * g.kernel[1] > 1;  // one pixel uses each weight once
    sets = larger(1, ceil_div(panels.count, larger(1, fit)));
    if (good > 1 && most * classes < kManyPixels) sets = larger(sets, smaller(panels.count, kGoodSets));
    set = ceil_div(panels.count, sets);
    sets = ceil_div(panels.count, larger(1, set));
    const int64_t others = g.groups * sets;
    int64_t wanted = smaller(larger(most * others / good, kFewPixels), kMostPixels);
    if (set > 1) wanted = smaller(wanted, larger(kLeastPixels, kSeenBytes / int64_t(sizeof(T)) / channels));
    blocks = ceil_div(most, wanted);
    if (blocks > 1 && others % 2 == 1) blocks = round_up(blocks, 2);
    with_vectors<T>(panels.width,
                    [&](auto v) { pixels = round_up(ceil_div(most, larger(blocks, 1)), larger(1, kRows<v> / 2)); });
    total = others * blocks;
  }
};

/// to[panel][r][V vectors] = the weights of `rows` produced channels from row0 on, for all that a class sums over.
/// Where those of a summed channel lie together, panels take turns, so that none is fetched twice.
template <class S>
void pack_panels(const Windows& t, const S* weight, int64_t row0, int64_t rows, int64_t width, Sum<S>* to) {
  const int64_t depth = t.h.taps * t.w.taps * t.channels;
  if (t.by_channel()) {
    for (int64_t panel = 0; panel < rows; panel += width)
      with_vectors<Sum<S>>(smaller(width, rows - panel),
                           [&](auto v) { pack_by_channel<S, v>(t, weight, row0 + panel, to + panel * depth); });
    return;
  }
  const Runs runs(t, t.weight_row == 1 ? kPackedTogether : kWeights<Sum<S>> / width);
  for (int64_t i = 0, before = 0; i < runs.count; ++i) {
    const Run run = runs(t, i);
    for (int64_t panel = 0; panel < rows; panel += width)
      with_vectors<Sum<S>>(smaller(width, rows - panel), [&](auto v) {
        pack_weights<S, v>(t, weight, row0 + panel, run, to + panel * depth + before * v * kLanes<Sum<S>>);
      });
    before += run.length;
  }
}

/// What no tap reaches: the bias, or zero.
template <class S>
void fill(const Windows& t, const Conv2dOperands<S>& o, int64_t row0, int64_t rows, const Pixel<S>* pixels,
          int64_t count, bool past) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const S* bias = o.bias ? o.bias + t.out_channel0 + row0 : nullptr;
  for (int64_t p = 0; p < count; ++p) {
    S* to = o.out + pixels[p].out * t.out_channels + t.out_channel0 + row0;
    for (int64_t j = 0; j < rows; j += L) {
      const int64_t lanes = smaller(L, rows - j);
      const Vec<Sum<S>> v = bias ? load_first(bias + j, lanes) : Vec<Sum<S>>{};
      if constexpr (std::is_same_v<S, Sum<S>>) {
        if (past && lanes == L) {
          store_past_cache(to + j, v);
          continue;
        }
      }
      store_first(to + j, v, lanes);
    }
  }
}

/// The outputs [first, first + count) of a class: each_panel(f) calls f(V, its first channel, its weights).
template <class S, class EachPanel>
void correlate_class(const Windows& t, const Conv2dOperands<S>& o, int64_t first, int64_t count, int64_t row0,
                     int64_t rows, int64_t width, bool large, bool fetch, bool packed, const EachPanel& each_panel,
                     Sum<S>* copies) {
  using T = Sum<S>;
  const bool aligned = large && (t.out_channel0 + row0) % kLanes<T> == 0,
             past = aligned && width % kLineNumbers<T> == 0 && t.rows % kLineNumbers<T> == 0;
  if constexpr (std::is_same_v<S, T>) {
    if (is_single(t)) {
      const auto go = [&](const auto& seen, const auto& made) {
        each_panel([&](auto v, int64_t row, T* weights) {
          correlate_single<T, v>(t, o, row, count, past, fetch, seen, made, packed, weights);
        });
      };
      if (in_order(t)) {
        const int64_t step = t.in_channels, out_step = t.out_channels, from = first * step + t.in_channel0;
        go([=](int64_t p) { return from + p * step; }, [=](int64_t p) { return (first + p) * out_step; });
      } else {
        int64_t seen[kMostPixels], made[kMostPixels];
        find_single(t, first, count, seen, made);
        go([&](int64_t p) { return seen[p]; }, [&](int64_t p) { return made[p]; });
      }
      return;
    }
  }
  Pixel<S> found[kMostPixels], pixels[kMostPixels];
  find_pixels(t, o.a, first, count, found);
  if (t.h.taps * t.w.taps == 0) return fill(t, o, row0, rows, found, count, aligned);
  Alike sorts[kMostPixels];
  const int64_t kinds = sort_pixels(t, found, count, pixels, sorts);
  each_panel([&](auto v, int64_t row, T* weights) {
    correlate_panel<S, v>(t, o, row, pixels, sorts, kinds, past, packed, weights, copies);
  });
}

template <class S>
void correlate(const Conv2dGeometry& g, Pass pass, const Tasks<Sum<S>>& tasks, const Conv2dOperands<S>& o,
               Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const bool large = past_cache(o.out, outputs(g, pass)) && (pass == Pass::forward ? g.k : g.c) % kLanes<T> == 0;
  const int64_t* in_size = pass == Pass::forward ? g.in : g.out;
  const int64_t inputs = g.n * in_size[0] * in_size[1] * (pass == Pass::forward ? g.c : g.k);
  const bool fetch = inputs * int64_t(sizeof(S)) > kMuchInput;
  const int64_t width = tasks.panels.width;
  T* const copies = workspace + kKept<T>;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % tasks.blocks * tasks.pixels, panels = task / tasks.blocks, group = panels / tasks.sets;
    const int64_t row0 = panels % tasks.sets * tasks.set * width;
    const bool pack = packed != panels;
    packed = panels;
    T* weights = workspace;
    for (int64_t cls = 0; cls < tasks.classes; ++cls) {
      const Windows t = make_windows(g, pass, group, cls);
      const int64_t depth = t.h.taps * t.w.taps * t.channels, count = smaller(tasks.pixels, g.n * t.pixels() - first);
      const int64_t rows = smaller(tasks.set * width, t.rows - row0);
      if (tasks.kept && pack) pack_panels(t, o.b, row0, rows, width, weights);
      const auto each_panel = [&](const auto& compute) {
        for (int64_t row = 0; row < rows; row += width)
          with_vectors<T>(smaller(width, rows - row),
                          [&](auto v) { compute(v, row0 + row, tasks.kept ? weights + row * depth : weights); });
      };
      if (count > 0)
        correlate_class(t, o, first, count, row0, rows, width, large, fetch, tasks.kept, each_panel, copies);
      if (tasks.kept) weights += round_up(rows, kLanes<T>) * depth;
    }
  }
  stores_done();
}

// ---- the row of the table ----

const char* refuses(const Conv2dGeometry& g, Pass) {
  return g.layout == Layout::channels_last ? nullptr
                                           : "it reads all channels of a pixel together, as channels_last has them";
}

/// Where they are packed once, and not as a fully connected layer's, whose numbers stand in the order of the image's.
template <class T>
bool reads_contiguous_filters(const Conv2dGeometry& g, Pass pass) {
  return pass == Pass::forward && g.kernel[0] * g.kernel[1] > 1 && Tasks<T>(g, pass).kept;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  return {[](const Conv2dGeometry& g) { return Tasks<Sum<S>>(g, pass).total; },
          [](const Conv2dGeometry&) { return kWorkspace<Sum<S>>; },
          [](const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
            correlate(g, pass, Tasks<Sum<S>>(g, pass), o, workspace, begin, end);
          }};
}

}  // namespace

template <class S>
void channels_last_alone(const Conv2dGeometry& g, Pass pass, const Conv2dOperands<S>& o, Sum<S>* workspace) {
  const Tasks<Sum<S>> tasks(g, pass, 1);
  correlate(g, pass, tasks, o, workspace, 0, tasks.total);
}

template void channels_last_alone(const Conv2dGeometry&, Pass, const Conv2dOperands<float>&, float*);
template void channels_last_alone(const Conv2dGeometry&, Pass, const Conv2dOperands<double>&, double*);

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_channels_last() {
  return {"direct",
          "register tiles of pixels x channels; channels_last",
          refuses,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          channels_last_grad_weight<S>(),
          true,
          nullptr,
          nullptr,
          reads_contiguous_filters<Sum<S>>};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_channels_last();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_channels_last();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_channels_last();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_channels_last();

}  // namespace cnnops::cpu::CNNOPS_ISA
