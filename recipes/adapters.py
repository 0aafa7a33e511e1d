"""Train an adapter on a pretrained checkpoint: a small part learns, the pretrained weights stay.

    accelerate launch recipes/adapters.py
    accelerate launch recipes/adapters.py recipes/configs/adapters.yaml --adapter dora --train_file train.csv

A new head starts from a linear probe on frozen features; then adapter and head learn together. The output folder
holds the adapter in `adapter/` and, for kinds that can be merged, the ordinary model that it makes with its base. The
control arm is TF-IDF with logistic regression; `--full_arm true` adds full fine-tuning with the same number of epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nlpxfer.checkpoint.adapter_kinds import KINDS, OPTIONS
from nlpxfer.checkpoint.adapters import is_adapted
from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.pooling import with_pooling
from nlpxfer.checkpoint.quantised import Bits, check_quantised
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions, default_learning_rate, option, parse
from nlpxfer.config.label_loss import LabelLossOptions
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import TrainedArm
from nlpxfer.methods.adapters import Adapters
from nlpxfer.methods.finetune import FineTune
from nlpxfer.report.privacy import scrub_text
from nlpxfer.report.report import Arm, Report
from nlpxfer.result import finish
from nlpxfer.run import Planned, Run
from nlpxfer.searched import refuse_ends
from nlpxfer.start import start_run
from nlpxfer.train.regime import check_r_drop


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(LabelLossOptions):
    """What to adapt, and how."""

    NOT_SEARCHED: ClassVar[Mapping[str, str]] = {
        "adapter": "each kind has options of its own",
        "load_in_8bit": "it is there to save memory",
        "load_in_4bit": "it is there to save memory",
        "full_arm": "it is no part of the adapter",
    }

    model_name_or_path: str = option("all-MiniLM-L6-v2", "Hub id, folder, or the bundled all-MiniLM-L6-v2.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub checkpoint.")
    adapter: str = option("lora", "Kind of adapter; docs/adapters.md lists them.")
    adapter_rank: int | None = option(None, "r: inner size of the adapter. Default: that of the kind; LoRA: 8.")
    adapter_alpha: float | None = option(None, "alpha: the output counts alpha / r. Default: of the kind; LoRA: 2 r.")
    adapter_dropout: float | None = option(None, "Share of the adapter's inputs dropped in training. Default: 0.")
    adapter_block_size: int | None = option(None, "Size of the blocks of a layer (oft, c3a, road, vblora).")
    adapter_num_weights: int | None = option(None, "Numbers to learn (fourierft, waveft, tinylora, unilora).")
    adapter_target_modules: list[str] | None = option(None, "Names of the layers to adapt. Default: all linear ones.")
    num_virtual_tokens: int | None = option(None, "Length of a learnt prompt or prefix. Default: 20.")
    load_in_8bit: bool = option(False, "Train on a base in 8 bits; needs an NVIDIA GPU and bitsandbytes.")
    load_in_4bit: bool = option(False, "Train on a base in 4 bits (QLoRA); needs the same.")
    full_arm: bool = option(False, "Also fine-tune all weights for as many epochs, at its own default learning rate.")

    def __post_init__(self) -> None:
        faults = self.label_loss_faults()
        try:
            self.method()
        except ConfigError as error:
            faults += error.faults
        if self.load_in_8bit and self.load_in_4bit:
            faults.append("load_in_8bit, load_in_4bit: choose one of the two")
        quantised = [name for name, kind in KINDS.items() if kind.quantised]
        if self.bits and self.adapter in KINDS and self.adapter not in quantised:
            faults.append(f"load_in_{self.bits}: works with {', '.join(quantised)}, not with {self.adapter}")
        if faults:
            raise ConfigError.from_faults(faults)

    @property
    def bits(self) -> Bits | None:
        """In how many bits the base is loaded for training; None for float32."""
        return "8bit" if self.load_in_8bit else "4bit" if self.load_in_4bit else None

    def method(self, label_loss: FineTune | None = None) -> Adapters:
        """The method that these options describe; with a plain loss if none is given."""
        values = {name: getattr(self, name) for name in OPTIONS}
        values["adapter_target_modules"] = tuple(self.adapter_target_modules or ())
        return Adapters(adapter=self.adapter, label_loss=label_loss or FineTune(), **values)


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the recipe; see `--help` for its options."""
    data_options, plan, options = parse((DataOptions, AdapterOptions, RunOptions), argv)
    prepare(plan, options)
    name = plan.model_name_or_path

    with start_run("adapters", data_options, options, plan, searches=True) as run:

        def build(seed: int, bits: Bits | None = None) -> Checkpoint:
            revision = plan.model_revision
            return load_classifier(name, schema=run.data.schema, seed=seed, revision=revision, quantised=bits)

        base, shown = resolve_checkpoint(name, revision=plan.model_revision), scrub_text(name)
        start = build(options.seed)
        parent = run.parent_facts(start)
        facts = {"model": parent["weights"]}

        def arm(plan: AdapterOptions) -> dict[str, Any]:
            if plan.full_arm or not any(run.options.ends_of("adapter_dropout", plan.adapter_dropout)):
                check_r_drop(start, plan, run.options)
            made: dict[str, Any] = {"build": lambda seed: build(seed, plan.bits), "facts": facts}
            made |= {"method": plan.method(run.label_method(plan)), "sampling": plan.sampling}
            return made | start_of_training(run, plan, start)

        refuse_ends(run, plan, run.label_method)
        sample = tried(start, arm(plan)["method"], options)
        run.begin(Planned(sample, start_of_training(run, plan, start)), arms=2 if plan.full_arm else 1)
        plan = run.search("adapter", arm, plan, defaults=plan.method().defaults)
        run.settle(**start_of_training(run, plan, start))
        trained = run.train("adapter", **arm(plan))
        run.cross_validate(**arm(plan))
        own = adapter_arm(run, trained, f"{shown}, {plan.adapter} and head trained")
        arms, verdict = run.against_no_transfer(trained, [own])
        models = {"adapter": trained[0]}
        if plan.full_arm:
            rate = default_learning_rate(start.hidden_size, gently=run.starts_large(start))
            whole: dict[str, Any] = {"facts": facts, "learning_rate": rate}
            full = run.train("full", build, run.label_method(plan), sampling=plan.sampling, **whole)
            arms.insert(1, run.arm(full, f"{shown}, all weights trained for as many epochs"))
            models["full"] = full[0]
            run.checks["gain_over_full"] = vars(run.gain(trained, [arm.test_logits for arm in full], versus="full"))
        arms = run.with_speed(arms, models)
        merges = not is_adapted(trained[0].model)
        return finish(
            run,
            trained,
            arms,
            verdict,
            description=f"{shown} with an adapter of the kind {plan.adapter}"
            + (", merged." if merges else "; no merged model exists, the folder `adapter` holds it."),
            base_model=base,
            parents={"model": parent},
            tags=[plan.adapter],
        )


