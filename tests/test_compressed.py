"""Compressed files: lossless round trip, size near the entropy bound, errors for damaged files."""

import copy
import json
import re
import struct
import zlib
from pathlib import Path
from unittest import mock
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparing
from sparing.export import compressed
from sparing.export.compressed import DTYPES, INTEGERS, Compressed, entropy_bound, load, save


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])


def assert_same(loaded, saved):
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(bits(loaded[name]), bits(tensor)), name


def random_sparse(shape, density, dtype=torch.float32):
    # torch.where, because multiplying by a mask would create −0.0.
    return torch.where(torch.rand(shape) < density, torch.randn(shape), 0.0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("density", [0, 0.003, 0.1, 0.6, 1])
def test_round_trip_is_lossless(tmp_path, dtype, density):
    raw = torch.randint(-128, 128, (37, 11, dtype.itemsize), dtype=torch.int8)  # includes NaN and infinity
    if dtype is torch.bool:
        raw = raw % 2
    tensor = raw.view(dtype)[..., 0] if dtype.itemsize > 1 else raw[..., 0].contiguous().view(dtype)
    whole = tensor.repeat(30, 1).contiguous()
    bits(whole)[torch.rand(whole.numel()) >= density] = 0
    saved = {"some.weight": whole, "empty": whole[:0], "one": whole[0, 0].clone(), "transposed": whole.T}
    save(saved, tmp_path / "file")
    assert_same(load(tmp_path / "file"), saved)


def test_round_trip_of_special_values():
    odd = torch.tensor([0x7FC00001, -1, 0x7F800000, -0x80000000, 1, 0], dtype=torch.int32).view(torch.float32)
    saved = {
        "odd": odd.repeat(100),
        "sparse": torch.zeros(9000),
        "scalar": torch.tensor(-0.0),
        "none": torch.empty(0, 3),
    }
    saved["sparse"][::1500] = odd
    save(saved, "odd.safetensors")
    assert_same(load("odd.safetensors"), saved)
    assert Path("odd.safetensors").stat().st_size < 9000


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=100)
def test_round_trip_of_random_positions(data):
    n = data.draw(st.integers(0, 6000))
    nonzero = data.draw(st.lists(st.integers(0, max(n - 1, 0)), max_size=min(n, 40), unique=True))
    tensor = torch.zeros(n)
    tensor[nonzero] = 1.5
    save({"t": tensor}, "runs.safetensors")
    assert_same(load("runs.safetensors"), {"t": tensor})


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def thresholded(budget):
    """Return random normal ResNet-50 weights, thresholded to a published budget."""
    with torch.device("meta"):
        layers = sparing.layers.find_layers(sparing.models.resnet50())
    shares = sparing.Budget.published(budget)
    return {
        f"{name}.weight": sparing.soft_threshold(
            torch.randn(layer.weight.shape), 2**0.5 * float(torch.erfinv(torch.tensor(shares[name])))
        )
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("budget", ["resnet50-str-98.98"])  # bench/export_size.py has all five
def test_size_is_near_the_entropy_bound_for_published_budgets(budget):
    state = thresholded(budget)
    save(state, "resnet50.safetensors")
    assert Path("resnet50.safetensors").stat().st_size <= 1.02 * entropy_bound(state)
    assert_same(load("resnet50.safetensors"), state)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.12, 0.2, 0.5, 0.9, 1.0])
def test_size_is_near_the_entropy_bound_for_every_density(density):
    state = {"weight": random_sparse((1000, 1000), density)}
    save(state, "one.safetensors")
    assert Path("one.safetensors").stat().st_size <= 1.03 * entropy_bound(state) + 1000


def test_the_entropy_bound_counts_what_the_file_stores():
    """Negative zeros are values, and every supported dtype has a bound."""
    assert entropy_bound({"weight": torch.tensor([0.0, -0.0])}) == 4.25
    assert entropy_bound({"weight": torch.tensor([0.0, 1.0]).to(torch.float8_e4m3fn)}) == 1.25


