"""The page of one or several runs, for `sparing report --html`."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from sparing.files import write_text
from sparing.latency.timings import FP32_BASELINES, Latency, format_threads
from sparing.page import Entry, Fact, count_facts, factor, render, short
from sparing.page.charts import Lines, Series, lines
from sparing.run.log import read_history
from sparing.run.reading import check_content, read_json
from sparing.run.run import Metrics, Run, WeightsSource


class Layer(BaseModel):
    """What a page needs of a layer in a line of `history.jsonl`."""

    sparsity: float
    threshold: float | None = None


class Epoch(BaseModel):
    """What a page needs of a line of `history.jsonl`."""

    epoch: int
    sparsity: float
    validation_accuracy: float | None = None
    layers: dict[str, Layer]


def write_page(runs: Sequence[Run], path: str | Path, weights: WeightsSource = "last") -> None:
    """Write a self-contained HTML page about one run, or a comparison of several.

    The page has accuracy, sparsity, MACs, file size and, after `sparing bench`, latency, each next to the number of the
    dense model; sparsity and MACs by depth; accuracy, sparsity and thresholds over time; and the table of the layers.

    Args:
        runs: the runs; they may be unfinished.
        path: the file.
        weights: weights to count, as in `Run.model`. Accuracy and file size are those of the last ones.

    Raises:
        InputError: a file of a run has another content than `sparing train` writes, or `path` cannot be written.
        CheckpointError: the weights cannot be read.
    """
    names = [run.path.resolve().name for run in runs]
    titles = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    histories = [_history(run.path) for run in runs]
    entries = [
        _entry(run, title, history, weights) for run, title, history in zip(runs, titles, histories, strict=True)
    ]
    title = titles[0] if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    write_text(path, render(title, entries, _comparison(titles, histories)))


def _entry(run: Run, title: str, history: list[Epoch], weights: WeightsSource) -> Entry:
    report, ranks = run.report(weights), run.ranks(weights)
    metrics = None if run.metrics is None else Metrics.model_validate(run.metrics)
    facts = list(count_facts(report))
    if weights != "best" and metrics is not None:
        facts = [_accuracy(metrics), *facts, _size(metrics)]
        if (run.path / "latency.json").is_file():
            facts += _latency(run.path / "latency.json")
    elif weights != "best" and history and (accuracy := history[-1].validation_accuracy) is not None:
        after = f"after epoch {history[-1].epoch} of {run.recipe.schedule.epochs}"
        facts.insert(0, Fact("validation accuracy", _percent(accuracy), after, accuracy))
    return Entry(
        title=title,
        facts=tuple(facts),
        report=report,
        details=_details(run, metrics, weights),
        charts=_charts(history, _history(run.path / "dense")),
        appendix=str(ranks) if ranks.rows else "",
    )


def _details(run: Run, metrics: Metrics | None, weights: WeightsSource) -> str:
    recipe, versions = run.recipe, run.resolved.versions
    parts = [
        f"{recipe.method['name'] if recipe.method else 'dense'}, {recipe.model.name} on {recipe.data.name}",
        f"{recipe.schedule.epochs} epochs, seed {recipe.seed}",
        f"{metrics.seconds:,.0f} s on {metrics.device}" if metrics else "not finished",
        ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("sparing", "torch")),
    ]
    return " · ".join([*parts, "weights of the best epoch"] if weights == "best" else parts)


def _accuracy(metrics: Metrics) -> Fact:
    against = f"{metrics.test_correct:,} of {metrics.test_count:,} test examples"
    if metrics.dense_accuracy is not None:
        difference = f"{100 * (metrics.accuracy - metrics.dense_accuracy):+.2f}".replace("-", "−")
        against = f"dense {_percent(metrics.dense_accuracy)}, {difference} points"
    return Fact("accuracy", _percent(metrics.accuracy), against, metrics.accuracy)


def _size(metrics: Metrics) -> Fact:
    dense, compressed = metrics.dense_bytes, metrics.compressed_bytes
    return Fact(
        "file size", _bytes(compressed), f"dense {_bytes(dense)}{factor(dense, compressed, 'smaller')}", compressed
    )


def _latency(path: Path) -> list[Fact]:
    """Return the latency of the fastest sparse backend against the fastest dense one in fp32; [] if not measured."""
    measured = check_content(Latency, read_json(path, "run sparing bench to write it again"), path)
    batch, threads = min(measured.groups(), default=(0, 0))
    rows = {row.name: row for row in measured.groups().get((batch, threads), [])}
    dense = {name: rows[name].speedup or 0 for name in FP32_BASELINES if name in rows and rows[name].speedup}
    sparse = measured.fastest(batch, threads) if rows else None
    if sparse is None or not dense:
        return []
    best = min(dense, key=lambda name: dense[name])
    seconds, baseline = rows[sparse].seconds or 0, rows[best].seconds or 0
    against = f"dense {_time(baseline)} ({best}), {dense[best]:.3g}x as fast, batch {batch}, {format_threads(threads)}"
    return [Fact("latency", _time(seconds), against, seconds)]


def _charts(history: list[Epoch], dense: list[Epoch]) -> tuple[Lines, ...]:
    if not history:
        return ()
    accuracy: dict[tuple[str, str, float], Series] = {("total", "validation", 0): _accuracies(history)}
    if dense:
        accuracy["dense", "dense baseline", 0] = _accuracies(dense)
    names = list(history[-1].layers)
    sparsity, threshold = (
        {
            ("layer", name, index / max(len(names) - 1, 1)): [
                (line.epoch, getattr(line.layers[name], quantity)) for line in history if name in line.layers
            ]
            for index, name in enumerate(names)
        }
        for quantity in ("sparsity", "threshold")
    )
    total: dict[tuple[str, str, float], Series] = {("total", "total", 0): _totals(history)}
    charts = (
        lines("Accuracy", accuracy, percent=True),
        lines("Sparsity", {**sparsity, **total}, percent=True, span=(0, 1)),
        lines("Thresholds, in units of the weights", threshold),
    )
    return tuple(chart for chart in charts if chart is not None)


def _comparison(titles: Sequence[str], histories: Sequence[list[Epoch]]) -> tuple[Lines, ...]:
    keys = [("run", title, float(index)) for index, title in enumerate(titles)]
    charts = (
        lines("Validation accuracy", dict(zip(keys, map(_accuracies, histories), strict=True)), percent=True),
        lines("Sparsity", dict(zip(keys, map(_totals, histories), strict=True)), percent=True, span=(0, 1)),
    )
    return tuple(chart for chart in charts if chart is not None)


def _accuracies(history: list[Epoch]) -> Series:
    return [(line.epoch, line.validation_accuracy) for line in history]


def _totals(history: list[Epoch]) -> Series:
    return [(line.epoch, line.sparsity) for line in history]


def _history(run: Path) -> list[Epoch]:
    return check_content(list[Epoch], read_history(run), run / "history.jsonl")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def _bytes(count: int) -> str:
    return f"{count} bytes" if count < 1000 else f"{short(count)}B"
