"""The errors of nlpxfer: each says what happened, the likely reason, and what to type.

Every class also derives from the built-in exception that a Python caller would expect, so that
`except ValueError` and `except FileNotFoundError` keep working. The text of an error stands where it is
raised; this module only gives it one shape.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Final

USER_FAULT_EXIT_CODE: Final = 2
TARGET_MISSED_EXIT_CODE: Final = 3
INTERRUPTED_EXIT_CODE: Final = 75


class NlpxferError(Exception):
    """Base of all errors that a user can mend.

    Args:
        what: What happened, in one sentence.
        why: The likely reason, if known.
        fix: What to type or change.
        available: The names that would have been accepted.
    """

    exit_code: int = USER_FAULT_EXIT_CODE

    def __init__(self, what: str, *, why: str = "", fix: str = "", available: Iterable[str] = ()) -> None:
        lines = [what]
        if why:
            lines.append(f"  Likely reason: {why}")
        names = [str(name) for name in available]
        if names:
            shown = ", ".join(names[:40]) + (f", and {len(names) - 40} more" if len(names) > 40 else "")
            lines.append(f"  Available: {shown}")
        if fix:
            lines.append(f"  Try: {fix}")
        super().__init__("\n".join(lines))
        self.what, self.fix = what, fix


class ConfigError(NlpxferError, ValueError):
    """The options cannot be used; all faults found are listed together.

    Attributes:
        faults: The faults, one sentence each.
    """

    faults: tuple[str, ...] = ()

    @classmethod
    def from_faults(cls, faults: Sequence[str], *, fix: str = "") -> ConfigError:
        """Join several faults into one error, one line each."""
        listed = "\n".join(f"  - {fault}" for fault in faults)
        what = faults[0] if len(faults) == 1 else f"{len(faults)} options cannot be used:\n{listed}"
        error = cls(what, fix=fix)
        error.faults = tuple(faults)
        return error


class DataError(NlpxferError, ValueError):
    """A data file or its rows cannot be used; names file and row."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data file, folder or bundled set does not exist."""


class LabelError(NlpxferError, ValueError):
    """Label names of two sides do not fit; lists both sides."""


class CheckpointError(NlpxferError, ValueError):
    """A model folder or Hub checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A model folder or Hub checkpoint does not exist or cannot be reached."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks for remote code, pickled weights, or files outside its folder."""


class OutputExistsError(NlpxferError, FileExistsError):
    """The output folder is not empty and may not be overwritten."""


class NoSpaceError(NlpxferError, OSError):
    """Too little free space on the disk for what the run will write."""


class StaleCacheError(NlpxferError, ValueError):
    """A cache on disk was made from something else than what is now asked for, or is damaged."""


class LaunchError(NlpxferError, RuntimeError):
    """The run was not started with the processes or devices that it was asked for."""


class NotFiniteError(NlpxferError, FloatingPointError):
    """A loss or gradient became NaN or infinite; training was stopped."""


class ResumeError(NlpxferError, ValueError):
    """No checkpoint can be resumed, or it belongs to another run."""


class ExportError(NlpxferError, RuntimeError):
    """A model cannot be written in another format, or does not answer there as it does here."""


class SearchError(NlpxferError, RuntimeError):
    """No trial of a search for options could be completed."""


class TargetMissedError(NlpxferError, RuntimeError):
    """The result falls short of a target that was set for it; all that was found is written."""

    exit_code = TARGET_MISSED_EXIT_CODE


class PushError(NlpxferError, RuntimeError):
    """A push to the Hub failed or could not be verified."""


class Interrupted(NlpxferError):  # noqa: N818 - not an error of the user: a request to stop
    """The run was asked to stop (SIGINT, SIGTERM or SIGHUP) and saved a checkpoint first."""

    exit_code = INTERRUPTED_EXIT_CODE


def nearest(name: str, names: Iterable[str]) -> str:
    """The known name closest to `name`, or an empty string if none is close.

    >>> nearest("temprature", ["temperature", "seed"])
    'temperature'
    """
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else ""
