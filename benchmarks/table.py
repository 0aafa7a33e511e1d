"""Markdown tables from the results files, so that no figure is typed by hand.

python benchmarks/table.py benchmarks/results/finetune_small.json benchmarks/results/distill_small.json
python benchmarks/table.py                    all finished results that are not of smoke size
python benchmarks/table.py --page docs/measured.md    also puts them in the place of the tables at the end of the page
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DASH = "–"
ELSEWHERE = "†"
"""Stands beside what was measured on another machine than the rest."""
SCORES = {"accuracy": "accuracy", "micro_f1": "micro-F1", "macro_f1": "macro-F1"}
METHODS = {
    "full": "all weights, random head",
    "lp-ft": "all weights, head from a linear probe",
    "whole-probe": "the same, the probe at its own size",
    "features": "frozen features, logistic regression",
    "last-layer": "the same, of the last layer",
    "lora": "LoRA",
    "prefix": "prefix tuning",
    "layernorm": "LayerNorm tuning",
    "bitfit": "BitFit",
    "r-drop": "all weights, head from a linear probe, R-Drop",
    "lora-r-drop": "LoRA, R-Drop",
    "taught": "all weights, taught by three of the others",
    "stock": "stock Trainer, float32",
}


def share(spread: Mapping[str, Any] | None) -> str:
    """Mean accuracy in percent, with the standard deviation where there are several seeds."""
    if spread is None:
        return DASH
    if spread["deviation"] is None:
        return f"{100 * spread['mean']:.1f}"
    return f"{100 * spread['mean']:.1f} ± {100 * spread['deviation']:.1f}"


def verdict(figure: Mapping[str, Any] | None, form: Callable[[float], str]) -> str:
    """A figure and whether its target is met."""
    if figure is None:
        return DASH
    sign, beyond = ("≤", "just above") if figure["at_most"] else ("≥", "just below")
    value, target = form(figure["value"]), form(figure["target"])
    if not figure["met"] and value == target:
        value = f"{beyond} {value}"
    return f"{value} ({'met' if figure['met'] else 'missed'}: {sign} {target})"


def times(value: float) -> str:
    """A ratio of speeds."""
    return f"{value:.2f}x"


def percent(value: float) -> str:
    """A share in percent, with one digit."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of scores, in hundredths."""
    return f"{100 * value:+.1f} points"


def count(number: int | None) -> str:
    """A number of parameters."""
    if number is None:
        return DASH
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"


def seconds(spread: Mapping[str, Any] | None) -> str:
    """Median seconds."""
    return DASH if spread is None else f"{spread['median']:.0f} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def finetune_tables(found: Mapping[str, Any]) -> str:
    """Headline figures per data set, then milliseconds per step by switch."""
    heads = ["data", "rows", "nlpxfer", "stock Trainer", "steps per second", "time to equal accuracy"]
    heads += ["time of all epochs", "of GEMM peak"]
    rows = []
    for name, item in found["summary"].items():
        reached = item.get("time_to_accuracy", {})
        peak = item.get("share_of_peak")
        rows.append(
            [
                name,
                str(item["rows"]["train"]),
                *(share((item.get(side) or {}).get("test_accuracy")) for side in ("nlpxfer", "stock")),
                verdict(item.get("step_ratio"), times),
                verdict(reached.get("ratio"), percent),
                percent(reached["whole_run_ratio"]) if reached else DASH,
                DASH if peak is None else f"{percent(peak['nlpxfer'])}; stock {percent(peak['stock'])}",
            ]
        )
    text = table(heads, rows)
    ablations = {name: found["cells"].get(f"{name}/ablation") for name in found["summary"]}
    if all(ablations.values()):
        labels = list(next(iter(ablations.values()))["milliseconds_per_step"])
        steps = [[x, *(f"{a['milliseconds_per_step'][x]:.0f} ms" for a in ablations.values())] for x in labels]
        text += "\n" + table(["switched on", *ablations], steps)
    return text


