"""Train, save, resume and convert sparsified models with the real packages; `pip install sparing[frameworks]`."""

import copy
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import sparing
from sparing import GMP, STR, InputError, RigL

STEPS = 10
METHODS = {
    "gmp": GMP(sparsity=0.8, begin=0, end=0.8, every=1),
    "rigl": RigL(sparsity=0.8, budget="uniform", every=2, end=0.9),
    "str": STR(sparsity=0.8),
}
ONE_SHOT = GMP(sparsity=0.5, begin=0, end=0)
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("vision_operators")]
each_method = pytest.mark.parametrize("name", METHODS)


def package(name):
    """Import a package of the extra `frameworks`, or skip the test."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.fixture
def transformers():
    transformers = package("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture
def lightning():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return package("lightning")


@pytest.fixture
def timm():
    package("timm.optim")  # the package imports its other parts itself
    return package("timm")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))


def batches(count=STEPS, size=8):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 10, generator=random)
    return TensorDataset(x, torch.randint(0, 5, (count * size,), generator=random))


def build(name):
    model = network()
    sparsifier = sparing.sparsify_(model, METHODS[name], steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def train(model, optimizer, first=0, last=STEPS):
    for x, y in list(DataLoader(batches(), 8))[first:last]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def masks(model):
    return {name: layer.parametrization.mask.clone() for name, layer in sparing.sparse_layers(model).items()}


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first | second)


def assert_same_run(model, other):
    """Weights, masks, thresholds and the step are equal to the last bit, and the run is over."""
    assert same(model.state_dict(), other.state_dict())
    clocks = [layer.parametrization.clock for layer in sparing.sparse_layers(model).values()]
    assert {clock.step for clock in clocks} == {clocks[0].steps}
    assert sparing.report(other).missed == ()


# torch


@each_method
def test_a_deep_copy_of_model_optimizer_and_sparsifier_goes_on(name):
    model, sparsifier, optimizer = build(name)
    train(model, optimizer, 0, 5)
    twin, twin_optimizer, _ = copy.deepcopy((model, optimizer, sparsifier))
    train(model, optimizer, 5)
    train(twin, twin_optimizer, 5)
    assert_same_run(model, twin)


@each_method
@pytest.mark.parametrize("saved", ["in memory", "on disk"])
def test_torch_distributed_checkpoint_resumes_exactly(name, saved, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, _, optimizer = build(name)
    train(model, optimizer, 0, 5)
    state = copy.deepcopy(dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)))
    other, sparsifier, its_optimizer = build(name)
    if saved == "on disk":
        checkpoint.save(state, checkpoint_id=tmp_path)
        state = dict(zip(("model", "optim"), get_state_dict(other, its_optimizer), strict=True))
        checkpoint.load(state, checkpoint_id=tmp_path)
    set_state_dict(other, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert sparsifier.step == 5
    train(model, optimizer, 5)
    train(other, its_optimizer, 5)
    assert_same_run(model, other)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.hidden(self.embed(tokens)))


@pytest.mark.parametrize("method", [*METHODS.values(), STR(granularity="global"), STR(granularity="filter")], ids=repr)
def test_safetensors_take_the_state_of_a_tied_model(method, tmp_path):
    first, second = Tied(), Tied()
    for model in (first, second):
        sparing.sparsify_(model, method, select=["embed", "hidden"], steps=STEPS)
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(first.state_dict(), second.state_dict())
    assert second.head.parametrizations.weight.original is second.embed.parametrizations.weight.original
    # The state dict itself still holds the parameter, once.
    parameter = first.embed.parametrizations.weight.original
    held = [value.data_ptr() == parameter.data_ptr() for value in first.state_dict().values()]
    assert sum(held) == 1


def test_an_average_of_a_tied_model_has_its_masks():
    model = Tied()
    sparsifier = sparing.sparsify_(model, METHODS["gmp"], steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.arange(20)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    assert same(masks(average.module), masks(model))


# transformers


def bert(transformers):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=32, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama(transformers, tied=False):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=1, vocab_size=50, max_position_embeddings=32, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config)


def sentences():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (40, 8), generator=random)
    return [{"input_ids": row, "labels": number % 3} for number, row in enumerate(ids)]


def train_with_trainer(transformers, model, method, folder, stopped=None, **options):
    sparsifier = sparing.sparsify_(model, method, steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=STEPS, save_steps=5, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=sentences(), optimizers=(optimizer, None))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=stopped and f"{folder}/{stopped}")
    assert sparsifier.step == STEPS
    return model


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("batches", [1, 2])
def test_a_trainer_resumes_exactly(name, batches, transformers, tmp_path):
    options = {"folder": tmp_path, "gradient_accumulation_steps": batches}
    model = train_with_trainer(transformers, bert(transformers), METHODS[name], **options)
    assert (tmp_path / "checkpoint-5" / "model.safetensors").is_file()
    resumed = train_with_trainer(transformers, bert(transformers), METHODS[name], stopped="checkpoint-5", **options)
    assert_same_run(model, resumed)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [ONE_SHOT, STR(init=-3.0), sparing.ContinuousSparsification(weight=0.1)], ids=str)
@pytest.mark.parametrize("state", ["all", "dense"])
def test_from_pretrained_has_the_effective_weights(state, method, tied, transformers, tmp_path):
    model = llama(transformers, tied).eval()
    before = model.state_dict().keys()
    sparing.sparsify_(model, method, steps=STEPS)
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    options = {"state_dict": sparing.dense_state_dict(model)} if state == "dense" else {}
    model.save_pretrained(tmp_path, max_shard_size="10KB", **options)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=0)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert sparing.dense_state_dict(model).keys() == before
    assert sparing.densify_(model).state_dict().keys() == before


def test_a_checkpoint_of_a_part_or_a_whole_loads_strictly(transformers, tmp_path):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = bert(transformers), nn.Linear(3, 2)

    first, second = Whole(), Whole()
    for model in (first, second):
        sparing.sparsify_(model, RigL(sparsity=0.5, every=2), steps=STEPS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    first.part.save_pretrained(tmp_path)
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert same(plain.state_dict(), sparing.dense_state_dict(first.part))
    second.load_state_dict(first.state_dict())
    assert same(first.state_dict(), second.state_dict())


def test_a_weight_that_from_pretrained_would_not_find_is_refused(transformers):
    model = bert(transformers)
    nn.utils.parametrizations.weight_norm(model.classifier)
    with pytest.raises(InputError, match="'classifier'"):
        sparing.sparsify_(model, ONE_SHOT, select=sparing.select.default)
    assert sparing.sparse_layers(model) == {}
    sparing.sparsify_(model, ONE_SHOT)  # the head is left out


def test_models_of_other_packages_have_no_plain_keys():
    model = network()
    sparing.sparsify_(model, ONE_SHOT)
    assert "0.weight" not in model.state_dict()


# accelerate


@each_method
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_exactly(name, precision, tmp_path):
    accelerate = package("accelerate")

    def start():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = network()
        sparsifier = sparing.sparsify_(model, METHODS[name], steps=STEPS)
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.01), DataLoader(batches(2 * STEPS), 8)
        )
        sparsifier.attach(optimizer)
        return accelerator, model, sparsifier, optimizer, loader

    def run(accelerator, model, sparsifier, optimizer, loader, stop=STEPS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            if sparsifier.step == stop and accelerator.sync_gradients:
                break

    accelerator, model, sparsifier, optimizer, loader = started = start()
    run(*started, stop=5)
    accelerator.save_state(tmp_path)
    rest = accelerator.skip_first_batches(loader, 10)
    run(accelerator, model, sparsifier, optimizer, rest)

    accelerator, other, sparsifier, optimizer, loader = start()
    accelerator.load_state(tmp_path)
    assert sparsifier.step == 5
    run(accelerator, other, sparsifier, optimizer, accelerator.skip_first_batches(loader, 10))
    assert_same_run(accelerator.unwrap_model(model), accelerator.unwrap_model(other))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


TWO_PROCESSES = """
import sys, accelerate, torch, sparing
from torch.nn import functional as F

