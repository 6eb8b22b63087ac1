// The CUDA kernels of csrc/cuda, emulated, as a process: reads calls from its input, runs each, writes the results. A mistake
// that the emulation or a sanitizer finds in a kernel is printed, and ends it. emulated.py is the other end.
#include <algorithm>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "samples.h"

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

/// integers: n, c, k, groups, then pairs: in, out, kernel, stride, padding, dilation; then layout, border; and for the
/// operands, whether TF32 is allowed.
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
          static_cast<Layout>(i[16]),  // of the filters, too
          static_cast<Border>(i[17])};
}

/// pointers: a, b, bias, out.
template <class S>
Conv2dOperands<S> conv2d_operands(const Arguments& in) {
  return {in.pointer<S>(0), in.pointer<S>(1), in.pointer<S>(2), in.pointer<S>(3), in.integers[18] != 0};
}

/// Calls start(run, geometry, workspace) for the run of an algorithm, if that accepts.
template <class S, class Start>
void with_algorithm(const std::string& algorithm, Pass pass, const Arguments& in, const Start& start) {
  const Conv2dGeometry g = conv2d_geometry(in.integers);
  const auto choice = choose(kernels<S>().conv2d, g, pass, algorithm.c_str());
  if (!choice.row) throw std::runtime_error(choice.refusal ? choice.refusal : "no such algorithm");
  const auto& run = choice.row->run(pass);
  const std::size_t size = static_cast<std::size_t>(run.workspace(g));
  const emulation::Guarded workspace("the workspace", size * sizeof(Sum<S>));
  start(run, g, static_cast<Sum<S>*>(workspace.data()));
  workspace.check();
}

template <class S>
void conv2d(const std::string& algorithm, Pass pass, const Arguments& in) {
  with_algorithm<S>(algorithm, pass, in, [&](const Conv2dRun<S>& run, const Conv2dGeometry& g, Sum<S>* workspace) {
    run.run(g, conv2d_operands<S>(in), workspace, nullptr);
  });
}

/// `activation` is one of none, relu, relu6 and leaky_relu, whose slope is the first real number.
template <class S>
Epilogue<S> epilogue(const Arguments& in, int64_t activation, uint8_t* positions) {
  Epilogue<S> epilogue;
  if (activation == 1 || activation == 2) epilogue.low = 0;
  if (activation == 2) epilogue.high = 6;
  if (activation == 3) epilogue.slope = static_cast<Sum<S>>(in.reals[0]);
  epilogue.positions = positions;
  return epilogue;
}

