"""STR that is asked for a total: whether it gets there, and what it is worth beside other methods.

    python bench/target.py requests [--pairs ...]                        four networks and data sets, one seed
    python bench/target.py methods [--rows ...] [--percents 95 98 90] [--seeds 0 1 2]

Trains the recipes of recipes/targets/. `requests` asks each for 80, 90, 95 and 98 % of zeros, and for 20, 10 and
5 % of the dense MACs, and trains it dense. `methods` trains STR that is asked, STR as it is, ST-3 and Feather to
the same sparsity, on recipes/targets/resnet8-mnist5k.yaml. Each finished run is a file of
results/target/<pair>/ and is not trained again; one that was cut short goes on from its last epoch.
`python bench/results.py table` builds the tables of docs/methods/str.md.

STR as it is cannot be told a sparsity. DECAY has the weight decay on s that brings it near it, found by trial on
seed 0; where it lands with each seed is in the table.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ledger import CLIPPED, ROOT, train_into
from results import COMPARED, MACS_ASKED, PAIRS, ZEROS_ASKED

DECAY = {90: 0.0125, 95: 0.02, 98: 0.04}

# Row → the method at a percentage, and changes of the recipe beside it; `str_matched` depends on a run.
ROWS = {
    "dense": lambda percent: (None, []),
    "str_sparsity": lambda percent: ({"name": "str", "sparsity": percent / 100}, []),
    "str_macs": lambda percent: ({"name": "str", "macs": percent / 100}, []),
    "str": lambda percent: ({"name": "str", "init": -20.0}, [f"optimizer.threshold_weight_decay={DECAY[percent]}"]),
    "st3": lambda percent: ({"name": "st3", "sparsity": percent / 100}, []),
    "feather": lambda percent: ({"name": "feather", "sparsity": percent / 100}, []),
    "st3_as_released": lambda percent: ({"name": "st3", "sparsity": percent / 100, "every": 1}, CLIPPED),
    "feather_as_released": lambda percent: ({"name": "feather", "sparsity": percent / 100, "every": 1}, CLIPPED),
}


def sparsity_of_str(pair, percent, seed):
    """Where STR by weight decay landed: what STR is asked for to be compared with it at equal zeros."""
    entry = ROOT / "results" / "target" / pair / f"str-{percent}-seed{seed}.json"
    return json.loads(entry.read_text())["sparsity"]


def run(pair, row, percent, seed, out, console):
    """Train one, unless it is in the ledger."""
    name = f"{row}-seed{seed}" if row == "dense" else f"{row}-{percent}-seed{seed}"
    entry = ROOT / "results" / "target" / pair / f"{name}.json"
    if entry.is_file():
        return
    if row == "str_matched":
        method, changes = {"name": "str", "sparsity": sparsity_of_str(pair, percent, seed)}, []
    else:
        method, changes = ROWS[row](percent)
    metrics = train_into(
        entry,
        ROOT / "recipes" / "targets" / f"{pair}.yaml",
        [f"method={json.dumps(method)}", f"seed={seed}", *changes],
        out / pair / name,
        row=row,
        percent=0 if row == "dense" else percent,
        arguments=method,
        changes=changes,
    )
    console.print(
        f"{pair}, {name}: accuracy {100 * metrics['accuracy']:.2f} %, sparsity {100 * metrics['sparsity']:.2f} %, "
        f"MACs {100 * metrics['macs'] / metrics['dense_macs']:.3f} %, {metrics['seconds']:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True)
    requests = studies.add_parser("requests")
    requests.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    methods = studies.add_parser("methods")
    methods.add_argument("--rows", nargs="+", default=list(COMPARED), choices=list(COMPARED))
    methods.add_argument("--percents", type=int, nargs="+", default=[95, 98, 90], choices=list(DECAY))
    methods.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for study in (requests, methods):
        study.add_argument("--out", type=Path, default=ROOT / "runs" / "target")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    if options.study == "requests":
        asked = [("dense", 0)]
        asked += [("str_sparsity", percent) for percent in ZEROS_ASKED] + [("str_macs", each) for each in MACS_ASKED]
        for pair in options.pairs:
            for row, percent in asked:
                run(pair, row, percent, 0, options.out, console)
        return
    for seed in options.seeds:
        for percent in options.percents:
            for row in options.rows:
                run("resnet8-mnist5k", row, percent, seed, options.out, console)


if __name__ == "__main__":
    main()
