"""Compare sparing with other libraries: one task, the same network, batches, optimizer and seeds.

    python3 -m venv peers
    peers/bin/pip install torch==2.13.0 safetensors jinja2 nncf==3.4.0 pquant-ml==0.1.0
    peers/bin/pip install --no-deps sparsimony==0.1.0 torchao==0.18.0   # sparsimony asks for numpy 1
    PYTHONPATH=src peers/bin/python bench/peers.py
    PYTHONPATH=src peers/bin/python bench/peers.py --variants str nncf_global --seeds 0

The task: 6 epochs of the first 10,000 images of Fashion-MNIST, batches of 64, a ResNet-8 of 77,072 weights, of which
95 % are to be zero. SGD with momentum 0.9, learning rate 0.1 with an epoch of warmup and a cosine, weight decay 5e-4.

Each function below is what a user writes for a library, as its documentation says, from the model to the model with
zeros in its weights; `dense` is the same without pruning. The lines of a function beyond those of `dense` are what the
library costs. Where a library has several ways, several are run. Methods that prune during training reach the target
in the fourth epoch, unless a library says otherwise.

Each run writes results/peers/<variant>-seed<n>.json and is not repeated. A library that is not installed is left out
with a message. `python bench/results.py table` builds the table of docs/libraries.md.
"""

import argparse
import ast
import inspect
import logging
import math
import os
import textwrap
import warnings
from importlib import metadata
from itertools import islice

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from ledger import ROOT, write_entry
from sparing.data.image import ImageBatches, fashion_mnist
from sparing.models import resnet8
from sparing.schedules import warmup_cosine

