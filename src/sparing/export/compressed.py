"""Files as small as the network is sparse: safetensors that leave out the zeros.

    bytes of a tensor = bytes of its nonzero values + bytes of the runs of zeros between them

A run of r zeros is written in a Rice code of b bits: r >> b zeros and a one, and the low b bits of r.
For b = 0 that is a bitmask of the tensor; larger b is shorter where few weights live. Each tensor
takes the b that is shortest for it, or stays dense where that is shorter still. The code comes
within a few percent of the entropy of the positions, so the file is about as small as can be:
`entropy_bound` says how small that is. `docs/format.md` has the format, and a reader without sparing.

Source: Rice and Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft
television data", IEEE Transactions on Communication Technology, 1971; Golomb, "Run-length encodings",
IEEE Transactions on Information Theory, 1966.
"""

import json
from collections.abc import Iterator, Mapping
from math import log2, prod
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from sparing.errors import CheckpointError, InputError
from sparing.files import atomic_write

VERSION = 1

# A run never takes fewer than (run >> MOST_BITS) bits, so a reader never makes more than 2048 elements
# of one byte, whatever a file claims.
MOST_BITS = 8

# What a second entry in the header costs, about: tensors that would save less stay dense.
ENTRY = 128

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
        torch.bool,
    )
}  # fmt: skip
"""What a file can hold, by the name it has there."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes an element: what a tensor is looked at as, so that −0.0 and every NaN count as values."""


def save(state_dict: Mapping[str, Tensor], path: str | Path, values: torch.dtype | None = None) -> None:
    """Write a state_dict without its zeros, whole or not at all.

    Every bit is kept, so −0.0 is a value like any other. A weight multiplied by a mask is full of
    them; `torch.where(mask, weight, 0.0)`, or adding 0.0, makes them zeros. sparing's own methods make none.

    Args:
        state_dict: tensors by name, of a densified model or of `sparing.dense_state_dict`. Tensors that
            are one and the same under several names are written once.
        path: the file.
        values: None keeps every bit. `torch.bfloat16` or `torch.float16` rounds the floating point
            tensors of two dimensions and more, the weights, to it; vectors such as biases and the
            statistics of normalization keep every bit all the same.

    Raises:
        InputError: an entry is not a dense tensor of one of `DTYPES` on a real device; `values` is none
            of the three; a weight is too large for `values`; the file cannot be written.

    Examples:
        >>> weight = torch.where(torch.rand(1000, 1000) < 0.01, 1.5, 0.0)
        >>> save({"weight": weight}, "weight.safetensors")
        >>> Path("weight.safetensors").stat().st_size < 0.015 * 4_000_000
        True
        >>> torch.equal(load("weight.safetensors")["weight"], weight)
        True
        >>> Path("weight.safetensors").unlink()
    """
    from safetensors.torch import save_file

    if values not in (None, torch.bfloat16, torch.float16):
        raise InputError(f"values={values} is none of None, torch.bfloat16 and torch.float16")
    parts: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    # Held until the end: a mapping that makes its tensors on demand would reuse the address that tells ties.
    for name, tensor in dict(state_dict).items():
        _check(name, tensor)
        tensor = tensor.detach()
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            entries[name] = first[place]
            continue
        first[place] = name
        # Cloned, since safetensors refuses tensors that share memory, as views do.
        stored = _round(name, tensor.cpu().clone(memory_format=torch.contiguous_format), values)
        entry, made = _encode(stored)
        entries[name] = {
            "dtype": _name(tensor.dtype), "values": _name(stored.dtype), "shape": list(tensor.shape), **entry,
            "crc32": _checksum(made.values()),
        }  # fmt: skip
        parts |= {f"{name}/{kind}": part for kind, part in made.items()}
    head = json.dumps({"version": VERSION, "crc32": crc32(_canonical(entries)), "tensors": entries})
    try:
        with atomic_write(path) as temporary:
            save_file(parts, temporary, metadata={"sparing.compressed": head})
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def load(path: str | Path) -> dict[str, Tensor]:
    """Read all of a file: the state_dict that was saved, zeros included, on the CPU.

    Equal to the last bit for what was saved with `values=None`.

    Raises:
        CheckpointError: the file is missing, damaged, not one of ours or of a newer version.

    Examples:
        >>> save({"scale": torch.tensor(-0.0)}, "scale.safetensors")
        >>> load("scale.safetensors")
        {'scale': tensor(-0.)}
        >>> Path("scale.safetensors").unlink()
    """
    lazy = Compressed(path)
    whole = {name: lazy[name] for name in lazy if lazy.same_as(name) is None}
    return {name: whole[lazy.same_as(name) or name] for name in lazy}


