"""Files of compiled networks: they load to the same network, and damaged or hostile ones raise InputError."""

import errno
import json
import os
import random
import struct
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing.engine import encoding
from sparing.engine import file as module
from sparing.engine.file import KEY, VERSION, load, save
from sparing.engine.program import Call, Constant, Program, Ref
from sparing.engine.shapes import Count
from sparing.formats import save_engine

pytestmark = pytest.mark.usefixtures("engine_library")


class Model(nn.Module):
    """Every operation of the engine, and an embedding and sizes that depend on the batch in PyTorch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.depthwise, self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)
        self.embedding, self.tied = nn.Embedding(5, 16), nn.Linear(16, 5)
        self.tied.weight = self.embedding.weight
        self.register_buffer("limit", torch.tensor(3, dtype=torch.int64))

    def forward(self, x, tokens):
        x = self.depthwise(self.stem(x))
        x = torch.cat([x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))), x], 1)
        y = x.flatten(2).transpose(1, 2) + self.embedding(tokens.clamp(max=self.limit))[:, None]
        y = F.layer_norm(y, (16,)).masked_fill(y > 100, float("-inf")).softmax(1)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return {
            "y": (self.head(self.norm(y)), [self.tied(y.mean(1))]),
            "none": None,
            "n": x.shape[0],
            "limit": self.limit,
        }


EXAMPLE = torch.randn(1, 3, 10, 10), torch.zeros(1, dtype=torch.long)


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand_like(parameter) < 0.5
    return sparing.engine.compile(model, EXAMPLE)


@pytest.fixture(scope="module")
def path(engine, tmp_path_factory):
    return save(engine, tmp_path_factory.mktemp("engine") / "model.engine")


@pytest.mark.slow
def test_loaded_network_gives_the_same_outputs(engine, path):
    loaded = load(path, threads=engine.threads)
    for batch in (1, 3):
        inputs = torch.randn(batch, 3, 10, 10), torch.randint(5, (batch,))
        found, expected = loaded(*inputs), engine(*inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found["none"] is None
        assert found["n"] == batch
        assert found["limit"] == 3
        assert isinstance(found["y"], tuple)
    assert loaded.summary() == engine.summary()
    assert load(path).threads == torch.get_num_threads()
    assert load(path, threads=3).threads == 3
    again = path.with_name("again.engine")
    save(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(sparing.InputError, match=r"compiled for input x of shape \[batch, 3, 10, 10\]"):
        loaded(torch.ones(1, 3, 9, 9), inputs[1][:1])


def test_file_has_the_nonzero_weights_only(tmp_path):
    model = nn.Linear(512, 512)
    with torch.no_grad():
        model.weight *= torch.rand_like(model.weight) < 0.05
    nonzero = int(model.weight.count_nonzero())
    written = save(sparing.engine.compile(model, (1, 512)), tmp_path / "model.engine")
    assert nonzero * 6 < written.stat().st_size < nonzero * 6 + 8000  # four bytes of value and two of position


def test_wide_layers_have_longer_positions(tmp_path):
    model = nn.Linear(70000, 2)
    with torch.no_grad():
        model.weight *= torch.rand_like(model.weight) < 0.001
    x = torch.randn(2, 70000)
    save(sparing.engine.compile(model, (1, 70000)), tmp_path / "model.engine")
    torch.testing.assert_close(load(tmp_path / "model.engine")(x), model(x))


@pytest.mark.slow
def test_other_containers_are_saved_with_a_warning(tmp_path):
    class Named(nn.Module):
        def forward(self, x):
            return namedtuple("Pair", "one other")(x + 1, [x])

    engine = sparing.engine.compile(Named(), (1, 3))
    with pytest.warns(sparing.SparsityWarning, match="returns a dict or tuple in place of Pair"):
        save(engine, tmp_path / "model.engine")
    x = torch.ones(2, 3)
    torch.testing.assert_close(load(tmp_path / "model.engine")(x), (x + 1, [x]))


def test_what_cannot_be_written_raises(engine, tmp_path):
    with pytest.raises(sparing.InputError, match="nowhere/no.engine cannot be written: No such file"):
        save(engine, tmp_path / "nowhere" / "no.engine")
    with pytest.raises(sparing.InputError, match="writes what compile returns, got Linear"):
        save(nn.Linear(2, 2), tmp_path / "no.engine")

    @torch.library.custom_op("sparing_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(lambda x: torch.empty_like(x))

    class Custom(nn.Module):
        def forward(self, x):
            return double(x)

    with pytest.raises(sparing.InputError, match="operator 'sparing_test.double.default' is not permitted in a file"):
        save(sparing.engine.compile(Custom(), (1, 3)), tmp_path / "no.engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default", "aten.add_.Tensor", "aten.set_.source_Storage", "aten.resize_.default", "os.system",
        "aten.empty.memory_format", "aten.new_empty.default", "aten.elu_backward.default",
        "aten.segment_reduce.default",
        "aten.relu.out", "aten.as_strided.default", "aten._unsafe_index.Tensor", "aten.unsafe_split.Tensor", "eval",
        "prim.device.default", "aten.nothing.default", "aten.add", "aten.add.Nothing", "__builtins__", "aten.__class__",
        "aten.add.__class__", "aten.to_mkldnn.default", "aten.record_stream.default", "", ".", "aten..", "c10d.recv_",
        "aten.__init__.default", "aten.add.Tensor.default", "inductor.accumulate_grad_.default", "aten.add.overloads",
    ],
)  # fmt: skip
def test_operators_that_are_not_permitted(name):
    with pytest.raises(sparing.InputError, match="operator"):
        module._check_operator(name)


def test_arguments_survive():
    values = [
        1, -(2**40), True, None, 2.5, float("inf"), float("-inf"), "tanh", "bij,bjk->bik", [1, [2.0]], (1, (2,)),
        Ref(3), Constant("a.b"), Count(3, True), torch.float32, torch.bool, torch.contiguous_format, torch.strided,
        torch.device("cpu"), {"a": Ref(1), "b": []}, 0, False, 1.0,
    ]  # fmt: skip
    decoded = encoding.decode(json.loads(json.dumps(encoding.encode(values), allow_nan=False)))
    assert decoded == values
    assert [type(value) for value in decoded] == [type(value) for value in values]
    assert encoding.decode(encoding.encode(float("nan"))) != 0
    for wrong in (object(), "/etc/passwd", "x" * 101, torch.device("cuda"), 1j, torch.ones(1), {1: 2}):
        with pytest.raises(sparing.InputError):
            encoding.encode(wrong)


def parts(path):
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, target, change, seal=True):
    """Write a file again after changing the JSON of its program, with the right checksum."""
    header, data = parts(path)
    content = json.loads(header["__metadata__"][KEY])
    changed = change(content)
    content = content if changed is None else changed
    if seal:
        from safetensors.torch import load_file

        content["crc32"] = module._checksum(content["program"], load_file(path))
    header["__metadata__"][KEY] = json.dumps(content)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return target


def test_a_rewritten_file_loads(path, tmp_path):
    rewrite(path, tmp_path / "same.engine", lambda content: None)
    load(tmp_path / "same.engine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=VERSION + 1), "has version 2, and this sparing reads version 1; update sparing"),
        (lambda c: c.update(version="1"), "is damaged: unknown version '1'"),
        (lambda c: c.update(format="other"), "not one of sparing.engine.save"),
        (lambda c: [], "not one of sparing.engine.save"),
        (lambda c: c.update(crc32=0), "is damaged: its checksum is wrong"),
        (lambda c: c.pop("program") and None, r"is damaged: its program is malformed \(KeyError: 'program'\)"),
    ],
)
def test_other_files_and_versions(path, tmp_path, change, message):
    with pytest.raises(sparing.InputError, match=message):
        load(rewrite(path, tmp_path / "wrong.engine", change, seal=False))


def test_files_that_are_not_of_the_engine(path, tmp_path):
    for name, data, message in [
        ("text", b"hello", "is not a safetensors file, or it is truncated"),
        ("empty", b"", "is not a safetensors file, or it is truncated"),
        ("half", path.read_bytes()[: path.stat().st_size // 2], "is not a safetensors file, or it is truncated"),
        ("huge", struct.pack("<Q", 2**62) + b"{}", "is not a safetensors file, or it is truncated"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(sparing.InputError, match=f"{name} {message}"):
            load(tmp_path / name)
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(sparing.InputError, match="cannot be read: "):
            load(missing)
    sparing.export.compressed.save({"x": torch.ones(2)}, tmp_path / "compressed")
    with pytest.raises(sparing.InputError, match="is a safetensors file, but not one of sparing.engine.save"):
        load(tmp_path / "compressed")


def steps(content, kind):
    return [step for step in content["program"]["steps"] if kind in step]


def first_operation(content, name):
    segments = [step["segment"] for step in steps(content, "segment")]
    return next(one for segment in segments for one in segment["operations"] if one["operation"] == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: steps(c, "call")[0].update(call="aten.from_file.default"), "'aten.from_file.default' is not perm"),
        (lambda c: steps(c, "call")[0].update(args={"tuple": []}), "does not take these arguments"),
        (lambda c: steps(c, "call")[0].update(args={"tuple": [{"value": 99}] * 3}), "does not take|value 99 is us"),
        (lambda c: steps(c, "call")[0].update(output=0), "a value is computed twice"),
        (lambda c: steps(c, "segment")[0].update(inputs=[]), "another number of inputs"),
        (lambda c: steps(c, "segment")[0].update(inputs=[-1]), "value -1 is used before"),
        (lambda c: first_operation(c, "Convolution").update(values=None), "values of Convolution is missing"),
        (lambda c: first_operation(c, "Convolution").update(output=77), "there is no tensor 77"),
        (lambda c: first_operation(c, "Convolution").update(activation=["relu"]), "must not be"),
        (lambda c: first_operation(c, "Convolution").update(activation="exp"), "activation must be one of"),
        (lambda c: first_operation(c, "Pool").update(window=[[2, 2]] * 4), "makes"),
        (lambda c: first_operation(c, "Copy").update(channels=0), "channels must be an integer in"),
        (lambda c: first_operation(c, "LayerNorm").update(epsilon=-1.0), "epsilon must be a number"),
        (lambda c: first_operation(c, "LayerNorm").update(centered=2), "centered must be true or false"),
        (lambda c: first_operation(c, "Attention").update(shared=2**40), "shared must be an integer in"),
        (lambda c: first_operation(c, "Affine").update(scale=None), "belongs to nothing"),
        (lambda c: c["program"]["inputs"].pop() and None, "the arguments are not the inputs"),
        (lambda c: c["program"]["inputs"][0].update(dtype="complex64"), "KeyError: 'complex64'"),
        (lambda c: c["program"].update(positional=5), "the arguments are not the inputs"),
        (lambda c: c["program"].update(weights=0), "are not zero"),
        (lambda c: c["program"].update(outputs={"value": 1000}), "value 1000 is returned"),
        (lambda c: c["program"].update(outputs={"constant": "x"}), "there is no constant 'x'"),
        (lambda c: c["program"].update(outputs=json.loads("[" * 900 + "]" * 900)), "RecursionError"),
    ],
)  # fmt: skip
def test_inconsistent_programs(path, tmp_path, change, message):
    with pytest.raises(sparing.InputError, match=f"wrong.engine is damaged: .*({message})"):
        load(rewrite(path, tmp_path / "wrong.engine", change))


def test_random_bytes_raise_input_error(path, tmp_path):
    data, rng = path.read_bytes(), random.Random(0)
    (length,) = struct.unpack("<Q", data[:8])
    target = tmp_path / "wrong.engine"
    for trial in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 5))):
            changed[rng.randrange(8 + length if trial % 3 else len(data))] = rng.randrange(256)
        if trial % 7 == 0:
            del changed[rng.randrange(len(changed)) :]
        target.write_bytes(changed)
        if bytes(changed) != data:
            with pytest.raises(sparing.InputError, match="wrong.engine "):
                load(target)


VALUES = (
    0, 1, -1, 2, 7, 2**31, 2**63, 2**70, 0.5, True, False, None, "", "relu", "x" * 1000, [], {}, [[]], [1, 2, 3, 4],
    {"value": 0}, {"value": -1}, {"constant": "limit"}, {"count": [1, True]}, {"count": [2**62, True]},
    {"dtype": "float64"}, {"tuple": [{"value": 0}]}, {"dict": [["a", 1]]}, {"unknown": 1}, "aten.add.Tensor",
)  # fmt: skip


def places(tree, found):
    """Every container with a key in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        places(value, found)
    return found


