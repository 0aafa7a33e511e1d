"""The `nlpxfer` command, and how every entry point turns errors into messages and exit codes.

    nlpxfer methods                               the transfer methods, as a table
    nlpxfer run distill [config.yaml] [--key …]   a recipe, from the checkout or from the installed package
    nlpxfer predict MODEL FILE --output_file OUT  label the rows of a file of any length
    nlpxfer evaluate MODEL FILE                   score a classifier on a labelled file
    nlpxfer cascade fit STUDENT TEACHER FILE …    the student answers where it is sure, else the teacher
    nlpxfer merge BUNDLE OUT                      fold an adapter into its base: an ordinary model folder
    nlpxfer export MODEL OUT [--int8]             write a classifier as an ONNX folder
    nlpxfer push FOLDER --hub_model_id ME/NAME    push a finished output folder to the Hub

`python -m nlpxfer` is the same.

Exit codes: 0 done, 2 a fault that the user can mend (a message, no traceback), 3 the result misses a target that was
set for it, 75 interrupted (the run can be resumed), 1 a fault of nlpxfer (a traceback). `accelerate launch` turns 2, 3
and 75 into 1: see docs/scaling.md.

Nothing heavy is imported before a command needs it: `nlpxfer --version` must not wait for torch.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import io
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from nlpxfer import __version__
from nlpxfer.errors import INTERRUPTED_EXIT_CODE, USER_FAULT_EXIT_CODE, ConfigError, NlpxferError
from nlpxfer.problem import REGRESSION
from nlpxfer.recipes import recipe_file

__all__ = ["main", "run_main"]

_REFUSALS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
"""What the system says of a path that cannot be used, or of a full disk: that is the user's to mend."""
PATIENCE = 10.0
"""Seconds in which the first process of a machine comes to an error that the others have too."""
_AS_IN_TRAINING = "default: as in training where the file has it, else"


