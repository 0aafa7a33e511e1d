"""Which tokens of a long text are read: its beginning and end, or windows spread over it.

Windows stand at even distances, the first at the beginning and the last at the end of the text, and all have the same
length. Chosen over a fixed step with a short rest at the end, because all windows count alike in the mean of the
logits, and a rest of five tokens would have the same say as a full window; it also pads nothing. The overlap is the
least one: to come out even it may be larger. A text that would need more than `max_windows` gets so many at even
distances, with gaps: to refuse it would stop a prediction at row 100,000, and this way all its regions have a say.

Of a pair, the longer text is cut or windowed; the shorter one stands in every window, and is cut at its end where it
takes more than half of the room.

Shapes: N rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nlpxfer.config.long_texts import LongTexts

if TYPE_CHECKING:
    from nlpxfer.data.tokenise import TokenisedRows

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

MANY = 0.2
"""Share of the training rows that are not read to the end, from which on the user is warned."""
_LOST: Final = {
    "head": ("their end", "--long_texts head_tail, --long_texts sliding_window or a larger --max_length"),
    "head_tail": ("their middle", "--long_texts sliding_window or a larger --max_length"),
    "sliding_window": ("what lies between the windows", "a larger --max_windows"),
}


def window_spans(length: int, room: int, overlap: int, most: int) -> list[tuple[int, int]]:
    """Begin and end of the windows over `length` tokens.

    Args:
        length: Tokens of the text.
        room: Tokens of a window.
        overlap: Tokens that neighbouring windows share at least, where `most` windows are enough; below `room`.
        most: Windows at most, two or more.

    >>> window_spans(10, 4, 1, 8)
    [(0, 4), (3, 7), (6, 10)]
    >>> window_spans(11, 4, 1, 8)  # a step of 3 is too long for three windows
    [(0, 4), (2, 6), (4, 8), (7, 11)]
    >>> window_spans(20, 4, 1, 2)
    [(0, 4), (16, 20)]
    """
    if length <= room:
        return [(0, length)]
    rest = length - room
    count = min(most, 1 + -(-rest // (room - overlap)))
    begins = [index * rest // (count - 1) for index in range(count)]
    return [(begin, begin + room) for begin in begins]


def read_positions(sequence_ids: Sequence[int | None], long_texts: LongTexts, max_length: int) -> list[Array]:
    """Positions of the tokens of each window of a long row; special tokens stand in all of them.

    Args:
        sequence_ids: For each token of the whole row: 0 or 1 for the first or second text, None if it is special.
        long_texts: What is read of it.
        max_length: Tokens of a window.

    >>> plan = LongTexts(policy="head_tail", head_share=0.5)
    >>> [window.tolist() for window in read_positions([None, 0, 0, 0, 0, 0, 0, None], plan, 6)]
    [[0, 1, 2, 3, 6, 7]]
    """
    text_of_token = np.array([-1 if text is None else text for text in sequence_ids])
    special, first, second = (np.flatnonzero(text_of_token == text) for text in (-1, 0, 1))
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    room = max_length - len(special)
    shorter = shorter[: room // 2]
    room -= len(shorter)
    if long_texts.policy == "head":
        parts = [longer[:room]]
    elif long_texts.policy == "head_tail":
        head = min(room, int(long_texts.head_share * (max_length - len(shorter))))
        parts = [np.concatenate([longer[:head], longer[len(longer) - (room - head) :]])]
    else:
        spans = window_spans(len(longer), room, long_texts.overlap(max_length), long_texts.max_windows)
        parts = [longer[begin:end] for begin, end in spans]
    return [np.sort(np.concatenate([special, shorter, part])) for part in parts]


def length_facts(rows: TokenisedRows) -> dict[str, float]:
    """How much of N rows is read, for the report.

    Returns:
        `longer`: share of the rows that are longer than one window; `partly_read`: share of those of which not every
        token is read; `windows_per_row`: mean.
    """
    count = max(1, len(rows))
    windows_N = rows.windows_per_row
    partly_N = np.zeros(len(rows), dtype=bool) if rows.unread is None else rows.unread > 0
    return {
        "longer": float((partly_N | (windows_N > 1)).sum() / count),
        "partly_read": float(partly_N.sum() / count),
        "windows_per_row": float(windows_N.sum() / count),
    }


def tell_lengths(rows: TokenisedRows, long_texts: LongTexts, max_length: int, *, batch_size: int) -> None:
    """Log how much of the training rows is read, and how large their batches become."""
    facts = length_facts(rows)
    if rows.windows is not None:
        logger.info(
            "long texts: %.1f windows per training row, up to %d in a batch of %d rows; where memory is short, divide "
            "--per_device_train_batch_size and multiply --gradient_accumulation_steps by the same number",
            facts["windows_per_row"],
            np.sort(rows.windows_per_row)[-batch_size:].sum(),
            batch_size,
        )
    if facts["partly_read"] > MANY:
        lost, remedy = _LOST[long_texts.policy]
        logger.warning(
            "%.0f %% of the training rows are too long to be read whole (max_length %d) and lose %s: try %s",
            100 * facts["partly_read"],
            max_length,
            lost,
            remedy,
        )
