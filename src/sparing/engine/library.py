"""The shared library of the engine: prebuilt, cached on disk, or compiled for this machine.

`library()` looks in this order:

1. the installed package `sparing_engine`, if it was built from the same sources;
2. the cache folder: SPARING_CACHE, otherwise `sparing` in XDG_CACHE_HOME, otherwise ~/.cache/sparing;
3. the C++ compiler: the one that CXX names, otherwise c++, g++ or clang++. The result goes into the cache folder.
"""

import ctypes
import hashlib
import importlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparing.errors import InputError

KERNELS = Path(__file__).with_name("kernels")
KEEP = 30 * 24 * 3600  # seconds that an unused library stays in the cache folder


class Window(ctypes.Structure):
    """SparingWindow of engine.h. Pass it by value: ctypes makes the pointer."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "kernel_y", "kernel_x", "stride_y", "stride_x", "padding_y", "padding_x", "dilation_y", "dilation_x",
        )
    ]  # fmt: skip


class Openmp(ctypes.Structure):
    """SparingOpenmp of engine.h."""

    _fields_ = [("parallel", ctypes.c_void_p), ("thread", ctypes.c_void_p)]


_int, _long, _float, _double, _string = (
    ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_char_p,
)  # fmt: skip
_plan = _numbers = ctypes.c_void_p  # `_numbers` takes tensor.data_ptr(), or None where engine.h allows null
_pointers = ctypes.POINTER(ctypes.c_void_p)  # takes (ctypes.c_void_p * n)(...)
_sizes = ctypes.POINTER(ctypes.c_int64)  # takes (ctypes.c_int64 * n)(...)
_window, _openmp = ctypes.POINTER(Window), ctypes.POINTER(Openmp)

# The functions of engine.h: name → result, arguments.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "sparing_error": (_string, []),
    "sparing_lanes": (_int, []),
    "sparing_plan": (_plan, [_int, _openmp]),
    "sparing_free": (None, [_plan]),
    "sparing_tensor": (_int, [_plan, _long, _long, _long, _long]),
    "sparing_input": (_int, [_plan, _int, _int]),
    "sparing_output": (_int, [_plan, _int, _int]),
    "sparing_convolution": (
        _int, [_plan, _int, _int, _int, _window, _numbers, _numbers, _numbers, _numbers, _int],
    ),
    "sparing_depthwise": (_int, [_plan, _int, _int, _window, _numbers, _numbers, _int]),
    "sparing_pool": (_int, [_plan, _int, _int, _window, _int]),
    "sparing_mean": (_int, [_plan, _int, _int]),
    "sparing_affine": (_int, [_plan, _int, _int, _numbers, _numbers, _int]),
    "sparing_binary": (_int, [_plan, _int, _int, _int, _int, _int]),
    "sparing_copy": (_int, [_plan, _int, _long, _int, _long, _long]),
    "sparing_layer_norm": (_int, [_plan, _int, _int, _numbers, _numbers, _float, _int]),
    "sparing_attention": (
        _int, [_plan, _int, _int, _int, _int, _int, _sizes, _sizes, _long, _long, _long, _long, _float, _int, _int,
         _long, _long, _long, _numbers, _numbers],
    ),
    "sparing_finish": (_int, [_plan]),
    "sparing_bytes": (_long, [_plan]),
    "sparing_run": (_int, [_plan, _pointers, _pointers]),
    "sparing_profile": (_int, [_plan, _int]),
    "sparing_operations": (_int, [_plan]),
    "sparing_operation": (_string, [_plan, _int]),
    "sparing_seconds": (_double, [_plan, _int]),
}  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """Return the library of the engine for the instruction set that PyTorch uses. Compile it if necessary.

    The result is cached per process.

    Raises:
        InputError: the operating system has no POSIX interface; the C++ compiler is missing or fails; other users can
            write the cache folder; the library cannot be loaded.
    """
    if os.name != "posix":
        raise InputError(f"the engine needs Linux or macOS, got {platform.system()}")
    capability = torch.backends.cpu.get_cpu_capability()
    name = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "generic")
    path = _find_prebuilt(name)
    return _compile_or_load_cached(name) if path is None else _load(path)


def openmp() -> Openmp | None:
    """Return the functions of the OpenMP library that PyTorch uses; None if it uses none, or it cannot be found."""
    process = ctypes.CDLL(None)  # torch makes its OpenMP visible to the whole process
    try:
        functions = process.GOMP_parallel, process.omp_get_thread_num
    except AttributeError:
        return None
    return Openmp(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


def _load(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(
            f"the library of the engine cannot be loaded: {error}; delete the file, or set SPARING_CACHE to a folder "
            "that may contain executables, or CXX to another compiler"
        ) from error
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _hash_sources() -> str:
    """Hash the kernels and their flags. wheels/engine/CMakeLists.txt computes the same hash."""
    lines = [
        f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in sorted(KERNELS.iterdir())
        if path.suffix in (".cpp", ".h", ".txt")
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _find_prebuilt(name: str) -> Path | None:
    """Return the library of the package sparing_engine, or None if there is none for these sources."""
    try:
        package = importlib.import_module("sparing_engine")
    except ModuleNotFoundError:
        return None
    if getattr(package, "SOURCES", None) == _hash_sources():
        path = Path(package.FOLDER, f"{name}.so")
        if path.is_file():
            return path
    logging.getLogger("sparing").warning(
        "The installed package sparing-engine has no library for this version of sparing and %s. It is not used. "
        "Install the same version of sparing-engine as of sparing.",
        name,
    )
    return None


def _compile_or_load_cached(name: str) -> ctypes.CDLL:
    """Load the library from the cache folder. If it is not there, compile it."""
    compiler = _find_compiler()
    flags = {name: rest for name, *rest in map(str.split, (KERNELS / "flags.txt").read_text().splitlines())}
    command = [*compiler, *flags["common"], *flags[name]]
    version = _run([*compiler, "--version"])
    # Machines of different kinds may share a home directory: distinguish their processors and C libraries.
    made_of = [_hash_sources(), *command, version, platform.machine(), *platform.libc_ver()]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    message = "Compiling the sparing engine for %s with %s (about 20 s, %s)"
    log = logging.getLogger("sparing")
    try:
        folder = _find_cache_folder()
        path = folder / f"engine-{key}.so"
        if not path.exists():
            with _lock(folder):
                if not path.exists():  # another process may have compiled it during the wait
                    log.warning(message, name, shlex.join(compiler), f"once: the result is cached in {folder}")
                    _compile(command, path)
                    _delete_unused(folder)
    except OSError as error:
        log.warning(message, name, shlex.join(compiler), f"for this process only: the cache cannot be written: {error}")
        with TemporaryDirectory(prefix="sparing-") as private:
            path = Path(private, "engine.so")
            _compile(command, path)
            return _load(path)
    _require_private(path)
    with suppress(OSError):  # the folder may be read-only
        os.utime(path)  # for _delete_unused
    return _load(path)


def _find_compiler() -> list[str]:
    """Return the command of the C++ compiler."""
    remedy = "install GCC or Clang, set CXX to a compiler, or install the package sparing-engine"
    if command := shlex.split(os.environ.get("CXX", "")):
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
        raise InputError(f"CXX names the C++ compiler {command[0]!r}, which was not found; {remedy}")
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise InputError(f"the engine needs a C++ compiler, and c++, g++ and clang++ were not found; {remedy}")


def _run(command: Sequence[str]) -> str:
    """Run the compiler and return what it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env={**os.environ, "LC_ALL": "C"}
        )
        status, printed = f"exit status {done.returncode}", done.stdout + done.stderr
    except OSError as error:
        raise InputError(f"the C++ compiler {command[0]!r} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in printed.splitlines() if "error" in line]
        raise InputError(
            f"the C++ compiler {command[0]!r} cannot compile the engine: {lines[0] if lines else status}; "
            "the engine needs GCC 9, Clang 11, or newer"
        )
    return printed


def _compile(command: Sequence[str], path: Path) -> None:
    """Compile a library. It appears at `path` complete or not at all.

    Raises:
        OSError: the folder of `path` cannot be written.
    """
    # A temporary directory has mode 700. No other user can change the library before its own mode is set.
    with TemporaryDirectory(prefix=f"{path.stem}.", dir=path.parent) as temporary:
        output = Path(temporary, path.name)
        _run([*command, str(KERNELS / "plan.cpp"), "-o", str(output)])
        output.chmod(0o755)
        with open(output, "rb") as file:
            os.fsync(file.fileno())
        output.replace(path)


def _find_cache_folder() -> Path:
    """Return the cache folder. Create it if necessary.

    Raises:
        OSError: there is no home directory, or the folder cannot be created.
        InputError: other users can write the folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(os.environ.get("SPARING_CACHE") or Path(caches, "sparing")).expanduser().absolute()
    except RuntimeError as error:
        raise OSError("there is no home directory") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    return folder


def _require_private(path: Path) -> None:
    """Raise unless only this user, or root, can write a file or folder. A library can run any code."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        fault = "belongs to another user"
    elif status.st_mode & 0o022:
        fault = "can be written by other users"
    else:
        return
    raise InputError(
        f"{path} {fault}, and the engine loads its library only from a folder that nobody else can change; "
        "change the owner and the mode (chmod go-w), or set SPARING_CACHE to another folder"
    )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time compile into a folder."""
    import fcntl  # Windows does not have it

    with open(folder / "lock", "w") as file:
        with suppress(OSError):  # some network file systems have no locks: then each process compiles
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete_unused(folder: Path) -> None:
    """Delete the libraries that nobody loaded for 30 days, and what interrupted compilations left."""
    for path in folder.glob(f"engine-{'[0-9a-f]' * 16}.*"):
        with suppress(OSError):  # another process may delete it as well
            if path.stat().st_mtime < time.time() - KEEP:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
