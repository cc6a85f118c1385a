"""Patterns: the units of every kind of layer, by brute force over indices, and what is refused."""

import pytest
import torch
from harness import groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparing
from sparing import GMP, NM, Block, Filters, InputError, Unstructured, select
from sparing.layers import find_layers

LAYERS = {
    "linear": lambda: nn.Linear(8, 12),
    "conv1d": lambda: nn.Conv1d(4, 8, 3),
    "conv1d_grouped": lambda: nn.Conv1d(8, 16, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(4, 8, (2, 3)),
    "conv2d_grouped": lambda: nn.Conv2d(8, 16, 2, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 8, 2),
    "conv3d_grouped": lambda: nn.Conv3d(8, 8, 2, groups=2),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 8, 3),
    "transposed1d_grouped": lambda: nn.ConvTranspose1d(8, 16, 3, groups=2),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 8, (2, 3)),
    "transposed2d_grouped": lambda: nn.ConvTranspose2d(8, 16, 2, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(4, 8, 2),
    "transposed3d_grouped": lambda: nn.ConvTranspose3d(8, 8, 2, groups=2),
    "rnn": lambda: nn.RNN(4, 8, bidirectional=True),
    "lstm": lambda: nn.LSTM(4, 8, num_layers=2),
    "lstm_projected": lambda: nn.LSTM(4, 8, proj_size=4),
    "gru": lambda: nn.GRU(4, 8),
    "rnn_cell": lambda: nn.RNNCell(4, 8),
    "lstm_cell": lambda: nn.LSTMCell(4, 8),
    "gru_cell": lambda: nn.GRUCell(4, 8),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}
PATTERNS = [Unstructured(), Block(1), Block(2), Block(4), NM(2, 4), NM(1, 2), Filters()]
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)


def weights(kind):
    return find_layers(LAYERS[kind](), lambda name, module: True).values()


def reduced(values, groups, function):
    """Return a function of each group's values, by group."""
    return torch.stack([function(values.flatten()[groups.flatten() == g]) for g in range(int(groups.max()) + 1)])


@every_pattern
@every_layer
def test_units_are_the_groups_that_the_pattern_documents(kind, pattern):
    for layer in weights(kind):
        units, groups = pattern.units(layer), groups_of(layer, pattern)
        weight = torch.randn(layer.weight.shape, dtype=torch.float64)
        size = int((groups == 0).sum())
        assert (groups.unique(return_counts=True)[1] == size).all()
        assert (units.shape, units.group_size) == (tuple(weight.shape), size)
        if isinstance(pattern, NM):
            # A unit is one weight; each group keeps its n largest.
            assert (units.count, units.weights) == (weight.numel(), 1)
            assert torch.equal(units.norm(weight), weight.abs())
            mask = units.expand(units.keep_top(units.norm(weight), units.kept(pattern.sparsity)))
            smallest = reduced(weight.abs(), groups, lambda group: group.sort(descending=True).values[pattern.n - 1])
            assert torch.equal(mask, weight.abs() >= smallest[groups])
            continue
        assert (units.count, units.weights) == (weight.numel() // size, size)
        # One value per unit, expanded to its weights: the same number throughout a group, another in each group.
        numbers = torch.arange(units.count, dtype=torch.float64).reshape(units.unit_shape)
        expanded = units.expand(numbers)
        assert expanded.shape == weight.shape
        assert torch.equal(units.mean(expanded), numbers)
        assert len(torch.unique(torch.stack([groups.flatten().double(), expanded.flatten()]), dim=1)[0]) == units.count
        norm, mean = units.expand(units.norm(weight)), units.expand(units.mean(weight))
        torch.testing.assert_close(norm, reduced(weight, groups, lambda g: g.square().mean().sqrt())[groups])
        torch.testing.assert_close(mean, reduced(weight, groups, torch.mean)[groups])
        kept = units.kept(0.5)
        chosen = units.keep_top(units.norm(weight), kept)
        assert torch.equal(units.active(units.expand(chosen)), chosen)
        assert int(chosen.sum()) == kept == units.count - round(units.count * 0.5)


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1))
def test_every_group_of_m_keeps_the_same_number_on_a_ramp(n, m, groups, outputs, sparsity):
    pattern = NM(min(n, m), m)
    (layer,) = find_layers(nn.Linear(m * groups, outputs)).values()
    units = pattern.units(layer)
    kept = units.kept(sparsity)
    mask = units.keep_top(torch.randint(0, 3, layer.weight.shape).float(), kept)  # with ties
    each = mask.reshape(outputs, groups, m).sum(2)
    assert (each == m - round(m * sparsity)).all()
    assert int(mask.sum()) == kept


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind.startswith(("linear", "conv", "transposed"))])
def test_pruning_one_filter_silences_one_output_channel(kind):
    """The filter of an output is what the output is computed from, whatever the layout of the weight."""
    module = LAYERS[kind]()
    nn.init.zeros_(module.bias)
    (layer,) = find_layers(module).values()
    units = Filters().units(layer)
    x = torch.randn(
        1, layer.weight.shape[1] if kind == "linear" else module.in_channels, *[4] * (layer.weight.dim() - 2)
    )
    silent = []
    for number in range(units.count):
        copy, kept = LAYERS[kind](), torch.ones(units.count, dtype=torch.bool)
        kept[number] = False
        with torch.no_grad():
            copy.weight.copy_(layer.weight * units.expand(kept.reshape(units.unit_shape)))
            copy.bias.zero_()
        silent.append((copy(x).flatten(2).abs().sum((0, 2)) if kind != "linear" else copy(x)[0]) == 0)
    assert torch.equal(torch.stack(silent), torch.eye(units.count, dtype=torch.bool))


