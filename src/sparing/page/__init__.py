"""Reports as a self-contained HTML page: `Report.to_html`, and `sparing report --html` for runs."""

from sparing.page.render import Entry, Fact, count_facts, factor, render, short

__all__ = ["Entry", "Fact", "count_facts", "factor", "render", "short"]
