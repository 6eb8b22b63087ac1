// The gradient of a 1x1 kernel's weight, contiguous.
//
//   gw[k, c]  =  sum over p of gy[k, p] * x[c, p*stride]                      p = (n, oh, ow)
//
// Both sides are planes, and the sum runs along them. A step of the register tile takes a number of each of its rows
// and vectors of columns. Rows are channels of one side, read where they stand: the next number of each is the next
// step's. Columns are channels of the other, put side by side by transposing squares of a vector of pixels x a vector
// of channels, for a block of pixels at a time: those of the side where that costs less.
//
// A task is a block of the product; weight_products.h says how it is cut. Sums are made for each block of pixels from a
// fresh zero and added in order.
#include "kernels.h"
#include "transpose.h"
#include "weight_products.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

template <class T>
constexpr int64_t kWorkspace = kBlockPixels * kBlockColumns<T> + (kBlockRows + kMostRows) * kBlockColumns<T>;

/// Channels of a tensor, from the first that a block wants.
template <class T>
struct Planes {
  const T* from;
  int64_t count, image, plane, row, step;  // numbers from image to image, plane to plane, row to row and pixel to pixel
  const T* at(int64_t n, int64_t h, int64_t w) const { return from + n * image + h * row + w * step; }
};

/// Consecutive pixels of one row.
struct Stretch {
  int64_t n, h, w, length, first;  // `first` is its number in the block of pixels
};

/// to[panel][pixel][V vectors] = the columns' numbers.
template <class T, int V>
void put_side_by_side(const Planes<T>& columns, const Stretch* stretches, int64_t count, int64_t pixels, T* to) {
  const int64_t plane = columns.plane;
  constexpr int64_t L = kLanes<T>;
  for (int64_t c = 0; c < columns.count; c += V * L, to += pixels * V * L)
    for (int v = 0; v < V; ++v) {
      const int64_t lanes = larger(0, smaller(L, columns.count - c - v * L));
      for (int64_t i = 0; i < count; ++i) {
        const Stretch& s = stretches[i];
        const T* from = columns.at(s.n, s.h, s.w) + (c + v * L) * plane;
        T* panel = to + s.first * V * L + v * L;
        for (int64_t p = 0; p < s.length; p += L) {
          const int64_t here = smaller(L, s.length - p);
          Vec<T> square[L];
          for (int64_t lane = 0; lane < L; ++lane) {
            const T* row = from + lane * plane + p * columns.step;
            __builtin_prefetch(row + pixels * columns.step);  // of the next block
            square[lane] = lane >= lanes                    ? Vec<T>{}
                           : here == L && columns.step == 1 ? load(row)
                                                            : load_strided(row, columns.step, here);
          }
          transpose<T>(square);
          for (int64_t j = 0; j < here; ++j) store(panel + (p + j) * V * L, square[j]);
        }
      }
    }
}

/// sums[row][column], rows `pitch` apart, of the pixels [block.first, block.last).
template <class T, int V>
void sum_block(const Planes<T>& rows, const Planes<T>& columns, int64_t height, int64_t width, const Block& block,
               T* packed, T* sums) {
  constexpr int M = kRows<V>;
  constexpr int64_t L = kLanes<T>, kPanel = V * L;
  const int64_t pitch = round_up(block.columns, kPanel);
  if (block.first == block.last) {
    for (int64_t i = 0; i < block.rows * pitch; i += L) store(sums + i, Vec<T>{});
  }
  for (int64_t p0 = block.first, pixels; p0 < block.last; p0 += pixels) {
    pixels = ceil_div(block.last - p0, ceil_div(block.last - p0, kBlockPixels));
    Stretch stretches[kBlockPixels];
    int64_t count = 0, lengths[kBlockPixels];
    for (int64_t first = 0; first < pixels; ++count) {
      const int64_t w = (p0 + first) % width, row = (p0 + first) / width;
      lengths[count] = smaller(width - w, pixels - first);
      stretches[count] = {row / height, row % height, w, lengths[count], first};
      first += lengths[count];
    }
    put_side_by_side<T, V>(columns, stretches, count, pixels, packed);

    for (int64_t j = 0; j < block.columns; j += kPanel) {
      const T* b[kBlockPixels];
      for (int64_t i = 0; i < count; ++i) b[i] = packed + j * pixels + stretches[i].first * kPanel;
      for_tiles<M>(0, block.rows, [&](int64_t r, auto tall) {
        const T* a[kBlockPixels * tall];
        T* to[tall];
        for (int64_t i = 0; i < count; ++i) {
          const T* from = rows.at(stretches[i].n, stretches[i].h, stretches[i].w);
          for (int64_t m = 0; m < tall; ++m) a[i * tall + m] = from + smaller(r + m, block.rows - 1) * rows.plane;
        }
        int64_t ahead[tall];
        for (int64_t m = 0; m < tall; ++m) {
          to[m] = sums + (r + m) * pitch + j;
          ahead[m] = tall * rows.plane;
        }
        multiply_tile<T, V, tall>(count, lengths, a, rows.step, b, to, p0 == block.first ? nullptr : to, kPanel, false,
                                  j == 0 ? ahead : nullptr);
      });
    }
  }
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<S, Sum<S>>) {
    const Products<S> all(g);
    S *const packed = workspace, *const sums = packed + kBlockPixels * kBlockColumns<S>;
    const int64_t k_group = g.k / g.groups, c_group = g.c / g.groups;
    const int64_t plane = g.out[0] * g.out[1], x_plane = g.in[0] * g.in[1];
    const bool one_row = rows_adjoin(g);
    const int64_t height = one_row ? 1 : g.out[0], width = one_row ? plane : g.out[1];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % all.parts, columns = task / all.parts % all.column_blocks;
      const int64_t rows = task / all.parts / all.column_blocks % all.row_blocks;
      const int64_t group = task / all.parts / all.column_blocks / all.row_blocks;
      const Block block = all.block(rows, columns, part, g.n * plane);
      const int64_t k0 = group * k_group + (all.turned ? block.column0 : block.row0);
      const int64_t c0 = all.turned ? block.row0 : block.column0;
      const Planes<S> gy{o.a + k0 * plane, all.turned ? block.columns : block.rows, g.k * plane, plane, width, 1};
      const Planes<S> x{o.b + (group * c_group + c0) * x_plane,
                        all.turned ? block.rows : block.columns,
                        g.c * x_plane,
                        x_plane,
                        g.stride[0] * g.in[1],
                        g.stride[1]};
      with_vectors<S>(all.panel, [&](auto v) {
        sum_block<S, v>(all.turned ? x : gy, all.turned ? gy : x, height, width, block, packed, sums);
      });
      S* const out = all.parts == 1 ? o.out : o.parts + part * g.k * c_group;
      put_block(sums, round_up(block.columns, all.panel), block.rows, block.columns, all.turned, c_group,
                out + k0 * c_group + c0);
    }
  }
}

}  // namespace

template <class S>
Conv2dRun<S> planar_grad_weight() {
  return {[](const Conv2dGeometry& g) { return Products<Sum<S>>(g).total; },
          [](const Conv2dGeometry&) { return kWorkspace<Sum<S>>; }, grad_weight<S>,
          [](const Conv2dGeometry& g) { return Products<Sum<S>>(g).parts; }, add_parts<S>};
}

template Conv2dRun<float> planar_grad_weight();
template Conv2dRun<double> planar_grad_weight();
template Conv2dRun<BFloat16> planar_grad_weight();
template Conv2dRun<Float16> planar_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
