"""Options of the losses on what a teacher computes before its logits: which states, how much they weigh, and how."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from nlpxfer.config.options import option
from nlpxfer.errors import ConfigError

if TYPE_CHECKING:
    from nlpxfer.config.ranges import Range

SWITCHES: Final = {
    "hidden_layers": "hidden_weight",
    "relation_layer": "relation_weight",
    "num_relation_heads": "relation_weight",
    "similarity_loss": "similarity_weight",
    "similarity_temperature": "similarity_weight",
}
"""Option -> the weight without which it does nothing."""
WEIGHTS: Final = ("hidden_weight", "relation_weight", "similarity_weight")


@dataclass(frozen=True, kw_only=True)
class StatesPlan:
    """Which states are compared, how much each term weighs, and how.

    Attributes:
        hidden_weight: Weight of `hidden_loss`, a mean over the pairs of layers; at least 0.
        hidden_layers: Pairs "student:teacher" with commas, counted from 0; "auto": the layers that a slice was cut
            from if the teacher's last is among them, else evenly spaced ones; the last with the last.
        relation_weight: Weight of `relation_loss`, a mean over queries, keys and values; at least 0.
        relation_layer: The teacher's layer; None: its last. The student's is its last.
        num_relation_heads: A_r; None: the largest number up to 48 that divides all widths.
        similarity_weight: Weight of the loss on sentence states; at least 0.
        similarity_loss: "contrastive" or "relational".
        similarity_temperature: tau of either, above 0.

    Raises:
        ConfigError: A value is outside its range, or does nothing; all such values are listed.
    """

    hidden_weight: float = option(0.0, "Weight of the squared error between hidden states; 0: none.")
    hidden_layers: str = option("auto", "Layers to compare, student:teacher from 0, such as 0:1,1:3,2:5.")
    relation_weight: float = option(0.0, "Weight of the query, key and value relations (MiniLMv2); 0: none.")
    relation_layer: int | None = option(
        None, "The teacher's layer, from 0, whose relations are taught. Default: last."
    )
    num_relation_heads: int | None = option(
        None, "Parts that queries, keys and values are split into. Default: the most up to 48 that fit."
    )
    similarity_weight: float = option(0.0, "Weight of the loss on sentence states; 0: none.")
    similarity_loss: Literal["contrastive", "relational"] = option(
        "contrastive", "Find the own teacher state among others, or be as similar to others as the teacher is."
    )
    similarity_temperature: float = option(0.1, "tau: divides the cosines of similarity_loss.")

    def __post_init__(self) -> None:
        if faults := self.states_faults():
            raise ConfigError.from_faults(faults)

    def states_faults(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        faults = []
        for name in WEIGHTS:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                faults.append(f"{name}: {value} is not a finite number of at least 0")
        if self.hidden_layers != "auto":
            faults += _pair_faults(self.hidden_layers)
        if self.relation_layer is not None and self.relation_layer < 0:
            faults.append(f"relation_layer: {self.relation_layer} is negative; layers are counted from 0")
        if self.num_relation_heads is not None and self.num_relation_heads < 1:
            faults.append(f"num_relation_heads: {self.num_relation_heads} is below 1")
        if not 0 < self.similarity_temperature < math.inf:
            faults.append(f"similarity_temperature: {self.similarity_temperature} is not above 0 and finite")
        if self.similarity_loss not in ("contrastive", "relational"):
            faults.append(f"similarity_loss: {self.similarity_loss!r} is not one of contrastive, relational")
        for name, switch in SWITCHES.items():
            if getattr(self, name) != StatesPlan.__dataclass_fields__[name].default and not getattr(self, switch):
                faults.append(f"{name}: does nothing without {switch}")
        return faults

    def asked(self, ranges: Mapping[str, Range] | None = None) -> StatesPlan:
        """These options alone; of a weight that is searched, its greatest value."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(StatesPlan)}
        return StatesPlan(
            **values | {name: max(found.ends) for name, found in (ranges or {}).items() if name in WEIGHTS}
        )

    @property
    def reads_tokens(self) -> bool:
        """Whether the teacher runs beside the student, on the same tokens."""
        return bool(self.hidden_weight or self.relation_weight)

    @property
    def reads_anything(self) -> bool:
        """Whether any term has a weight."""
        return self.reads_tokens or bool(self.similarity_weight)


def parse_pairs(text: str) -> list[tuple[int, int]]:
    """Pairs of layers as they are written, student and teacher.

    >>> parse_pairs("0:1,2:5")
    [(0, 1), (2, 5)]

    Raises:
        ValueError: They are written in another way.
    """
    pairs = []
    for part in text.split(","):
        student, teacher = part.split(":")
        pairs.append((int(student), int(teacher)))
    return pairs


def _pair_faults(text: str) -> list[str]:
    try:
        pairs = parse_pairs(text)
    except ValueError:
        return [f"hidden_layers: {text!r} is neither auto nor pairs such as 0:1,1:3,2:5"]
    if len({student for student, _ in pairs}) < len(pairs):
        return [f"hidden_layers: {text!r} names a layer of the student twice"]
    return []
