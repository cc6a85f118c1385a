"""Compressed files: safetensors that store only the nonzero values of each tensor.

    bytes of a tensor = bytes of its nonzero values + bytes of the gaps between them, compressed by zlib

A gap is a number of zeros between two values, as one byte; 255 adds 255 zeros to the next gap. zlib only uses its
Huffman code, which is near the optimum at random positions and cannot expand one byte to more than eight. A tensor
is stored dense if that takes fewer bytes. The size is within a few percent of the entropy of the positions;
`entropy_bound` computes this lower bound. `docs/format.md` specifies the format and has a reader that does not require
sparing.
"""

import json
from collections.abc import Iterator, Mapping
from math import log2, prod
from pathlib import Path
from typing import Any
from zlib import DEFLATED, MAX_WBITS, Z_HUFFMAN_ONLY, compressobj, crc32, decompressobj
from zlib import error as ZlibError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparing.errors import CheckpointError, InputError, first_line
from sparing.files import atomic_write

VERSION = 2

ESCAPE = 255
"""Gap byte that stands for 255 zeros without a value behind them."""

# A Huffman code has at least one bit per gap byte, so one byte of a file decodes to at most 8 · 255 elements.
# This limits how much memory a damaged or malicious file can make the reader allocate.
MAX_EXPANSION = 8

# Approximate size in bytes of one more entry in the safetensors header. Tensors that would save less are stored dense.
ENTRY_BYTES = 128

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
        torch.bool,
    )
}  # fmt: skip
"""Supported dtypes by their name in the file."""

DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, OSError, SafetensorError, ZlibError)
"""Exceptions that a damaged tensor can cause."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per element → integer dtype. Viewed as integers, −0.0 and every NaN count as nonzero values."""


def save(state_dict: Mapping[str, Tensor], path: str | Path, values: torch.dtype | None = None) -> None:
    """Write a state dict to a compressed file, atomically.

    The file is lossless with `values=None`. Negative zero (−0.0) is stored as a value. Multiplying a weight by a mask
    creates −0.0; `torch.where(mask, weight, 0.0)` or adding 0.0 turns it into 0.0. The methods of sparing create no
    −0.0.

    Args:
        state_dict: tensors by name, from a densified model or from `sparing.dense_state_dict`. Tied tensors are
            written once.
        path: output file.
        values: None stores the values without loss. `torch.bfloat16` or `torch.float16` rounds floating point
            tensors with two or more dimensions (the weights) to that dtype. Tensors with fewer dimensions, such as
            biases and normalization statistics, are always stored without loss.

    Raises:
        InputError: `state_dict` is not a mapping from names; an entry is not a dense tensor with a dtype in `DTYPES`,
            or is on the meta device; `values` is not supported; a weight overflows `values`; the file cannot be
            written.

    Examples:
        >>> weight = torch.where(torch.rand(1000, 1000) < 0.01, 1.5, 0.0)
        >>> save({"weight": weight}, "weight.safetensors")
        >>> Path("weight.safetensors").stat().st_size < 0.015 * 4_000_000
        True
        >>> torch.equal(load("weight.safetensors")["weight"], weight)
        True
        >>> Path("weight.safetensors").unlink()
    """
    if values not in (None, torch.bfloat16, torch.float16):
        raise InputError(f"values must be None, torch.bfloat16 or torch.float16, got {values}")
    if not isinstance(state_dict, Mapping):
        raise InputError(f"state_dict must be a mapping such as model.state_dict(), got {type(state_dict).__name__}")
    arrays: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    # dict() keeps all tensors alive: a lazy mapping could free a tensor and reuse its address, which looks like a tie.
    for name, tensor in dict(state_dict).items():
        check_tensor(name, tensor)
        tensor = tensor.detach()
        storage = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and storage in first:
            entries[name] = first[storage]
            continue
        first[storage] = name
        # Clone because safetensors rejects tensors that share memory.
        stored = _round(name, tensor.cpu().clone(memory_format=torch.contiguous_format), values)
        entry, encoded = _encode(stored)
        entries[name] = {
            "dtype": _name(tensor.dtype), "values": _name(stored.dtype), "shape": list(tensor.shape), **entry,
            "crc32": _checksum(encoded.values()),
        }  # fmt: skip
        arrays |= {f"{name}/{kind}": array for kind, array in encoded.items()}
    header = json.dumps({"version": VERSION, "crc32": crc32(_canonical(entries)), "tensors": entries})
    with atomic_write(path) as temporary:
        save_file(arrays, temporary, metadata={"sparing.compressed": header})


