"""Fine-tune a pretrained checkpoint on labelled texts.

    accelerate launch recipes/finetune.py
    accelerate launch recipes/finetune.py recipes/configs/finetune.yaml --train_file train.csv --output_dir runs/mine

A new head starts from a linear probe on frozen features. The control arm is TF-IDF with logistic regression: what the
labels are worth without a pretrained model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions, option, parse
from nlpxfer.errors import ConfigError
from nlpxfer.methods.finetune import FineTune, balanced_weights, log_shares, positive_weights
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from nlpxfer.report.report import Report
from nlpxfer.result import finish
from nlpxfer.run import Run
from nlpxfer.start import start_run
from nlpxfer.train.regime import trained_dropout


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """What to fine-tune."""

    model_name_or_path: str = option("all-MiniLM-L6-v2", "Hub id, folder, or the bundled all-MiniLM-L6-v2.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub checkpoint.")
    class_weights: Literal["none", "balanced"] = option("none", "balanced: all classes count alike, however rare.")
    sampling: Literal["natural", "balanced"] = option(
        "natural", "balanced: all classes are drawn equally often, rare rows several times an epoch."
    )
    focal_gamma: float = option(0.0, "gamma: rows that are right already count (1 - p)^gamma.")
    logit_adjustment: float = option(0.0, "tau: add tau log(class share) to the logits while training.")
    r_drop_weight: float = option(0.0, "alpha: draw the answers of two passes with dropout together (R-Drop).")

    def __post_init__(self) -> None:
        faults = []
        if self.class_weights not in ("none", "balanced"):
            faults.append(f"class_weights: {self.class_weights!r} is not one of none, balanced")
        if not 0 <= self.focal_gamma < math.inf:
            faults.append(f"focal_gamma: {self.focal_gamma} is not a finite number of at least 0")
        if not 0 <= self.logit_adjustment < math.inf:
            faults.append(f"logit_adjustment: {self.logit_adjustment} is not a finite number of at least 0")
        if self.sampling not in ("natural", "balanced"):
            faults.append(f"sampling: {self.sampling!r} is not one of natural, balanced")
        if not 0 <= self.r_drop_weight < math.inf:
            faults.append(f"r_drop_weight: {self.r_drop_weight} is not a finite number of at least 0")
        asked = {
            "class_weights": self.class_weights == "balanced",
            "sampling": self.sampling == "balanced",
            "logit_adjustment": bool(self.logit_adjustment),
        }
        names = [name for name, is_on in asked.items() if is_on]
        if len(names) > 1:
            each = "both" if len(names) == 2 else "all"
            faults.append(f"{', '.join(names)}: {each} make rare classes count more; use one of them")
        if faults:
            raise ConfigError.from_faults(faults)


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the recipe; see `--help` for its options."""
    data_options, model_options, options = parse((DataOptions, FineTuneOptions, RunOptions), argv)
    name = model_options.model_name_or_path

    with start_run("finetune", data_options, options, model_options, folds=True, searches=True) as run:

        def build(seed: int) -> Checkpoint:
            return load_classifier(name, schema=run.data.schema, seed=seed, revision=model_options.model_revision)

        base = resolve_checkpoint(name, revision=model_options.model_revision)
        start = build(options.seed)
        parent = run.parent_facts(start)

        def arm(plan: FineTuneOptions) -> dict[str, Any]:
            check_dropout(start, plan, run.options)
            method, facts = method_for(run, plan), {"model": parent["weights"]}
            return {"build": build, "method": method, "facts": facts, "sampling": plan.sampling}

        arm(model_options)  # refuses what this kind of task cannot have
        run.begin(start, arms=1)
        chosen = run.search("fine-tuned", arm, model_options)
        trained = run.train("fine-tuned", **arm(chosen))
        run.cross_validate(**arm(chosen))
        arms, verdict = run.against_no_transfer(trained, [run.arm(trained, f"{name}, fine-tuned")])
        arms = run.with_speed(arms, {trained[0].name: trained[0]})
        return finish(
            run,
            trained,
            arms,
            verdict,
            description=f"{name}, fine-tuned on labelled texts.",
            base_model=base,
            parents={"model": parent},
        )


def method_for(run: Run, plan: FineTuneOptions) -> FineTune:
    """The method, with weights and offsets counted on the training rows."""
    labels, classes = run.labels("train"), len(run.data.schema)
    tau = plan.logit_adjustment
    if tau and run.problem_type != SINGLE_LABEL:
        raise ConfigError("logit_adjustment: is for tasks with one class per row.")
    if plan.sampling == "balanced" and run.problem_type != SINGLE_LABEL:
        raise ConfigError("sampling: balanced is for tasks with one class per row.")
    if plan.class_weights == "balanced" and run.problem_type == REGRESSION:
        raise ConfigError("class_weights: means nothing for a regression.")
    weights: tuple[float, ...] = ()
    if plan.class_weights == "balanced":
        several = run.problem_type == MULTI_LABEL
        weights = positive_weights(labels) if several else balanced_weights(labels, classes)
    return FineTune(
        problem_type=run.problem_type,
        label_smoothing=run.options.label_smoothing_factor,
        focal_gamma=plan.focal_gamma,
        class_weights=weights,
        offsets=tuple(tau * share for share in log_shares(labels, classes)) if tau else (),
        r_drop_weight=plan.r_drop_weight,
    )


def check_dropout(start: Checkpoint, plan: FineTuneOptions, options: RunOptions) -> None:
    """See that two passes of R-Drop differ.

    Raises:
        ConfigError: The model trains without dropout.
    """
    if plan.r_drop_weight and not trained_dropout(start.model, options.dropout):
        raise ConfigError(
            f"r_drop_weight: {plan.r_drop_weight:g} does nothing where {start.name} trains without dropout.",
            why="its own dropout is 0" if options.dropout is None else "--dropout is 0 by default",
            fix="--dropout 0.1",
        )


if __name__ == "__main__":
    run_main(main)
