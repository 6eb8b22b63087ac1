// A warp's collectives, one by one, on data that the test chooses: 32 lanes with 64 words each go in, 32 lanes with 8 words
// each come out.
#include "cuda/copy_async.h"
#include "cuda/matrix.h"
#include "samples.h"

namespace cnnops::cuda {
namespace {

constexpr int kIn = 64, kOut = 8;

template <class Collective>
__global__ void one_warp_kernel(Collective collective, const uint32_t* in, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t results[kOut] = {};
  collective(in + lane * kIn, results);
  store<kOut>(out + lane * kOut, results);
}

template <class S, int kSteps>
struct Mma {
  __device__ void operator()(const uint32_t* in, uint32_t* out) const {
    uint32_t a[2 * kSteps], b[kSteps];
    float c[4];
    for (int i = 0; i < 2 * kSteps; ++i) a[i] = in[i];
    for (int i = 0; i < kSteps; ++i) b[i] = in[4 + i];
    for (int i = 0; i < 4; ++i) c[i] = cnnops::same_bits<float>(in[6 + i]);
    mma<S>(c, a, b);
    for (int i = 0; i < 4; ++i) out[i] = cnnops::same_bits<uint32_t>(c[i]);
  }
};

/// A row of 16 bytes per lane.
template <int kCount, bool kTransposed>
struct LoadMatrix {
  __device__ void operator()(const uint32_t* in, uint32_t* out) const {
    uint32_t* rows = shared_memory<uint32_t>();
    store<4>(rows + lane() * 4, in);
    sync_warp();
    uint32_t registers[kCount];
    load_matrix<kCount, kTransposed>(registers, rows + lane() * 4);
    for (int i = 0; i < kCount; ++i) out[i] = registers[i];
  }
};

struct Shuffles {
  __device__ void operator()(const uint32_t* in, uint32_t* out) const {
    out[0] = shuffle(in[0], (lane() * 7 + 3) % kWarp);
    out[1] = shuffle_down(in[0], 5);
    out[2] = shuffle_xor(in[0], 9);
    out[3] = ballot(in[0] % 3 == 0);
    out[4] = any(lane() == 9) + 2 * all(lane() < kWarp) + 4 * any(lane() < 0) + 8 * all(lane() > 0);
    out[5] = cnnops::same_bits<uint32_t>(reduce_add(cnnops::same_bits<float>(in[1])));
    out[6] = static_cast<uint32_t>(shuffle(static_cast<int64_t>(in[0]) << 32, 31) >> 32);
  }
};

struct Roundings {
  __device__ void operator()(const uint32_t* in, uint32_t* out) const {
    const float first = cnnops::same_bits<float>(in[0]), second = cnnops::same_bits<float>(in[1]);
    out[0] = to_tf32(first).bits;
    out[1] = to_tf32(second).bits;
    out[2] = rounded_pair<Float16>(first, second);
    out[3] = rounded_pair<BFloat16>(first, second);
    out[4] = cnnops::same_bits<uint32_t>(value(half<Float16>(out[2], 1)));
  }
};

/// Copies of 4, 8 and 16 bytes, in part zeros. in[32] says how many bytes of the last are read.
struct CopyAsync {
  __device__ void operator()(const uint32_t* in, uint32_t* out) const {
    uint32_t* mine = shared_memory<uint32_t>() + lane() * 8;
    copy_async<4>(mine, in + 1, in[33]);
    commit_copies();
    copy_async<8>(mine + 2, in + 2);
    commit_copies();
    copy_async<16>(mine + 4, in + 4, in[32]);
    commit_copies();
    wait_copies<2>();
    out[0] = mine[0];
    wait_copies<1>();
    out[2] = mine[2];
    out[3] = mine[3];
    wait_copies<0>();
    for (int i = 4; i < 8; ++i) out[i] = mine[i];
  }
};

}  // namespace

void collectives(const std::string& name, const void* in, void* out) {
  const auto start = [&](const char* which, const auto& collective) {
    using Collective = std::decay_t<decltype(collective)>;
    if (name == which) {
      launch(which, one_warp_kernel<Collective>, 1, kWarp, kWarp * kOut * sizeof(uint32_t), nullptr, collective,
             static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out));
    }
  };
  start("mma_tf32_2", Mma<Tf32, 2>{});
  start("mma_tf32_1", Mma<Tf32, 1>{});
  start("mma_float16_2", Mma<Float16, 2>{});
  start("mma_float16_1", Mma<Float16, 1>{});
  start("mma_bfloat16_2", Mma<BFloat16, 2>{});
  start("mma_bfloat16_1", Mma<BFloat16, 1>{});
  start("ldmatrix_1", LoadMatrix<1, false>{});
  start("ldmatrix_2", LoadMatrix<2, false>{});
  start("ldmatrix_4", LoadMatrix<4, false>{});
  start("ldmatrix_1_trans", LoadMatrix<1, true>{});
  start("ldmatrix_2_trans", LoadMatrix<2, true>{});
  start("ldmatrix_4_trans", LoadMatrix<4, true>{});
  start("shuffles", Shuffles{});
  start("roundings", Roundings{});
  start("copy_async", CopyAsync{});
}

}  // namespace cnnops::cuda
