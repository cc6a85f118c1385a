"""Sequence data sets on small generated archives: original layouts, damaged files, and FastGRNN runs."""

import json
import wave
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sparing import InputError, SparsityWarning
from sparing.cli import app
from sparing.data import DATASETS, SequenceBatches, SequenceData, Sequences
from sparing.data import speech as speech_module
from sparing.data.sequence import HAR_SIGNALS, har2, har6, normalized, watch, windows
from sparing.data.speech import NOISE, WORDS, google12, log_mel, read_wav, spoken_digits
from sparing.rnn import ranks
from sparing.run.recipe import Recipe, load_recipe
from sparing.run.run import Run
from sparing.run.training import train_run
from test_cifar import _no_checksum as _no_checksum
from test_cifar import flip, forge_cache
from tolerance import tolerance

ROOT = Path(__file__).parent.parent


def write_wav(path, samples, rate=16_000, channels=1, width=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, dtype="<i2" if width == 2 else "u1").tobytes())


def tone(samples, pitch, rate=16_000):
    return (8000 * np.sin(2 * np.pi * pitch * np.arange(samples) / rate)).astype("<i2")


def make_har(root, train=20, test=6):
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        folder = root / split / "Inertial Signals"
        folder.mkdir(parents=True)
        for index, signal in enumerate(HAR_SIGNALS):
            np.savetxt(folder / f"{signal}_{split}.txt", rng.normal(index, 1 + index, (count, 128)), fmt="%16.7e")
        labels = np.resize(np.arange(1, 7), count)
        np.savetxt(root / split / f"y_{split}.txt", labels, fmt="%d")
    return root


@pytest.fixture
def har(tmp_path):
    return make_har(tmp_path / "UCI HAR Dataset")


def test_har6_reads_the_original_layout(har):
    data = har6(str(har))
    assert [data.size(split) for split in ("train", "validation", "test")] == [16, 4, 6]
    assert data.input_size == (1, 128, 9)
    assert data.model_arguments() == {"num_classes": 6, "input_size": 9}
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    # Compute one value from its file.
    folder = "Inertial Signals"
    raw = {s: np.loadtxt(har / s / folder / f"body_gyro_y_{s}.txt") for s in ("train", "test")}
    mean, std = raw["train"][:16].mean(), raw["train"][:16].std(ddof=1)
    expected = (raw["test"][2, 17] - mean) / std
    rounding = tolerance(torch.float32, terms=16 * 128, scale=(abs(raw["test"][2, 17]) + abs(mean)) / std)
    assert data.test.values[2, 17, HAR_SIGNALS.index("body_gyro_y")].item() == pytest.approx(expected, abs=rounding)


def test_each_feature_is_normalized_over_the_training_split(har):
    steps = har6(str(har)).train.values.flatten(0, 1)
    # No mean is larger than its standard deviation, so the scale of the values is at most 2 standard deviations.
    close = {"rtol": 0.0, "atol": tolerance(torch.float32, terms=len(steps), scale=2)}
    torch.testing.assert_close(steps.mean(0), torch.zeros(9), **close)
    torch.testing.assert_close(steps.std(0), torch.ones(9), **close)


def test_har2_merges_the_six_classes_as_in_the_paper(har):
    two, six = har2(str(har)), har6(str(har))
    # walking, upstairs, downstairs, sitting, standing, laying
    assert two.num_classes == 2
    assert [[1, 0, 1, 0, 1, 0][label] for label in six.train.labels] == two.train.labels.tolist()
    assert torch.equal(two.train.values, six.train.values)


def damage_missing(root):
    (root / "test" / "Inertial Signals" / "body_acc_x_test.txt").unlink()


def damage_rows(root):
    path = root / "train" / "Inertial Signals" / "total_acc_z_train.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))


def damage_row(root):
    path = root / "train" / "Inertial Signals" / "total_acc_z_train.txt"
    path.write_text(path.read_text()[:-30])