def test_dense_tensor_has_little_overhead():
    save({"dense": torch.randn(1000)}, "dense.safetensors")
    assert Path("dense.safetensors").stat().st_size < 4400


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16])
def test_rounded_values(values):
    state = {"weight": random_sparse((300, 300), 0.1), "dense": torch.randn(30, 30), "bias": torch.randn(300)}
    save(state, "half.safetensors", values=values)
    expected = {"weight": state["weight"].to(values).float(), "dense": state["dense"].to(values).float()}
    assert_same(load("half.safetensors"), expected | {"bias": state["bias"]})
    save(state, "full.safetensors")
    assert Path("half.safetensors").stat().st_size < 0.7 * Path("full.safetensors").stat().st_size


def test_tied_tensors_are_written_once_and_tied_again():
    weight = torch.randn(100, 100)
    state = {"first": weight, "second": weight, "part": weight[:50], "flat": weight.view(-1)}
    save(state, "tied.safetensors")
    assert Path("tied.safetensors").stat().st_size < 105_000
    loaded = load("tied.safetensors")
    assert loaded["first"] is loaded["second"]
    assert_same(loaded, state)


def test_tensor_names_do_not_collide():
    state = {"a": random_sparse((99, 99), 0.1), "a/values": torch.ones(3), "a/gaps": torch.ones(2), "": torch.ones(1)}
    save(state, "names.safetensors")
    assert_same(load("names.safetensors"), state)
    assert list(load("names.safetensors")) == list(state)


def test_tensors_are_read_one_at_a_time(monkeypatch):
    save({"a": random_sparse((99, 99), 0.1), "b": torch.ones(3)}, "two.safetensors")
    decoded = []
    decode = Compressed._decode
    monkeypatch.setattr(Compressed, "_decode", lambda self, name: decoded.append(name) or decode(self, name))
    file = Compressed("two.safetensors")
    assert (list(file), len(file), "b" in file, "c" in file) == (["a", "b"], 2, True, False)
    decoded.clear()
    assert file["b"].tolist() == [1, 1, 1]
    assert decoded == ["b"]
    with pytest.raises(KeyError):
        file["c"]


def test_same_state_dict_gives_the_same_bytes():
    state = {"a": random_sparse((99, 99), 0.1), "b": torch.ones(3)}
    save(state, "1")
    save(state, "2")
    assert Path("1").read_bytes() == Path("2").read_bytes()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, bidirectional=True)
        self.head = nn.Linear(32, 5)


MODELS = {
    **{name: make for name, make in sparing.models.MODELS.items() if name != "resnet50"},
    "lstm": Recurrent,
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_of_a_sparse_network(name):
    model = MODELS[name]()
    sparing.sparsify_(model, sparing.STR(init=-3.5))
    expected = sparing.dense_state_dict(model)
    save(expected, "model.safetensors")
    other = MODELS[name]()
    other.load_state_dict(Compressed("model.safetensors"))
    assert_same(other.state_dict(), sparing.densify_(model).state_dict())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.nn.Linear(2, 2), "state_dict must be a mapping such as model.state_dict(), got Linear"),
        ({1: torch.ones(2)}, "keys of the state dict must be str, got 1"),
        ({"extra": {"a": 1}}, "entry 'extra' of the state dict must be a tensor, got dict"),
        ({"c": torch.ones(2, dtype=torch.complex128)}, "'c' has dtype torch.complex128"),
        ({"s": torch.eye(3).to_sparse()}, "'s' has dtype torch.float32 and layout torch.sparse_coo"),
        ({"m": torch.ones(2, device="meta")}, "'m' is on the meta device"),
    ],
)
def test_invalid_tensor_raises_before_the_file_is_written(state, message):
    with pytest.raises(sparing.InputError, match=re.escape(message)):
        save(state, "refused.safetensors")
    assert not list(Path().iterdir())