def prepare(plan: AdapterOptions, options: RunOptions) -> None:
    """Check all that the options alone can tell.

    Raises:
        ConfigError: Options that do not fit together, or bits that this machine cannot load.
    """
    method = plan.method()
    method.check(options)
    if plan.bits:
        check_quantised(plan.bits, device=options.device)


def start_of_training(run: Run, plan: AdapterOptions, start: Checkpoint) -> dict[str, Any]:
    """Learning rate of this kind of adapter, if none was asked for, and size of the probe."""
    rate = plan.method().kind.learning_rate_for(start.hidden_size, gently=run.starts_large(start))
    return run.start_of_training(start) | {"learning_rate": run.options.learning_rate_or(rate)}


def tried(start: Checkpoint, method: Adapters, options: RunOptions) -> Checkpoint:
    """The checkpoint with an adapter as it will be trained, so that what cannot work is refused before work begins."""
    return replace(start, model=method.adapt(with_pooling(start, options.pooling), start.fresh))


def adapter_arm(run: Run, trained: Sequence[TrainedArm], description: str) -> Arm:
    """The arm with the size of what was trained, beside that of the whole model."""
    arm = run.arm(trained, description)
    bundle = trained[0].adapter
    size = (bundle / "adapter_model.safetensors").stat().st_size if bundle else None
    details = {**arm.details, "adapter_bytes": size, "merged": not is_adapted(trained[0].model)}
    return replace(arm, details=details)


if __name__ == "__main__":
    run_main(main)
