// The CUDA kernels of csrc/cuda, emulated, as a library for test_cuda_on_cpu.py: every kernel is called by its name.
#include <cstring>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace cnnops::cuda {
namespace {

/// A call's arguments, in the order of the launcher's: its integers, its pointers, and its real numbers, which are the
/// slope of leaky_relu and the bounds of hardtanh.
struct Arguments {
  const int64_t* integers;
  void* const* pointers;
  const double* reals;

  template <class S>
  S* pointer(int i) const {
    return static_cast<S*>(pointers[i]);
  }
};

/// Calls a launcher, if there is one for this type of number.
template <class... Parameters, class... Given>
void start(void (*launcher)(Parameters...), const Given&... arguments) {
  if (!launcher) throw std::runtime_error("there is no such kernel for this type of number");
  launcher(arguments..., nullptr);
}

/// integers: n, c, k, groups, then pairs: in, out, kernel, stride, padding, dilation; then layout, border.
Conv2dGeometry conv2d_geometry(const int64_t* i) {
  return {i[0],
          i[1],
          i[2],
          i[3],
          {i[4], i[5]},
          {i[6], i[7]},
          {i[8], i[9]},
          {i[10], i[11]},
          {i[12], i[13]},
          {i[14], i[15]},
          static_cast<Layout>(i[16]),
          static_cast<Border>(i[17])};
}

/// pointers: a, b, bias, out.
template <class S>
void conv2d(const std::string& algorithm, Pass pass, const Arguments& in) {
  const Conv2dGeometry g = conv2d_geometry(in.integers);
  const auto choice = choose(kernels<S>().conv2d, g, pass, algorithm.c_str());
  if (!choice.row) throw std::runtime_error(choice.refusal ? choice.refusal : "no such algorithm");
  const auto& run = choice.row->run(pass);
  const std::size_t size = static_cast<std::size_t>(run.workspace(g));
  std::unique_ptr<Sum<S>[]> workspace(new Sum<S>[size]);
  std::memset(static_cast<void*>(workspace.get()), 0xff, size * sizeof(Sum<S>));
  run.run(g, {in.pointer<S>(0), in.pointer<S>(1), in.pointer<S>(2), in.pointer<S>(3)}, workspace.get(), nullptr);
}

/// integers: n, c, then pairs: in, out, kernel, stride, padding, dilation; then layout, adaptive, and for averages
/// count_include_pad, divisor_override.
Pool2dGeometry pool2d_geometry(const int64_t* i) {
  return {i[0],           i[1],           {i[2], i[3]},
          {i[4], i[5]},   {i[6], i[7]},   {i[8], i[9]},
          {i[10], i[11]}, {i[12], i[13]}, static_cast<Layout>(i[14]),
          i[15] != 0};
}

template <class S, class Position>
void max_pool2d(const typename Kernels<S>::template MaxPool2d<Position>& kernels, const std::string& which,
                const Arguments& in) {
  const Pool2dGeometry g = pool2d_geometry(in.integers);
  if (which == "forward") start(kernels.forward, g, in.pointer<S>(0), in.pointer<S>(2), in.pointer<Position>(1));
  if (which == "backward") start(kernels.backward, g, in.pointer<S>(0), in.pointer<Position>(1), in.pointer<S>(2));
  if (which == "gather") start(kernels.gather, g, in.pointer<S>(0), in.pointer<Position>(1), in.pointer<S>(2));
}

/// integers: n, c, in, out, layout.
template <class S>
void max_unpool2d(const Arguments& in) {
  const int64_t* i = in.integers;
  const Unpool2dGeometry g{i[0], i[1], i[2], i[3], static_cast<Layout>(i[4])};
  std::vector<int64_t> workspace(static_cast<std::size_t>(g.n * g.c * g.out), 0x7777777777777777);
  start(kernels<S>().max_unpool2d, g, in.pointer<S>(0), in.pointer<int64_t>(1), workspace.data(), in.pointer<S>(2));
}

// Kernels with mistakes in them, to see that they are found.

/// out = in reversed, by way of shared memory, without the barrier in between if `forgetful`.
template <class T>
__global__ void reverse_kernel(int size, bool forgetful, const T* in, T* out) {
  T* shared = shared_memory<T>();
  const int i = threadIdx.x;
  shared[i] = in[i];
  if (!forgetful) sync_block();
  out[i] = shared[size - 1 - i];
}

/// out[i] = in[size-1 - i] + in[0 + size-1 - i], in two rounds, without the barrier between them if `forgetful`.
template <class T>
__global__ void two_rounds_kernel(int size, bool forgetful, const T* in, T* out) {
  T* shared = shared_memory<T>();
  const int i = threadIdx.x;
  T sum = 0;
  for (int round = 1; round <= 2; ++round) {
    shared[i] = round * in[i];
    sync_block();
    sum += shared[size - 1 - i];
    if (!forgetful) sync_block();
  }
  out[i] = sum;
}

template <class T>
__global__ void early_return_kernel(int size, bool forgetful, const T* in, T* out) {
  const int i = threadIdx.x;
  if (forgetful && i == size - 1) return;
  sync_block();
  out[i] = in[i];
}

template <class T>
__global__ void two_barriers_kernel(int, bool forgetful, const T* in, T* out) {
  const int i = threadIdx.x;
  if (forgetful && i == 3) {
    sync_block();
  } else {
    sync_block();
  }
  out[i] = in[i];
}

/// integers: size, forgetful.
template <class T>
void planted(const std::string& name, const Arguments& in) {
  const auto kernel = name == "reverse"        ? reverse_kernel<T>
                      : name == "two_rounds"   ? two_rounds_kernel<T>
                      : name == "early_return" ? early_return_kernel<T>
                                               : two_barriers_kernel<T>;
  const int size = static_cast<int>(in.integers[0]);
  launch(name.c_str(), kernel, 1, size, size * sizeof(T), nullptr, size, in.integers[1] != 0, in.pointer<const T>(0),
         in.pointer<T>(1));
}

/// `name` is family/member, as in conv2d/grad_input/direct, max_pool2d/forward, relu.
template <class S>
void call(const std::string& name, const Arguments& in) {
  const auto& k = kernels<S>();
  const std::string family = name.substr(0, name.find('/')),
                    member = name.substr(std::min(name.size(), family.size() + 1));
  const int64_t* i = in.integers;
  const auto p = [&](int number) { return in.pointer<S>(number); };
  const Sum<S> low = static_cast<Sum<S>>(in.reals[0]), high = static_cast<Sum<S>>(in.reals[1]);
  if (family == "conv2d") {
    const std::string pass = member.substr(0, member.find('/')), algorithm = member.substr(pass.size() + 1);
    return conv2d<S>(algorithm,
                     pass == "forward"      ? Pass::forward
                     : pass == "grad_input" ? Pass::grad_input
                                            : Pass::grad_weight,
                     in);
  }
  if (name == "fold_border") return start(k.fold_border, conv2d_geometry(i), p(0), p(1));
  if (family == "max_pool2d") return max_pool2d<S, uint8_t>(k.max_pool2d, member, in);
  if (family == "max_pool2d_wide") return max_pool2d<S, int32_t>(k.max_pool2d_wide, member, in);
  if (name == "max_unpool2d") return max_unpool2d<S>(in);
  if constexpr (std::is_floating_point_v<S>) {
    if (family == "planted") return planted<S>(member, in);
  }
  const Divisor divisor{i[16] != 0, i[17]};
  if (name == "avg_pool2d") return start(k.avg_pool2d, pool2d_geometry(i), divisor, p(0), p(1));
  if (name == "avg_pool2d_backward") return start(k.avg_pool2d_backward, pool2d_geometry(i), divisor, p(0), p(1));
  if (name == "relu") return start(k.relu, p(0), p(1), i[0]);
  if (name == "relu_backward") return start(k.relu_backward, p(0), p(1), p(2), i[0]);
  if (name == "hardtanh") return start(k.hardtanh, p(0), low, high, p(1), i[0]);
  if (name == "hardtanh_backward") return start(k.hardtanh_backward, p(0), p(1), low, high, p(2), i[0]);
  if (name == "leaky_relu") return start(k.leaky_relu, p(0), low, p(1), i[0]);
  if (name == "leaky_relu_backward") return start(k.leaky_relu_backward, p(0), p(1), low, p(2), i[0]);
  if (name == "prelu") return start(k.prelu, p(0), p(1), i[0], i[1], p(2), i[2]);
  if (name == "prelu_backward") return start(k.prelu_backward, p(0), p(1), p(2), i[0], i[1], p(3), i[2]);
  if (name == "channel_sum") return start(k.channel_sum, p(0), i[0], i[1], i[2], p(1));
  if (name == "prelu_grad_weight") return start(k.prelu_grad_weight, p(0), p(1), i[0], i[1], i[2], p(2));
  throw std::runtime_error("no kernel is called " + name);
}

/// call() for each type of number.
template <class... S>
struct Calls {
  static constexpr void (*all[])(const std::string&, const Arguments&) = {call<S>...};
};

}  // namespace
}  // namespace cnnops::cuda

