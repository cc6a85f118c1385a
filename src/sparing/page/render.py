"""Render a page from the template `page.html`."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.files import printable
from sparing.page.charts import Lines, shares_by_depth, sparsity_by_depth

if TYPE_CHECKING:
    from sparing.report import Report


@dataclass(frozen=True)
class Fact:
    """One number of the summary.

    Attributes:
        label: what it is, such as "accuracy".
        value: the number as text.
        against: the number of the dense model, and the comparison with it.
        order: the number, to sort by.
    """

    label: str
    value: str
    against: str
    order: float


@dataclass(frozen=True)
class Entry:
    """What a page shows of one model.

    Attributes:
        title: its name.
        facts: the summary.
        report: counts of its layers.
        details: one line on where it comes from.
        charts: figures of its training.
        appendix: text in a fixed-width font, such as the ranks of its layers.
    """

    title: str
    facts: tuple[Fact, ...]
    report: "Report"
    details: str = ""
    charts: tuple[Lines, ...] = ()
    appendix: str = ""


def count_facts(report: "Report") -> tuple[Fact, ...]:
    """Return the facts that follow from the counts: sparsity and MACs."""
    total = report.total
    kept = f"{total.nonzero:,} of {total.weights:,} weights are nonzero"
    facts = [Fact("sparsity", total.percent or "no weights", kept, total.sparsity)]
    if total.macs is not None and total.dense_macs is not None:
        against = f"dense {short(total.dense_macs)}{factor(total.dense_macs, total.macs, 'fewer')}"
        facts.append(Fact("MACs", short(total.macs), against, total.macs))
    return tuple(facts)


def short(count: float) -> str:
    """Return a count with three significant digits and a prefix.

    Examples:
        >>> short(4089184256), short(102400), short(37)
        ('4.09 G', '102 k', '37')
    """
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            number = f"{count / size:.3g}" if count / size < 999.5 else f"{count / size:.0f}"
            return f"{number} {prefix}"
    return f"{count:.0f}"


def factor(dense: float, sparse: float, word: str) -> str:
    """Return by which factor a number of the dense model is larger, as the end of a sentence; "" if it is not.

    Examples:
        >>> factor(100, 40, "smaller"), factor(100, 0, "smaller"), factor(100, 100, "smaller")
        (', 2.5x smaller', '', '')
    """
    return f", {dense / sparse:.3g}x {word}" if 0 < sparse < dense else ""


def render(title: str, entries: Sequence[Entry], charts: Sequence[Lines] = (), fragment: bool = False) -> str:
    """Return a page that loads nothing. All texts are escaped.

    Args:
        title: heading of the page.
        entries: one shows the model in detail, several are also compared.
        charts: figures that compare several entries.
        fragment: return one element for a notebook instead of a page: it has the colors of the notebook, and no script.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparing.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = Path(__file__).with_name("sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment.get_template("page.html")
        .render(
            title=title,
            entries=entries,
            charts=charts,
            fragment=fragment,
            script=script,
            # Only this script runs, even if a name got through the escaping.
            policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            labels=list(dict.fromkeys(fact.label for entry in entries for fact in entry.facts)),
            layers=_sparsities(entries),
            sparsity_by_depth=sparsity_by_depth,
            shares_by_depth=shares_by_depth,
        )
        .strip()
    )


def _sparsities(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """Return layer name → its row in each entry; None in an entry without that layer."""
    rows = [{row.name: row for row in entry.report.layers} for entry in entries]
    names = dict.fromkeys(name for found in rows for name in found)
    return {name: [found.get(name) for found in rows] for name in names}


def _visible(value: Any) -> Any:
    """Escape control characters and marks that reorder text; the template escapes the rest."""
    return printable(value) if type(value) is str else value
