// Fast entries for cnnops.functional: the operators, called with torch's own parser of Python arguments.
//
// torch.ops.cnnops takes 2.6 microseconds to call an operator that does nothing, which is more than all of
// torch.nn.functional.max_pool2d takes on a small tensor; this parser, which torch's built-in functions use, takes one.
// It also honours __torch_function__, so subclasses, modes and torch.fx see cnnops.functional's functions as they see
// torch's. torch.compile cannot look into C++: there cnnops.functional calls the operators themselves.
#define USE_NUMPY        // torch's parser takes numpy's integers: its inline parts have to know
#define FMT_HEADER_ONLY  // torch's parser formats its errors with a library that torch does not share
#include "functional.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include "operators.h"

namespace cnnops {
namespace {

namespace py = pybind11;
using at::IntArrayRef;
using at::Tensor;
using torch::PythonArgs;

/// What cnnops.functional's function of this name would do with arguments that override it.
PyObject* overridden(PythonArgs& r, PyObject* args, PyObject* kwargs) {
  const py::object function = py::module_::import("cnnops.functional").attr(r.get_func_name().c_str());
  py::list relevant;
  for (PyObject* argument : r.overloaded_args) relevant.append(py::reinterpret_borrow<py::object>(argument));
  const auto handle = py::module_::import("torch.overrides").attr("handle_torch_function");
  const auto names = kwargs ? py::reinterpret_borrow<py::dict>(kwargs) : py::dict();
  return handle(function, relevant, *py::reinterpret_borrow<py::tuple>(args), **names).release().ptr();
}

/// One entry: its signature, and a function from parsed arguments to a tensor.
template <int count, class Run>
PyObject* call(torch::PythonArgParser& parser, PyObject* args, PyObject* kwargs, const Run& run) {
  HANDLE_TH_ERRORS
  torch::ParsedArgs<count> parsed;
  PythonArgs r = parser.parse(args, kwargs, parsed);
  if (r.has_torch_function()) return overridden(r, args, kwargs);
  return THPVariable_Wrap(run(r));
  END_HANDLE_TH_ERRORS
}

/// Stands for the operators' default.
const std::vector<int64_t> kNone;

/// Runs an operator without Python's lock.
template <class Signature, class... Arguments>
auto unlocked(const c10::TypedOperatorHandle<Signature>& op, Arguments&&... arguments) {
  const py::gil_scoped_release unlock;
  return op.call(std::forward<Arguments>(arguments)...);
}

PyObject* conv2d(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser(
      {"conv2d(Tensor input, Tensor weight, Tensor? bias, IntArrayRef[2] stride, IntArrayRef[2] padding, "
       "IntArrayRef[2] dilation, int64_t groups, std::string padding_mode, std::string algorithm)"});
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, IntArrayRef, IntArrayRef, IntArrayRef,
                           int64_t, std::string_view, std::string_view)>("cnnops::conv2d");
  return call<9>(parser, args, kwargs, [](PythonArgs& r) {
    const std::string padding_mode = r.string(7), algorithm = r.string(8);
    return unlocked(op, r.tensor(0), r.tensor(1), r.optionalTensor(2), r.intlist(3), r.intlist(4), r.intlist(5),
                    r.toInt64(6), padding_mode, algorithm);
  });
}

PyObject* conv_transpose2d(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser(
      {"conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, IntArrayRef[2] stride, IntArrayRef[2] padding, "
       "SymIntArrayRef[2] output_padding, int64_t groups, IntArrayRef[2] dilation, std::string algorithm)"});
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, IntArrayRef, IntArrayRef,
                           c10::SymIntArrayRef, int64_t, IntArrayRef, std::string_view)>("cnnops::conv_transpose2d");
  return call<9>(parser, args, kwargs, [](PythonArgs& r) {
    const std::string algorithm = r.string(8);
    return unlocked(op, r.tensor(0), r.tensor(1), r.optionalTensor(2), r.intlist(3), r.intlist(4), r.symintlist(5),
                    r.toInt64(6), r.intlist(7), algorithm);
  });
}

