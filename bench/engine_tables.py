"""Tables of the results of bench/engine.py, for bench/results.py."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results" / "engine"
FP32 = ("MNN dense", "ONNX Runtime", "OpenVINO fp32", "torch eager", "torch compiled")
RIVALS = (*FP32, "OpenVINO bf16", "MNN sparse")
SPARSITIES = (80, 90, 95, 98)


def machines():
    """Return the results of each machine: results/engine has those of one, its folders have those of others."""
    folders = [RESULTS, *sorted(path for path in RESULTS.glob("*") if path.is_dir())]
    found = [[json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))] for folder in folders]
    return [results for results in found if results]


def groups(result):
    """Return the measured rows of each (batch, threads), by backend name."""
    found = {}
    for row in result["rows"]:
        found.setdefault((row["batch"], row["threads"]), {})[row["name"]] = row
    return found


def ratio(row, engine, key="seconds"):
    """Return the speedup of the engine over another backend, as text; bold if the engine is slower."""
    if row is None:
        return "not run"
    if row[key] is None:
        return "no bf16" if row["note"] == "this processor does not support bf16" else row["note"]
    value = f"{row[key] / engine[key]:.2f}"
    return f"**{value}**" if float(value) < 1 else value


def best(rows, names, key="seconds"):
    """Return the fastest of several backends; None if none was measured."""
    measured = [rows[name] for name in names if name in rows and rows[name][key] is not None]
    return min(measured, key=lambda row: row[key], default=None)


def note(results):
    """Return the machine, versions and commits of results."""
    machine = results[0]["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    rounds = " or ".join(map(str, sorted({result["rounds"] for result in results})))
    commits = ", ".join(sorted({(result["commit"] or "none")[:7] for result in results}))
    load = max(max(result["load"]) for result in results)
    return (
        f"{machine['processor']} ({' '.join(machine['flags'])}), {machine['processors']} processors, load average at "
        f"most {load:.1f}; {rounds} interleaved rounds, seed 0; {versions}; commit {commits}."
    )


def by_machine(build, keep):
    """Return the table of each machine, with a note on the machine."""
    rows = []
    for results in machines():
        chosen = [result for result in results if keep(result)]
        if chosen:
            rows += [*build(chosen), "", note(chosen), ""]
    return rows[:-1] or ["Not run."]


def is_linear(result):
    return result["case"].startswith("linear-")


def networks_table():
    """Return the speedup of the engine over each rival, per network, batch size and number of threads."""

    def build(results):
        rows = [
            "| network | sparsity, % | weights | batch | threads | engine, ms | fastest fp32 | its minimum | "
            f"{' | '.join(RIVALS)} |",
            f"|---|---|---|---|---|---|---|---|{'---|' * len(RIVALS)}",
        ]
        for result in results:
            for (batch, threads), mine in groups(result).items():
                sparsity = f"{100 * result['sparsity']:.2f}"
                begin = f"| {result['case']} | {sparsity} | {result['weights']} | {batch} | {threads} "
                engine = mine.get("engine")
                if engine is None or engine["seconds"] is None:
                    reason = "not run" if engine is None else engine["note"]
                    rows.append(f"{begin}| {reason} | | {' | ' * len(RIVALS)}|")
                    continue
                cells = [f"{1000 * engine['seconds']:.2f}", ratio(best(mine, FP32), engine)]
                cells.append(ratio(best(mine, FP32, "minimum"), engine, "minimum"))
                cells += [ratio(mine.get(name), engine) for name in RIVALS]
                rows.append(f"{begin}| {' | '.join(cells)} |")
        return rows

    return by_machine(build, lambda result: not is_linear(result))


def linear_table():
    """Return the speedup of the engine on single Linear layers, per number of tokens and sparsity."""

    def build(results):
        heads = " | ".join(f"{percent} %" for percent in SPARSITIES)
        rows = [
            f"| layer | tokens | threads | fastest fp32, ms | fp32: {heads} | bf16: {heads} |",
            f"|---|---|---|---|{'---|' * 2 * len(SPARSITIES)}",
        ]
        measured = {}
        for result in results:
            _, features, outputs, percent = result["case"].split("-")
            for group, mine in groups(result).items():
                measured.setdefault((int(features), int(outputs), *group), {})[int(percent)] = mine
        for (features, outputs, tokens, threads), cases in sorted(measured.items()):
            cells = {"fp32": [], "bf16": []}
            for percent in SPARSITIES:
                mine = cases.get(percent, {})
                engine = mine.get("engine")
                ready = engine is not None and engine["seconds"] is not None
                cells["fp32"].append(ratio(best(mine, FP32), engine) if ready else "not run")
                cells["bf16"].append(ratio(mine.get("OpenVINO bf16"), engine) if ready else "not run")
            dense = min(row["seconds"] for mine in cases.values() if (row := best(mine, FP32)))
            rows.append(
                f"| {features} → {outputs} | {tokens} | {threads} | {1000 * dense:.3f} "
                f"| {' | '.join(cells['fp32'])} | {' | '.join(cells['bf16'])} |"
            )
        return rows

    return by_machine(build, is_linear)


def threads_table():
    """Return the speedup from several threads, and the effect of huge pages, in the same rounds."""

    def build(results):
        rows = [
            "| network | batch | threads | round trip, ns | speedup over one thread | small pages, relative time |",
            "|---|---|---|---|---|---|",
        ]
        for result in results:
            for (batch, threads), mine in groups(result).items():
                engine, small, one = (mine.get(f"engine{name}") for name in ("", ", small pages", ", 1 thread"))
                if engine and engine["seconds"] and small and one:
                    cells = [f"{one['seconds'] / engine['seconds']:.2f}", f"{small['seconds'] / engine['seconds']:.2f}"]
                    trip = " to ".join(map(str, result.get("round_trip_ns", ["not measured"])))
                    rows.append(f"| {result['case']} | {batch} | {threads} | {trip} | {' | '.join(cells)} |")
        return rows

    return by_machine(build, lambda result: True)


def break_even_table():
    """Return the speedup of the engine at several sparsities with random masks."""

    def build(results):
        sparsities = sorted({float(sparsity) for result in results for sparsity in result["sweep"]})
        rows = [
            f"| network | {' | '.join(f'{100 * s:g} %' for s in sparsities)} | break-even sparsity |",
            f"|---|{'---|' * len(sparsities)}---|",
        ]
        for result in results:
            sweep = {float(sparsity): speedup for sparsity, speedup in result["sweep"].items()}
            cells = [f"{sweep[s]:.2f}" if s in sweep else "" for s in sparsities]
            rows.append(f"| {result['case']} | {' | '.join(cells)} | {break_even(sweep)} |")
        return rows

    return by_machine(build, lambda result: result["sweep"])


def break_even(sweep):
    """Return the sparsity at which the speedup is 1, by linear interpolation of the time relative to dense."""
    below = [sparsity for sparsity, speedup in sweep.items() if speedup <= 1]
    above = [sparsity for sparsity in sweep if sparsity > max(below, default=-1)]
    if not above:
        return f"above {100 * max(sweep):g} %"
    if not below:
        return f"below {100 * min(above):g} %"
    low, high = max(below), min(above)
    times = 1 / sweep[low], 1 / sweep[high]
    return f"{100 * (low + (high - low) * (times[0] - 1) / (times[0] - times[1])):.0f} %"


TABLES = {
    "engine": networks_table,
    "engine_linear": linear_table,
    "engine_threads": threads_table,
    "engine_break_even": break_even_table,
}
