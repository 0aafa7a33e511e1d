"""A search among all processes: the first one holds the study, all get the same values and the same decisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nlpxfer.train.checkpoints import MANIFEST, RunIdentity, require_same_run, seal
from nlpxfer.train.launch import is_main_process, on_main
from nlpxfer.train.study import Curve, Outcome, SearchPlan, Study

T = TypeVar("T")


class Search:
    """A study that all processes follow and the first one holds: all get the same values and the same decisions.

    Args:
        plan: What is searched.
        folder: Where the study lies until the run is finished.
        identity: What a resumed search must have in common with the interrupted one.
        resume: Go on with the study in `folder`, if there is one.
        allow_topology_change: Also with other processes or batch sizes.

    Raises:
        ResumeError: The study belongs to another search, or cannot be read.
    """

    study: Study

    def __init__(
        self,
        plan: SearchPlan,
        folder: Path,
        *,
        identity: RunIdentity,
        resume: bool = False,
        allow_topology_change: bool = False,
    ) -> None:
        self.plan = plan
        self.folder = folder

        def open_study() -> None:
            if resume and (folder / MANIFEST).is_file():
                require_same_run(folder, identity, allow_topology_change)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                seal(folder, identity, 0)
            self.study = Study(plan, folder)

        on_main(open_study)
        self.done, self.seconds_before = self._from_main(lambda study: (len(study.trials), study.seconds))

    def _from_main(self, make: Callable[[Study], T]) -> T:
        """What the first process makes of its study, in all processes."""
        return on_main(lambda: make(self.study))

    def wants_more(self) -> bool:
        """As `Study.wants_more`."""
        return self._from_main(lambda study: study.wants_more())

    def ask(self) -> tuple[int, dict[str, Any]]:
        """As `Study.ask`."""
        return self._from_main(lambda study: study.ask())

    def should_stop(self, curve: Curve) -> bool:
        """As `Study.should_stop`."""
        return self._from_main(lambda study: study.should_stop(curve))

    def tell(self, outcome: Outcome) -> tuple[int, float] | None:
        """As `Study.tell`; gives number (from 1) and score of the best trial so far, if there is one."""

        def tell(study: Study) -> tuple[int, float] | None:
            study.tell(outcome)
            return study.best

        return self._from_main(tell)

    def note(self, outcome: Outcome) -> None:
        """As `Study.tell`, without waiting for the other processes."""
        if is_main_process():
            self.study.tell(outcome)

    def best_values(self) -> dict[str, Any]:
        """The options of the best trial.

        Raises:
            SearchError: No trial was completed.
        """
        return self._from_main(lambda study: study.values(study.result()["best"]["options"]))

    def result(self) -> dict[str, Any]:
        """As `Study.result`."""
        return self._from_main(lambda study: study.result())


class Judge(TrainerCallback):
    """Reports the scores of a trial at each evaluation, and stops it where the search says so.

    Args:
        search: Holds the trials before.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.metric = f"eval_{search.plan.metric}"
        self.pruned = False

    def curve(self, state: TrainerState) -> Curve:
        """The scores so far, those before an interruption included."""
        lines = [line for line in state.log_history if self.metric in line]
        return [(line["step"] / state.max_steps, float(line[self.metric])) for line in lines]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Ask what an interruption left unasked: a trial that is stopped at a score is not judged by it."""
        curve = self.curve(state)
        if curve and curve[-1][0] == state.global_step / state.max_steps:
            return self.on_evaluate(args, state, control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Ask whether to go on, unless this is the end anyway."""
        if not control.should_training_stop and state.global_step < state.max_steps:
            self.pruned = self.search.should_stop(self.curve(state))
            control.should_training_stop = self.pruned
        return control
