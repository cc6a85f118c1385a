"""Compressed files: every bit comes back, the size is near the bound, and damage is refused."""

import copy
import json
import re
import struct
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

FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])


def assert_same(loaded, saved):
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(bits(loaded[name]), bits(tensor)), name


def random_sparse(shape, density, dtype=torch.float32):
    return torch.where(torch.rand(shape) < density, torch.randn(shape), 0.0).to(dtype)  # a product would make −0.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("density", [0, 0.003, 0.1, 0.6, 1])
def test_every_bit_comes_back(tmp_path, dtype, density):
    raw = torch.randint(-128, 128, (37, 11, dtype.itemsize), dtype=torch.int8)  # NaNs and infinities among them
    if dtype is torch.bool:
        raw = raw % 2
    tensor = raw.view(dtype)[..., 0] if dtype.itemsize > 1 else raw[..., 0].contiguous().view(dtype)
    whole = tensor.repeat(30, 1).contiguous()
    bits(whole)[torch.rand(whole.numel()) >= density] = 0
    saved = {"some.weight": whole, "empty": whole[:0], "one": whole[0, 0].clone(), "transposed": whole.T}
    save(saved, tmp_path / "file")
    assert_same(load(tmp_path / "file"), saved)


def test_odd_numbers_come_back():
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


@given(data=st.data())
@settings(max_examples=150)
def test_any_runs_come_back(data):
    n = data.draw(st.integers(0, 6000))
    live = data.draw(st.lists(st.integers(0, max(n - 1, 0)), max_size=min(n, 40), unique=True))
    tensor = torch.zeros(n)
    tensor[live] = 1.5
    save({"t": tensor}, "runs.safetensors")
    assert_same(load("runs.safetensors"), {"t": tensor})


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def thresholded(budget):
    """ResNet-50's weights, normal and thresholded to a published budget."""
    with torch.device("meta"):
        layers = sparing.layers.find_layers(sparing.models.resnet50())
    shares = sparing.Budget.published(budget)
    return {
        f"{name}.weight": sparing.soft_threshold(
            torch.randn(layer.weight.shape), 2**0.5 * float(torch.erfinv(torch.tensor(shares[name])))
        )
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("budget", ["resnet50-str-90.23", "resnet50-str-98.98"])  # all five in bench/export_size.py
def test_the_size_is_near_the_entropy_of_the_published_networks(budget):
    state = thresholded(budget)
    save(state, "resnet50.safetensors")
    assert Path("resnet50.safetensors").stat().st_size <= 1.02 * entropy_bound(state)
    assert_same(load("resnet50.safetensors"), state)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.12, 0.2, 0.5, 0.9, 1.0])
def test_no_density_costs_much_more_than_it_must(density):
    state = {"weight": random_sparse((1000, 1000), density)}
    save(state, "one.safetensors")
    assert Path("one.safetensors").stat().st_size <= 1.03 * entropy_bound(state) + 1000


def test_a_dense_tensor_costs_its_bytes():
    save({"dense": torch.randn(1000)}, "dense.safetensors")
    assert Path("dense.safetensors").stat().st_size < 4400


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16])
def test_rounded_values_are_the_rounded_weights(values):
    state = {"weight": random_sparse((300, 300), 0.1), "dense": torch.randn(30, 30), "bias": torch.randn(300)}
    save(state, "half.safetensors", values=values)
    expected = {"weight": state["weight"].to(values).float(), "dense": state["dense"].to(values).float()}
    assert_same(load("half.safetensors"), expected | {"bias": state["bias"]})
    save(state, "full.safetensors")
    assert Path("half.safetensors").stat().st_size < 0.7 * Path("full.safetensors").stat().st_size


def test_tied_tensors_are_written_once_and_come_back_tied():
    weight = torch.randn(100, 100)
    state = {"first": weight, "second": weight, "part": weight[:50], "flat": weight.view(-1)}
    save(state, "tied.safetensors")
    assert Path("tied.safetensors").stat().st_size < 105_000
    loaded = load("tied.safetensors")
    assert loaded["first"] is loaded["second"]
    assert_same(loaded, state)


