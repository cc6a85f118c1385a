"""Run an exported network in a runtime, in a separate process.

Each process imports a single runtime, so that runtimes share no threads and no memory, and their output to stdout does
not interfere. The process reads commands as lines of JSON:

    {"run": INPUTS, "outputs": FILE}    run once and write the outputs to an .npz file
    {"time": INPUTS, "count": n}        run n times and return the seconds of each run

INPUTS is an .npz file with the arrays input0, input1, ....
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
from importlib import import_module
from pathlib import Path
from typing import Any

Run = Callable[[], Sequence[Any]]

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Value of GLIBC_TUNABLES that enables huge pages. They help some runtimes: with small pages, accesses that are far
apart are TLB misses, and large tensors are returned to the kernel and zeroed again on allocation."""


def onnxruntime(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """Load an .onnx file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def prepare(inputs: list[Any]) -> Run:
        feed = dict(zip(names, inputs, strict=True))
        return lambda: session.run(None, feed)

    return prepare


def openvino_fp32(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """Load an .onnx or .xml file in OpenVINO, computing in fp32."""
    return _openvino(path, threads, "f32")


def openvino_bf16(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """Load an .onnx or .xml file in OpenVINO, computing in bf16."""
    return _openvino(path, threads, "bf16")


def mnn(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """Load an .mnn file in MNN."""
    import MNN
    import numpy

    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "normal"},))
    module = MNN.nn.load_module_from_file(path, [], [], runtime_manager=runtime)

    def prepare(inputs: list[Any]) -> Run:
        kinds = {"float32": MNN.expr.float, "int32": MNN.expr.int}
        # MNN has no 64-bit integers and no booleans.
        arrays = [array.astype("int32") if array.dtype in ("int64", "bool") else array for array in inputs]
        for array in arrays:
            if str(array.dtype) not in kinds:
                raise UnavailableError(f"an input cannot be {array.dtype}; use float32, int32, int64 or bool")
        variables = [MNN.expr.const(a, list(a.shape), MNN.expr.NCHW, kinds[str(a.dtype)]) for a in arrays]

        def run() -> Sequence[Any]:
            outputs = module.forward(variables)
            outputs = outputs if isinstance(outputs, list) else [outputs]
            return [numpy.array(variable.read(), copy=True) for variable in outputs]  # read() waits for the result

        return run

    return prepare


def torch_eager(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """Load a .pt2 file of torch.export in PyTorch eager mode."""
    return _torch(path, threads, compiled=False)


def torch_compiled(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """Load a .pt2 file of torch.export and compile it with torch.compile and frozen weights."""
    return _torch(path, threads, compiled=True)


RUNTIMES = {
    function.__name__: function
    for function in (onnxruntime, openvino_fp32, openvino_bf16, mnn, torch_eager, torch_compiled)
}
"""Runtime name → function that loads (file, threads) and returns a function from inputs to the function to time."""


class UnavailableError(Exception):
    """A runtime cannot run the network on this machine. The message gives the reason."""


class Process:
    """Load a network into a runtime in a separate process, which waits for commands.

    Args:
        runtime: a key of `RUNTIMES`, or `module:function` for another function of this kind.
        path: file of the network, in a format of the runtime.
        threads: number of threads that the runtime may use.
        huge_pages: whether memory is in huge pages on Linux (`HUGE_PAGES`). The environment variable GLIBC_TUNABLES has
            precedence.

    Raises:
        UnavailableError: the runtime is not installed, or cannot load the network.

    Examples:
        >>> with Process("mnn", "network.mnn", threads=1) as process:  # doctest: +SKIP
        ...     process.run([torch.randn(1, 3, 224, 224).numpy()])
    """

    def __init__(self, runtime: str, path: str | Path, threads: int, huge_pages: bool = True) -> None:
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment = {"GLIBC_TUNABLES": HUGE_PAGES if huge_pages else "", **os.environ, **counts}
        self._folder = tempfile.TemporaryDirectory(prefix="sparing-")
        self._errors = open(Path(self._folder.name, "errors"), "w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, __file__, runtime, str(path), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the network once. Return the output arrays.

        Args:
            inputs: input arrays, in the order of the exported inputs.

        Raises:
            UnavailableError: the runtime fails.
        """
        import numpy

        outputs = Path(self._folder.name, "outputs.npz")
        self._request({"run": self._write(inputs), "outputs": str(outputs)})
        with numpy.load(outputs, allow_pickle=False) as arrays:
            return [arrays[f"output{index}"] for index in range(len(arrays.files))]

    def time(self, inputs: Sequence[Any], count: int) -> list[float]:
        """Run the network `count` times. Return the seconds of each run.

        Args:
            inputs: input arrays, in the order of the exported inputs.
            count: number of runs.

        Raises:
            UnavailableError: the runtime fails.
        """
        seconds: list[float] = self._request({"time": self._write(inputs), "count": count})["seconds"]
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

    def _request(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # _receive raises the error of the process
            print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
            raise UnavailableError(lines[-1] if lines else f"exit status {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UnavailableError(answer["error"])
        return answer


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would send usage statistics to a server at every import."""
    if "openvino_telemetry" in sys.modules:  # imported by the user
        return import_module("openvino")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]


def _openvino(path: str, threads: int, precision: str) -> Callable[[list[Any]], Run]:
    openvino = import_openvino()
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("this processor does not support bf16")
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

        torch._inductor.config.freezing = True  # makes weights constants and folds batch normalization
        module = torch.compile(module, dynamic=False)

    def arrange(tensors: list[Any]) -> Any:
        return torch.utils._pytree.tree_unflatten(tensors, program.call_spec.in_spec)

    return run_module(module, arrange, torch.no_grad if compiled else torch.inference_mode)


def run_module(module: Any, arrange: Callable[[list[Any]], Any], mode: Callable[[], Any]) -> Callable[[list[Any]], Run]:
    """Return a function from inputs to the function to time, for a module of PyTorch.

    Args:
        module: the module to run.
        arrange: function from the flat list of input tensors to args and kwargs.
        mode: context manager without gradients.
    """
    import torch

    def prepare(inputs: list[Any]) -> Run:
        args, kwargs = arrange([torch.from_numpy(array) for array in inputs])

        def run() -> Sequence[Any]:
            with mode():
                outputs = module(*args, **kwargs)
            return [outputs] if isinstance(outputs, torch.Tensor) else torch.utils._pytree.tree_leaves(outputs)

        return run

    return prepare


def _find(runtime: str) -> Callable[[str, int], Callable[[list[Any]], Run]]:
    module, _, function = runtime.partition(":")
    return getattr(import_module(module), function) if function else RUNTIMES[runtime]


def _serve(runtime: str, path: str, threads: str) -> None:
    import numpy

    # Runtimes print to stdout, also from C++. Redirect stdout to stderr, and send responses to a copy of the original.
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def respond(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=responses, flush=True)

    try:
        prepare = _find(runtime)(path, int(threads))
        respond({"ready": True})
        prepared: dict[str, Run] = {}
        for line in sys.stdin:
            command = json.loads(line)
            inputs = command.get("run") or command["time"]
            if inputs not in prepared:
                with numpy.load(inputs, allow_pickle=False) as arrays:
                    prepared[inputs] = prepare([arrays[f"input{index}"] for index in range(len(arrays.files))])
            run = prepared[inputs]
            if "run" in command:
                outputs: dict[str, Any] = {f"output{index}": numpy.asarray(array) for index, array in enumerate(run())}
                numpy.savez(command["outputs"], **outputs)
                respond({"done": True})
                continue
            seconds = []
            for _ in range(command["count"]):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            respond({"seconds": seconds})
    except ModuleNotFoundError as error:
        respond({"error": "not installed" if error.name in ("onnxruntime", "openvino", "MNN") else str(error)})
    except Exception as error:
        lines = [text.strip() for text in str(error).splitlines() if text.strip()]
        respond({"error": lines[0] if lines else type(error).__name__})


if __name__ == "__main__":
    # Remove this folder from the path: its modules have the names of the packages that they wrap.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    _serve(*sys.argv[1:])
