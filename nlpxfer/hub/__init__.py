"""The last stage: a verified push of a finished output folder to the Hugging Face Hub."""

from __future__ import annotations

from nlpxfer.hub.folder import finished_files
from nlpxfer.hub.patience import Backoff
from nlpxfer.hub.push import Pushed, check_push_request, push_folder

__all__ = ["Backoff", "Pushed", "check_push_request", "finished_files", "push_folder"]
