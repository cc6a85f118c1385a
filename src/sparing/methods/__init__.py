"""The methods, one file each."""

from sparing.methods.acdc import ACDC
from sparing.methods.continuous_sparsification import ContinuousSparsification
from sparing.methods.dnw import DNW
from sparing.methods.dsr import DSR
from sparing.methods.dst import DST
from sparing.methods.feather import Feather
from sparing.methods.gmp import GMP
from sparing.methods.grasp import GraSP
from sparing.methods.registry import METHODS, find_method
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
    "Feather", "GraSP", "RigL", "ST3Sigma", "STRFeather", "Spartan", "StaticRandom", "VariationalDropout",
    "find_method",
]  # fmt: skip
