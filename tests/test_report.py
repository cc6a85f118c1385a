"""Pages and CSV files of reports and runs: content, escaping, and how a browser shows them."""

import base64
import collections
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import markupsafe
import pytest
from torch import nn
from typer.testing import CliRunner

import sparing
from sparing import InputError
from sparing.cli import app
from sparing.latency.timings import Latency, Timing
from sparing.page.charts import MAX_POINTS, SIZE, lines
from sparing.run.recipe import load_recipe
from sparing.run.run import Run
from sparing.run.summary import write_page
from sparing.run.training import train_run

OWN = Path(__file__).parent.parent / "examples" / "02_own_model" / "own_model.yaml"
HOSTILE = (
    "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "a&amp;b<c",
    "{{ 7 * 7 }}{% raw %}", "</style></title>", "\x1b[2J\x00\u202eevil\ud800", "javascript:alert(1)", "]]>-->",
)  # fmt: skip


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = collections.Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def check_self_contained(text):
    """Check that a page loads nothing, and that its policy allows its own script alone."""
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & page.tags.keys()
    assert [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("#")] == []
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("content", policy) in page.attributes


def named(names):
    """A sparse model with such layer names, which a dot would nest."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    sparing.sparsify_(model, sparing.StaticRandom(sparsity=0.5))
    return model


@pytest.fixture(scope="module")
def report():
    model = sparing.models.resnet8(width=4)
    sparing.sparsify_(model, sparing.STR(init=-2.0))
    return sparing.report(model, (1, 1, 28, 28))


def test_a_page_shows_every_count(report, tmp_path):
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text == report.to_html()
    assert len(text) < 30_000
    check_self_contained(text)
    page = Page(text)
    for row in (*report.layers, *report.sums):
        for cell in (row.name, f"{row.weights:,}", f"{row.nonzero:,}", row.percent, f"{row.macs:,}"):
            assert cell in page.text
    assert page.tags["tr"] == 1 + len(report.layers) + len(report.sums)
    assert f"{report.total.dense_macs:,} dense MACs" in page.text


def test_a_page_without_macs_shows_weights_and_what_was_missed():
    sparse = sparing.report(named(["a"]))
    text = Page(sparse.to_html()).text
    assert "Where the weights are" in text
    assert "MACs" not in text
    assert "the target <b> was missed" in Page(replace(sparse, missed=("the target <b> was missed",)).to_html()).text
    assert "no weights" in Page(sparing.report(nn.ReLU()).to_html()).text


def test_names_cannot_change_a_page():
    harmless = Page(sparing.report(named([f"layer{i}" for i in range(len(HOSTILE))])).to_html())
    text = sparing.report(named(HOSTILE)).to_html()
    check_self_contained(text)
    hostile = Page(text)
    assert hostile.tags == harmless.tags
    assert len(hostile.attributes) == len(harmless.attributes)
    for name in HOSTILE[:6]:
        assert markupsafe.escape(name) in text
        assert name in hostile.texts
    assert r"\x1b[2J\x00\u202eevil\ud800" in hostile.text
    text.encode()  # although a name had half of a surrogate pair
    assert not [char for char in text if not char.isprintable() and char != "\n"]


def test_a_notebook_gets_one_element_without_script(report):
    text = report._repr_html_()
    assert text.startswith('<div class="sparing">')
    assert text.endswith("</div>")
    page = Page(text)
    assert not {"html", "body", "script", "meta", "title", "h1"} & page.tags.keys()
    assert report.layers[3].name in page.text
    style = re.search(r"<style>(.*)</style>", text, re.DOTALL).group(1)
    # One rule with all others nested in it, so that it styles nothing else of the notebook.
    assert re.match(r"\s*\.sparing {", style)
    outside = re.sub(r"{[^{}]*}", "", re.sub(r"{[^{}]*}", "", style))
    assert outside.strip() == ".sparing"


def test_csv_is_written_or_returned(report, tmp_path):
    assert report.to_csv(tmp_path / "report.csv") is None
    assert (tmp_path / "report.csv").read_text() == report.to_csv()
    with pytest.raises(InputError, match="cannot be written"):
        report.to_html(tmp_path / "nowhere" / "page.html")


def test_lines_have_gaps_and_few_points():
    nan, infinite = float("nan"), float("inf")
    figure = lines("x", {("layer", "a", 0): [(1, 0.0), (2, 1.0), (3, nan), (4, 0.5), (5, infinite), (6, None)]})
    assert [line.path.count("M") for line in figure.lines] == [2]
    assert lines("x", {("layer", "a", 0): [(1, nan), (2, None)]}) is None
    assert lines("x", {}) is None
    long = [(epoch, epoch / 1000) for epoch in range(1, 1001)]
    (line,) = lines("x", {("layer", "a", 0): long}, span=(0, 1)).lines
    steps = [tuple(map(int, pair.split())) for pair in re.findall(r"-?\d+ -?\d+", line.path)]
    assert len(steps) <= MAX_POINTS + 2
    # The first point, and the steps from there to the last.
    assert [sum(values) for values in zip(*steps, strict=True)] == [SIZE, 0]
    constant = lines("x", {("layer", "a", 0): [(1, 0.25)]}, percent=True)
    assert constant.lines[0].path.startswith("M0 ")
    assert constant.y_ticks
    assert [label for _, label in lines("x", {("run", "a", 0): [(1, 0.0), (3, 1.0)]}).x_ticks] == ["1", "2", "3"]


# Pages of runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a dense baseline and a latency measurement."""
    out = tmp_path_factory.mktemp("runs") / "str <b>"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(OWN.parent)
        changes = ["schedule.epochs=3", "data.count=120", "model.width=4", "dense_baseline=true", "tensorboard=false"]
        train_run(load_recipe(OWN, [*changes, "method={name: str, init: -5}"]), out)
        yield out


