"""An entailment model scores labels: its columns are found by name, and what it says is that of the plain model.

The models are tiny and random: what a trained one is worth is not measured here.
"""

import json

import numpy as np
import pytest
import torch
from tiny import LABELS, edit_json, make_rows

from nlpxfer.checkpoint.entailment import entailment_columns, hypotheses, load_entailment
from nlpxfer.errors import CheckpointError, ConfigError, DataNotFoundError, LabelError
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from nlpxfer.train.zero_shot import zero_shot_logits

NLI = ("contradiction", "neutral", "entailment")
TEXTS = [row["text"] for row in make_rows(12, seed=8)]
TEMPLATE = "This text is about {}."


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (NLI, (2, 0)),
        (["ENTAILMENT", "NEUTRAL", "CONTRADICTION"], (0, 2)),
        (["entailment", "not_entailment"], (0, 1)),
        (["non-entailment", "entailment"], (1, 0)),
        (["not entailed", "entailed"], (1, 0)),
        (["neutral", "entailment", "other"], (1, None)),
    ],
)
def test_columns_are_found_by_name(names, found):
    assert entailment_columns(names) == found


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["food", "music"], ["entails", "entailment"]])
def test_a_model_without_such_a_name_is_refused(names):
    with pytest.raises(CheckpointError, match="mean entailment; one is needed") as caught:
        entailment_columns(names)
    assert names[0] in str(caught.value)


def test_hypotheses(tmp_path):
    assert hypotheses("Is it {}?", ["lost_card", "fee"]) == ("Is it lost card?", "Is it fee?")
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"fee": "what it {costs}", "lost_card": "a card that is gone"}))
    assert hypotheses("{}!", ["lost_card", "fee"], str(file)) == ("a card that is gone!", "what it {costs}!")
    file.write_text(json.dumps({"fee": "x", "card": "y"}))
    with pytest.raises(LabelError, match=r"(?s)only in the file: card.*only in the data: lost_card"):
        hypotheses("{}", ["lost_card", "fee"], str(file))
    file.write_text("[1]")
    with pytest.raises(LabelError, match="is no object"):
        hypotheses("{}", ["fee"], str(file))
    with pytest.raises(DataNotFoundError, match=r"none\.json does not exist"):
        hypotheses("{}", ["fee"], str(tmp_path / "none.json"))


def by_hand(scorer, text, hypothesis):
    """Logits of one pair, one pair at a time."""
    tokens = scorer.checkpoint.tokenizer(text, hypothesis, return_tensors="pt")
    with torch.no_grad():
        return scorer.checkpoint.model(**tokens).logits[0].numpy()


@pytest.mark.parametrize(("kind", "names"), [(SINGLE_LABEL, NLI), (MULTI_LABEL, NLI[::-1])])
def test_logits_are_those_of_each_pair(kind, names, tiny_checkpoint, tmp_path):
    scorer = load_entailment(str(tiny_checkpoint("bert", "classifier", labels=names)), problem_type=kind)
    asked = hypotheses(TEMPLATE, LABELS)
    options = {"labels": LABELS, "hypotheses": asked, "problem_type": kind, "max_length": 48}
    found, facts = zero_shot_logits(scorer, TEXTS, folder=tmp_path / "a", **options)
    assert found.shape == (len(TEXTS), len(LABELS))
    assert facts["computed"] == len(set(TEXTS))
    for row in (0, 7):
        for column, hypothesis in enumerate(asked):
            logits = dict(zip(names, by_hand(scorer, TEXTS[row], hypothesis), strict=True))
            expected = logits["entailment"] - (logits["contradiction"] if kind == MULTI_LABEL else 0)
            assert found[row, column] == pytest.approx(expected, abs=1e-5)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    again, facts = zero_shot_logits(scorer, [TEXTS[i] for i in order], folder=tmp_path / "a", **options)
    assert facts["computed"] == 0
    np.testing.assert_array_equal(again, found[order])
    other = {**options, "hypotheses": hypotheses("It is {}.", LABELS)}
    elsewhere, facts = zero_shot_logits(scorer, TEXTS, folder=tmp_path / "a", **other)
    assert facts["computed"] == len(set(TEXTS))
    assert np.abs(elsewhere - found).max() > 1e-4
    assert len(list((tmp_path / "a").glob("*/manifest.json"))) == 2


def test_renamed_columns_are_another_teacher(tiny_copy, tmp_path):
    """Who mends the names in config.json gets other logits, though no weight has changed."""
    folder = tiny_copy("bert", "classifier", labels=NLI)
    found = []
    for names in (NLI, NLI[::-1]):
        edit_json(
            folder / "config.json", id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
        )
        scorer = load_entailment(str(folder), problem_type=SINGLE_LABEL)
        options = {"labels": LABELS, "hypotheses": hypotheses(TEMPLATE, LABELS), "problem_type": SINGLE_LABEL}
        found.append((scorer, options | {"max_length": 48}))
    first, _ = zero_shot_logits(found[0][0], TEXTS, folder=tmp_path / "a", **found[0][1])
    other, _ = zero_shot_logits(found[1][0], TEXTS, folder=tmp_path / "a", **found[1][1])
    assert np.abs(other - first).max() > 1e-4


def test_models_and_tasks_that_do_not_fit(tiny_checkpoint):
    two = str(tiny_checkpoint("bert", "classifier", labels=("other", "neutral", "entailment")))
    assert load_entailment(two, problem_type=SINGLE_LABEL).against is None
    with pytest.raises(CheckpointError, match="no label that means contradiction"):
        load_entailment(two, problem_type=MULTI_LABEL)
    with pytest.raises(CheckpointError, match=r"zero_shot_teacher: .*0 of the labels food"):
        load_entailment(str(tiny_checkpoint("bert", "classifier")), problem_type=SINGLE_LABEL)
    with pytest.raises(ConfigError, match="a regression has none"):
        load_entailment(two, problem_type=REGRESSION)
