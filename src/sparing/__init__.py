"""sparing: neural networks that learn how much of themselves to keep."""

from sparing import export, models, rnn, select
from sparing.budget import Budget
from sparing.errors import CheckpointError, InputError, SparsityWarning
from sparing.macs import count_uses
from sparing.methods import (
    ACDC,
    DNW,
    DSR,
    DST,
    GMP,
    METHODS,
    SET,
    SNFS,
    SNIP,
    ST3,
    STR,
    ContinuousSparsification,
    Feather,
    GlobalMagnitude,
    GlobalMagnitudeOneShot,
    GraSP,
    Magnitude,
    RigL,
    Spartan,
    ST3Sigma,
    StaticRandom,
    STRFeather,
    VariationalDropout,
)
from sparing.param_groups import param_groups
from sparing.parametrizations import SoftThreshold, Sparse
from sparing.report import Report, report
from sparing.sparsify import Method, Sparsifier, dense_state_dict, densify_, sparse_layers, sparsify_
from sparing.threshold import soft_threshold

__version__ = "0.1.0"

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
    "Budget",
    "CheckpointError",
    "ContinuousSparsification",
    "Feather",
    "GlobalMagnitude",
    "GlobalMagnitudeOneShot",
    "GraSP",
    "InputError",
    "Magnitude",
    "Method",
    "Report",
    "RigL",
    "ST3Sigma",
    "STRFeather",
    "SoftThreshold",
    "Sparse",
    "Sparsifier",
    "SparsityWarning",
    "Spartan",
    "StaticRandom",
    "VariationalDropout",
    "count_uses",
    "dense_state_dict",
    "densify_",
    "export",
    "models",
    "param_groups",
    "report",
    "rnn",
    "select",
    "soft_threshold",
    "sparse_layers",
    "sparsify_",
]