def run(folder):
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    sparsifier = sparing.sparsify_(model, sparing.RigL(sparsity=0.8, every=2, end=0.9), steps=10)
    data = torch.utils.data.TensorDataset(torch.randn(160, 10), torch.randint(0, 5, (160,)))
    wrapped, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), torch.utils.data.DataLoader(data, 8)
    )
    assert type(wrapped) is torch.nn.parallel.DistributedDataParallel
    sparsifier.attach(optimizer)

    def train(first):
        for x, y in list(loader)[first:]:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(wrapped(x), y))
            accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
            optimizer.step()
            if sparsifier.step == 5 and first == 0:
                accelerator.save_state(folder)
        return {key: value.clone() for key, value in model.state_dict().items()}

    expected = train(0)
    accelerator.load_state(folder)
    assert sparsifier.step == 5
    resumed = train(5)
    assert sparsifier.step == 10
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    masks = [accelerator.gather(layer.parametrization.mask[None]) for layer in sparsifier.layers.values()]
    assert all(torch.equal(*mask) for mask in masks)

accelerate.debug_launcher(run, (sys.argv[1],), num_processes=2)
"""


@pytest.mark.slow
def test_accelerate_resumes_on_two_processes(tmp_path):
    package("accelerate")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, tmp_path], check=True, env=environment)


def test_accelerate_offloads_a_densified_model_and_refuses_masks():
    accelerate = package("accelerate")
    model = network().eval()
    sparing.sparsify_(model, ONE_SHOT)
    with pytest.raises(ValueError, match="does not have a parameter or a buffer named mask"):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model = network().eval()
    sparing.sparsify_(model, ONE_SHOT)
    x = torch.randn(4, 10)
    expected = model(x)
    accelerate.cpu_offload(sparing.densify_(model), execution_device=torch.device("cpu"))
    assert torch.equal(model(x), expected)


# MACs, by another counter

VISION = ["resnet18", "eva02_tiny_patch14_224", "levit_128s", "convnextv2_atto"]


def counted_by_torch(model, inputs):
    """The MACs of matrix products and convolutions as torch counts them; attention multiplies by no weight."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**inputs)
    counts = {str(operation).split(".")[-1]: flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    return sum(counts.get(name, 0) for name in ("mm", "addmm", "convolution")) // 2


@pytest.mark.parametrize("name", VISION)
def test_macs_of_timm_models_are_those_that_torch_counts(name, timm):
    model = timm.create_model(name).eval()
    inputs = {"x": torch.zeros(1, *model.default_cfg["input_size"])}
    assert sparing.report(model, inputs).total.dense_macs == counted_by_torch(model, inputs) > 10**8


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_macs_of_transformers_are_those_that_torch_counts(kind, transformers):
    ids = torch.arange(8)[None]
    size = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        config = transformers.BertConfig(**size, hidden_size=16, intermediate_size=32)
        model = transformers.BertForSequenceClassification(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_layer=2, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        inputs["decoder_input_ids"] = ids
    assert sparing.report(model, inputs).total.dense_macs == counted_by_torch(model.eval(), inputs) > 10**4


# Lightning


def lightning_module(lightning, name, optimization):
    """A module with one optimizer and Lightning's closure, or with two optimizers that it steps itself."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()
            self.sparsifier = sparing.sparsify_(self.model, METHODS[name], steps=STEPS)
            self.automatic_optimization = optimization == "automatic"

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            if self.automatic_optimization:
                return loss
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            parameters = list(self.parameters())
            groups = [parameters] if self.automatic_optimization else [parameters[:3], parameters[3:]]
            optimizers = [torch.optim.AdamW(group, lr=0.01) for group in groups]
            self.sparsifier.attach(*optimizers)
            return optimizers

    return Module()


def fit(lightning, module, folder, *callbacks, stopped=None, accumulate=1, **options):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, callbacks=[
            lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}"), *callbacks
        ], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(STEPS // 2 * accumulate), 8), ckpt_path=stopped and folder / stopped)


LIGHTNING = {
    "closure, clipped": ("automatic", {"gradient_clip_val": 0.5}),
    "bf16, accumulated": ("automatic", {"precision": "bf16-mixed", "accumulate": 2}),
    "two optimizers": ("manual", {}),
}


@each_method
@pytest.mark.parametrize("kind", LIGHTNING)
def test_lightning_resumes_exactly(name, kind, lightning, tmp_path):
    optimization, options = LIGHTNING[kind]
    module, other = (lightning_module(lightning, name, optimization) for _ in range(2))
    fit(lightning, module, tmp_path, **options)
    fit(lightning, other, tmp_path, stopped="epoch=0.ckpt", **options)
    assert_same_run(module.model, other.model)


@each_method
@pytest.mark.parametrize("use_buffers", [True, False])
def test_lightning_averages_have_the_masks_of_the_model_and_resume_exactly(name, use_buffers, lightning, tmp_path):
    average = lightning.pytorch.callbacks.EMAWeightAveraging
    trained, validated = [], []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            trained.append(masks(module.model))

        def on_validation_end(self, trainer, module):
            if trained:
                validated.append(same(masks(module.model), trained[-1]))

    module, other = (lightning_module(lightning, name, "automatic") for _ in range(2))
    watch = [] if name == "str" else [Watch()]
    module.validation_step = lambda batch, index: None
    fit(lightning, module, tmp_path, average(use_buffers=use_buffers), *watch)
    assert module.sparsifier.step == STEPS
    if watch:
        assert same(masks(module.model), trained[-1])
    fit(lightning, other, tmp_path, average(use_buffers=use_buffers), stopped="epoch=0.ckpt")
    assert same(module.model.state_dict(), other.model.state_dict())


# timm


@pytest.mark.parametrize("kind", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
@pytest.mark.parametrize("name", ["gmp", "rigl"])
def test_timm_averages_have_the_masks_of_the_model(name, kind, timm):
    model, _, optimizer = build(name)
    average = getattr(timm.utils.model_ema, kind)(model, decay=0.9)
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        average.update(model)
    assert same(masks(average.ema if kind == "ModelEma" else average.module), masks(model))


@each_method
@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_timm_trains_saves_and_resumes_its_models(name, architecture, timm, tmp_path):
    def start():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=5, **{"img_size": 32} if architecture == "test_vit" else {})
        sparsifier = sparing.sparsify_(model, METHODS[name], steps=STEPS)
        optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
        sparsifier.attach(optimizer)
        return model, optimizer

    def run(model, optimizer, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
            optimizer.step()

    model, optimizer = start()
    run(model, optimizer, 0, 5)
    timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    run(model, optimizer, 5, STEPS)
    other, its_optimizer = start()
    timm.models.resume_checkpoint(other, str(tmp_path / "last.pth.tar"), its_optimizer, log_info=False)
    run(other, its_optimizer, 5, STEPS)
    assert_same_run(model, other)


def test_timm_takes_the_parameter_groups_of_sparing(timm):
    """Without them timm gives parameters of one dimension, such as s, no weight decay."""
    model = network()
    sparing.sparsify_(model, STR())
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", weight_decay=0.05, param_group_fn=lambda model: sparing.param_groups(model, 0.05)
    )
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(layer.parametrization.s)] for layer in sparing.sparse_layers(model).values()} == {0.05}


# peft


@pytest.fixture
def lora(transformers):
    """Wrap the Linear layers of the network for LoRA."""
    peft = package("peft")
    config = {"r": 2, "target_modules": "[03]", "init_lora_weights": False}
    return lambda model: peft.get_peft_model(model, peft.LoraConfig(**config))


@pytest.mark.parametrize("method", [ONE_SHOT, METHODS["gmp"]], ids=["pruned", "ramp"])
def test_adapters_are_trained_on_a_sparse_base(method, lora):
    model = network()
    sparsifier = sparing.sparsify_(model, method, steps=STEPS)
    adapted = lora(model)
    base = copy.deepcopy({name: layer.weight for name, layer in sparsifier.layers.items()})
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    with warnings.catch_warnings():
        if method == ONE_SHOT:
            warnings.simplefilter("error")
        sparsifier.attach(optimizer)
    before = copy.deepcopy(dict(adapted.named_parameters()))
    train(adapted, optimizer)
    moved = {key for key, value in adapted.named_parameters() if not torch.equal(value, before[key])}
    assert moved
    assert all("lora_" in key for key in moved)
    assert same(base, {name: layer.weight for name, layer in sparsifier.layers.items()})
    assert sparsifier.step == STEPS
    sparsity = {round(layer.sparsity(), 2) for layer in sparsifier.layers.values()}
    assert sparsity == {method.sparsity}


@each_method
def test_attach_warns_of_frozen_layers_that_are_still_pruned(name, lora):
    model = network()
    sparsifier = sparing.sparsify_(model, METHODS[name], steps=STEPS)
    adapted = lora(model)
    with pytest.warns(sparing.SparsityWarning, match=rf"^{name}: 2 of 2 layers \(0, 3\) are frozen"):
        sparsifier.attach(torch.optim.AdamW(p for p in adapted.parameters() if p.requires_grad))


def test_adapters_are_not_merged_into_a_sparsified_weight(lora):
    model = network()
    sparing.sparsify_(model, ONE_SHOT)
    with pytest.raises(InputError, match="would write into the effective weight"):
        lora(model).merge_and_unload()


@pytest.mark.parametrize("densify", [False, True])
def test_adapters_are_merged_where_the_weights_are_not_zero(lora, densify):
    model = network()
    sparing.sparsify_(model, ONE_SHOT)
    zeros = [model[index].weight == 0 for index in (0, 3)]
    adapted = lora(model)
    if densify:
        sparing.densify_(adapted)
    layers = [module for module in adapted.modules() if hasattr(module, "get_delta_weight")]
    before = [layer.base_layer.weight.clone() for layer in layers]
    for layer in layers:
        assert 0 < sparing.merge_(layer.base_layer, layer.get_delta_weight("default")) < 1
    merged = adapted.unload()
    assert all(bool((merged[index].weight == 0)[zero].all()) for index, zero in zip((0, 3), zeros, strict=True))
    assert all(not torch.equal(layer.base_layer.weight, old) for layer, old in zip(layers, before, strict=True))


def test_adapters_are_merged_into_a_densified_weight(lora):
    model = network().eval()
    sparing.sparsify_(model, ONE_SHOT)
    adapted = lora(model).eval()
    x = torch.randn(8, 10)
    expected = adapted(x)
    sparing.densify_(adapted)
    torch.testing.assert_close(adapted.merge_and_unload()(x), expected)


def test_a_base_that_is_frozen_for_adapters_is_not_sparsified_in_silence(lora):
    adapted = lora(network())
    with pytest.raises(InputError, match="all 2 selected layers are frozen"):
        sparing.sparsify_(adapted, ONE_SHOT, select=["*.base_layer"])
    with pytest.warns(sparing.SparsityWarning, match="2 of 6 selected layers are frozen"):
        sparing.sparsify_(adapted, ONE_SHOT)


# torchao


@pytest.fixture
def quantization():
    package("torchao")
    import torchao.quantization

    return torchao.quantization


@pytest.mark.parametrize("method", [STR(init=-3.0), GMP(sparsity=0.8, begin=0, end=0)], ids=["str", "gmp"])
def test_zeros_stay_zeros_when_a_densified_model_is_quantized(method, quantization):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    sparing.sparsify_(model, method)
    sparing.densify_(model)
    x, expected = torch.randn(8, 64), [model[0].weight.clone(), model[2].weight.clone()]
    output = model(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for layer, weight in zip((model[0], model[2]), expected, strict=True):
        assert (layer.weight.dequantize()[weight == 0] == 0).all()
        assert (weight == 0).any()
    torch.testing.assert_close(model(x), output, rtol=0, atol=0.02)


def test_a_sparsified_model_is_not_quantized(quantization):
    from torchao.quantization import qat

    model = nn.Sequential(nn.Linear(64, 64))
    sparing.sparsify_(model, ONE_SHOT)
    with pytest.raises(InputError, match="'weight' of a sparsified Linear .*densify_"):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    training = qat.QATConfig(weight_config=qat.IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare")
    with pytest.raises(TypeError, match="cannot assign"):
        quantization.quantize_(model, training)
    assert list(sparing.sparse_layers(model)) == ["0"]


# opacus

PRIVATE = {
    **METHODS,
    "global s": STR(init=-3.0, granularity="global"),
    "feather": sparing.Feather(sparsity=0.5, every=1),
    "snip": sparing.SNIP(sparsity=0.5),
}


def with_privacy(model, optimizer, **options):
    package("opacus")
    from opacus import PrivacyEngine

    model, optimizer, *_, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(batches(), 8), poisson_sampling=False,
        noise_multiplier=0.0, max_grad_norm=1e9, **options,
    )  # fmt: skip
    return model, optimizer, loader


def small(method, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16, bias=bias), nn.ReLU(), nn.Linear(16, 5))
    sparsifier = sparing.sparsify_(model, method, steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


@pytest.mark.parametrize("name", PRIVATE)
def test_gradients_per_sample_are_those_of_the_masks_in_force(name):
    model, sparsifier, optimizer = small(PRIVATE[name])
    private, optimizer, loader = with_privacy(model, optimizer)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(x), y).backward()
        private.disable_hooks()
        for parameter, gradient in zip(
            model.parameters(),
            torch.autograd.grad(F.cross_entropy(model(x[:1]), y[:1]), list(model.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(parameter.grad_sample[0], gradient, rtol=1e-4, atol=1e-6)
        private.enable_hooks()
        optimizer.step()
    assert sparsifier.step == STEPS


def test_layers_that_opacus_cannot_train_are_refused():
    for method, bias in ((ONE_SHOT, False), (sparing.VariationalDropout(kl_weight=0.1), True)):
        model, _, optimizer = small(method, bias)
        private, _, loader = with_privacy(model, optimizer)
        x, y = next(iter(loader))
        with pytest.raises((IndexError, RuntimeError)):
            F.cross_entropy(private(x), y).backward()


def test_a_term_of_the_loss_that_opacus_would_ignore_is_refused():
    model, sparsifier, optimizer = small(sparing.DST(alpha=0.1))
    with_privacy(model, optimizer)
    with pytest.raises(InputError, match="^dst adds a term to the loss"):
        sparsifier.penalty()


# engine


def assert_outputs(fast, model, **inputs):
    """The compiled network has the outputs of the model, for all samples and for the first one."""
    for batch in (2, 1):
        given = {name: tensor[:batch] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected = model(**given)
        torch.testing.assert_close(fast(**given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("engine_library")
def test_the_engine_runs_all_of_bert_but_embeddings(transformers):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    sparing.sparsify_(model, ONE_SHOT)
    inputs = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    fast = sparing.engine.compile(model, inputs)
    assert_outputs(fast, model, **inputs)
    assert [len(segment.convolutions) for segment in fast.program.segments] == [12, 1]
    names = {call.name.split(".")[1] for call in fast.program.calls}
    assert "embedding" in names
    assert not names & {"linear", "layer_norm", "gelu", "tanh", "scaled_dot_product_attention"}


@pytest.mark.slow
@pytest.mark.usefixtures("engine_library")
def test_the_engine_runs_all_of_a_timm_model(timm):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=5).eval()
    sparing.sparsify_(model, ONE_SHOT)
    fast = sparing.engine.compile(model, (1, 3, 32, 32))
    assert_outputs(fast, model, x=torch.randn(2, 3, 32, 32))
    assert len(fast.program.segments) == 1
    assert not fast.program.calls
