"""Runtimes that execute an exported network, each in a process of its own.

The process imports one runtime alone, and of sparing nothing but its sparse convolutions where they are the
runtime, so that no two of them share threads or memory, and what one prints stays out of the way. It reads
commands as lines of JSON:

    {"run": INPUTS, "outputs": FILE}    execute once, and write the outputs
    {"time": INPUTS, "count": n}        execute n times, and answer with the seconds of each

where INPUTS is an .npz file with arrays input0, input1 and on.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Run = Callable[[], Sequence[Any]]

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""For GLIBC_TUNABLES: memory in pages of megabytes, as the kernel has them. With small ones every access to another
channel is one to another page, whose place is looked up again, and large tensors are given back and cleared anew."""


def onnxruntime(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """An .onnx file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def prepare(inputs: list[Any]) -> Run:
        feed = dict(zip(names, inputs, strict=True))
        return lambda: session.run(None, feed)  # type: ignore[no-any-return]

    return prepare


def openvino_fp32(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """An .onnx or .xml file in OpenVINO, computed in fp32."""
    return _openvino(path, threads, "f32")


def openvino_bf16(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """An .onnx or .xml file in OpenVINO, computed in bf16."""
    return _openvino(path, threads, "bf16")


def mnn(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """An .mnn file in MNN."""
    import MNN
    import numpy

    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "normal"},))
    module = MNN.nn.load_module_from_file(path, [], [], runtime_manager=runtime)

    def prepare(inputs: list[Any]) -> Run:
        kinds = {"float32": MNN.expr.float, "int32": MNN.expr.int, "int64": MNN.expr.int}
        # MNN has no 64-bit integers.
        given = [array.astype("int32") if array.dtype == "int64" else array for array in inputs]
        variables = [MNN.expr.const(a, list(a.shape), MNN.expr.NCHW, kinds[str(a.dtype)]) for a in given]

        def run() -> Sequence[Any]:
            made = module.forward(variables)
            made = made if isinstance(made, list) else [made]
            return [numpy.array(variable.read(), copy=True) for variable in made]  # reading waits for the result

        return run

    return prepare


def torch_eager(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """A .pt2 file, a program that torch.export made, in torch itself."""
    return _torch(path, threads, compiled=False)


def torch_sparse(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """A .pt2 file of `sparing.export.native`, in torch with its sparse convolutions."""
    from sparing.export import native

    native.library()
    return _torch(path, threads, compiled=False)


def torch_compiled(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """A .pt2 file compiled with torch.compile, weights frozen."""
    return _torch(path, threads, compiled=True)


RUNTIMES = {
    function.__name__: function
    for function in (onnxruntime, openvino_fp32, openvino_bf16, mnn, torch_sparse, torch_eager, torch_compiled)
}
"""Runtimes by name: a function from (file, threads) to a function from inputs to what is timed."""


class UnavailableError(Exception):
    """A runtime cannot execute the network here; the message says why."""


class Process:
    """A network loaded into a runtime in a process of its own, idle until asked.

    On Linux it has `HUGE_PAGES`, unless GLIBC_TUNABLES says otherwise: all runtimes alike.

    Args:
        runtime: a name of `RUNTIMES`.
        path: the network's file, of the kind that runtime reads.
        threads: how many it may use.

    Raises:
        UnavailableError: the runtime is not installed, or cannot load the network.

    Examples:
        >>> with Process("mnn", "network.mnn", threads=1) as process:  # doctest: +SKIP
        ...     process.run([torch.randn(1, 3, 224, 224).numpy()])
    """

    def __init__(self, runtime: str, path: str | Path, threads: int) -> None:
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment = {"GLIBC_TUNABLES": HUGE_PAGES, **os.environ, **counts}
        self._folder = tempfile.TemporaryDirectory(prefix="sparing-")
        self._errors = open(Path(self._folder.name, "errors"), "w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, __file__, runtime, str(path), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs for these arrays."""
        import numpy

        made = Path(self._folder.name, "outputs.npz")
        self._ask({"run": self._write(inputs), "outputs": str(made)})
        with numpy.load(made, allow_pickle=False) as arrays:
            return [arrays[f"output{index}"] for index in range(len(arrays.files))]

    def time(self, inputs: Sequence[Any], count: int) -> list[float]:
        """The seconds of each of `count` executions, after those asked for before."""
        seconds: list[float] = self._ask({"time": self._write(inputs), "count": count})["seconds"]
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, inputs: Sequence[Any]) -> str:
        import numpy

        content = b"".join(f"{array.dtype}{array.shape}".encode() + array.tobytes() for array in inputs)
        path = Path(self._folder.name, f"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}.npz")
        if not path.exists():
            numpy.savez(path, **{f"input{index}": array for index, array in enumerate(inputs)})
        return str(path)

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer will say what happened
            print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
            raise UnavailableError(lines[-1] if lines else f"ended with status {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UnavailableError(answer["error"])
        return answer


def _openvino(path: str, threads: int, precision: str) -> Callable[[list[Any]], Run]:
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("this processor has no bf16")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()

    def prepare(inputs: list[Any]) -> Run:
        return lambda: list(request.infer(inputs).values())

    return prepare


def _torch(path: str, threads: int, compiled: bool) -> Callable[[list[Any]], Run]:
    import torch

    torch.set_num_threads(threads)
    program = torch.export.load(path)
    module: Any = program.module()
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = True  # weights are constants, and batch normalization folds into them
        module = torch.compile(module, dynamic=False)

    def prepare(inputs: list[Any]) -> Run:
        tensors = [torch.from_numpy(array) for array in inputs]
        args, kwargs = torch.utils._pytree.tree_unflatten(tensors, program.call_spec.in_spec)

        def run() -> Sequence[Any]:
            with torch.inference_mode() if not compiled else torch.no_grad():
                made = module(*args, **kwargs)
            return [made] if isinstance(made, torch.Tensor) else torch.utils._pytree.tree_leaves(made)

        return run

    return prepare


def _serve(runtime: str, path: str, threads: str) -> None:
    import numpy

    # Runtimes print to standard output, from C++ as well; answers go where nobody else writes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        prepare = RUNTIMES[runtime](path, int(threads))
        answer({"ready": True})
        prepared: dict[str, Run] = {}
        for line in sys.stdin:
            command = json.loads(line)
            given = command.get("run") or command["time"]
            if given not in prepared:
                with numpy.load(given, allow_pickle=False) as arrays:
                    prepared[given] = prepare([arrays[f"input{index}"] for index in range(len(arrays.files))])
            run = prepared[given]
            if "run" in command:
                made: dict[str, Any] = {f"output{index}": numpy.asarray(array) for index, array in enumerate(run())}
                numpy.savez(command["outputs"], **made)
                answer({"done": True})
                continue
            seconds = []
            for _ in range(command["count"]):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            answer({"seconds": seconds})
    except ModuleNotFoundError as error:
        answer({"error": "not installed" if error.name in ("onnxruntime", "openvino", "MNN") else str(error)})
    except Exception as error:
        lines = [text.strip() for text in str(error).splitlines() if text.strip()]
        answer({"error": lines[0] if lines else type(error).__name__})


if __name__ == "__main__":
    # This folder has modules named like the packages they wrap.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    _serve(*sys.argv[1:])
