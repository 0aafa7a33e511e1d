"""Where training scores are shown live: refused early if it cannot work, not after the data are tokenised."""

from __future__ import annotations

import os
from collections.abc import Sequence

from nlpxfer.errors import ConfigError


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a `report_to` whose package is missing, or whose files would go with the checkpoints.

    Raises:
        ConfigError: Lists the packages that are installed.
    """
    from transformers import integrations

    installed: list[str] = integrations.get_available_reporting_integrations()  # type: ignore[attr-defined, no-untyped-call]
    missing = [name for name in names if name not in installed]
    if missing:
        raise ConfigError(
            f"report_to: {', '.join(missing)} cannot be used.",
            why="no such integration, or its package is not installed",
            fix=f"pip install {missing[0]}, or --report_to none",
            available=["none", *installed],
        )
    if "tensorboard" in names and not os.environ.get("TENSORBOARD_LOGGING_DIR"):
        raise ConfigError(
            "report_to: tensorboard needs a folder for its files.",
            why="beside the checkpoints they would be removed at the end of the run",
            fix="TENSORBOARD_LOGGING_DIR=runs/logs, and the same command",
        )
