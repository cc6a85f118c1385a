"""The effective weight as a layer hands it out: it is read as any tensor, and writing into it raises.

It is computed anew at every use, so whatever is written into it is lost: by `nn.init`, by a merge of adapters into
`layer.weight.data`, or by an assignment to some of its elements.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparing.errors import InputError, UnpicklableError

_VIEWS = (
    "__getitem__", "as_strided", "chunk", "diagonal", "dsplit", "expand", "expand_as", "flatten", "hsplit", "movedim",
    "moveaxis", "narrow", "permute", "ravel", "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze",
    "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze",
    "unsafe_chunk", "unsafe_split", "view", "view_as", "vsplit",
)  # fmt: skip
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_NO_WRITES = ("requires_grad_",)


class EffectiveWeight(Tensor):
    """A tensor that refuses to be changed in place; so do its views. What is computed from it is a plain tensor.

    Raises:
        InputError: something is written into it.

    Examples:
        >>> layer = nn.Linear(4, 2)
        >>> _ = sparsify_(layer, STR(init=-5.0))
        >>> type(layer.weight).__name__, type(2 * layer.weight).__name__
        ('EffectiveWeight', 'Tensor')
    """

    # The operations of torch are those of a plain tensor, at their speed.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The tensor without its history, which refuses changes as well."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        refuse_write(self, "assigning .data")

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are recorded; set it on the parameter that the weight is computed from."""
        return Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        refuse_write(self, "assigning .requires_grad")

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if self.grad_fn is not None and not requires_grad:
            refuse_write(self, "requires_grad_(False)")
        return super().requires_grad_(requires_grad)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        if self.grad_fn is not None:
            raise InputError(
                "a hook on the effective weight of a sparsified layer would be lost, because that is computed anew at "
                "every use: register it on the dense weight, sparing.sparse_layers(model)[name].weight"
            )
        return super().register_hook(hook)

    register_post_accumulate_grad_hook = register_hook

    T = property(lambda self: guarded(Tensor.T.__get__(self)))  # type: ignore[attr-defined]
    mT = property(lambda self: guarded(Tensor.mT.__get__(self)))  # type: ignore[attr-defined]  # noqa: N815

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def detach(self) -> Tensor:
        return guarded(super().detach())

    # Copies, files and parameters made of it are plain.

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param":  # nn.Parameter() has detached a tensor, and says that this is now a parameter
            self.__class__ = nn.Parameter  # type: ignore[assignment]
        elif name == "grad" and value is not None:
            refuse_write(self, "assigning .grad")
        else:
            super().__setattr__(name, value)


def guarded(effective: Tensor) -> Tensor:
    """Make a new tensor an `EffectiveWeight`; one of another class, such as a sharded one, stays as it is."""
    if type(effective) is Tensor and not torch.compiler.is_compiling():
        effective.__class__ = EffectiveWeight
    return effective


def refuse_write(tensor: Tensor, what: str) -> NoReturn:
    """Raise the error for a write into an effective weight."""
    raise InputError(
        f"{what} would write into the effective weight of a sparsified layer, of shape {tuple(tensor.shape)}, which is "
        "computed anew at every use: initialize weights before sparsify_(), call densify_() first, or change the dense "
        "weight, sparing.sparse_layers(model)[name].weight. sparing.merge_() adds an update of low rank, and "
        "load_dense_state_dict() loads a checkpoint"
    )


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Raise the error for pickling a module whose class torch has replaced by one of its own."""
    raise UnpicklableError(
        f"a sparsified or factorized {type(module).__bases__[0].__name__} cannot be pickled, as torch.save(model), "
        "copy.copy() and the start of another process do: save model.state_dict(), or call sparing.densify_(model) or "
        "sparing.rnn.compact_(model) first"
    )


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        refuse_write(self, f"{name}()")

    return method


def _guarding(name: str) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = getattr(super(EffectiveWeight, self), name)(*args, **kwargs)
        return guarded(result) if isinstance(result, Tensor) else tuple(map(guarded, result))

    return method


for _name in dir(Tensor):
    if _name.endswith("_") and not _name.startswith("_") and _name not in _NO_WRITES:
        setattr(EffectiveWeight, _name, _refusing(_name))
for _name in ("__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)):
    setattr(EffectiveWeight, _name, _refusing(_name))
for _name in _VIEWS:
    setattr(EffectiveWeight, _name, _guarding(_name))
