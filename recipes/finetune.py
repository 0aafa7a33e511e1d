"""Fine-tune a pretrained checkpoint on labelled texts.

    accelerate launch recipes/finetune.py
    accelerate launch recipes/finetune.py recipes/configs/finetune.yaml --train_file train.csv --output_dir runs/mine

A new head starts from a linear probe on frozen features. The control arm is TF-IDF with logistic regression: what the
labels are worth without a pretrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions, option, parse
from nlpxfer.methods.finetune import FineTune
from nlpxfer.report.report import Report, Verdict
from nlpxfer.run import start_run


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """What to fine-tune."""

    model_name_or_path: str = option("all-MiniLM-L6-v2", "Hub id, folder, or the bundled all-MiniLM-L6-v2.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub checkpoint.")


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the recipe; see `--help` for its options."""
    data_options, model_options, options = parse((DataOptions, FineTuneOptions, RunOptions), argv)
    method = FineTune(label_smoothing=options.label_smoothing_factor)
    name = model_options.model_name_or_path

    with start_run("finetune", data_options, options, model_options) as run:

        def build(seed: int) -> Checkpoint:
            return load_classifier(name, schema=run.data.schema, seed=seed, revision=model_options.model_revision)

        base = resolve_checkpoint(name, revision=model_options.model_revision)
        start = build(options.seed)
        run.begin(start, arms=1)
        parent = run.parent_facts(start)
        trained = run.train("fine-tuned", build, method, facts={"model": parent["weights"]})
        arms = [run.arm(trained, f"{name}, fine-tuned"), run.majority_arm()]
        verdict = Verdict.unmeasured("the control arm was switched off")
        if options.control_arm:
            control, logits = run.no_transfer_arm()
            arms.insert(1, control)
            verdict = run.gain(trained, [logits] * len(trained), versus=control.name)
        arms = run.with_speed(arms, {trained[0].name: trained[0]})
        return run.finish(
            trained,
            arms,
            verdict,
            description=f"{name}, fine-tuned on labelled texts.",
            base_model=base,
            parents={"model": parent},
        )


if __name__ == "__main__":
    run_main(main)
