"""Checkpoints of Hugging Face models, which are read by `from_pretrained` into a model that is not sparsified.

`save_pretrained` writes the state dict of a model, and `transformers.Trainer` calls it at every checkpoint. The keys of
parametrizations mean nothing to `from_pretrained`: it would ignore them and initialize the weights at random. Therefore
the state dict of such a model also has the effective weights, under the plain keys. Loading ignores them where the
layer is sparsified.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.layers import Layer


def check_saved(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Check that `from_pretrained` of the model will find the effective weights of the layers.

    Raises:
        InputError: it looks for the parameters from which another parametrization computes a weight.
    """
    computed = [name for name, layer in layers.items() if not isinstance(layer.weight, nn.Parameter)]
    if computed and _is_pretrained(model):
        raise InputError(
            f"another parametrization computes the weight of layer {computed[0]!r}, and from_pretrained() would load "
            "it without the zeros: leave the layer out with select="
        )


def save_effective_weights(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Add the effective weights to the state dict of a model that has `save_pretrained`; leave others as they are."""
    if _is_pretrained(model):
        for layer in layers.values():
            for place in layer.places:
                _add_plain_keys(type(place.module))


def _is_pretrained(model: nn.Module) -> bool:
    return any(hasattr(module, "save_pretrained") for module in model.modules())


def _add_plain_keys(parametrized: Any) -> None:
    """Change the class of a parametrized module, which `densify_` takes off again."""
    if "_save_to_state_dict" in vars(parametrized):
        return
    save, load = parametrized._save_to_state_dict, parametrized._load_from_state_dict

    def save_both(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        save(self, destination, prefix, keep_vars)
        with torch.no_grad():  # methods that train with noise give the weight of evaluation
            destination.update({prefix + name: Tensor.detach(getattr(self, name)) for name in self.parametrizations})

    def load_dense(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self.parametrizations:
            if f"{prefix}parametrizations.{name}.original" in state_dict:
                state_dict.pop(prefix + name, None)
        load(self, state_dict, prefix, *args)

    parametrized._save_to_state_dict, parametrized._load_from_state_dict = save_both, load_dense
