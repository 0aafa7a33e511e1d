"""Trying again while the Hub is busy, and turning its refusals into errors that say what to type.

The waiting is our own: `huggingface_hub` does not retry `repos/create`, `validate-yaml` or (without Xet) the commit.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # documented, not re-exported

from nlpxfer.errors import PushError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TOKEN: Final = re.compile(rb"hf_[A-Za-z0-9]{20,}")
RETRIED_STATUS: Final = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
TOKENS_PAGE: Final = "https://huggingface.co/settings/tokens"
LOGIN: Final = f"hf auth login, or export HF_TOKEN=<a token with write access from {TOKENS_PAGE}>"


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How often and how long to wait when the Hub is busy or the connection drops.

    Args:
        attempts: Tries in all.
        first_seconds: The first pause; each further one is twice as long.
        longest_seconds: The longest pause of our own choice.
        patience_seconds: The longest pause that the Hub may ask for. Its rate limits count over five minutes.
    """

    attempts: int = 6
    first_seconds: float = 1.0
    longest_seconds: float = 30.0
    patience_seconds: float = 330.0

    def pause(self, attempt: int, asked: float | None) -> float | None:
        """Seconds to wait after the failed try `attempt` (from 1), or None to give up; `asked` is the Hub's wish.

        >>> Backoff().pause(3, None), Backoff().pause(1, 300.0), Backoff().pause(1, 3600.0)
        (4.0, 300.0, None)
        """
        if attempt >= self.attempts or (asked is not None and asked > self.patience_seconds):
            return None
        own = min(self.longest_seconds, self.first_seconds * 2.0 ** (attempt - 1))
        return own if asked is None else asked


def patiently(action: Callable[[], Result], doing: str, full_id: str, backoff: Backoff) -> Result:
    """The result of `action`, tried again after pauses while the Hub is busy; else a PushError."""
    for attempt in itertools.count(1):
        try:
            return action()
        except PushError:
            raise
        except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
            fault = _hub_fault(error)
            pause = backoff.pause(attempt, _asked_pause(fault)) if _is_passing(fault) else None
            if pause is None:
                raise _explained(error, doing, full_id, attempt) from error
            logger.warning("%s failed (%s); try %d follows in %.1f s.", doing, _words(fault), attempt + 1, pause)
            time.sleep(pause)
    raise RuntimeError("unreachable: itertools.count has no end")


def _hub_fault(error: BaseException) -> BaseException:
    """The Hub's answer behind an error: upload threads wrap it in a RuntimeError."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx2.HTTPError):
        cause = cause.__cause__
    return cause or error


def _is_passing(fault: BaseException) -> bool:
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in RETRIED_STATUS
    # A gateway's HTML page instead of an answer shows as JSONDecodeError.
    dropped = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, json.JSONDecodeError)
    return isinstance(fault, dropped)


def _asked_pause(fault: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, by `Retry-After` or its rate-limit headers; None if it does not say."""
    if not isinstance(fault, HfHubHTTPError):
        return None
    headers = fault.response.headers
    limit = parse_ratelimit_headers(headers)
    if fault.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "").strip()
    return float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else None


def _explained(error: BaseException, doing: str, full_id: str, attempts: int) -> PushError:
    """The error that tells what to type."""
    fault = _hub_fault(error)
    status = fault.response.status_code if isinstance(fault, HfHubHTTPError) else None
    name = full_id.split("/")[-1]
    what, fix = f"{doing} failed.", "push again later; nothing is lost on disk"
    why = _words(fault) if fault is not error else ": ".join(_words(each) for each in (error, error.__cause__) if each)
    if isinstance(fault, OfflineModeIsEnabled):
        why, fix = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    elif status == 401:
        what, fix = f"{doing} failed: the Hub does not accept the access token.", LOGIN
    elif status == 403:
        what = f"{doing} failed: this token may not write to {full_id}."
        fix = f"--hub_model_id <your-name>/{name}, or a token with write access to it from {TOKENS_PAGE}"
    elif status == 404:
        what = f"{doing} failed: the Hub knows no such repository or namespace, or hides it from this token."
        fix = f"check the spelling of --hub_model_id {full_id} (your own: hf auth whoami)"
    elif status == 400 or isinstance(error, ValueError):  # a refused model card is a ValueError with the reasons
        why, fix = _words(error), "correct what the Hub names, then push again"
    elif _is_passing(fault):
        what = f"{doing} failed after {attempts} {'try' if attempts == 1 else 'tries'}."
    return PushError(what, why=why, fix=fix)


def _words(fault: BaseException) -> str:
    """The error's own words on one line, without tokens."""
    text = " ".join(str(fault).split()) or type(fault).__name__
    return TOKEN.sub(b"hf_***", text.encode()).decode()


def listed(title: str, lines: Iterable[str]) -> str:
    """A title and one indented line for each entry."""
    return "\n".join([title, *(f"  - {line}" for line in lines)])
