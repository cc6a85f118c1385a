"""What the benchmarks that train share: a run into a directory, and its numbers into results/."""

import json
from pathlib import Path

from rich.console import Console

from sparing.files import write_text
from sparing.train.recipe import load_recipe
from sparing.train.run import train_run

ROOT = Path(__file__).parent.parent

CLIPPED = ["clip_grad_norm=3.0"]
"""The codes of ST-3 and of Feather clip gradients at this norm, and renew the threshold at every step."""


def train_into(entry, recipe, overrides, run, **facts):
    """Train a recipe, or take the run that is finished, and write a ledger entry.

    Args:
        entry: the JSON file to write.
        recipe: the file of the recipe.
        overrides: `key=value` for it.
        run: the run directory; continued if it is there.
        facts: more to say in the entry.

    Returns:
        What was written: recipe and facts, the metrics, the sparsity of each layer.
    """
    metrics = train_run(load_recipe(recipe, overrides), run, resume=True, console=Console(quiet=True))
    layers = json.loads((Path(run) / "report.json").read_text())["layers"]
    content = {
        "recipe": str(Path(recipe).relative_to(ROOT)),
        **facts,
        **metrics,
        "budget": {layer["name"]: layer["sparsity"] for layer in layers},
    }
    entry.parent.mkdir(parents=True, exist_ok=True)
    write_text(entry, json.dumps(content, indent=2) + "\n")
    return content
