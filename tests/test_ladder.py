"""The smallest student that is good enough: which are trained, for how long, and what is said of each."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from matplotlib.image import imread
from recipe_runs import call, finished, refused, tiny_words
from safetensors.torch import load_file, save_file

from nlpxfer.checkpoint.save import check_output_folder
from nlpxfer.config import RunOptions
from nlpxfer.config.targets import TargetOptions
from nlpxfer.errors import ConfigError, DataError, NotFiniteError, TargetMissedError
from nlpxfer.report.ladder import Measured, ladder_table, write_ladder
from nlpxfer.report.plots import SpeedPoint, pareto_front, pareto_plot
from nlpxfer.run import Run
from nlpxfer.smallest import Choice, check_search, find_smallest, slices
from nlpxfer.train.ladder import Candidate, Target, climb, least_steps


class Curves:
    """Candidates whose score is known for every number of steps, and a list of all that was asked."""

    def __init__(self, **scores):
        self.scores, self.asked = scores, []

    def candidates(self, order=None):
        """Named in the order of their size: 1 ms and 1 byte, 2 ms and 2 bytes, …"""
        made = [
            Candidate(name=name, train=lambda steps, name=name: self.train(name, steps), latency_ms=size, bytes=size)
            for size, name in enumerate(self.scores, start=1)
        ]
        return made if order is None else [made[index] for index in order]

    def train(self, name, steps):
        self.asked.append((name, steps))
        found = self.scores[name]
        return found(steps) if callable(found) else found


def outcomes(result):
    return {each.name: each.outcome for each in result.tried}


def test_all_is_halved_until_one_is_left():
    """8 candidates, 240 steps: three rungs of 80 steps, for 8, 4 and 2 of them: 10, 20 and 40 steps each."""
    curves = Curves(a=0.1, b=0.2, c=0.3, d=0.4, e=0.5, f=0.6, g=0.7, h=0.8)
    result = climb(curves.candidates(order=[3, 1, 0, 2, 7, 6, 5, 4]), Target(reference=1.0, keep=0.9),
                   total_steps=240, max_steps=1000)  # fmt: skip
    assert curves.asked == [
        *((name, 10) for name in "abcdefgh"),
        *((name, 20) for name in "efgh"),
        *((name, 40) for name in "gh"),
    ]
    assert result.steps == 240
    assert (result.chosen, result.nearest) == (None, "h")
    assert outcomes(result) == {
        **dict.fromkeys("abcd", "out after rung 1"),
        **dict.fromkeys("ef", "out after rung 2"),
        "g": "out after rung 3",
        "h": "below the target",
    }
    with pytest.raises(TargetMissedError, match=r"None of 8 students reaches .* 0\.9000 \(0\.9 of .*nearest is h: "):
        result.require()


def test_one_that_passes_ends_the_larger_ones():
    """c passes at once: d, which passes too, and e are out, and all further steps go to a and b."""
    curves = Curves(a=0.5, b=lambda steps: 0.95 if steps >= 20 else 0.6, c=0.95, d=0.99, e=0.8)
    result = climb(curves.candidates(), Target(reference=1.0, keep=0.9), total_steps=150, max_steps=1000)
    # 3 rungs; the first has 10 steps for each of 5, the others 100 steps for the one that is left
    assert curves.asked == [*((name, 10) for name in "abcde"), ("b", 50)]
    assert result.chosen == "b"
    assert result.require().best == (50, 0.95)
    assert outcomes(result) == {
        "a": "out after rung 1",
        "b": "chosen",
        "c": "passes, but is slower than b",
        "d": "passes, but is slower than c",
        "e": "slower than c",
    }
    assert result.steps == 100


def test_the_smallest_passes_at_once():
    curves = Curves(a=0.9, b=1.0)
    result = climb(curves.candidates(), Target(reference=1.0, keep=0.9), total_steps=40, max_steps=10)
    assert curves.asked == [("a", 10), ("b", 10)]
    assert result.chosen == "a"


def test_what_is_too_slow_is_never_trained():
    curves = Curves(a=0.1, b=0.95, c=0.99)
    target = Target(reference=1.0, keep=0.9, max_latency_ms=2.0)
    result = climb(curves.candidates(), target, total_steps=100, max_steps=100)
    assert {name for name, _ in curves.asked} == {"a", "b"}
    assert outcomes(result)["c"] == "too slow"
    assert result.chosen == "b"
    slow = climb(curves.candidates(), Target(reference=1.0, keep=0.9, max_latency_ms=0.5), total_steps=9, max_steps=9)
    assert (slow.chosen, slow.nearest, slow.steps) == (None, "a", 0)
    with pytest.raises(TargetMissedError, match=r"in at most 0\.5 ms a row\. The nearest is a: not trained, 1 ms"):
        slow.require()


def test_of_equal_latency_the_fewer_bytes():
    made = [Candidate(name=name, train=lambda steps: 1.0, latency_ms=1.0, bytes=size) for name, size in
            (("float", 400), ("int8", 100))]  # fmt: skip
    assert climb(made, Target(reference=1.0, keep=0.9), total_steps=10, max_steps=10).chosen == "int8"


def test_no_longer_than_a_whole_training_and_not_twice_as_long():
    curves = Curves(a=0.1, b=0.2, c=0.3, d=0.4)
    result = climb(curves.candidates(), Target(reference=1.0, keep=0.9), total_steps=10_000, max_steps=30)
    assert curves.asked == [(name, 30) for name in "abcd"]
    assert outcomes(result) == {
        **dict.fromkeys("ab", "out after rung 1"),
        "c": "below the target",
        "d": "below the target",
    }


def test_a_larger_eta_drops_more():
    curves = Curves(**{name: index / 10 for index, name in enumerate("abcdefghi")})
    climb(curves.candidates(), Target(reference=1.0, keep=0.9), total_steps=180, max_steps=1000, eta=3)
    assert [steps for _, steps in curves.asked] == [10] * 9 + [30] * 3  # 2 rungs of 90 steps


def test_one_that_diverges_is_out():
    def diverges(steps):
        raise NotFiniteError("the loss is NaN")

    curves = Curves(a=diverges, b=float("nan"), c=0.95)
    result = climb(curves.candidates(), Target(reference=1.0, keep=0.9), total_steps=60, max_steps=100)
    assert result.chosen == "c"
    assert outcomes(result)["a"] == "failed: the loss is NaN"
    assert outcomes(result)["b"] == "failed: its score is nan"
    nothing = climb(Curves(a=diverges).candidates(), Target(reference=1.0, keep=0.9), total_steps=9, max_steps=9)
    assert (nothing.chosen, nothing.nearest) == (None, None)
    with pytest.raises(TargetMissedError, match="None of 1 students"):
        nothing.require()


def test_bad_arguments_are_named_together():
    with pytest.raises(ConfigError) as raised:
        Target(reference=0.0, keep=98, max_latency_ms=-1)
    for fault in ("keep: 98", "no share of it to keep", "max_latency_ms: -1"):
        assert fault in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        climb([], Target(reference=1.0, keep=0.9), total_steps=0, max_steps=0, eta=1)
    for fault in ("candidates: 0", "total_steps: 0", "max_steps: 0", "eta: 1"):
        assert fault in str(raised.value)
    curves = Curves(a=0.1, b=0.2, c=0.3, d=0.4)
    with pytest.raises(ConfigError, match="7 steps are not enough for 4 students in 2 rungs"):
        climb(curves.candidates(), Target(reference=1.0, keep=0.9), total_steps=7, max_steps=9)
    twice = curves.candidates(order=[0, 0])
    with pytest.raises(ConfigError, match="2 with 1 different names"):
        climb(twice, Target(reference=1.0, keep=0.9), total_steps=70, max_steps=9)


def timed(one, batch, size):
    """What was measured of a model: p95 is twice p50, and tokenising takes as long as the model."""

    def latency(p50):
        return {"p50_ms": p50 / 2, "p95_ms": p50, "total_p50_ms": p50, "total_p95_ms": 2 * p50}

    return Measured(latency={"one_row": latency(one), "batched": latency(batch), "threads": 1}, bytes=size)


def test_the_table_and_the_files(tmp_path):
    curves = Curves(**{"2|layers": 0.85, "3 layers": 0.95, "6 layers": 0.96})
    target = Target(reference=1.0, keep=0.9, max_latency_ms=2.5)
    result = climb(curves.candidates(), target, total_steps=100, max_steps=100)
    measured = {"2|layers": timed(1, 0.5, 1), "3 layers": timed(2, 1, 2), "6 layers": timed(3, 2, 3)}
    measured["teacher"] = timed(4, 2.5, 4)
    lines = ladder_table(result, measured).splitlines()
    assert lines[2] == r"| 2\|layers | 1 | 2 | 0.5 | 1 | 2,000 | 1 B | 50 | 0.8500 | 85.0 % | below the target |"
    assert lines[3] == "| 3 layers | 2 | 4 | 1 | 2 | 1,000 | 2 B | 50 | 0.9500 | 95.0 % | chosen |"
    assert lines[4] == "| 6 layers | 3 | 6 | 2 | 4 | 500 | 3 B | - | - | - | too slow |"
    assert lines[5] == "| teacher | 4 | 8 | 2.5 | 5 | 400 | 4 B | - | 1.0000 | 100.0 % | - |"
    write_ladder(tmp_path, result, measured)
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["chosen"] == "3 layers"
    assert found["target"] == {"reference": 1.0, "keep": 0.9, "max_latency_ms": 2.5, "score": 0.9}
    assert found["tried"][1]["scores"] == [{"steps": 50, "score": 0.95}]
    assert found["latency"]["3 layers"] == measured["3 layers"].latency
    assert found["rows_per_second"] == {"2|layers": 2000.0, "3 layers": 1000.0, "6 layers": 500.0, "teacher": 400.0}
    assert (tmp_path / "ladder.md").read_text().splitlines() == lines
    assert imread(tmp_path / "pareto.png").shape[0] > 200


def test_a_teacher_that_was_not_timed_is_not_in_the_picture(tmp_path, monkeypatch):
    import nlpxfer.report.ladder as module

    drawn = []
    monkeypatch.setattr(module, "pareto_plot", lambda points, *args, **kw: drawn.append([p.name for p in points]))
    result = climb(Curves(a=0.95).candidates(), Target(reference=1.0, keep=0.9), total_steps=10, max_steps=10)
    write_ladder(tmp_path, result, {"a": timed(1, 0.5, 1), "teacher": None})
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["latency"]["teacher"] is None
    assert found["rows_per_second"] == {"a": 2000.0, "teacher": None}
    assert (tmp_path / "ladder.md").read_text().splitlines()[-1] == (
        "| teacher | - | - | - | - | - | - | - | 1.0000 | 100.0 % | - |"
    )
    write_ladder(tmp_path, result, {"a": timed(1, 0.5, 1), "teacher": timed(2, 1, 2)})
    assert drawn == [["a"], ["a", "teacher"]]


def test_the_front():
    points = [SpeedPoint(name=str(i), accuracy=a, rows_per_second=r) for i, (a, r) in enumerate(
        [(0.9, 100), (0.85, 100), (0.8, 200), (0.8, 200), (0.79, 150), (0.5, 9000)])]  # fmt: skip
    assert pareto_front(points) == [True, False, True, True, False, True]


def test_the_picture_marks_the_front(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, scales = [], []
    original, scale = Axes.plot, Axes.set_xscale
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.append(args) or original(self, *args, **kw))
    monkeypatch.setattr(Axes, "set_xscale", lambda self, value: scales.append(value) or scale(self, value))
    points = [SpeedPoint(name=n, accuracy=a, rows_per_second=r) for n, a, r in
              (("$a$", 0.9, 10.0), ("b", 0.8, 1000.0), ("c", 0.7, 500.0))]  # fmt: skip
    pareto_plot(points, tmp_path / "a.png", least=0.75)
    assert drawn[0] == ([10.0, 1000.0], [90.0, 80.0], "-")
    assert [args[2] for args in drawn[1:]] == ["o", "o", "x"]
    assert scales == ["log"]
    with pytest.raises(DataError, match="above 0"):
        pareto_plot([], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_slices_are_few_and_smaller_than_the_teacher():
    def of(total):
        config = SimpleNamespace(num_hidden_layers=total, model_type="other", get_text_config=lambda: config)
        model = SimpleNamespace(config=config)
        return [choice.values["student_num_layers"] for choice in slices(model)]

    assert (of(1), of(2), of(6)) == ([], [1], [1, 2, 3, 4, 5])
    assert of(24) == [1, 5, 10, 14, 19, 23]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint, tiny_data, tmp_path_factory):
    words = tiny_words(tiny_data, tiny_checkpoint("bert", layers=3), epochs=2, rate="2e-3")
    folder = tmp_path_factory.mktemp("teacher") / "bert"
    return finished("finetune", folder, *words, "--control_arm", "false").folder


def test_a_recipe_searches_and_then_trains_what_it_found(tiny_data, teacher, tmp_path, monkeypatch):
    """The bar is so low that the smallest passes; the test rows are read only afterwards."""
    import nlpxfer.smallest as module

    asked, real = [], module.short_run
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # without which there are no int8 forms

    def short_run(trial, folder, *, steps, look):
        asked.append((folder.name, steps, len(trial.split(trial.build().tokenizer).test)))
        return real(trial, folder, steps=steps, look=look)

    monkeypatch.setattr(module, "short_run", short_run)
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher, "--control_arm", "false"]
    run = finished("distill", tmp_path / "out", *words, "--search", "--keep", "0.1", "--search_budget", "1")
    assert {name for name, _, _ in asked} == {"1-layer", "2-layers", "2-layers,-half-as-wide", "static"}
    assert all(test_rows == 0 for _, _, test_rows in asked)
    found = run.report["checks"]["search"]
    assert (found["chosen"], found["total_steps"]) == ("static", 8)  # steps of a whole training
    assert 4 <= found["steps"] == sum(steps for _, steps, _ in asked) <= 8
    reference = run.arm("teacher")["metrics"]["validation"]["accuracy"]
    assert found["target"]["reference"] == pytest.approx(reference)
    assert json.loads((run.folder / "config.json").read_text())["model_type"] == "nlpxfer-static"
    assert run.run["config"]["student"] == "static"
    assert run.arm("distilled")["details"]["steps"] == 5 * 8  # static_num_train_epochs
    assert "| static |" in run.out
    assert "| 2 layers, half as wide |" in run.out
    assert imread(run.folder / "pareto.png").shape[0] > 200
    check_output_folder(run.folder, overwrite=True)  # all that lies there is known to be nlpxfer's


def test_int8_forms_stand_on_the_ladder_and_share_trainings(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    """One of them is made the quickest: it is chosen, written, and held against the teacher."""
    import nlpxfer.smallest as module

    asked, real, times = [], module.short_run, module.latency_facts

    def short_run(trial, folder, *, steps, look):
        asked.append((folder.name, steps))
        return real(trial, folder, steps=steps, look=look)

    def latency_facts(models, *texts):
        found = times(models, *texts)
        for name, facts in found.items():
            facts["one_row"]["total_p50_ms"] = 0.01 if name == "1 layer, int8" else 5.0 + len(name)
        return found

    monkeypatch.setattr(module, "short_run", short_run)
    monkeypatch.setattr(module, "latency_facts", latency_facts)
    teacher = tiny_checkpoint("bert", kind="classifier", layers=2)
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher, "--control_arm", "false"]
    run = finished("distill", tmp_path / "out", *words, "--search", "--keep", "0.1", "--search_budget", "2")
    found = run.report["checks"]["search"]
    assert {each["name"] for each in found["tried"]} == {
        "1 layer", "1 layer, int8", "1 layer, half as wide", "1 layer, half as wide, int8",
        "static", "static, int8"}  # fmt: skip
    assert found["chosen"] == "1 layer, int8"
    assert len(asked) == len(set(asked)), "nothing is trained twice for as many steps"
    assert found["steps"] == sum(steps for _, steps in asked)
    by_name = {each["name"]: each for each in found["tried"]}
    assert by_name["1 layer, int8"]["bytes"] < by_name["1 layer"]["bytes"]
    scores = [dict(each["scores"][0]) for each in (by_name["1 layer"], by_name["1 layer, int8"])]
    assert scores[0]["steps"] == scores[1]["steps"]
    assert abs(scores[0]["score"] - scores[1]["score"]) < 0.2
    assert (run.run["config"]["student_int8"], run.run["config"]["student_num_layers"]) == (True, 1)
    assert (run.folder / "onnx" / "model_int8.onnx").is_file()
    assert run.report["checks"]["retention"]["students"].keys() == {"distilled", "distilled, int8"}


def test_forms_of_one_training_share_its_steps():
    """Three trainings of four candidates: two rungs of 6 steps for each, then of 12 for the two that are left."""
    curves = Curves(**{"a": 0.5, "b": 0.6, "c": 0.95})
    a, b, c = curves.candidates()
    twin = replace(c, name="c, int8", latency_ms=c.latency_ms - 0.5, bytes=1, trained_as="c")
    result = climb([a, b, c, twin], Target(reference=1.0, keep=1.0), total_steps=36, max_steps=100)
    assert [each["steps"] for each in result.to_plain()["tried"][-1]["scores"]] == [6, 18]
    assert result.steps == 3 * 6 + 18


def test_no_student_is_quick_enough(tiny_data, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher]
    run = call("distill", tmp_path / "out", *words, "--search", "--max_latency_ms", "0.0001")
    assert run.code == 3
    assert "None of 4 students reaches a validation score of" in run.err
    assert "in at most 0.0001 ms a row. The nearest is static: not trained" in run.err
    assert "too slow" in (run.folder / "ladder.md").read_text()
    assert not (run.folder / "report.json").exists()


def test_a_teacher_of_one_layer_has_no_smaller_student():
    with pytest.raises(ConfigError, match="no smaller student"):
        find_smallest(None, TargetOptions(search=True), [], arm_of=None, teacher=None)


class Searches:
    """Searches of a recipe without their trainings: all students get the score 1, the run ends after the search.

    Attributes:
        tried: Names of what was trained in the last call.
        waits: Whether a run ends before it trains the student that was found.
    """

    def __init__(self, monkeypatch):
        import nlpxfer.smallest as module

        self.tried, self.waits, train = [], True, Run.train
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        monkeypatch.setattr(
            module, "short_run", lambda trial, folder, *args, **kw: self.tried.append(folder.name) or 1
        )
        monkeypatch.setattr(module, "latency_facts", lambda models, *texts: {name: timed(len(name), 1, 1).latency for
                                                                             name in models})  # fmt: skip

        def stop_before_the_student(run, name, *args, **kw):
            if name == "distilled" and self.waits:
                raise SystemExit(9)
            return train(run, name, *args, **kw)

        monkeypatch.setattr(Run, "train", stop_before_the_student)

    def call(self, folder, *words):
        """Options may also stand in a dictionary; gives ladder.json."""
        self.tried.clear()
        listed = [word for given in words for word in (sum(given.items(), ()) if isinstance(given, dict) else [given])]
        ended = call("distill", folder, *listed, "--search", "--control_arm", "false")
        assert ended.code == (9 if self.waits else 0), ended.err
        return json.loads((folder / "ladder.json").read_text())


@pytest.fixture(scope="module")
def other_teacher(teacher, tmp_path_factory):
    """The same teacher but for the bias of one class."""
    folder = shutil.copytree(teacher, tmp_path_factory.mktemp("other") / "bert")
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"][0] += 0.1
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_resumed_run_takes_what_was_found(tiny_data, teacher, other_teacher, tmp_path, monkeypatch, caplog):
    """And searches anew where the finished search had another target, budget, teacher, data or training."""
    searches, folder = Searches(monkeypatch), tmp_path / "out"
    caplog.set_level("WARNING", logger="nlpxfer")
    words, given = tiny_words(tiny_data), {"--teacher_name_or_path": teacher, "--keep": 0.5}
    found = searches.call(folder, *words, given)
    assert searches.tried
    given["--resume_from_checkpoint"] = "true"
    for option, value, said in (
        ("--keep", 0.6, "keep: was 0.5, is 0.6"),
        ("--max_latency_ms", 999, "max_latency_ms: was None, is 999.0"),
        ("--search_budget", 20, "search_budget: was 3.0, is 20.0"),
        ("--teacher_name_or_path", other_teacher, "teacher: was "),
        ("--max_train_samples", 48, "data_fingerprint: was "),
        ("--kd_weight", 0.5, "kd_weight: was None, is 0.5"),
    ):
        assert found == searches.call(folder, *words, given)
        assert not searches.tried
        assert not caplog.text
        given[option] = value
        found = searches.call(folder, *words, given)
        assert searches.tried, option
        assert "the smallest student is looked for anew" in caplog.text
        assert said in caplog.text
        caplog.clear()
    assert (found["target"]["keep"], found["target"]["max_latency_ms"]) == (0.6, 999)
    searches.waits = False
    assert found == searches.call(folder, *words, given)
    assert not searches.tried
    assert json.loads((folder / "report.json").read_text())["checks"]["search"] == found


def test_a_damaged_search_is_made_anew(tiny_data, teacher, tmp_path, monkeypatch):
    searches, folder = Searches(monkeypatch), tmp_path / "out"
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher]
    searches.call(folder, *words)
    kept = next((folder / "checkpoints").rglob("ladder.json"))
    kept.write_text(kept.read_text()[:-20])
    searches.call(folder, *words, "--resume_from_checkpoint", "true")
    assert searches.tried


def test_only_one_classifier_is_timed_as_the_teacher(tiny_data, teacher, other_teacher, tmp_path, monkeypatch):
    """A mixture has the score of several models: the speed of its first one is not its own."""
    searches, words = Searches(monkeypatch), tiny_words(tiny_data)
    alone = searches.call(tmp_path / "one", *words, "--teacher_name_or_path", teacher)
    assert alone["rows_per_second"]["teacher"] > 0
    mixed = searches.call(tmp_path / "two", *words, "--teacher_name_or_path", f"{teacher},{other_teacher}")
    assert mixed["rows_per_second"]["teacher"] is None
    assert mixed["rows_per_second"]["static"] > 0


def test_a_budget_that_is_too_small_is_refused_before_anything_is_trained(tiny_data, tiny_checkpoint, tmp_path):
    """Of 3 layers: slices of 1 and 2, one of them narrower, and a static one; 8 steps are a whole training."""
    words = tiny_words(tiny_data, tiny_checkpoint("bert", layers=3))
    message = refused("distill", tmp_path / "out", *words, "--search", "--search_budget", "0.5")
    assert "search_budget: 4 steps are not enough for" in message
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_a_score_to_keep_is_refused_before_anything_is_timed(
    tiny_data, teacher, tmp_path, monkeypatch
):
    import nlpxfer.smallest as module

    monkeypatch.setattr(module, "_score_of", lambda run, logits: -0.1)  # as Spearman's correlation may be
    monkeypatch.setattr(module, "_measured", lambda *rest: pytest.fail("timed"))
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher, "--search", "--search_budget", "50"]
    message = refused("distill", tmp_path / "out", *words)
    assert "the teacher's validation score is -0.1000, so there is no share of it to keep" in message


def test_the_least_budget_is_one_that_can_be_climbed():
    run = SimpleNamespace(options=RunOptions(max_steps=10))
    choices = [Choice(name=name, values={}) for name in ("a", "a, int8", "b", "c", "d")]
    assert least_steps(5, 4) == 4 * 3
    check_search(run, TargetOptions(search=True, search_budget=1.2), choices, rows=240)
    with pytest.raises(ConfigError, match="11 steps are not enough for 5 students in 3 rungs") as raised:
        check_search(run, TargetOptions(search=True, search_budget=1.1), choices, rows=240)
    assert "--search_budget 1.2" in str(raised.value)
    for steps, enough in ((12, True), (11, False)):
        a, *others = Curves(**dict.fromkeys("abcd", 0.1)).candidates()
        twin = replace(a, name="a, int8", trained_as="a")
        target = Target(reference=1.0, keep=0.9)
        if enough:
            assert climb([a, twin, *others], target, total_steps=steps, max_steps=10).steps <= steps
        else:
            with pytest.raises(ConfigError, match="not enough"):
                climb([a, twin, *others], target, total_steps=steps, max_steps=10)


def test_a_static_student_has_its_int8_form_on_the_ladder(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    """Here it is made the quickest: it is chosen, and held against the teacher."""
    import nlpxfer.smallest as module

    times = module.latency_facts

    def latency_facts(models, *texts):
        found = times(models, *texts)
        found["static, int8"]["one_row"]["total_p50_ms"] = 1e-6
        return found

    monkeypatch.setattr(module, "latency_facts", latency_facts)
    teacher = tiny_checkpoint("bert", kind="classifier", layers=2)
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher, "--control_arm", "false"]
    run = finished("distill", tmp_path / "out", *words, "--search", "--keep", "0.1", "--search_budget", "2")
    found = run.report["checks"]["search"]
    by_name = {each["name"]: each for each in found["tried"]}
    assert found["chosen"] == "static, int8"
    assert by_name["static, int8"]["bytes"] < by_name["static"]["bytes"] / 2
    scores = [by_name[name]["scores"][0] for name in ("static", "static, int8")]
    assert scores[0]["steps"] == scores[1]["steps"]
    assert scores[0]["score"] == pytest.approx(scores[1]["score"], abs=0.1)
    assert (run.run["config"]["student"], run.run["config"]["student_int8"]) == ("static", True)
    assert run.report["checks"]["retention"]["students"].keys() == {"distilled", "distilled, int8"}
    assert run.arm("distilled, int8")["bytes"] < run.arm("distilled")["bytes"] / 2
    assert json.loads((run.folder / "int8" / "config.json").read_text())["table_dtype"] == "int8"
    assert not (run.folder / "onnx").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--keep", "0.9", "--max_latency_ms", "2"], "keep: has no effect without search"),
        (["--search", "--keep", "98"], "keep: 98.0 is not a share"),
        (["--search", "--max_latency_ms", "0"], "max_latency_ms: 0.0 is not a positive number"),
        (["--search", "--student_num_layers", "2"], "student_num_layers: search tries students"),
        (["--search", "--metric_for_best_model", "loss"], "--metric_for_best_model accuracy, not loss"),
        (
            ["--search", "--temperature", "{low: 1, high: 4}", "--num_trials", "2"],
            "search: cannot be combined with ranges",
        ),
    ],
)
def test_what_a_search_refuses(words, fault, tiny_data, tiny_checkpoint, tmp_path):
    pytest.importorskip("optuna")
    message = refused("distill", tmp_path / "out", *tiny_words(tiny_data, tiny_checkpoint("bert")), *words)
    assert fault in message
