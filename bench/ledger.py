"""Write results, of trained recipes and of measurements, into results/."""

import json
import os
import subprocess
from pathlib import Path

from sparing.files import write_text

ROOT = Path(__file__).parent.parent

CLIPPED = ["clip_grad_norm=3.0"]
"""Recipe changes for ST-3 and Feather: the authors' code clips gradients at this norm."""


def commit():
    """Return the commit of the working tree, or SPARING_COMMIT where there is no git; None if neither is known."""
    ran = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return os.environ.get("SPARING_COMMIT") or ran.stdout.strip() or None


def write_entry(path, content):
    """Write a result as JSON, and the folders around it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def train_into(entry, recipe, overrides, run, **facts):
    """Train a recipe, unless the run is finished already, and write an entry of results/.

    Args:
        entry: the JSON file to write.
        recipe: the recipe file.
        overrides: changes of the recipe, `key=value`.
        run: the run directory; if it contains an unfinished run, the run is continued.
        facts: additional keys of the entry.

    Returns:
        The entry: recipe and facts, metrics, sparsity per layer.
    """
    from rich.console import Console

    from sparing.run.recipe import load_recipe
    from sparing.run.training import train_run

    metrics = train_run(load_recipe(recipe, overrides), run, resume=True, console=Console(quiet=True))
    layers = json.loads((Path(run) / "report.json").read_text())["layers"]
    content = {
        "recipe": str(Path(recipe).relative_to(ROOT)),
        **facts,
        **metrics,
        "budget": {layer["name"]: layer["sparsity"] for layer in layers},
    }
    write_entry(entry, content)
    return content