@pytest.mark.slow
def test_random_programs_raise_input_error_or_run_without_harm(path, tmp_path):
    rng, inputs = random.Random(0), (torch.randn(2, 3, 10, 10), torch.tensor([1, 2]))
    messages, trials = [], 300
    for _ in range(trials):

        def change(content):
            for _ in range(rng.choice((1, 1, 2, 4))):
                container, key = rng.choice(places(content["program"], []))
                action = rng.randrange(4)
                if action == 0 and isinstance(container, list):
                    container.append(container[key])
                elif action == 1:
                    del container[key]
                elif action == 2 and isinstance(container, list):
                    other = rng.randrange(len(container))
                    container[key], container[other] = container[other], container[key]
                else:
                    container[key] = rng.choice(VALUES)

        target = rewrite(path, tmp_path / "wrong.engine", change)
        try:
            loaded = load(target)
        except sparing.InputError as error:
            messages.append(str(error))
            continue
        # Operators of PyTorch may refuse their arguments.
        with suppress(sparing.InputError, RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
            loaded(*inputs)
    assert all("wrong.engine is damaged: " in message for message in messages)
    assert len(messages) > trials / 2


def test_an_export_to_a_full_disk_names_the_file_and_leaves_none(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        sparing.InputError, match=f"^{tmp_path}/full.engine cannot be written: No space left on device$"
    ):
        save_engine(nn.Linear(4, 2), tmp_path / "full.engine", (1, 4))
    assert not list(tmp_path.iterdir())


def test_programs_check_the_order_of_values(engine):
    program = engine.program
    swapped = replace_steps(program, tuple(reversed(program.steps)))
    with pytest.raises(sparing.InputError, match="is used before it is computed"):
        swapped()
    call = next(step for step in program.steps if isinstance(step, Call))
    with pytest.raises(sparing.InputError, match="a value is computed twice"):
        replace_steps(program, (*program.steps, call))()
    with pytest.raises(sparing.InputError, match="there is no constant 'absent'"):
        replace_steps(program, (*program.steps, replace(call, args=(Constant("absent"),), output=10**6)))()


def replace_steps(program, new):
    return lambda: Program(
        program.inputs, program.arguments, program.positional, new, program.outputs, program.constants, program.weights
    )
