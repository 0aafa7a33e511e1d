"""Weights of different depths: which are trained, at which rate, from which step on, and what pulls them back."""

import copy

import numpy as np
import pytest
import torch
from gradients import gradient_of, step_rows, step_trainer
from tiny import LABELS, MAIN_FAMILIES
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, SchedulerType, TrainerCallback, get_scheduler

from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.checkpoint.pooling import use_mean_pooling
from nlpxfer.checkpoint.student import model_layers
from nlpxfer.config import RunOptions
from nlpxfer.config.options import SCHEDULES_BY_LOSS
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.evaluate.arms import Splits, train_arm
from nlpxfer.methods.finetune import FineTune
from nlpxfer.train.layerwise import StartPenalty, freeze_below_, parameter_depths, unfreeze_gradually_

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
FAMILIES = ["bert", "gpt2"]


def classifier(tiny_checkpoint, family):
    return AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint(family, kind="classifier"))


def options_for(folder, **changes):
    shared = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "per_device_train_batch_size": 8}
    still = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    return RunOptions(**{"output_dir": str(folder), **shared, **still, "linear_probe": False, **changes})


def trainer_of(model, family, options):
    return step_trainer(model, FineTune(), options, step_rows(family), family)


def trained(family, checkpoint, folder, **changes):
    rows = step_rows(family)
    return train_arm(
        "layerwise",
        build=lambda: load_classifier(str(checkpoint), schema=SCHEMA),
        method=FineTune(),
        split=lambda tokenizer: Splits(rows, rows, rows),
        schema=SCHEMA,
        options=options_for(folder, **changes),
        seed=7,
        facts={},
    ).model


def changed(before, after):
    pairs = zip(before.named_parameters(), after.named_parameters(), strict=True)
    return {name for (name, old), (_, new) in pairs if not torch.equal(old, new)}


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_depths(tiny_checkpoint, family):
    model = classifier(tiny_checkpoint, family)
    prefix, blocks = model_layers(model)
    depths = parameter_depths(model)
    top = len(blocks) + 1
    assert depths.keys() == dict(model.named_parameters()).keys()
    for index, block in enumerate(blocks):
        inside = {f"{prefix}.{index}.{name}" for name, _ in block.named_parameters()}
        assert {name for name, depth in depths.items() if depth == index + 1} == inside
    parts = head_of(model)
    heads = {id(p) for layer in (parts.final, *parts.transforms.values()) for p in layer.parameters()}
    tables = {
        id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()
    }
    for name, parameter in model.named_parameters():
        assert id(parameter) not in heads or depths[name] == top
        assert id(parameter) not in tables or depths[name] == 0
    for name in ("distilbert.embeddings.LayerNorm.weight", "transformer.ln_f.weight", "model.norm.weight"):
        assert depths.get(name) in (None, 0 if "embeddings" in name else top)


def test_one_shared_block_has_no_depth(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="shares one block"):
        parameter_depths(classifier(tiny_checkpoint, "albert"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 1])
