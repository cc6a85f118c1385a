"""The rules of docs/architecture.md: which room may import which, and what an import may do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "sparing"

# Room → rooms it may import from. A room is a file, or a folder, of the package.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "imports": {"errors"},
    "published": set(),
    "schedules": {"errors"},
    "decay": {"errors", "threshold"},
    "masks": {"errors"},
    "optimizers": {"errors"},
    "operators": {"errors"},
    "sharding": set(),
    "threshold": {"errors", "operators"},
    "effective_weight": {"errors"},
    "run_state": {"effective_weight", "errors", "sharding"},
    "group_threshold": {"operators", "threshold"},
    "parametrizations": {"errors", "operators", "run_state", "threshold"},
    "layers": {"errors", "parametrizations", "sharding"},
    "select": {"errors", "layers"},
    "register": {"effective_weight", "errors", "layers", "run_state", "sharding"},
    "patterns": {"errors", "group_threshold", "layers", "masks"},
    "budget": {"errors", "files", "layers"},
    "origins": {"layers"},
    "products": {"errors", "layers", "origins"},
    "macs": {"errors", "layers", "products", "sharding"},
    "macs_target": {"errors", "layers", "macs", "patterns"},
    "allocation": {"budget", "errors", "group_threshold", "layers", "macs_target", "masks", "patterns"},
    "calibrate": {"errors", "layers", "macs", "patterns", "sharding"},
    "param_groups": {"errors", "layers", "parametrizations"},
    "method": {"allocation", "budget", "errors", "layers", "parametrizations", "patterns", "schedules"},
    "missed": {"errors", "layers", "parametrizations"},
    "goal": {"errors", "layers", "method", "missed", "parametrizations", "patterns", "sharding"},
    "attachment": {"errors", "layers", "method", "optimizers", "sharding"},
    "hooks": {"optimizers"},
    "sparsifier": {
        "attachment", "errors", "goal", "hooks", "layers", "method", "missed", "optimizers", "parametrizations",
        "schedules",
    },
    "pretrained": {"errors", "layers"},
    "sparsify": {
        "errors", "goal", "layers", "method", "missed", "pretrained", "register", "schedules", "select", "sparsifier",
    },
    "dense": {"errors", "goal", "layers", "parametrizations", "sharding"},
    "growing": {
        "allocation", "budget", "goal", "layers", "masks", "method", "optimizers", "parametrizations", "patterns",
        "schedules", "sparsifier",
    },
    "thresholding": {
        "allocation", "budget", "errors", "layers", "macs", "macs_target", "method", "parametrizations", "patterns",
        "sparsifier",
    },
    "target": {
        "budget", "errors", "goal", "layers", "macs", "macs_target", "masks", "method", "parametrizations", "patterns",
        "schedules",
    },
    "methods": {
        "allocation", "budget", "decay", "errors", "group_threshold", "growing", "imports", "layers", "macs", "masks",
        "method", "operators", "optimizers", "parametrizations", "patterns", "schedules", "sparsifier", "target",
        "threshold", "thresholding",
    },
    "page": {"files"},
    "report": {"errors", "files", "layers", "macs", "missed", "page", "products"},
    "integrations": {"errors", "files", "layers", "method", "report", "select", "sparsifier", "sparsify"},
    "plots": {"report"},
    "rnn": {"errors", "layers", "operators", "register", "select", "sparsify"},
    "models": {"errors", "rnn"},
    "data": {"errors", "files"},
    "export": {"errors", "files", "layers", "macs", "models", "rnn", "select", "sparsify", "threshold"},
    "engine": {"errors", "export", "files"},
    "formats": {"engine", "errors", "export", "files", "sparsify"},
    "latency": {"engine", "errors", "export", "layers"},
    "run": {
        "budget", "data", "errors", "export", "files", "formats", "imports", "integrations", "latency", "layers",
        "macs", "method", "methods", "models", "page", "param_groups", "patterns", "plots", "report", "rnn",
        "schedules", "sparsifier", "sparsify",
    },
    "tables": {
        "budget", "errors", "export", "files", "latency", "layers", "macs", "masks", "method", "methods", "models",
        "run",
    },
    "cli": {"budget", "errors", "export", "files", "formats", "methods", "run", "tables"},
    "__main__": {"cli"},
}  # fmt: skip
OUTSIDE_THE_CORE = {
    "integrations",
    "plots",
    "data",
    "export",
    "engine",
    "formats",
    "latency",
    "run",
    "tables",
    "cli",
    "__main__",
}


def room(path):
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(path):
    """Every module a file imports, wherever in the file, but for the imports of annotations alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        assert not getattr(node, "level", 0), f"{path}: relative import"
        yield from modules(node)


