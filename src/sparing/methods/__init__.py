"""The methods, one file each, and the one table of them: METHODS, from the name a recipe uses to the class."""

from sparing.methods.acdc import ACDC
from sparing.methods.continuous_sparsification import ContinuousSparsification
from sparing.methods.dnw import DNW
from sparing.methods.dsr import DSR
from sparing.methods.dst import DST
from sparing.methods.feather import Feather
from sparing.methods.global_magnitude import GlobalMagnitude
from sparing.methods.global_magnitude_one_shot import GlobalMagnitudeOneShot
from sparing.methods.gmp import GMP
from sparing.methods.grasp import GraSP
from sparing.methods.magnitude import Magnitude
from sparing.methods.rigl import RigL
from sparing.methods.set import SET
from sparing.methods.snfs import SNFS
from sparing.methods.snip import SNIP
from sparing.methods.spartan import Spartan
from sparing.methods.st3 import ST3
from sparing.methods.st3_sigma import ST3Sigma
from sparing.methods.static_random import StaticRandom
from sparing.methods.str import STR
from sparing.methods.str_feather import STRFeather
from sparing.methods.variational_dropout import VariationalDropout

# No annotation: in this namespace `str` is the submodule.
METHODS = {
    method.name: method
    for method in (
        STR,
        STRFeather,
        GMP,
        RigL,
        DNW,
        DSR,
        SET,
        SNFS,
        VariationalDropout,
        DST,
        ContinuousSparsification,
        Magnitude,
        GlobalMagnitude,
        GlobalMagnitudeOneShot,
        StaticRandom,
        SNIP,
        GraSP,
        ST3,
        ST3Sigma,
        Feather,
        ACDC,
        Spartan,
    )
}

__all__ = [
    "ACDC",
    "DNW",
    "DSR",
    "DST",
    "GMP",
    "METHODS",
    "SET",
    "SNFS",
    "SNIP",
    "ST3",
    "STR",
    "ContinuousSparsification",
    "Feather",
    "GlobalMagnitude",
    "GlobalMagnitudeOneShot",
    "GraSP",
    "Magnitude",
    "RigL",
    "ST3Sigma",
    "STRFeather",
    "Spartan",
    "StaticRandom",
    "VariationalDropout",
]
