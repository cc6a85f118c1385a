"""Test what a release consists of: metadata, CI for every Python it names, and no use of the network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import offline
from sparing import __version__

ROOT = Path(__file__).parent.parent

SESSION = """
from torch import nn
from sparing import GMP, export, report, sparsify_

model = nn.Sequential(nn.Linear(8, 4))
sparsify_(model, GMP(sparsity=0.5, begin=0, end=0))
report(model, (1, 8)).to_html()
export.openvino.save(model, "model.xml", (1, 8))
"""


def run(code, cwd):
    environment = offline.environment(cwd)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_an_attempt_to_use_the_network_is_seen(tmp_path):
    done = run("import urllib.request; urllib.request.urlopen('http://localhost:1')", tmp_path)
    assert "the network is forbidden" in done.stderr
    assert "localhost" in (tmp_path / "network.log").read_text()


@pytest.mark.slow
def test_the_package_makes_no_network_access(tmp_path):
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    done = run(SESSION, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.xml").exists()
    assert not (tmp_path / "network.log").exists(), (tmp_path / "network.log").read_text()


def test_ci_tests_every_python_that_the_metadata_name():
    project = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["run"]["strategy"]["matrix"]["python"] == pythons
    assert {job["python"] for job in jobs["versions"]["strategy"]["matrix"]["include"]} == set(pythons)
    assert f'requires-python = ">={pythons[0]}"' in project


def test_versions_are_equal():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f'"sparing-engine=={__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(f'^version = "{__version__}"', (ROOT / "wheels/engine/pyproject.toml").read_text(), re.MULTILINE)


def test_the_files_of_the_distributions_exist():
    included = re.search(r"^include = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name in ["src/sparing/py.typed", *re.findall(r'"(.+?)"', included[1])]:
        assert (ROOT / name).exists(), name