def modules(node):
    """The modules that a statement imports; none if it is no import."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module
        if node.module == "sparing":
            yield from (f"sparing.{alias.name}" for alias in node.names)


FILES = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_go_one_way(path):
    here = room(path)
    for module in imported(path):
        parts = module.split(".")
        if parts[0] != "sparing" or len(parts) == 1:
            continue
        there = parts[1]
        if there == here:
            inside = here == "methods" and path.name != "__init__.py"
            assert not inside, f"{path.name}: methods never import one another"
            continue
        if there not in MAY_IMPORT:
            continue  # a name of the package itself, such as __version__
        assert there in MAY_IMPORT[here], f"{here} must not import {there}"


def test_every_room_has_a_rule_and_a_line_in_the_plan():
    rooms = {room(path) for path in FILES}
    assert rooms == set(MAY_IMPORT)
    plan = (ROOT / "docs" / "architecture.md").read_text()
    for name in rooms:
        assert re.search(rf"\b{name}(\.py|/)", plan), f"docs/architecture.md does not name {name}"


CORE_FILES = [path for path in FILES if room(path) not in OUTSIDE_THE_CORE]


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_the_core_needs_torch_alone(path):
    for module in imported(path):
        top = module.split(".")[0]
        allowed = {"sparing", "torch", "safetensors", "jinja2", *sys.stdlib_module_names}
        assert top in allowed, f"{path.name}: {module}"


# What not every machine has, and who may import it: inside of functions, so that the rest works without.
WHERE_NEEDED = {
    "torchvision": {"data/pictures.py", "data/folders.py"},  # its operators do not load on a CPU-only torch
    "webdataset": set(),
    "torchaudio": set(),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_what_may_not_load_is_imported_where_it_is_needed(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        for module in modules(node):
            top = module.split(".")[0]
            if top in WHERE_NEEDED:
                assert path.relative_to(SOURCE).as_posix() in WHERE_NEEDED[top], f"{path.name} imports {module}"
                assert node in inside, f"{path.name} imports {module} outside of a function"


LEAN = """
import sys
import torch
before = set(sys.modules)
sys.argv = None  # whoever reads it fails
def refuse(*args, **kwargs):
    raise AssertionError("import sparing touched CUDA")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
import sparing
new = {name.split(".")[0] for name in set(sys.modules) - before}
extra = {name for name in new if name not in sys.stdlib_module_names} - {"sparing", "torch", "safetensors"}
assert not extra, extra
heavy = {"torch._dynamo", "torch._inductor", "torch.onnx"} & (set(sys.modules) - before)
assert not heavy, heavy
"""


def test_import_is_lean_and_without_side_effects():
    subprocess.run([sys.executable, "-W", "error", "-c", LEAN], check=True)


def test_the_files_a_newcomer_reads_are_short():
    lines = [
        len((SOURCE / name).read_text().splitlines()) for name in ("threshold.py", "sparsify.py", "methods/str.py")
    ]
    assert sum(lines) <= 450, lines


def test_readme_is_short_and_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert "make demo" in readme
    assert "make test" in readme


def test_the_tables_are_built_from_the_ledger(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    source = (ROOT / "bench" / "results.py").read_text()
    namespace = {"__file__": str(ROOT / "bench" / "results.py"), "__name__": "results"}
    exec(compile(source, "results.py", "exec"), namespace)
    for page in namespace["PAGES"]:
        text = (ROOT / page).read_text()
        assert "built by bench/results.py" in text
        assert namespace["filled"](text) == text, "run python bench/results.py table"
    assert list(ROOT.joinpath("results").rglob("*.json"))
