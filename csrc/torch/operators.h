// Calls through the dispatcher: what one operator asks of another.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace cnnops {

using OptionalTensor = std::optional<at::Tensor>;

/// A typed handle of one of our operators.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

/// An input without a batch goes through as a batch of one.
template <class Call>
at::Tensor batched(const at::Tensor& input, const Call& call) {
  return input.dim() == 3 ? call(input.unsqueeze(0)).squeeze(0) : call(input);
}

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

/// The same of two results.
template <class Call>
TwoTensors two_batched(const at::Tensor& input, const Call& call) {
  if (input.dim() != 3) return call(input);
  const auto [first, second] = call(input.unsqueeze(0));
  return {first.squeeze(0), second.squeeze(0)};
}

/// (N, C, ...) -> (C): the gradient of a bias.
at::Tensor channel_sum(const at::Tensor& input);

}  // namespace cnnops