def run_main(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> NoReturn:
    """Call an entry point and leave the process with its exit code; the last line of each recipe.

    Args:
        main: Takes the words of the command line, or None for `sys.argv[1:]`. What it returns is dropped.
        argv: Handed to `main`.

    Raises:
        SystemExit: Always. 0 when `main` returns; the error's exit code after a `NlpxferError`, 2 after the system
            refused a file; 75 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a label that the terminal cannot show must not end a run
            stream.reconfigure(errors="replace")
    try:
        with _stopping_on_signals():
            main(argv)
    except NlpxferError as error:
        _tell(f"{error}\n", stopped=error.exit_code == INTERRUPTED_EXIT_CODE)
        _leave(error.exit_code)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        _tell(f"{error.filename or 'A file'}: {error.strerror}.\n")
        _leave(USER_FAULT_EXIT_CODE)
    except KeyboardInterrupt:
        _tell("Interrupted.\n", stopped=True)
        _leave(INTERRUPTED_EXIT_CODE)
    _leave(0)


def _tell(message: str, *, stopped: bool = False) -> None:
    """Write the message that a program ends with: once, where several processes of a launcher end with it.

    The first process of each machine writes at once and leaves; its launcher then ends the others, which meanwhile
    wait. One that is still there after that has a message of its own, and writes it. A stop is for all of them.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        if stopped:
            return
        time.sleep(PATIENCE)
    sys.stderr.write(message)


def _leave(code: int) -> NoReturn:
    """End the program; where processes have met, without Python's own last steps, in which threads of theirs abort."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) end the program as Ctrl-C does: unfinished files are removed.

    Training has its own way. A signal that is ignored, as SIGHUP under nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in known}
    heard = [number for number in known if before[number] != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The `nlpxfer` command.

    Args:
        argv: Words of the command line without the program's name; default `sys.argv[1:]`.

    Raises:
        SystemExit: Always, with the exit code.
    """
    run_main(_dispatch, argv)


def _dispatch(argv: Sequence[str] | None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    # Not argparse.REMAINDER, which drops a leading "--": what follows the method, --help included, is the recipe's.
    runs = words[:1] == ["run"] and not "".join(words[1:2]).startswith("-")
    split = 2 if runs else len(words)
    asked = _parser().parse_args(words[:split])
    if asked.command == "run":
        _run(asked.method, words[split:])
    elif asked.command == "push":
        _push(asked)
    elif asked.command == "merge":
        _merge(asked)
    elif asked.command in ("predict", "evaluate"):
        _classify(asked)
    elif asked.command == "cascade":
        _cascade(asked)
    elif asked.command == "export":
        _export(asked)
    else:
        _methods()


def _path(word: str) -> Path:
    """A path, its home folder written out: no shell does so behind an equals sign."""
    return Path(word).expanduser()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlpxfer", description="Measured knowledge transfer between language models."
    )
    parser.add_argument("--version", action="version", version=f"nlpxfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("methods", help="show the transfer methods")
    run = commands.add_parser("run", help="run a recipe", usage="nlpxfer run METHOD [config.yaml] [--key value ...]")
    run.add_argument("method", metavar="METHOD", help="one of those that `nlpxfer methods` shows")
    predict = commands.add_parser("predict", help="label the rows of a file of any length")
    evaluate = commands.add_parser("evaluate", help="score a classifier on a labelled file")
    for command in (predict, evaluate):
        command.add_argument("model", metavar="MODEL", help="output folder of a recipe or of export, or a Hub id")
        command.add_argument("--base", metavar="FOLDER", help="base of an adapter, where it was a local folder")
        command.add_argument("file", metavar="FILE", type=_path, help="csv, tsv, jsonl or parquet")
        command.add_argument("--text_column", metavar="NAME", help=f"column with the text; {_AS_IN_TRAINING} text")
        command.add_argument(
            "--text_pair_column", metavar="NAME", help="column with a second text; default: as in training"
        )
        command.add_argument("--max_length", type=int, metavar="N", help="tokens read; default: as in training")
        command.add_argument("--batch_size", type=int, metavar="N", help="rows per batch of longest rows")
        command.add_argument("--bf16", choices=("true", "false"), help="default: where it was measured to be faster")
        command.add_argument("--label_separator", metavar="S", help="between labels; default: as in training, else |")
        command.add_argument("--int8", action="store_true", help="take the int8 weights of an exported model")
    predict.add_argument("--output_file", required=True, type=_path, metavar="OUT", help="csv, tsv, jsonl or parquet")
    abstain = "mark rows or labels below it as abstained from; default: the model's own, if it has one"
    predict.add_argument("--min_probability", type=float, metavar="P", help=abstain)
    predict.add_argument("--all_probabilities", action="store_true", help="a column per label")
    gold = f"column with the gold label; {_AS_IN_TRAINING} label"
    evaluate.add_argument("--label_column", metavar="NAME", help=gold)
    _add_cascade(commands.add_parser("cascade", help="a small model where it is sure, else a large one"))
    merge = commands.add_parser("merge", help="fold an adapter into its base")
    merge.add_argument("bundle", metavar="BUNDLE", help="adapter folder, such as runs/adapters/adapter")
    merge.add_argument("out", metavar="OUT", type=_path, help="new folder for the whole model")
    merge.add_argument("--base", metavar="FOLDER", help="base of the adapter, where it was a local folder")
    export = commands.add_parser("export", help="write a classifier as an ONNX folder")
    export.add_argument("model", metavar="MODEL", help="output folder of a recipe, or any classifier on the Hub")
    export.add_argument("out", metavar="OUT", type=_path, help="folder to write; it must not exist")
    export.add_argument("--base", metavar="FOLDER", help="base of an adapter, where it was a local folder")
    export.add_argument("--int8", action="store_true", help="also write int8 weights")
    export.add_argument("--opset", type=int, metavar="N", help="ONNX operator set; default: the exporter's choice")
    export.add_argument("--texts", type=_path, metavar="FILE", help="csv, tsv, jsonl or parquet to compare on")
    first = f"column of FILE with the text; {_AS_IN_TRAINING} text"
    export.add_argument("--text_column", metavar="NAME", help=first)
    second = "column of FILE with a second text; default: as in training"
    export.add_argument("--text_pair_column", metavar="NAME", help=second)
    export.add_argument("--max_changed", type=float, metavar="SHARE", help="fail if int8 changes more predictions")
    push = commands.add_parser("push", help="push a finished output folder to the Hub")
    push.add_argument("folder", metavar="FOLDER", type=_path, help="output folder of a recipe")
    push.add_argument("--hub_model_id", required=True, metavar="ID", help="repository on the Hub, as me/my-classifier")
    push.add_argument("--public", action="store_true", help="make a new repository public; default: private")
    return parser


def _add_cascade(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    fit = steps.add_parser("fit", help="find the threshold on labelled rows and write cascade.json")
    evaluate = steps.add_parser("evaluate", help="score against cost on labelled rows")
    predict = steps.add_parser("predict", help="label the rows of a file of any length")
    for step in (fit, evaluate, predict):
        step.add_argument("student", metavar="STUDENT", help="small model: output folder of a recipe or of export")
        step.add_argument("teacher", metavar="TEACHER", help="large model")
        step.add_argument("file", metavar="FILE", type=_path, help="csv, tsv, jsonl or parquet")
        step.add_argument("--text_column", metavar="NAME", help=f"column with the text; {_AS_IN_TRAINING} text")
        step.add_argument(
            "--text_pair_column", metavar="NAME", help="column with a second text; default: as in training"
        )
        step.add_argument("--batch_size", type=int, metavar="N", help="rows per batch of longest rows")
        bf16 = "for the models that torch computes, not exported ones; default: where it was measured to be faster"
        step.add_argument("--bf16", choices=("true", "false"), help=bf16)
        step.add_argument("--int8", action="store_true", help="take the int8 weights of an exported student")
        for who in ("student", "teacher"):
            step.add_argument(f"--{who}_base", metavar="FOLDER", help="base of an adapter that was a local folder")
        step.add_argument("--label_separator", metavar="S", help="between labels; default: as in training, else |")
    gold = f"column with the gold label; {_AS_IN_TRAINING} label"
    for step in (fit, evaluate):
        step.add_argument("--label_column", metavar="NAME", help=gold)
    for step in (evaluate, predict):
        step.add_argument("--cascade", required=True, type=_path, metavar="JSON", help="what fit has written")
    fit.add_argument("--output_file", required=True, type=_path, metavar="JSON", help="file to write")
    rule = fit.add_mutually_exclusive_group()
    within = "fewest rows sent on whose score is at most this below the teacher's; default: 0.005"
    rule.add_argument("--tolerance", type=float, default=0.005, metavar="A", help=within)
    rule.add_argument("--highest_accuracy", action="store_true", help="the threshold with the highest score")
    evaluate.add_argument("--plot", type=_path, metavar="PNG", help="draw the score against the rows sent on")
    predict.add_argument("--output_file", required=True, type=_path, metavar="OUT", help="csv, tsv, jsonl or parquet")


def _cascade(asked: argparse.Namespace) -> None:
    import json

    from nlpxfer.backends import has_precision, is_static_folder
    from nlpxfer.cascade import evaluate_cascade, fit_cascade, load_cascade, predict_cascade
    from nlpxfer.classify import Classifier, is_quiet
    from nlpxfer.train.launch import use_threads

    bf16 = None if asked.bf16 is None else asked.bf16 == "true"
    int8 = {"student": asked.int8, "teacher": False}
    choosing = [who for who in int8 if has_precision(getattr(asked, who), int8=int8[who])]
    if bf16 is not None and not choosing:
        raise ConfigError(
            "bf16: neither of the two models has a choice.",
            why="exported models and static ones are computed in the precision that they were written in",
            fix="leave --bf16 out",
        )
    batched = [who for who in int8 if not is_static_folder(getattr(asked, who))]
    if asked.batch_size is not None and not batched:
        raise ConfigError("batch_size: both models are static, which have no batches.", fix="leave --batch_size out")
    use_threads(None)
    student, teacher = (
        Classifier.load(
            getattr(asked, who),
            base=getattr(asked, f"{who}_base"),
            bf16=bf16 if who in choosing else None,
            int8=int8[who],
            batch_size=asked.batch_size if who in batched else None,
        )
        for who in int8
    )
    columns = {"text_column": asked.text_column, "text_pair_column": asked.text_pair_column}
    columns |= {"label_separator": asked.label_separator, "quiet": is_quiet()}
    if asked.step == "fit":
        tolerance = None if asked.highest_accuracy else asked.tolerance
        columns |= {"label_column": asked.label_column, "tolerance": tolerance}
        found = fit_cascade(student, teacher, asked.file, asked.output_file, **columns)
        metric = "accuracy" if "accuracy" in found else "sample_f1"
        sys.stdout.write(
            f"{asked.output_file}: {100 * found['sent']:.1f} % of the rows are sent on; "
            f"{metric} {found[metric]:.4f}, student {found[f'student_{metric}']:.4f}, "
            f"teacher {found[f'teacher_{metric}']:.4f}\n"
        )
        return
    cascade = load_cascade(asked.cascade, student, teacher)
    if asked.step == "evaluate":
        columns |= {"label_column": asked.label_column, "plot": asked.plot}
        sys.stdout.write(json.dumps(evaluate_cascade(cascade, asked.file, **columns)) + "\n")
        return
    done, sent = predict_cascade(cascade, asked.file, asked.output_file, **columns)
    sys.stdout.write(f"{asked.output_file}: {done.rows} rows, {sent} by the teacher")
    sys.stdout.write(f", {done.without_text} without a text\n" if done.without_text else "\n")


def _methods() -> None:
    from rich.console import Console
    from rich.table import Table

    from nlpxfer.methods import available_methods

    table = Table(box=None, pad_edge=False)
    for heading in ("method", "family", "what it does", "source"):
        table.add_column(heading, overflow="fold")
    for row in available_methods():
        table.add_row(row.key, row.family, row.summary, row.source)
    Console().print(table)


def _run(method: str, words: Sequence[str]) -> None:
    path = str(recipe_file(method))
    # As __main__, so that the recipe is the same program as `python recipes/<method>.py`: its dataclasses find their
    # annotations and its worker processes find it. It ends in `run_main`, whose SystemExit carries the exit code out.
    before, sys.argv = sys.argv, [path, *words]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before


def _classify(asked: argparse.Namespace) -> None:
    import json

    from nlpxfer.classify import Classifier, evaluate_file, is_quiet, predict_file
    from nlpxfer.problem import MULTI_LABEL
    from nlpxfer.train.launch import use_threads

    use_threads(None)
    bf16 = None if asked.bf16 is None else asked.bf16 == "true"
    classifier = Classifier.load(
        asked.model,
        base=asked.base,
        max_length=asked.max_length,
        bf16=bf16,
        int8=asked.int8,
        batch_size=asked.batch_size,
    )
    columns = {"text_column": asked.text_column, "text_pair_column": asked.text_pair_column}
    columns |= {"label_separator": asked.label_separator, "quiet": is_quiet()}
    if asked.command == "evaluate":
        found = evaluate_file(classifier, asked.file, label_column=asked.label_column, **columns)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    done = predict_file(
        classifier,
        asked.file,
        asked.output_file,
        min_probability=asked.min_probability,
        all_probabilities=asked.all_probabilities,
        **columns,
    )
    sys.stdout.write(f"{asked.output_file}: {done.rows} rows")
    sys.stdout.write(f", {done.without_text} without a text" if done.without_text else "")
    asked_for = asked.min_probability is not None or classifier.abstain is not None
    what = "with labels abstained from" if classifier.schema.problem_type == MULTI_LABEL else "abstained"
    sys.stdout.write(f", {done.abstained} {what}\n" if asked_for else "\n")


def _merge(asked: argparse.Namespace) -> None:
    from nlpxfer.checkpoint.adapter_merge import merge_bundle

    difference = merge_bundle(asked.bundle, asked.out, base=asked.base)
    sys.stdout.write(f"{asked.out}: merged; no logit differs by more than {difference:.2g}\n")


def _export(asked: argparse.Namespace) -> None:
    from nlpxfer.classify import is_quiet
    from nlpxfer.export import ExportRequest, export_classifier

    options = {name: value for name, value in vars(asked).items() if name != "command"}
    done = export_classifier(ExportRequest(**options), quiet=is_quiet())
    for name, parity in done["parity"].items():
        ratio = done["speed"]["ratios_to_torch"][name]["median"]
        found = f"{parity['changed']} of {parity['rows']} predictions changed, logits differ"
        if done["problem_type"] == REGRESSION:
            found = f"{parity['rows']} numbers differ by {parity['mean_difference']:.2g} on average,"
        sys.stdout.write(
            f"{asked.out}, {name}: {found} by up to {parity['max_difference']:.2g}, "
            f"{ratio:.2f} times the rows per second of torch in float32\n"
        )


def _push(asked: argparse.Namespace) -> None:
    from nlpxfer.hub import push_folder

    pushed = push_folder(asked.folder, asked.hub_model_id, private=not asked.public)
    sys.stdout.write(f"{pushed.url}\n")


if __name__ == "__main__":
    main()
