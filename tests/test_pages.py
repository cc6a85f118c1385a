"""Run what takes too long for the test suite: the notebook, the pages of frameworks, and the shell lines of all pages.

make test-slow runs them.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import test_documents as documents

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"^(?:\w+=\S* )*(?:sparing|torchrun|python|bash) ")
NOT_RUN = {
    "^torchrun |imagenet|/data/|LOC_val_solution": "needs ImageNet or several GPUs",
    "^python bench/": "measures for a long time",
    "recipes/rnn|recipes/targets|recipes/mnist/|fashion-mnist": "needs data from the network, or trains for long",
    "sparing sweep": "tests/test_sweep.py runs short sweeps",
    "sparing bench": "tests/test_cli.py runs a short one",
    "ResNet50-STR": "needs a file of the 2020 release",
    r"\b[A-Z]{3,}\b(?!=)|\.\.\.": "has placeholders",
}
"""Lines that tests/test_documents.py parses, but that are not run: what they contain → why."""
SHORT = ["schedule.epochs=1", "schedule.warmup_epochs=0", "model.width=4", "channels_last=false", "data.batch_size=100"]
"""Settings of runs on the digits that take seconds."""
DEMO = "sparing train recipes/mnist5k/demo.yaml --out runs/demo"


def lines(text):
    """Yield the shell lines of a page, of its blocks and of its indented paragraphs."""
    blocks = [block for language, block in documents.FENCE.findall(text) if language in ("bash", "sh")]
    for block in [*blocks, *documents.INDENTED.findall(documents.FENCE.sub("", text))]:
        for line in block.splitlines():
            line = shlex.join(shlex.split(line, comments=True)) if COMMAND.match(line) else ""
            if line and not any(re.search(pattern, line) for pattern in NOT_RUN):
                yield line


SHELL_PAGES = [page for page in documents.PAGES if any(lines(page.read_text()))]


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Return a function that runs a shell line, once, in a folder with recipes, examples and a short run."""
    folder, done = prepared(tmp_path_factory.mktemp("shell")), set()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(line):
        if line.startswith("sparing train recipes/mnist5k"):
            line += "".join(f" --set {change}" for change in SHORT)
        if line not in done:
            environment = {**os.environ, "PATH": path}
            made = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
            assert made.returncode == 0, f"{line}\n{made.stdout}\n{made.stderr}"
        done.add(line)

    run(DEMO)
    return run


def prepared(folder):
    """Link the recipes and examples into a folder, in which a page may write."""
    for name in ("recipes", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.xdist_group("shell")
@pytest.mark.parametrize("page", SHELL_PAGES, ids=documents.page_name)
def test_shell_lines_run(page, shell):
    for line in lines(page.read_text()):
        shell(line)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Work in such a folder, as the only rank of a process group."""
    monkeypatch.chdir(prepared(tmp_path))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("vision_operators")
@pytest.mark.parametrize("page", documents.SLOW_PAGES, ids=documents.page_name)
def test_python_blocks_of_slow_pages_run(page, place):
    documents.run_blocks(page)


def test_the_notebook_runs(place):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "save the notebook without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": place}}).execute()
    shown = [output.get("data", {}).keys() for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [sum(kind in keys for keys in shown) for kind in ("text/html", "image/png")] == [1, 2]
