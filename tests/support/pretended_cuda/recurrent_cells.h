// The fused recurrent cells, which nn.LSTM and nn.GRU call on CUDA alone.
//
// As on CUDA, they have a first derivative and, by torch's formulas, a second, and no forward mode.
// Written in terms of operations on the device: each counts as several launches for one.

#pragma once

#include <ATen/ATen.h>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor plus(const Tensor& a, const Tensor& b, const OptionalTensor& c, const OptionalTensor& d) {
  auto sum = a + b;
  if (c && c->defined()) sum = sum + *c;
  if (d && d->defined()) sum = sum + *d;
  return sum;
}

Tensor bias_gradient(const Tensor& gates, bool has_bias) { return has_bias ? gates.sum(0) : Tensor(); }

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                                             const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  const auto gates = plus(input, hidden, input_bias, hidden_bias).chunk(4, 1);
  const auto in = gates[0].sigmoid(), forget = gates[1].sigmoid(), candidate = gates[2].tanh(), out = gates[3].sigmoid();
  const auto next = forget * cell + in * candidate;
  return {out * next.tanh(), next, at::cat({in, forget, candidate, out}, 1)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_hidden, const OptionalTensor& grad_next,
                                                      const Tensor& cell, const Tensor& next, const Tensor& workspace,
                                                      bool has_bias) {
  const auto gates = workspace.chunk(4, 1);
  const auto &in = gates[0], &forget = gates[1], &candidate = gates[2], &out = gates[3];
  const auto squashed = next.tanh();
  const auto to_hidden = grad_hidden && grad_hidden->defined() ? *grad_hidden : at::zeros_like(next);
  auto to_next = to_hidden * out * (1 - squashed * squashed);
  if (grad_next && grad_next->defined()) to_next = to_next + *grad_next;
  const auto to_gates = at::cat({to_next * candidate * in * (1 - in), to_next * cell * forget * (1 - forget),
                                 to_next * in * (1 - candidate * candidate), to_hidden * squashed * out * (1 - out)},
                                1);
  return {to_gates, to_next * forget, bias_gradient(to_gates, has_bias)};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& state,
                                    const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  const auto from_input = (input_bias && input_bias->defined() ? input + *input_bias : input).chunk(3, 1);
  const auto from_hidden = (hidden_bias && hidden_bias->defined() ? hidden + *hidden_bias : hidden).chunk(3, 1);
  const auto reset = (from_input[0] + from_hidden[0]).sigmoid();
  const auto update = (from_input[1] + from_hidden[1]).sigmoid();
  const auto candidate = (from_input[2] + reset * from_hidden[2]).tanh();
  return {candidate + update * (state - candidate), at::cat({reset, update, candidate, state, from_hidden[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad, const Tensor& workspace,
                                                                     bool has_bias) {
  const auto saved = workspace.chunk(5, 1);
  const auto &reset = saved[0], &update = saved[1], &candidate = saved[2], &state = saved[3], &from_hidden = saved[4];
  const auto to_update = grad * (state - candidate) * update * (1 - update);
  const auto to_candidate = grad * (1 - update) * (1 - candidate * candidate);
  const auto to_reset = to_candidate * from_hidden * reset * (1 - reset);
  const auto to_input = at::cat({to_reset, to_update, to_candidate}, 1);
  const auto to_hidden = at::cat({to_reset, to_update, to_candidate * reset}, 1);
  return {to_input, to_hidden, grad * update, bias_gradient(to_input, has_bias), bias_gradient(to_hidden, has_bias)};
}

}  // namespace