SPARSITY, IMAGES, EPOCHS, BATCH = 0.95, 10_000, 6, 64
EPOCH = -(-IMAGES // BATCH)
STEPS = EPOCHS * EPOCH
RAMP = 4
"""Epochs until the target is reached."""


def sgd(parameters):
    """Return the optimizer of the task."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def cosine(optimizer):
    """Return the learning rate schedule of the task."""
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, STEPS, EPOCH))


def dense(model, batches):
    optimizer = sgd(model.parameters())
    schedule = cosine(optimizer)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model


def train_sparing(model, batches, method, clip=math.inf):
    import sparing

    sparsifier = sparing.sparsify_(model, method(), steps=STEPS)
    optimizer = sgd(sparing.param_groups(model, weight_decay=5e-4))
    sparsifier.attach(optimizer)
    schedule = cosine(optimizer)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return sparing.densify_(model)


def torch_prune(model, batches):
    """Prune the smallest weights of the network after each of 4 epochs, as in the tutorial of PyTorch."""
    from torch.nn.utils import prune

    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    weights = [(layer, "weight") for layer in layers]
    share = 1 - (1 - SPARSITY) ** (1 / RAMP)  # of the weights that are left
    optimizer = sgd(model.parameters())
    schedule = cosine(optimizer)
    for step, (images, labels) in enumerate(batches, 1):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        if step % EPOCH == 0 and step <= RAMP * EPOCH:
            prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=share)
    for layer in layers:
        prune.remove(layer, "weight")
    return model


def sparsimony_rigl(model, batches):
    """RigL with an ERK budget: of what the package has, the method of its examples."""
    from sparsimony.distributions.base import ERKDistribution
    from sparsimony.dst.rigl import RigL
    from sparsimony.schedulers.base import CosineDecayScheduler

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    optimizer = sgd(model.parameters())
    schedule = cosine(optimizer)  # before `prepare`, which replaces optimizer.step
    ramp = CosineDecayScheduler(pruning_ratio=0.3, t_end=int(0.75 * STEPS), delta_t=100)
    sparsifier = RigL(ramp, ERKDistribution(), optimizer, sparsity=SPARSITY)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers])
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        sparsifier.step()
    sparsifier.squash_mask()
    return model


def torchao_pat(model, batches):
    """The smallest weights of the network are zero after every step; a cubic ramp, then the mask is frozen."""
    from torchao.prototype.pat.optim import PruneOptimizer

    weights = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    chosen = {id(weight) for weight in weights}
    pruned = {"group_type": "KElementGrouper", "k": 1, "prox_type": "GlobalMinSparsityConstraint"}
    target = {"min_sparsity": SPARSITY, "min_sparsity_schedule": True}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    base = sgd([{"params": weights, **pruned, **target}, {"params": others}])
    optimizer = PruneOptimizer(base, healing_start_step=RAMP * EPOCH)
    schedule = cosine(base)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model


def train_nncf(model, batches, mode):
    """Magnitude pruning with an exponential schedule, which steps once an epoch."""
    import nncf
    from nncf.torch.function_hook.pruning.magnitude.schedulers import ExponentialMagnitudePruningScheduler

    mode, example = getattr(nncf.PruneMode, mode), torch.ones(1, 1, 28, 28)
    model = nncf.prune(model, mode=mode, ratio=0.0, examples_inputs=example)
    ramp = ExponentialMagnitudePruningScheduler(
        model, mode=mode, initial_ratio=0.0, target_ratio=SPARSITY, target_epoch=RAMP
    )
    optimizer = sgd(model.parameters())
    schedule = cosine(optimizer)
    for step, (images, labels) in enumerate(batches):
        if step % EPOCH == 0:
            ramp.step()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return nncf.strip(model, strip_format=nncf.StripFormat.IN_PLACE)


def nncf_learned(model, batches):
    """Learned masks with a loss term for the target (mode RB), in an optimizer of their own: SGD at 0.1 prunes none."""
    import nncf
    from nncf.torch.function_hook.pruning.rb.losses import RBLoss
    from nncf.torch.function_hook.pruning.rb.schedulers import ExponentialRBPruningScheduler

    mode, example = nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED, torch.ones(1, 1, 28, 28)
    model = nncf.prune(model, mode=mode, examples_inputs=example)
    masks = [parameter for name, parameter in model.named_parameters() if name.endswith(".mask")]
    chosen = {id(mask) for mask in masks}
    penalty = RBLoss(model, target_ratio=SPARSITY)
    ramp = ExponentialRBPruningScheduler(penalty, initial_ratio=0.0, target_ratio=SPARSITY, target_epoch=RAMP)
    optimizer = sgd([parameter for parameter in model.parameters() if id(parameter) not in chosen])
    mask_optimizer = torch.optim.Adam(masks, lr=0.1)
    schedule = cosine(optimizer)
    for step, (images, labels) in enumerate(batches):
        if step % EPOCH == 0:
            ramp.step()
        optimizer.zero_grad()
        mask_optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + penalty()).backward()
        optimizer.step()
        mask_optimizer.step()
        schedule.step()
    return nncf.strip(model, strip_format=nncf.StripFormat.IN_PLACE)


def train_pquant(model, batches, configuration, epochs, settings):
    """Prune without quantization, with the settings and the phases that the package has for a method, and its loop."""
    os.environ["KERAS_BACKEND"] = "torch"
    import pquant

    config = getattr(pquant, configuration)()
    config.quantization_parameters.enable_quantization = False
    phases = config.training_parameters
    phases.pretraining_epochs, phases.epochs, phases.fine_tuning_epochs = epochs
    for name, value in settings.items():
        setattr(config.pruning_parameters, name, value)
    model = pquant.add_compression_layers(model, config, input_shape=(1, 1, 28, 28))
    optimizer = sgd(model.parameters())
    schedule = cosine(optimizer)

    def train(model, epoch):
        for images, labels in islice(batches, EPOCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            pquant.get_model_losses(model, loss).backward()
            optimizer.step()
            schedule.step()

    pquant.train_model(model, config, train, lambda model, epoch: None)
    return pquant.apply_final_compression(model)


def of_sparing(name, **arguments):
    """Return a function that makes a method of sparing, which is only imported where it is used."""

    def make():
        import sparing

        return sparing.METHODS[name](sparsity=SPARSITY, **arguments)

    return make


GLOBAL, LOCAL = "UNSTRUCTURED_MAGNITUDE_GLOBAL", "UNSTRUCTURED_MAGNITUDE_LOCAL"
VARIANTS = {
    "dense": ("torch", dense, ()),
    "str": ("sparing", train_sparing, (of_sparing("str"),)),
    "str_feather": ("sparing", train_sparing, (of_sparing("str_feather"), 3.0)),
    "feather": ("sparing", train_sparing, (of_sparing("feather"), 3.0)),
    "gmp": ("sparing", train_sparing, (of_sparing("gmp"),)),
    "gmp_global": ("sparing", train_sparing, (of_sparing("gmp", budget="global"),)),
    "rigl": ("sparing", train_sparing, (of_sparing("rigl"),)),
    "torch_prune": ("torch", torch_prune, ()),
    "sparsimony_rigl": ("sparsimony", sparsimony_rigl, ()),
    "torchao_pat": ("torchao", torchao_pat, ()),
    "nncf_global": ("nncf", train_nncf, (GLOBAL,)),
    "nncf_local": ("nncf", train_nncf, (LOCAL,)),
    "nncf_learned": ("nncf", nncf_learned, ()),
    "pquant_pdp": ("pquant-ml", train_pquant, ("pdp_config", (1, 3, 2), {"sparsity": SPARSITY, "epsilon": 1 / 3})),
    "pquant_mdmm": ("pquant-ml", train_pquant, ("mdmm_config", (0, 4, 2), {"target_sparsity": SPARSITY})),
    "pquant_autosparse": ("pquant-ml", train_pquant, ("autosparse_config", (0, 4, 2), {"alpha_reset_epoch": 3})),
}
"""Name → package, function, and its other arguments."""


def lines(function):
    """Count the lines of a function that are code, without its signature and docstring."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    rows = textwrap.dedent(inspect.getsource(function)).splitlines()[body[0].lineno - 1 :]
    return sum(bool(row.strip()) and not row.strip().startswith("#") for row in rows)


def steps(data, seed):
    """Yield the batches of all epochs."""
    images = data.train[torch.arange(IMAGES)]
    loader = ImageBatches(images, data.mean, data.std, BATCH, shuffle=True, shift=2, flip=True, seed=seed)
    for epoch in range(EPOCHS):
        loader.epoch = epoch
        yield from loader


def run(data, variant, seed):
    """Train one variant and return its results."""
    package, function, arguments = VARIANTS[variant]
    torch.manual_seed(seed)
    network = resnet8(stem_stride=2)
    shapes = {
        name: m.weight.numel()
        for name, m in network.named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = function(network, steps(data, seed), *arguments).eval()
    with torch.no_grad():
        zeros = sum(int((model.get_submodule(name).weight == 0).sum()) for name in shapes)
        test = ImageBatches(data.test, data.mean, data.std, 1000)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    return {
        "variant": variant, "package": package, "version": metadata.version(package) if package != "sparing" else None,
        "torch": torch.__version__, "seed": seed, "asked": 0 if variant == "dense" else SPARSITY,
        "weights": sum(shapes.values()), "zeros": zeros, "accuracy": right / len(data.test),
        "lines": lines(function), "dense_lines": lines(dense),
        "warnings": sorted({str(each.message).split("\n")[0][:200] for each in caught}),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    data = fashion_mnist()
    for seed in options.seeds:
        for variant in options.variants:
            entry = os.path.join(ROOT, "results", "peers", f"{variant}-seed{seed}.json")
            if os.path.exists(entry):
                continue
            try:
                result = run(data, variant, seed)
            except ModuleNotFoundError as error:
                print(f"{variant}: not run: {error}")
                continue
            write_entry(entry, result)
            share = result["zeros"] / result["weights"]
            print(f"{variant}-seed{seed}: {100 * result['accuracy']:.2f} % at {100 * share:.3f} % zeros", flush=True)


if __name__ == "__main__":
    main()
