"""Fine-tuning: which layers are pruned, the units and the learning rate of learned thresholds, and what is warned of."""

import pytest
import torch
from torch import nn

import sparing
from sparing import STR, InputError, SparsityWarning


class Base(nn.Module):
    """As transformers has it: a backbone without a head, with a pooler."""

    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.embeddings, self.layer, self.pooler = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    @property
    def base_model(self):
        return getattr(self, self.base_model_prefix, self)

    def forward(self, ids):
        return self.pooler(self.layer(self.embeddings(ids)).mean(1))


class Classifier(nn.Module):
    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.base, self.classifier = Base(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    @property
    def base_model(self):
        return getattr(self, self.base_model_prefix, self)

    def forward(self, ids):
        return self.classifier(self.base(ids))


def selected(model, select=None):
    return list(sparing.sparsify_(model, STR(), select=select).layers)


def test_heads_and_poolers_of_transformers_models_are_left_out_by_default():
    # The head is small in most models; a large one is named.
    with pytest.warns(SparsityWarning, match="not selected by default: 'base.pooler' .*, 'classifier.0'"):
        assert selected(Classifier()) == ["base.layer"]
    with pytest.warns(SparsityWarning, match="'pooler'"):
        assert selected(Base()) == ["layer"]
    assert selected(Classifier(), sparing.select.excluding("*.nothing")) == ["base.layer"]
    assert selected(nn.ModuleDict({"model": Classifier()}), sparing.select.excluding()) == ["model.base.layer"]


def test_heads_are_chosen_by_name_or_predicate():
    assert selected(Classifier(), ["classifier.*", "base.pooler"]) == ["base.pooler", "classifier.0", "classifier.1"]
    everything = ["base.layer", "base.pooler", "classifier.0", "classifier.1"]
    assert selected(Classifier(), lambda name, module: isinstance(module, nn.Linear)) == everything
    assert selected(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))) == ["0", "1"]
