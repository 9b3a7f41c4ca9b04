"""Makes text that is not ours (names, paths, messages of others) safe to show: terminals, HTML, Markdown and tables.

A name may hold anything: terminal control sequences, characters that reverse the reading direction, markup, the
separators of a table. Such characters are replaced by their escapes, so that a reader sees them and nothing obeys them.
"""

from __future__ import annotations

import html
import re
import unicodedata

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")
"""Characters with a meaning in Markdown."""
_FORMULA = ("=", "+", "-", "@")
"""First characters that make a spreadsheet take a cell for a formula."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories shown as escapes: control, format, surrogate, private use, line and paragraph separator."""


def visible(text: str, keep: str = "") -> str:
    r"""Returns `text` with every control, format and surrogate character as an escape such as \x1b.

    Args:
        text: Any text.
        keep: Characters that stay as they are, such as "\n" in a message of several lines.
    """
    if text.isprintable():  # the common case
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _HIDDEN
        else character.encode("unicode_escape").decode()
        for character in text
    )


def html_text(text: str) -> str:
    """Returns `text` as the content of an HTML element or attribute."""
    return html.escape(visible(text))


def markdown_text(text: str) -> str:
    """Returns `text` as words of a Markdown paragraph or table cell, as TensorBoard's text page shows them."""
    return _SPECIAL.sub(r"\\\1", visible(text)).replace("&", "&amp;")


def table_cell(text: str) -> str:
    """Returns `text` as a cell of a CSV or TSV file: one line, no separator, no formula of a spreadsheet."""
    one_line = visible(text)
    return f"'{one_line}" if one_line.startswith(_FORMULA) and not _is_number(one_line) else one_line


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
