"""A classifier on frozen features of a pretrained checkpoint: one pass over the texts, kept on disk, then seconds.

    accelerate launch recipes/features.py
    accelerate launch recipes/features.py recipes/configs/features.yaml --train_file train.csv --output_dir runs/mine

Logistic regression, or a small network in the checkpoint's own head. The control arm is TF-IDF with logistic
regression: what the labels are worth without a pretrained model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from nlpxfer.checkpoint.depth import cut_to_depth
from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.pooling import can_read_mean, use_mean_pooling
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.cli import run_main
from nlpxfer.config import NEEDED_SWITCHES, DataOptions, RunOptions, option, parse
from nlpxfer.evaluate.arms import Splits
from nlpxfer.evaluate.feature_arm import FeatureArm, feature_arm
from nlpxfer.methods.features import FeatureBased, require_hidden_layer
from nlpxfer.report.privacy import scrub_text
from nlpxfer.report.report import Report
from nlpxfer.result import finish
from nlpxfer.run import Planned
from nlpxfer.start import start_run
from nlpxfer.train.feature_head import WEIGHT_DECAYS, MlpPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALWAYS = frozenset(
    "output_dir overwrite seed num_seeds num_folds control_arm pooling error_report abstain_precision "
    "save_predictions num_threads bf16 tf32 use_cpu ddp_backend ddp_timeout per_device_eval_batch_size disable_tqdm "
    "push_to_hub hub_model_id hub_private_repo".split()
)
"""Options of training runs that mean the same here."""
FOR_MLP = frozenset(
    "learning_rate num_train_epochs weight_decay label_smoothing_factor per_device_train_batch_size "
    "early_stopping_patience linear_probe".split()
)
"""Those that a classifier which is trained by steps needs."""


@dataclass(kw_only=True)
class FeatureOptions(RunOptions):
    """Which features, which classifier on them, and what of a training run's options applies."""

    without_effect: ClassVar = {
        f.name: "the body is frozen, and what is trained are a few numbers on cached features"
        for f in dataclasses.fields(RunOptions)
        if f.name not in ALWAYS | FOR_MLP
    } | {
        "resume_from_checkpoint": "the features found so far are in the cache; give the same command again, "
        "with --overwrite if it had begun to write"
    }
    needed_switches: ClassVar = NEEDED_SWITCHES | {name: ("classifier", "mlp") for name in FOR_MLP}

    model_name_or_path: str = option("all-MiniLM-L6-v2", "Hub id, folder, or the bundled all-MiniLM-L6-v2.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub checkpoint.")
    classifier: Literal["logistic", "mlp"] = option(
        "logistic", "logistic: the final layer alone. mlp: the head's hidden layer too."
    )
    pooling: Literal["auto", "own", "mean"] = option(  # type: ignore[assignment]
        "auto", "State the head reads: the mean where the family can hold one, the model's own, or the mean."
    )
    feature_layer: int | None = option(
        None, "Layer to read, from 1 (-1: the last); those above are cut off. Default: the one of highest LogME."
    )
    feature_cache: str | None = option(None, "Folder of the features. Default: ~/.cache/nlpxfer/features.")

    bf16: bool | None = option(  # type: ignore[assignment]
        None, "Features of training rows in bfloat16. Default: where a measurement finds it faster."
    )
    linear_probe: bool = option(True, "Start an mlp from logistic regression.")
    learning_rate: float = option(3e-4, "Learning rate of AdamW, constant.")
    num_train_epochs: float = option(50, "Most passes over the features; a whole number.")
    weight_decay: float | None = option(  # type: ignore[assignment]
        None, "Of AdamW. Default: the one of 0.1, 1 and 5 with the lowest validation loss."
    )
    label_smoothing_factor: float = option(0.0, "Share of the target spread evenly over the classes.")
    per_device_train_batch_size: int = option(256, "Rows per step.")
    early_stopping_patience: int = option(5, "Stop after this many passes without a lower validation loss; 0: never.")

    def _faults(self) -> list[str]:
        faults = super()._faults()
        if self.classifier not in ("logistic", "mlp"):
            faults.append(f"classifier: {self.classifier!r} is not one of logistic, mlp")
        if self.feature_layer == 0:
            faults.append("feature_layer: layers count from 1, or from -1 for the last")
        if self.num_train_epochs % 1:
            faults.append(f"num_train_epochs: {self.num_train_epochs} is not a whole number")
        if self.classifier == "logistic" and self.num_seeds > 1:
            why = "logistic regression draws no random numbers, so all seeds would give one model"
            faults.append(f"num_seeds: {why}; give another --data_split_seed, or --classifier mlp")
        return faults

    @property
    def idle(self) -> frozenset[str]:
        """Options that do nothing as things stand."""
        return super().idle | (FOR_MLP if self.classifier == "logistic" else frozenset())

    @property
    def plan(self) -> MlpPlan:
        """How an mlp is trained."""
        return MlpPlan(
            learning_rate=self.learning_rate,
            weight_decays=WEIGHT_DECAYS if self.weight_decay is None else (self.weight_decay,),
            epochs=int(self.num_train_epochs),
            patience=self.early_stopping_patience,
            batch_size=self.per_device_train_batch_size,
        )


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the recipe; see `--help` for its options."""
    data_options, options = parse((DataOptions, FeatureOptions), argv)
    name, revision, classifier = options.model_name_or_path, options.model_revision, options.classifier
    with start_run("features", data_options, options) as run:
        smoothing = options.label_smoothing_factor
        method = FeatureBased(problem_type=run.problem_type, classifier=classifier, label_smoothing=smoothing)

        def load(seed: int) -> Checkpoint:
            return load_classifier(name, schema=run.data.schema, seed=seed, head="new", revision=revision)

        def build(seed: int) -> Checkpoint:
            return as_read(load(seed), options)

        base, pretrained = resolve_checkpoint(name, revision=revision), load(options.seed)
        shown = scrub_text(name)
        run.check_length(pretrained)
        parent = run.parent_facts(pretrained)
        start = as_read(pretrained, options)
        if classifier == "mlp":
            require_hidden_layer(start.model)
        run.begin(Planned(start), arms=1, checkpoints=False)
        del pretrained, start

        def train(name: str, split: Callable[[PreTrainedTokenizerBase], Splits], seed: int) -> FeatureArm:
            return feature_arm(
                name,
                build=lambda: build(seed),
                method=method,
                split=split,
                options=options,
                seed=seed,
                choose_layer=options.feature_layer is None,
                folder=options.feature_cache,
                plan=options.plan,
            )

        trained = [train("features", run.split, seed) for seed in run.seeds]
        run.train_on_folds(partial(train, seed=run.seeds[0]))
        arm = run.arm(trained, f"{shown}, frozen, with {classifier} on its features{where_read(trained[0], options)}")
        arms, verdict = run.against_no_transfer(trained, [replace(arm, details={**arm.details, **trained[0].details})])
        run.checks["features"] = {"logits_difference": max(one.logits_difference for one in trained)}
        arms = run.with_speed(arms, {"features": trained[0]})
        return finish(
            run,
            trained,
            arms,
            verdict,
            description=f"A {classifier} classifier on frozen features of {shown}{where_read(trained[0], options)}.",
            base_model=base,
            parents={"model": parent},
        )


def as_read(checkpoint: Checkpoint, options: FeatureOptions) -> Checkpoint:
    """The checkpoint with its head reading the state that was asked for, of the layer that was asked for."""
    if options.pooling == "mean" or (options.pooling == "auto" and can_read_mean(checkpoint.model)):
        checkpoint = replace(checkpoint, model=use_mean_pooling(checkpoint.model))
    if options.feature_layer not in (None, -1):
        checkpoint = replace(checkpoint, model=cut_to_depth(checkpoint.model, options.feature_layer))
    return checkpoint


def where_read(arm: FeatureArm, options: FeatureOptions) -> str:
    """The layer that was chosen or asked for, for descriptions; empty for the last one."""
    layers = arm.details.get("layers")
    if layers and layers["chosen"] < len(layers["logme"]):
        return f" at layer {layers['chosen']} of {len(layers['logme'])}"
    return "" if layers or options.feature_layer in (None, -1) else f" at layer {options.feature_layer}"


if __name__ == "__main__":
    run_main(main)
