"""Reads text tables row by row: TSV, CSV and JSON lines.

Only newlines end rows; U+2028 and U+0085 are text. Column names and cells are stripped. An unreadable row is returned
with a problem and does not affect other rows.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import fsspec

from data_pipeline.core.jsonl import each_line
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url

ENDINGS: Final = ("tsv", "csv", "jsonl", "json")
BOM: Final = b"\xef\xbb\xbf"
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class TableRow:
    """One row of a table."""

    number: int
    """Row number from 1, without the header and empty lines."""
    values: dict[str, Any] = field(default_factory=dict)
    """Values by column; null, and empty cells of TSV and CSV, are absent."""
    problem: str = ""
    """Reason why the row cannot be used; "" if it can."""


def read_table(path: str, config_field: str) -> Iterator[TableRow]:
    """Reads a table by its ending: .tsv, .csv (first line names the columns), .jsonl or .json (one object per line).

    Args:
        path: local path or fsspec URL.
        config_field: name of the config field with `path`, for messages.

    Raises:
        ConfigError: the table cannot be read, has no usable row, or has two columns of the same name.
    """
    ending = path.rsplit(".", 1)[-1].lower()
    if ending not in ENDINGS:
        raise ConfigError(f"{config_field}={path}: a manifest ends in .tsv, .csv, .jsonl or .json{_tables_in(path)}")
    first = ""
    usable = False
    for row in rows_of(_lines(path, config_field), ending):
        usable |= not row.problem
        first = first or (row.problem and f"row {row.number} {row.problem}")
        yield row
    if first and not usable:
        raise ConfigError(f"{config_field}={path}: no row can be used; {first}")


def _tables_in(folder: str) -> str:
    """Returns the end of a message that names tables in a local folder; "" for other paths."""
    if is_url(folder) or not Path(folder).expanduser().is_dir():
        return ""
    found = sorted(file.name for file in Path(folder).expanduser().iterdir() if file.suffix[1:].lower() in ENDINGS)
    return f", and this is a folder; in it: {', '.join(found[:5]) or 'no table'}"


def rows_of(lines: Iterable[bytes], kind: str) -> Iterator[TableRow]:
    """Parses a table.

    Args:
        lines: its lines without their newlines.
        kind: tsv, csv, jsonl or json; `quoted_tsv` also removes CSV's quotes from cells.
    """
    return _rows((line if number else line.removeprefix(BOM) for number, line in enumerate(lines)), kind)


def _lines(path: str, config_field: str) -> Iterator[bytes]:
    """Yields the lines of a file without their newlines; the file need not fit into memory."""
    try:
        with fsspec.open(path if is_url(path) else str(Path(path).expanduser()), "rb") as file:
            for line in file:
                yield line.removesuffix(b"\n")
    except Exception as error:  # every protocol of fsspec has its own exceptions
        raise ConfigError(f"{config_field}={path}: cannot be read as a manifest ({error})") from None


def _rows(lines: Iterable[bytes], kind: str) -> Iterator[TableRow]:
    parse = _json_rows if kind in ("jsonl", "json") else _csv_rows if kind == "csv" else _tsv_rows(kind)
    is_utf8 = kind in ("tsv", "quoted_tsv")  # its lines were decoded strictly
    for number, (values, problem) in enumerate(parse(lines), start=1):
        if not problem and not is_utf8 and not _encodable(values):
            problem = "holds characters that cannot be written as UTF-8"
        yield TableRow(number, {} if problem else values, problem)


def as_text(value: Any) -> str:
    """Returns a value of a table as stripped text; 0 is "0" and false is "false"."""
    if isinstance(value, str):
        return value.strip()
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


Parsed = Iterator[tuple[dict[str, Any], str]]
"""(values, problem) of each row."""


def _json_rows(lines: Iterable[bytes]) -> Parsed:
    for line in each_line(lines):
        row = line.row or {}
        yield {key.strip(): value for key, value in row.items() if value is not None}, line.problem


def _tsv_rows(kind: str) -> Callable[[Iterable[bytes]], Parsed]:
    def parse(lines: Iterable[bytes]) -> Parsed:
        return _with_header(cells(line) for line in lines if line.strip(b"\r"))

    def cells(line: bytes) -> list[str] | str:
        try:
            found = line.decode().rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            return f"is not UTF-8 ({error.reason})"
        return [_unquoted(cell) for cell in found] if kind == "quoted_tsv" else found

    return parse


def _csv_rows(lines: Iterable[bytes]) -> Parsed:
    rest = iter(lines)
    header = next((line for line in rest if line.strip()), b"")

    def rows() -> Iterator[list[str] | str]:
        # bytes that are not UTF-8 become surrogates, which `rows_of` refuses row by row
        texts = (
            line.decode("utf-8", "surrogateescape").rstrip("\r") + "\n" for line in itertools.chain([header], rest)
        )
        reader = csv.reader(texts, delimiter=_delimiter(header), skipinitialspace=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"is not CSV ({error})"
                continue
            if row:
                yield row

    return _with_header(rows())


def _delimiter(header: bytes) -> str:
    """Returns what divides the cells: some programs write semicolons or tabs, and then no comma in the first line."""
    return "," if b"," in header else ";" if b";" in header else "\t" if b"\t" in header else ","


def _with_header(rows: Iterator[list[str] | str]) -> Parsed:
    header: list[str] | None = None
    for row in rows:
        if isinstance(row, str):
            if header is None:
                raise ConfigError(f"the first line of the table {row}")
            yield {}, row
        elif header is None:
            header = [name.strip() for name in row]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise ConfigError(f"the column {twice[0]!r} is named twice in the first line of the table")
        elif any(cell.strip() for cell in row[len(header) :]):
            yield {}, f"has {len(row)} cells; the first line names {len(header)} columns"
        else:
            cells = zip(header, (cell.strip() for cell in row), strict=False)
            yield {name: cell for name, cell in cells if name and cell}, ""


def _unquoted(cell: str) -> str:
    """Removes CSV's quotes around a cell; an unpaired quote is kept."""
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _encodable(values: dict[str, Any]) -> bool:
    try:
        for key, value in values.items():
            key.encode()
            as_text(value).encode()
    except UnicodeEncodeError:
        return False
    return True