def distill_tables(found: Mapping[str, Any]) -> str:
    """Accuracy and seconds of each side, then the ratios with their targets."""
    arms = {
        "nlpxfer": "nlpxfer",
        "trainer": "teacher in a Trainer's loop",
        "textbrewer": "TextBrewer",
        "textbrewer-cached": "TextBrewer, cached logits",
        "control": "control: no teacher",
    }
    text = ""
    for name, item in found["summary"].items():
        rows = []
        for key, shown in arms.items():
            if arm := item.get(key):
                ratio = item.get("time_ratio", {}).get(key)
                rows.append(
                    [
                        name,
                        shown,
                        share(arm["test_accuracy"]),
                        seconds(arm["seconds"]),
                        verdict(ratio, percent) if ratio else DASH,
                    ]
                )
        text += table(["data", "student", "test accuracy", "seconds", "nlpxfer's share of its time"], rows) + "\n"
    heads = ["data", "teacher", "kept by the student", "rows per second", "gain over the control"]
    rows = []
    for name, item in found["summary"].items():
        gain = item.get("gain")
        interval = DASH
        if gain:
            points = [100 * gain[key] for key in ("gain", "low", "high")]
            interval = f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}] ({gain['call']})"
        teacher = item.get("teacher")
        rows.append(
            [
                name,
                f"{100 * teacher['test_accuracy']:.1f}" if teacher else DASH,
                verdict(item.get("retention"), percent),
                verdict(item.get("speed_ratio"), times),
                interval,
            ]
        )
    text += table(heads, rows)
    rows = []
    for name, item in found["summary"].items():
        for student, cost in item.get("cost", {}).items():
            spent = [f"{value:.0f} s" for value in cost["seconds"]]
            rows.append([name, student, *spent, verdict(cost, percent)])
    heads = ["data", "student, 5 epochs", "teacher runs once, cached", "teacher runs at each step", "share"]
    return text + ("\n" + table(heads, rows) if rows else "")


def gpu_tables(found: Mapping[str, Any]) -> str:
    """Rows per second and share of the GEMM peak."""
    rows = [
        [key, f"{cell['rows_per_second']['median']:.0f}", percent(cell["share_of_peak"])]
        for key, cell in found["cells"].items()
    ]
    return table(["what", "rows per second", "of GEMM peak"], rows)


def methods_tables(found: Mapping[str, Any]) -> str:
    """A table per data set: score, trained parameters, seconds and memory of each method; then the targets."""
    text, targets = "", []
    for name, item in found["summary"].items():
        memory = f"memory {ELSEWHERE}" if "machine" in found["cells"].get(f"{name}/memory", {}) else "memory"
        metrics = ["accuracy", "macro_f1"] if item["metric"] != "micro_f1" else ["micro_f1", "macro_f1"]
        shown = [SCORES[metric] + (" *" if metric == item["metric"] else "") for metric in metrics]
        rows = [
            [
                METHODS[method] + (f" {ELSEWHERE}" if row["elsewhere"] else ""),
                *(share(row["test"].get(metric)) for metric in metrics),
                count(row["trained_parameters"]),
                DASH if row.get("saved_bytes") is None else f"{row['saved_bytes'] / 1e6:.1f} MB",
                f"{row['train_seconds']['median']:.1f} s",
                DASH if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f} MB",
            ]
            for method, row in item["methods"].items()
        ]
        rows_of = item["rows"] or {}
        heads = [f"{name} ({rows_of.get('train', DASH)} rows)", *shown, "trained", "saved", "seconds", memory]
        text += table(heads, rows) + "\n"
        for what, figure in item["targets"].items():
            targets.append([name, what, verdict(figure, points if "points" in what else percent)])
    return text + table(["data", "target", "value"], targets)


def predict_tables(found: Mapping[str, Any]) -> str:
    """Rows per second and accuracy of each side, then memory over a long file."""
    sides = {
        "pipeline float32": "pipeline, float32, batches of {float32}",
        "pipeline bfloat16": "pipeline, bfloat16, batches of {bfloat16}",
        "torch": "predict",
        "onnx": "predict, ONNX",
        "int8": "predict, ONNX int8",
    }
    text = ""
    for name, item in found["summary"].items():
        if rates := found["cells"].get(f"{name}/rates"):
            rows = []
            for side, shown in sides.items():
                times_faster = times(rates["ratios"][side]["median"]) if side in rates["ratios"] else DASH
                judged = item["speed"].get(side)
                rows.append(
                    [
                        name,
                        shown.format(**rates["batch_sizes"]),
                        f"{rates['rates'][side]['rows_per_second']:.0f}",
                        verdict(judged, times) if judged else times_faster,
                        f"{100 * rates['accuracy'][side]:.1f}",
                        percent(rates["same_label_as_pipeline"][side]),
                    ]
                )
            heads = ["data", "side", "rows per second", "of the pipeline's in float32", "test accuracy", "same label"]
            text += table(heads, rows) + "\n"
    rows = []
    for name, item in found["summary"].items():
        for side, figure in item["memory"].items():
            cell = found["cells"][f"{name}/memory/{side}"]
            sizes = [f"{cell[key] / 1e6:.0f} MB" for key in ("early_bytes", "late_bytes")]
            shown = [name, sides[side], f"{cell['rows']:,}", f"{cell['rows_per_second']:.0f}", *sizes]
            rows.append([*shown, verdict(figure, times)])
    heads = ["data", "side", "rows", "rows per second", "memory early", "memory late", "growth"]
    return text + (table(heads, rows) if rows else "")


