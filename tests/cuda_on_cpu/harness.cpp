// The CUDA kernels of csrc/cuda, emulated, as a library for test_cuda_on_cpu.py: every kernel is called by its name.
#include <cstring>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace cnnops::cuda {
namespace {

/// A call's arguments, in the order of the launcher's: its integers, its pointers, and the slope of leaky_relu.
struct Arguments {
  const int64_t* integers;
  void* const* pointers;
  double slope;

  template <class T>
  T* pointer(int i) const {
    return static_cast<T*>(pointers[i]);
  }
};

/// integers: n, c, k, groups, then pairs: in, out, kernel, stride, padding, dilation. pointers: a, b, bias, out.
template <class T>
void conv2d(const std::string& algorithm, Pass pass, const Arguments& in) {
  const int64_t* i = in.integers;
  const Conv2dGeometry g{i[0],         i[1],         i[2],           i[3],           {i[4], i[5]},
                         {i[6], i[7]}, {i[8], i[9]}, {i[10], i[11]}, {i[12], i[13]}, {i[14], i[15]}};
  const auto choice = choose(kernels<T>().conv2d, g, pass, algorithm.c_str());
  if (!choice.row) throw std::runtime_error(choice.refusal ? choice.refusal : "no such algorithm");
  const auto& run = choice.row->run(pass);
  std::unique_ptr<T[]> workspace(new T[static_cast<std::size_t>(run.workspace(g))]);
  std::memset(static_cast<void*>(workspace.get()), 0xff, static_cast<std::size_t>(run.workspace(g)) * sizeof(T));
  run.run(g, {in.pointer<T>(0), in.pointer<T>(1), in.pointer<T>(2), in.pointer<T>(3)}, workspace.get(), nullptr);
}

/// integers: n, c, then pairs: in, out, kernel, stride, padding, dilation; for averages count_include_pad, override.
Pool2dGeometry pool2d_geometry(const int64_t* i) {
  return {i[0], i[1], {i[2], i[3]}, {i[4], i[5]}, {i[6], i[7]}, {i[8], i[9]}, {i[10], i[11]}, {i[12], i[13]}};
}

template <class T, class Position>
void max_pool2d(const typename Kernels<T>::template MaxPool2d<Position>& kernels, const std::string& which,
                const Arguments& in) {
  const Pool2dGeometry g = pool2d_geometry(in.integers);
  if (which == "forward") kernels.forward(g, in.pointer<T>(0), in.pointer<T>(2), in.pointer<Position>(1), nullptr);
  if (which == "backward") kernels.backward(g, in.pointer<T>(0), in.pointer<Position>(1), in.pointer<T>(2), nullptr);
  if (which == "gather") kernels.gather(g, in.pointer<T>(0), in.pointer<Position>(1), in.pointer<T>(2), nullptr);
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
template <class T>
void call(const std::string& name, const Arguments& in) {
  const auto& k = kernels<T>();
  const std::string family = name.substr(0, name.find('/')),
                    member = name.substr(std::min(name.size(), family.size() + 1));
  const int64_t* i = in.integers;
  const auto p = [&](int number) { return in.pointer<T>(number); };
  const T slope = static_cast<T>(in.slope);
  if (family == "conv2d") {
    const std::string pass = member.substr(0, member.find('/')), algorithm = member.substr(pass.size() + 1);
    return conv2d<T>(algorithm,
                     pass == "forward"      ? Pass::forward
                     : pass == "grad_input" ? Pass::grad_input
                                            : Pass::grad_weight,
                     in);
  }
  if (family == "max_pool2d") return max_pool2d<T, uint8_t>(k.max_pool2d, member, in);
  if (family == "max_pool2d_wide") return max_pool2d<T, int32_t>(k.max_pool2d_wide, member, in);
  if (family == "planted") return planted<T>(member, in);
  const Divisor divisor{i[14] != 0, i[15]};
  if (name == "avg_pool2d") return k.avg_pool2d(pool2d_geometry(i), divisor, p(0), p(1), nullptr);
  if (name == "avg_pool2d_backward") return k.avg_pool2d_backward(pool2d_geometry(i), divisor, p(0), p(1), nullptr);
  if (name == "relu") return k.relu(p(0), p(1), i[0], nullptr);
  if (name == "relu_backward") return k.relu_backward(p(0), p(1), p(2), i[0], nullptr);
  if (name == "leaky_relu") return k.leaky_relu(p(0), slope, p(1), i[0], nullptr);
  if (name == "leaky_relu_backward") return k.leaky_relu_backward(p(0), p(1), slope, p(2), i[0], nullptr);
  if (name == "prelu") return k.prelu(p(0), p(1), i[0], i[1], p(2), i[2], nullptr);
  if (name == "prelu_backward") return k.prelu_backward(p(0), p(1), p(2), i[0], i[1], p(3), i[2], nullptr);
  if (name == "channel_sum") return k.channel_sum(p(0), i[0], i[1], i[2], p(1), nullptr);
  if (name == "prelu_grad_weight") return k.prelu_grad_weight(p(0), p(1), i[0], i[1], i[2], p(2), nullptr);
  throw std::runtime_error("no kernel is called " + name);
}

}  // namespace
}  // namespace cnnops::cuda

extern "C" {

/// Returns nullptr, or what went wrong. `integers` holds at least 16 numbers.
const char* cnnops_call(const char* name, int is_double, const int64_t* integers, void* const* pointers, double slope) {
  static std::string error;
  try {
    const cnnops::cuda::Arguments arguments{integers, pointers, slope};
    if (is_double) {
      cnnops::cuda::call<double>(name, arguments);
    } else {
      cnnops::cuda::call<float>(name, arguments);
    }
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
  const cnnops::Conv2dGeometry g{i[0],         i[1],         i[2],           i[3],           {i[4], i[5]},
                                 {i[6], i[7]}, {i[8], i[9]}, {i[10], i[11]}, {i[12], i[13]}, {i[14], i[15]}};
  return cnnops::cuda::kernels<float>().conv2d.rows[number].run(static_cast<cnnops::Pass>(pass)).workspace(g);
}
}
