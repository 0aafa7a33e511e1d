"""States of teacher and student: where they are read in each family, what is compared, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import LABELS, make_rows
from transformers import AutoModelForSequenceClassification

from nlpxfer.checkpoint import load_classifier
from nlpxfer.checkpoint.attention import attention_places
from nlpxfer.checkpoint.load import layer_student
from nlpxfer.checkpoint.pooling import use_mean_pooling
from nlpxfer.config.states import StatesPlan
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.states import (
    STUDENT_STATES,
    StatesGuide,
    StudentStates,
    require_comparable,
    states_of,
    student_outputs,
)
from nlpxfer.train.layerwise import StartPenalty

SCHEMA = LabelSchema(LABELS)
KNOWN = [
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen2",
]
ALL = StatesPlan(hidden_weight=1.0, relation_weight=1.0, similarity_weight=1.0)


def batch_of(tokenizer, count=4):
    rows = tokenise(tokenizer, [row["text"] for row in make_rows(count)], max_length=32, labels=[0] * count)
    rows = rows.with_columns(
        teacher_logits=torch.zeros(count, 4).numpy(), teacher_states=torch.randn(count, 32).numpy()
    )
    return Collator.for_tokenizer(tokenizer)([rows[i] for i in range(count)])


def taught(tiny_checkpoint, family, plan=ALL, keep=(0, 2, 3), student=None):
    """A method, its student (a slice of the teacher, if no other is given), its teacher, and a batch."""
    teacher = load_classifier(str(tiny_checkpoint(family, "classifier")), schema=SCHEMA)
    student = student or layer_student(teacher, keep)
    guide = StatesGuide(plan=plan, teacher=teacher.model.requires_grad_(False), others_KH=torch.randn(9, 32))
    method = Distill(states=guide)
    method.adapt(student.model, ())
    return method, student.model, teacher.model, batch_of(teacher.tokenizer)


def weight_of(module):
    """(outputs, inputs), whichever way round it is stored."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def expected_split(model, family, block, states):
    """Queries, keys and values from slices of the weights."""
    fused = {"gpt2": "attn.c_attn", "modernbert": "attn.Wqkv", "gpt_neox": "attention.query_key_value"}[family]
    layer = block.get_submodule(fused)
    weight, bias = weight_of(layer), layer.bias
    rows = torch.arange(96)
    if family == "gpt_neox":  # 4 heads, each 8 queries, 8 keys, 8 values
        parts = [torch.cat([rows[h * 24 + 8 * i : h * 24 + 8 * i + 8] for h in range(4)]) for i in range(3)]
    else:
        parts = [rows[:32], rows[32:64], rows[64:]]
    return [states @ weight[part].T + (0 if bias is None else bias[part]) for part in parts]


