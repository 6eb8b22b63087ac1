// The gradient of the weight as a product of two matrices, pixels x channels each: how it is cut into tasks, and where
// the results go. For channels_last tensors and, if the kernel is 1x1, contiguous ones.
#pragma once

#include "channels_last_tile.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kFewTasks = 4;
constexpr int64_t kBlockRows = 256, kBlockPixels = 160;  // of a task, of a block that is summed from a fresh zero
template <class T>
constexpr int64_t kBlockColumns = 16 * kLanes<T>;
constexpr int64_t kGoodTasks = 16, kMostParts = 16;
constexpr int64_t kPartPixels = 512, kPartNumbers = 1 << 19;  // of a part at least; of all parts together at most
constexpr int64_t kSomeTasks = 12, kSomeChannels = 128;       // blocks are cut for these down to those

/// A task's block of a product, and the pixels of its part.
struct Block {
  int64_t row0, rows, column0, columns;
  int64_t first, last;
};

/// Tasks are numbered (group, tap, block of rows, block of columns, part).
template <class T>
struct Products {
  bool by_tap, turned;          // turned: rows are input channels, columns output channels
  int64_t taps, rows, columns;  // of a product
  int64_t block_rows, row_blocks, block_columns, column_blocks;
  int64_t panel;  // columns of a tile
  int64_t parts, total;

  explicit Products(const Conv2dGeometry& g) {
    constexpr int64_t L = kLanes<T>;
    const int64_t c_group = g.c / g.groups, kernel = g.kernel[0] * g.kernel[1];
    by_tap = kernel == 1 || c_group >= 3 * L;
    taps = by_tap ? kernel : 1;
    rows = g.k / g.groups;
    columns = by_tap ? c_group : kernel * c_group;
    if (g.layout == Layout::contiguous) {  // vectors of numbers are put together then: of what costs less in all
      const auto cost = [](int64_t rows, int64_t columns) { return round_up(columns, L) * (rows + 8); };
      turned = cost(columns, rows) < cost(rows, columns);
    } else {
      turned = by_tap && g.border == Border::zeros && columns < rows && columns < 4 * L;
    }
    if (turned) std::swap(rows, columns);

    const int64_t all = ceil_div(columns, L);
    int64_t vectors = smaller(all, kMostVectors);
    for (int64_t v = vectors - 1; v > 1; --v)
      if (round_up(all, v) < round_up(all, vectors)) vectors = v;
    panel = vectors * L;
    const auto cut = [&](int64_t most_rows, int64_t most_columns) {
      row_blocks = ceil_div(rows, most_rows);
      block_rows = ceil_div(rows, row_blocks);
      row_blocks = ceil_div(rows, block_rows);
      const int64_t panels = ceil_div(columns, panel), most = larger(1, most_columns / panel);
      block_columns = ceil_div(panels, ceil_div(panels, most)) * panel;
      column_blocks = ceil_div(columns, block_columns);
      total = g.groups * taps * row_blocks * column_blocks * parts;
    };
    parts = 1;
    cut(kBlockRows, kBlockColumns<T>);
    const int64_t pixels = g.n * g.out[0] * g.out[1], numbers = g.k * c_group * kernel;
    while (parts < kMostParts && total < kGoodTasks && pixels >= 2 * parts * kPartPixels &&
           2 * parts * numbers <= kPartNumbers) {
      parts *= 2;
      total *= 2;
    }
    const auto cut_down = [&](int64_t tasks, int64_t least) {
      while (total < tasks && (block_columns > larger(panel, least) || block_rows > larger(kMostRows, least))) {
        if (block_columns > panel && block_columns >= block_rows)
          cut(block_rows, block_columns / 2);
        else
          cut(ceil_div(block_rows, 2), block_columns);
      }
    };
    cut_down(kSomeTasks, kSomeChannels);
    cut_down(kFewTasks, 0);
  }

  Block block(int64_t row_block, int64_t column_block, int64_t part, int64_t pixels) const {
    const int64_t row0 = row_block * block_rows, column0 = column_block * block_columns;
    return {row0,
            smaller(block_rows, rows - row0),
            column0,
            smaller(block_columns, columns - column0),
            pixels * part / parts,
            pixels * (part + 1) / parts};
  }
};

}  // namespace cnnops::cpu::CNNOPS_ISA
