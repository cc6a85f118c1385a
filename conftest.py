"""Names that the examples in docstrings may use."""

import pytest
import torch
from torch import nn

import sparing


@pytest.fixture(autouse=True)
def _docstring_names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=nn, sparing=sparing)
    doctest_namespace.update({name: getattr(sparing, name) for name in sparing.__all__})
