"""Models of timm, which a recipe names "timm/NAME", such as "timm/resnet50d". Requires timm."""

from collections.abc import Callable
from typing import Any

from torch import nn

from sparing.errors import InputError, nearest

PREFIX = "timm/"


def timm_model(path: str) -> Callable[..., nn.Module]:
    """Return the function that builds a model of timm.

    Args:
        path: "timm/" and a name of `timm.list_models()`, with the tag of pretrained weights or without.

    Returns:
        A function of `num_classes`, `in_channels` and the other arguments of `timm.create_model`. Only
        `pretrained=True` uses the network.

    Raises:
        InputError: timm cannot be imported, or has no such model.
    """
    try:
        import timm
    except ImportError as error:
        raise InputError(f"model {path!r} needs timm, which cannot be imported: {error}; pip install timm") from error
    except Exception as error:  # timm imports torchvision, which raises a RuntimeError if it does not fit torch
        raise InputError(
            f"model {path!r} needs timm, which cannot be imported: {error}; install a torchvision that was built for "
            "this build of torch"
        ) from error
    name = path.removeprefix(PREFIX)
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}; {nearest(name, timm.list_models())}")

    def build(num_classes: int, in_channels: int = 3, **arguments: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **arguments)
        return model

    return build