def test_overflow_and_invalid_values_raise():
    with pytest.raises(sparing.InputError, match="'w' overflows torch.float16"):
        save({"w": torch.full((2, 2), 1e6)}, "x", values=torch.float16)
    with pytest.raises(
        sparing.InputError, match="values must be None, torch.bfloat16 or torch.float16, got torch.int8"
    ):
        save({"w": torch.ones(2, 2)}, "x", values=torch.int8)
    with pytest.raises(sparing.InputError, match="nowhere/x cannot be written: No such file"):
        save({"w": torch.ones(2, 2)}, "nowhere/x")


STATE = {
    "weight": torch.zeros(40, 30).index_fill_(1, torch.tensor([3, 11, 12]), 1.25),
    "bias": torch.arange(5.0),
    "count": torch.tensor(7),
}


def valid_file():
    save(STATE, "whole.safetensors")
    return Path("whole.safetensors").read_bytes()


def assert_one_line(error):
    assert "\n" not in str(error)


def assert_error_or_same(content):
    Path("mutated.safetensors").write_bytes(content)
    try:
        loaded = load("mutated.safetensors")
    except sparing.CheckpointError as error:
        assert_one_line(error)
    else:  # changed whitespace in JSON has no effect
        assert_same(loaded, STATE)


@given(data=st.data())
@settings(max_examples=100)
def test_damaged_file_raises(data):
    content = bytearray(valid_file())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_error_or_same(bytes(content))


@given(length=st.integers(0, 4000))
def test_truncated_file_raises(length):
    content = valid_file()
    Path("cut.safetensors").write_bytes(content[: length % len(content)])
    with pytest.raises(sparing.CheckpointError, match="unreadable or truncated"):
        load("cut.safetensors")


@given(content=st.binary(max_size=300))
def test_random_bytes_raise(content):
    Path("noise.safetensors").write_bytes(content)
    with pytest.raises(sparing.CheckpointError):
        load("noise.safetensors")


def with_header(change):
    """Return the bytes of the file with a modified header and a valid checksum."""
    content = valid_file()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    head = json.loads(header["__metadata__"]["sparing.compressed"])
    change(head)
    if isinstance(head["tensors"], (dict, list)):
        canonical = json.dumps(head["tensors"], sort_keys=True, separators=(",", ":")).encode()
        head["crc32"] = crc32(canonical)
    header["__metadata__"]["sparing.compressed"] = json.dumps(head)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3),
)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=100)
def test_manipulated_header_raises_without_a_large_allocation(data):
    key = data.draw(st.sampled_from(["dtype", "values", "shape", "encoding", "crc32"]))
    if key == "shape":
        new = data.draw(st.lists(st.integers(-3, 2**66), max_size=4) | values)
    else:
        new = data.draw(st.sampled_from([*DTYPES, "dense", "gaps"]) | st.integers(-2, 70) | values)
    Path("forged.safetensors").write_bytes(with_header(lambda head: head["tensors"]["weight"].__setitem__(key, new)))
    with mock.patch("torch.zeros", wraps=torch.zeros) as zeros:
        try:
            loaded = load("forged.safetensors")
        except sparing.CheckpointError as error:
            assert_one_line(error)
        else:
            assert loaded["weight"].numel() == 1200
    made = [call.args[0] for call in zeros.call_args_list]
    assert all(n <= 2**20 for n in made if isinstance(n, int))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.update(version=1), "format version 1 is not supported; this sparing reads version 2"),
        (lambda head: head.update(tensors=[]), "header is damaged"),
        (lambda head: head["tensors"]["weight"].update(shape=[10**11, [None]]),
         "the shape is not a list of non-negative integers"),
        (lambda head: head["tensors"].update(weight="absent"), "header is damaged"),
        (lambda head: head["tensors"].update(weight=3), "header is damaged"),
        (lambda head: head["tensors"]["weight"].update(shape=[10**9, 9]),
         "'weight' is damaged .the gaps cover 120 values and 1200 elements of 120 and 9000000000"),
        (lambda head: head["tensors"]["bias"].update(shape=[5, 1]), "'bias' is damaged .the stored shape is"),
    ],
)  # fmt: skip
def test_error_names_the_cause(change, message):
    Path("forged.safetensors").write_bytes(with_header(change))
    with pytest.raises(sparing.CheckpointError, match=message):
        load("forged.safetensors")


