"""Which edited copies of the training texts are added: the settings. `nlpxfer.data.augment` makes the copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nlpxfer.errors import ConfigError

EDITS: Final = ("swap", "deletion", "typo")
DEFAULT_COPIES: Final = 1
DEFAULT_SHARE: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Edited copies of each training row.

    Attributes:
        edits: One or more of `EDITS`; each copy gets one of them.
        copies: Copies of each row.
        share: Share of a text's words that an edit touches, at least one word.
        seed: With the text and the number of the copy, the only thing that a copy depends on.

    Raises:
        ConfigError: A value is outside its range; all such values are listed.
    """

    edits: tuple[str, ...]
    copies: int = DEFAULT_COPIES
    share: float = DEFAULT_SHARE
    seed: int = 42

    def __post_init__(self) -> None:
        faults = []
        known = ", ".join(EDITS)
        faults += [f"augmentation: {edit!r} is not one of {known}" for edit in self.edits if edit not in EDITS]
        if not self.edits or len(set(self.edits)) < len(self.edits):
            faults.append(f"augmentation: want each of {known} once at most, with commas between them")
        if self.copies < 1:
            faults.append(f"augmentation_copies: {self.copies} is below 1")
        if not 0 < self.share <= 1:
            faults.append(f"augmentation_share: {self.share} is not above 0 and up to 1")
        if faults:
            raise ConfigError.from_faults(faults)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Augmentation | None:
        """From the flat options of a run; None if no copies are asked for.

        >>> Augmentation.from_options({"augmentation": "swap,typo", "data_split_seed": 1}).edits
        ('swap', 'typo')
        """
        asked = options.get("augmentation")
        if asked is None:
            return None
        names = {"copies": "augmentation_copies", "share": "augmentation_share", "seed": "data_split_seed"}
        given = {own: options[name] for own, name in names.items() if options.get(name) is not None}
        return cls(edits=tuple(edit.strip() for edit in asked.split(",") if edit.strip()), **given)
