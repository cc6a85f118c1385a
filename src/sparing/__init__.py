"""sparing: neural networks that learn how much of themselves to keep."""

from sparing import models, select
from sparing.budget import Budget
from sparing.errors import CheckpointError, InputError, SparsityWarning
from sparing.macs import count_uses
from sparing.methods import GMP, METHODS, STR, RigL
from sparing.optim import param_groups
from sparing.parametrizations import SoftThreshold, Sparse
from sparing.report import Report, report
from sparing.sparsify import Method, Sparsifier, dense_state_dict, densify_, sparse_layers, sparsify_
from sparing.threshold import soft_threshold

__version__ = "0.1.0"

__all__ = [
    "GMP",
    "METHODS",
    "STR",
    "Budget",
    "CheckpointError",
    "InputError",
    "Method",
    "Report",
    "RigL",
    "SoftThreshold",
    "Sparse",
    "Sparsifier",
    "SparsityWarning",
    "count_uses",
    "dense_state_dict",
    "densify_",
    "models",
    "param_groups",
    "report",
    "select",
    "soft_threshold",
    "sparse_layers",
    "sparsify_",
]
