"""Run directories: read what `sparing train` wrote. The command line and notebooks use the same class."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from torch import nn

from sparing import latency
from sparing.budget import Budget
from sparing.data import SplitDataset, check_split
from sparing.errors import CheckpointError, InputError
from sparing.export.network import Written
from sparing.export.shrink import shrink
from sparing.files import atomic_write, check_writable, write_text
from sparing.formats import FORMATS
from sparing.layers import find_layers, sparse_layers
from sparing.plots import latency_bars
from sparing.report import Report, report
from sparing.rnn import RankReport
from sparing.rnn import ranks as ranks_of
from sparing.run.build import build_data, build_model, build_sparsifier, pick_device
from sparing.run.checkpoint import checkpoint_exists, load_checkpoint, load_newest
from sparing.run.evaluate import Evaluation, evaluate
from sparing.run.log import read_history
from sparing.run.reading import check_content, read_json
from sparing.run.recipe import Recipe, ResolvedSection, load_recipe
from sparing.run.resolve import resolve
from sparing.run.weights import load_fitting, read_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WeightsSource = Literal["last", "best", "dense"]
FILES: dict[WeightsSource, tuple[str, str]] = {
    "last": ("checkpoint.pt", "after an epoch, or when it is interrupted"),
    "best": ("best.pt", "after an epoch"),
    "dense": ("model.safetensors", "at the end of the run"),
}
"""Weights → their file in a run directory, and when training writes it."""
WEIGHTS_ONLY = ("compressed", "safetensors")
"""Formats that hold tensors but no network."""


class Metrics(BaseModel):
    """What the command line and pages need of `metrics.json`."""

    method: str
    accuracy: float
    validation_accuracy: float | None
    sparsity: float
    weights: int
    nonzero: int
    dense_macs: int
    macs: int
    test_correct: int
    test_count: int
    dense_bytes: int
    compressed_bytes: int
    seconds: float
    device: str
    dense_accuracy: float | None = None
    dense_seconds: float | None = None


class Run:
    """A run directory.

    It holds everything but the data, so it may be moved, and read from any working directory. Every file is read once,
    when it is needed first.

    Attributes:
        path: the directory.
        recipe: the resolved recipe.
        resolved: what follows from recipe and data: length of the run, shape of the inputs, versions.

    Examples:
        >>> run = Run.open("runs/demo")  # doctest: +SKIP
        >>> run.metrics["accuracy"], run.report().total.sparsity  # doctest: +SKIP
        (0.973, 0.962)
        >>> run.export("onnx").path  # doctest: +SKIP
        PosixPath('runs/demo/model.onnx')
    """

    def __init__(self, path: Path, recipe: Recipe, resolved: ResolvedSection) -> None:
        self.path = path
        self.recipe = recipe
        self.resolved = resolved
        self._models: dict[str, nn.Module] = {}

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run directory. The model is read later, by the functions that need it.

        Raises:
            InputError: it is not a run directory, or its recipe cannot be read.
        """
        path = Path(path)
        if not (path / "recipe.yaml").is_file():
            reason = "there is no such directory" if not path.is_dir() else "it has no recipe.yaml"
            raise InputError(f"{path} is not a run directory: {reason}")
        recipe = load_recipe(path / "recipe.yaml")
        if recipe.resolved is None:
            raise InputError(f"{path} is not a run directory: its recipe.yaml was not written by sparing train")
        return cls(path, recipe, recipe.resolved)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The final results, of `metrics.json`; None if the run is not finished.

        Raises:
            InputError: the file cannot be read, or a number is missing.
        """
        path = self.path / "metrics.json"
        if not path.exists():
            return None
        metrics: dict[str, Any] = read_json(path, "delete it and resume the run to write it again")
        check_content(Metrics, metrics, path)
        return metrics

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per finished epoch: loss, accuracy, sparsity, and threshold and sparsity of each layer."""
        return read_history(self.path)

    def model(self, weights: WeightsSource = "last") -> nn.Module:
        """Return the model, on the CPU, in evaluation mode. It is the same object at every call.

        Args:
            weights: "last", the last checkpoint; "best", the best epoch; "dense", plain modules with the effective
                weights of `model.safetensors`.

        Raises:
            CheckpointError: the file cannot be read, or does not fit the recipe.
        """
        if weights not in self._models:
            self._models[weights] = self._load(weights).eval()
        return self._models[weights]

    def _load(self, weights: WeightsSource) -> nn.Module:
        name, when = FILES[weights]
        path = self.path / name
        if not path.exists() and not checkpoint_exists(path):
            raise CheckpointError(f"{self.path} has no {name}; training writes it {when}")
        model = build_model(self.recipe.model, self.resolved.model_arguments)
        if weights == "dense":
            load_fitting(model, read_weights(path), path)
            return model
        saved, path = (load_checkpoint(path), path) if weights == "best" else load_newest(path)
        if "model" not in saved:
            raise CheckpointError(f"checkpoint {path}: does not fit the recipe (it has no 'model')")
        # On the meta device, so that sparsify_() does not warn about the initial weights.
        model = model.to("meta")
        build_sparsifier(self.recipe, model)
        model = model.to_empty(device="cpu")
        state = saved["model"]
        if weights == "last" and "average" in saved:
            state = {k.removeprefix("module."): v for k, v in saved["average"].items() if k.startswith("module.")}
        load_fitting(model, state, path)
        return model

    def report(self, weights: WeightsSource = "last") -> Report:
        """Count weights and MACs per layer; the data is not needed."""
        return report(self.model(weights), self.resolved.input_size)

    def ranks(self, weights: WeightsSource = "last") -> RankReport:
        """Return the ranks of low-rank layers."""
        return ranks_of(self.model(weights))

    def budget(self, weights: WeightsSource = "last") -> Budget:
        """Return the layer-wise sparsity budget that the run has found, of the sparsified layers."""
        model = self.model(weights)
        layers = sparse_layers(model) or find_layers(model)
        return Budget({name: layer.sparsity() for name, layer in layers.items()})

    def evaluate(self, part: str = "test", weights: WeightsSource = "last") -> Evaluation:
        """Evaluate the model on a split of the data, "test" or "validation"."""
        return evaluate_on(self.model(weights), build_data(self.recipe.data), self.recipe.device, part)

    def export(self, to: str, out: str | Path | None = None, remove_filters: bool = False) -> Written:
        """Write the model to a file of another format. The outputs of a network are checked against PyTorch.

        Args:
            to: name of the format, of `sparing.formats.FORMATS`.
            out: the file; None writes into the run directory.
            remove_filters: remove all-zero filters before export.

        Raises:
            InputError: the format is unknown or holds no network to remove filters from; the file cannot be written.
        """
        if to not in FORMATS:
            raise InputError(f"unknown format {to!r}; choose from {', '.join(FORMATS)}")
        model, size = self.model("dense"), self.resolved.input_size
        if remove_filters:
            if to in WEIGHTS_ONLY:
                raise InputError(
                    f"--shrink changes the shapes of layers, but --to {to} writes weights without layers; "
                    f"choose another format: {', '.join(name for name in FORMATS if name not in WEIGHTS_ONLY)}"
                )
            model = shrink(model, size)
        name, save = FORMATS[to]
        return save(model, Path(out) if out is not None else self.path / name, size)

    def bench(
        self,
        batches: tuple[int, ...] = (1, 16),
        threads: list[int] | None = None,
        say: Callable[[str], object] = lambda stage: None,
    ) -> latency.Latency:
        """Measure the latency of the model in the installed runtimes, and write latency.json and its figure.

        Args:
            batches: batch sizes.
            threads: numbers of threads; None measures 1 and the number of CPUs.
            say: called with a text when a stage of the measurement begins.

        Raises:
            InputError: the run is not finished; latency.json cannot be written.
        """
        model = self.model("dense")
        check_writable(self.path / "latency.json")
        measured = latency.measure(model, self.resolved.input_size, batches=batches, threads=threads, say=say)
        write_text(self.path / "latency.json", measured.to_json() + "\n")
        write_figure(latency_bars(measured.bars()), self.path / "figures" / "latency.png")
        return measured


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure, atomically, into a folder that is created if it does not exist.

    Raises:
        InputError: the file or its folder cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def evaluate_file(path: str | Path, recipe: Recipe, part: str = "test") -> tuple[Evaluation, Report]:
    """Evaluate a file of weights in the model of a recipe, on a split of the recipe's data.

    Args:
        path: a .safetensors file of effective weights, such as `model.safetensors` of a run, or of weights and
            thresholds, as `sparing convert --keep-thresholds` writes it.
        recipe: gives `model`, `data`, `device`, and for a file with thresholds `method`; other keys are not used.
        part: split of the data, "test" or "validation".

    Raises:
        InputError: the file is not a .safetensors file; it has thresholds and the recipe has no method.
        CheckpointError: it cannot be read, or does not fit the model.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is not a .safetensors file; convert a checkpoint of the STR release with sparing convert"
        )
    state, data = read_weights(path), build_data(recipe.data)
    sparsified = sorted({key.partition(".parametrizations.")[0] for key in state if ".parametrizations." in key})
    if sparsified and recipe.method is None:
        raise InputError(f"{path} holds thresholds; give the recipe their method, such as --set 'method={{name: str}}'")
    recipe = recipe if sparsified else recipe.dense()
    model = build_model(recipe.model, data.model_arguments())
    try:
        if sparsified:
            model = model.to("meta")
            build_sparsifier(resolve(recipe.model_copy(update={"select": sparsified}), data), model)
            model = model.to_empty(device="cpu")
        model.load_state_dict(state)
    except (InputError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"checkpoint {path}: does not fit the recipe's {recipe.model.name} ({reason})") from error
    return evaluate_on(model, data, recipe.device, part), report(model, data.input_size)


def evaluate_on(model: nn.Module, data: SplitDataset, device_name: str, part: str) -> Evaluation:
    """Evaluate a model on a split of a data set. The model is on the CPU again afterwards.

    Raises:
        InputError: the data has no such split.
    """
    try:
        device = pick_device(device_name)
    except InputError:  # the run was trained on another machine
        device = pick_device("auto")
    split = check_split(part)
    if not data.size(split):
        raise InputError(f"the data has no {split} split")
    try:
        return evaluate(model.to(device), data.to(device).evaluation(split), size=data.size(split))
    finally:
        model.to("cpu")
