"""recipes/distill.py on several labels, on numbers and on pairs of texts: each against a calculation by hand."""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from recipe_runs import QUICK, finished, refused
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from test_long_texts import framed
from test_problem_types import MULTI, NUMBERS, topic_rows
from test_whole_way import pair_rows
from tiny import write_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nlpxfer.checkpoint.adapters import load_adapter
from nlpxfer.cli import main
from nlpxfer.data.windows import window_spans
from nlpxfer.evaluate import arms as arms_module
from nlpxfer.evaluate import latency
from nlpxfer.teachers import TransferRows

LABELS_OF = {"labels": ("food", "music", "sport", "travel"), "numbers": ("score",), "pairs": ("False", "True")}
COLUMNS = {"labels": MULTI, "numbers": NUMBERS, "pairs": ["--text_pair_column", "second"]}
SIZES = {"train": 24, "unlabelled": 8, "validation": 30, "test": 40}
ONE_STEP = "--max_steps 1 --warmup_steps 0 --per_device_train_batch_size 32 --learning_rate 1e-3".split()
PLAINLY = [*ONE_STEP, "--control_arm", "false", "--linear_probe", "false", "--freeze_embeddings", "false"]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    """And few calls to measure how long a row takes, which nothing here depends on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLPXFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(latency, "ONE_ROW_CALLS", 5)
        patch.setattr(latency, "BATCH_CALLS", 2)
        yield


@dataclass(frozen=True)
class Task:
    """Files of one kind of task, and two teachers whose answers differ from row to row."""

    kind: str
    rows: dict[str, list[dict[str, str]]]
    files: dict[str, Path]
    teachers: tuple[Path, Path]

    def words(self, *more):
        named = [word for split, path in self.files.items() for word in (f"--{split}_file", path)]
        return [*QUICK, *named, *COLUMNS[self.kind], *more]

    def texts(self, *splits):
        return texts_of([row for split in splits for row in self.rows[split]], self.kind)

    def gold(self, split):
        return gold_of(self.rows[split], self.kind)


def texts_of(rows, kind):
    return [row["text"] for row in rows], [row["second"] for row in rows] if kind == "pairs" else None


def gold_of(rows, kind):
    """As arrays: zeros and ones per label, numbers, or indices of classes."""
    names = LABELS_OF[kind]
    if kind == "labels":
        return np.array([[name in row["labels"].split("|") for name in names] for row in rows], dtype=np.float64)
    if kind == "numbers":
        return np.array([float(row["score"]) for row in rows])
    return np.array([names.index(row["label"]) for row in rows])


def plain(folder, kind, texts, pairs=None):
    """Logits as transformers gives them, in the order of the names."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return plain_of(model, AutoTokenizer.from_pretrained(folder), kind, texts, pairs)


def plain_of(model, tokenizer, kind, texts, pairs=None):
    columns = [model.config.label2id[name] for name in LABELS_OF[kind]]
    with torch.no_grad():
        return model(**tokenizer(texts, pairs, padding=True, return_tensors="pt")).logits.numpy()[:, columns]