def sparsify(module, pattern):
    return sparing.sparsify_(
        module, GMP(sparsity=None if isinstance(pattern, NM) else 0.5, begin=0, end=0, pattern=pattern),
        select=select.of_type(type(module)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "pattern", "message"),
    [
        (nn.Linear(8, 10), Block(4), r"Block\(n=4\): layer 'weight' \(Linear\) has 10 neighbouring output channels"),
        (nn.Conv2d(8, 8, 3, groups=8), Block(4), r"\(Conv2d\) has 1 neighbouring output channels, which 4"),
        (nn.Conv2d(8, 12, 3, groups=2), Block(4), "has 6 neighbouring output channels, which 4 does not divide"),
        (nn.ConvTranspose2d(8, 12, 3, groups=2), Block(4), r"\(ConvTranspose2d\) has 6 neighbouring output channels"),
        (nn.LSTM(4, 6), Block(4), "layer 'weight_ih_l0' .LSTM. has 6 neighbouring output channels"),  # of each gate
        (nn.MultiheadAttention(6, 2), Block(4), "layer 'in_proj_weight' .* has 6 neighbouring output channels"),
        (nn.Conv2d(3, 8, 3), NM(2, 4), r"NM\(n=2, m=4\): layer 'weight' \(Conv2d\) has 3 inputs per output channel"),
        (nn.Conv2d(8, 8, 3, groups=8), NM(2, 4), "has 1 inputs per output channel, which 4 does not divide"),
        (nn.ConvTranspose2d(8, 8, 3, groups=4), NM(2, 4), "has 2 inputs per output channel, which 4 does not divide"),
        (nn.Linear(10, 8), NM(2, 4), "has 10 inputs per output channel, which 4 does not divide; choose another m"),
        *(
            (nn.Embedding(8, 8), pattern, r"layer 'weight' is a Embedding, whose output channels are not known")
            for pattern in (Block(4), NM(2, 4), Filters())
        ),
    ],
)  # fmt: skip
def test_layers_for_which_a_pattern_is_not_defined_are_refused(module, pattern, message):
    with pytest.raises(InputError, match=message):
        sparsify(module, pattern)
    assert not sparing.sparse_layers(module)


def test_an_embedding_takes_single_weights():
    embedding = nn.Embedding(8, 8)
    for pattern in (Unstructured(), Block(1)):
        sparsify(embedding, pattern)
        assert sparing.report(embedding).total.nonzero == 32
        sparing.densify_(embedding)
        nn.init.normal_(embedding.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Block(0), "Block: n must be a whole number, at least 1, got 0"),
        (lambda: Block(2.0), "Block: n must be a whole number, at least 1, got 2.0"),
        (lambda: Block(True), "Block: n must be a whole number, at least 1, got True"),
        (lambda: NM(1, 1), "NM: m must be a whole number, at least 2, got 1"),
        (lambda: NM(0, 4), "NM: n must be a whole number, at least 1, got 0"),
        (lambda: NM(5, 4), "NM: n must be at most m=4, got 5"),
        (lambda: GMP(sparsity=0.9, pattern=NM(2, 4)), r"NM\(n=2, m=4\) has sparsity 0.5, got sparsity=0.9"),
    ],
)
def test_a_pattern_with_bad_arguments_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_sparsity_of_n_in_m():
    assert [NM(2, 4).sparsity, NM(1, 4).sparsity, NM(4, 4).sparsity] == [0.5, 0.75, 0.0]
