// Memory for what operators return and for scratch, on the CPU, that stays warm.
//
// A tensor's memory is fresh as a rule: the C library returns large blocks to the system when they are freed, and the
// next ones are faulted in page by page, which can cost many times what the kernel costs that fills them. So freed
// memory is kept here for the next tensors, whatever their sizes. What is kept is bounded: by a limit in bytes, and by
// time, as what a while did without goes back to the system. docs/memory.md says more.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>

namespace cnnops {

/// Aligned to pages. Small blocks are torch's own; where there is no memory it raises what torch raises.
c10::Allocator* warm_memory();

struct MemoryStats {
  int64_t in_use, in_use_peak, cached, cached_peak, hits, misses, evictions, limit;
};

MemoryStats memory_stats();

/// Returns all that is kept to the system.
void empty_cache();

/// How many bytes are kept at most; 0 keeps none, and leaves all memory to torch.
void set_cache_limit(int64_t bytes);

/// Once in so many seconds what is in use and kept is cut to one and a half times the most that was in use meanwhile.
/// This happens when a block is freed.
void set_cache_seconds(double seconds);

}  // namespace cnnops