@pytest.mark.parametrize("family", KNOWN)
def test_all_states_are_read_under_the_default_attention(family, tiny_checkpoint):
    """Also the gradient flows from each term, and equal layers give equal states."""
    method, student, teacher, batch = taught(tiny_checkpoint, family, keep=(0, 1, 2, 3))
    assert "eager" not in (student.config._attn_implementation or "") or family == "deberta-v2"
    states = states_of(student)
    assert states.pairs == [(i, i) for i in range(4)]
    student.eval()
    terms = method.loss_terms(student, batch)
    assert set(terms) == set(method.counts(batch)) == {"label", "soft_target", "hidden", "relation", "similarity"}
    assert float(terms["hidden"].rows_B.detach().max()) < 1e-10
    assert float(terms["relation"].rows_B.detach().abs().max()) < 1e-6
    assert bool((terms["similarity"].rows_B > 0).all())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    learning = list(student.parameters())
    for name, term in method.loss_terms(student, batch).items():
        gradients = torch.autograd.grad(term.rows_B.sum(), learning, retain_graph=True, allow_unused=True)
        assert sum(float(g.norm()) for g in gradients if g is not None) > 0, name
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "gpt_neox"])
def test_states_are_those_of_the_modules(family, tiny_checkpoint):
    method, student, _, batch = taught(tiny_checkpoint, family)
    with torch.no_grad():
        logits, given = student_outputs(student.eval(), batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        plain = student(**inputs, output_hidden_states=True)
    torch.testing.assert_close(logits, plain.logits)
    assert [tuple(state.shape) for state in given[:3]] == [(*batch["input_ids"].shape, 32)] * 3
    torch.testing.assert_close(given[0], plain.hidden_states[1])
    torch.testing.assert_close(given[1], plain.hidden_states[2])
    places = attention_places(student, 2)
    block = student.get_submodule(places.names[0].rpartition(".2.")[0] + ".2")
    name = {"bert": "attention.self.query", "gpt2": "attn.c_attn", "modernbert": "attn.Wqkv"}
    reads = block.get_submodule(name.get(family, "attention.query_key_value"))
    captured = []
    handle = reads.register_forward_pre_hook(lambda _, arguments: captured.append(arguments[0]))
    with torch.no_grad():
        student(**inputs)
        handle.remove()
        if family == "bert":
            attention = block.attention.self
            expected = [layer(captured[0]) for layer in (attention.query, attention.key, attention.value)]
        else:
            expected = expected_split(student, family, block, captured[0])
    for found, one in zip(given[3:6], expected, strict=True):
        torch.testing.assert_close(found, one)


def test_grouped_keys_and_values_are_split_into_heads_that_fit(tiny_checkpoint):
    """Queries of 32 numbers, keys and values of 16: 2 heads of 8."""
    _, student, _, _ = taught(tiny_checkpoint, "llama")
    states = states_of(student)
    assert states.queries_keys_values[0].widths == (32, 16, 16)
    assert states.relation_heads == 16
    with pytest.raises(ConfigError, match="32 does not divide the widths") as caught:
        taught(tiny_checkpoint, "llama", replace(ALL, num_relation_heads=32))
    assert "Available: 1, 2, 4, 8, 16" in str(caught.value)


def test_padding_does_not_count(tiny_checkpoint):
    method, student, _, batch = taught(tiny_checkpoint, "bert")
    student.eval()
    wide = dict(batch)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        wide[name] = torch.cat([batch[name], torch.zeros_like(batch[name])], dim=1)
    short, padded = method.loss_terms(student, batch), method.loss_terms(student, wide)
    for name, term in short.items():
        torch.testing.assert_close(term.rows_B, padded[name].rows_B, rtol=1e-4, atol=1e-6)
    alone = {name: value[2:3] for name, value in batch.items()}
    length = int(alone["attention_mask"].sum())
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        alone[name] = alone[name][:, :length]
    for name, term in method.loss_terms(student, alone).items():
        torch.testing.assert_close(term.rows_B, short[name].rows_B[2:3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_hook_that_does_not_fire_is_an_error(whose, tiny_checkpoint, monkeypatch):
    method, student, teacher, batch = taught(tiny_checkpoint, "bert", StatesPlan(relation_weight=1.0))
    model, layer = (student, 2) if whose == "student" else (teacher, 3)
    attention = model.bert.encoder.layer[layer].attention
    monkeypatch.setattr(attention, "forward", lambda states, *rest, **named: (states, None))
    with pytest.raises(CheckpointError, match=f"these modules did not run.*layer.{layer}.attention.self.query"):
        method.loss_terms(student, batch)
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))


def test_states_without_padding_are_refused(tiny_checkpoint):
    """As some attention kernels have them: (tokens of all rows, width)."""
    method, student, teacher, batch = taught(tiny_checkpoint, "bert", StatesPlan(relation_weight=1.0))
    query = teacher.bert.encoder.layer[3].attention.self.query
    query.register_forward_hook(lambda module, arguments, output: output.flatten(0, 1))
    with pytest.raises(CheckpointError, match=r"layer.3.attention.self.query are not \(rows, tokens, width\)"):
        method.loss_terms(student, batch)


# -- which layers


def test_layers_that_are_compared(tiny_checkpoint):
    teacher = load_classifier(str(tiny_checkpoint("bert", "classifier")), schema=SCHEMA)

    def pairs(student, text="auto"):
        return StudentStates(StatesPlan(hidden_weight=1.0, hidden_layers=text), student, teacher.model).pairs

    assert pairs(layer_student(teacher, (0, 1, 3)).model) == [(0, 0), (1, 1), (2, 3)]  # where they were cut from
    assert pairs(layer_student(teacher, (0, 1)).model) == [(0, 0), (1, 3)]  # the last with the last
    assert pairs(layer_student(teacher, (1,)).model) == [(0, 3)]
    other = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint("bert", "classifier", seed=3, layers=3))
    assert pairs(other) == [(0, 0), (1, 1), (2, 3)]  # evenly, halves round down
    longer = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint("bert", "classifier", layers=6))
    assert pairs(longer)[-1] == (5, 3)
    assert len(pairs(longer)) == 4
    assert pairs(other, "2:0,0:3") == [(2, 0), (0, 3)]
    with pytest.raises(ConfigError, match="hidden_layers: 3:0, 0:4 names layers that do not exist") as caught:
        pairs(other, "3:0,0:4,1:1")
    assert "student 0 to 2, teacher 0 to 3" in str(caught.value)
    pooled = use_mean_pooling(layer_student(teacher, (0, 3)).model)
    assert pairs(pooled) == [(0, 0), (1, 3)]  # the layer that computes a mean is none
    relations = StudentStates(StatesPlan(relation_weight=1.0), pooled, use_mean_pooling(teacher.model))
    assert [side.names[0] for side in relations.queries_keys_values] == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in (1, 3)
    ]
    with pytest.raises(ConfigError, match="relation_layer: the teacher has no layer 4"):
        StudentStates(StatesPlan(relation_weight=1.0, relation_layer=4), pooled, teacher.model)


