"""Read the entries of results/, and write them as cells and notes of tables, for bench/results.py."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def grouped(folder, *keys, pattern="*.json"):
    """Return the entries of a folder of results/ in groups, in order of their names: values of the keys → entries."""
    groups = {}
    for path in sorted((RESULTS / folder).glob(pattern)):
        entry = json.loads(path.read_text())
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return groups


def spread(values, scale=1.0, form=".2f"):
    """Return the mean as text, with the standard deviation if the values differ."""
    mean = f"{scale * statistics.mean(values):{form}}"
    return mean if len(set(values)) == 1 else f"{mean} ± {scale * statistics.stdev(values):{form.lstrip('+')}}"


def points_apart(entries, others):
    """Return the difference in accuracy, in percentage points, between runs with the same seeds, as text."""
    mine, theirs = ({entry["seed"]: entry["accuracy"] for entry in group} for group in (entries, others))
    points = [100 * (mine[seed] - theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    return spread(points, form="+.2f") if points else "not run"


def number_of_seeds(groups):
    """Return how many runs the cells of a table have, as text: "1 seed", "3 seeds", "2 to 3 seeds"."""
    counts = sorted({len(group) for group in groups if group}) or [0]
    fewest, most = counts[0], counts[-1]
    return f"{f'{fewest} to ' if fewest < most else ''}{most} seed{'s' * (most != 1)}"


def ran_on(entries):
    """Return the machines and commits of runs as text."""
    machines = {f"{e['device']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}" for e in entries}
    commits = sorted({(e["commit"] or "none")[:7] for e in entries})
    return f"{'; '.join(sorted(machines))}; commit {', '.join(commits)}"
