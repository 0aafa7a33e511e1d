"""AdaLoRA's budget of ranks: scores, schedule and pruning against a slow reference, the penalty, checkpoints."""

import copy
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import SCHEMA, adapted, batch, logits_of
from torch.nn.functional import cross_entropy
from transformers import TrainerControl, TrainingArguments

from nlpxfer.checkpoint.adapters import load_adapter, merged, save_adapter
from nlpxfer.config import RunOptions
from nlpxfer.errors import ConfigError, ResumeError
from nlpxfer.methods.adapters import Adapters
from nlpxfer.train.rank_budget import PENALTY, RankBudget

STEPS = 20
STARTING, TARGET = 6, 4
LAYERS = 2 * 6


def ranks_of(model):
    """Triplets with e other than 0, of all layers."""
    return sum(int(p.count_nonzero()) for name, p in model.named_parameters() if ".lora_E." in name)


class Training:
    """Steps on fixed labels, as the Trainer makes them."""

    def __init__(self, folder):
        self.checkpoint, self.facts, self.model = adapted(folder, "adalora")
        self.inputs = batch(self.checkpoint.tokenizer)
        self.budget = RankBudget(self.model)
        state = types.SimpleNamespace(max_steps=STEPS)
        self.budget.on_train_begin(TrainingArguments("unused"), state, TrainerControl())
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-2)
        self.model.train()

    def step(self, number):
        self.optimizer.zero_grad()
        gold = torch.arange(len(self.inputs["input_ids"])) % len(SCHEMA)
        cross_entropy(self.model(**self.inputs).logits, gold).backward()
        self.budget.add_gradient_()
        self.optimizer.step()
        before = {name: p.detach().clone() for name, p in self.model.named_parameters() if "lora_" in name}
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if "lora_" in name}
        self.budget.on_optimizer_step(None, types.SimpleNamespace(global_step=number - 1), None)
        return before, gradients


class Reference:
    """Algorithm 1 of the paper, number by number."""

    def __init__(self):
        self.smooth, self.varying = {}, {}

    def kept(self, step, weights, gradients):
        """Which triplets stay after a step: (layer, rank) pairs."""
        for name, weight in weights.items():
            now = (weight * gradients[name]).abs().double()
            mean = self.smooth.get(name, torch.zeros_like(now)) * 0.85 + 0.15 * now
            unsure = self.varying.get(name, torch.zeros_like(now)) * 0.85 + 0.15 * (now - mean).abs()
            self.smooth[name], self.varying[name] = mean, unsure
        scores = {}
        for name in weights:
            if ".lora_E." not in name:
                continue
            sides = [self.smooth[n] * self.varying[n] for n in
                     (name, name.replace("lora_E", "lora_A"), name.replace("lora_E", "lora_B"))]  # fmt: skip
            for rank in range(STARTING):
                e, a, b = sides[0][rank, 0], sides[1][rank].mean(), sides[2][:, rank].mean()
                scores[name, rank] = float(e + a + b)
        first, last = 2, 14  # 10 % and 70 % of 20 steps
        if step <= first:
            return set(scores)
        share = (1 - (step - first) / (last - first)) ** 3
        count = int(LAYERS * (TARGET + (STARTING - TARGET) * share))
        return set(sorted(scores, key=scores.__getitem__)[len(scores) - count :])


@pytest.fixture
def training(tiny_checkpoint):
    return Training(tiny_checkpoint("bert", layers=2))


def test_triplets_are_scored_and_pruned_as_in_the_paper(training):
    reference, wanted = Reference(), None
    for step in range(1, STEPS + 1):
        before, gradients = training.step(step)
        wanted = reference.kept(step, before, gradients) if step <= 14 else wanted
        found = {
            (name, rank)
            for name, p in training.model.named_parameters()
            if ".lora_E." in name
            for rank in range(STARTING)
            if p[rank].any()
        }
        assert found == wanted, step
    assert ranks_of(training.model) == LAYERS * TARGET
    by_layer = {name: sum(kept.tolist()) for name, kept in training.budget.kept.items()}
    assert len(set(by_layer.values())) > 1, "not all layers need the same"


def test_the_penalty_draws_triplets_towards_orthogonal_ones(training):
    named = {n: p for n, p in training.model.named_parameters() if "lora_A" in n or "lora_B" in n}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    training.budget.add_gradient_()
    for name, parameter in named.items():
        vectors = (parameter if "lora_A" in name else parameter.T).detach().double()
        apart = vectors @ vectors.T - torch.eye(STARTING)
        slope = 2 * apart @ vectors / apart.norm() * PENALTY / len(named)
        expected = 1 + (slope if "lora_A" in name else slope.T)
        torch.testing.assert_close(parameter.grad.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_bundle_has_the_weights_as_they_are_and_merges(training, tmp_path, tiny_checkpoint):
    """At a step where the budget still falls, as that of the best epoch may be: nothing is cut by a later mask."""
    for step in range(1, 9):
        training.step(step)
    save_adapter(training.model, training.checkpoint.tokenizer, SCHEMA, tmp_path, base=training.facts)
    loaded = load_adapter(tmp_path, base=str(tiny_checkpoint("bert", layers=2)))
    expected = logits_of(training.model, training.inputs)
    torch.testing.assert_close(logits_of(loaded.model, training.inputs), expected, atol=1e-6, rtol=0)
    assert LAYERS * TARGET < ranks_of(loaded.model) == ranks_of(training.model) < LAYERS * STARTING
    torch.testing.assert_close(logits_of(merged(loaded), training.inputs), expected, atol=1e-5, rtol=0)


def test_scores_come_back_from_a_checkpoint(training, tmp_path, tiny_checkpoint):
    for step in range(1, 16):
        training.step(step)
    training.budget.save(tmp_path)
    again = Training(tiny_checkpoint("bert", layers=2))
    with torch.no_grad():
        for ours, theirs in zip(again.model.parameters(), training.model.parameters(), strict=True):
            ours.copy_(theirs)
    again.budget.load_(tmp_path)
    again.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    for step in range(16, STEPS + 1):
        for one in (training, again):
            torch.manual_seed(step)
            one.step(step)
    state = dict(again.model.named_parameters())
    assert all(torch.equal(p, state[name]) for name, p in training.model.named_parameters())


def test_a_checkpoint_of_other_weights_is_refused(training, tmp_path):
    with pytest.raises(ResumeError, match="holds no scores"):
        training.budget.load_(tmp_path)
    training.step(1)
    training.budget.save(tmp_path)
    tensors = load_file(tmp_path / "ranks.safetensors")
    save_file({name.replace("query", "other"): t for name, t in tensors.items()}, tmp_path / "ranks.safetensors")
    with pytest.raises(ResumeError, match="other weights"):
        training.budget.load_(tmp_path)


def test_scaled_gradients_are_refused():
    options = RunOptions(output_dir="unused")
    options.fp16 = True  # no CPU takes it
    with pytest.raises(ConfigError, match="fp16: adalora scores ranks"):
        Adapters(adapter="adalora").check(options)