def load(path: str | Path) -> dict[str, Tensor]:
    """Read a compressed file as a dense state dict on the CPU.

    The result is bit-identical to the saved state dict if it was saved with `values=None`. Tied tensors are tied again.

    Args:
        path: a file written by `save`.

    Returns:
        Dense tensors by name, with their original shapes and dtypes.

    Raises:
        CheckpointError: the file is missing, damaged, in another format or of a newer version.

    Examples:
        >>> save({"scale": torch.tensor(-0.0)}, "scale.safetensors")
        >>> load("scale.safetensors")
        {'scale': tensor(-0.)}
        >>> Path("scale.safetensors").unlink()
    """
    file = Compressed(path)
    tensors = {name: file[name] for name in file if file.same_as(name) is None}
    return {name: tensors[file.same_as(name) or name] for name in file}


class Compressed(Mapping[str, Tensor]):
    """Open a compressed file as a mapping that reads and decodes each tensor on access.

    Use it to read single tensors from a file that does not fit into memory, or pass it to `model.load_state_dict`.

    Args:
        path: a file written by `save`.

    Raises:
        CheckpointError: the file is missing, damaged, in another format or of a newer version. A damaged tensor
            raises it on access.

    Examples:
        >>> save({"weight": torch.eye(100)}, "eye.safetensors")
        >>> file = Compressed("eye.safetensors")
        >>> list(file), file["weight"].sum()
        (['weight'], tensor(100.))
        >>> Path("eye.safetensors").unlink()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"compressed file {self.path}: there is no such file")
        try:
            self._file: Any = safe_open(str(self.path), framework="pt")
            metadata = self._file.metadata() or {}
        except (OSError, SafetensorError, ValueError) as error:
            raise self._error(f"unreadable or truncated ({error})") from error
        if "sparing.compressed" not in metadata:
            raise self._error("not written by sparing.export.compressed")
        try:
            header = json.loads(metadata["sparing.compressed"])
            version, entries = header["version"], header["tensors"]
            stored = {name for name, entry in entries.items() if isinstance(entry, dict)}
            intact = all(name in stored or entry in stored for name, entry in entries.items())
            intact = intact and header["crc32"] == crc32(_canonical(entries))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._error("the header is damaged") from error
        if version != VERSION:
            raise self._error(f"format version {version} is not supported; this sparing reads version {VERSION}")
        if not intact:
            raise self._error("the header is damaged")
        self._entries: dict[str, Any] = entries

    def same_as(self, name: str) -> str | None:
        """Return the name under which a tied tensor is stored, or None if `name` is stored itself."""
        entry = self._entries[name]
        return entry if isinstance(entry, str) else None

    def __getitem__(self, name: str) -> Tensor:
        stored = self.same_as(name) or name  # outside the try block: an unknown name raises KeyError
        try:
            return self._decode(stored)
        except DAMAGE as error:
            raise self._error(f"tensor {name!r} is damaged ({first_line(error)})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _decode(self, name: str) -> Tensor:
        entry = self._entries[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        # Check before prod(shape): an integer times a nested list allocates a list of that length.
        if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
            raise ValueError("the shape is not a list of non-negative integers")
        arrays = {kind: self._file.get_tensor(f"{name}/{kind}") for kind in ARRAYS[entry["encoding"]]}
        if _checksum(arrays.values()) != entry["crc32"]:
            raise ValueError("checksum mismatch")
        if arrays["values"].dtype != DTYPES[entry["values"]]:
            raise ValueError(f"the values have dtype {arrays['values'].dtype}, expected {entry['values']}")
        stored: Tensor = arrays["values"].to(dtype)
        if entry["encoding"] == "dense":
            if list(stored.shape) != shape:
                raise ValueError(f"the stored shape is {list(stored.shape)}, expected {shape}")
            return stored
        positions = _positions(arrays["gaps"], stored.numel(), prod(shape))
        dense = torch.zeros(prod(shape), dtype=INTEGERS[dtype.itemsize])
        dense[positions] = stored.view(dense.dtype)
        return dense.view(dtype).reshape(shape)

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"compressed file {self.path}: {reason}")


def entropy_bound(state_dict: Mapping[str, Tensor]) -> float:
    """Return the minimum average size of a lossless file in bytes.

        Σ over tensors of n · H(d) / 8 + bytes of the nonzero values,    H(d) = −d log₂ d − (1 − d) log₂(1 − d)

    n is the number of elements of a tensor and d its density, the fraction of nonzero elements. The bound assumes
    zeros at random positions and incompressible values.

    Args:
        state_dict: tensors by name.

    Examples:
        >>> entropy_bound({"weight": torch.tensor([0.0, 1.0])})  # one bit per element, one value of 4 bytes
        4.25
    """
    total = 0.0
    for tensor in state_dict.values():
        n, nonzero = tensor.numel(), int(torch.count_nonzero(tensor.view(INTEGERS[tensor.element_size()])))
        total += nonzero * tensor.element_size()
        if 0 < nonzero < n:
            total -= (nonzero * log2(nonzero / n) + (n - nonzero) * log2(1 - nonzero / n)) / 8
    return total


ARRAYS = {"dense": ("values",), "gaps": ("gaps", "values")}
"""Encoding → the arrays that store a tensor."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, tensor: Any) -> None:
    """Check that an entry of a state dict can be saved, or loaded from another file.

    Raises:
        InputError: its name is not a str; it is not a tensor, not dense, of a dtype that is not in `DTYPES`, or
            without values.
    """
    if not isinstance(name, str):
        raise InputError(f"keys of the state dict must be str, got {name!r}")
    if not isinstance(tensor, Tensor):
        raise InputError(f"entry {name!r} of the state dict must be a tensor, got {type(tensor).__name__}")
    layout = "is nested" if tensor.is_nested else f"layout {tensor.layout}"
    if layout != "layout torch.strided" or tensor.is_quantized or _name(tensor.dtype) not in DTYPES:
        raise InputError(
            f"tensor {name!r} has dtype {tensor.dtype} and {layout}; "
            f"supported are strided tensors of {', '.join(DTYPES)}"
        )
    if is_traceable_wrapper_subclass(tensor):
        raise InputError(
            f"tensor {name!r} is of type {type(tensor).__name__}, which is quantized or distributed; "
            "save a plain model, before quantization and with all shards"
        )
    if tensor.is_meta:
        raise InputError(f"tensor {name!r} is on the meta device and has no values")


