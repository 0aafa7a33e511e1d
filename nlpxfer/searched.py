"""Ranges of options against the kind of task: what would fail a trial of any model is refused before anything runs.

The option classes have tried the ends of all ranges already (`nlpxfer.config.ranges`), but know nothing of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nlpxfer.config.ranges import with_values
from nlpxfer.errors import ConfigError
from nlpxfer.run import Run

Plan = TypeVar("Plan")


def refuse_ends(run: Run, plan: Plan, method_of: Callable[[Plan], object]) -> None:
    """Refuse ranges with an end that means nothing for the kind of task; each is tried alone.

    Args:
        run: Not begun; its task and its ranges.
        plan: The recipe's own options.
        method_of: From these to what is trained with; `run.options` are then those of a trial.

    Raises:
        ConfigError: Lists what the methods of the task refuse.
    """
    options = run.options
    faults: list[str] = []
    for name, found in options.ranges.items():
        for end in found.ends:
            try:
                run.options, tried = with_values(options, plan, {name: end})
                method_of(tried)
            except ConfigError as error:
                faults += [fault for fault in error.faults or (error.what,) if fault not in faults]
            finally:
                run.options = options
    if faults:
        raise ConfigError.from_faults(faults)
