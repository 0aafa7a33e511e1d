"""Where training scores are shown live: refused early if it cannot work, not after the data are tokenised.

TensorBoard's files get a folder for each arm, so that its curves stand beside each other instead of on top of each
other, and hold scores alone: what transformers adds, all options and the model's config, names folders of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, integrations
from transformers.integrations.integration_utils import TensorBoardCallback

from nlpxfer.errors import ConfigError

EVENT_FOLDER: Final = "tensorboard"
"""Of the output folder; it stays at home when the folder is pushed."""


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a `report_to` whose package is missing.

    Raises:
        ConfigError: Lists the packages that are installed.
    """
    installed: list[str] = integrations.get_available_reporting_integrations()  # type: ignore[attr-defined, no-untyped-call]
    missing = [name for name in names if name not in installed]
    if missing:
        raise ConfigError(
            f"report_to: {', '.join(missing)} cannot be used.",
            why="no such integration, or its package is not installed",
            fix=f"pip install {missing[0]}, or --report_to none",
            available=["none", *installed],
        )


class EventFiles(TensorBoardCallback):
    """Writes scores, and nothing but scores, into a folder.

    Args:
        folder: Made when training begins.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the file; what an interrupted run had written beyond its checkpoint is no longer shown."""
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(log_dir=str(self.folder), purge_step=state.global_step + 1)


def report_to_tensorboard(trainer: Trainer, output_dir: Path, arm: str) -> None:
    """Let a trainer that reports to TensorBoard write into a folder of its arm.

    Args:
        trainer: Made with or without `report_to` tensorboard; without it nothing changes.
        output_dir: Of the run; `TENSORBOARD_LOGGING_DIR` names another place instead of its folder `tensorboard`.
        arm: Name and seed.
    """
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    folder = Path(chosen).expanduser() if chosen else output_dir / EVENT_FOLDER
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(EventFiles(folder / arm))