def test_names_cannot_collide():
    state = {"a": random_sparse((99, 99), 0.1), "a/values": torch.ones(3), "a/runs": torch.ones(2), "": torch.ones(1)}
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


def test_the_same_state_gives_the_same_bytes():
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
def test_a_sparse_network_comes_back(name):
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
        ({"extra": {"a": 1}}, "entry 'extra' of the state_dict is a dict, not a tensor"),
        ({"c": torch.ones(2, dtype=torch.complex128)}, "'c' is torch.complex128"),
        ({"s": torch.eye(3).to_sparse()}, "'s' is torch.float32 of layout torch.sparse_coo"),
        ({"m": torch.ones(2, device="meta")}, "'m' is on the meta device"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(state, message):
    with pytest.raises(sparing.InputError, match=re.escape(message)):
        save(state, "refused.safetensors")
    assert not list(Path().iterdir())


def test_values_too_large_or_of_another_kind_are_refused():
    with pytest.raises(sparing.InputError, match="'w' holds numbers too large for torch.float16"):
        save({"w": torch.full((2, 2), 1e6)}, "x", values=torch.float16)
    with pytest.raises(sparing.InputError, match="values=torch.int8 is none of"):
        save({"w": torch.ones(2, 2)}, "x", values=torch.int8)
    with pytest.raises(sparing.InputError, match="nowhere/x cannot be written: No such file"):
        save({"w": torch.ones(2, 2)}, "nowhere/x")


STATE = {
    "weight": torch.zeros(40, 30).index_fill_(1, torch.tensor([3, 11, 12]), 1.25),
    "bias": torch.arange(5.0),
    "count": torch.tensor(7),
}


def whole_file():
    save(STATE, "whole.safetensors")
    return Path("whole.safetensors").read_bytes()


def one_sentence(error):
    assert "\n" not in str(error)


def refused_or_right(content):
    Path("mutated.safetensors").write_bytes(content)
    try:
        loaded = load("mutated.safetensors")
    except sparing.CheckpointError as error:
        one_sentence(error)
    else:  # a changed space between two words of JSON changes nothing
        assert_same(loaded, STATE)


@given(data=st.data())
@settings(max_examples=150)
def test_a_damaged_file_is_refused(data):
    content = bytearray(whole_file())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    refused_or_right(bytes(content))


@given(length=st.integers(0, 4000))
def test_a_truncated_file_is_refused(length):
    content = whole_file()
    Path("cut.safetensors").write_bytes(content[: length % len(content)])
    with pytest.raises(sparing.CheckpointError, match="unreadable or truncated"):
        load("cut.safetensors")


@given(content=st.binary(max_size=300))
def test_noise_is_refused(content):
    Path("noise.safetensors").write_bytes(content)
    with pytest.raises(sparing.CheckpointError):
        load("noise.safetensors")


def forge(change):
    """The whole file with a header changed by someone who knows how to compute a checksum."""
    content = whole_file()
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


@given(data=st.data())
@settings(max_examples=150)
def test_a_forged_header_is_refused_without_a_large_allocation(data):
    key = data.draw(st.sampled_from(["dtype", "values", "shape", "encoding", "bits", "crc32"]))
    if key == "shape":
        new = data.draw(st.lists(st.integers(-3, 2**66), max_size=4) | values)
    else:
        new = data.draw(st.sampled_from([*DTYPES, "dense", "runs"]) | st.integers(-2, 70) | values)
    Path("forged.safetensors").write_bytes(forge(lambda head: head["tensors"]["weight"].__setitem__(key, new)))
    with mock.patch("torch.zeros", wraps=torch.zeros) as zeros:
        try:
            loaded = load("forged.safetensors")
        except sparing.CheckpointError as error:
            one_sentence(error)
        else:
            assert loaded["weight"].numel() == 1200
    made = [call.args[0] for call in zeros.call_args_list]
    assert all(n <= 2**20 for n in made if isinstance(n, int))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.update(version=2), "has version 2 of the format; this sparing reads version 1"),
        (lambda head: head.update(tensors=[]), "header is damaged"),
        (lambda head: head["tensors"]["weight"].update(shape=[10**11, [None]]), "its shape is no list of lengths"),
        (lambda head: head["tensors"].update(weight="absent"), "header is damaged"),
        (lambda head: head["tensors"].update(weight=3), "header is damaged"),
        (lambda head: head["tensors"]["weight"].update(shape=[10**9, 9]), "'weight' is damaged .its runs cover 1200"),
        (lambda head: head["tensors"]["bias"].update(shape=[5, 1]), "'bias' is damaged .its shape is"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(change, message):
    Path("forged.safetensors").write_bytes(forge(change))
    with pytest.raises(sparing.CheckpointError, match=message):
        load("forged.safetensors")


def test_values_of_another_dtype_of_the_same_size_are_refused():
    Path("other.safetensors").write_bytes(whole_file().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    with pytest.raises(sparing.CheckpointError, match="its values are torch.int32, not float32"):
        load("other.safetensors")


def test_a_shape_that_turned_in_the_header_is_refused():
    content = whole_file()
    assert b"[40, 30]" in content
    Path("turned.safetensors").write_bytes(content.replace(b"[40, 30]", b"[30, 40]"))
    with pytest.raises(sparing.CheckpointError, match="its header is damaged"):
        load("turned.safetensors")


@pytest.mark.parametrize(("values", "bits"), [(1, 0), (3, 0), (2, 9), (2, -1), (99, 8)])
def test_runs_that_lead_elsewhere_are_refused(values, bits):
    entry, parts = compressed._encode(torch.zeros(500).index_fill_(0, torch.tensor([3, 70]), 1.0))
    assert compressed._positions(parts["runs"], 2, entry["bits"], 500).tolist() == [3, 70]
    bitmask = compressed._pack(torch.zeros(10, dtype=torch.uint8).index_fill_(0, torch.tensor([2, 4, 9]), 1))
    assert compressed._positions(bitmask, 2, 0, 9).tolist() == [2, 4]
    with pytest.raises(ValueError, match=r"runs|not possible"):
        compressed._positions(bitmask, values, bits, 9)


def test_other_files_are_refused():
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, "plain.safetensors")
    with pytest.raises(sparing.CheckpointError, match="was not written by sparing.export.compressed"):
        load("plain.safetensors")
    with pytest.raises(sparing.CheckpointError, match="there is no such file"):
        load("absent.safetensors")


def test_a_killed_write_leaves_the_old_file(monkeypatch):
    before = whole_file()
    state = copy.copy(STATE)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(sparing.InputError, match="No space left"):
        save(state, "whole.safetensors")
    assert Path("whole.safetensors").read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["whole.safetensors"]


def test_the_reader_of_the_documentation_agrees():
    page = Path(compressed.__file__).parents[3].joinpath("docs/format.md").read_text()
    reader = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL).group(1)
    assert len(reader.splitlines()) < 60
    assert "sparing" not in re.findall(r"^(?:import|from) (\w+)", reader, re.MULTILINE)
    namespace = {}
    exec(reader, namespace)
    names = ("float64", "float32", "float16", "int64", "int16", "uint8", "bool")
    state = {name: random_sparse((200, 50), 0.05).to(DTYPES[name]) for name in names}
    state |= {
        "dense": torch.randn(3, 3),
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 2),
        "zero": torch.zeros(9999),
    }
    state["tied"] = state["float32"]
    for rounding in (None, torch.bfloat16, torch.float16):
        save(state, "file.safetensors", values=rounding)
        read, expected = namespace["read"]("file.safetensors"), load("file.safetensors")
        assert list(read) == list(expected)
        for name, array in read.items():
            assert array.dtype == expected[name].numpy().dtype
            assert array.shape == expected[name].shape
            assert array.tobytes() == expected[name].numpy().tobytes(), name


def test_what_is_loaded_lazily_can_be_saved_again(tmp_path):
    state = {f"layer{index}": torch.randn(64, 64) for index in range(6)}
    compressed.save(state, tmp_path / "first.safetensors")
    compressed.save(Compressed(tmp_path / "first.safetensors"), tmp_path / "second.safetensors")
    again = compressed.load(tmp_path / "second.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
