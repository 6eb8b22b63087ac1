// ReLU and its relatives without parameters, from arguments to kernels; plain and in place (names that end in _).
//
// Their backward needs only the output (is it above zero? between the limits?), so a chain conv -> ReLU -> conv keeps
// one tensor, not two. They work on tensors of any shape; elements are visited in the order they lie in memory.
//
// Each activation is a Rule: its names, its numbers, and which kernels it runs. The rest is written once for all.
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/MemoryOverlap.h>

#include <limits>

#include "autograd.h"
#include "checks.h"
#include "numbers.h"
#include "operators.h"
#include "run.h"

namespace cnnops {
namespace {

struct Relu {
  static constexpr const char *name = "relu", *backward_name = "relu_backward";
  static constexpr Numbers numbers = Numbers::real_and_integers;

  void check(const Tensor&) const {}
  template <class S, class Kernels, class Call>
  void forward(const Kernels& k, const Call& call, const S* x, S* y) const {
    call(k.relu, x, y);
  }
  template <class S, class Kernels, class Call>
  void backward(const Kernels& k, const Call& call, const S* gy, const S* y, S* gx) const {
    call(k.relu_backward, gy, y, gx);
  }
  bool keeps_output() const { return true; }
};

struct Hardtanh {
  static constexpr const char *name = "hardtanh", *backward_name = "hardtanh_backward";
  static constexpr Numbers numbers = Numbers::real_and_integers;
  double low, high;

  void check(const Tensor& input) const {
    TORCH_CHECK_VALUE(low <= high, "hardtanh: min_val cannot be greater than max_val, but got ", low, " and ", high);
    with_number(input.scalar_type(), [&](auto number) {
      using S = decltype(number);
      if constexpr (!kReal<S>) {
        TORCH_CHECK(low <= double(std::numeric_limits<S>::max()) && high >= double(std::numeric_limits<S>::min()),
                    "hardtanh: no ", input.scalar_type(), " lies between min_val=", low, " and max_val=", high);
      }
    });
  }
  /// A limit as a number of this type: integers are cut towards zero, and end where their type does.
  template <class S>
  static Sum<S> limit(double value) {
    if constexpr (kReal<S>) {
      return Sum<S>(value);
    } else {
      if (value <= double(std::numeric_limits<S>::min())) return std::numeric_limits<S>::min();
      if (value >= double(std::numeric_limits<S>::max())) return std::numeric_limits<S>::max();
      return S(value);
    }
  }
  template <class S, class Kernels, class Call>
  void forward(const Kernels& k, const Call& call, const S* x, S* y) const {
    call(k.hardtanh, x, limit<S>(low), limit<S>(high), y);
  }
  template <class S, class Kernels, class Call>
  void backward(const Kernels& k, const Call& call, const S* gy, const S* y, S* gx) const {
    call(k.hardtanh_backward, gy, y, limit<S>(low), limit<S>(high), gx);
  }
  bool keeps_output() const { return true; }
};

struct LeakyRelu {
  static constexpr const char *name = "leaky_relu", *backward_name = "leaky_relu_backward";
  static constexpr Numbers numbers = Numbers::real;
  double negative_slope;

