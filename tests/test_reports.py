"""Situations from public issue reports about pruning, averaging, checkpoints and frameworks, one test for each.

make test-slow runs them.

`owner/repository#number` is the report; `pytorch#number` is one of pytorch/pytorch.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import make
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparing
from sparing import GMP, SNIP, STR, InputError, RigL, SparsityWarning
from sparing.export import onnx
from test_frameworks import assert_same_run, bert, fit, lightning_module, llama, package, train_with_trainer

ROOT = Path(__file__).parent.parent
RAMP = GMP(sparsity=0.8, every=1)
ONE_SHOT = GMP(sparsity=0.5, begin=0, end=0)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vision_operators")]
quiet = pytest.mark.filterwarnings("ignore")  # frameworks give many warnings


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def attached(model, method, steps=None, optimizer=torch.optim.SGD):
    """Sparsify a model, and return the sparsifier and the optimizer that it is attached to."""
    sparsifier = sparing.sparsify_(model, method, steps=steps)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sparsifier.attach(optimizer)
    return sparsifier, optimizer


def train(model, optimizer, steps, shape=(8, 16)):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()


def sparsity(model):
    return sparing.report(model).total.sparsity


def masks(model):
    return torch.cat([layer.parametrization.mask.flatten() for layer in sparing.sparse_layers(model).values()])


# Averages and copies


@pytest.mark.parametrize("method", [GMP(sparsity=0.9, every=1), RigL(sparsity=0.9, every=2)], ids=lambda m: m.name)
def test_an_average_of_parameters_and_buffers(method):
    """An average that includes buffers is as sparse as the model (pytorch#71763, pytorch#84053)."""
    model = mlp()
    _, optimizer = attached(model, method, 20)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(20):
        train(model, optimizer, 1)
        average.update_parameters(model)
    assert torch.equal(masks(average.module), masks(model))
    assert sparsity(model) == pytest.approx(0.9, abs=0.002)


def test_a_running_mean_of_masks():
    """The mean of torch.optim.swa_utils subtracts buffers, which boolean masks do not allow (pytorch#71763)."""
    model = mlp()
    _, optimizer = attached(model, RigL(sparsity=0.8, every=2), 20)
    average = AveragedModel(model, use_buffers=True)
    for _ in range(5):
        train(model, optimizer, 1)
        average.update_parameters(model)
    assert torch.equal(masks(average.module), masks(model))


@quiet
def test_the_average_of_lightning(tmp_path):
    """The average that Lightning leaves is sparse (Lightning-AI/pytorch-lightning#20545, aistairc/aiaccel#554)."""
    lightning = package("lightning")
    module = lightning_module(lightning, "gmp", "automatic")
    fit(lightning, module, tmp_path, lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.9))
    assert sparing.report(module.model).missed == ()
    assert sparsity(module.model) == pytest.approx(0.8, abs=0.01)


def test_a_copy_of_model_sparsifier_and_optimizer():
    """A copied run goes on (skorch-dev/skorch#317), though torch copies no hooks (kakaobrain/torchlars#5)."""
    model = mlp()
    sparsifier, optimizer = attached(model, RAMP, 20)
    train(model, optimizer, 10)
    model, sparsifier, optimizer = copy.deepcopy((model, sparsifier, optimizer))
    train(model, optimizer, 10)
    assert (sparsifier.step, sparsity(model)) == (20, 0.8)


# Checkpoints


@quiet
def test_a_run_of_transformers_trainer_that_is_resumed(tmp_path):
    """A resumed run of Trainer ends like a whole one (openvinotoolkit/nncf#643, openvinotoolkit/nncf#1098)."""
    transformers = package("transformers")
    whole = train_with_trainer(transformers, bert(transformers), RAMP, tmp_path)
    resumed = train_with_trainer(transformers, bert(transformers), RAMP, tmp_path, stopped="checkpoint-5")
    assert_same_run(whole, resumed)