extern "C" {

/// Returns nullptr, or what went wrong. `type` counts ForNumbers; `integers` holds at least 18 numbers, `reals` 2.
const char* cnnops_call(const char* name, int type, const int64_t* integers, void* const* pointers,
                        const double* reals) {
  static std::string error;
  try {
    cnnops::ForNumbers<cnnops::cuda::Calls>::all[type](name, {integers, pointers, reals});
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

/// How kernels run from now on; order 0, 1, 2 is forward, reverse, shuffled.
void cnnops_settings(int order, int64_t grid_limit, int64_t index_limit) {
  emulation::settings = {static_cast<emulation::Order>(order), grid_limit, index_limit};
}

/// The names of the convolution's algorithms, in the order of the table; nullptr after the last.
const char* cnnops_algorithm(int number) {
  const auto& table = cnnops::cuda::kernels<float>().conv2d;
  return number < table.size ? table.rows[number].name : nullptr;
}

/// Elements of scratch that an algorithm wants, and the integers are those of conv2d.
int64_t cnnops_workspace(int number, int pass, const int64_t* i) {
  const cnnops::Conv2dGeometry g = cnnops::cuda::conv2d_geometry(i);
  return cnnops::cuda::kernels<float>().conv2d.rows[number].run(static_cast<cnnops::Pass>(pass)).workspace(g);
}
}