def damage_label(root):
    path = root / "train" / "y_train.txt"
    path.write_text(path.read_text().replace("6", "7"))


def damage_nan(root):
    path = root / "train" / "Inertial Signals" / "total_acc_z_train.txt"
    lines = path.read_text().splitlines()
    lines[3] = "nan" + lines[3].lstrip()[13:]
    path.write_text("\n".join(lines))


DAMAGE = {
    damage_missing: r"body_acc_x_test\.txt is missing \(1 of 10",
    damage_rows: r"total_acc_z_train\.txt: must contain a table of 20 × 128 numbers, .* got 19 × 128",
    damage_row: r"total_acc_z_train\.txt: cannot be read",
    damage_label: "labels must be integers from 1 to 6",
    damage_nan: "contain NaN or infinite values, the first at index 3",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_har6_rejects_a_damaged_archive(har, damage):
    damage(har)
    with pytest.raises(InputError, match=DAMAGE[damage]):
        har6(str(har))


def test_missing_archive_error_contains_its_web_page(tmp_path):
    for name, page in (
        ("har6", "archive.ics.uci.edu"),
        ("google12", "speech_commands"),
        ("spoken_digits", "free-spoken"),
    ):
        with pytest.raises(InputError, match=page):
            DATASETS[name](str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_watch_is_split_by_person():
    pytest.importorskip("seglearn")
    data = watch()
    assert [data.size(split) for split in ("train", "validation", "test")] == [2669, 524, 1484]
    assert data.input_size == (1, 100, 6)
    assert data.train.labels.unique().tolist() == data.test.labels.unique().tolist() == list(range(7))
    assert not {tuple(x[0].tolist()) for x in data.train.values} & {tuple(x[0].tolist()) for x in data.test.values}


def test_windows_are_consecutive_sections_of_the_series():
    series = torch.arange(23.0).reshape(23, 1)
    cut = windows(series, width=10, stride=5)
    assert cut[:, 0, 0].tolist() == [0, 5, 10]
    assert cut[2, :, 0].tolist() == list(range(10, 20))
    assert windows(series, width=30).shape == (0, 30, 1)


# Batches


def numbered(count, lengths=None):
    values = torch.arange(float(count)).reshape(-1, 1, 1).expand(count, 5, 2)
    return Sequences(values, torch.arange(count), lengths)


def labels_of(batches):
    return [batch[-1].tolist() for batch in batches]


def test_the_order_depends_only_on_seed_and_epoch():
    batches = SequenceBatches(numbered(10), 4, shuffle=True, seed=1)
    first = labels_of(batches)
    assert first == labels_of(batches)
    assert sorted(chain(*first)) == list(range(10))
    batches.epoch = 1
    assert labels_of(batches) != first
    assert len(batches) == len(first) == 3
    for values, labels in batches:
        assert torch.equal(values[:, 0, 0], labels.float())


@pytest.mark.parametrize("ranks_", [2, 3])
def test_ranks_divide_each_batch(ranks_):
    whole = labels_of(SequenceBatches(numbered(10), 4, shuffle=True, seed=1))
    share = {"ranks": ranks_}
    shares = [labels_of(SequenceBatches(numbered(10), 4, shuffle=True, seed=1, rank=r, **share)) for r in range(ranks_)]
    for index in range(min(map(len, shares))):
        assert list(chain(*(share[index] for share in shares))) == whole[index]
    everything = chain(*(labels_of(SequenceBatches(numbered(10), 4, rank=r, **share)) for r in range(ranks_)))
    assert sorted(chain(*everything)) == list(range(10))


def test_a_batch_is_padded_to_its_longest_sequence():
    batches = SequenceBatches(numbered(4, torch.tensor([1, 2, 3, 5])), 2)
    assert [(tuple(x.shape), lengths.tolist()) for x, lengths, _ in batches] == [
        ((2, 2, 2), [1, 2]),
        ((2, 5, 2), [3, 5]),
    ]


def test_normalization_ignores_padding():
    values = torch.randn(6, 5, 2)
    lengths = torch.tensor([1, 2, 3, 4, 5, 2])
    split = Sequences(values, torch.zeros(6, dtype=torch.int64), lengths)
    garbage = values.clone()
    garbage[torch.arange(5) >= lengths[:, None]] = 1e6
    a, b = (normalized("x", s, s, s, 1) for s in (split, Sequences(garbage, split.labels, lengths)))
    assert torch.equal(a.train.steps(), b.train.steps())


def test_normalized_rejects_sequences_without_steps_and_empty_splits():
    good, bad = numbered(3, torch.tensor([5, 5, 5])), numbered(3, torch.tensor([5, 0, 5]))
    with pytest.raises(InputError, match="sequence 1 of the test split has no time steps"):
        normalized("x", good, good, bad, 1)
    with pytest.raises(InputError, match="validation split is empty"):
        normalized("x", good, good[torch.tensor([], dtype=torch.int64)], good, 1)


def test_a_constant_feature_becomes_zero():
    data = normalized("x", *(Sequences(torch.ones(3, 4, 1), torch.zeros(3, dtype=torch.int64)),) * 3, 1)
    assert not data.train.values.any()


# Speech


def test_one_second_has_99_steps():
    pytest.importorskip("kaldi_native_fbank")
    assert log_mel(torch.from_numpy(tone(16_000, 440)).float(), 16_000).shape == (99, 32)
    assert log_mel(torch.zeros(8_000), 8_000).shape == (99, 32)


@pytest.mark.parametrize(
    ("samples", "steps"), [(1, 1), (400, 1), (401, 2), (560, 2), (561, 3), (15_999, 99), (16_001, 99)]
)
def test_the_last_window_is_padded(samples, steps):
    pytest.importorskip("kaldi_native_fbank")
    assert log_mel(torch.ones(samples), 16_000).shape == (steps, 32)


def test_log_mel_equals_a_numpy_reference():
    pytest.importorskip("kaldi_native_fbank")
    x = torch.from_numpy(tone(800, 700) + tone(800, 2900)).double().numpy()

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    found = log_mel(torch.from_numpy(x).float(), 16_000).numpy()
    edges = np.linspace(mel(20), mel(8000), 34)
    bins = mel(np.arange(256) * 16_000 / 512)
    for step in range(len(found)):
        frame = np.pad(x, (0, 400))[160 * step : 160 * step + 400]
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)), 512))[:256] ** 2
        for f in range(32):
            low, middle, high = edges[f : f + 3]
            weight = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(0)
            assert found[step, f] == pytest.approx(np.log(max(weight @ power, 1.2e-7)), abs=0.01)


