"""The operators of PyTorch that run in the engine."""

from functools import partial
from typing import Any

import torch

from sparing.engine.lowering import elementwise, layers, views
from sparing.engine.lowering.attention import SHAPES, attention
from sparing.engine.lowering.lowering import Rule

aten = torch.ops.aten

ACTIVATIONS = {
    aten.relu: "relu", aten.relu6: "relu6", aten.silu: "silu", aten.sigmoid: "sigmoid", aten.tanh: "tanh",
    aten.hardswish: "hardswish", aten.hardsigmoid: "hardsigmoid",
}  # fmt: skip

RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.conv1d, aten.conv2d), Rule(layers.convolution, axis=1)),
    **dict.fromkeys((aten.linear, aten.addmm, aten.mm, aten.matmul), Rule(layers.linear, axis=-1)),
    aten.max_pool1d: Rule(partial(layers.pool, dims=1, kind="maximum"), axis=1),
    aten.max_pool2d: Rule(partial(layers.pool, dims=2, kind="maximum"), axis=1),
    aten.avg_pool1d: Rule(partial(layers.pool, dims=1, kind="average"), axis=1),
    aten.avg_pool2d: Rule(partial(layers.pool, dims=2, kind="average"), axis=1),
    **dict.fromkeys((aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d), Rule(layers.adaptive_average, axis=1)),
    aten.mean: Rule(layers.mean),
    **{operator: Rule(partial(elementwise.activation, name=name)) for operator, name in ACTIVATIONS.items()},
    aten.gelu: Rule(elementwise.gelu),
    **dict.fromkeys((aten.hardtanh, aten.clamp, aten.clamp_min), Rule(elementwise.clamp)),
    aten.add: Rule(partial(elementwise.binary, kind="add")),
    aten.mul: Rule(partial(elementwise.binary, kind="multiply")),
    aten.sub: Rule(elementwise.subtract),
    aten.rsub: Rule(elementwise.subtract_from),
    aten.div: Rule(elementwise.divide),
    aten.neg: Rule(elementwise.negate),
    aten.batch_norm: Rule(elementwise.batch_norm, axis=1),
    aten.layer_norm: Rule(elementwise.layer_norm, axis=-1),
    aten.rms_norm: Rule(partial(elementwise.layer_norm, centered=False), axis=-1),
    aten.scaled_dot_product_attention: Rule(attention, axis=-1),
    **dict.fromkeys((*SHAPES, aten.expand), Rule(views.view)),
    **dict.fromkeys((aten.permute, aten.transpose), Rule(views.permute)),
    **dict.fromkeys((aten.slice, aten.narrow), Rule(views.slice_channels)),
    aten.cat: Rule(views.concatenate),
}