@pytest.mark.parametrize(
    "make",
    [
        lambda sparsity: GMP(sparsity=sparsity, every=1),
        lambda sparsity: GMP(sparsity=sparsity, begin=0.5, end=0.5),
        lambda sparsity: RigL(sparsity=sparsity, every=2),
        lambda sparsity: STR(sparsity=sparsity, every=1),
    ],
    ids=["gmp", "gmp, once", "rigl", "str"],
)
def test_a_checkpoint_of_another_target(make):
    """The error names both targets (midasklr/yolov5prune#31)."""
    first, second = mlp(), mlp()
    _, optimizer = attached(first, make(0.8), 20)
    train(first, optimizer, 20)
    sparing.sparsify_(second, make(0.95), steps=20)
    with pytest.raises(InputError, match="run with sparsity=0.8, this run has sparsity=0.95.*retarget"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("method", [GMP, STR], ids=lambda method: method.name)
@pytest.mark.parametrize("way", ["densify", "retarget"])
def test_a_sparse_model_that_is_pruned_further(method, way):
    """On the way from 80 % to 95 %, the model never has less than 80 % (facebookresearch/fairseq#4664).

    `retarget` does it for a checkpoint of the first target (jshilong/FisherPruning#21).
    """
    model, further = mlp(), method(sparsity=0.95, every=1)
    if way == "densify":
        sparing.sparsify_(model, GMP(sparsity=0.8, begin=0, end=0))
        _, optimizer = attached(sparing.densify_(model), further, 40)
    else:
        _, optimizer = attached(model, method(sparsity=0.8, every=1), 40)
        train(model, optimizer, 40)
        state, model = model.state_dict(), mlp()
        sparsifier, optimizer = attached(model, method(sparsity=0.8, every=1), 40)
        model.load_state_dict(state)
        sparsifier.retarget(further, steps=40)
    seen = []
    for _ in range(40):
        train(model, optimizer, 1)
        seen.append(sparsity(model))
    assert min(seen) >= 0.79
    assert seen[-1] == pytest.approx(0.95, abs=0.002)


def test_a_dense_checkpoint_for_a_sparsified_model():
    """strict=False may not ignore weights (neuralmagic/sparsify#278, minivision-ai/Silent-Face-Anti-Spoofing#41)."""
    pretrained, model = mlp().state_dict(), mlp()
    sparing.sparsify_(model, STR(init=-8.0))
    with pytest.raises(RuntimeError, match="load_dense_state_dict"):
        model.load_state_dict(pretrained, strict=False)
    sparing.load_dense_state_dict(model, pretrained)
    assert torch.equal(sparing.sparse_layers(model)["0"].weight, pretrained["0.weight"])


@quiet
@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_of_a_sparsified_model(tied, tmp_path):
    """Trainer calls save_pretrained at every checkpoint: from_pretrained has the same outputs.

    huggingface/transformers#33995, huggingface/transformers#27605, huggingface/transformers#26796.
    """
    transformers = package("transformers")
    model, ids = llama(transformers, tied).eval(), torch.arange(8)[None]
    sparing.sparsify_(model, ONE_SHOT)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_shared_threshold_in_a_safetensors_file(tmp_path):
    """One s of all layers can be saved (safetensors/safetensors#202, huggingface/trl#5150)."""
    model = mlp()
    sparing.sparsify_(model, STR(init=-5.0, granularity="global"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")


def test_a_bf16_checkpoint_that_is_assigned():
    """A threshold stays float32 under assign=True, since bf16 would round its weight decay away (pytorch#106725)."""
    model = mlp()
    sparing.sparsify_(model, STR(init=-5.0))
    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model[0].parametrizations.weight[0].s.dtype == torch.float32
    assert model[0].parametrizations.weight.original.dtype == torch.bfloat16


def test_distributed_checkpoint_of_the_start():
    """get_state_dict calls optimizer.step() to create its state, which is no training step (pytorch#164929)."""
    model = mlp()
    sparsifier, optimizer = attached(model, SNIP(sparsity=0.8), optimizer=torch.optim.Adam)
    get_state_dict(model, optimizer)
    assert (sparsifier.step, sparsity(model)) == (0, 0)


def test_distributed_checkpoint_that_is_resumed():
    """set_optimizer_state_dict calls optimizer.step(), which is not counted after the checkpoint (pytorch#133415)."""
    model, again = mlp(), mlp()
    _, optimizer = attached(model, RAMP, 30, torch.optim.Adam)
    train(model, optimizer, 10)
    weights, state = get_state_dict(model, optimizer)
    resumed, other = attached(again, RAMP, 30, torch.optim.Adam)
    again.load_state_dict(weights)
    set_optimizer_state_dict(again, other, state)
    assert resumed.step == 10
    assert torch.equal(masks(again), masks(model))


def test_deferred_initialization():
    """A model that is sparsified on the meta device has its first thresholds after to_empty and reset_parameters.

    pytorch#104187, pytorch#90465, NVIDIA-BioNeMo/bionemo-recipes#1368.
    """
    with torch.device("meta"):
        model = mlp()
    sparing.sparsify_(model, STR(init=-5.0))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert [layer.parametrization.s.item() for layer in sparing.sparse_layers(model).values()] == [-5.0, -5.0]


# Layers and weights


def test_weights_of_gpt2():
    """The Conv1D matrices of GPT-2 are sparsified (huggingface/transformers#311, huggingface/transformers#32269)."""
    transformers = package("transformers")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    sparsifier = sparing.sparsify_(model, ONE_SHOT)
    assert list(sparsifier.layers) == [
        f"transformer.h.{block}.{name}"
        for block in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert sparing.report(model).total.weights == sum(p.numel() for p in model.parameters() if p.dim() > 1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.einsum("bi,eio->beo", x, self.experts).sum(1))


def test_a_weight_that_is_a_parameter_of_its_own():
    """Experts are selected by name, and counted (vllm-project/llm-compressor#3200, pytorch/torchtitan#4539)."""
    model = Experts()
    assert sparing.report(model, (1, 16)).total.weights == 4 * 16 * 16 + 16 * 4
    sparsifier = sparing.sparsify_(model, ONE_SHOT, select=["experts"])
    assert list(sparsifier.layers) == ["experts"]
    assert int(model.experts.count_nonzero()) == 2 * 16 * 16


class StdConv(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-6), self.bias)


def test_weight_standardization():
    """A convolution that standardizes its weight multiplies by its zeros too, and the report says so.

    joe-siyuan-qiao/WeightStandardization#5, open-mmlab/mmdetection#515.
    """
    model = nn.Sequential(StdConv(8, 8, 3), nn.ReLU())
    sparing.sparsify_(model, GMP(sparsity=0.9, begin=0, end=0))
    with pytest.warns(SparsityWarning, match="the model multiplies by what .* makes of the weight of"):
        total = sparing.report(model, (1, 8, 6, 6)).total
    assert total.macs == total.dense_macs == 576 * 16


def test_weight_norm():
    """The normalized weight of a vocoder is sparse (fatchord/WaveRNN#30, huggingface/transformers#42064)."""
    weight_norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), weight_norm(nn.Conv1d(8, 4, 3)))
    _, optimizer = attached(model, GMP(sparsity=0.5, every=1), 10)
    train(model, optimizer, 10, (2, 4, 16))
    assert sparsity(model) == 0.5
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == 96


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_embeddings_that_cannot_be_sparsified(option):
    """An embedding with max_norm changes its weight in place, and sparse gradients cannot pass: both are refused.

    pytorch#26596, pytorch#28959; allenai/allennlp#2312.
    """
    model = nn.Sequential(nn.Embedding(100, 8, **option), nn.Linear(8, 2))
    with pytest.raises(InputError, match=f"layer '0' .*{next(iter(option))}=.*leave it out with select="):
        sparing.sparsify_(model, STR(init=-3.0), select=["0", "1"])


def test_two_methods_on_one_model():
    """Layers can have different methods (vllm-project/llm-compressor#1231, IntelLabs/distiller#53)."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    convolutions = sparing.sparsify_(model, STR(init=-3.0), select=["0"])
    linear = sparing.sparsify_(model, GMP(sparsity=0.9, every=1), select=["3"], steps=10)
    assert (list(convolutions.layers), list(linear.layers)) == (["0"], ["3"])


def test_a_head_that_is_replaced():
    """A new head is named, and can be sparsified; the others reach the target (FasterAI-Labs/fasterai#92)."""
    model = mlp()
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.9, every=1), steps=40)
    model[2] = nn.Linear(32, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(SparsityWarning, match=r"no longer in the model.*: 2\. .*select=\['2'\]"):
        sparsifier.attach(optimizer)
    train(model, optimizer, 40)
    assert sparsifier.sparsity() == pytest.approx(0.9, abs=0.002)
    assert list(sparing.sparsify_(model, STR(init=-5.0), select=["2"]).layers) == ["2"]


@pytest.mark.parametrize("method", [RAMP, SNIP(sparsity=0.8)], ids=lambda method: method.name)
def test_frozen_layers(method):
    """Frozen layers, which could not adapt to pruning, stay dense and are named (openvinotoolkit/nncf#200)."""
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.warns(SparsityWarning, match="1 of 2 selected layers are frozen and stay dense: 0"):
        _, optimizer = attached(model, method, 20)
    train(model, optimizer, 20)
    assert [row.percent for row in sparing.report(model).layers] == ["0.00 %", "79.69 %"]


def test_initialization_after_sparsify():
    """Initializing an effective weight is refused; reset_parameters acts on the dense weight (pytorch#180968)."""
    model = mlp()
    sparing.sparsify_(model, STR(init=-8.0))
    before = model[2].parametrizations.weight.original.clone()
    with pytest.raises(InputError, match="write into the effective weight of a sparsified layer"):
        nn.init.orthogonal_(model[0].weight)
    model[2].reset_parameters()
    assert not torch.equal(before, model[2].parametrizations.weight.original)


@quiet
def test_peft_merge_into_a_sparsified_model():
    """Merging an adapter into an effective weight is refused (huggingface/peft#918, huggingface/trl#386)."""
    peft, model = package("peft"), llama(package("transformers"))
    sparing.sparsify_(model, ONE_SHOT)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(InputError, match=r"write into the effective weight of a sparsified layer.*sparing.merge_\(\)"):
        adapted.merge_and_unload()


def test_an_adapter_that_is_merged_into_a_sparse_layer():
    """`merge_` keeps the zeros (locuslab/wanda#83, locuslab/wanda#10, pprp/Pruner-Zero#4)."""
    model = mlp()
    sparing.sparsify_(model, GMP(sparsity=0.8, begin=0, end=0))
    sparing.densify_(model)
    before = model[0].weight.clone()
    sparing.merge_(model[0], torch.randn(32, 2) @ torch.randn(2, 16) * 0.01)
    assert torch.equal(model[0].weight == 0, before == 0)
    assert not torch.equal(model[0].weight, before)


# Counts


@quiet
def test_macs_of_a_transformer_with_a_mask():
    """The MACs of a model with ids and a mask are counted, and can be a target (MrYxJ/calculate-flops.pytorch#61)."""
    model, ids = bert(package("transformers")), torch.zeros(1, 8, dtype=torch.long)
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert sparing.report(model, masked).total.macs == sparing.report(model, {"input_ids": ids}).total.macs > 0
    sparing.sparsify_(model, STR(macs=0.5, input_size=masked), steps=10)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.proj(q * k.sigmoid() + v)


def test_macs_of_a_weight_that_the_parent_multiplies_by():
    """EVA-02, BEiT and Swin pass the weight of a Linear to F.linear (allenai/olmoearth_pretrain#605)."""
    assert sparing.report(Block(), (1, 16)).total.dense_macs == 16 * 48 + 16 * 16


def test_macs_of_cross_attention():
    """The thirds of in_proj_weight are counted apart (ultralytics/thop#157, sovrasov/flops-counter.pytorch#101)."""
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    sparing.sparsify_(layer, ONE_SHOT, select=sparing.select.of_type(nn.MultiheadAttention, nn.Linear))
    report = sparing.report(layer, (torch.randn(2, 5, 16), torch.randn(2, 7, 16)))
    queries, memory = 3 * 256 + 256 + 256 + 256 + 2 * 512, 2 * 256
    assert report.total.dense_macs == 2 * (5 * queries + 7 * memory)


def test_macs_of_an_embedding_bag():
    """An EmbeddingBag reads rows and multiplies by nothing (autoliuweijie/FastBERT#11)."""
    model = nn.Sequential(nn.EmbeddingBag(100, 8), nn.Linear(8, 2))
    sparing.sparsify_(model, ONE_SHOT, select=["0", "1"])
    assert sparing.report(model, torch.zeros(2, 5, dtype=torch.long)).total.dense_macs == 2 * 16


def shard(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = mlp()
    sparing.sparsify_(model, STR(init=-3.0))
    whole = sparing.report(model).total.nonzero
    fully_shard(model)
    assert sparing.report(model).total.nonzero == whole
    torch.distributed.destroy_process_group()


def test_counts_of_a_sharded_model(tmp_path):
    """Under FSDP2 each rank counts the whole weight (pytorch/torchtitan#766, radixark/miles_diffusion#35)."""
    torch.multiprocessing.spawn(shard, args=(tmp_path / "store",), nprocs=2)


# Optimizers


class Wrapper(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state, self.defaults = optimizer.state, optimizer.defaults

    def step(self, closure=None):
        return self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad()


def test_an_optimizer_that_wraps_another():
    """An optimizer that holds the real one can be attached (huggingface/accelerate#805, pytorch#88446)."""
    model = mlp()
    _, optimizer = attached(model, GMP(sparsity=0.5, every=1), 10, lambda p, lr: Wrapper(torch.optim.SGD(p, lr)))
    train(model, optimizer, 10)
    assert sparsity(model) == 0.5


def test_a_second_optimizer():
    """attach() moves to a new optimizer (Lightning-AI/pytorch-lightning#6575, microsoft/nni#3844)."""
    model = mlp()
    sparsifier, first = attached(model, RAMP, 20)
    train(model, first, 10)
    second = torch.optim.Adam(model.parameters())
    sparsifier.attach(second)
    train(model, second, 10)
    assert (sparsifier.step, sparsity(model)) == (20, 0.8)


def test_clipping_by_norm():
    """The norm for clipping is that of the active weights (ultralytics/ultralytics#19476)."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    sparsifier, _ = attached(model, RigL(sparsity=0.98, budget="uniform"), 1000)
    x = torch.randn(64, 256)
    F.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    active = [layer.weight.grad[layer.parametrization.mask] for layer in sparsifier.layers.values()]
    active += [model[0].bias.grad, model[2].bias.grad]
    torch.testing.assert_close(norm, torch.cat(active).norm())


def test_no_decay_for_vectors():
    """Frameworks give one-dimensional parameters no weight decay, and without it no threshold rises: attach warns.

    ServiceNow/Fast-LLM#545, VectorInstitute/mmlearn#2, RAIVNLab/STR#2.
    """
    model = mlp()
    sparsifier = sparing.sparsify_(model, STR(init=-5.0))
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": 1e-3}, {"params": vectors, "weight_decay": 0.0}]
    with pytest.warns(SparsityWarning, match="nothing raises the thresholds of 2 of 2 layers .* no weight decay"):
        sparsifier.attach(torch.optim.SGD(groups, lr=0.1, momentum=0.9))


@quiet
def test_an_8_bit_adam():
    """AdamW8bit works with regrown weights (inclusionAI/Ling-V2#13, bitsandbytes-foundation/bitsandbytes#1261)."""
    optim = package("torchao.optim")
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    sparsifier, optimizer = attached(model, RigL(sparsity=0.8, every=3, budget="uniform"), 100, optim.AdamW8bit)
    before = masks(model)
    with torch.compiler.set_stance("force_eager"):
        train(model, optimizer, 10, (8, 128))
    assert sparsifier.step == 10
    assert not torch.equal(masks(model), before)


class Quantized(torch.optim.Optimizer):
    """SGD whose momentum is stored in eight bits, the code of 0 being 128."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = (state["code"].float() - 128) * state["scale"] * 0.9 + p.grad if state else p.grad
                state["scale"] = momentum.abs().max().clamp_min(1e-12) / 127
                state["code"] = (momentum / state["scale"] + 128).round().clamp(0, 255).to(torch.uint8)
                p.add_(momentum, alpha=-group["lr"])


def test_a_momentum_of_codes():
    """State in which a zero is not the code 0 is refused by methods that regrow weights (inclusionAI/Ling-V2#13)."""
    model = mlp()
    _, optimizer = attached(model, RigL(sparsity=0.8, every=5, budget="uniform"), 100, Quantized)
    with pytest.raises(InputError, match="'code' .* in which regrown weights cannot be set to zero"):
        train(model, optimizer, 6)


@pytest.mark.parametrize("method", [RigL(sparsity=0.5, every=2), SNIP(sparsity=0.5), RAMP], ids=lambda m: m.name)
def test_optimizer_steps_within_the_backward_pass(method):
    """Optimizers that are stepped by gradient hooks are refused (pytorch/torchtitan#851, pytorch#116975)."""
    model = mlp()
    sparsifier = sparing.sparsify_(model, method, steps=20)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    sparsifier.attach(*optimizers.values())
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.raises(InputError, match="called by a gradient hook, within the backward pass"):
        model(torch.randn(8, 16)).square().mean().backward()


# Transforms, devices and memory


@pytest.mark.parametrize("name", ["str", "gmp", "rigl", "snfs", "dst", "st3", "feather", "dnw", "spartan"])
def test_gradients_per_sample(name):
    """vmap(grad) works (pytorch/tutorials#2566, pytorch#90966, hpi-xnor/bitorch#4)."""
    model, x = mlp(), torch.randn(3, 16)
    sparing.sparsify_(model, make(name), steps=20)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).square().mean()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for number, row in enumerate(x):
        for key, gradient in grad(loss)(parameters, row).items():
            torch.testing.assert_close(each[key][number], gradient)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch calls it
def test_forward_mode():
    """A Jacobian-vector product passes through STR (pytorch/functorch#207, pytorch#182842)."""
    model, x = mlp(), torch.randn(2, 16)
    sparing.sparsify_(model, STR(init=-3.0))
    parameters = dict(model.named_parameters())
    ones = {key: torch.ones_like(value) for key, value in parameters.items()}
    _, tangent = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (ones,))
    gradients = torch.autograd.grad(model(x).sum(), list(parameters.values()))
    torch.testing.assert_close(tangent.sum(), sum(gradient.sum() for gradient in gradients))


@pytest.mark.parametrize("name", ["rigl", "set", "static_random", "gmp"])
def test_another_default_device(name):
    """Random masks are made on the device of the weight, whatever torch.set_default_device says.

    huggingface/accelerate#1627, hcnoh/knowledge-tracing-collection-pytorch#8.
    """
    model = mlp()
    torch.set_default_device("meta")
    try:
        sparing.sparsify_(model, make(name), steps=20)
    finally:
        torch.set_default_device(None)
    assert masks(model).device.type == "cpu"


def test_memory_of_a_global_threshold():
    """An update of one threshold for all layers needs at most 4 times the memory of the weights.

    neuralmagic/sparseml#828, pytorch#100989, pytorch#49332. The model has 50 M weights.
    """
    command = [sys.executable, ROOT / "bench" / "memory.py", "--in-this-process", "gmp_global"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["peak"] < 4


# Exports


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        return self.out((self.words(input_ids) * attention_mask[..., None]).mean(1))


def test_names_of_onnx_inputs(tmp_path):
    """The inputs are named as the keywords (intel/ipex-llm#6137, intel/neural-compressor#944)."""
    onnxruntime = package("onnxruntime")
    inputs = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "attention_mask": torch.ones(1, 6)}
    onnx.save(Words(), tmp_path / "model.onnx", inputs)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [entry.name for entry in session.get_inputs()] == list(inputs)


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x, h, c):
        y, (h, c) = self.lstm(x, (h, c))
        return self.out(y[:, -1]), h, c


def test_onnx_of_a_streaming_lstm(tmp_path):
    """A model that takes and returns its state, whose batch is the second dimension, is exported.

    microsoft/onnxruntime#19270, microsoft/onnxruntime#11085, openvinotoolkit/openvino#735.
    """
    package("onnxruntime")
    model = Stream()
    sparing.sparsify_(model, ONE_SHOT)
    onnx.save(model, tmp_path / "stream.onnx", (torch.zeros(1, 5, 4), torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)))


def test_onnx_of_a_bf16_model(tmp_path):
    """ONNX Runtime cannot run bf16, which is refused; MACs are counted from a shape."""
    package("onnxruntime")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).bfloat16()
    assert sparing.report(model, (1, 3, 8, 8)).total.macs == 216 * 36 + 288 * 4
    with pytest.raises(InputError, match="bfloat16"):
        onnx.save(model, tmp_path / "model.onnx", torch.zeros(1, 3, 8, 8).bfloat16())


def test_exports_without_an_import_of_their_own():
    """`sparing.export.onnx` and the others are there after `import sparing`, as docs/export.md has it."""
    names = ", ".join(f"sparing.export.{name}.save" for name in ("compressed", "onnx", "mnn", "openvino"))
    subprocess.run([sys.executable, "-c", f"import sparing; {names}"], check=True)
