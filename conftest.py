"""What the examples in docstrings need, and the library of the engine."""

import pytest
import torch
from torch import nn

import sparing
from sparing.engine.library import library

# These modules import their frameworks, and torchvision with them, which fails without the fixture `vision_operators`.
collect_ignore_glob = ["src/sparing/integrations/*"]


@pytest.fixture(autouse=True)
def _docstring_names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=nn, sparing=sparing)
    doctest_namespace.update({name: getattr(sparing, name) for name in sparing.__all__})


@pytest.fixture(scope="session")
def engine_library():
    """Compile the library of the engine. Skip the test where that is impossible."""
    try:
        library()
    except sparing.InputError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _docstring_surroundings(request):
    """Let examples write files, and compile networks."""
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
        if "engine" in request.path.parts:
            request.getfixturevalue("engine_library")
