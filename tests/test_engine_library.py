"""The library of the engine: prebuilt, cached or compiled, and never loaded from where others may write."""

import ctypes
import logging
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import sparing
from sparing.engine import library as module
from sparing.engine.library import FUNCTIONS, library
from sparing.errors import InputError

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

SMALL = "".join(
    f'extern "C" __attribute__((visibility("default"))) int {name}() {{ return 4; }}\n' for name in FUNCTIONS
)


class Workshop:
    """Kernels that compile quickly, a compiler that counts, and a cache folder of its own."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.kernels, self.cache, self.calls = folder / "kernels", folder / "cache", folder / "calls"
        self.kernels.mkdir()
        shutil.copy(module.KERNELS / "flags.txt", self.kernels)
        (self.kernels / "plan.cpp").write_text(SMALL)
        self.set_compiler(self.compiler("fake-c++"))
        monkeypatch.setenv("SPARING_CACHE", str(self.cache))
        monkeypatch.setattr(module, "KERNELS", self.kernels)
        monkeypatch.setitem(sys.modules, "sparing_engine", None)  # as if it were not installed

    def compiler(self, name, before="", version="fake 1.0"):
        """Write a compiler that runs `before`, notes the call, and calls the real one."""
        path = self.folder / name
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *--version) echo {version}; exit;; esac\n'
            # Another processor's compiler does not know the flags -m...
            f'{before}\necho "$@" >> {self.calls}\n'
            f'for a; do shift; case $a in -m*);; *) set -- "$@" "$a";; esac; done\nexec {COMPILER} "$@"\n'
        )
        path.chmod(0o755)
        return path

    def set_compiler(self, path):
        self.monkeypatch.setenv("CXX", str(path))

    def load(self):
        """Load the library as a new process does."""
        library.cache_clear()
        return library()

    def compiled(self):
        """Return how often the compiler compiled."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def cached(self):
        return sorted(self.cache.glob("engine-*"))


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    yield Workshop(tmp_path, monkeypatch)
    library.cache_clear()


def test_the_table_declares_every_function_of_the_header():
    header = re.sub(r"//.*|#.*", "", (ROOT / "src/sparing/engine/kernels/engine.h").read_text())
    plain = {
        "int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double,
        "void": None, "const char*": ctypes.c_char_p, "SparingPlan*": ctypes.c_void_p,
        "const int32_t*": ctypes.c_void_p, "const float*": ctypes.c_void_p,
        "const int64_t*": ctypes.POINTER(ctypes.c_int64), "const SparingWindow*": ctypes.POINTER(module.Window),
        "const SparingOpenmp*": ctypes.POINTER(module.Openmp),
        "const float* const*": ctypes.POINTER(ctypes.c_void_p), "float* const*": ctypes.POINTER(ctypes.c_void_p),
    }  # fmt: skip
    declared = {}
    for result, name, arguments in re.findall(r"SPARING_API ([\w *]+?) ?(sparing_\w+)\(([^)]*)\);", header):
        kinds = [
            re.sub(r"(?<=[ *])(?!const\b)[a-z_]+$", "", argument.strip()).strip() for argument in arguments.split(",")
        ]
        declared[name] = (plain[result], [plain[kind] for kind in kinds if kind])
    assert declared == FUNCTIONS
    window = re.search(r"struct SparingWindow \{\s*int64_t ([^;]*);\s*\}", header)[1].split(", ")
    assert [name for name, kind in module.Window._fields_] == window
    openmp = re.search(r"struct SparingOpenmp \{(.*?)\};", header, re.DOTALL)[1]
    assert [name for name, kind in module.Openmp._fields_] == re.findall(r"^ +\w+ \(\*(\w+)\)", openmp, re.MULTILINE)


