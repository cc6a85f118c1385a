"""Activation functions of recurrent cells, with their derivatives.

    name          y                               dy/da
    sigmoid       1 / (1 + exp(−a))               y (1 − y)
    tanh          tanh(a)                         1 − y²
    relu          max(a, 0)                       1 where y > 0
    quantTanh     a, clamped to [−1, 1]           1 where |y| < 1
    quantSigm     (a + 1) / 2, clamped to [0, 1]  ½ where 0 < y < 1

Each derivative is a function of y, so the backward pass needs only the output.

Reference: names and definitions are those of EdgeML (microsoft/EdgeML, edgeml_pytorch/graph/rnn.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.errors import InputError, nearest


@dataclass(frozen=True)
class Gate:
    """Activation function y(a) and its derivative.

    Attributes:
        function: a → y.
        derivative: y → dy/da.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _sigmoid_derivative(y: Tensor) -> Tensor:
    return y * (1 - y)


def _tanh_derivative(y: Tensor) -> Tensor:
    return 1 - y * y


def _relu_derivative(y: Tensor) -> Tensor:
    return (y > 0).to(y.dtype)


def _quantized_tanh(a: Tensor) -> Tensor:
    return a.clamp(-1, 1)


def _quantized_tanh_derivative(y: Tensor) -> Tensor:
    return (y.abs() < 1).to(y.dtype)


def _quantized_sigmoid(a: Tensor) -> Tensor:
    return ((a + 1) / 2).clamp(0, 1)


def _quantized_sigmoid_derivative(y: Tensor) -> Tensor:
    return 0.5 * ((y > 0) & (y < 1)).to(y.dtype)


# Module-level functions instead of lambdas, so that models can be pickled.
GATES = {
    "sigmoid": Gate(torch.sigmoid, _sigmoid_derivative),
    "tanh": Gate(torch.tanh, _tanh_derivative),
    "relu": Gate(torch.relu, _relu_derivative),
    "quantTanh": Gate(_quantized_tanh, _quantized_tanh_derivative),
    "quantSigm": Gate(_quantized_sigmoid, _quantized_sigmoid_derivative),
}
"""Name in EdgeML → activation function."""


def find_gate(argument: str, name: str) -> Gate:
    """Return the activation function of a name.

    Args:
        argument: name of the argument that contains the name, for the message.
        name: a key of `GATES`.

    Raises:
        InputError: the name is unknown.

    Examples:
        >>> find_gate("gate", "quantSigm").function(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if name not in GATES:
        raise InputError(f"unknown activation {argument}={name!r}; {nearest(str(name), GATES)}")
    return GATES[name]