STUDENT_TEXTS = {
    "": "all labels",
    "mixed-": "all labels, and mixtures of their texts",
    "more-": "all labels, and other texts without",
    "few-": "few labels, and other texts without",
}
STUDENT_PEERS = {
    "textbrewer": ("TextBrewer, as many layers as the first student", None),
    "sentence-transformers": ("sentence-transformers, as many layers, and logistic regression", None),
    "model2vec": ("model2vec and logistic regression", "static"),
}
"""Tool -> what it is, and which student of nlpxfer it stands beside; None: the first one."""


def span(values: Sequence[float], form: str = ".1f") -> str:
    """The lowest and the highest of some figures, or the only one."""
    ends = list(dict.fromkeys(format(value, form) for value in (min(values), max(values))))
    return " to ".join(ends)


def students_at_a_glance(found: Mapping[str, Any]) -> str:
    """For each student and kind of texts the range over the data sets of what it keeps, and of its gain."""
    items = list(found["summary"].values())
    students = dict.fromkeys(student for item in items for student in item["students"])
    rows = []
    for student, (prefix, texts) in itertools.product(students, STUDENT_TEXTS.items()):
        each = [known[student] for item in items if student in (known := item.get(f"{prefix}students", {}))]
        if not each:
            continue
        kept = [item["kept"] for item in each]
        shown = f"{span([100 * (one['value'] if isinstance(one, Mapping) else one) for one in kept])} %"
        if isinstance(kept[0], Mapping):
            shown += f" (≥ {percent(kept[0]['target'])}: {sum(one['met'] for one in kept)} of {len(kept)})"
        gains = [item["gain"] for item in each]
        clear = sum(gain["call"] == "positive" for gain in gains)
        gained = f"{span([100 * gain['gain'] for gain in gains], '+.1f')} (clear: {clear} of {len(gains)})"
        rows.append([student, texts, shown, gained])
    return table(["student", "what the teacher labels", "kept of the teacher", "points above the control"], rows)


def students_tables(found: Mapping[str, Any]) -> str:
    """What each student keeps of its teacher, its gain over the control arm, and speeds with tokenising."""
    text = students_at_a_glance(found) + "\n"
    for prefix, labels in STUDENT_TEXTS.items():
        rows = []
        for name, item in found["summary"].items():
            for student, each in item.get(f"{prefix}students", {}).items():
                gain = each["gain"]
                shown = [100 * gain[key] for key in ("gain", "low", "high")]
                kept, ratio = each["kept"], each["speed_ratio"]
                rows.append(
                    [
                        name,
                        str(each["rows"]["train"]),
                        student + (f" {ELSEWHERE}" if "machine" in each else ""),
                        *(share(each[arm]["test_accuracy"]) for arm in ("teacher", "distilled", "control")),
                        verdict(kept, percent) if isinstance(kept, Mapping) else percent(kept),
                        f"{shown[0]:+.1f} [{shown[1]:+.1f}, {shown[2]:+.1f}] ({gain['call']})",
                        verdict(ratio, times) if isinstance(ratio, Mapping) else times(ratio),
                        f"{each['distilled']['latency']['one_row']['total_p50_ms']:.2f} ms",
                    ]
                )
        heads = [
            "data",
            "labelled",
            f"student ({labels})",
            "teacher",
            "distilled",
            "control",
            "kept",
            "gain",
            "rows per second, of the teacher's",
            "one row",
        ]
        text += table(heads, rows) + "\n" if rows else ""
    others = [students_beside_others(found), students_speed(found), students_in_int8(found)]
    return (text + "\n".join(part for part in others if part)).rstrip("\n") + "\n"


