"""Untrusted names and files of run folders are escaped, never executed, and a broken one hides no other run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from launch import main
from launch.cli.tables import table, warn
from launch.commands.board import unique_names
from launch.config import LocalConfig
from launch.exit_codes import ExitCode
from launch.runs.job_record import read_record, write_record
from launch.runs.summary import CLOCK_SKEW_SECONDS, find_run, last_activity, summarise

CONFIG: dict[str, Any] = {"name": "x", "train": {"steps": 5}, "objective": {"name": "best_rq"}}
ROW = {"step": 3, "time": 1.0, "loss/total": 1.5, "opt/lr": 1e-3}
MARKUP = ["[/b]", "[bold red]x", "[/2]", ":smile:", "[link=http://x]y", "$x^", "_hidden", "a\\[b]", "[[", "{name}"]
CONTROLS = [
    "esc\x1b[31m",
    "bell\x07",
    "osc\x1b]0;title\x07",
    "rtl\u202egpj",
    "line\u2028x",
    "del\x7f",
    "c1\x9b2J",
    "tab\tx",
]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def make(runs: Path, name: str) -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    write_record(folder, "1:1.0", LocalConfig())
    return folder


def test_markup_in_a_name_is_escaped(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in MARKUP:
        if "/" not in name:
            make(runs, name)
    make(runs / "[", "b]")
    for command in (["jobs", "list"], ["runs"], ["compare", *sorted(map(str, runs.glob("*")))]):
        assert main.main(command) == 0, command
        said = capsys.readouterr().out
        for name in MARKUP:
            assert "/" in name or name in said, (command, name)


def test_control_characters_are_shown_as_escapes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name cannot colour the terminal, set its title, move its cursor or reverse the text direction."""
    for name in CONTROLS:
        make(runs, name)
    for command in (["jobs", "list"], ["runs"], ["jobs", "status", "nosuch"], ["compare", *map(str, runs.glob("*"))]):
        main.main(command)
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert not {"\x1b", "\x07", "\u202e", "\u2028", "\x7f", "\x9b"} & set(said), command
    main.main(["jobs", "list"])
    assert "esc\\x1b[31m" in capsys.readouterr().out


def test_table_cells_and_messages_contain_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    made = table(("[/b]", "x"), [(name, "\x1b[0m") for name in MARKUP], title="[/t]")
    with Console(force_terminal=False, width=200).capture() as captured:
        pass
    console = Console(file=None, width=200, markup=True)
    with console.capture() as captured:
        console.print(made)  # even on a console with markup enabled
    for name in ("[/b]", "[/t]", *MARKUP):
        assert name in captured.get()
    warn("a\x1b]0;x\x07\nb")
    assert capsys.readouterr().err == "a\\x1b]0;x\\x07\nb\n"


def test_error_messages_contain_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["shards", "stats", "nowhere\x1b[2J"]) == ExitCode.USAGE
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000),
        *(b'{"train": 3}', b'{"train": {"steps": "5"}}', b'{"train": {"steps": true}}'),
    ],
)
def test_a_broken_config_does_not_hide_other_runs(
    runs: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    make(runs, "good")
    (make(runs, "broken") / "config.json").write_bytes(content)
    for command in (["runs"], ["jobs", "list"]):
        assert main.main(command) == 0, command
        said = capsys.readouterr()
        assert "good" in said.out
        assert "unreadable" in said.out
        assert "broken/config.json" in said.err
    assert main.main(["compare", "runs/good", "runs/broken"]) == ExitCode.FAILED
    assert "broken/config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ([], "object"),
        ({"launcher": "local"}, "handle"),
        ({"launcher": "nosuch", "handle": "1", "host": "x", "submitted": "", "config": {}}, "launcher"),
        ({"launcher": "local", "handle": 1, "host": "x", "submitted": "", "config": {}}, "handle"),
        ({"launcher": "local", "handle": "1", "host": "x", "submitted": "", "config": []}, "config"),
        ({"launcher": "local", "handle": "1", "host": "x", "submitted": "", "config": {}, "more": 1}, "more"),
    ],
)
def test_an_invalid_job_record_is_reported_with_file_and_field(runs: Path, values: Any, field: str) -> None:
    folder = make(runs, "mine")
    (folder / "job.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"job\.json: .*{field}.*start the run again"):
        read_record(folder)


def test_metrics_of_unexpected_types_are_left_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(runs, "mine")
    rows = [{"step": "x", "loss/total": None, "time": []}, {"step": 4, "loss/total": "1", "opt/lr": {}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\nnot json\n")
    (folder / "evaluations.jsonl").write_text('{"value": "x"}\n')
    assert main.main(["runs"]) == 0
    assert "4/5" in capsys.readouterr().out
    assert main.main(["jobs", "status", "mine"]) in (0, 1)
    assert "step 4/5" in capsys.readouterr().out


def test_a_time_in_the_future_does_not_count_as_activity(runs: Path) -> None:
    """Such times come from copied folders or wrong clocks."""
    folder, now = make(runs, "mine"), time.time()
    for file in folder.rglob("*"):
        os.utime(file, (now - 3600, now - 3600))
    assert summarise(folder).state == "stopped"
    for ahead in (3600.0, 1e9):
        os.utime(folder / "metrics.jsonl", (now + ahead, now + ahead))
        assert summarise(folder).state == "stopped", ahead
        assert last_activity(folder) < now
    (folder / "metrics.jsonl").write_text(json.dumps(ROW | {"time": now + 1e6}) + "\n")
    os.utime(folder / "metrics.jsonl", (now - 3600, now - 3600))
    assert summarise(folder).state == "stopped", "nor does a future time in a row count"
    os.utime(folder / "metrics.jsonl", (now + CLOCK_SKEW_SECONDS / 2,) * 2)
    assert summarise(folder).state == "running", "small clock differences are tolerated"


def test_board_names_are_unique(tmp_path: Path) -> None:
    folders = sorted(
        [tmp_path / "a-b", tmp_path / "a" / "b", tmp_path / "z" / "b", tmp_path / "a_b", tmp_path / "c\x1b"]
    )
    names = list(unique_names(folders))
    assert len(set(names)) == 5
    assert all(name.isprintable() and "/" not in name for name in names)
    assert {"z-b", "a_b"} <= set(names)


def test_a_misspelt_run_is_suggested(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(runs, "hubert_base")
    assert find_run("hubert_base") == Path("runs/hubert_base")
    for command in (["jobs", "status", "hubert_bsae"], ["replay", "hubert_bsae"], ["export", "hubert_bsae", "out"]):
        assert main.main(command) == ExitCode.USAGE, command
        assert "did you mean hubert_base?" in capsys.readouterr().err
    assert main.main(["compare", "runs/hubert_bsae", "runs/hubert_base"]) == ExitCode.USAGE
    assert "did you mean runs/hubert_base?" in capsys.readouterr().err
