"""Latency measurements: every backend has a row, ratios and sentences are right. No test asserts an absolute time."""

import json
import os
import statistics
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sparing
from sparing import latency
from sparing.export import network, runtimes
from sparing.export.runtimes import HUGE_PAGES, Process
from sparing.latency.backends import BACKENDS, Backend, _timing
from sparing.latency.machine import FLAGS
from sparing.latency.measuring import randomly_pruned
from sparing.latency.timings import SPARSE_BACKENDS, Latency, Timing
from sparing.layers import find_layers
from sparing.plots import latency_bars

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} of sparing[export] is not installed")
pytestmark = pytest.mark.skipif(network.find_spec("MNN") is None, reason="mnn of sparing[export] is not installed")

QUICK = {"batches": (1,), "threads": (1,), "sweep": (), "rounds": 1, "turn": 0.001}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def only(*names):
    return {name: BACKENDS[name] for name in names}


@pytest.fixture(scope="module")
def measured():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    with torch.no_grad():
        model[0].weight[torch.rand(16, 3, 3, 3) < 0.9] = 0
    chosen = only("engine", "MNN sparse", "MNN dense", "ONNX Runtime", "OpenVINO bf16", "torch eager")
    return latency.measure(
        model, (1, 3, 8, 8), batches=(1, 2), threads=(1,), backends=chosen, sweep=(0.9,), rounds=2, turn=0.01
    )


@pytest.mark.slow
def test_every_backend_has_a_row(measured):
    assert [(row.batch, row.name) for row in measured.rows] == [
        (batch, name)
        for batch in (1, 2)
        for name in ("engine", "MNN sparse", "MNN dense", "ONNX Runtime", "OpenVINO bf16", "torch eager")
    ]
    for row in measured.rows:
        if row.name == "OpenVINO bf16":  # not every processor supports it
            assert row.seconds is not None or row.note == "this processor does not support bf16"
            continue
        assert row.error < network.TOLERANCE  # dense MNN uses Winograd convolutions
        assert 0 < row.minimum <= row.lowest <= row.seconds <= row.highest
        assert 0 < row.speedup_lowest <= row.speedup <= row.speedup_highest
    for batch in (1, 2):  # speedups are those of the fastest sparse backend
        sparse = [row for row in measured.rows if row.batch == batch and row.name in SPARSE_BACKENDS]
        fastest = min(sparse, key=lambda row: row.seconds)
        assert fastest.speedup == 1
        assert measured.fastest(batch, 1) == fastest.name
    assert list(measured.sweep) == [0.9]
    assert measured.sizes["model.engine"] > 0
    assert measured.machine["versions"]["torch"] == torch.__version__
    assert set(measured.machine["flags"]) <= set(FLAGS)


@pytest.mark.slow
def test_latency_of_a_model_with_keyword_inputs():
    class Difference(nn.Module):
        def forward(self, *, one, other):
            return one - other

    example = {"other": torch.randn(1, 4), "one": torch.randn(1, 4)}
    rows = latency.measure(Difference(), example, backends=only("engine", "ONNX Runtime", "torch eager"), **QUICK).rows
    assert [row.error for row in rows] == [0, 0, 0]


class Branch(nn.Module):
    """Model whose control flow depends on the batch size, which torch.export cannot trace with a dynamic one."""

    def forward(self, x):
        return x + 1 if x.shape[0] < 3 else x * 2


@pytest.mark.slow
def test_latency_of_a_fixed_batch_size():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparing.SparsityWarning)
        with pytest.raises(
            sparing.InputError, match=r"batches must be \(1,\), got \(1, 16\): the batch size of the model"
        ):
            latency.measure(Branch(), (1, 4), **QUICK | {"batches": (1, 16)})
        rows = latency.measure(Branch(), (1, 4), backends=only("engine", "ONNX Runtime"), **QUICK).rows
    assert all(row.error < 1e-6 for row in rows)


def test_speedups_compare_times_of_the_same_round():
    row = _timing("it", 1, 1, [[2.0], [8.0, 7.0, 9.0], [3.0]], [1.0, 2.0, 2.0], 0.0)
    assert (row.seconds, row.lowest, row.highest, row.minimum) == (3, 2, 8, 2)
    assert (row.speedup, row.speedup_lowest, row.speedup_highest) == (2, 1.5, 4)