  void check(const Tensor&) const {}
  template <class S, class Kernels, class Call>
  void forward(const Kernels& k, const Call& call, const S* x, S* y) const {
    call(k.leaky_relu, x, Sum<S>(negative_slope), y);
  }
  template <class S, class Kernels, class Call>
  void backward(const Kernels& k, const Call& call, const S* gy, const S* kept, S* gx) const {
    call(k.leaky_relu_backward, gy, kept, Sum<S>(negative_slope), gx);
  }
  /// The output has the input's sign unless the slope is negative: then the input is kept.
  bool keeps_output() const { return negative_slope >= 0; }
};

// ---- check, allocate, run ----

/// `t` with the strides of `like`, so that both can be walked in step.
Tensor aligned_to(const Tensor& like, const Tensor& t) {
  if (t.strides() == like.strides() || t.numel() <= 1) return t;
  return empty_alike(like).copy_(t);
}

/// One output, dense, in the layout that torch's own element-wise operators would choose for `input`.
template <class Rule>
Tensor prepare(const Tensor& input, const Rule& rule) {
  check_alike(rule.name, {{"input", input}}, rule.numbers);
  rule.check(input);
  return empty_alike(input);
}

template <class Rule>
Tensor prepare_backward(const Tensor& grad_output, const Tensor& kept, const Rule& rule) {
  check_alike(rule.backward_name, {{"grad_output", grad_output}, {"kept", kept}});
  TORCH_CHECK(grad_output.sym_sizes().equals(kept.sym_sizes()), rule.backward_name,
              ": expected grad_output of the shape of kept, ", kept.sym_sizes(), ", but got ", grad_output.sym_sizes());
  return empty_alike(kept);
}

template <class Rule>
void run(const Tensor& x, const Tensor& y, const Rule& rule) {
  with_number(x.scalar_type(), [&](auto number) {
    using S = decltype(number);
    run_on_device<S>(x, x.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      rule.forward(kernels, call, data_of<S>(x), mutable_data_of<S>(y));
    });
  });
}

// ---- the operators: forward, in place, backward ----

template <class Rule, class... Parameters>
Tensor forward(const Tensor& input, Parameters... parameters) {
  const Rule rule{parameters...};
  const Tensor y = prepare(input, rule);
  run(aligned_to(y, input), y, rule);
  return y;
}

template <class Rule, class... Parameters>
Tensor forward_meta(const Tensor& input, Parameters... parameters) {
  return prepare(input, Rule{parameters...});
}

template <class Rule, class... Parameters>
Tensor& in_place(Tensor& input, Parameters... parameters) {
  const Rule rule{parameters...};
  check_alike(rule.name, {{"input", input}}, rule.numbers);
  rule.check(input);
  at::assert_no_internal_overlap(input);
  if (input.is_non_overlapping_and_dense()) {
    run(input, input, rule);
  } else {
    input.copy_(forward<Rule>(input, parameters...));
  }
  return input;
}

template <class Rule, class... Parameters>
Tensor& in_place_meta(Tensor& input, Parameters... parameters) {
  forward_meta<Rule>(input, parameters...);
  at::assert_no_internal_overlap(input);
  return input;
}

template <class Rule, class... Parameters>
Tensor backward(const Tensor& grad_output, const Tensor& kept, Parameters... parameters) {
  const Rule rule{parameters...};
  const Tensor gx = prepare_backward(grad_output, kept, rule);
  const Tensor gy = aligned_to(gx, grad_output), k = aligned_to(gx, kept);
  with_real_number(k.scalar_type(), [&](auto number) {
    using S = decltype(number);
    run_on_device<S>(k, k.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      rule.backward(kernels, call, data_of<S>(gy), data_of<S>(k), mutable_data_of<S>(gx));
    });
  });
  return gx;
}

template <class Rule, class... Parameters>
Tensor backward_meta(const Tensor& grad_output, const Tensor& kept, Parameters... parameters) {
  return prepare_backward(grad_output, kept, Rule{parameters...});
}

// ---- derivatives ----

template <class Rule, class... Parameters>
Tensor call_backward(const Tensor& grad_output, const Tensor& kept, Parameters... parameters) {
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, Parameters...)>(
      (std::string("cnnops::") + Rule::backward_name).c_str());
  return op.call(grad_output, kept, parameters...);
}

template <class Rule, class... Parameters>
Tensor autograd(const Tensor& input, Parameters... parameters) {
  static const auto op =
      find_operator<Tensor(const Tensor&, Parameters...)>((std::string("cnnops::") + Rule::name).c_str());
  if (!may_be_differentiated(input)) return below_autograd([&] { return op.call(input, parameters...); });
  const bool keeps_output = Rule{parameters...}.keeps_output();
  return differentiable(
      Rule::backward_name, {input}, [&] { return variable_list{op.call(input, parameters...)}; },
      [&](const variable_list& outputs) { return keeps_output ? outputs : variable_list{input}; },
      [=](const Backward& b) { return variable_list{call_backward<Rule>(b.grads[0], b.kept[0], parameters...)}; },
      [&](const variable_list& primals, const variable_list& tangents, const variable_list& outputs) {
        const Tensor& kept = keeps_output ? outputs[0] : primals[0];
        return variable_list{call_backward<Rule>(tangents[0], kept, parameters...)};
      })[0];
}

template <class Rule, class... Parameters>
Tensor& autograd_in_place(Tensor& input, Parameters... parameters) {
  static const auto op =
      find_operator<Tensor&(Tensor&, Parameters...)>((std::string("cnnops::") + Rule::name + "_").c_str());
  const auto check = [](const Rule& rule) {
    TORCH_CHECK(rule.keeps_output(), rule.name, "_: in place the derivative is known from the result only, and a ",
                "negative slope hides the input's sign; call it with inplace=False");
  };
  return differentiable_in_place(
      Rule::backward_name, input, [&](Tensor& x) { op.call(x, parameters...); },
      [=](const Backward& b) {
        check(Rule{parameters...});
        return variable_list{call_backward<Rule>(b.grads[0], b.kept[0], parameters...)};
      },
      [&](const Tensor& tangent, const Tensor& output) {
        check(Rule{parameters...});
        return call_backward<Rule>(tangent, output, parameters...);
      });
}

/// Linear in the gradient; of what was kept it needs only on which side it lies, whose derivative is zero.
template <class Rule, class... Parameters>
Tensor autograd_backward(const Tensor& grad_output, const Tensor& kept, Parameters... parameters) {
  return differentiable(
      Rule::backward_name, {grad_output, kept},
      [&] { return variable_list{call_backward<Rule>(grad_output, kept, parameters...)}; },
      [&](const variable_list&) { return variable_list{kept}; },
      [=](const Backward& b) {
        return variable_list{b.needs(0) ? call_backward<Rule>(b.grads[0], b.kept[0], parameters...) : Tensor(),
                             Tensor()};
      },
      [&](const variable_list& primals, const variable_list& tangents, const variable_list&) {
        if (!tangents[0].defined()) return variable_list{Tensor()};
        return variable_list{call_backward<Rule>(tangents[0], primals[1], parameters...)};
      })[0];
}