class Compressed(Mapping[str, Tensor]):
    """A file opened, its tensors by name; each is read and decoded when it is asked for.

    `model.load_state_dict(Compressed(path))` works, and so does taking one tensor out of a file that
    would not fit into memory.

    Args:
        path: a file that `save` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, not one of ours or of a newer version; on
            opening, or on reading a tensor that is damaged.

    Examples:
        >>> save({"weight": torch.eye(100)}, "eye.safetensors")
        >>> file = Compressed("eye.safetensors")
        >>> list(file), file["weight"].sum()
        (['weight'], tensor(100.))
        >>> Path("eye.safetensors").unlink()
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"compressed file {self.path}: there is no such file")
        try:
            self._file: Any = safe_open(str(self.path), framework="pt")
            metadata = self._file.metadata() or {}
        except (OSError, SafetensorError, ValueError) as error:
            raise self._refusal(f"unreadable or truncated ({error})") from error
        if "sparing.compressed" not in metadata:
            raise self._refusal("was not written by sparing.export.compressed")
        try:
            head = json.loads(metadata["sparing.compressed"])
            version, entries = head["version"], head["tensors"]
            stored = {name for name, entry in entries.items() if isinstance(entry, dict)}
            intact = all(name in stored or entry in stored for name, entry in entries.items())
            intact = intact and head["crc32"] == crc32(_canonical(entries))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._refusal("its header is damaged") from error
        if version != VERSION:
            raise self._refusal(f"has version {version} of the format; this sparing reads version {VERSION}")
        if not intact:
            raise self._refusal("its header is damaged")
        self._entries: dict[str, Any] = entries

    def same_as(self, name: str) -> str | None:
        """The name under which the tensor is stored, if that is another one."""
        entry = self._entries[name]
        return entry if isinstance(entry, str) else None

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        stored = self.same_as(name) or name  # a KeyError here is the caller's
        try:
            return self._decode(stored)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, OSError, SafetensorError) as error:
            raise self._refusal(f"tensor {name!r} is damaged ({_first_line(error)})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _decode(self, name: str) -> Tensor:
        entry = self._entries[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        # Before anything is multiplied by it: a number times a list is a list as long.
        if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
            raise ValueError("its shape is no list of lengths")
        made = {kind: self._file.get_tensor(f"{name}/{kind}") for kind in KINDS[entry["encoding"]]}
        if _checksum(made.values()) != entry["crc32"]:
            raise ValueError("its checksum differs")
        if made["values"].dtype != DTYPES[entry["values"]]:
            raise ValueError(f"its values are {made['values'].dtype}, not {entry['values']}")
        stored: Tensor = made["values"].to(dtype)
        if entry["encoding"] == "dense":
            if list(stored.shape) != shape:
                raise ValueError(f"its shape is {list(stored.shape)}, not {shape}")
            return stored
        where = _positions(made["runs"], stored.numel(), entry["bits"], prod(shape))
        whole = torch.zeros(prod(shape), dtype=INTEGERS[dtype.itemsize])
        whole[where] = stored.view(whole.dtype)
        return whole.view(dtype).reshape(shape)

    def _refusal(self, why: str) -> CheckpointError:
        return CheckpointError(f"compressed file {self.path}: {why}")


def entropy_bound(state_dict: Mapping[str, Tensor]) -> float:
    """The bytes below which no file can go on average, if zeros are anywhere and values are anything.

        Σ over tensors of n · H(d) / 8 + bytes of the nonzero values,    H(d) = −d log₂ d − (1 − d) log₂(1 − d)

    n is the number of elements and d the share of them that is not zero.

    Examples:
        >>> entropy_bound({"weight": torch.tensor([0.0, 1.0])})  # one bit an element, one value
        4.25
    """
    total = 0.0
    for tensor in state_dict.values():
        n = tensor.numel()
        live = int(torch.count_nonzero(tensor))
        total += live * tensor.element_size()
        if 0 < live < n:
            total -= (live * log2(live / n) + (n - live) * log2(1 - live / n)) / 8
    return total


KINDS = {"dense": ("values",), "runs": ("runs", "values")}
"""The parts a tensor is stored in, by encoding."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"entry {name!r} of the state_dict is a {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or _name(tensor.dtype) not in DTYPES:
        raise InputError(
            f"tensor {name!r} is {tensor.dtype} of layout {tensor.layout}; "
            f"only strided tensors can be saved, of {', '.join(DTYPES)}"
        )
    if tensor.is_meta:
        raise InputError(f"tensor {name!r} is on the meta device and has no numbers to save")


def _round(name: str, tensor: Tensor, values: torch.dtype | None) -> Tensor:
    if values is None or not tensor.is_floating_point() or tensor.dim() < 2 or tensor.element_size() <= values.itemsize:
        return tensor
    rounded = tensor.to(values)
    if bool((torch.isfinite(tensor) & ~torch.isfinite(rounded)).any()):
        raise InputError(f"tensor {name!r} holds numbers too large for {values}; save with values=None or bfloat16")
    return rounded


def _encode(tensor: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The cheapest way to store a tensor: what the header says of it, and the parts."""
    flat = tensor.reshape(-1)
    # Every bit counts: −0.0 is no zero here.
    (where,) = torch.nonzero(flat.view(INTEGERS[tensor.element_size()]), as_tuple=True)
    edges = torch.cat([where.new_tensor([-1]), where, where.new_tensor([flat.numel()])])
    runs = edges.diff() - 1  # before each value, and after the last
    bits, cost = min(((b, _cost(runs, b)) for b in range(MOST_BITS + 1)), key=lambda pair: pair[1])
    if cost + where.numel() * tensor.element_size() + ENTRY >= tensor.numel() * tensor.element_size():
        return {"encoding": "dense"}, {"values": tensor}
    unary = torch.zeros(int((runs >> bits).sum()) + len(runs), dtype=torch.uint8)
    unary[(runs >> bits).cumsum(0) + torch.arange(len(runs))] = 1
    low = (runs[:, None] >> torch.arange(bits)) & 1
    coded = torch.cat([_pack(unary), _pack(low.reshape(-1).to(torch.uint8))])
    # Indexed as integers: not every dtype can be indexed.
    live = flat.view(INTEGERS[tensor.element_size()])[where].view(tensor.dtype)
    return {"encoding": "runs", "bits": bits}, {"runs": coded, "values": live}


def _cost(runs: Tensor, bits: int) -> int:
    """The bytes that the runs take."""
    unary = int((runs >> bits).sum()) + len(runs)
    return -(-unary // 8) + -(-bits * len(runs) // 8)


def _positions(coded: Tensor, values: int, bits: int, elements: int) -> Tensor:
    """Where the values belong, read off the coded runs.

    Raises:
        ValueError: the runs do not lead to exactly so many values in so many elements.
    """
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"{bits} bits a run are not possible")
    split = len(coded) - -(-bits * (values + 1) // 8)
    if split < 0:
        raise ValueError("its runs are too short")
    (ones,) = torch.nonzero(_unpack(coded[:split]), as_tuple=True)
    if len(ones) != values + 1:
        raise ValueError(f"it has {values} values and {len(ones)} runs")
    low = _unpack(coded[split:])[: bits * len(ones)].reshape(len(ones), bits)
    runs = ones.diff(prepend=ones.new_tensor([-1])) - 1 << bits
    runs |= (low.to(torch.int64) << torch.arange(bits)).sum(1)
    edges = (runs + 1).cumsum(0) - 1
    if int(edges[-1]) != elements:
        raise ValueError(f"its runs cover {int(edges[-1])} elements of {elements}")
    return edges[:-1]


def _pack(bits: Tensor) -> Tensor:
    """Eight bits a byte, the first in the lowest place."""
    whole = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (whole << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(-1)


def _checksum(parts: Any) -> int:
    check = 0
    for part in parts:
        check = crc32(part.reshape(-1).view(torch.uint8).numpy(), check)
    return check


def _canonical(entries: Any) -> bytes:
    return json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
