// How an operator is made differentiable.
//
// torch's own operators record a Node: the tensors that the backward pass will need, and a function that turns the
// gradients of the outputs into those of the inputs by calling further operators. We do the same, by hand, instead of
// through torch::autograd::Function: it is what the function transforms of torch.func expect of a C++ operator, and
// it is the cheapest. As that function calls differentiable operators, gradients of gradients need nothing more.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <utility>
#include <vector>

namespace cnnops {

using torch::autograd::variable_list;
using NodePointer = decltype(torch::autograd::Edge::function);  // std::shared_ptr before torch 2.13, then intrusive

template <class Step, class... Arguments>
auto make_step(Arguments&&... arguments) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    // torch's own deleter, found by its argument's type: it takes long chains of nodes apart without recursion.
    return std::shared_ptr<Step>(new Step(std::forward<Arguments>(arguments)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Step>(std::forward<Arguments>(arguments)...);
  }
}

/// What the backward pass of one call knows. An undefined tensor in `grads` stands for zeros.
struct Backward {
  const variable_list& grads;  // of the outputs
  const variable_list& kept;   // the tensors that were kept at the forward pass
  const torch::autograd::Node& node;
  bool needs(size_t input) const { return node.task_should_compute_output(input); }
};

/// Whether a derivative of a function of these tensors may be asked for.
template <class... Tensors>
bool may_be_differentiated(const Tensors&... t) {
  return (at::GradMode::is_enabled() && (... || (t.defined() && t.requires_grad()))) ||
         (... || (t.defined() && t._fw_grad(0).defined()));
}

/// Calls an operator without autograd: the short way where no derivative will be asked for.
template <class Call>
auto below_autograd(const Call& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}

/// a + b, where an undefined tensor stands for zeros.
inline at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : at::add(a, b);
}

/// The inputs without their tangents, and the tangents, undefined where there are none.
inline std::pair<variable_list, variable_list> split_tangents(const variable_list& inputs) {
  variable_list primals, tangents;
  for (const at::Tensor& t : inputs) {
    const bool has_tangent = t.defined() && t._fw_grad(0).defined();
    primals.push_back(has_tangent ? t._fw_primal(0) : t);
    tangents.push_back(has_tangent ? t._fw_grad(0) : at::Tensor());
  }
  return {primals, tangents};
}

/// The recorded step. `Gradients` is a function Backward -> variable_list, one gradient (or none) per input.
template <class Gradients>
class Step final : public torch::autograd::Node {
 public:
  Step(const char* name, Gradients gradients) : name_(name), gradients_(std::move(gradients)) {}

  void keep(const at::Tensor& t, bool is_output, bool is_inplace_on_view = false) {
    kept_.emplace_back(t, is_output, is_inplace_on_view);
  }
  std::string name() const override { return name_; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    bool any = false;
    for (const auto& grad : grads) any |= grad.defined();
    if (!any) return variable_list(num_outputs());
    variable_list kept;
    for (const auto& saved : kept_) kept.push_back(saved.unpack(this->getptr()));
    return gradients_(Backward{grads, kept, *this});
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : kept_) saved.reset_data();
  }

 private:
  const char* name_;
  Gradients gradients_;
  std::vector<torch::autograd::SavedVariable> kept_;
};

/// Runs `forward` below autograd and records how to differentiate it.
///   inputs     the tensors to differentiate by, in the order of `gradients`' results; undefined ones are allowed
///   forward    () -> the outputs; those of integer type are not differentiable
///   keep       outputs -> the tensors (inputs or outputs) that `gradients` will find in Backward::kept
///   tangents   (inputs, their tangents, outputs) -> the tangents of the differentiable outputs: forward-mode
///              derivatives, for which an undefined tangent stands for zeros, in and out
template <class Forward, class Keep, class Gradients, class Tangents>
variable_list differentiable(const char* name, const variable_list& inputs, const Forward& forward, const Keep& keep,
                             Gradients gradients, const Tangents& tangents) {
  bool recording = false, forward_mode = false;
  for (const at::Tensor& t : inputs) {
    recording |= t.defined() && t.requires_grad();
    forward_mode |= t.defined() && t._fw_grad(0).defined();
  }
  decltype(make_step<Step<Gradients>>(name, std::move(gradients))) step;
  if (recording && at::GradMode::is_enabled()) {
    step = make_step<Step<Gradients>>(name, std::move(gradients));
    step->set_next_edges(torch::autograd::collect_next_edges(inputs));
  }
  variable_list outputs;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    outputs = forward();
  }
  if (step) {
    for (at::Tensor& y : outputs) {
      if (y.is_floating_point()) torch::autograd::set_history(y, NodePointer(step));
    }
    for (const at::Tensor& t : keep(outputs)) {
      bool is_output = false;
      for (const at::Tensor& y : outputs) is_output |= y.is_same(t) && y.is_floating_point();
      step->keep(t, is_output);
    }
  }
  if (forward_mode) {
    const auto [primals, directions] = split_tangents(inputs);
    const variable_list results = tangents(primals, directions, outputs);
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].defined()) outputs[i]._set_fw_grad(results[i], /*level=*/0, /*is_inplace_op=*/false);
    }
  }
  return outputs;
}

/// The same for a function that writes its result over its input. `keep` is the result, the input itself.
template <class Forward, class Gradients, class Tangents>
at::Tensor& differentiable_in_place(const char* name, at::Tensor& input, const Forward& forward, Gradients gradients,
                                    const Tangents& tangents) {
  const bool forward_mode = input._fw_grad(0).defined();
  decltype(make_step<Step<Gradients>>(name, std::move(gradients))) step;
  torch::autograd::check_inplace(input, input.requires_grad() && at::GradMode::is_enabled());
  if (input.requires_grad() && at::GradMode::is_enabled()) {
    step = make_step<Step<Gradients>>(name, std::move(gradients));
    step->set_next_edges(torch::autograd::collect_next_edges(input));
  }
  const auto [primals, directions] = split_tangents({input});
  {
    const at::AutoDispatchBelowAutograd below_autograd;  // where the version is counted, in inference mode too
    forward(input);
  }
  if (step) {
    torch::autograd::rebase_history(variable_list{input}, NodePointer(step));
    step->keep(input, true, input.is_view());
  }
  if (forward_mode)
    // torch wants an existing tangent to be written over, too.
    input._set_fw_grad(directions[0].copy_(tangents(directions[0], input._fw_primal(0))), /*level=*/0,
                       /*is_inplace_op=*/true);
  return input;
}

}  // namespace cnnops