@pytest.mark.parametrize(
    ("capability", "name", "flag"),
    [("AVX512", "avx512", "-mavx512bw"), ("AVX2", "avx2", "-mavx2"), ("SVE256", "generic", "-O3")],
)
def test_it_compiles_once_for_the_instruction_set_of_torch(workshop, monkeypatch, caplog, capability, name, flag):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    loaded = workshop.load()
    assert loaded is library()
    assert loaded.sparing_lanes() == 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"for {name} with" in caplog.text
    assert str(workshop.cache) in caplog.text
    used = workshop.calls.read_text().split()
    assert {flag, "-std=c++17", "-fvisibility=hidden"} <= set(used)
    assert any(argument.startswith("-m") for argument in used) == (name != "generic")
    caplog.clear()
    workshop.load()
    assert workshop.compiled() == 1
    assert not caplog.records
    (cached,) = workshop.cached()
    assert cached.stat().st_mode & 0o022 == workshop.cache.stat().st_mode & 0o077 == 0


def test_the_cache_tells_sources_flags_and_compilers_apart(workshop):
    changes = [
        lambda: None,
        lambda: (workshop.kernels / "plan.cpp").write_text(SMALL + "//"),
        lambda: (workshop.kernels / "new.h").write_text(""),
        lambda: (workshop.kernels / "flags.txt").write_text(
            (workshop.kernels / "flags.txt").read_text().replace("-O3", "-O2")
        ),
        lambda: workshop.set_compiler(workshop.compiler("fake-c++", version="fake 1.1")),
        lambda: workshop.set_compiler(workshop.compiler("other-c++", version="fake 1.1")),
        lambda: workshop.set_compiler(f"{workshop.folder}/other-c++ -DOPTION"),
    ]
    for index, change in enumerate(changes, 1):
        change()
        workshop.load()
        workshop.load()
        assert workshop.compiled() == len(workshop.cached()) == index
    assert "-DOPTION" in workshop.calls.read_text()


TWICE = """
import sys
from pathlib import Path
from sparing.engine import library as module
module.KERNELS = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(module.library().sparing_lanes())
"""


