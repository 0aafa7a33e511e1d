"""What a student keeps of its teacher: figures by hand, intervals against plain resampling, the gate, the recipe."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from recipe_runs import call, finished, refused, tiny_words
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from nlpxfer.checkpoint.save import check_output_folder
from nlpxfer.errors import ConfigError, DataError, TargetMissedError
from nlpxfer.evaluate.ratio import intervals_by_label, paired_ratio
from nlpxfer.evaluate.retention import (
    Answers,
    Gold,
    agreement,
    check_gate,
    class_shares,
    fitted_temperature,
    gate_faults,
    retained,
    worst_class,
)
from nlpxfer.hub.folder import finished_files
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from nlpxfer.report.disagreements import TwoAnswers, disagreements
from nlpxfer.report.retention import retention_lines


def hot(classes, count=3, sure=2.0):
    return sure * np.eye(count)[np.asarray(classes)]


def plain_ratio(score, ours, theirs, gold, resamples=3000):
    """Rows drawn one by one, and the metric of another library computed anew for each resample."""
    generator = np.random.default_rng(7)
    ratios = []
    for _ in range(resamples):
        rows = generator.integers(len(gold), size=len(gold))
        mean = np.mean([score(gold[rows], each[rows]) for each in ours])
        ratios.append(mean / score(gold[rows], theirs[rows]))
    return np.quantile(ratios, [0.025, 0.975])


def noisy(seed, gold, skill):
    generator = np.random.default_rng(seed)
    return np.where(generator.random(gold.shape) < skill, gold, generator.integers(0, gold.max() + 1, gold.shape))


def test_the_share_of_an_accuracy():
    gold = np.arange(200) % 4
    theirs, ours = noisy(1, gold, 0.9), noisy(2, gold, 0.7)
    found = paired_ratio([ours], theirs, gold, metric="accuracy", resamples=3000)
    assert found.value == pytest.approx((ours == gold).sum() / (theirs == gold).sum())
    slow = plain_ratio(lambda true, said: (true == said).mean(), [ours], theirs, gold)
    assert (found.low, found.high) == pytest.approx(slow, abs=0.01)


def test_the_share_of_each_label():
    """Each is the interval of its column alone, and that of plain resampling; a rare label has none."""
    gold = np.random.default_rng(0).random((300, 3)) < [0.5, 0.2, 0.01]
    theirs, *ours = (
        noisy(seed, gold.astype(int), skill).astype(bool) for seed, skill in ((1, 0.9), (2, 0.6), (3, 0.8))
    )
    found = intervals_by_label(ours, theirs, gold)
    columns = [slice(label, label + 1) for label in range(3)]
    alone = [paired_ratio([o[:, c] for o in ours], theirs[:, c], gold[:, c], metric="micro_f1") for c in columns]
    assert found == [(pytest.approx(one.low), pytest.approx(one.high)) for one in alone[:2]] + [(None, None)]
    assert alone[2].low is None
    slow = plain_ratio(lambda true, said: f1_score(true, said), [ours[0][:, 1]], theirs[:, 1], gold[:, 1], 1000)
    assert intervals_by_label(ours[:1], theirs, gold)[1] == pytest.approx(tuple(slow), abs=0.03)


def test_the_share_of_a_micro_f1():
    gold = (np.random.default_rng(0).random((150, 5)) < 0.3).astype(int)
    theirs, ours = noisy(1, gold, 0.9), noisy(2, gold, 0.6)

    def score(true, said):
        return f1_score(true, said, average="micro")

    found = paired_ratio([ours], theirs, gold, metric="micro_f1", resamples=2000)
    assert found.value == pytest.approx(score(gold, ours) / score(gold, theirs))
    assert (found.low, found.high) == pytest.approx(plain_ratio(score, [ours], theirs, gold, 200), abs=0.02)


def test_the_share_of_a_rank_correlation_with_ties():
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 6, 120).astype(float)
    theirs, ours = gold + generator.normal(0, 1, 120), np.round(gold + generator.normal(0, 3, 120))

    def score(true, said):
        return spearmanr(true, said).statistic

    found = paired_ratio([ours], theirs, gold, metric="spearman", resamples=2000)
    assert found.value == pytest.approx(score(gold, ours) / score(gold, theirs))
    assert (found.low, found.high) == pytest.approx(plain_ratio(score, [ours], theirs, gold, 500), abs=0.04)


def test_the_ratio_of_errors_and_equal_models():
    gold = np.array([0.0, 1.0, 2.0, 3.0])
    found = paired_ratio([gold + 0.5], gold - 1.0, gold, metric="mean_absolute_error")
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    same = np.array([0, 1, 1, 0])
    one = paired_ratio([same], same, np.array([0, 1, 0, 0]), metric="accuracy")
    assert (one.value, one.low, one.high) == (1.0, None, None)  # a resample may hold nothing but the third row


def test_seeds_widen_the_interval_and_average():
    gold = np.arange(400) % 4
    theirs = noisy(1, gold, 0.9)
    ours = [noisy(2, gold, 0.9), noisy(3, gold, 0.5)]
    both = paired_ratio(ours, theirs, gold, metric="accuracy")
    each = [paired_ratio([one], theirs, gold, metric="accuracy") for one in ours]
    assert both.value == pytest.approx(np.mean([one.value for one in each]))
    assert both.seeds == 2
    assert both.high - both.low > 2 * max(one.high - one.low for one in each)


def test_a_teacher_without_a_score_has_no_share():
    gold = np.zeros(30, dtype=int)
    found = paired_ratio([gold], gold + 1, gold, metric="accuracy")
    assert (found.value, found.low, found.high) == (None, None, None)


def test_bad_arguments_of_a_ratio():
    with pytest.raises(DataError, match="same rows"):
        paired_ratio([[0, 1]], [0, 1, 1], [0, 1], metric="accuracy")
    with pytest.raises(DataError, match="same rows"):
        paired_ratio([], [0, 1], [0, 1], metric="accuracy")
    with pytest.raises(ConfigError, match="resamples"):
        paired_ratio([[0]], [0], [0], metric="accuracy", resamples=10)


def test_agreement_by_hand():
    teacher, student = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.75, 0.25], [0.25, 0.75]])
    found = agreement(teacher + 3.0, student, SINGLE_LABEL)
    kl = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    js = 0.5 * (0.5 * np.log(0.5 / 0.625) + 0.5 * np.log(0.5 / 0.375)) + 0.5 * (
        0.75 * np.log(0.75 / 0.625) + 0.25 * np.log(0.25 / 0.375)
    )
    assert found == pytest.approx({"same_answer": 1.0, "kl": kl / 2, "js": js / 2})


def test_agreement_of_far_apart_models_is_finite():
    found = agreement([[1e4, -1e4]], [[-1e4, 1e4]], SINGLE_LABEL)
    assert found == pytest.approx({"same_answer": 0.0, "kl": 2e4, "js": np.log(2)})


def test_agreement_of_labels_and_numbers():
    logit = np.log(3.0)  # a probability of 0.75
    found = agreement([[0.0, logit], [logit, -logit]], [[0.0, -logit], [logit, -logit]], MULTI_LABEL)
    assert found["same_answer"] == 0.5
    assert found["same_label"] == 0.75
    assert found["kl"] == pytest.approx((0.75 * np.log(3) + 0.25 * np.log(1 / 3)) / 4)
    numbers = agreement([[1.0], [2.0], [4.0]], [[2.0], [1.0], [4.5]], REGRESSION)
    assert numbers == pytest.approx({"mean_absolute_difference": 2.5 / 3, "spearman": 0.5})
    assert "spearman" not in agreement([[1.0], [2.0]], [[2.0], [2.0]], REGRESSION)


def test_classes_and_the_worst_of_them():
    """20 rows of a, 20 of b, 4 of c; the student loses 5 of a, 10 of b and 3 of c, all to c or a."""
    gold = np.array([0] * 20 + [1] * 20 + [2] * 4)
    student = gold.copy()
    student[:5], student[20:30], student[40:43] = 2, 0, 0
    task = Gold(SINGLE_LABEL, ("a", "b", "c"), gold, gold)
    table = class_shares([hot(student)], hot(gold), task)
    f1 = {"a": 2 * 15 / (20 + 28), "b": 2 * 10 / (20 + 10), "c": 2 * 1 / (4 + 6)}
    assert {row["label"]: row["share"] for row in table} == pytest.approx(f1)
    assert [row["few"] for row in table] == [False, False, True]
    assert [row["rows"] for row in table] == [20, 20, 4]
    assert worst_class(table)["label"] == "a"  # c is worse, but has few rows
    assert worst_class(table[2:]) == table[2]
    assert worst_class([{"share": None, "few": False, "rows": 3}]) is None
    two = class_shares([hot(student), hot(gold)], hot(gold), task)
    assert two[0]["student"] == pytest.approx((f1["a"] + 1) / 2)


def test_what_means_nothing_is_absent():
    numbers = np.linspace(0, 1, 40)
    model = Answers(numbers[:, None], numbers[:, None] ** 2)
    found = retained([model], model, Gold(REGRESSION, ("score",), numbers, numbers))
    assert set(found) == {"score", "mean_absolute_error", "agreement"}
    assert found["score"]["value"] == 1.0
    constant = Answers(np.full((40, 1), 0.5), np.full((40, 1), 0.5))
    for seeds in ([model, constant], [constant, model]):
        agreed = retained(seeds, model, Gold(REGRESSION, ("score",), numbers, numbers))["agreement"]
        assert set(agreed) == {"mean_absolute_difference"}, "no correlation of all seeds"
    single = retained(
        [Answers(hot([0, 1]), hot([0, 1]))],
        Answers(hot([0, 1]), hot([0, 0])),
        Gold(SINGLE_LABEL, ("a", "b", "c"), np.array([0, 1]), np.array([0, 1])),
    )
    assert set(single) == {"score", "per_class", "worst_class", "agreement", "calibration"}
    assert single["score"]["value"] == 2.0


def test_the_gate_names_the_figures():
    row = {"label": "b", "few": False, "rows": 30, "teacher": 0.8, "student": 0.6, "share": 0.75}
    found = {"score": {"value": 0.95, "metric": "accuracy"}, "per_class": [row, {**row, "label": "c", "few": True}]}
    assert gate_faults(found, 0.95, 0.75) == []
    assert gate_faults(found, None, None) == []
    assert gate_faults(found, 0.96, 0.8) == [
        "the share of the teacher's test accuracy is 0.9500, below min_retention 0.96",
        "b: the share of the teacher's F1 is 0.7500 (0.6000 of 0.8000, 30 test rows), below min_class_retention 0.8",
    ]
    nothing = {"score": {"value": None, "metric": "accuracy"}}
    assert gate_faults(nothing, 0.5, None) == [
        "the share of the teacher's test accuracy cannot be told, since the teacher's is not above 0; "
        "min_retention 0.5 is not met"
    ]


def test_a_teacher_whose_correlation_is_negative():
    gold = np.arange(30.0)
    task = Gold(REGRESSION, ("score",), gold, gold)
    teacher, student = (Answers(numbers[:, None], numbers[:, None]) for numbers in (-gold, gold))
    found = retained([student], teacher, task)
    report = SimpleNamespace(checks={"retention": {"students": {"distilled": found, "control": found}}}, arms=[])
    (line,) = retention_lines(report)
    assert line.startswith("kept:     the teacher's Spearman is not above 0: there is no share of it to keep; ")
    assert "control" not in line


def test_a_gate_that_could_judge_nothing_is_refused():
    gold = np.arange(57) % 3
    with pytest.raises(ConfigError, match="the largest has 19"):
        check_gate(Gold(SINGLE_LABEL, "abc", gold, gold), 0.9)
    check_gate(Gold(SINGLE_LABEL, "abc", gold, gold), None)
    check_gate(Gold(SINGLE_LABEL, "abc", gold, np.arange(60) % 3), 0.9)
    with pytest.raises(ConfigError, match="no classes"):
        check_gate(Gold(REGRESSION, ("score",), gold, gold), 0.9)


def test_temperatures_are_fitted_on_the_rows_that_are_answered():
    logits, gold = hot([0, 1, 0, 1, 1, 0] * 200, 2, 3.0), np.array([0, 1, 0, 1, 0, 0] * 200)
    task, none = Gold(SINGLE_LABEL, ("a", "b"), gold, gold), np.full_like(logits, np.nan)
    some = np.concatenate([logits, none[:4]])
    labels = np.concatenate([gold, [1, 1, 0, 0]])
    whole = fitted_temperature(Answers(logits, none), task)
    assert whole == pytest.approx(3 / np.log(5), rel=5e-3)
    assert fitted_temperature(Answers(some, none), replace(task, validation=labels)) == pytest.approx(whole)
    assert fitted_temperature(Answers(none, none), task) == 1.0
    assert fitted_temperature(Answers(logits[:, :1], none), replace(task, problem_type=REGRESSION)) == 1.0


def two(teacher, student, gold, **changes):
    count = len(teacher)
    facts = {"split": "test", "numbers_N": range(1, count + 1), "texts": [f"text {i}" for i in range(count)]}
    return TwoAnswers(**{**facts, "pairs": None, "gold": gold, **changes}, teacher_NC=teacher, student_NC=student)


def test_disagreements_are_ranked_by_the_less_sure_model():
    teacher = np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01]])
    student = np.log([[0.3, 0.7], [0.02, 0.98], [0.1, 0.9], [0.05, 0.95]])
    found = list(disagreements([two(teacher, student, np.array([0, 0, 1, 1]))], ["no", "yes"], SINGLE_LABEL))
    assert [line["row"] for line in found] == [4, 1, 2]
    assert found[0] == {
        "split": "test",
        "row": 4,
        "text": "text 3",
        "label": "yes",
        "teacher": "no",
        "teacher_probability": 0.99,
        "student": "yes",
        "student_probability": 0.95,
    }
    cooled = list(disagreements([two(teacher, student, None)], ["no", "yes"], SINGLE_LABEL, (2.0, 1.0)))
    assert cooled[0]["label"] is None
    assert cooled[0]["teacher_probability"] == pytest.approx(np.sqrt(0.99) / (np.sqrt(0.99) + 0.1), abs=1e-6)


def test_disagreements_of_several_labels_and_of_numbers():
    logit = np.log(3.0)
    teacher, student = np.array([[logit, logit], [logit, -logit]]), np.array([[logit, -4.0], [-logit, -logit]])
    gold = np.array([[1, 0], [1, 1]])
    found = list(disagreements([two(teacher, student, gold, pairs=["p", "q"])], ["a", "b"], MULTI_LABEL))
    assert [(line["teacher"], line["student"], line["label"], line["text_pair"]) for line in found] == [
        (["a", "b"], ["a"], ["a"], "p"),
        (["a"], [], ["a", "b"], "q"),
    ]
    assert found[0]["teacher_probability"] == {"b": 0.75}
    numbers = np.arange(20.0)[:, None]
    wrong = numbers.copy()
    wrong[[3, 5, 7]] += [[1.0], [3.0], [2.0]]
    listed = list(disagreements([two(numbers, wrong, numbers[:, 0])], ["score"], REGRESSION))
    assert [(line["row"], line["difference"]) for line in listed] == [(6, 3.0), (8, 2.0)]  # a tenth of 20 rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "bert"
    words = tiny_words(tiny_data, tiny_checkpoint("bert"), epochs=6, rate="2e-3")
    words += ["--freeze_embeddings", "false", "--control_arm", "false"]
    run = finished("finetune", folder, *words)
    assert run.report["metrics"]["test"]["accuracy"] > 0.5
    return run.folder


def test_a_run_reports_what_is_kept(tiny_data, teacher, tmp_path):
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher, "--unlabelled_file", tiny_data.unlabelled]
    words += ["--disagreements", "true", "--save_predictions", "true", "--min_retention", "0.01"]
    run = finished("distill", tmp_path / "out", *words)
    report, kept = run.report, run.report["checks"]["retention"]
    assert list(kept["students"]) == ["distilled", "control"]
    for name, facts in kept["students"].items():
        scores = [run.arm(each)["metrics"]["test"]["accuracy"] for each in (name, "teacher")]
        assert facts["score"]["value"] == pytest.approx(scores[0] / scores[1])
        assert facts["score"]["low"] <= facts["score"]["value"] <= facts["score"]["high"]
        assert [row["label"] for row in facts["per_class"]] == json.loads((run.folder / "labels.json").read_text())[
            "names"
        ]
        assert sum(row["rows"] for row in facts["per_class"]) == 80
        assert facts["size"]["parameters"]["ratio"] < 1
        assert facts["size"]["speed_up"] > 1
    assert kept["students"]["distilled"]["calibration"] == report["checks"]["calibration"]
    assert kept["teacher"]["calibration"] != report["checks"]["calibration"]
    for name in ("teacher", "distilled", "control"):
        latency = run.arm(name)["latency"]
        assert latency["threads"] == 1
        assert (latency["one_row"]["rows"], latency["batched"]["rows"]) == (1, 32)
        for found in (latency["one_row"], latency["batched"]):
            assert 0 < found["p50_ms"] < found["total_p50_ms"] <= found["total_p95_ms"]
    assert run.arm("majority class")["latency"] is None
    assert "\nkept:     " in run.out
    assert "\nms a row: teacher " in run.out
    card = (run.folder / "README.md").read_text()
    assert "## Against the teacher" in card
    assert "Worst class: " in card

    lines = [json.loads(line) for line in (run.folder / "disagreements.jsonl").read_text().splitlines()]
    differ = {name: facts["agreement"]["same_answer"] for name, facts in kept["students"].items()}["distilled"]
    assert sum(line["split"] == "test" for line in lines) == round(80 * (1 - differ))
    assert {line["split"] for line in lines} == {"train", "unlabelled", "validation", "test"}
    sure = [min(line["teacher_probability"], line["student_probability"]) for line in lines]
    assert sure == sorted(sure, reverse=True)
    said = {row["row"]: row for row in run.logits_of()}
    for line in lines:
        assert line["teacher"] != line["student"]
        if line["split"] == "test":
            assert line["label"] == said[line["row"]]["label"]
            assert line["student"] == said[line["row"]]["predicted"]
        assert (line["label"] is None) == (line["split"] == "unlabelled")
    assert "disagreements.jsonl" not in finished_files(run.folder)
    check_output_folder(run.folder, overwrite=True)  # all that lies there is known to be nlpxfer's


def test_the_gate_fails_a_finished_run(tiny_data, tiny_checkpoint, teacher, tmp_path, monkeypatch):
    """Everything is written, nothing is pushed."""
    pushed = []
    monkeypatch.setattr("nlpxfer.result.push_folder", lambda *words, **options: pushed.append(words))
    monkeypatch.setattr("nlpxfer.start.check_push_request", lambda *words, **options: None)
    words = [*tiny_words(tiny_data, rate="1e-6"), "--teacher_name_or_path", teacher, "--control_arm", "false"]
    words += ["--student_name_or_path", tiny_checkpoint("bert"), "--linear_probe", "false"]
    words += ["--min_retention", "1", "--min_class_retention", "1"]
    words += ["--push_to_hub", "true", "--hub_model_id", "me/mine"]
    run = call("distill", tmp_path / "out", *words)
    assert run.code == 3
    assert "Traceback" not in run.err
    assert "test accuracy is 0." in run.err
    assert "below min_retention 1" in run.err
    assert "Nothing was pushed." in run.err
    assert pushed == []
    value = run.report["checks"]["retention"]["students"]["distilled"]["score"]["value"]
    assert f"is {value:.4f}" in run.err
    assert finished_files(run.folder)
    assert "distilled" in run.out
    assert TargetMissedError("x").exit_code == 3


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--min_retention", "97"], "min_retention: 97.0 is not a share above 0 and up to 1"),
        (["--min_class_retention", "0"], "min_class_retention: 0.0 is not a share"),
    ],
)
def test_gates_that_cannot_be(words, fault, tiny_data, tiny_checkpoint, tmp_path):
    assert fault in refused("distill", tmp_path / "out", *tiny_words(tiny_data, tiny_checkpoint("bert")), *words)


def test_a_gate_on_classes_with_few_rows_is_refused(tiny_data, tiny_checkpoint, tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("".join(tiny_data.test.read_text().splitlines(keepends=True)[:17]))
    words = [*tiny_words(replace(tiny_data, test=few), tiny_checkpoint("bert")), "--min_class_retention", "0.5"]
    assert "too few to judge one" in refused("distill", tmp_path / "out", *words)
