// Depthwise convolution of small contiguous images, one filter per channel.
//
// A plane of 7x7 pixels fills no vector along its rows, and to bring it to a buffer costs more than to compute with it.
// So some planes are turned round: in a buffer in the first- or second-level cache their channels stand side by side,
// as in channels_last, and there the kernel for that layout computes (conv2d_depthwise_channels_last.cpp). Its result
// is turned back.
//
// A task is the planes of a block of channels of one image (forward, grad_input), or a block of channels (grad_weight,
// which adds up the images' sums in order). Refuses what is not small, and in grad_weight 16-bit numbers, of which sums
// would be rounded for each image.
#include "channels_last.h"
#include "turn.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostPixels = 256, kGoodNumbers = 1 << 13;

/// Blocks of channels, as an image with so many channels of its own.
template <class S>
struct Block {
  static constexpr int64_t L = kLanes<Sum<S>>;
  int64_t in, out, size, count;

  explicit Block(const Conv2dGeometry& g) : in(g.in[0] * g.in[1]), out(g.out[0] * g.out[1]) {
    size = larger(L, kGoodNumbers / larger(1, larger(in, out)) / L * L);
    size = smaller(size, round_up(g.c, L));
    count = ceil_div(g.c, size);
  }
  Conv2dGeometry geometry(const Conv2dGeometry& g) const {
    Conv2dGeometry block = g;
    block.layout = block.filters = Layout::channels_last;
    block.n = 1;
    block.c = block.k = block.groups = size;
    return block;
  }
  int64_t room(int64_t pixels) const { return round_up(pixels * size, 64); }  // in numbers S
  int64_t buffers() const { return ceil_div((room(in) + room(out)) * sizeof(S), sizeof(Sum<S>)); }
};

template <class S>
const Conv2dAlgorithm<Conv2dRun<S>>& channels_last() {
  static const auto row = depthwise_channels_last<S>();
  return row;
}

/// A filter's weights and biases of the last block may be fewer than its channels: then it has copies, with zeros.
template <class S>
const S* padded(const S* from, int64_t some, int64_t all, S* copy) {
  if (some == all || from == nullptr) return from;
  for (int64_t i = 0; i < all; ++i) copy[i] = i < some ? from[i] : S{};
  return copy;
}

/// Where a task's scratch memory lies.
template <class S>
struct Memory {
  S *in, *out, *filters, *bias;
  Sum<S>* workspace;

  Memory(const Conv2dGeometry& g, const Block<S>& block, Sum<S>* memory)
      : in(reinterpret_cast<S*>(memory)), out(in + block.room(block.in)) {
    filters = reinterpret_cast<S*>(memory + round_up(block.buffers(), 64));
    bias = filters + round_up(block.size * g.kernel[0] * g.kernel[1], 64);
    workspace = memory + own(g, block);
  }
  static int64_t own(const Conv2dGeometry& g, const Block<S>& block) {
    return round_up(block.buffers(), 64) + round_up(block.size * (g.kernel[0] * g.kernel[1] + 2), 64) + 128;
  }
};

/// Tasks are numbered (n, block of channels).
template <class S, Conv2dRun<S> Conv2dAlgorithm<Conv2dRun<S>>::* pass, bool forward>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  const Block<S> block(g);
  const Conv2dGeometry image = block.geometry(g);
  const Memory<S> memory(g, block, workspace);
  const Conv2dRun<S>& run = channels_last<S>().*pass;
  const int64_t from = forward ? block.in : block.out, to = forward ? block.out : block.in;
  const int64_t filter = g.kernel[0] * g.kernel[1], tasks = run.tasks(image);
  S *const seen = forward ? memory.in : memory.out, *const made = forward ? memory.out : memory.in;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / block.count, c0 = task % block.count * block.size, some = smaller(block.size, g.c - c0);
    turn(o.a + (n * g.c + c0) * from, from, from, some, block.size, seen);
    Conv2dOperands<S> operands = o;
    operands.a = seen;
    operands.b = padded(o.b + c0 * filter, some * filter, block.size * filter, memory.filters);
    operands.bias = padded(o.bias ? o.bias + c0 : nullptr, some, block.size, memory.bias);
    operands.out = made;
    run.run(image, operands, memory.workspace, 0, tasks);
    turn_back(made, block.size, to, some, o.out + (n * g.c + c0) * to, to);
  }
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  const Block<S> block(g);
  const Conv2dGeometry image = block.geometry(g);
  const Memory<S> memory(g, block, workspace);
  const Conv2dRun<S>& run = channels_last<S>().grad_weight;
  const int64_t filter = g.kernel[0] * g.kernel[1], tasks = run.tasks(image);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t c0 = task * block.size, some = smaller(block.size, g.c - c0), numbers = some * filter;
    S* sums = o.out + c0 * filter;
    for (int64_t i = 0; i < numbers; ++i) sums[i] = S{};
    for (int64_t n = 0; n < g.n; ++n) {
      turn(o.a + (n * g.c + c0) * block.out, block.out, block.out, some, block.size, memory.out);
      turn(o.b + (n * g.c + c0) * block.in, block.in, block.in, some, block.size, memory.in);
      Conv2dOperands<S> operands = o;
      operands.a = memory.out;
      operands.b = memory.in;
      operands.out = memory.filters;
      run.run(image, operands, memory.workspace, 0, tasks);
      for (int64_t i = 0; i < numbers; ++i) sums[i] = rounded<S>(value(sums[i]) + value(memory.filters[i]));
    }
  }
}

const char* refuses_all_but_small(const Conv2dGeometry& g) {
  if (g.layout != Layout::contiguous || g.c != g.groups || g.k != g.groups)
    return "it takes planes with one filter each";
  if (larger(g.in[0] * g.in[1], g.out[0] * g.out[1]) > kMostPixels) return "its images are large";
  return nullptr;
}

template <class S, Conv2dRun<S> Conv2dAlgorithm<Conv2dRun<S>>::* pass>
int64_t workspace_of(const Conv2dGeometry& g) {
  const Block<S> block(g);
  return Memory<S>::own(g, block) + (channels_last<S>().*pass).workspace(block.geometry(g));
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_small() {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;
  const auto tasks = [](const Conv2dGeometry& g) { return g.n * Block<S>(g).count; };
  return {
      "depthwise",
      "",
      [](const Conv2dGeometry& g, Pass pass) {
        const bool rounds = pass == Pass::grad_weight && !std::is_same_v<S, Sum<S>>;
        return rounds ? "it would round the sums of each image" : refuses_all_but_small(g);
      },
      {tasks, workspace_of<S, &Row::forward>, correlate<S, &Row::forward, true>},
      {tasks, workspace_of<S, &Row::grad_input>, correlate<S, &Row::grad_input, false>},
      {[](const Conv2dGeometry& g) { return Block<S>(g).count; }, workspace_of<S, &Row::grad_weight>, grad_weight<S>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> depthwise_small();
template Conv2dAlgorithm<Conv2dRun<double>> depthwise_small();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> depthwise_small();
template Conv2dAlgorithm<Conv2dRun<Float16>> depthwise_small();

}  // namespace cnnops::cpu::CNNOPS_ISA