def test_projections_between_unlike_widths(tiny_checkpoint):
    narrow = load_classifier(str(tiny_checkpoint("bert", hidden_size=16)), schema=SCHEMA)
    method, student, _, batch = taught(tiny_checkpoint, "bert", student=narrow)
    weight = states_of(student).hidden["0"].weight
    assert weight.shape == (32, 16)
    torch.testing.assert_close(weight.T @ weight, torch.eye(16), rtol=0, atol=1e-5)
    assert all(bool(term.rows_B.isfinite().all()) for term in method.loss_terms(student, batch).values())
    _, slice_, _, _ = taught(tiny_checkpoint, "bert")
    assert torch.equal(states_of(slice_).hidden["0"].weight, torch.eye(32))


def test_the_student_is_plain_again_afterwards(tiny_checkpoint):
    method, student, teacher, _ = taught(tiny_checkpoint, "bert")
    names = set(student.state_dict())
    assert sum(name.startswith(f"{STUDENT_STATES}.") for name in names) == 4  # three layers, and the sentence state
    teachers = {id(parameter) for parameter in teacher.parameters()}
    assert not teachers & {id(parameter) for parameter in student.parameters()}
    copy.deepcopy(student)
    method.release_(student)
    assert not any(name.startswith(STUDENT_STATES) for name in student.state_dict())
    assert states_of(student) is None
    method.release_(student)


def test_projections_have_no_way_from_the_start(tiny_checkpoint):
    """L2-SP draws weights to where they were pretrained; these were not."""
    _, student, _, _ = taught(tiny_checkpoint, "bert")
    penalty = StartPenalty(student, weight=1.0, head_weight=1.0)
    assert any(name.startswith("bert.") for name in penalty.start)
    assert not any(name.startswith(STUDENT_STATES) for name in {*penalty.start, *penalty.heads})


# -- refusals


