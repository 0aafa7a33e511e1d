"""How texts of more than `max_length` tokens are read: the settings. `nlpxfer.data.windows` does the work.

They stand here, beside the options, because training, the teacher's cache and a finished classifier must read texts
alike: all three make them from the same flat names, those of the command line and of run.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nlpxfer.errors import ConfigError

POLICIES: Final = ("head", "head_tail", "sliding_window")
DEFAULT_HEAD_SHARE: Final = 0.25
DEFAULT_MAX_WINDOWS: Final = 8


@dataclass(frozen=True, kw_only=True)
class LongTexts:
    """What of a long text is read.

    Attributes:
        policy: "head": the first tokens, as the tokenizer cuts; "head_tail": the first and the last ones;
            "sliding_window": overlapping windows of `max_length` tokens, whose logits are averaged.
        head_share: Share of `max_length` that the first part gets, in [0, 1).
        window_overlap: Tokens that two neighbouring windows share at least; None for a quarter of `max_length`.
        max_windows: Most windows of a text; a longer one has gaps between its windows.

    Raises:
        ConfigError: A value is outside its range; all such values are listed.

    Source of head_tail: Sun et al. 2019, arXiv:1905.05583, section 5.3.1: 128 of 510 tokens from the beginning.
    """

    policy: str = "head"
    head_share: float = DEFAULT_HEAD_SHARE
    window_overlap: int | None = None
    max_windows: int = DEFAULT_MAX_WINDOWS

    def __post_init__(self) -> None:
        faults = []
        if self.policy not in POLICIES:
            faults.append(f"long_texts: {self.policy!r} is not one of {', '.join(POLICIES)}")
        if not 0 <= self.head_share < 1:
            faults.append(f"head_share: {self.head_share} is not in [0, 1)")
        if self.window_overlap is not None and self.window_overlap < 0:
            faults.append(f"window_overlap: {self.window_overlap} is negative")
        if self.max_windows < 2:
            faults.append(f"max_windows: {self.max_windows} is below 2; one window is --long_texts head")
        if faults:
            raise ConfigError.from_faults(faults)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LongTexts:
        """From the flat options of a run; those that are missing or null have their defaults.

        >>> LongTexts.from_options({"long_texts": "head_tail", "head_share": None, "seed": 1}).policy
        'head_tail'
        """
        names = {"policy": "long_texts", **{n: n for n in ("head_share", "window_overlap", "max_windows")}}
        return cls(**{own: options[name] for own, name in names.items() if options.get(name) is not None})

    def options(self) -> dict[str, Any]:
        """The flat options that `from_options` makes this from."""
        values = vars(self)
        return {"long_texts": self.policy, **{name: value for name, value in values.items() if name != "policy"}}

    def overlap(self, max_length: int) -> int:
        """Tokens that neighbouring windows share at least."""
        return max_length // 4 if self.window_overlap is None else self.window_overlap

    def describe(self, max_length: int) -> str:
        """All that decides how a text is read, in one line.

        >>> LongTexts(policy="sliding_window").describe(128)
        'sliding_window: overlap 32, at most 8 windows'
        """
        detail = {
            "head": "",
            "head_tail": f": head_share {self.head_share:g}",
            "sliding_window": f": overlap {self.overlap(max_length)}, at most {self.max_windows} windows",
        }
        return self.policy + detail[self.policy]

    def remark(self, max_length: int, *, pairs: bool) -> str:
        """What a user of the trained model must know, in one sentence.

        Args:
            max_length: Tokens of a row, or of a window.
            pairs: Whether a row has two texts.
        """
        if self.policy == "head" and pairs:
            return (
                f"Trained and scored on {max_length} tokens of both texts together; of the longer one the end is left "
                "out first."
            )
        if self.policy == "head":
            return f"Trained and scored on the first {max_length} tokens of each text; what follows is not read."
        return (
            f"Texts of more than {max_length} tokens were read with {self.describe(max_length)}: nlpxfer predict "
            "does the same, a plain pipeline does not."
        )

    def check_room(self, max_length: int, special_tokens: int, *, pairs: bool) -> None:
        """See that `max_length` tokens leave room for the text and for steps between windows.

        Args:
            max_length: Tokens of a window.
            special_tokens: How many of them the tokenizer adds.
            pairs: Whether half of the room may go to a second text.

        Raises:
            ConfigError: They do not.
        """
        room = max_length - special_tokens
        least = room - room // 2 if pairs else room
        if self.policy != "head" and least < 1:
            raise ConfigError(f"max_length: {max_length} leaves no room beside {special_tokens} special tokens")
        if self.policy == "sliding_window" and self.overlap(max_length) >= least:
            raise ConfigError(
                f"window_overlap: {self.overlap(max_length)} is not below the {least} tokens of a text that a window "
                f"of {max_length} tokens is sure to hold.",
                fix=f"a larger max_length, or of a training --window_overlap {least // 2}",
            )
