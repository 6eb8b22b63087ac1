// Mistakes, to see that each is found: kernels that reverse a row of numbers, out[i] = in[size-1 - i], and do it wrong if
// `fault`. test_emulation.py says how each is found, with sanitizers and without.
#include "cuda/copy_async.h"
#include "cuda/warp.h"
#include "samples.h"

namespace cnnops::cuda {
namespace {

/// What a mistake is made in: a block with a thread for each number.
struct Row {
  int size;
  bool fault;
  const float* in;
  float* out;

  __device__ int i() const { return static_cast<int>(threadIdx.x); }
  __device__ int last() const { return size - 1; }
  __device__ bool valid() const { return i() < size; }
};

/// Thread i reads what another one wrote.
__device__ void missing_barrier(const Row& row) {
  float* shared = shared_memory<float>();
  if (row.valid()) shared[row.i()] = row.in[row.i()];
  if (!row.fault) sync_block();
  if (row.valid()) row.out[row.i()] = shared[row.last() - row.i()];
}

/// A second round overwrites what others have not read yet.
__device__ void missing_trailing_barrier(const Row& row) {
  float* shared = shared_memory<float>();
  float sum = 0;
  for (int round = 1; round <= 2; ++round) {
    if (row.valid()) shared[row.i()] = round * row.in[row.i()];
    sync_block();
    if (row.valid()) sum += shared[row.last() - row.i()];
    if (!row.fault) sync_block();
  }
  if (row.valid()) row.out[row.i()] = sum / 3;
}

__device__ void missing_sync_warp(const Row& row) {
  float* shared = shared_memory<float>() + row.i() / kWarp * kWarp;
  const int partner = lane() ^ 31;
  if (row.valid()) shared[lane()] = row.in[row.last() - row.i() / kWarp * kWarp - partner];
  if (!row.fault) sync_warp();
  if (row.valid()) row.out[row.i()] = shared[partner];
}

__device__ void missing_wait(const Row& row) {
  float* shared = shared_memory<float>();
  if (row.valid()) copy_async<4>(shared + row.i(), row.in + row.i());
  commit_copies();
  if (!row.fault) wait_copies<0>();
  sync_block();
  if (row.valid()) row.out[row.i()] = shared[row.last() - row.i()];
  wait_copies<0>();
}

/// Waits for one group too few.
__device__ void wait_for_too_few(const Row& row) {
  float* shared = shared_memory<float>();
  if (row.valid()) copy_async<4>(shared + row.i(), row.in + row.i());
  commit_copies();
  if (row.valid()) copy_async<4>(shared + row.size + row.i(), row.in + row.i());
  commit_copies();
  if (row.fault) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  sync_block();
  if (row.valid()) row.out[row.i()] = shared[row.size + row.last() - row.i()];
  wait_copies<0>();
}

__device__ void never_waits(const Row& row) {
  float* shared = shared_memory<float>();
  if (row.valid()) copy_async<4>(shared + row.i(), row.in + row.i());
  commit_copies();
  if (!row.fault) wait_copies<0>();
  if (row.valid()) row.out[row.i()] = row.in[row.last() - row.i()];
}

__device__ void read_beyond(const Row& row) {
  const float x = row.fault || row.valid() ? row.in[row.i()] : 0;
  sync_block();
  if (row.valid()) row.out[row.last() - row.i()] = x;
}

__device__ void write_beyond(const Row& row) {
  if (row.fault || row.valid()) row.out[row.i()] = row.valid() ? row.in[row.last() - row.i()] : 1;
}

__device__ void read_before(const Row& row) {
  if (row.valid()) row.out[row.i()] = row.in[row.last() - row.i() - (row.fault && row.i() == row.last() ? 900 : 0)];
}

__device__ void shared_beyond(const Row& row) {
  float* shared = shared_memory<float>();
  if (row.valid()) shared[row.i() + (row.fault ? 2 * row.size : row.size)] = row.in[row.i()];
  sync_block();
  if (row.valid()) row.out[row.i()] = shared[row.last() - row.i() + (row.fault ? 2 * row.size : row.size)];
}

__device__ void unwritten(const Row& row) {
  if (row.valid() && !(row.fault && row.i() == 7)) row.out[row.i()] = row.in[row.last() - row.i()];
}

__device__ void writes_its_input(const Row& row) {
  if (row.valid()) row.out[row.i()] = row.in[row.last() - row.i()];
  sync_block();
  if (row.fault && row.i() == 0) const_cast<float*>(row.in)[0] = 5;
}

/// Two threads write one number, and not the same.
__device__ void two_writers(const Row& row) {
  if (!row.valid()) return;
  row.out[row.i()] = row.in[row.last() - row.i()];
  if (row.fault && row.i() < row.last()) row.out[row.i() + 1] = row.in[row.i()];
}

__device__ void early_return(const Row& row) {
  if (row.fault && row.i() == row.last()) return;
  sync_block();
  if (row.valid()) row.out[row.i()] = row.in[row.last() - row.i()];
}

__device__ void two_barriers(const Row& row) {
  if (row.fault && row.i() == 3) {
    sync_block();
  } else {
    sync_block();
  }
  if (row.valid()) row.out[row.i()] = row.in[row.last() - row.i()];
}

__device__ void misaligned(const Row& row) {
  float four[4] = {};
  if (row.i() < row.size / 4) {
    load<4>(four, row.in + 4 * row.i() + (row.fault ? 1 : 0));
    for (int j = 0; j < 4; ++j) row.out[row.last() - 4 * row.i() - j] = four[j];
  }
}

__device__ void misaligned_copy(const Row& row) {
  float* shared = shared_memory<float>();
  if (row.i() < row.size / 4) copy_async<16>(shared + 4 * row.i() + (row.fault ? 2 : 0), row.in + 4 * row.i());
  commit_copies();
  wait_copies<0>();
  sync_block();
  if (row.valid()) row.out[row.i()] = shared[row.last() - row.i()];
}

/// As if in[] were the last image of a tensor too large for 32 bits.
__device__ void overflow(const Row& row) {
  const int images = row.size > 0 ? 5 : 0, image = 1 << 29;
  const float* first = row.in - static_cast<int64_t>(images) * image;
  if (!row.valid()) return;
  const int64_t offset = row.fault ? images * image : static_cast<int64_t>(images) * image;
  row.out[row.i()] = first[offset + row.last() - row.i()];
}

/// Half a warp shuffles at one line, half at another.
__device__ void two_shuffles(const Row& row) {
  const float mine = row.valid() ? row.in[row.last() - row.i()] : 0;
  float x;
  if (row.fault && lane() >= 16) {
    x = shuffle_xor(mine, 0);
  } else {
    x = shuffle_xor(mine, 0);
  }
  if (row.valid()) row.out[row.i()] = x;
}

__device__ void whole_warps(const Row& row) {
  const float x = shuffle_xor(row.valid() ? row.in[row.last() - row.i()] : 0, 0);
  if (row.valid()) row.out[row.i()] = x;
}

__device__ void lanes_left_out(const Row& row) {
  float x = row.valid() ? row.in[row.last() - row.i()] : 0;
  if (!row.fault || row.valid()) x = shuffle_xor(x, 0);
  if (row.valid()) row.out[row.i()] = x;
}

__device__ void shuffle_beside_a_barrier(const Row& row) {
  float x = row.valid() ? row.in[row.last() - row.i()] : 0;
  if (row.fault && lane() == 5) {
    sync_block();
  } else {
    x = shuffle_xor(x, 0);
    sync_block();
  }
  if (row.valid()) row.out[row.i()] = x;
}

template <class Body>
__global__ void fault_kernel(Body body, Row row) {
  body(row);
}

}  // namespace

void fault(const std::string& name, int64_t size, bool fault, const float* in, float* out) {
  const Row row{static_cast<int>(size), fault, in, out};
  const auto start = [&](const char* which, auto body, int64_t shared = 0, int64_t threads = 0) {
    if (name != which) return;
    shared = shared ? shared : 2 * size;
    threads = threads ? threads : ceil_div(size, kWarp) * kWarp;
    launch(which, fault_kernel<decltype(body)>, 1, static_cast<int>(threads), shared * sizeof(float), nullptr, body,
           row);
  };
  start("missing_barrier", missing_barrier);
  start("missing_trailing_barrier", missing_trailing_barrier);
  start("missing_sync_warp", missing_sync_warp);
  start("missing_wait", missing_wait);
  start("wait_for_too_few", wait_for_too_few);
  start("never_waits", never_waits);
  start("read_beyond", read_beyond);
  start("write_beyond", write_beyond);
  start("read_before", read_before);
  start("shared_beyond", shared_beyond);
  start("unwritten", unwritten);
  start("writes_its_input", writes_its_input);
  start("two_writers", two_writers);
  start("early_return", early_return);
  start("two_barriers", two_barriers);
  start("misaligned", misaligned);
  start("misaligned_copy", misaligned_copy);
  start("overflow", overflow);
  start("two_shuffles", two_shuffles);
  start("lanes_left_out", lanes_left_out);
  start("half_a_warp", whole_warps, 0, fault ? size - 16 : 0);
  start("shuffle_beside_a_barrier", shuffle_beside_a_barrier);
  start("too_much_shared_memory", missing_barrier, fault ? 64 * 256 + 1 : 64 * 256);
}

}  // namespace cnnops::cuda
