"""DSR: what one threshold prunes, how it adapts, where weights are regrown, and when."""

import pytest
import torch
from harness import Rows
from torch import nn

import sparing
from sparing import DSR
from sparing.patterns import Block

FIRST = [5.0, -4.0, 0.5, 3.0, 9.0, 9.0, 9.0, 9.0]
SECOND = [-0.25, 0.5, 4.0, 0.125, 9.0, 9.0, 9.0, 9.0]
ACTIVE = [1, 1, 1, 1, 0, 0, 0, 0]
NOTHING = [0.0] * 8


def method(**settings):
    return DSR(**{"sparsity": 0.5, "every": 1, "threshold": 1.0, "fraction": 0.5} | settings)


def test_one_threshold_prunes_in_all_layers_and_regrowth_is_shared_by_the_rest_of_them():
    """3 and 1 of 4 are at least 1; the 4 pruned are regrown as 3 to 1, uniformly, where nothing was active."""
    drawn = [[], []]
    for seed in range(200):
        rows = Rows(method(seed=seed), [FIRST, SECOND], [ACTIVE, ACTIVE]).step(NOTHING, NOTHING)
        for row, weight, stays, grown, seen in zip(
            range(2), (FIRST, SECOND), ({0, 1, 3}, {2}), (3, 1), drawn, strict=True
        ):
            active = {i for i in range(8) if rows.masks[row][i]}
            regrown = active - stays
            assert stays < active
            assert len(regrown) == grown
            assert rows.weights[row] == [0.0 if i in regrown else value for i, value in enumerate(weight)]
            seen.extend(regrown)
    for row, low, high in ((0, 125, 175), (1, 25, 75)):
        assert set(drawn[row]) == {4, 5, 6, 7}
        assert all(low < drawn[row].count(position) < high for position in range(4, 8))


def with_active(method, weights, counts):
    """Rows of which the first weights are active."""
    rows = Rows(method, weights)
    for part, count in zip(rows.parts, counts, strict=True):
        part.mask.copy_(torch.arange(part.mask.numel()) < count)
    return rows


def test_a_pruned_weight_is_regrown_at_once_only_where_other_places_are_too_few():
    """Of 4 active weights 3 are pruned: first with 3 free places, then with 2."""
    weight = [5.0, 0.1, 0.2, 0.3, 9.0, 9.0, 9.0]
    assert with_active(method(), [weight], [4]).step([0.0] * 7).masks == [[1, 0, 0, 0, 1, 1, 1]]
    rows = with_active(method(), [weight[:6]], [4]).step([0.0] * 6)
    assert rows.masks[0][0] == 1
    assert sum(rows.masks[0]) == 4
    assert any(rows.masks[0][1:4])
    assert rows.weights[0][1:4] == pytest.approx([0.1, 0.2, 0.3])  # one that is regrown at once keeps its value


@pytest.mark.parametrize("row", [0, 1])
def test_the_largest_weight_stays_in_a_layer_that_would_lose_all(row):
    small = [0.5, -0.75, 0.25, 0.125, 9.0, 9.0, 9.0, 9.0]
    weights = [FIRST, small] if row else [small, FIRST]
    for seed in range(10):
        rows = Rows(method(seed=seed), weights, [ACTIVE, ACTIVE]).step(NOTHING, NOTHING)
        assert rows.masks[row][:4] == [0, 1, 0, 0]
        # 4 are pruned, and shared out as 1 to 3.
        assert sum(rows.masks[row]) == 2


def test_a_weight_at_the_threshold_stays():
    rows = Rows(method(), [[1.0, -1.0, 0.9, 2.0]], [[1, 1, 0, 0]]).step([0.0] * 4)
    assert rows.masks == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("small", "expected"), [(0, 2.0), (7, 2.0), (8, 1.0), (10, 1.0), (12, 1.0), (13, 0.5), (19, 0.5)]
)
def test_the_threshold_doubles_below_the_aim_and_halves_above_it(small, expected):
    """The aim is 0.5 of 20, and a fifth of that is tolerated: 8 to 12."""
    rows = with_active(method(tolerance=0.2), [[0.1] * small + [5.0] * (40 - small)], [20]).step([0.0] * 40)
    assert rows.parts[0].cut.tolist() == [expected]


def test_the_next_update_prunes_by_the_new_threshold_in_all_layers():
    weight = [1.5, 1.5, 1.5, 5.0, 9.0, 9.0, 9.0, 9.0]
    rows = Rows(method(fraction=0.9), [weight, weight], [ACTIVE, ACTIVE])
    assert rows.step(NOTHING, NOTHING).masks == [ACTIVE, ACTIVE]
    rows.step(NOTHING, NOTHING)
    assert [mask[:4] for mask in rows.masks] == [[0, 0, 0, 1]] * 2


def test_a_threshold_that_halves_again_and_again_does_not_become_zero():
    rows = Rows(method(threshold=1.5e-45, fraction=0.1), [[5.0] + [0.0] * 19], [[1] * 10 + [0] * 10])
    rows.step([0.0] * 20)
    assert float(rows.parts[0].cut) > 0


def test_a_full_layer_passes_the_rest_of_its_share_on():
    """6 and 1 stay, and of the 2 + 5 pruned the first layer should regrow 6; but only 4 places are free."""
    weights = [[5.0] * 6 + [0.1] * 2 + [9.0] * 4, [5.0] + [0.1] * 5 + [9.0] * 8]
    rows = with_active(method(), weights, [8, 6]).step([0.0] * 12, [0.0] * 14)
    assert [sum(mask) for mask in rows.masks] == [10, 4]


def test_blocks_are_pruned_by_their_norm():
    """(0.1, 1.8) has a root mean square of 1.27 and stays, (0.2, −1.2) one of 0.86 and is pruned."""
    model = nn.Linear(4, 4, bias=False)
    model.weight.data = torch.tensor([[0.1, 5.0, 9, 9], [1.8, 5.0, 9, 9], [0.2, 4.0, 9, 9], [-1.2, 4.0, 9, 9]])
    sparsifier = sparing.sparsify_(model, method(pattern=Block(2)), steps=100)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    mask = sparsifier.layers["weight"].parametrization.mask
    mask.copy_(torch.tensor([[1, 1, 0, 0]] * 4))
    (0 * model.weight.sum()).backward()
    sparsifier.optimizers[0].step()
    blocks = mask.reshape(2, 2, 4).int()
    assert torch.equal(blocks[:, 0], blocks[:, 1])
    assert blocks[:, 0, :2].tolist() == [[1, 1], [0, 1]]
    assert int(blocks[:, 0].sum()) == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every": 8}, [8, 16, 24, 32, 48, 64]),
        ({"every": 4}, [*range(4, 25, 4), 32, 40, 48, 64]),
        ({"every": 4, "end": 1.0}, [*range(4, 25, 4), 32, 40, 48, 64, 96]),
        ({"every": 4, "end": 0.4}, [*range(4, 25, 4), 32]),
    ],
)
def test_the_interval_doubles_after_each_quarter_and_updates_stop_before_the_end(settings, expected):
    # Nothing is below the threshold, so each update doubles it.
    rows = Rows(method(**settings), [[1e30] * 4])
    updates, before = [], 1.0
    for step in range(1, 101):
        rows.step([0.0] * 4)
        if float(rows.parts[0].cut) != before:
            updates.append(step)
        before = float(rows.parts[0].cut)
    assert updates == expected