def taught_by_labels(source, folder, rows, kind):
    """A copy of a checkpoint whose final layer is a ridge regression of the labels: better than chance, never sure."""
    model, tokenizer = (each.from_pretrained(source) for each in (AutoModelForSequenceClassification, AutoTokenizer))
    read = []
    handle = model.eval().classifier.register_forward_pre_hook(lambda _, given: read.append(given[0].numpy()))
    texts, pairs = texts_of(rows, kind)
    plain_of(model, tokenizer, kind, texts, pairs)
    handle.remove()
    gold = gold_of(rows, kind).reshape(len(rows), -1)
    if kind == "pairs":
        gold = np.concatenate([1 - gold, gold], axis=1)
    fitted = Ridge(alpha=1e-4).fit(read[0], gold if kind == "numbers" else 4 * gold - 2)
    order = [LABELS_OF[kind].index(model.config.id2label[column]) for column in range(len(LABELS_OF[kind]))]
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(fitted.coef_.reshape(len(order), -1)[order]))
        model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_[order]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tiny_checkpoint, tmp_path_factory):
    """Made when asked for: `tasks("pairs")`."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            rows = pair_rows(120, seed=4) if kind == "pairs" else topic_rows(120, seed=4)
            ends = np.cumsum([0, *SIZES.values()]).tolist()
            parts = {name: rows[a:b] for name, a, b in zip(SIZES, ends, ends[1:], strict=False)}
            files = {name: write_csv(folder / f"{name}.csv", part) for name, part in parts.items()}
            files["unlabelled"] = write_csv(
                folder / "unlabelled.csv",
                [{k: row[k] for k in ("text", "second") if k in row} for row in parts["unlabelled"]],
            )
            teachers = tuple(
                taught_by_labels(checkpoint_of(tiny_checkpoint, kind, seed), folder / f"teacher-{seed}", rows, kind)
                for seed in (0, 5)
            )
            made[kind] = Task(kind, parts, files, teachers)
        return made[kind]

    return make


def checkpoint_of(tiny_checkpoint, kind, seed, **options):
    """A classifier of random weights for a kind of task; that of pairs has its labels the other way round."""
    if kind == "numbers":
        options |= {"problem_type": "regression", "num_labels": 1}
    if kind == "labels":
        options |= {"problem_type": "multi_label_classification"}
    return tiny_checkpoint("bert", "classifier", labels=LABELS_OF[kind][::-1], seed=seed, **options)


@pytest.fixture(scope="module")
def student_of(tiny_checkpoint):
    """A student of two layers and of its own weights, whose head is kept as it is."""
    return lambda kind: checkpoint_of(tiny_checkpoint, kind, 7, layers=2)


# -- losses


OWN_LOSSES = {
    "labels": ["--temperature", "3", "--contradiction_weight", "0.25"],
    "labels, mse": ["--kd_loss", "mse", "--similarity_loss", "relational"],
    "numbers": ["--similarity_loss", "relational"],
    "pairs": ["--temperature", "1.5", "--contradiction_weight", "0.25"],
}
ALL_LOSSES = (
    "--hidden_weight 0.5 --relation_weight 2 --num_relation_heads 4 --similarity_weight 0.3 --kd_weight 0.7".split()
)


@pytest.fixture(scope="module")
def runs(tasks, student_of, tmp_path_factory):
    """Runs of one step on one batch of all rows, with all losses; made when asked for."""
    made = {}

    def make(case):
        if case not in made:
            task = tasks(case.split(",")[0])
            own = ["--teacher_name_or_path", task.teachers[0], "--student_name_or_path", student_of(task.kind)]
            words = task.words(*PLAINLY, *own, *ALL_LOSSES, *OWN_LOSSES[case], "--disagreements", "true")
            made[case] = finished("distill", tmp_path_factory.mktemp("runs") / "out", *words)
        return made[case]

    return make


def states_of(model, inputs):
    """Logits, states after each block, and queries, keys and values of the last, of one row in float64."""
    kept, layer = {}, model.bert.encoder.layer[-1].attention.self
    handles = [
        getattr(layer, part).register_forward_hook(lambda m, a, output, part=part: kept.update({part: output[0]}))
        for part in ("query", "key", "value")
    ]
    output = model(**inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return output.logits[0], [states[0] for states in output.hidden_states[1:]], kept


def losses_by_hand(task, student_folder, case):
    """The weighted loss of each term over all rows, with its gradient's norm: row by row, in float64."""
    kind, own = task.kind, OWN_LOSSES[case]
    student, teacher = (
        AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
        for folder in (student_folder, task.teachers[0])
    )
    for model in (student, teacher):  # their columns in the order of the names
        order = [model.config.label2id[name] for name in LABELS_OF[kind]]
        for values in (model.classifier.weight, model.classifier.bias):
            values.data.copy_(values.data[order].clone())
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    temperature = float(own[own.index("--temperature") + 1]) if "--temperature" in own else 2.0
    texts, seconds = task.texts("train", "unlabelled")
    gold = torch.from_numpy(task.gold("train"))
    asked = [(text,) for text in texts] if seconds is None else list(zip(texts, seconds, strict=True))
    inputs = [tokenizer(*one, return_tensors="pt") for one in asked]
    with torch.no_grad():
        theirs = [states_of(teacher, one) for one in inputs]
    sentences = torch.stack([states[-1][0] for _, states, _ in theirs])
    projections = [torch.eye(32, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    terms = dict.fromkeys(("label", "soft_target", "hidden", "relation", "similarity"), 0.0)
    for row, (one, (wanted, taught, attended)) in enumerate(zip(inputs, theirs, strict=True)):
        logits, states, parts = states_of(student, one)
        weight = 1.0
        if row < len(gold):
            weight = 0.25 if "--contradiction_weight" in own and against(kind, wanted, gold[row]) else 1.0
            terms["label"] = terms["label"] + 0.3 * label_loss(kind, logits, gold[row]) / len(gold)
        loss = square_or_divergence(kind, logits, wanted, temperature, mse="mse" in own)
        terms["soft_target"] = terms["soft_target"] + 0.7 * weight * loss / len(inputs)
        for number, (mine, other) in enumerate(((0, 0), (1, 3))):  # of two and of four layers
            error = states[mine] @ projections[number].T - taught[other]
            terms["hidden"] = terms["hidden"] + 0.5 * error.square().mean() / 2 / len(inputs)
        for part in ("query", "key", "value"):
            for head in range(4):
                q, p = (torch.log_softmax(x @ x.T / 8**0.5, 1) for x in
                        (side[part][:, 8 * head : 8 * head + 8] for side in (parts, attended)))  # fmt: skip
                divergence = (p.exp() * (p - q)).sum(1).mean()
                terms["relation"] = terms["relation"] + 2 * divergence / 12 / len(inputs)
        known = sentences[: len(gold)]  # of training rows
        others = torch.stack([sentences[row], *(s for i, s in enumerate(known) if asked[i] != asked[row])])
        mine, known = (
            torch.log_softmax(torch.cosine_similarity(state[None], others) / 0.1, 0)
            for state in (projections[2] @ states[-1][0], sentences[row])
        )
        loss = (known.exp() * (known - mine)).sum() if "relational" in own else -mine[0]
        terms["similarity"] = terms["similarity"] + 0.3 * loss / len(inputs)
    learning = [*student.parameters(), *projections]
    found = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, learning, retain_graph=True, allow_unused=True)
        found[name] = term.item(), float(sum(g.square().sum() for g in gradients if g is not None) ** 0.5)
    return found


def against(kind, wanted, gold):
    if kind == "pairs":
        return int(wanted.argmax()) != int(gold)
    return gold[wanted.argmax()] == 0 if gold.any() else bool(wanted.max() > 0)


def label_loss(kind, logits, gold):
    if kind == "numbers":
        return (logits[0] - gold) ** 2 / 2
    if kind == "pairs":
        return -torch.log_softmax(logits, 0)[int(gold)]
    return -torch.where(gold > 0, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()


def square_or_divergence(kind, logits, wanted, temperature, *, mse):
    if kind == "numbers":
        return (logits[0] - wanted[0]) ** 2 / 2
    if mse:
        return (logits - wanted).square().mean()
    if kind == "pairs":
        p, q = (torch.softmax(each / temperature, 0) for each in (wanted, logits))
        return temperature**2 * (p * (p / q).log()).sum()
    p, q = ((each / temperature).sigmoid() for each in (wanted, logits))
    return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


@pytest.mark.parametrize("case", OWN_LOSSES)
def test_each_loss_is_that_of_its_definition(case, runs, tasks, student_of):
    """As the preflight reports them; a weight for contradictions counts where the teacher is against the label."""
    task = tasks(case.split(",")[0])
    found = runs(case).report["checks"]["preflight"]["terms"]
    expected = losses_by_hand(task, student_of(task.kind), case)
    assert found.keys() == expected.keys()
    for name, (loss, norm) in expected.items():
        assert found[name]["rows"] == (24 if name == "label" else 32)
        assert (found[name]["loss"], found[name]["gradient_norm"]) == pytest.approx((loss, norm), rel=1e-4), name
    told = runs(case).report["checks"]["teacher"]
    if task.kind != "numbers":
        wanted = plain(task.teachers[0], task.kind, *task.texts("train"))
        contradicted = [
            against(task.kind, *each)
            for each in zip(*map(torch.from_numpy, (wanted, task.gold("train"))), strict=True)
        ]
        assert 0 < told["contradicted"] == sum(map(bool, contradicted)) < 24


NEEDLESS = {
    "numbers": {
        "temperature: means nothing for a regression": ["--temperature", "3"],
        "kd_loss: means nothing for a regression": ["--kd_loss", "mse"],
        "contradiction_weight: means nothing for a regression": ["--contradiction_weight", "0.5"],
        "label_smoothing_factor: means nothing for a regression": ["--label_smoothing_factor", "0.1"],
        "min_class_retention: a regression has no classes": ["--min_class_retention", "0.5"],
        "zero_shot_teacher: scores labels; a regression has none": ["--zero_shot_teacher", "nli"],
        "teacher_file: holds probabilities of labels; a regression has none": ["--teacher_file", "train"],
    },
    "pairs": {
        "zero_shot_teacher: reads a text and a hypothesis": ["--zero_shot_teacher", "nli"],
        "text_pair_column: a mean over tokens cannot tell": ["--student", "static", "--num_train_epochs", "3"],
    },
}


@pytest.mark.parametrize("kind", NEEDLESS)
def test_what_means_nothing_is_refused_before_anything_is_written(kind, tasks, tiny_checkpoint, tmp_path):
    task, nli = tasks(kind), tiny_checkpoint("bert", "classifier", labels=("neutral", "entailment", "contradiction"))
    given = {"nli": nli, "train": task.files["train"]}
    for message, own in NEEDLESS[kind].items():
        words = task.words("--teacher_name_or_path", task.teachers[0], *(given.get(word, word) for word in own))
        assert message in refused("distill", tmp_path / "out", *words)
        assert not (tmp_path / "out").exists()


# -- what is kept


@pytest.mark.parametrize("kind", LABELS_OF)
def test_what_is_kept_of_the_teacher(kind, runs, tasks):
    """Scores, agreement, and the rows that the two answer differently, from what transformers says of both."""
    run, task = runs(kind), tasks(kind)
    logits = {
        split: [plain(folder, kind, *task.texts(split)) for folder in (task.teachers[0], run.folder)]
        for split in SIZES
    }
    kept, gold = run.report["checks"]["retention"]["students"]["distilled"], task.gold("test")
    teacher, student = logits["test"]
    scores = {
        "labels": lambda found: sklearn.metrics.f1_score(gold, found > 0, average="micro"),
        "numbers": lambda found: spearmanr(found[:, 0], gold).statistic,
        "pairs": lambda found: np.mean(found.argmax(axis=1) == gold),
    }
    score = scores[kind]
    assert 0 < score(teacher) != score(student)
    assert kept["score"]["value"] == pytest.approx(score(student) / score(teacher), rel=1e-4)
    assert run.report["checks"]["teacher"]["retention"] == kept["score"]["value"]
    agreement = kept["agreement"]
    lines = [json.loads(line) for line in (run.folder / "disagreements.jsonl").read_text().splitlines()]
    listed = {(line["split"], line["row"]) for line in lines}
    assert len(lines) == len(listed)
    assert all("text_pair" in line for line in lines) == (kind == "pairs")
    if kind == "numbers":
        assert agreement["mean_absolute_difference"] == pytest.approx(np.abs(teacher - student).mean(), rel=1e-4)
        assert agreement["spearman"] == pytest.approx(spearmanr(teacher, student).statistic, rel=1e-4)
        errors = [np.abs(each - gold[:, None]).mean() for each in (student, teacher)]
        assert kept["mean_absolute_error"]["value"] == pytest.approx(errors[0] / errors[1], rel=1e-4)
        apart = {(split, row): abs(float(one - other)) for split, (a, b) in logits.items()
                 for row, (one, other) in enumerate(zip(a[:, 0], b[:, 0], strict=True), start=1)}  # fmt: skip
        furthest = sorted(apart, key=apart.get, reverse=True)[:11]  # a tenth of 102
        assert listed == set(furthest)
        assert [line["difference"] for line in lines] == pytest.approx([apart[key] for key in furthest], abs=1e-4)
        return
    answers = {split: [each > 0 if kind == "labels" else each.argmax(axis=1)[:, None] for each in both]
               for split, both in logits.items()}  # fmt: skip
    same = {split: (one == other).all(axis=1) for split, (one, other) in answers.items()}
    assert 0 < agreement["same_answer"] < 1
    assert agreement["same_answer"] == pytest.approx(same["test"].mean())
    assert listed == {(split, row + 1) for split in SIZES for row in np.flatnonzero(~same[split]).tolist()}
    if kind == "labels":
        p, q = (np.stack([expit(each), expit(-each)], axis=-1) for each in (teacher, student))
        assert agreement["same_label"] == pytest.approx((answers["test"][0] == answers["test"][1]).mean())
    else:
        p, q = softmax(teacher, axis=1), softmax(student, axis=1)
    assert agreement["kl"] == pytest.approx((p * np.log(p / q)).sum(axis=-1).mean(), rel=1e-3)
    names, by_place = LABELS_OF[kind], {(line["split"], line["row"]): line for line in lines}
    for (split, row), line in by_place.items():
        assert (line["label"] is None) == (split == "unlabelled")
        assert line["text"] == task.rows[split][row - 1]["text"]
        for who, found in zip(("teacher", "student"), answers[split], strict=True):
            given = found[row - 1]
            assert line[who] == (
                [n for n, yes in zip(names, given, strict=True) if yes] if kind == "labels" else names[int(given[0])]
            )


def test_a_cascade_of_a_teacher_and_its_student_on_pairs(runs, tasks, tmp_path, capsys):
    """Every threshold by hand; the student's folder knows that there is a second text, and the file says where."""
    run, task = runs("pairs"), tasks("pairs")
    models = [run.folder, task.teachers[0]]

    def command(*words):
        with pytest.raises(SystemExit) as left:
            main(["cascade", words[0], *map(str, [*models, *words[1:], "--bf16", "false"])])
        assert left.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    cascade = tmp_path / "cascade.json"
    command("fit", task.files["validation"], "--highest_accuracy", "--output_file", cascade)
    fitted, temperature = json.loads(cascade.read_text()), run.report["checks"]["calibration"]["temperature"]

    def by_hand(split):
        student, teacher = (plain(folder, "pairs", *task.texts(split)) for folder in models)
        return softmax(student / temperature, axis=1), teacher.argmax(axis=1)

    shares, second = by_hand("validation")
    sure, gold = shares.max(axis=1), task.gold("validation")
    best = max(np.mean(np.where(sure < at, second, shares.argmax(axis=1)) == gold) for at in [0, *sure, 1.1])
    assert fitted["accuracy"] == pytest.approx(best)
    assert fitted["student_accuracy"] == pytest.approx(np.mean(shares.argmax(axis=1) == gold))
    assert fitted["teacher_accuracy"] == pytest.approx(np.mean(second == gold))
    content = {**fitted, "min_probability": float(np.median(sure))}  # so that both have something to answer
    cascade.write_text(json.dumps(content))
    command("predict", task.files["test"], "--cascade", cascade, "--output_file", tmp_path / "out.csv")
    shares, second = by_hand("test")
    sent = shares.max(axis=1) < content["min_probability"]
    assert 0 < sent.sum() < len(sent)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["teacher" if each else "student" for each in sent]
    given = np.where(sent, second, shares.argmax(axis=1))
    assert [row["predicted_label"] for row in rows] == [LABELS_OF["pairs"][each] for each in given]
    told = json.loads(command("evaluate", task.files["test"], "--cascade", cascade))
    assert told["cascade"]["accuracy"] == pytest.approx(np.mean(given == task.gold("test")))
    assert told["sent"] == pytest.approx(sent.mean())


# -- several teachers, chains and the transfer curve


@pytest.fixture
def taught(monkeypatch):
    """What students were given to learn, one entry for each of their teachers: logits of all rows."""
    seen, made = [], TransferRows.__init__

    def record(self, run, panel):
        made(self, run, panel)
        seen.append(np.array(self.logits, dtype=np.float64))

    monkeypatch.setattr(TransferRows, "__init__", record)
    return seen


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The models of all arms by name, each in a folder."""
    seen, scored = {}, arms_module._scored

    def keep(name, seed, model, tokenizer, *rest):
        seen[name] = tmp_path / "kept" / name
        model.save_pretrained(seen[name])
        tokenizer.save_pretrained(seen[name])
        return scored(name, seed, model, tokenizer, *rest)

    monkeypatch.setattr(arms_module, "_scored", keep)
    return seen


def test_two_teachers_of_pairs_with_a_chain_and_a_curve(tasks, taught, trained, tmp_path):
    """Temperatures and weights by other means than those of the package; the curve ends with the result."""
    task = tasks("pairs")
    own = ["--teacher_name_or_path", f"{task.teachers[0]},{task.teachers[1]}", "--teacher_weights", "learnt"]
    own += ["--generations", "2", "--transfer_curve", "0,4"]
    run = finished("distill", tmp_path / "out", *task.words(*PLAINLY, *own))
    gold = task.gold("validation")
    asked = [plain(folder, "pairs", *task.texts("validation")).astype(np.float64) for folder in task.teachers]

    def loss_of(shares):
        return -np.log(shares[np.arange(len(gold)), gold]).mean()

    def loss_at(logits, log):  # with the prior of the inverse temperature
        return loss_of(softmax(logits / np.exp(log), axis=1)) + (np.exp(-log) + log) / len(gold)

    found_at = [minimize_scalar(lambda log, each=each: loss_at(each, log), bounds=(-3, 3)).x for each in asked]
    temperatures = np.exp(found_at)
    shares = [softmax(each / t, axis=1) for each, t in zip(asked, temperatures, strict=True)]
    parts = np.linspace(0, 1, 2001)
    part = parts[np.argmin([loss_of(part * shares[0] + (1 - part) * shares[1]) for part in parts])]
    assert 0.05 < part < 0.95
    found = [run.arm(f"teacher {number}")["details"] for number in (1, 2)]
    assert [each["temperature"] for each in found] == pytest.approx(temperatures, rel=1e-3)
    assert [each["weight"] for each in found] == pytest.approx([part, 1 - part], abs=2e-3)
    every = task.texts("train", "unlabelled")
    mixed = sum(each["weight"] * softmax(plain(folder, "pairs", *every) / each["temperature"], axis=1)
                for folder, each in zip(task.teachers, found, strict=True))  # fmt: skip
    np.testing.assert_allclose(softmax(taught[0], axis=1), mixed, atol=1e-5)
    np.testing.assert_allclose(taught[1], plain(trained["generation-1"], "pairs", *every), atol=1e-5)
    points = run.report["checks"]["transfer_curve"]
    assert [(point["unlabelled_rows"], point["steps"]) for point in points] == [(0, 1), (4, 1), (8, 1)]
    assert len({point["test"]["loss"] for point in points}) == 3
    assert points[-1]["test"] == run.arm("distilled")["metrics"]["test"]


# -- static students


def static_logits(folder, ids):
    """Mean of token vectors and a linear head, of one row of token ids."""
    state, head = (load_file(folder / name) for name in ("model.safetensors", "head.safetensors"))
    ignored = json.loads((folder / "config.json").read_text())["ignored_token_ids"]
    table = state["embeddings"] * state.get("weights", torch.ones(len(state["embeddings"])))[:, None]
    known = [token for token in ids if token not in ignored]
    mean = table[known].mean(dim=0) if known else torch.zeros(table.shape[1])
    return (head["head.0.weight"] @ mean + head["head.0.bias"]).numpy()


def windows_of(tokenizer, text, room, overlap):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[a:b] for a, b in window_spans(len(ids), room, overlap, 8)]


def test_a_static_student_of_windows_behind_an_assistant(tasks, taught, trained, tmp_path):
    """The teacher, an assistant and an earlier generation: each answers a row by the mean over its windows."""
    task = tasks("numbers")
    words = task.words(*ONE_STEP, "--teacher_name_or_path", task.teachers[0], "--student", "static")
    words[words.index("--max_length") + 1] = "8"
    chain = ["--assistant_num_layers", "2", "--generations", "2", "--control_arm", "false"]
    windows = ["--long_texts", "sliding_window", "--window_overlap", "1"]
    run = finished("distill", tmp_path / "out", *words, *chain, *windows)
    texts, _ = task.texts("train", "unlabelled")
    tokenizer = AutoTokenizer.from_pretrained(task.teachers[0])
    several = [windows_of(tokenizer, text, 6, 1) for text in texts]
    assert len({len(one) for one in several}) > 2
    assert run.report["data"]["long_texts"]["train"]["windows_per_row"] == np.mean([len(one) for one in several[:24]])
    for logits, folder in zip(taught[:2], (task.teachers[0], trained["assistant-2"]), strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            rows = [[model(torch.tensor([framed(tokenizer, ids)])).logits[0, 0] for ids in one]
                    for one in several]  # fmt: skip
        np.testing.assert_allclose(logits[:, 0], [np.mean(row) for row in rows], atol=1e-5)
    mean = [np.mean([static_logits(trained["generation-1"], ids) for ids in one]) for one in several]
    np.testing.assert_allclose(taught[2][:, 0], mean, atol=1e-5)
    answers = [np.mean([static_logits(run.folder, ids) for ids in windows_of(tokenizer, text, 6, 1)])
               for text in task.texts("test")[0]]  # fmt: skip
    error = np.abs(np.array(answers) - task.gold("test")).mean()
    assert run.arm("distilled")["metrics"]["test"]["mean_absolute_error"] == pytest.approx(error, rel=1e-5)


# -- the smallest student


@pytest.mark.parametrize("kind", ["numbers", "pairs"])
def test_the_smallest_student(kind, tasks, student_of, tmp_path, monkeypatch):
    """A share of Spearman's correlation, of numbers; of pairs without a static student, which cannot read them."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # without which there are few int8 forms
    task = tasks(kind)
    rows = [row for split in SIZES for row in task.rows[split]]
    teacher = taught_by_labels(student_of(kind), tmp_path / "teacher", rows, kind)
    search = ["--search", "--keep", "0.1", "--search_budget", "20"]
    words = task.words(*ONE_STEP, "--teacher_name_or_path", teacher, *search, "--control_arm", "false")
    if kind == "numbers":
        message = refused("distill", tmp_path / "no", *words)
        assert "search: needs a score of which a share can be kept: --metric_for_best_model spearman" in message
        assert not (tmp_path / "no").exists()
        words += ["--metric_for_best_model", "spearman"]
    run = finished("distill", tmp_path / "out", *words)
    found = run.report["checks"]["search"]
    logits, gold = plain(teacher, kind, *task.texts("validation")), task.gold("validation")
    score = spearmanr(logits[:, 0], gold).statistic if kind == "numbers" else np.mean(logits.argmax(axis=1) == gold)
    assert found["target"]["reference"] == pytest.approx(score, abs=1e-4)
    assert found["target"]["score"] == pytest.approx(0.1 * score, abs=1e-4)
    static = {"static"} if kind == "numbers" else set()
    assert {each["name"] for each in found["tried"]} == {"1 layer", "1 layer, half as wide"} | static
    passed = [
        each for each in found["tried"] if each["scores"] and each["scores"][-1]["score"] >= found["target"]["score"]
    ]
    quickest = min(passed, key=lambda each: each["latency_ms"])
    assert found["chosen"] == quickest["name"]


# -- adapters that stand before the text


@pytest.mark.parametrize(("adapter", "family", "kind"), [("prefix", "bert", "labels"), ("prompt", "gpt2", "numbers")])
def test_windows_behind_virtual_tokens(adapter, family, kind, tasks, tiny_checkpoint, tmp_path):
    """Each window of a row has the virtual tokens before it, and the row's answer is the mean."""
    task, base = tasks(kind), tiny_checkpoint(family)
    words = task.words(*ONE_STEP, "--model_name_or_path", base, "--adapter", adapter, "--num_virtual_tokens", "3")
    place = words.index("--unlabelled_file")
    del words[place : place + 2]
    words[words.index("--max_length") + 1] = "6"
    words += ["--long_texts", "sliding_window", "--window_overlap", "1", "--control_arm", "false"]
    run = finished("adapters", tmp_path / "out", *words)
    loaded = load_adapter(run.folder / "adapter", base=str(base))
    room = 6 - loaded.tokenizer.num_special_tokens_to_add()
    several = [windows_of(loaded.tokenizer, text, room, 1) for text in task.texts("test")[0]]
    assert max(map(len, several)) > 2

    def answer(ids):
        whole = torch.tensor([framed(loaded.tokenizer, ids)])
        with torch.no_grad():
            return loaded.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0].numpy()

    logits, gold = np.array([np.mean([answer(ids) for ids in one], axis=0) for one in several]), task.gold("test")
    found = run.report["metrics"]["test"]
    if kind == "numbers":
        assert found["loss"] == pytest.approx(np.mean((logits[:, 0] - gold) ** 2) / 2, rel=1e-4)
    else:
        assert found["loss"] == pytest.approx(np.mean(np.logaddexp(0, logits) - gold * logits), rel=1e-4)