@pytest.mark.slow
def test_two_processes_compile_once(workshop):
    workshop.set_compiler(workshop.compiler("slow-c++", before="sleep 0.5"))
    command = [sys.executable, "-c", TWICE, str(workshop.kernels)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["4\n", "4\n"]
    assert workshop.compiled() == 1


def test_what_nobody_used_for_30_days_is_deleted(workshop):
    workshop.load()
    (used,) = workshop.cached()
    old = time.time() - 31 * 24 * 3600
    unused, interrupted = workshop.cache / f"engine-{'0' * 16}.so", workshop.cache / f"engine-{'1' * 16}.abc"
    unused.touch()
    interrupted.mkdir()
    (interrupted / "engine.so").touch()
    foreign = [workshop.cache / name for name in ("engine-notes.txt", "engine-old.so", "mine")]
    for path in foreign:
        path.touch()
    for path in [used, unused, interrupted, *foreign]:
        os.utime(path, (old, old))
    workshop.load()  # a use
    (workshop.kernels / "plan.cpp").write_text(SMALL + "//")
    workshop.load()
    assert used.exists()
    assert not unused.exists()
    assert not interrupted.exists()
    assert all(path.exists() for path in foreign)


@pytest.mark.parametrize("home", ["file", "missing"])
def test_without_a_cache_it_compiles_for_this_process(workshop, monkeypatch, caplog, home):
    if home == "file":
        workshop.cache.touch()
    else:
        monkeypatch.delenv("SPARING_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    loaded = workshop.load()
    assert loaded.sparing_lanes() == 4
    assert "for this process only" in caplog.text
    assert not Path(loaded._name).exists()
    workshop.load()
    assert workshop.compiled() == 2


def test_a_read_only_cache_is_read(workshop):
    workshop.load()
    workshop.cache.chmod(0o500)
    if os.access(workshop.cache, os.W_OK):
        pytest.skip("root may write everywhere")
    workshop.load()
    assert workshop.compiled() == 1
    (workshop.kernels / "plan.cpp").write_text(SMALL + "//")
    workshop.load()
    assert workshop.compiled() == 2
    workshop.cache.chmod(0o700)


@pytest.mark.parametrize("fault", ["folder", "file", "owner"])
def test_what_others_can_write_is_not_loaded(workshop, monkeypatch, fault):
    workshop.load()
    (path,) = workshop.cached()
    changed = path if fault == "file" else workshop.cache
    user = os.geteuid()
    if fault != "owner":
        changed.chmod(0o775)
    elif user == 0:
        os.chown(changed, 1, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    monkeypatch.setattr(ctypes, "CDLL", None)
    with pytest.raises(InputError, match=rf"^{changed} (belongs to|can be written by) .*SPARING_CACHE"):
        workshop.load()


def test_each_fault_of_the_compiler_has_its_sentence(workshop, monkeypatch):
    def refused(match, cxx=None):
        if cxx is not None:
            workshop.set_compiler(cxx)
        with pytest.raises(InputError, match=match) as caught:
            workshop.load()
        assert "\n" not in str(caught.value)

    refused("CXX names .*'no-such-compiler'.*install GCC or Clang", "no-such-compiler -O2")
    (workshop.folder / "text").write_text("no program")
    (workshop.folder / "text").chmod(0o755)
    refused("text' cannot be run: Exec format error", workshop.folder / "text")
    refused(r"cannot compile.*exit status 3; the engine needs GCC 9, Clang 11", workshop.compiler("silent", "exit 3"))
    (workshop.kernels / "plan.cpp").write_text("#include <missing.h>\nint function() { return; }")
    refused(r"cannot compile.*plan.cpp:1:\d+: fatal error: .*; the engine needs GCC 9", workshop.compiler("c++"))
    assert not workshop.cached()
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", str(workshop.folder / "empty"))
    refused(r"c\+\+, g\+\+ and clang\+\+ were not found; install GCC or Clang, set CXX .*sparing-engine")
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        refused("needs Linux or macOS")


def test_a_library_that_cannot_be_loaded_is_named(workshop):
    workshop.set_compiler(workshop.compiler("bad-c++", "for output; do :; done; echo text > $output; exit"))
    with pytest.raises(InputError, match=rf"cannot be loaded: {workshop.cache}/engine-.*\.so: .*delete the file"):
        workshop.load()


def test_a_prebuilt_library_of_the_same_sources_is_preferred(workshop, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    workshop.load()
    package = types.ModuleType("sparing_engine")
    package.FOLDER, package.SOURCES = workshop.folder / "package", module._hash_sources()
    package.FOLDER.mkdir()
    prebuilt = package.FOLDER / "avx2.so"
    workshop.cached()[0].rename(prebuilt)
    monkeypatch.setitem(sys.modules, "sparing_engine", package)
    monkeypatch.setenv("CXX", "no-such-compiler")
    caplog.clear()
    assert workshop.load()._name == str(prebuilt)
    assert not caplog.records
    with monkeypatch.context() as other:
        other.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        with pytest.raises(InputError, match="'no-such-compiler'"):
            workshop.load()
    assert "sparing-engine has no library for this version of sparing and avx512" in caplog.text
    (workshop.kernels / "new.h").touch()
    caplog.clear()
    with pytest.raises(InputError, match="'no-such-compiler'"):
        workshop.load()
    assert "sparing-engine has no library for this version of sparing and avx2" in caplog.text


def test_the_versions_of_sparing_and_its_engine_are_equal():
    own = (ROOT / "wheels" / "engine" / "pyproject.toml").read_text()
    assert f'\nversion = "{sparing.__version__}"' in own
    assert f'"sparing-engine=={sparing.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no CMake")
def test_cmake_builds_what_the_library_looks_for(workshop, monkeypatch):
    source, build, installed = (workshop.folder / name for name in ("source", "build", "installed"))
    source.mkdir()
    for name in ("CMakeLists.txt", "__init__.py.in"):
        shutil.copy(ROOT / "wheels" / "engine" / name, source)
    shutil.copytree(module.KERNELS, source / "kernels")
    monkeypatch.delenv("CXX")
    for command in (
        ["cmake", "-S", source, "-B", build],
        ["cmake", "--build", build],
        ["cmake", "--install", build, "--prefix", installed],
    ):
        subprocess.run(command, check=True, capture_output=True)
    monkeypatch.delitem(sys.modules, "sparing_engine")
    monkeypatch.syspath_prepend(installed)
    for capability in ("DEFAULT", "AVX2", "AVX512") if platform.machine() == "x86_64" else ("DEFAULT",):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert Path(workshop.load()._name).parent == installed / "sparing_engine"
    assert workshop.compiled() == 0