PyObject* max_pool2d(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser(
      {"max_pool2d(Tensor input, IntArrayRef[2] kernel_size, IntArrayRef[2]? stride, IntArrayRef[2] padding, "
       "IntArrayRef[2] dilation, bool ceil_mode)"});
  static const auto op = find_operator<std::tuple<Tensor, Tensor>(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef,
                                                                  IntArrayRef, bool)>("cnnops::max_pool2d");
  return call<6>(parser, args, kwargs, [](PythonArgs& r) {
    return std::get<0>(unlocked(op, r.tensor(0), r.intlist(1), r.intlistOptional(2).list.value_or(kNone), r.intlist(3),
                                r.intlist(4), r.toBool(5)));
  });
}

PyObject* avg_pool2d(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser(
      {"avg_pool2d(Tensor input, IntArrayRef[2] kernel_size, IntArrayRef[2]? stride, IntArrayRef[2] padding, "
       "bool ceil_mode, bool count_include_pad, int64_t? divisor_override)"});
  static const auto op =
      find_operator<Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool, bool, std::optional<int64_t>)>(
          "cnnops::avg_pool2d");
  return call<7>(parser, args, kwargs, [](PythonArgs& r) {
    return unlocked(op, r.tensor(0), r.intlist(1), r.intlistOptional(2).list.value_or(kNone), r.intlist(3), r.toBool(4),
                    r.toBool(5), r.toInt64Optional(6));
  });
}

PyObject* adaptive_avg_pool2d(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser({"adaptive_avg_pool2d(Tensor input, SymIntArrayRef[2] output_size)"});
  static const auto op = find_operator<Tensor(const Tensor&, c10::SymIntArrayRef)>("cnnops::adaptive_avg_pool2d");
  return call<2>(parser, args, kwargs, [](PythonArgs& r) { return unlocked(op, r.tensor(0), r.symintlist(1)); });
}

PyObject* relu(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser({"relu(Tensor input, bool inplace)"});
  static const auto op = find_operator<Tensor(const Tensor&)>("cnnops::relu");
  static const auto op_in_place = find_operator<Tensor&(Tensor&)>("cnnops::relu_");
  return call<2>(parser, args, kwargs, [](PythonArgs& r) -> Tensor {
    Tensor input = r.tensor(0);
    return r.toBool(1) ? unlocked(op_in_place, input) : unlocked(op, input);
  });
}

PyObject* hardtanh(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser({"hardtanh(Tensor input, double min_val, double max_val, bool inplace)"});
  static const auto op = find_operator<Tensor(const Tensor&, double, double)>("cnnops::hardtanh");
  static const auto op_in_place = find_operator<Tensor&(Tensor&, double, double)>("cnnops::hardtanh_");
  return call<4>(parser, args, kwargs, [](PythonArgs& r) -> Tensor {
    Tensor input = r.tensor(0);
    return r.toBool(3) ? unlocked(op_in_place, input, r.toDouble(1), r.toDouble(2))
                       : unlocked(op, input, r.toDouble(1), r.toDouble(2));
  });
}

PyObject* leaky_relu(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser({"leaky_relu(Tensor input, double negative_slope, bool inplace)"});
  static const auto op = find_operator<Tensor(const Tensor&, double)>("cnnops::leaky_relu");
  static const auto op_in_place = find_operator<Tensor&(Tensor&, double)>("cnnops::leaky_relu_");
  return call<3>(parser, args, kwargs, [](PythonArgs& r) -> Tensor {
    Tensor input = r.tensor(0);
    return r.toBool(2) ? unlocked(op_in_place, input, r.toDouble(1)) : unlocked(op, input, r.toDouble(1));
  });
}

PyObject* prelu(PyObject*, PyObject* args, PyObject* kwargs) {
  static torch::PythonArgParser parser({"prelu(Tensor input, Tensor weight)"});
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&)>("cnnops::prelu");
  return call<2>(parser, args, kwargs, [](PythonArgs& r) { return unlocked(op, r.tensor(0), r.tensor(1)); });
}

template <class Function>
PyMethodDef method(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_VARARGS | METH_KEYWORDS,
          nullptr};
}

}  // namespace

void add_functional(pybind11::module_& module) {
  static PyMethodDef methods[] = {
      method("conv2d", conv2d),
      method("conv_transpose2d", conv_transpose2d),
      method("max_pool2d", max_pool2d),
      method("avg_pool2d", avg_pool2d),
      method("adaptive_avg_pool2d", adaptive_avg_pool2d),
      method("relu", relu),
      method("hardtanh", hardtanh),
      method("leaky_relu", leaky_relu),
      method("prelu", prelu),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace cnnops
