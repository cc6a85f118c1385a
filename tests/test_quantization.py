"""Sparse and quantized models: torchao's quantize_, quantization-aware training and PT2E."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparing

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def quantization():
    pytest.importorskip("torchao", reason="torchao is not installed", exc_type=ImportError)
    import torchao.quantization

    return torchao.quantization


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def train(model, method, select=None, steps=10):
    sparsifier = sparing.sparsify_(model, method, select=select, steps=steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(16, 64)), torch.ones(16, 32)).backward()
        optimizer.step()
    return sparsifier


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_quantized_weights_keep_the_zeros(config, quantization):
    model = network()
    train(model, sparing.GMP(sparsity=0.8, begin=0, end=0.8, every=1))
    sparing.densify_(model)
    zeros = {index: model[index].weight == 0 for index in (0, 2)}
    quantization.quantize_(model, getattr(quantization, config)())
    for index, zero in zeros.items():
        assert zero.float().mean() > 0.75
        assert (model[index].weight.dequantize()[zero] == 0).all()
    found = sparing.report(model, (2, 64))
    nonzero = sum(int(model[index].weight.dequantize().count_nonzero()) for index in zeros)
    assert (found.total.weights, found.total.nonzero) == (64 * 96, nonzero)
    assert found.total.dense_macs == 2 * 64 * 96
    assert found.total.macs == 2 * nonzero or "zeros need not be zero" in found.notes[0]  # a point of zero is taken off


@pytest.mark.parametrize("prepare", [True, False])
def test_weights_of_torch_quantization_are_counted_or_named(prepare):
    model, ao = network().train(), torch.ao.quantization
    if prepare:  # fake quantization keeps zeros
        model.qconfig = ao.get_default_qat_qconfig("fbgemm")
        model = ao.prepare_qat(model)
        sparing.sparsify_(model, sparing.GMP(sparsity=0.75, begin=0, end=0))
        found = sparing.report(model, (2, 64))
        assert (found.total.dense_macs, found.total.macs) == (2 * 64 * 96, 2 * 64 * 24)
        assert found.notes == ()
    else:
        found = sparing.report(ao.quantize_dynamic(model, {nn.Linear}), (2, 64))
        assert found.notes == ("the weights of '0', '2' are quantized and packed, and are in no sum",)


@pytest.mark.parametrize(
    "method",
    [sparing.GMP(sparsity=0.8, begin=0, end=0.8, every=1), sparing.STR(sparsity=0.8, every=1)],
    ids=["gmp", "str"],
)
def test_quantization_aware_training_of_a_sparse_model(method, quantization):
    """Prepare, sparsify, train, densify, convert: the trained outputs are those of the quantized weights."""
    model = network()
    base = quantization.IntxWeightOnlyConfig(torch.int4, quantization.granularity.PerGroup(32))
    fake = quantization.qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantization.quantize_(model, quantization.qat.QATConfig(weight_config=fake, step="prepare"))
    sparsifier = train(model, method)
    zeros = [layer.effective_weight == 0 for layer in sparsifier.layers.values()]
    x = torch.randn(8, 64)
    expected = model(x)
    sparing.densify_(model)
    assert torch.equal(model(x), expected)
    quantization.quantize_(model, quantization.qat.QATConfig(base, step="convert"))
    for layer, zero in zip((model[0], model[2]), zeros, strict=True):
        assert zero.float().mean() > 0.7
        assert (layer.weight.dequantize()[zero] == 0).all()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("aware", [False, True])
def test_pt2e_keeps_the_zeros(aware, quantization):
    """A densified model is exported; for quantization-aware training, the exported one is sparsified again."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, example = network(), (torch.randn(16, 64),)
    train(model, sparing.GMP(sparsity=0.8, begin=0, end=0.8, every=1))
    sparing.densify_(model)
    zeros = [model[index].weight == 0 for index in (0, 2)]
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=aware))
    exported = torch.export.export(model, example).module()
    prepared = (prepare_qat_pt2e if aware else prepare_pt2e)(exported, quantizer)
    prepared(*example)
    if aware:
        before = prepared.get_parameter("0.weight").detach().clone()
        train(prepared, sparing.FixedMask(), select=["0", "2"])
        sparing.densify_(prepared)
        assert not torch.equal(prepared.get_parameter("0.weight"), before)
    expected = prepared(*example)
    move_exported_model_to_eval(prepared)
    converted = convert_pt2e(prepared)
    assert (converted(*example) - expected).norm() < 0.05 * expected.norm()
    weights = {tuple(w.shape): w for w in converted.state_dict().values() if w.dtype == torch.int8}
    for zero in zeros:
        assert zero.float().mean() > 0.75
        assert (weights[tuple(zero.shape)][zero] == 0).all()
