"""The nonlinearities of recurrent cells, each with its slope.

    sigmoid       1 / (1 + exp(−a))             y (1 − y)
    tanh          tanh(a)                       1 − y²
    relu          max(a, 0)                     1 where y > 0
    quantTanh     a, cut to [−1, 1]             1 where |y| < 1
    quantSigm     (a + 1) / 2, cut to [0, 1]    ½ where 0 < y < 1

The slope dy/da is a function of y alone, so a backward pass needs the output and nothing else.

Source: EdgeML (microsoft/EdgeML, edgeml_pytorch/graph/rnn.py) for names and definitions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.errors import InputError, nearest


@dataclass(frozen=True)
class Gate:
    """A nonlinearity and its slope, the latter from the value of the former."""

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _sigmoid_slope(y: Tensor) -> Tensor:
    return y * (1 - y)


def _tanh_slope(y: Tensor) -> Tensor:
    return 1 - y * y


def _relu_slope(y: Tensor) -> Tensor:
    return (y > 0).to(y.dtype)


def _quantized_tanh(a: Tensor) -> Tensor:
    return a.clamp(-1, 1)


def _quantized_tanh_slope(y: Tensor) -> Tensor:
    return (y.abs() < 1).to(y.dtype)


def _quantized_sigmoid(a: Tensor) -> Tensor:
    return ((a + 1) / 2).clamp(0, 1)


def _quantized_sigmoid_slope(y: Tensor) -> Tensor:
    return 0.5 * ((y > 0) & (y < 1)).to(y.dtype)


# Functions with names, so that a model can be pickled.
GATES = {
    "sigmoid": Gate(torch.sigmoid, _sigmoid_slope),
    "tanh": Gate(torch.tanh, _tanh_slope),
    "relu": Gate(torch.relu, _relu_slope),
    "quantTanh": Gate(_quantized_tanh, _quantized_tanh_slope),
    "quantSigm": Gate(_quantized_sigmoid, _quantized_sigmoid_slope),
}
"""The gates by the names of EdgeML."""


def find_gate(argument: str, name: str) -> Gate:
    """The gate of this name.

    Raises:
        InputError: there is none; `argument` says where it was asked for.

    Examples:
        >>> find_gate("gate", "quantSigm").function(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if name not in GATES:
        raise InputError(f"{argument}={name!r} is no gate; {nearest(str(name), GATES)}")
    return GATES[name]