def test_families_that_cannot_be_read_are_refused(tiny_checkpoint):
    albert = load_classifier(str(tiny_checkpoint("albert", "classifier")), schema=SCHEMA)
    with pytest.raises(CheckpointError, match="ALBERT shares one block"):
        StudentStates(StatesPlan(relation_weight=1.0), albert.model, albert.model)
    bert = load_classifier(str(tiny_checkpoint("bert", "classifier")), schema=SCHEMA).model
    bert.bert.encoder.layer[3].attention.self.query = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="attention.self.query is a Identity, not a linear layer"):
        attention_places(bert, 3)
    del bert.bert.encoder.layer[3].attention.self.query
    with pytest.raises(CheckpointError, match="not known which layers compute its queries") as caught:
        attention_places(bert, 3)
    assert "attn.c_attn (gpt2)" in str(caught.value)


def test_unlike_tokens_are_refused_and_unlike_inputs_are_not(tiny_checkpoint):
    bert, gpt2, roberta, distilbert = (
        load_classifier(str(tiny_checkpoint(family, "classifier")), schema=SCHEMA)
        for family in ("bert", "gpt2", "roberta", "distilbert")
    )
    for student, teacher in ((bert, gpt2), (gpt2, bert), (bert, roberta)):
        for plan in (StatesPlan(hidden_weight=1.0), StatesPlan(relation_weight=1.0)):
            with pytest.raises(ConfigError, match="have different tokenizers"):
                require_comparable(plan, student, teacher)
        require_comparable(StatesPlan(similarity_weight=1.0), student, teacher)
    plain = replace(distilbert, tokenizer=copy.deepcopy(bert.tokenizer))
    plain.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    require_comparable(StatesPlan(hidden_weight=1.0), plain, bert)
    with pytest.raises(ConfigError, match="has no segment ids, by which"):
        require_comparable(StatesPlan(hidden_weight=1.0), plain, bert, pairs=True)
    require_comparable(StatesPlan(hidden_weight=1.0), bert, plain, pairs=True)
    require_comparable(StatesPlan(similarity_weight=1.0), plain, bert, pairs=True)
    before = torch.get_rng_state()
    require_comparable(ALL, bert, bert)
    assert torch.equal(before, torch.get_rng_state())


def test_a_teacher_gets_the_inputs_that_it_knows(tiny_checkpoint):
    """DistilBERT reads no segment ids, which the batch of a BERT holds."""
    bert = load_classifier(str(tiny_checkpoint("bert", "classifier")), schema=SCHEMA)
    method, student, _, _ = taught(tiny_checkpoint, "distilbert", student=bert)
    batch = batch_of(bert.tokenizer)
    assert "token_type_ids" in batch
    assert all(bool(term.rows_B.isfinite().all()) for term in method.loss_terms(student, batch).values())


def test_a_student_that_was_not_prepared_is_refused(tiny_checkpoint):
    method, student, _, batch = taught(tiny_checkpoint, "bert")
    method.release_(student)
    with pytest.raises(ConfigError, match="was not prepared"):
        method.loss_terms(student, batch)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"hidden_weight": -1.0}, "hidden_weight: -1.0 is not a finite number of at least 0"),
        ({"relation_weight": float("inf")}, "relation_weight: inf is not a finite"),
        ({"hidden_layers": "0:1"}, "hidden_layers: does nothing without hidden_weight"),
        ({"hidden_weight": 1.0, "hidden_layers": "0-1"}, "'0-1' is neither auto nor pairs"),
        ({"hidden_weight": 1.0, "hidden_layers": "0:1,0:2"}, "names a layer of the student twice"),
        ({"relation_layer": 1}, "relation_layer: does nothing without relation_weight"),
        ({"relation_weight": 1.0, "relation_layer": -1}, "relation_layer: -1 is negative"),
        ({"relation_weight": 1.0, "num_relation_heads": 0}, "num_relation_heads: 0 is below 1"),
        ({"similarity_weight": 1.0, "similarity_temperature": 0.0}, "similarity_temperature: 0.0 is not above 0"),
        ({"similarity_loss": "relational"}, "similarity_loss: does nothing without similarity_weight"),
        ({"similarity_weight": 1.0, "similarity_loss": "x"}, "similarity_loss: 'x' is not one of"),
    ],
)
def test_plans_that_are_refused(values, fault):
    with pytest.raises(ConfigError) as caught:
        StatesPlan(**values)
    assert fault in str(caught.value)