def _round(name: str, tensor: Tensor, values: torch.dtype | None) -> Tensor:
    if values is None or not tensor.is_floating_point() or tensor.dim() < 2 or tensor.element_size() <= values.itemsize:
        return tensor
    rounded = tensor.to(values)
    if bool((torch.isfinite(tensor) & ~torch.isfinite(rounded)).any()):
        raise InputError(f"tensor {name!r} overflows {values}; save with values=None or values=torch.bfloat16")
    return rounded


def _encode(tensor: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Encode a tensor in the fewest bytes. Return its header entry and the arrays that store it."""
    # Compare bits: −0.0 is stored as a value. Viewed as integers, tensors of every dtype can be indexed.
    flat = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
    (positions,) = torch.nonzero(flat, as_tuple=True)
    gaps = _gaps(positions, flat.numel())
    size = gaps.numel() + positions.numel() * tensor.element_size()
    if size + ENTRY_BYTES >= tensor.numel() * tensor.element_size():
        return {"encoding": "dense"}, {"values": tensor}
    return {"encoding": "gaps"}, {"gaps": gaps, "values": flat[positions].view(tensor.dtype)}


def _gaps(positions: Tensor, elements: int) -> Tensor:
    """Encode flat positions as the zeros before each of them and after the last."""
    edges = torch.cat([positions.new_tensor([-1]), positions, positions.new_tensor([elements])])
    zeros = edges.diff() - 1
    ends = (zeros // ESCAPE + 1).cumsum(0)  # bytes up to and with those of each gap
    gaps = torch.full((int(ends[-1]),), ESCAPE, dtype=torch.uint8)
    gaps[ends - 1] = (zeros % ESCAPE).to(torch.uint8)
    coder = compressobj(9, DEFLATED, MAX_WBITS, 9, Z_HUFFMAN_ONLY)
    return torch.frombuffer(bytearray(coder.compress(gaps.numpy()) + coder.flush()), dtype=torch.uint8)  # type: ignore[arg-type]


def _positions(coded: Tensor, values: int, elements: int) -> Tensor:
    """Decode gaps into the flat positions of the values.

    Args:
        coded: compressed gaps, uint8.
        values: expected number of values.
        elements: expected number of elements of the tensor.

    Raises:
        ValueError: the gaps do not match the number of values or of elements.
        zlib.error: they are not compressed by zlib.
    """
    decoder = decompressobj()
    content = bytearray(decoder.decompress(coded.numpy(), MAX_EXPANSION * coded.numel()))  # type: ignore[arg-type]
    if not decoder.eof or decoder.unused_data:
        raise ValueError(f"the gaps are truncated, or a byte of them expands to more than {MAX_EXPANSION}")
    gaps = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    ends = gaps != ESCAPE
    # Count before the gaps are expanded to int64.
    found, covered = int(ends.sum()) - 1, int(gaps.sum()) + values
    if found != values or covered != elements:
        raise ValueError(f"the gaps cover {found} values and {covered} elements of {values} and {elements}")
    return (gaps.to(torch.int64) + ends).cumsum(0)[ends][:-1] - 1


def _checksum(arrays: Any) -> int:
    checksum = 0
    for array in arrays:
        checksum = crc32(array.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def _canonical(entries: Any) -> bytes:
    return json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
