// A tensor (n, channels, ...) as kernels that know of channels see it: three axes, whatever its dimensions and layout.
#pragma once

#include "checks.h"

namespace cnnops {

/// Element number i in memory belongs to channel (i / inner) % channels.
struct Channels {
  int64_t n, channels, inner;
};

/// Of `t` dense in `layout`. Tensors of one dimension have one channel.
inline Channels channels_of(const Tensor& t, Layout layout) {
  Channels c{t.dim() > 0 ? t.size(0) : 1, t.dim() > 1 ? t.size(1) : 1, 1};
  for (int64_t dim = 2; dim < t.dim(); ++dim) c.inner *= t.size(dim);
  if (layout == Layout::channels_last) {
    c.n *= c.inner;
    c.inner = 1;
  }
  return c;
}

/// A value per channel, spread over a tensor of this shape.
inline Tensor spread(const Tensor& per_channel, c10::SymIntArrayRef shape) {
  std::vector<c10::SymInt> view(shape.size(), 1);
  if (view.size() > 1) view[1] = per_channel.sym_size(0);
  return per_channel.view_symint(view).expand_symint(shape);
}

}  // namespace cnnops
