"""Text for Markdown: names and numbers as they are shown in cards and tables."""

from __future__ import annotations

import re


def escape_markdown(text: str) -> str:
    r"""`text` on one line, so that Markdown, HTML and table cells show it as it is.

    >>> escape_markdown("a|b <i> *c* snake_case")
    'a\\|b &lt;i&gt; \\*c\\* snake_case'
    """
    text = "".join(character if character.isprintable() else " " for character in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~#$!])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return " ".join(text.split())


def short_count(number: int) -> str:
    """A count with three digits and a decimal unit.

    >>> short_count(22_700_000), short_count(999), short_count(999_950)
    ('22.7 M', '999 ', '1.00 M')
    """
    value = float(number)
    for unit in ("", "k", "M", "G"):
        if value < 999.5 or unit == "G":
            break
        value /= 1000
    digits = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"
