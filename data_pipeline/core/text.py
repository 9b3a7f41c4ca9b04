"""Escapes untrusted text (names, paths, messages) for terminals, HTML, Markdown and tables.

A name may contain terminal control sequences, bidirectional overrides, markup or separators of a table. Such characters
are replaced by visible escapes.
"""

from __future__ import annotations

import html
import re
import unicodedata

_SPECIAL = re.compile(r"[\\`*_{}\[\]<>|~&]|^[#+-]|(?<=^[0-9])[.)]")
"""Characters with a meaning in Markdown, anywhere or at the start of a line."""
_FENCE = re.compile(r"`{3,}")
_FORMULA = ("=", "+", "-", "@")
"""First characters of cells that spreadsheets interpret as formulas."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories shown as escapes: control, format, surrogate, private use, line and paragraph separator."""


def visible(text: str, keep: str = "") -> str:
    r"""Returns `text` with every control, format and surrogate character as an escape such as \x1b.

    Args:
        text: any text.
        keep: characters that are not escaped, such as "\n" in a message of several lines.
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
    """Escapes `text` for a Markdown paragraph or table cell on TensorBoard's text page."""
    return _SPECIAL.sub(lambda found: "&amp;" if found[0] == "&" else f"\\{found[0]}", visible(text))


def markdown_block(text: str, language: str = "") -> str:
    """Returns `text` as a fenced code block with a fence that does not occur in it.

    Args:
        text: any text; lines and tabs are kept.
        language: for highlighting, such as "json" or "diff".
    """
    shown = visible(text, keep="\n\t")
    fence = "`" * max([3, *(len(found) + 1 for found in _FENCE.findall(shown))])
    return f"{fence}{language}\n{shown}\n{fence}"


def table_cell(text: str) -> str:
    """Returns `text` as a cell of a CSV or TSV file: one line, no separator, no formula of a spreadsheet."""
    one_line = visible(text)
    is_formula = one_line.startswith(_FORMULA) and len(one_line) > 1 and not _is_number(one_line)
    return f"'{one_line}" if is_formula else one_line


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
