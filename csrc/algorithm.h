// Several ways to compute the same thing, as a table; and how one of them is chosen.
//
// An algorithm is a row: its name, a function that says which geometries it refuses and why, the scratch memory it
// wants, and how to run it (what `Run` holds differs between CPU and CUDA). Rows stand fastest first; the last is the
// reference, which accepts everything. The choice looks at the geometry without its batch size, and never at the number
// of threads: otherwise an element's bits could change with its neighbours in the batch. Who would rather wait than
// round more chooses among the accurate rows only.
#pragma once

#include "geometry.h"
#include "numbers.h"

namespace cnnops {

/// The operands of a pass, and its result `out`:
///   forward      a = x,  b = w, bias (or nullptr), out = y
///   grad_input   a = gy, b = w, out = gx
///   grad_weight  a = gy, b = x, out = gw
template <class T>
struct Conv2dOperands {
  const T *a, *b, *bias;
  T* out;
  bool tf32 = false;        // whether float32 may be rounded to TF32 before it is multiplied: CUDA only
  Sum<T>* parts = nullptr;  // of sums: CPU only (cpu/kernels.h)
};

template <class Run>
struct Conv2dAlgorithm {
  const char* name;
  const char* summary;  // one line for `python -m cnnops info`
  /// nullptr when the algorithm can compute this pass of this geometry, otherwise a sentence that says why not.
  const char* (*refuses)(const Conv2dGeometry&, Pass);
  Run forward, grad_input, grad_weight;
  bool accurate = true;  // rounds about as `direct` does: where it is chosen, its error is at most 1.5 times as large
  /// Of a geometry that it accepts, whether a row below is faster: then "auto" passes over this one. nullptr for never.
  bool (*yields)(const Conv2dGeometry&, Pass) = nullptr;
  /// Of a row that several files make up, the one that computes this geometry; nullptr where a row is one file.
  const Conv2dAlgorithm& (*file)(const Conv2dGeometry&, Pass) = nullptr;
  /// Whether contiguous filters are read where they are although all the rest is channels_last. nullptr for never.
  bool (*reads_contiguous_filters)(const Conv2dGeometry&, Pass) = nullptr;

  const Run& run(Pass pass) const {
    return pass == Pass::forward ? forward : pass == Pass::grad_input ? grad_input : grad_weight;
  }
};

/// A table is a pointer and a length, rows fastest first.
template <class Row>
struct Table {
  const Row* rows;
  int size;
  const Row* begin() const { return rows; }
  const Row* end() const { return rows + size; }
};

/// What choose() found: the row, or why there is none (`refusal` stays null when no row has that name).
template <class Row>
struct Choice {
  const Row* row;
  const char* refusal;
};

static inline bool same_name(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

/// `name` is a row's name, "auto" for the first row that accepts and does not yield, or "accurate" for the first
/// accurate one that accepts.
template <class Row>
Choice<Row> choose(const Table<Row>& table, const Conv2dGeometry& geometry, Pass pass, const char* name) {
  const bool fastest = same_name(name, "auto"), accurate = same_name(name, "accurate");
  for (const Row& row : table) {
    const bool named = same_name(name, row.name);
    if (!named && !fastest && !(accurate && row.accurate)) continue;
    const char* refusal = row.refuses(geometry, pass);
    if (named) return {refusal ? nullptr : &row, refusal};
    if (refusal || (fastest && row.yields && row.yields(geometry, pass))) continue;
    return {&row, nullptr};
  }
  return {nullptr, nullptr};
}

}  // namespace cnnops