SPEAKERS = [f"{number:08x}" for number in range(12)]
LISTED = {"validation": SPEAKERS[:2], "testing": SPEAKERS[2:5]}


def make_speech_commands(root):
    for index, word in enumerate((*WORDS, "bed", "cat")):
        for speaker in SPEAKERS:
            write_wav(root / word / f"{speaker}_nohash_0.wav", tone(16_000 - 100 * index, 200 + 100 * index))
    write_wav(root / NOISE / "white.wav", np.random.default_rng(0).integers(-3000, 3000, 16_000 * 12))
    for split, speakers in LISTED.items():
        lines = [f"{word}/{speaker}_nohash_0.wav" for word in (*WORDS, "bed", "cat") for speaker in speakers]
        (root / f"{split}_list.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    pytest.importorskip("kaldi_native_fbank")
    return make_speech_commands(tmp_path_factory.mktemp("speech") / "speech_commands")


@pytest.mark.slow
def test_google12_reads_the_original_layout_and_caches_spectrograms(commands, monkeypatch):
    data = google12(str(commands))
    for sequences, speakers in ((data.train, 7), (data.validation, 2), (data.test, 3)):
        # Ten words, and 10% each of unknown words and of silences.
        assert sequences.labels.bincount(minlength=12).tolist() == [speakers] * 12
        assert sequences.lengths is None
    assert data.input_size == (1, 99, 32)
    assert data.num_classes == 12
    # The second call reads the cache and computes no spectrogram.
    monkeypatch.setattr(speech_module, "log_mel", None)
    again = google12(str(commands))
    assert torch.equal(again.test.values, data.test.values)
    assert torch.equal(again.test.labels, data.test.labels)


@pytest.mark.slow
def test_google12_uses_the_lists_of_the_archive(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    root = make_speech_commands(tmp_path / "commands")
    (root / "yes" / f"{SPEAKERS[9]}_nohash_0.wav").unlink()  # a training recording, which is in no list
    data = google12(str(root))
    # 10% of 69 is rounded up to 7, for unknown words and for silences.
    assert [data.size(split) for split in ("train", "validation", "test")] == [69 + 14, 20 + 4, 30 + 6]
    (root / "stop" / f"{SPEAKERS[4]}_nohash_0.wav").unlink()
    (root / "bed" / f"{SPEAKERS[4]}_nohash_0.wav").unlink()
    with pytest.raises(InputError, match=r"stop.00000004_nohash_0.wav is missing \(2 of the 60 listed recordings"):
        google12(str(root))
    (root / "testing_list.txt").unlink()
    with pytest.raises(InputError, match=r"testing_list.txt: cannot be read: No such file"):
        google12(str(root))


def test_the_cache_is_computed_again_if_it_is_damaged_or_the_files_change(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    root = make_digits(tmp_path)
    cache = tmp_path / "kept.safetensors"
    first = spoken_digits(str(root), cache=str(cache))
    cache.write_bytes(cache.read_bytes()[:100])
    assert torch.equal(spoken_digits(str(root), cache=str(cache)).test.values, first.test.values)
    assert load_file(cache)["test.values"].shape[0] == first.size("test")
    write_wav(root / "recordings" / "0_ann_0.wav", tone(900, 300, 8000), 8_000)
    assert not torch.equal(spoken_digits(str(root), cache=str(cache)).test.values[0], first.test.values[0])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "forge",
    [
        lambda found: {name: found[name] for name in found if name != "train.lengths"},
        lambda found: found | {"train.values": found["train.values"].double()},
        lambda found: found | {"train.values": found["train.values"][1:].clone()},
        lambda found: found | {"train.values": found["train.values"][..., 1:].clone()},
        lambda found: found | {"train.lengths": found["train.lengths"] + 1},
        lambda found: found | {"train.lengths": found["train.lengths"] - 1000},
        lambda found: found | {"train.lengths": found["train.lengths"].float()},
        lambda found: found | {"train.lengths": found["train.lengths"][1:].clone()},
    ],
)
@pytest.mark.usefixtures("_no_checksum")
def test_a_forged_cache_of_spectrograms_is_written_again(tmp_path, forge):
    pytest.importorskip("kaldi_native_fbank")
    root, cache = make_digits(tmp_path), tmp_path / "kept.safetensors"
    spoken_digits(str(root), cache=str(cache))
    right = cache.read_bytes()
    forge_cache(cache, forge)
    spoken_digits(str(root), cache=str(cache))
    assert cache.read_bytes() == right


def test_a_cache_with_one_wrong_number_is_written_again(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    root, cache = make_digits(tmp_path), tmp_path / "kept.safetensors"
    spoken_digits(str(root), cache=str(cache))
    right = cache.read_bytes()
    forge_cache(cache, flip("test.values"))
    spoken_digits(str(root), cache=str(cache))
    assert cache.read_bytes() == right


def test_a_recording_of_the_same_size_is_computed_again(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    root, cache = make_digits(tmp_path), tmp_path / "kept.safetensors"
    first, path = spoken_digits(str(root), cache=str(cache)), root / "recordings" / "0_ann_0.wav"
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    assert not torch.equal(spoken_digits(str(root), cache=str(cache)).test.values[0], first.test.values[0])


def test_a_cache_that_cannot_be_written_warns(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    root = make_digits(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.warns(SparsityWarning, match="every run computes its content again"):
        spoken_digits(str(root), cache=str(tmp_path / "file" / "cache.safetensors"))


def make_digits(root):
    for digit in range(10):
        for number in (0, 5, 10, 11):
            write_wav(
                root / "recordings" / f"{digit}_ann_{number}.wav",
                tone(1501 + 777 * digit, 200 + 150 * digit, 8000),
                8_000,
            )
    return root


def test_spoken_digits_keeps_the_length_of_each_recording(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    data = spoken_digits(str(make_digits(tmp_path)))
    assert [data.size(split) for split in ("train", "validation", "test")] == [20, 10, 10]
    # 1501 samples: ceil((1501 − 200) / 80) + 1 steps. The longest recordings are truncated to 1 s.
    assert data.test.lengths[0] == 18
    assert data.test.lengths[9] == 99
    values, lengths, labels = next(iter(data.evaluation("test")))
    assert values.shape == (10, 99, 32)
    assert labels.tolist() == list(range(10))
    assert torch.equal(lengths, data.test.lengths)


def test_read_wav_rejects_wrong_and_damaged_files(tmp_path):
    path = tmp_path / "x.wav"
    write_wav(path, tone(100, 440), rate=44_100)
    with pytest.raises(InputError, match="must have 16000 Hz, .* got 44100 Hz"):
        read_wav(path, 16_000)
    write_wav(path, tone(100, 440), channels=2)
    with pytest.raises(InputError, match=r"2 channel\(s\)"):
        read_wav(path, 16_000)
    write_wav(path, np.zeros(100), width=1)
    with pytest.raises(InputError, match="8 bits"):
        read_wav(path, 16_000)
    write_wav(path, [])
    with pytest.raises(InputError, match="contains 0 of 0 samples"):
        read_wav(path, 16_000)
    write_wav(path, tone(101, 440))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # removes half a sample
    with pytest.raises(InputError, match="contains 100 of 101 samples|not a readable WAV"):
        read_wav(path, 16_000)
    path.write_bytes(whole[:20])
    with pytest.raises(InputError, match="not a readable WAV"):
        read_wav(path, 16_000)
    path.write_bytes(b"MP3")
    with pytest.raises(InputError, match="not a readable WAV"):
        read_wav(path, 16_000)
    write_wav(path, tone(101, 440))
    assert torch.equal(read_wav(path, 16_000), torch.from_numpy(tone(101, 440)).float())


def test_spoken_digits_rejects_incomplete_recordings(tmp_path):
    root = make_digits(tmp_path)
    (root / "recordings" / "7_ann_10.wav").unlink()
    with pytest.raises(InputError, match=r"7_ann_10\.wav is missing"):
        spoken_digits(str(root))


def test_spoken_digits_rejects_other_file_names(tmp_path):
    root = make_digits(tmp_path)
    write_wav(root / "recordings" / "ten_ann_0.wav", tone(100, 300), 8_000)
    with pytest.raises(InputError, match=r"ten_ann_0\.wav: the file name must be"):
        spoken_digits(str(root))


# Runs


def recipe(root, **changes):
    base = {
        "model": {"name": "fastgrnn", "hidden_size": 12, "learned_rank": True},
        "data": {"name": "har2", "batch_size": 8, "root": str(root)},
        "method": {"name": "str", "init": -3.0, "scale": 4.0},
        "select": ["*.diagonal"],
        "optimizer": {"name": "adamw", "lr": 0.02, "threshold_weight_decay": 1.0},
        "schedule": {"epochs": 3, "drops": [1.5]},
        "tensorboard": False,
    }
    return Recipe.model_validate(base | changes)


@pytest.mark.slow
def test_a_run_learns_ranks_and_reports_compact_counts(har, tmp_path):
    metrics = train_run(recipe(har), tmp_path / "run")
    model = Run.open(tmp_path / "run").model()
    found = {row.name: row.rank for row in ranks(model).rows}
    assert {name: row["rank"] for name, row in metrics["weight_ranks"].items()} == found
    assert set(found) == {"rnn.cell.input", "rnn.cell.hidden"}
    kept = sum(row["compact_parameters"] for row in metrics["weight_ranks"].values())
    assert metrics["compact_weights"] == kept + 24
    assert metrics["compact_macs"] == 128 * kept + 24
    assert Run.open(tmp_path / "run").report().layers[1].name == "rnn.cell.input.diagonal"
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "run")]).output
    assert str(ranks(model)) in shown
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    # Two steps per epoch: the learning rate drops in the middle of the second epoch.
    assert rates == pytest.approx([0.02, 0.02, 0.002])
    run = Run.open(tmp_path / "run")
    assert run.evaluate().accuracy == metrics["accuracy"]
    assert run.evaluate(weights="dense").loss == pytest.approx(run.evaluate().loss)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_run(har, tmp_path):
    train_run(recipe(har), tmp_path / "whole")
    train_run(recipe(har), tmp_path / "resumed", stop_after=1)
    train_run(recipe(har), tmp_path / "resumed", resume=True)
    a, b = (Run.open(tmp_path / name).model().state_dict() for name in ("whole", "resumed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_training_on_sequences_of_different_lengths(tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    root = make_digits(tmp_path)
    changes = {"data": {"name": "spoken_digits", "batch_size": 8, "root": str(root), "accumulate": 2}}
    metrics = train_run(recipe(root, **changes), tmp_path / "run")
    assert metrics["test_count"] == 10


@pytest.mark.slow
def test_a_run_warns_if_a_rank_becomes_zero_and_continues(har, tmp_path):
    changes = {"method": {"name": "str", "init": 3.0, "scale": 100.0}}
    with pytest.warns(SparsityWarning, match="rnn.cell.hidden.diagonal"):
        metrics = train_run(recipe(har, **changes), tmp_path / "run")
    assert {row["rank"] for row in metrics["weight_ranks"].values()} == {0}


def test_recipe_rejects_drops_after_the_last_epoch():
    with pytest.raises(ValueError, match="drops: 7"):
        recipe("x", schedule={"epochs": 3, "drops": [7]})


def test_a_run_without_low_rank_layers_reports_no_ranks(tmp_path):
    base = {"model": {"name": "resnet8", "width": 1}, "data": {"name": "small_run:noise", "batch_size": 4}}
    metrics = train_run(
        Recipe.model_validate({**base, "schedule": {"epochs": 1}, "tensorboard": False}), tmp_path / "run"
    )
    assert "weight_ranks" not in metrics


RECIPES = sorted(ROOT.joinpath("recipes", "rnn").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipes_are_valid_and_fit_their_data(path):
    from sparing import sparsify_
    from sparing.macs import count_applications
    from sparing.run.build import build_model
    from sparing.run.method_section import build_method

    loaded = load_recipe(path)
    sizes = {"watch": (7, 6), "har2": (2, 9), "spoken_digits": (10, 32), "google12": (12, 32)}
    classes, features = sizes[loaded.data.name]
    model = build_model(loaded.model, {"num_classes": classes, "input_size": features}).to("meta")
    if loaded.method is not None:
        sparsify_(model, build_method(loaded.method), loaded.select, 100)
    assert count_applications(model, (1, 3, features))


def test_to_keeps_the_type_of_the_data_set(har):
    data = har2(str(har))
    assert isinstance(data, SequenceData)
    assert isinstance(data.to(torch.device("cpu")), SequenceData)
    assert data.size("test") == len(data.test)
