// Lines of the cache that will be written, fetched while something is computed: a tile's share of a row of results is
// often no whole lines, and those that it shares with others would be waited for.
#pragma once

#include <cstdint>

namespace cnnops::cpu::CNNOPS_ISA {

/// `count` numbers from p on.
template <class T>
static inline void fetch_to_write(T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 1);
  __builtin_prefetch(p + count - 1, 1);
}

}  // namespace cnnops::cpu::CNNOPS_ISA
