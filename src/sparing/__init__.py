"""sparing: sparse training with learned per-layer sparsity."""

from sparing import engine, export, models, rnn, select
from sparing.budget import Budget
from sparing.calibrate import calibrate
from sparing.dense import load_dense_state_dict, merge_
from sparing.errors import CheckpointError, InputError, SparsityWarning
from sparing.layers import sparse_layers
from sparing.macs import count_applications
from sparing.method import Method, Ranking
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
    FixedMask,
    GraSP,
    RigL,
    Spartan,
    ST3Sigma,
    StaticRandom,
    STRFeather,
    VariationalDropout,
    find_method,
)
from sparing.param_groups import param_groups
from sparing.parametrizations import SoftThreshold, Sparse
from sparing.patterns import NM, Block, Filters, Pattern, Unstructured
from sparing.report import Report, report
from sparing.sparsifier import Sparsifier
from sparing.sparsify import dense_state_dict, densify_, sparsify_
from sparing.threshold import soft_threshold

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "DNW",
    "DSR",
    "DST",
    "GMP",
    "METHODS",
    "NM",
    "SET",
    "SNFS",
    "SNIP",
    "ST3",
    "STR",
    "Block",
    "Budget",
    "CheckpointError",
    "ContinuousSparsification",
    "Feather",
    "Filters",
    "FixedMask",
    "GraSP",
    "InputError",
    "Method",
    "Pattern",
    "Ranking",
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
    "Unstructured",
    "VariationalDropout",
    "calibrate",
    "count_applications",
    "dense_state_dict",
    "densify_",
    "engine",
    "export",
    "find_method",
    "load_dense_state_dict",
    "merge_",
    "models",
    "param_groups",
    "report",
    "rnn",
    "select",
    "soft_threshold",
    "sparse_layers",
    "sparsify_",
]
