"""The methods, one file each; their table, and how methods of other packages are found."""

import builtins  # `str` is a module of this package
from importlib.metadata import entry_points

from sparing.errors import InputError, nearest
from sparing.imports import import_object
from sparing.method import Method
from sparing.methods.acdc import ACDC
from sparing.methods.continuous_sparsification import ContinuousSparsification
from sparing.methods.dnw import DNW
from sparing.methods.dsr import DSR
from sparing.methods.dst import DST
from sparing.methods.feather import Feather
from sparing.methods.fixed_mask import FixedMask
from sparing.methods.gmp import GMP
from sparing.methods.grasp import GraSP
from sparing.methods.rigl import RigL
from sparing.methods.set import SET
from sparing.methods.snfs import SNFS
from sparing.methods.snip import SNIP
from sparing.methods.spartan import Spartan
from sparing.methods.st3 import ST3, ST3Sigma
from sparing.methods.static_random import StaticRandom
from sparing.methods.str import STR
from sparing.methods.str_feather import STRFeather
from sparing.methods.variational_dropout import VariationalDropout

__all__ = [
    "ACDC", "DNW", "DSR", "DST", "GMP", "METHODS", "SET", "SNFS", "SNIP", "ST3", "STR", "ContinuousSparsification",
    "Feather", "FixedMask", "GraSP", "RigL", "ST3Sigma", "STRFeather", "Spartan", "StaticRandom", "VariationalDropout",
    "find_method",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        STR, STRFeather, GMP, RigL, DNW, DSR, SET, SNFS, VariationalDropout, DST, ContinuousSparsification,
        StaticRandom, SNIP, GraSP, ST3, ST3Sigma, Feather, ACDC, Spartan, FixedMask,
    )
}  # fmt: skip
"""The methods by the name that recipes use."""


def find_method(name: builtins.str) -> type[Method]:
    """Return the method of a name: of `METHODS`, of the entry point group "sparing.methods", or an import path.

    A package offers a method under a name of its own with, in its pyproject.toml,
    `[project.entry-points."sparing.methods"]` and `top_kast = "my_package.methods:TopKAST"`.

    Args:
        name: such as "rigl", or "my_package.methods:TopKAST".

    Raises:
        InputError: there is no such method; the message names the nearest. The import fails, or gives no method.

    Examples:
        >>> find_method("sparing.methods.rigl:RigL") is find_method("rigl")
        True
    """
    if name in METHODS:
        return METHODS[name]
    offered = {point.name: point for point in entry_points(group="sparing.methods")}
    if name not in offered and ":" not in name:
        raise InputError(
            f"unknown method {name!r}; {nearest(name, [*METHODS, *offered])} (or an import path module:Class)"
        )
    path = f"{offered[name].module}:{offered[name].attr}" if name in offered else name
    found = import_object(path, "method")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"method {name!r} is {found!r}, which is not a subclass of sparing.Method")
    return found