def test_table_json_and_figure_agree(measured):
    text = str(measured)
    assert text.count("MNN sparse") >= 2
    assert "batch 2, 1 thread" in text
    content = json.loads(measured.to_json())
    assert content["rows"][0]["seconds"] == measured.rows[0].seconds
    assert content["sweep"] == {str(key): value for key, value in measured.sweep.items()}
    figure = latency_bars(measured.bars())
    assert [axes.get_title() for axes in figure.axes] == ["batch 1, 1 thread", "batch 2, 1 thread"]
    assert len(figure.axes[0].patches) == sum(row.seconds is not None for row in measured.rows) / 2
    (dense,) = [row for row in measured.rows if (row.name, row.batch) == ("ONNX Runtime", 1)]
    assert [label.get_text() for label in figure.axes[0].texts if f"{dense.speedup:.2f}x" in label.get_text()]


@pytest.mark.slow
def test_unavailable_backend_has_a_note():
    chosen = only("MNN sparse", "ONNX Runtime") | {"other": Backend("absent", "network.onnx")}
    rows = latency.measure(nn.Sequential(nn.Linear(4, 4)), (1, 4), backends=chosen, **QUICK).rows
    assert rows[0].seconds is not None
    assert (rows[2].seconds, rows[2].note) == (None, "'absent'")


@pytest.mark.slow
def test_engine_that_cannot_be_built_has_a_note(monkeypatch):
    def refuse(*arguments):
        raise sparing.InputError("there is no compiler")

    monkeypatch.setattr("sparing.latency.backends.engine.compile", refuse)
    with pytest.warns(sparing.SparsityWarning, match="not measured at a sparsity of 0.5: there is no compiler"):
        measured = latency.measure(
            nn.Linear(4, 4), (1, 4), backends=only("engine", "ONNX Runtime"), **QUICK | {"sweep": (0.5,)}
        )
    assert [row.note for row in measured.rows] == ["there is no compiler", None]
    assert measured.sweep == {}
    assert measured.verdict(1, 1).startswith("Not measured")
    text = latency.measure_briefly(nn.Linear(4, 4), (1, 4))
    assert text == "not measured (there is no compiler)"


@pytest.mark.slow
def test_backend_with_wrong_outputs_is_not_timed(monkeypatch):
    correct = Process.run
    monkeypatch.setattr(Process, "run", lambda process, inputs: [2 * array for array in correct(process, inputs)])
    (row,) = latency.measure(nn.Linear(4, 4), (1, 4), backends=only("ONNX Runtime"), **QUICK).rows
    assert (row.seconds, row.note) == (None, "output mismatch with PyTorch: maximum relative error 1")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the environment of a process cannot be read")
@pytest.mark.parametrize(
    ("setting", "huge_pages", "tunables"), [(None, True, HUGE_PAGES), (None, False, ""), ("", True, "")]
)
def test_process_uses_huge_pages_unless_glibc_tunables_is_set(tmp_path, monkeypatch, setting, huge_pages, tunables):
    if setting is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", setting)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Path("tiny.py").write_text("def load(path, threads):\n    return lambda inputs: lambda: [2 * inputs[0]]\n")
    with Process("tiny:load", "no file", threads=1, huge_pages=huge_pages) as process:
        assert process.run([torch.ones(3).numpy()])[0].tolist() == [2, 2, 2]
        environment = Path(f"/proc/{process._process.pid}/environ").read_text().split("\0")
    assert f"GLIBC_TUNABLES={tunables}" in environment


def test_more_threads_than_processors_raise():
    with pytest.raises(sparing.InputError, match=f"threads must be from 1 to {os.cpu_count()}, .* got 5000"):
        latency.measure(nn.Linear(4, 2), (1, 4), threads=(1, 5000))


