"""`--student_layers trial`: evenly spaced layers or the bottom ones, by a short training of both.

Which are better depends on the task, and the two differ by more than what a loss or a temperature is worth. What a
linear probe makes of untrained slices does not tell: it prefers slices that keep the last layer, which training makes
up for. So both are trained for a share of the steps and scored on the validation rows. No test row is read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.config.student import BOTTOM, EVEN, TRIAL, StudentOptions
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.trials import short_run
from nlpxfer.run import Run
from nlpxfer.students import kept_layers, searched_shapes, whole_training

logger = logging.getLogger(__name__)

SHARE: Final = 0.25
"""Of the steps of the student's training, for each of the two."""
Plan = TypeVar("Plan", bound=StudentOptions)


def check_trial(run: Run, plan: StudentOptions) -> None:
    """Refuse a trial of layers whose shape is searched as well.

    Raises:
        ConfigError: Names the options.
    """
    shapes = searched_shapes(run)
    if plan.student_layers == TRIAL and shapes:
        raise ConfigError.from_faults([f"{name}: cannot be searched beside student_layers trial" for name in shapes])


def try_layers(
    run: Run, plan: Plan, source: Checkpoint, arm_of: Callable[[Plan], Mapping[str, Any]], rows: int
) -> Plan:
    """With `--student_layers trial`: the plan with the better of the two. Else the plan as it is.

    Equal scores go to the evenly spaced ones. A resumed run tries again, which gives the same.

    Args:
        run: The run; `checks.student_layers` of its report gets the scores.
        plan: The recipe's own options.
        source: What layers are taken from.
        arm_of: From the recipe's own options to the arguments of `Run.train`.
        rows: That the student learns from.

    Raises:
        NotFiniteError: A training diverged.
        Interrupted: A signal asked to stop.
    """
    if plan.student_layers != TRIAL:
        return plan
    plans = {name: replace(plan, student_layers=name) for name in (EVEN, BOTTOM)}
    layers = {name: [*kept_layers(run, each, source)] for name, each in plans.items()}
    found: dict[str, Any] = {"chosen": EVEN, "layers": layers[EVEN]}
    if layers[EVEN] != layers[BOTTOM]:
        steps, folder = math.ceil(SHARE * whole_training(run, rows)), run.folder / "checkpoints" / "layers"
        with run.trials():
            scores = {
                name: short_run(run.trial_arm(arm_of(each)), folder / name, steps=steps)
                for name, each in plans.items()
            }
        better = scores[BOTTOM] > scores[EVEN] if run.options.greater_is_better else scores[BOTTOM] < scores[EVEN]
        chosen = BOTTOM if better else EVEN
        found = {"chosen": chosen, "layers": layers[chosen], "steps": steps, "scores": scores}
        told = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        logger.info("student layers after %d steps: validation %s: %s", steps, told, chosen)
    run.checks["student_layers"] = found
    run.config["student_layers"] = found["chosen"]
    return plans[found["chosen"]]
