"""Write the recipes of this folder from the rows of the paper's tables in paper.csv.

    python recipes/imagenet/generate.py

The columns: what the paper reports (top1 in percent, weights and macs as printed) with the label of
the accuracy and where it is from; weight_decay and init with theirs. SRC was read in the source named,
MEM-hi and MEM-med are recalled, not read, with high and medium confidence. `budget` is a published
budget, "uniform", "learned", or "pointwise": the first convolution and the depthwise ones stay dense.
"""

import csv
from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = {"resnet50": "ResNet-50", "mobilenet_v1": "MobileNetV1"}
LABELS = {
    "SRC": "read in the {source}",
    "MEM-hi": "{source}; recalled, not read, confidence high",
    "MEM-med": "{source}; recalled, not read, confidence medium",
}
POINTWISE = {"74.11": 0.75, "89.03": 0.90}
"""What the layers that are pruned lose where the others stay dense; the totals follow by counting."""


def rows():
    """The rows of paper.csv."""
    with (FOLDER / "paper.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def method(row):
    """The lines of `method:` and `select:`, if any."""
    match row["method"], row["budget"]:
        case "dense", _:
            return ""
        case "str", _:
            return f"method:\n  name: str\n  init: {row['init']}\n"
        case name, "uniform":
            target = f"sparsity: {float(row['sparsity']) / 100:g}"
        case name, "pointwise":
            target = f"sparsity: {POINTWISE[row['sparsity']]:g}"
        case name, budget:
            target = f"budget: {budget}"
    lines = f"method:\n  name: {name}\n  {target}\n"
    if name == "gmp":
        # Epochs 20 to 80 of 100, a new mask an epoch: ⌈1,281,167 / 256⌉ steps.
        lines += "  begin: 0.2\n  end: 0.8\n  every: 5005\n"
    if row["budget"] == "pointwise":
        lines += 'select: ["model.*.3", fc]\n'
    return lines


def header(row):
    """What the run is, and what the paper reports of it."""
    of = "" if row["method"] == "dense" else f", {row['sparsity']} % of its weights zero,"
    how = {"dense": "dense", "str": "with STR", "dnw": "with DNW", "gmp": "with GMP"}
    lines = [
        f"{MODELS[row['model']]} on ImageNet {how[row['method']]}{of} by the recipe of the STR paper (ICML 2020).",
        f"The paper reports {row['top1']} % top-1, {row['weights']} weights, {row['macs']} multiply-accumulates",
        f"({LABELS[row['label']].format(source=row['source'])}).",
    ]
    if row["method"] == "str":
        source = "configuration of the release" if row["settings_label"] == "SRC" else "the paper's appendix"
        lines.append(f"weight_decay and init: {LABELS[row['settings_label']].format(source=source)}.")
    if row["weights"] == "4.47M":
        lines.append("The released budget of this row has 4.776M weights; 4.47M is a misprint.")
    lines.append("Built by generate.py from paper.csv; change those.")
    return "".join(f"# {line}\n" for line in lines)


def recipe(row):
    """The recipe of one row, as text."""
    return f"""\
{header(row)}\
model:
  name: {row["model"]}
data:
  name: imagenet
  root: data/imagenet
  batch_size: 256                   # over all ranks
  size: 224
  validation_per_class: 0           # the paper trains on all pictures
{method(row)}\
optimizer:
  name: sgd
  lr: 0.256
  momentum: 0.875
  weight_decay: {row["weight_decay"]}
schedule:
  epochs: 100
  warmup_epochs: 5
  update: epoch
label_smoothing: 0.1
seed: 0
"""


def recipes():
    """File name → text, of every row."""
    return {f"{row['name']}.yaml": recipe(row) for row in rows()}


if __name__ == "__main__":
    for name, text in recipes().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