def test_missing_runtime_raises_unavailable_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("onnxruntime", "openvino", "MNN"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module', name={name!r})")
    for runtime in ("onnxruntime", "openvino_bf16", "mnn"):
        with pytest.raises(runtimes.UnavailableError, match="^not installed$"):
            Process(runtime, "absent.onnx", threads=1)


def test_crashing_runtime_reports_its_error():
    Path("noise.onnx").write_bytes(b"noise")
    with pytest.raises(runtimes.UnavailableError, match="noise.onnx"):
        Process("onnxruntime", "noise.onnx", threads=1)


def rows(*times):
    """Return rows of one group, whose speedup is that of the fastest sparse backend."""
    fastest = min(seconds for name, seconds in times if name in SPARSE_BACKENDS)
    return tuple(
        Timing(name, 1, 1, seconds, seconds, seconds, seconds, *[seconds / fastest] * 3, 0.0) for name, seconds in times
    )


@pytest.mark.parametrize(
    ("times", "verdict", "losses"),
    [
        (
            [("engine", 1), ("MNN sparse", 1.2), ("MNN dense", 3), ("ONNX Runtime", 2), ("OpenVINO bf16", 1.5)],
            "engine is 2.00x faster than the fastest dense fp32 baseline, ONNX Runtime. "
            "It is 1.50x faster than dense bf16 (OpenVINO).",
            "Sparse loses to no dense baseline.",
        ),
        (
            [("engine", 1), ("ONNX Runtime", 2), ("OpenVINO bf16", 0.5)],
            "engine is 2.00x faster than the fastest dense fp32 baseline, ONNX Runtime. "
            "It is 2.00x slower than dense bf16 (OpenVINO).",
            "Sparse loses to OpenVINO bf16 at batch 1, 1 thread (2.00x faster).",
        ),
        (
            [("engine", 1), ("torch eager", 0.8)],
            "engine is 1.25x slower than the fastest dense fp32 baseline, torch eager; bf16 was not measured.",
            "Sparse loses to torch eager at batch 1, 1 thread (1.25x faster).",
        ),
        (
            [("engine", 1), ("torch eager", 0.999)],
            "engine is as fast as the fastest dense fp32 baseline, torch eager; bf16 was not measured.",
            "Sparse loses to no dense baseline.",
        ),
        (
            [("engine", 1.5), ("MNN sparse", 1), ("torch eager", 3)],
            "MNN sparse is 3.00x faster than the fastest dense fp32 baseline, torch eager; bf16 was not measured.",
            "Sparse loses to no dense baseline.",
        ),
        (
            [("engine", 1)],
            "Not measured: requires at least one sparse backend and one dense fp32 baseline.",
            "Where sparse loses was not measured.",
        ),
    ],
)
def test_verdict_and_losses(times, verdict, losses):
    found = Latency(rows(*times), {}, 0.9, {"processor": "x"}, 1)
    assert found.verdict(1, 1) == verdict
    assert found.losses() == losses
    assert verdict in str(found)
    assert str(found).count(", sparse loses") == sum(seconds < 0.99 for _, seconds in times)


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ({}, "Break-even sparsity was not measured."),
        ({0.5: 0.8, 0.9: 2.0}, "Break-even sparsity is between 50 and 90 % (...); speedup of 2.00x at 90 %."),
        (
            {0.5: 1.1, 0.9: 2.0},
            "Break-even sparsity is at most 50 %, the lowest that was measured (...); speedup of 1.10x at 50 %.",
        ),
        ({0.5: 1.1, 0.7: 0.9, 0.9: 2.0}, "Break-even sparsity is between 70 and 90 % (...); speedup of 2.00x at 90 %."),
        ({0.5: 0.5, 0.9: 0.9}, "Break-even sparsity is above 90 % (...)."),
    ],
)
def test_break_even(sweep, sentence):
    expected = sentence.replace("...", "batch 1, one thread, zeros at random positions")
    assert Latency((), sweep, 0.9, {}, 1).break_even() == expected


def test_randomly_pruned_network_keeps_norms():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(40, 30))
    pruned = randomly_pruned(model, 0.8)
    for layer, before in zip(find_layers(pruned).values(), find_layers(model).values(), strict=True):
        assert 0.7 < layer.sparsity() < 0.9
        torch.testing.assert_close(layer.weight.norm(), before.weight.norm())
        assert not torch.equal(layer.weight, before.weight)
    assert statistics.mean(layer.sparsity() for layer in find_layers(model).values()) == 0
