"""Tables on the terminal: a fixed width in pipes, and names that can be copied."""

from __future__ import annotations

import io
import re

import pytest

from launch.cli.tables import PIPED_WIDTH, console, show, table
from pretrain.evaluate import report
from pretrain.evaluate.rows import ResultRow


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [("a-run-with-a-name-of-more-than-forty-characters", "x" * 60, "y" * 60)]


@pytest.mark.parametrize("columns", ["40", "500"])
def test_piped_output_has_a_fixed_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert console(io.StringIO()).width == PIPED_WIDTH
    assert console(Terminal()).width == int(columns)


def test_the_first_column_is_never_cut_and_no_line_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = Terminal()
    console(shown).print(table(("run", "state", "loss"), ROWS))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert max(map(len, lines)) <= 60
    assert "".join(line[: lines[0].index("state")].strip() for line in lines[1:]) == ROWS[0][0]


def test_a_list_of_jobs_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("launch.cli.tables.PIPED_WIDTH", 80)
    columns = ("run", "command", "where", "job", "state", "step", "of", "submitted")
    show(
        table(
            columns,
            [("preprocess_my_corpus", "preprocess", "slurm", "1234567", "running", "–", "–", "2026-01-01 10:00")],
        )
    )
    said = capsys.readouterr().out
    assert "2026-01-01 10:00" in said
    assert "…" not in said
    assert len(said.splitlines()) == 2


def test_columns_that_users_copy_from_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = Terminal()
    console(shown).print(table(("run", "state", "path"), [("a", "s" * 60, "p" * 60)], keep={2}))
    said = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    assert said.count("p") == 60 + 1, "and one in the heading"
    assert "…" in said, "of the other column"


def test_results_of_an_evaluation_keep_the_names_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = Terminal()
    measure = "EER of verification"
    console(shown).print(
        report.table([ResultRow(task="phones", measure=measure, who="Q" * 70, value=0.5, low=0.25, high=0.75)])
    )
    text = shown.getvalue()
    assert text.count("Q") == 70
    assert all(word in text for word in (*measure.split(), "50.0%", "25.0%", "75.0%"))
    assert "log-mel" not in text, "a column without values"
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())) <= 80