TIMINGS = (
    Timing("engine", 1, 1, 1e-4, 1e-4, 1e-4, 1e-4, 1.0),
    Timing("torch eager", 1, 1, 9e-4, 9e-4, 9e-4, 9e-4, 9.0),
    Timing("ONNX Runtime", 1, 1, 3e-4, 3e-4, 3e-4, 3e-4, 2.5),
    Timing("OpenVINO bf16", 1, 1, 2e-4, 2e-4, 2e-4, 2e-4, 2.0),
    Timing("MNN dense", 1, 1, note="not installed"),
)


def page_of(path, *runs, **options):
    write_page([Run.open(run) for run in runs], path, **options)
    text = path.read_text()
    check_self_contained(text)
    return Page(text)


@pytest.mark.slow
def test_the_page_of_a_run(run, tmp_path):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "latency.json").write_text(Latency(TIMINGS, {0.9: 2.0}, 0.9, {"processor": "x"}, 3).to_json())
    page = page_of(tmp_path / "page.html", run)
    (run / "latency.json").unlink()
    assert page.texts.count("str <b>") == 2  # title and heading
    assert f"{100 * metrics['accuracy']:.2f} % dense {100 * metrics['dense_accuracy']:.2f} %" in page.text
    assert "100 µs dense 300 µs (ONNX Runtime), 2.5x as fast, batch 1, 1 thread" in page.text
    assert re.search(r"file size [\d.]+ kB dense [\d.]+ kB", page.text)
    layers = len(Run.open(run).report().layers)
    # Accuracy and the dense baseline, sparsity and its total, thresholds.
    assert page.tags["path"] == 2 + (layers + 1) + layers
    assert "3 epochs" in page.text
    best = page_of(tmp_path / "best.html", run, weights="best")
    assert "weights of the best epoch" in best.text
    assert "file size" not in best.text


def test_the_page_of_several_runs_compares_them(run, tmp_path):
    page = page_of(tmp_path / "page.html", run, run / "dense")
    assert "Comparison of 2 runs" in page.text
    assert [value for name, value in page.attributes if name == "href"] == ["#run-1", "#run-2"]
    for name in Run.open(run).budget():
        assert page.texts.count(name) >= 3  # compared, and once per run
    done = CliRunner().invoke(app, ["report", str(run), str(run / "dense"), "--html", str(tmp_path / "command.html")])
    assert (tmp_path / "command.html").read_text() == (tmp_path / "page.html").read_text()
    assert done.output.count("backbone") == 2
    assert done.output.endswith(f"Written to {tmp_path / 'command.html'}\n")
    done = CliRunner().invoke(app, ["report", str(run), str(run), "--csv", "table.csv"])
    assert "--csv and --json take one run, got 2" in str(done.exception)
    same = page_of(tmp_path / "same.html", run, run)
    assert str(run) in same.text  # equal names would be ambiguous


def test_an_unfinished_run_has_a_page(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    page = page_of(tmp_path / "page.html", tmp_path / "run")
    assert "after epoch 3 of 3" in page.text
    assert "not finished" in page.text
    (tmp_path / "run" / "history.jsonl").write_text("")
    assert "Over time" not in page_of(tmp_path / "page.html", tmp_path / "run").text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", '{"method": 3}', "metrics.json: method: input should be a valid string"),
        ("metrics.json", "{}", "metrics.json: method: field required"),
        (
            "history.jsonl",
            '{"epoch": 1, "sparsity": "<", "layers": {}}',
            "history.jsonl: 0.sparsity: input should be a",
        ),
        ("latency.json", "3", "latency.json: the content: input should be a dictionary"),
        ("latency.json", '{"rows": 1}', "latency.json: rows: input should be a valid tuple"),
        ("latency.json", "[" * 100_000, "latency.json: unreadable"),
    ],
)
def test_files_of_another_content_are_reported_in_one_sentence(run, tmp_path, name, content, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content + "\n")
    with pytest.raises(InputError, match=message) as error:
        page_of(tmp_path / "page.html", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = """
<!doctype html><title></title><iframe width=390 height=800 srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, find = query => [...page.querySelectorAll(query)];
  const numbers = () => find("tbody tr").map(row => Number(row.cells[3].dataset.value));
  const styles = getComputedStyle(page.documentElement), result = {{width: page.documentElement.scrollWidth}};
  result.colors = [styles.backgroundColor, styles.color];
  result.bars = find(".bar i").map(bar => bar.offsetHeight);
  result.before = numbers();
  for (const key of ["down", "up"]) {{
    find("thead button")[3].click();
    result[key] = numbers();
  }}
  find("thead button")[0].click();
  find("thead button")[0].click();
  result.again = numbers();
  document.title = JSON.stringify(result);
}};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_on_a_phone_shows_and_sorts_the_page(report, tmp_path, dark):
    (tmp_path / "phone.html").write_text(PHONE.format(page=html.escape(report.to_html())))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         (tmp_path / "phone.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr  # neither errors nor what the policy forbids
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert seen["width"] <= 390
    background, text = (int(re.match(r"rgb\((\d+)", color)[1]) for color in seen["colors"])
    assert (background < text) is dark
    weights = [row.weights for row in report.layers]
    assert seen["before"] == seen["again"] == weights
    assert seen["down"] == sorted(weights, reverse=True)
    assert seen["up"] == sorted(weights)
    # Of a bar of 100 %, 10rem are 160 pixels.
    heights = [160 * row.sparsity for row in report.layers]
    assert seen["bars"][: len(heights)] == pytest.approx(heights, abs=1)
