"""Compare learned and fixed low ranks of the same size in FastGRNN.

    python bench/rnn_ranks.py [--data watch har2 spoken_digits] [--seeds 0 1 2] [--root har2=PATH ...] [--until HH:MM]

For each data set and seed, the study trains a network of full rank and, for each weight decay of the thresholds in
DECAYS, a network with learned ranks and two networks with the same ranks, fixed. `fixed` starts from small random
factors, as in EdgeML. `fixed_svd` starts from the largest singular values of the matrix from which the learned ranks
start; this separates the effect of learning ranks from that of the initialization. All settings except UNITS are those
of recipes/rnn/<data>.yaml. The kinds of runs that the paper has come first, for all seeds; `fixed_svd` comes last.

Every run writes results/rnn/<data>/<kind>-seed<n>.json and is not repeated if that file exists, so an interrupted
study continues where it stopped. `bench/results.py table` builds the table of docs/rnn.md.
"""

import argparse
import json
import tempfile
from datetime import datetime
from pathlib import Path

from rich.console import Console

from ledger import ROOT, write_entry
from sparing.run.build import build_data
from sparing.run.recipe import load_recipe
from sparing.run.training import train_run

UNITS = 32
DECAYS = (0.4, 0.6, 1.0)
DENSE = ["method=null", "select=null"]
SMALL_RANDOM = [*DENSE, "model.learned_rank=false"]


def run(data, kind, seed, changes, root, console):
    """Return the results of a run; train it first if it has none."""
    entry_path = ROOT / "results" / "rnn" / data / f"{kind}-seed{seed}.json"
    if entry_path.is_file():
        return json.loads(entry_path.read_text())
    path = ROOT / "recipes" / "rnn" / f"{data}.yaml"
    where = [f"data.root={json.dumps(root)}"] if root else []
    recipe = load_recipe(path, [*changes, f"model.hidden_size={UNITS}", f"seed={seed}", "tensorboard=false", *where])
    sizes = {part: build_data(recipe.data).size(part) for part in ("train", "validation", "test")}
    with tempfile.TemporaryDirectory() as folder:
        metrics = train_run(recipe, Path(folder) / "run", console=Console(quiet=True))
    entry = {"recipe": str(path.relative_to(ROOT)), "kind": kind, "changes": changes, "examples": sizes, **metrics}
    write_entry(entry_path, entry)
    found = "/".join(str(row["rank"]) for row in metrics["weight_ranks"].values())
    console.print(
        f"{data} {kind} seed {seed}: {100 * metrics['accuracy']:.2f} %, ranks {found}, {metrics['seconds']:.0f} s"
    )
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["watch", "har2", "spoken_digits"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", nargs="+", default=[], metavar="DATA=PATH", help="folder of a data set")
    parser.add_argument("--until", metavar="HH:MM", help="start no run after this time")
    options = parser.parse_args()
    roots = dict(pair.split("=", 1) for pair in options.root)
    console = Console(highlight=False, soft_wrap=True)

    def over():
        return options.until is not None and datetime.now().strftime("%H:%M") >= options.until

    def train(data, kind, seed, changes):
        return run(data, kind, seed, changes, roots.get(data), console)

    for kind, start in (("fixed", SMALL_RANDOM), ("fixed_svd", DENSE)):
        for seed in options.seeds:
            for data in options.data:
                if not over():
                    train(data, "full", seed, SMALL_RANDOM)
                for decay in DECAYS:
                    if over():
                        return
                    learned = train(data, f"learned-{decay}", seed, [f"optimizer.threshold_weight_decay={decay}"])
                    found = {name.rsplit(".", 1)[1]: row["rank"] for name, row in learned["weight_ranks"].items()}
                    fixed = [f"model.{part}_rank={rank}" for part, rank in found.items()]
                    train(data, f"{kind}-{decay}", seed, [*start, *fixed])


if __name__ == "__main__":
    main()