def test_values_of_another_dtype_of_the_same_size_raise():
    Path("other.safetensors").write_bytes(valid_file().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    with pytest.raises(sparing.CheckpointError, match="the values have dtype torch.int32, expected float32"):
        load("other.safetensors")


def test_changed_shape_in_the_header_raises():
    content = valid_file()
    assert b"[40, 30]" in content
    Path("turned.safetensors").write_bytes(content.replace(b"[40, 30]", b"[30, 40]"))
    with pytest.raises(sparing.CheckpointError, match="the header is damaged"):
        load("turned.safetensors")


GAPS = bytes([3, 66, 255, 174])  # values at 3 and 70 of 500


@pytest.mark.parametrize(
    ("content", "values", "elements"),
    [
        (zlib.compress(GAPS), 1, 500),
        (zlib.compress(GAPS), 3, 500),
        (zlib.compress(GAPS), 2, 499),
        (zlib.compress(GAPS + b"\xff"), 2, 500),
        (zlib.compress(b""), 0, 0),
        (zlib.compress(GAPS)[:-5], 2, 500),
        (zlib.compress(GAPS) + b"x", 2, 500),
        (zlib.compress(b"\xff" * 10**6 + b"\0"), 0, 255 * 10**6),  # matches, which the writer does not use
        (GAPS, 2, 500),
        (b"", 0, 0),
    ],
)
def test_inconsistent_gaps_raise(content, values, elements):
    def positions(content, *counts):
        return compressed._positions(torch.tensor(list(content), dtype=torch.uint8), *counts).tolist()

    assert positions(zlib.compress(GAPS), 2, 500) == [3, 70]
    with pytest.raises((ValueError, zlib.error), match="gaps|Error -3 while decompressing"):
        positions(content, values, elements)


def test_gaps_of_many_zeros_expand_within_the_limit():
    save({"zero": torch.zeros(10**7)}, "zero.safetensors")
    assert Path("zero.safetensors").stat().st_size < 10_000
    assert_same(load("zero.safetensors"), {"zero": torch.zeros(10**7)})


def test_other_and_missing_files_raise():
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, "plain.safetensors")
    with pytest.raises(sparing.CheckpointError, match="not written by sparing.export.compressed"):
        load("plain.safetensors")
    with pytest.raises(sparing.CheckpointError, match="there is no such file"):
        load("absent.safetensors")


def test_failed_write_keeps_the_old_file(monkeypatch):
    before = valid_file()
    state = copy.copy(STATE)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparing.export.compressed.save_file", fail)
    with pytest.raises(sparing.InputError, match="No space left"):
        save(state, "whole.safetensors")
    assert Path("whole.safetensors").read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["whole.safetensors"]


def test_reader_in_the_documentation_agrees():
    page = Path(compressed.__file__).parents[3].joinpath("docs/format.md").read_text()
    reader = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL).group(1)
    assert len(reader[reader.index("def ") :].splitlines()) <= 15
    assert "sparing" not in re.findall(r"^(?:import|from) (\w+)", reader, re.MULTILINE)
    namespace = {}
    exec(reader, namespace)
    state = {name: random_sparse((200, 50), 0.05).to(dtype) for name, dtype in DTYPES.items()}
    state |= {
        "dense": torch.randn(3, 3),
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 2),
        "zero": torch.zeros(9999),
    }
    state["tied"] = state["float32"]
    for rounding in (None, torch.bfloat16, torch.float16):
        save(state, "file.safetensors", values=rounding)
        assert_same(namespace["read"]("file.safetensors"), load("file.safetensors"))


def test_lazily_loaded_file_can_be_saved_again(tmp_path):
    state = {f"layer{index}": torch.randn(64, 64) for index in range(6)}
    compressed.save(state, tmp_path / "first.safetensors")
    compressed.save(Compressed(tmp_path / "first.safetensors"), tmp_path / "second.safetensors")
    again = compressed.load(tmp_path / "second.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
