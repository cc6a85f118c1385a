"""`sparing.integrations`, with the real packages; `pip install sparing[frameworks]`."""

import sys
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sparing
from sparing import GMP, InputError, SparsityWarning
from sparing.run.build import build_model
from sparing.run.recipe import ModelSection
from test_frameworks import METHODS, STEPS, assert_same_run, batches, bert, llama, network, sentences
from test_frameworks import lightning as lightning  # fixtures
from test_frameworks import timm as timm
from test_frameworks import transformers as transformers

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("vision_operators")]
each_method = pytest.mark.parametrize("name", METHODS)


def trainer(transformers, sparsifier, folder, steps=STEPS, **options):
    from sparing.integrations import SparsityCallback

    densify = options.pop("densify", True)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, save_steps=5, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=5, **options,
    )  # fmt: skip
    made = transformers.Trainer(
        sparsifier.model, arguments, train_dataset=sentences(), eval_dataset=sentences(),
        callbacks=[SparsityCallback(sparsifier, densify)],
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.mark.slow
@each_method
def test_a_trainer_resumes_exactly_with_the_optimizer_it_makes(name, transformers, tmp_path):
    runs = []
    for stopped in (None, f"{tmp_path}/checkpoint-5"):
        sparsifier = sparing.sparsify_(bert(transformers), METHODS[name], steps=STEPS)
        trainer(transformers, sparsifier, tmp_path, bf16=True, densify=False).train(resume_from_checkpoint=stopped)
        assert sparsifier.step == STEPS
        runs.append(sparsifier.model)
    assert_same_run(*runs)


@each_method
def test_a_trained_model_is_plain_and_its_log_has_the_sparsity(name, transformers, tmp_path):
    sparsifier = sparing.sparsify_(bert(transformers), METHODS[name], steps=STEPS)
    run = trainer(transformers, sparsifier, tmp_path)
    names = list(sparsifier.layers)
    weights = {name: layer.weight.numel() for name, layer in sparsifier.layers.items()}
    run.train()
    last = [record for record in run.state.log_history if "loss" in record][-1]
    nonzero = sum(round((1 - last[f"sparsity/{name}"]) * weights[name]) for name in names)
    assert last["sparsity"] == pytest.approx(1 - nonzero / sum(weights.values())) == pytest.approx(0.8, abs=0.001)
    assert not any("parametrizations" in key for key in run.model.state_dict())
    run.save_model(tmp_path / "saved")
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(8)[None]
    assert torch.equal(saved(ids).logits, run.model.eval()(ids).logits)


@pytest.mark.parametrize("steps", [5, 15])
def test_another_length_of_run_is_warned_of(steps, transformers, tmp_path):
    sparsifier = sparing.sparsify_(bert(transformers), METHODS["gmp"], steps=STEPS)
    run = trainer(transformers, sparsifier, tmp_path, steps=steps)
    with pytest.warns(SparsityWarning, match=f"the Trainer takes {steps} optimizer steps, .* steps=10"):
        run.train()


@pytest.mark.slow
def test_a_trainer_that_stops_early_gets_no_more_zeros(transformers, tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    sparsifier = sparing.sparsify_(bert(transformers), METHODS["gmp"], steps=STEPS)
    run = trainer(transformers, sparsifier, tmp_path, densify=False)
    run.add_callback(Stop)
    run.train()
    assert sparsifier.step == 5
    assert "5 of 10 optimizer steps" in sparing.report(sparsifier.model).missed[0]


@pytest.mark.parametrize(("best", "step", "missed"), [(0, 5, 1), (1, 10, 0)])
def test_the_best_checkpoint_of_a_run_is_not_pruned_without_training(best, step, missed, transformers, tmp_path):
    sparsifier = sparing.sparsify_(bert(transformers), METHODS["gmp"], steps=STEPS)
    choice = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "own"}
    run = trainer(transformers, sparsifier, tmp_path, densify=False, **choice)
    scores = iter([1 - best, best])
    run.compute_metrics = lambda prediction: {"own": next(scores)}
    run.train()
    assert sparsifier.step == step
    assert len(sparing.report(sparsifier.model).missed) == missed


def test_the_sparsifier_of_another_model_is_refused(transformers, tmp_path):
    sparsifier = sparing.sparsify_(bert(transformers), METHODS["gmp"], steps=STEPS)
    run = trainer(transformers, sparsifier, tmp_path)
    other = sparing.sparsify_(bert(transformers), METHODS["gmp"], steps=STEPS)
    run.callback_handler.callbacks[-1].sparsifier = other
    with pytest.raises(InputError, match="has no sparsified layer"):
        run.train()


@pytest.mark.slow
def test_a_second_training_of_a_densified_model_is_refused(transformers, tmp_path):
    sparsifier = sparing.sparsify_(bert(transformers), METHODS["gmp"], steps=STEPS)
    run = trainer(transformers, sparsifier, tmp_path)
    run.train()
    with pytest.raises(InputError, match="the model is no longer sparsified"):
        run.train()


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_for_the_hub_is_read_without_sparing_and_has_a_card(tied, transformers, tmp_path):
    from huggingface_hub import ModelCard

    from sparing.integrations.huggingface import save_pretrained

    model = llama(transformers, tied).eval()
    sparing.sparsify_(model, GMP(sparsity=0.5, begin=0, end=0), steps=STEPS)
    before = model.state_dict()
    save_pretrained(model, tmp_path, base_model="someone/llama")
    assert before.keys() == model.state_dict().keys()
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert torch.equal(plain.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("transformers", "someone/llama")
    sparsified = sparing.report(model).sparsified
    assert f"{sparsified.nonzero:,} of {sparsified.weights:,} weights" in card.text
    assert all(f"`{row.name}`" in card.text for row in sparing.report(model).layers)


@pytest.mark.parametrize("method", [*METHODS.values(), GMP(sparsity=0.5, pattern=sparing.Filters(), every=1)], ids=str)
def test_a_decoder_generates_the_same_text_after_training_densify_and_reload(method, transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    sparsifier = sparing.sparsify_(model, method, steps=STEPS)
    # All Conv1D layers, and neither the embeddings nor the head that is tied to them.
    matrices = [
        f"transformer.h.{n}.{name}"
        for n in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert {name: layer.kind for name, layer in sparsifier.layers.items()} == dict.fromkeys(matrices, "Conv1D")
    optimizer = torch.optim.AdamW(sparing.param_groups(model, weight_decay=0.01), lr=1e-3)
    sparsifier.attach(optimizer)
    tokens = torch.randint(1, 50, (4, 12))
    prompt = {"input_ids": tokens[:, :4], "attention_mask": torch.ones(4, 4), "max_new_tokens": 8, "do_sample": False}
    for _ in range(STEPS):
        model.train()
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    counts = sparing.report(model, {"input_ids": tokens}).sparsified
    assert counts.nonzero / counts.weights == pytest.approx(1 - method.sparsity, abs=0.02)
    text, logits = model.eval().generate(**prompt), model(tokens).logits
    if isinstance(method, GMP) and method.pattern == sparing.Filters():
        for layer in sparsifier.layers.values():  # the outputs of a Conv1D are the columns of its weight
            columns = (layer.effective_weight != 0).float().mean(0)
            assert set(columns.tolist()) == {0.0, 1.0}
    sparing.densify_(model)
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for each in (model, again):
        assert torch.equal(each.generate(**prompt), text)
        assert torch.equal(each(tokens).logits, logits)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert sparing.report(again, {"input_ids": tokens}).total.nonzero == sparing.report(model).total.nonzero


def lightning_module(lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def predict_step(self, batch, index):
            return self.model(batch[0])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Module()


def fit(lightning, module, folder, callback, stopped=None, accumulate=1, **options):
    saved = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    run = lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, callbacks=[saved, callback],
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        **{"max_epochs": 2, **options},
    )  # fmt: skip
    run.fit(module, DataLoader(batches(STEPS // 2 * accumulate), 8), ckpt_path=stopped and folder / stopped)
    return run


@each_method
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_resumes_exactly(name, accumulate, lightning, tmp_path):
    from sparing.integrations.lightning import SparsityCallback

    modules = []
    for stopped in (None, "epoch=0.ckpt"):
        module, callback = lightning_module(lightning), SparsityCallback(METHODS[name])
        run = fit(lightning, module, tmp_path, callback, stopped, accumulate)
        assert (callback.sparsifier.step, callback.sparsifier.steps) == (STEPS, STEPS)
        assert float(run.callback_metrics["sparsity"]) == pytest.approx(0.8, abs=0.01)
        modules.append(module)
    assert_same_run(*modules)


def test_lightning_that_stops_early_gets_no_more_zeros(lightning, tmp_path):
    from sparing.integrations.lightning import SparsityCallback

    callback = SparsityCallback(METHODS["gmp"], steps=2 * STEPS)
    fit(lightning, lightning_module(lightning), tmp_path, callback)
    assert callback.sparsifier.step == STEPS


def test_lightning_goes_on_with_a_densified_module(lightning, tmp_path):
    from sparing.integrations.lightning import SparsityCallback

    module, callback = lightning_module(lightning), SparsityCallback(METHODS["gmp"])
    run = fit(lightning, module, tmp_path, callback)
    assert len(run.predict(module, DataLoader(batches(), 8))) == STEPS
    with pytest.raises(InputError, match="the module is sparsified already, .* or an earlier fit"):
        fit(lightning, module, tmp_path, SparsityCallback(METHODS["gmp"]))
    sparing.densify_(module)
    zeros = module.model[0].weight == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsityWarning)
        fit(lightning, module, tmp_path, callback)
    assert (module.model[0].weight[zeros] == 0).all()


@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_an_average_of_lightning_that_is_made_before_the_module_is_sparsified_is_refused(kind, lightning):
    from sparing.integrations.lightning import SparsityCallback

    average = getattr(lightning.pytorch.callbacks, kind)(**({"swa_lrs": 0.1} if "Stochastic" in kind else {}))
    run = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[average, SparsityCallback(METHODS["gmp"])],
    )  # fmt: skip
    with pytest.raises(InputError, match=f"{kind} has copied the dense module: put SparsityCallback before it"):
        run.fit(lightning_module(lightning), DataLoader(batches(), 8))


def fit_after(lightning, folder, name, *finders):
    """Fit a module that has a loader of its own, after these callbacks."""
    from sparing.integrations.lightning import SparsityCallback

    module, callback = lightning_module(lightning), SparsityCallback(METHODS[name])
    module.lr, module.batch_size = 0.01, 8
    module.train_dataloader = lambda: DataLoader(batches(), module.batch_size)
    run = lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, callbacks=[callback, *finders], max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsityWarning)
        run.fit(module)
    assert callback.sparsifier.step == callback.sparsifier.steps == 2 * STEPS
    return module


@each_method
def test_the_trial_steps_of_a_learning_rate_finder_are_undone(name, lightning, tmp_path):
    finder = lightning.pytorch.callbacks.LearningRateFinder(num_training_steps=30, update_attr=False)
    assert_same_run(*(fit_after(lightning, tmp_path, name, *finders) for finders in ([], [finder])))


def test_a_batch_size_finder_that_changes_the_length_is_refused(lightning, tmp_path):
    finder = lightning.pytorch.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=2)
    with pytest.raises(
        InputError, match=r"run has .* optimizer steps, and had .* when the module was sparsified: find"
    ):
        fit_after(lightning, tmp_path, "gmp", finder)


def test_lightning_needs_a_length(lightning, tmp_path):
    from sparing.integrations.lightning import SparsityCallback

    with pytest.raises(InputError, match="the Trainer's run has no end"):
        fit(lightning, lightning_module(lightning), tmp_path, SparsityCallback(METHODS["gmp"]), max_epochs=-1)


@pytest.mark.usefixtures("timm")
def test_a_recipe_names_a_model_of_timm():
    model = build_model(ModelSection(name="timm/test_resnet", drop_rate=0.1), {"num_classes": 7, "in_channels": 1})
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert model.drop_rate == 0.1


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet50e", "timm has no model 'resnet50e'; did you mean 'resnet50"),
        ("timm/hf-hub:someone/model", "timm has no model"),
        ("timm/", "timm has no model ''"),
    ],
)
def test_an_unknown_model_of_timm_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        build_model(ModelSection(name=name), {"num_classes": 10, "in_channels": 3})


def test_timm_is_not_required(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        build_model(ModelSection(name="timm/resnet50"), {"num_classes": 10, "in_channels": 3})


def test_a_torchvision_that_does_not_fit_torch_is_named(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(InputError, match="nms does not exist; install a torchvision"):
        build_model(ModelSection(name="timm/resnet50"), {"num_classes": 10, "in_channels": 3})


def test_the_package_has_no_other_names():
    import sparing.integrations

    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = sparing.integrations.Missing
