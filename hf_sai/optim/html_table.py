"""Writes a table of words as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["html_table"]


def html_table(rows: Sequence[Sequence[str]], note: str = "") -> str:
    """The rows as an HTML table, the first of them as its head.

    Args:
        rows: Words, as many in each row.
        note: A line below the table.

    Example:
        >>> html_table([("a", "b"), ("1", "<2>")], "c")
        '<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>&lt;2&gt;</td></tr></table><p>c</p>'
    """
    lines = []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        lines.append("".join(f"<{cell}>{html.escape(word)}</{cell}>" for word in row))
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{table}</table>" + (f"<p>{html.escape(note)}</p>" if note else "")
