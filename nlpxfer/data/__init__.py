"""Data: from files, folders, bundled sets or the Hub to checked rows with one label schema.

`formats`, `files` and `sources` read, `rows` checks, `schema` names the classes, `splits` and `leaks` draw and
compare, `arrange` puts these in order, and `load` does it all for one request.
"""

from __future__ import annotations

from nlpxfer.data.leaks import Leaks, find_leaks
from nlpxfer.data.load import DataRequest, TextData, load_data
from nlpxfer.data.rows import normalise_text
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.splits import stratified_sample, stratified_split

__all__ = [
    "DataRequest",
    "LabelSchema",
    "Leaks",
    "TextData",
    "find_leaks",
    "load_data",
    "normalise_text",
    "stratified_sample",
    "stratified_split",
]
