"""Trials without training: which values they get, when they are stopped, and what a continued search remembers."""

import dataclasses
import json

import pytest

from nlpxfer.config import Range
from nlpxfer.errors import ResumeError, SearchError
from nlpxfer.train.checkpoints import RunIdentity
from nlpxfer.train.search import Search
from nlpxfer.train.study import STUDY_FILE, Outcome, SearchPlan, Study

RANGES = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "num_train_epochs": Range(choices=(1.0, 2.0, 4.0)),
    "num_trained_layers": Range(1, 12),
    "dropout": Range(choices=(None, 0.1)),
}
START = {"learning_rate": 1e-4, "num_train_epochs": 2.0, "num_trained_layers": None, "dropout": 0.0}
PLAN = SearchPlan(
    ranges=RANGES, start=START, num_trials=12, metric="accuracy", greater_is_better=True, seed=42, timeout=None
)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda number: None)


def complete(value, *curve, seconds=1.0):
    return Outcome(state="complete", value=value, seconds=seconds, steps=8, curve=curve or ((1.0, value),))


def failed(reason):
    return Outcome(state="failed", value=None, seconds=1.0, steps=None, reason=reason)


def score(values):
    """A made-up validation score: a rate near 1e-3 and more epochs help."""
    return 1 - abs(values["learning_rate"] - 1e-3) * 50 + values["num_train_epochs"] / 100


def searched(study, trials=None):
    """Ask and tell until the study has enough, or so many times."""
    values = []
    while study.wants_more() and (trials is None or len(values) < trials):
        _, asked = study.ask()
        study.tell(complete(score(asked)))
        values.append(asked)
    return values


def test_the_seed_decides_about_the_trials(tmp_path):
    one, same, other = (
        searched(Study(dataclasses.replace(PLAN, seed=seed), tmp_path / name))
        for name, seed in (("one", 42), ("same", 42), ("other", 43))
        if not (tmp_path / name).mkdir()
    )
    assert len(one) == 12
    assert one == same
    assert one[1:] != other[1:]
    assert all(value in RANGES[name] for trial in one for name, value in trial.items())
    assert {type(trial["num_trained_layers"]) for trial in one} == {int}
    assert len({trial["learning_rate"] for trial in one}) == 12


def test_the_first_trial_has_the_recipes_own_values_where_they_lie_in_the_ranges(tmp_path):
    number, values = Study(PLAN, tmp_path).ask()
    assert number == 1
    assert (values["learning_rate"], values["num_train_epochs"]) == (1e-4, 2.0)
    assert values["num_trained_layers"] in range(1, 13)  # its default is not in the range
    assert values["dropout"] in (None, 0.1)