def test_only_the_top_is_trained(family, count, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(family)
    before = load_classifier(str(checkpoint), schema=SCHEMA, seed=42).model
    after = trained(family, checkpoint, tmp_path, num_trained_layers=count, max_steps=3, learning_rate=1e-2)
    depths = parameter_depths(before)
    total = max(depths.values()) - 1
    moved = changed(before, after)
    assert {depths[name] for name in moved} == set(range(total - count + 1, total + 2))
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_more_layers_than_there_are(tiny_checkpoint):
    model = classifier(tiny_checkpoint, "bert")
    total = model.config.num_hidden_layers
    with pytest.raises(ConfigError, match=f"is more than the {total} layers") as raised:
        freeze_below_(model, total + 1)
    assert f"--num_trained_layers {total}" in str(raised.value)
    freeze_below_(model, total)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, depth in parameter_depths(model).items() if depth == 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rate_falls_from_layer_to_layer(family, tiny_checkpoint, tmp_path):
    model = classifier(tiny_checkpoint, family)
    options = options_for(tmp_path, layer_decay=0.5, learning_rate=1e-2, weight_decay=0.1)
    plain = trainer_of(copy.deepcopy(model), family, options_for(tmp_path, weight_decay=0.1)).create_optimizer()
    trainer = trainer_of(model, family, options)
    optimizer = trainer.create_optimizer()
    depths = parameter_depths(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    top = max(depths.values())
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr"] == pytest.approx(1e-2 * 0.5 ** (top - depths[name]))
            assert group["weight_decay"] == (0.0 if parameter.dim() == 1 else 0.1), name
    assert sorted(seen) == sorted(names.values())
    assert sum(len(group["params"]) for group in plain.param_groups) == len(seen)
    assert len(plain.param_groups) == 2


class Moved(TrainerCallback):
    """Depths whose weights have moved, after each step."""

    def __init__(self, model):
        self.before = copy.deepcopy(model)
        self.depths = parameter_depths(model)
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({self.depths[name] for name in changed(self.before, model)})


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_join_from_the_top(family, tiny_checkpoint, tmp_path):
    model = classifier(tiny_checkpoint, family)
    top = model.config.num_hidden_layers + 1
    steps = 4 * top
    options = options_for(tmp_path, gradual_unfreezing=0.5, max_steps=steps, warmup_steps=0, learning_rate=1e-2)
    trainer = trainer_of(model, family, options)
    watch = Moved(model)
    trainer.add_callback(watch)
    trainer.fit()
    for step, depths in enumerate(watch.seen):
        turns = min(top, step // 2)  # a layer every two steps: half of the steps for all
        assert depths == set(range(top - turns, top + 1)), step
    assert watch.seen[-1] == set(range(top + 1))


def test_unfreezing_needs_rates_that_are_functions_of_the_step(tmp_path):
    with pytest.raises(ConfigError, match="gradual_unfreezing: does not work with lr_scheduler_type reduce_lr_on_pl"):
        options_for(tmp_path, gradual_unfreezing=0.5, lr_scheduler_type="reduce_lr_on_plateau")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    needed = {"warmup_stable_decay": {"num_decay_steps": 2}} | dict.fromkeys(
        ("cosine_with_min_lr", "cosine_warmup_with_min_lr"), {"min_lr": 0.01}
    )
    for kind in SchedulerType:
        settings = needed.get(kind.value)
        made = get_scheduler(
            kind, optimizer, num_warmup_steps=1, num_training_steps=9, scheduler_specific_kwargs=settings
        )
        assert isinstance(made, LambdaLR) == (kind.value not in SCHEDULES_BY_LOSS)
        if kind.value in SCHEDULES_BY_LOSS:
            with pytest.raises(ConfigError, match=f"does not work with the scheduler {type(made).__name__}"):
                unfreeze_gradually_(made, top=1, steps=1.0)


@pytest.mark.parametrize("schedule", SCHEDULES_BY_LOSS)
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("rate", [0.1, 3e-4])
def test_a_rate_that_follows_the_scores_falls_where_they_get_worse(schedule, metric, rate, tiny_checkpoint, tmp_path):
    plan = {"lr_scheduler_type": schedule, "metric_for_best_model": metric, "eval_strategy": "epoch"}
    ends = {}
    for step in (-0.01, 0.01):
        options = options_for(tmp_path, learning_rate=rate, **plan)
        trainer = trainer_of(classifier(tiny_checkpoint, "bert"), "bert", options)
        optimizer = trainer.create_optimizer()
        scheduler = trainer.create_scheduler(100, optimizer)
        for number in range(40):
            scheduler.step(0.5 + step * number)
        ends[step] = optimizer.param_groups[0]["lr"]
    better, worse = (0.01, -0.01) if metric == "accuracy" else (-0.01, 0.01)
    assert ends[worse] < rate <= ends[better]


@pytest.mark.parametrize("schedule", SCHEDULES_BY_LOSS)
def test_which_way_a_rate_follows_the_scores_can_be_given(schedule, tiny_checkpoint, tmp_path):
    plan = {"lr_scheduler_type": schedule, "metric_for_best_model": "accuracy", "eval_strategy": "epoch"}
    own = {"mode": "min", "patience": 3}
    options = options_for(tmp_path, lr_scheduler_kwargs=own, **plan)
    trainer = trainer_of(classifier(tiny_checkpoint, "bert"), "bert", options)
    scheduler = trainer.create_scheduler(100, trainer.create_optimizer())
    assert (scheduler.mode, scheduler.patience) == ("min", 3)
    assert own == {"mode": "min", "patience": 3}


@pytest.mark.parametrize(("steps", "warmup", "told"), [(1, 0.1, True), (10, 12, True), (2, 0.1, False), (1, 0, False)])
def test_a_rate_that_only_rises_is_told(steps, warmup, told, tiny_checkpoint, tmp_path, caplog):
    options = options_for(tmp_path, warmup_steps=warmup, learning_rate=0.5)
    trainer = trainer_of(classifier(tiny_checkpoint, "bert"), "bert", options)
    trainer.create_optimizer()
    trainer.create_scheduler(steps)
    assert (f"rises in all {steps} steps and never reaches 0.5" in caplog.text) == told


def test_penalty_is_that_of_the_formula(tiny_checkpoint):
    model = classifier(tiny_checkpoint, "bert")
    start = copy.deepcopy(model)
    penalty = StartPenalty(model, weight=0.3, head_weight=0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    heads = ("bert.pooler.dense", "classifier")
    loss = torch.zeros(())
    for (name, now), (_, then) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        is_head = name.startswith(heads)
        loss = loss + (0.35 * now.square().sum() if is_head else 0.15 * (now - then).square().sum())
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    penalty.add_gradient_(model)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + 1, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("batch", "micro_batches"), [(8, 1), (2, 4)])
def test_penalty_counts_once_a_step(batch, micro_batches, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("bert", kind="classifier")
    plain, _ = gradient_of(folder, tmp_path, "finetune", step_rows(), batch, micro_batches)
    found, _ = gradient_of(folder, tmp_path, "finetune", step_rows(), batch, micro_batches, l2_sp_head_weight=2.0)
    weight = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    torch.testing.assert_close(found["classifier.weight"] - plain["classifier.weight"], 2 * weight.detach())


def test_a_strong_penalty_keeps_the_model_near_its_start(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("bert")
    before = load_classifier(str(checkpoint), schema=SCHEMA, seed=42).model
    ways = []
    for weight in (0.0, 10.0):
        after = trained(
            "bert", checkpoint, tmp_path / str(weight), l2_sp_weight=weight, max_steps=20, learning_rate=1e-3
        )
        pairs = zip(before.bert.encoder.parameters(), after.bert.encoder.parameters(), strict=True)
        ways.append(np.sqrt(sum(float((new - old).detach().square().sum()) for old, new in pairs)))
    assert ways[1] < 0.5 * ways[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trained_layers": -1}, "num_trained_layers: -1 is negative"),
        ({"layer_decay": 0.0}, "layer_decay: 0.0 is not above 0 and up to 1"),
        ({"layer_decay": 1.5}, "layer_decay: 1.5 is not above 0 and up to 1"),
        ({"gradual_unfreezing": 2.0}, "gradual_unfreezing: 2.0 is not between 0 and 1"),
        ({"num_trained_layers": 0, "layer_decay": 0.9}, "layer_decay: does nothing beside num_trained_layers 0"),
        ({"num_trained_layers": 0, "gradual_unfreezing": 0.5}, "gradual_unfreezing: does nothing beside num_trained"),
        ({"gradual_unfreezing": 0.5, "lr_scheduler_type": "greedy"}, "does not work with lr_scheduler_type greedy"),
        ({"l2_sp_weight": -1.0}, "l2_sp_weight: -1.0 is not a finite number of at least 0"),
        ({"l2_sp_head_weight": float("inf")}, "l2_sp_head_weight: inf is not a finite number"),
    ],
)
def test_bad_values(changes, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        options_for(tmp_path, **changes)
    assert message in str(raised.value)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_layer_that_computes_the_mean_is_none_of_the_trained_layers(tiny_checkpoint, count):
    """It comes after the blocks, as a pooler does; where only the head learns it stays the mean."""
    model = use_mean_pooling(classifier(tiny_checkpoint, "bert"))
    prefix, blocks = model_layers(model)
    total = len(blocks) - 1
    depths = parameter_depths(model)
    assert {depths[name] for name in depths if name.startswith(f"{prefix}.{total}.")} == {total + 1}
    assert {depths[name] for name in depths if name.startswith(f"{prefix}.{total - 1}.")} == {total}
    freeze_below_(model, count)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {index for index in range(total + 1) if any(name.startswith(f"{prefix}.{index}.") for name in trained)}
    assert inside == (set(range(total - count, total + 1)) if count else set())
    assert {"classifier.weight", "classifier.bias"} <= trained
    with pytest.raises(ConfigError, match=f"more than the {total} layers"):
        freeze_below_(model, total + 1)
