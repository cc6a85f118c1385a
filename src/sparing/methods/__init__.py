"""The methods, one file each, and the one table of them: METHODS, from the name a recipe uses to the class."""

from sparing.methods.gmp import GMP
from sparing.methods.rigl import RigL
from sparing.methods.str import STR

# No annotation: in this namespace `str` is the submodule.
METHODS = {method.name: method for method in (STR, GMP, RigL)}

__all__ = ["GMP", "METHODS", "STR", "RigL"]