@pytest.mark.parametrize("told", [0, 1, 5, 12])
def test_a_continued_search_makes_the_trials_of_an_uninterrupted_one(told, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = Study(PLAN, whole)
    values = searched(expected)
    study = Study(PLAN, broken)
    before = searched(study, told)
    if study.wants_more():
        study.ask()  # and is killed while it trains
    again = Study(PLAN, broken)
    assert before + searched(again) == values
    assert again.result() == expected.result()


# -- stopping early


def judged(tmp_path, curve, *, better):
    """Whether a third trial is stopped: A was scored at a tenth and all quarters of its steps, B at halves."""
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    sign = 1 if better else -1
    study = Study(dataclasses.replace(PLAN, greater_is_better=better, num_trials=8), folder)
    for before in (((0.1, 0.4), (0.25, 0.5), (0.5, 0.6), (0.75, 0.7), (1.0, 0.8)), ((0.5, 0.9), (1.0, 0.7))):
        study.ask()
        study.tell(complete(sign * before[-1][1], *((share, sign * value) for share, value in before)))
    study.ask()
    return [study.should_stop([(s, sign * v) for s, v in curve[: i + 1]]) for i in range(len(curve))][-1]


@pytest.mark.parametrize("better", [True, False], ids=["accuracy", "loss"])
def test_scores_are_compared_at_equal_shares_of_the_steps(better, tmp_path):
    def stopped(*curve):
        return judged(tmp_path, curve, better=better)

    assert stopped((0.25, 0.49))  # at a quarter only A has a score, 0.5
    assert not stopped((0.25, 0.51))
    assert stopped((0.5, 0.74))  # at a half the median of 0.6 and 0.9
    assert not stopped((0.5, 0.76))
    assert stopped((0.65, 0.74))  # a score counts until the next evaluation
    assert stopped((0.75, 0.79))  # 0.7, and B's best so far, 0.9
    assert not stopped((0.75, 0.81))
    assert not stopped((0.3, 0.95), (0.5, 0.1))  # its own best so far counts too
    assert not stopped((0.15, 0.0))  # too early for any
    assert not stopped((0.4, 0.5)), "no worse than the only one"


def test_a_short_trial_that_ended_early_keeps_its_score_to_the_end(tmp_path):
    study = Study(dataclasses.replace(PLAN, num_trials=8), tmp_path)
    for _ in range(2):
        study.ask()
        study.tell(complete(0.9, (0.3, 0.9)))  # early stopping
    study.ask()
    assert study.should_stop([(0.9, 0.8)])


def test_one_trial_is_no_median(tmp_path):
    study = Study(PLAN, tmp_path)
    study.ask()
    study.tell(complete(0.9))
    study.ask()
    assert not study.should_stop([(0.95, 0.1)])


# -- what is remembered


def test_the_best_is_the_earliest_of_equals_and_never_a_pruned_one(tmp_path):
    study = Study(dataclasses.replace(PLAN, num_trials=4), tmp_path)
    pruned = Outcome(state="pruned", value=0.95, seconds=2.0, steps=4, curve=((0.5, 0.95),))
    outcomes = [failed("the loss became nan"), pruned, complete(0.7), complete(0.7)]
    for outcome in outcomes:
        study.ask()
        study.tell(outcome)
    found = study.result()
    assert found["best"]["number"] == 3
    assert found["best"]["options"] == found["trials"][2]["options"]
    assert [trial["state"] for trial in found["trials"]] == ["failed", "pruned", "complete", "complete"]
    assert [trial["value"] for trial in found["trials"]] == [None, 0.95, 0.7, 0.7]
    assert [trial["steps"] for trial in found["trials"]] == [None, 4, 8, 8]
    assert found["trials"][0]["reason"] == "the loss became nan"
    assert found["seconds"] == 5.0
    assert found["importance"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_smaller_loss_is_better(tmp_path):
    study = Study(dataclasses.replace(PLAN, greater_is_better=False, metric="loss", num_trials=2), tmp_path)
    for value in (0.7, 0.3):
        study.ask()
        study.tell(complete(value))
    assert study.result()["best"]["number"] == 2
    assert study.result()["direction"] == "minimize"


def test_no_values_are_tried_twice(tmp_path):
    """TPE returns to what was good; where there are few values, the others are tried instead."""
    ranges = {"dropout": Range(choices=(0.0, 0.1, None)), "num_trained_layers": Range(1, 3)}
    plan = dataclasses.replace(PLAN, ranges=ranges, start={"dropout": 0.0, "num_trained_layers": 1}, num_trials=9)
    study = Study(plan, tmp_path)
    trials = []
    while study.wants_more():
        number, values = study.ask()
        trials.append((values["dropout"], values["num_trained_layers"]))
        study.tell(complete(values["dropout"] or 0.0))
        if number in (3, 6):
            study = Study(plan, tmp_path)  # a continued search knows them too
    assert set(trials) == {(dropout, layers) for dropout in (0.0, 0.1, None) for layers in (1, 2, 3)}
    assert [trial["number"] for trial in study.result()["trials"]] == list(range(1, 10))
    assert study.result()["best"]["number"] == 1 + next(i for i, trial in enumerate(trials) if trial[0] == 0.1)


def test_all_trials_failed(tmp_path):
    study = Study(dataclasses.replace(PLAN, num_trials=2), tmp_path)
    for reason in ("the loss became nan", "out of memory"):
        study.ask()
        study.tell(failed(reason))
    with pytest.raises(SearchError, match=r"(?s)All 2 trials of the search failed:.*out of memory.*became nan"):
        study.result()


def test_no_trial_starts_after_the_timeout_also_later(tmp_path):
    study = Study(dataclasses.replace(PLAN, timeout=2.5), tmp_path)
    assert len(searched(study)) == 3
    assert study.result()["ended_by"] == "search_timeout"
    assert not Study(PLAN, tmp_path).wants_more(), "the rest of the run may already have the best of these"
    assert searched(Study(dataclasses.replace(PLAN, num_trials=3), tmp_path)) == []


def test_importance_is_that_of_what_moves_the_score(tmp_path):
    ranges = {"learning_rate": Range(0.0, 1.0), "weight_decay": Range(0.0, 1.0)}
    plan = dataclasses.replace(PLAN, ranges=ranges, start={"learning_rate": 0.5, "weight_decay": 0.5}, num_trials=15)
    study = Study(plan, tmp_path)
    while study.wants_more():
        _, values = study.ask()
        study.tell(complete(values["weight_decay"]))
    importance = study.result()["importance"]
    assert importance["weight_decay"] > 0.8
    assert sum(importance.values()) == pytest.approx(1)


def test_what_a_killed_run_leaves_is_mended_and_damage_is_refused(tmp_path):
    study = Study(PLAN, tmp_path)
    before = searched(study, 3)
    path = tmp_path / STUDY_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "wor')
    (tmp_path / f"{STUDY_FILE}.lock").symlink_to(path)
    again = Study(PLAN, tmp_path)
    assert [trial.params for trial in again.trials] == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [STUDY_FILE]
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{]\n", *lines[3:]]))
    with pytest.raises(ResumeError, match=r"study.log, the record of the search, cannot be read"):
        Study(PLAN, tmp_path)


def test_the_study_of_another_search_is_not_continued(tmp_path):
    def opened(facts, *, resume):
        return Search(PLAN, tmp_path, identity=RunIdentity(facts, {"processes": 1}), resume=resume)

    first = opened({"weight_decay": 0.1}, resume=False)
    searched(first.study, 2)
    assert opened({"weight_decay": 0.1}, resume=True).done == 2
    with pytest.raises(ResumeError, match=r"weight_decay: was 0.1, is 0.2"):
        opened({"weight_decay": 0.2}, resume=True)