/// Further integers: the activation; whether it pools. pointers: a, b, bias, out, positions.
template <class S>
void conv_block(const std::string& algorithm, const Arguments& in) {
  with_algorithm<S>(
      algorithm, Pass::forward, in, [&](const Conv2dRun<S>& run, const Conv2dGeometry& g, Sum<S>* workspace) {
        start(run.fused, g, conv2d_operands<S>(in),
              epilogue<S>(in, in.integers[19], in.integers[20] ? in.pointer<uint8_t>(4) : nullptr), workspace);
      });
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
  const emulation::Guarded workspace("the workspace", static_cast<std::size_t>(g.n * g.c * g.out) * sizeof(int64_t));
  start(kernels<S>().max_unpool2d, g, in.pointer<S>(0), in.pointer<int64_t>(1), static_cast<int64_t*>(workspace.data()),
        in.pointer<S>(2));
  workspace.check();
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
  if (family == "conv_block") return conv_block<S>(member, in);
  if (name == "fold_border") return start(k.fold_border, conv2d_geometry(i), p(0), p(1));
  if (name == "epilogue_backward") {
    const auto of = epilogue<S>(in, i[16], in.pointer<uint8_t>(2));
    return start(k.epilogue_backward, pool2d_geometry(i), of, p(0), p(1), p(3));
  }
  if (family == "max_pool2d") return max_pool2d<S, uint8_t>(k.max_pool2d, member, in);
  if (family == "max_pool2d_wide") return max_pool2d<S, int32_t>(k.max_pool2d_wide, member, in);
  if (name == "max_unpool2d") return max_unpool2d<S>(in);
  if constexpr (std::is_same_v<S, float>) {
    if (family == "fault") return fault(member, i[0], i[1] != 0, p(0), p(1));
    if (family == "collectives") return collectives(member, p(0), p(1));
  }
  if constexpr (kReal<S> && sizeof(S) <= 4) {
    const Gemm sizes{i[0], i[1], i[2], i[3], i[4], i[5] != 0, static_cast<int>(i[6])};
    if (name == "gemm") return gemm<S>(sizes, p(0), p(1), in.pointer<float>(2), nullptr);
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

/// A call as it comes: a line of words, with the count before each list, then the inputs' bytes.
struct Call {
  std::string name;
  int type = 0;
  std::vector<int64_t> integers, inputs, outputs;  // an operand's size in bytes; -1 where there is none
  std::vector<int64_t>
      offsets;  // of inputs, then outputs: how many bytes from an aligned place they begin, 0 if not said
  std::vector<double> reals;
  bool in_place = false;  // the output is the first input
  int poison = 0;         // that outputs are filled with

  template <class T>
  static void read(std::vector<T>& list) {
    std::size_t size = 0;
    std::cin >> size;
    list.resize(size);
    for (T& x : list) std::cin >> x;
  }

  bool read() {
    auto& settings = emulation::settings;
    int order = 0, copies = 0;
    std::cin >> name >> type >> order >> copies >> settings.grid_limit >> settings.index_limit >>
        settings.architecture >> poison >> in_place;
    settings.order = static_cast<emulation::Order>(order);
    settings.copies = static_cast<emulation::Copies>(copies);
    read(integers);
    read(reals);
    read(inputs);
    read(outputs);
    read(offsets);
    offsets.resize(inputs.size() + outputs.size());
    integers.resize(std::max<std::size_t>(integers.size(), 21));
    reals.resize(2);
    return std::cin.get() == '\n';
  }

  /// Writes "ok" and whether cp.async was used, then the outputs' bytes; or "error" and why not.
  void run() {
    std::vector<std::unique_ptr<emulation::Guarded>> operands;
    std::vector<void*> pointers;
    std::vector<std::string> given;
    const auto add = [&](const char* what, std::size_t number, int64_t size, int filled) {
      if (size < 0) return pointers.push_back(nullptr);
      operands.push_back(std::make_unique<emulation::Guarded>(what + std::to_string(number),
                                                              static_cast<std::size_t>(size), filled,
                                                              static_cast<std::size_t>(offsets[pointers.size()])));
      pointers.push_back(operands.back()->data());
    };
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      add("input ", i, inputs[i], 0);
      given.emplace_back(static_cast<std::size_t>(std::max<int64_t>(inputs[i], 0)), '\0');
      std::cin.read(given[i].data(), static_cast<std::streamsize>(given[i].size()));
      if (pointers[i]) std::memcpy(pointers[i], given[i].data(), given[i].size());
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) add("output ", i, outputs[i], poison);
    const std::size_t first_output = in_place ? 0 : inputs.size();
    if (in_place) pointers.push_back(pointers[0]);

    emulation::copies_seen = false;
    try {
      ForNumbers<Calls>::all[type](name, {integers.data(), pointers.data(), reals.data()});
    } catch (const std::exception& caught) {
      std::cout << "error " << caught.what() << std::endl;
      return;
    }
    for (const auto& operand : operands) operand->check();
    for (std::size_t i = in_place; i < inputs.size(); ++i) {
      if (pointers[i] && std::memcmp(pointers[i], given[i].data(), given[i].size())) {
        emulation::fail("wrote to input " + std::to_string(i));
      }
    }
    std::cout << "ok " << emulation::copies_seen << '\n';
    if (in_place) outputs = {inputs[0]};
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      std::cout.write(static_cast<const char*>(pointers[first_output + i]), outputs[i]);
    }
    std::cout.flush();
  }
};

/// What a call named "algorithms" answers: a name per algorithm of the convolution; "workspace": the elements of scratch
/// that algorithm number `type` wants for a pass, the last of the integers, and a geometry, the others.
bool answer(const Call& call) {
  const auto& table = kernels<float>().conv2d;
  if (call.name == "algorithms") {
    for (int i = 0; i < table.size; ++i) std::cout << table.rows[i].name << ' ';
  } else if (call.name == "workspace") {
    const auto pass = static_cast<Pass>(call.integers.back());
    std::cout << table.rows[call.type].run(pass).workspace(conv2d_geometry(call.integers.data()));
  } else {
    return false;
  }
  std::cout << std::endl;
  return true;
}

}  // namespace
}  // namespace cnnops::cuda

int main() {
  std::ios::sync_with_stdio(false);
  for (cnnops::cuda::Call call; call.read();) {
    if (!cnnops::cuda::answer(call)) call.run();
  }
}
