"""The teacher's sentence states: one per row, computed once and kept on disk, and some of them to compare rows with.

They are what the teacher's head reads, from the cache of frozen features. As they come with the batch like its logits,
teacher and student may read texts as different tokens.

Shapes: N rows, K of them, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from nlpxfer.config.long_texts import LongTexts
from nlpxfer.config.states import StatesPlan
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import ConfigError
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.states import TEACHER_STATES, StatesGuide, require_comparable
from nlpxfer.train.feature_cache import pooled_features
from nlpxfer.train.precision import autocast_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nlpxfer.checkpoint.load import Checkpoint
    from nlpxfer.config import RunOptions

Array = np.ndarray[Any, Any]

OTHER_ROWS: Final = 1024
"""Rows that each row is compared with. They are the same in all runs on the same rows, whatever their seed."""


class TeacherStates:
    """What the losses on states need of a teacher, as far as any of them has a weight.

    Args:
        asked: The losses; of a weight that is searched its greatest value.
        teacher: Its model lies on its device.
        options: Batch size, precision and device.
        rows_of: From a tokenizer to the N rows that are trained on.
        labelled: How many of them have labels; they are the first, and those that each row is compared with.
        folder: Folder of caches; default as in `pooled_features`.

    Attributes:
        columns: Columns of the training rows.
    """

    def __init__(
        self,
        asked: StatesPlan,
        teacher: Checkpoint,
        options: RunOptions,
        rows_of: Callable[[PreTrainedTokenizerBase], TokenisedRows],
        labelled: int,
        folder: str | None = None,
    ) -> None:
        self.teacher, self.options = teacher, options
        self.columns: dict[str, Array] = {}
        self.others_KH: torch.Tensor | None = None
        if asked.similarity_weight:
            states_NH = sentence_states(teacher, rows_of(teacher.tokenizer), options, folder)
            chosen = np.random.default_rng(0).permutation(labelled)[:OTHER_ROWS]
            self.columns[TEACHER_STATES] = states_NH
            self.others_KH = torch.from_numpy(np.ascontiguousarray(states_NH[chosen])).to(options.device)

    def guide(self, plan: StatesPlan) -> StatesGuide | None:
        """The teacher of the losses of a plan; None if it has none."""
        states = plan.asked()
        if not states.reads_anything:
            return None
        autocast = autocast_type(self.options)
        return StatesGuide(plan=states, teacher=self.teacher.model, autocast=autocast, others_KH=self.others_KH)


def sentence_states(teacher: Checkpoint, rows: TokenisedRows, options: RunOptions, folder: str | None = None) -> Array:
    """What the head of a frozen teacher reads for N rows, float32, shape (N, H).

    Args:
        teacher: Its model lies on its device.
        rows: As its tokenizer sees them.
        options: Batch size and precision.
        folder: Folder of caches; default as in `pooled_features`.

    Raises:
        StaleCacheError, NotFiniteError, NoSpaceError: See `pooled_features`.
    """
    return pooled_features(
        teacher.model,
        rows,
        Collator.for_tokenizer(teacher.tokenizer),
        batch_size=options.per_device_eval_batch_size,
        bf16=bool(options.bf16),
        folder=folder,
        description="teacher sentence states",
        quiet=bool(options.disable_tqdm),
    ).states_NH


def check_states(
    asked: StatesPlan,
    student: Checkpoint,
    teacher: Checkpoint,
    options: RunOptions,
    long_texts: LongTexts,
    *,
    pairs: bool,
) -> None:
    """Refuse early losses on states that two models, the rows (`pairs`) or the options of the run do not allow.

    Raises:
        ConfigError, CheckpointError: See `require_comparable` and `Distill.check`.
    """
    if not asked.reads_anything:
        return
    if asked.similarity_weight and long_texts.policy == "sliding_window":
        raise ConfigError("similarity_weight: sentence states are those of whole texts.", fix="--long_texts head_tail")
    require_comparable(asked, student, teacher, pairs=pairs)
    Distill(states=StatesGuide(plan=asked, teacher=teacher.model)).check(options)