def students_speed(found: Mapping[str, Any]) -> str:
    """Rows per second of static students, with tokenising."""
    rows = []
    for name, item in found["summary"].items():
        for side, rate in (item["speed"] or {"rates": {}})["rates"].items():
            ratio = item["speed"]["ratios"].get(side)
            faster = DASH if ratio is None else times(ratio["median"])
            faster = verdict(item["static_speed"], times) if side == "static" else faster
            rows.append([name, side, f"{rate['rows_per_second']:.0f}", faster])
    return table(["data", "side", "rows per second", "of the teacher's"], rows) if rows else ""


def students_in_int8(found: Mapping[str, Any]) -> str:
    """What int8 weights cost a student of layers, and what they bring."""
    rows = []
    for name, item in found["summary"].items():
        if cell := item.get("int8"):
            student = cell["student"] + (f" {ELSEWHERE}" if "machine" in cell else "")
            faster = [cell["ratios"][side]["median"] for side in ("float32", "int8")]
            scores = [f"{100 * cell['accuracy'][side]:.1f}" for side in ("teacher", "float32", "int8")]
            rows.append([name, student, *scores, percent(cell["same_label"]), *map(times, faster)])
    heads = [
        "data",
        "student",
        "teacher",
        "float32",
        "int8",
        "same label",
        "rows per second, of the teacher's",
        "int8",
    ]
    return table(heads, rows) if rows else ""


def students_beside_others(found: Mapping[str, Any]) -> str:
    """What students of other tools keep of their teachers, beside nlpxfer's of as many layers, or its static one."""
    rows = []
    for name, item in found["summary"].items():
        for (prefix, texts), (key, (side, like)) in itertools.product(STUDENT_TEXTS.items(), STUDENT_PEERS.items()):
            other = item["peers"].get(prefix + key)
            if other is None:
                continue
            teacher = other.get("teacher", found["cells"][f"{name}/teacher"]["test_accuracy"]["mean"])
            students = item.get(f"{prefix}students", {})
            own = students.get(like or next(iter(item["students"]), None))
            kept = [one and one["kept"] for one in (own, other | {"kept": other["test_accuracy"] / teacher})]
            shown = [percent(one["value"] if isinstance(one, Mapping) else one) if one else DASH for one in kept]
            scores = [f"{100 * score:.1f}" for score in (teacher, other["test_accuracy"])]
            side += f" {ELSEWHERE}" if "machine" in other else ""
            rows.append([name, side, texts, *scores, shown[1], shown[0]])
    heads = ["data", "side", "what it learns from", "its teacher", "test accuracy", "kept", "nlpxfer keeps"]
    return table(heads, rows) if rows else ""


TABLES = {
    "finetune": finetune_tables,
    "finetune_methods": methods_tables,
    "distill": distill_tables,
    "predict": predict_tables,
    "students": students_tables,
    "gpu": gpu_tables,
}


def caption(found: Mapping[str, Any]) -> str:
    """One line on where the figures come from."""
    machine, versions = found["machine"], found["versions"]
    others = [cell["machine"] for cell in found["cells"].values() if "machine" in cell]
    place = _place(machine) + "".join(f"; {ELSEWHERE} {name}" for name in dict.fromkeys(map(_place, others)))
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    skipped = f" Left out: {', '.join(found['skipped'])}." if found["skipped"] else ""
    return f"`{found['command']}`, {found['date'][:10]}, {place}, {libraries}.{skipped}\n"


def _place(machine: Mapping[str, Any]) -> str:
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    return machine["gpu"] or f"{cores}, {machine['processor']}, {machine['instructions']}"


def main(argv: Sequence[str] | None = None) -> str:
    """Write the tables of the named files (default: all in results/) and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, metavar="FILE", help="default: all finished ones")
    parser.add_argument("--page", type=Path, help="a Markdown page: all from its first heading ### on is replaced")
    asked = parser.parse_args(argv)
    default = [p for p in sorted(RESULTS.glob("*.json")) if not p.name.endswith((".partial.json", "_smoke.json"))]
    tables = []
    for path in asked.results or default:
        found = json.loads(path.read_text(encoding="utf-8"))
        heading = f"### {found['benchmark']}, {found['scale']}"
        tables.append(f"{heading}\n\n{TABLES[found['benchmark']](found)}\n{caption(found)}")
    text = "\n".join(tables)
    if asked.page:
        above, heading, _ = asked.page.read_text(encoding="utf-8").partition("\n### ")
        if not heading:
            parser.error(f"{asked.page} has no heading ### that its tables begin with")
        asked.page.write_text(f"{above}\n{text}", encoding="utf-8")
    sys.stdout.write(text)
    return text


if __name__ == "__main__":
    main()