/// Counts that the tensor was written over, for those who have kept it.
template <class Rule, class... Parameters>
Tensor& counted_in_place(Tensor& input, Parameters... parameters) {
  static const auto op =
      find_operator<Tensor&(Tensor&, Parameters...)>((std::string("cnnops::") + Rule::name + "_").c_str());
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.call(input, parameters...);
  }
  torch::autograd::impl::bump_version(input);
  return input;
}

/// For torch.compile: an operator that writes over its input becomes one that does not, and the result is put in place.
template <class Rule, class... Parameters>
Tensor& functionalized(Tensor& input, Parameters... parameters) {
  static const auto op =
      find_operator<Tensor(const Tensor&, Parameters...)>((std::string("cnnops::") + Rule::name).c_str());
  static const auto op_in_place =
      find_operator<Tensor&(Tensor&, Parameters...)>((std::string("cnnops::") + Rule::name + "_").c_str());
  namespace functional = at::functionalization::impl;
  if (!functional::isFunctionalTensor(input)) {
    const at::AutoDispatchSkipFunctionalize below;
    return op_in_place.call(input, parameters...);
  }
  functional::sync(input);
  Tensor result;
  {
    const at::AutoDispatchSkipFunctionalize below;
    result = op.call(functional::from_functional_tensor(input), parameters...);
  }
  functional::replace_(input, result);
  functional::commit_update(input);
  functional::sync(input);
  return input;
}

/// One operator in all its forms.
template <class Rule, class... Parameters>
struct Operator {
  static std::string name(const char* suffix) { return std::string(Rule::name) + suffix; }

  static void define(torch::Library& m, const char* parameters) {
    m.def((name("") + "(Tensor input" + parameters + ") -> Tensor").c_str());
    m.def((name("_") + "(Tensor(a!) input" + parameters + ") -> Tensor(a!)").c_str());
    m.def((name("_backward") + "(Tensor grad_output, Tensor kept" + parameters + ") -> Tensor").c_str());
  }
  static void implement(torch::Library& m) {
    m.impl(name("").c_str(), forward<Rule, Parameters...>);
    m.impl(name("_").c_str(), in_place<Rule, Parameters...>);
    m.impl(name("_backward").c_str(), backward<Rule, Parameters...>);
  }
  static void implement_meta(torch::Library& m) {
    m.impl(name("").c_str(), forward_meta<Rule, Parameters...>);
    m.impl(name("_").c_str(), in_place_meta<Rule, Parameters...>);
    m.impl(name("_backward").c_str(), backward_meta<Rule, Parameters...>);
  }
  static void implement_autograd(torch::Library& m) {
    m.impl(name("").c_str(), autograd<Rule, Parameters...>);
    m.impl(name("_").c_str(), autograd_in_place<Rule, Parameters...>);
    m.impl(name("_backward").c_str(), autograd_backward<Rule, Parameters...>);
  }
  static void implement_counting(torch::Library& m) {
    m.impl(name("_").c_str(), counted_in_place<Rule, Parameters...>);
  }
  static void implement_functionalize(torch::Library& m) {
    m.impl(name("_").c_str(), functionalized<Rule, Parameters...>);
  }
};

using ReluOperator = Operator<Relu>;
using HardtanhOperator = Operator<Hardtanh, double, double>;
using LeakyReluOperator = Operator<LeakyRelu, double>;

void implement_on_device(torch::Library& m) {
  ReluOperator::implement(m);
  HardtanhOperator::implement(m);
  LeakyReluOperator::implement(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  ReluOperator::define(m, "");
  HardtanhOperator::define(m, ", float min_val, float max_val");
  LeakyReluOperator::define(m, ", float negative_slope");
}

TORCH_LIBRARY_IMPL(cnnops, CPU, m) { implement_on_device(m); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { implement_on_device(m); }

TORCH_LIBRARY_IMPL(cnnops, Meta, m) {
  ReluOperator::implement_meta(m);
  HardtanhOperator::implement_meta(m);
  LeakyReluOperator::implement_meta(m);
}

TORCH_LIBRARY_IMPL(cnnops, Autograd, m) {
  ReluOperator::implement_autograd(m);
  HardtanhOperator::implement_autograd(m);
  LeakyReluOperator::implement_autograd(m);
}

TORCH_LIBRARY_IMPL(cnnops, ADInplaceOrView, m) {
  ReluOperator::implement_counting(m);
  HardtanhOperator::implement_counting(m);
  LeakyReluOperator::implement_counting(m);
}

TORCH_LIBRARY_IMPL(cnnops, Functionalize, m) {
  ReluOperator::implement_functionalize(m);
  HardtanhOperator::implement_functionalize(m);
  LeakyReluOperator::implement_functionalize(m);
}

}  // namespace cnnops
