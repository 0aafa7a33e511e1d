"""Fine-tune a pretrained checkpoint on labelled texts.

    accelerate launch recipes/finetune.py
    accelerate launch recipes/finetune.py recipes/configs/finetune.yaml --train_file train.csv --output_dir runs/mine

A new head starts from a linear probe on frozen features. The control arm is TF-IDF with logistic regression: what the
labels are worth without a pretrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions, option, parse
from nlpxfer.config.label_loss import LabelLossOptions
from nlpxfer.errors import ConfigError
from nlpxfer.report.privacy import scrub_text
from nlpxfer.report.report import Report
from nlpxfer.result import finish
from nlpxfer.run import Planned
from nlpxfer.searched import refuse_ends
from nlpxfer.start import start_run
from nlpxfer.train.regime import check_r_drop


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(LabelLossOptions):
    """What to fine-tune."""

    model_name_or_path: str = option("all-MiniLM-L6-v2", "Hub id, folder, or the bundled all-MiniLM-L6-v2.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub checkpoint.")

    def __post_init__(self) -> None:
        if faults := self.label_loss_faults():
            raise ConfigError.from_faults(faults)


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the recipe; see `--help` for its options."""
    data_options, model_options, options = parse((DataOptions, FineTuneOptions, RunOptions), argv)
    name = model_options.model_name_or_path

    with start_run("finetune", data_options, options, model_options, searches=True) as run:

        def build(seed: int) -> Checkpoint:
            return load_classifier(name, schema=run.data.schema, seed=seed, revision=model_options.model_revision)

        base, shown = resolve_checkpoint(name, revision=model_options.model_revision), scrub_text(name)
        start = build(options.seed)
        parent = run.parent_facts(start)

        def arm(plan: FineTuneOptions) -> dict[str, Any]:
            check_r_drop(start, plan, run.options)
            method, facts = run.label_method(plan), {"model": parent["weights"]}
            made = {"build": build, "method": method, "facts": facts, "sampling": plan.sampling}
            return made | run.start_of_training(start)

        arm(model_options)  # refuses what this kind of task cannot have
        refuse_ends(run, model_options, run.label_method)
        run.begin(Planned(start, run.start_of_training(start)), arms=1)
        chosen = run.search("fine-tuned", arm, model_options)
        run.settle(**run.start_of_training(start))
        trained = run.train("fine-tuned", **arm(chosen))
        run.cross_validate(**arm(chosen))
        arms, verdict = run.against_no_transfer(trained, [run.arm(trained, f"{shown}, fine-tuned")])
        arms = run.with_speed(arms, {trained[0].name: trained[0]})
        return finish(
            run,
            trained,
            arms,
            verdict,
            description=f"{shown}, fine-tuned on labelled texts.",
            base_model=base,
            parents={"model": parent},
        )


if __name__ == "__main__":
    run_main(main)
