"""How a model computes while it trains: dropout, attention kernel, precision of the head."""

import pytest
import torch
from gradients import step_rows, step_tokenizer
from transformers import AutoModelForSequenceClassification

from nlpxfer.checkpoint.head import head_of, make_transparent_, pooled_moments
from nlpxfer.data.tokenise import Collator
from nlpxfer.methods.base import model_inputs
from nlpxfer.train.regime import float32_head, set_dropout_, training_attention

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "gpt2", "qwen2"]
CPU = torch.device("cpu")


@pytest.fixture
def model(request, tiny_checkpoint):
    return AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint(request.param, kind="classifier")).eval()


def batch_of(family):
    rows = step_rows(family)
    return model_inputs(Collator.for_tokenizer(step_tokenizer(family))([rows[i] for i in range(4)]))


@pytest.mark.parametrize(("model", "family"), [(family, family) for family in FAMILIES], indirect=["model"])
def test_the_head_computes_in_float32_and_the_body_does_not(model, family):
    seen = {}
    parts = head_of(model)
    body = next(m for m in model.base_model.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    watched = {"final": parts.final, "body": body, **parts.transforms}
    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.dtype))
        for name, module in watched.items()
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with float32_head(model):
            assert model(**batch_of(family)).logits.dtype == torch.float32
        assert seen.pop("body") == torch.bfloat16
        assert set(seen.values()) == {torch.float32}
        with float32_head(model, enabled=False):
            model(**batch_of(family))
        assert seen["final"] == torch.bfloat16
    for hook in hooks:
        hook.remove()
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_a_head_that_magnifies_needs_it(model):
    """A state that hardly varies, standardised: bfloat16 leaves rounding, float32 the state."""
    dense = head_of(model).transforms["bert.pooler.dense"]
    states = 1 + 0.0006 * torch.randn(64, dense.in_features, generator=torch.manual_seed(0))
    make_transparent_(model, pooled_moments(model, [batch_of("bert")]))
    with torch.no_grad():
        dense.weight.copy_(torch.eye(dense.in_features) / 0.0006)
        dense.bias.fill_(-1 / 0.0006)
        exact = dense(states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = dense(states).float()
            with float32_head(model):
                kept = dense(states)
    assert torch.allclose(kept, exact, atol=1e-3)
    assert (rounded - exact).abs().mean() > 0.5, "what float32_head is there for"


@pytest.mark.parametrize("model", ["bert"], indirect=True)
@pytest.mark.parametrize(("bf16", "kernel"), [(True, "eager"), (False, "sdpa")])
def test_attention_changes_only_while_training_in_bfloat16(model, bf16, kernel):
    with training_attention(model, bf16=bf16, device=CPU):
        assert model.config._attn_implementation == kernel
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model", ["bert", "gpt2", "qwen2"], indirect=True)
def test_no_dropout_is_left(model):
    set_dropout_(model, 0.5)
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert all(module.p == 0.5 for module in dropouts)
    set_dropout_(model, 0.0)
    assert all(module.p == 0 for module in dropouts)
    batch = batch_of(model.config.model_type)
    first, second = model.train()(**batch).logits, model.train()(**batch).logits
    assert torch.equal(first, second)
