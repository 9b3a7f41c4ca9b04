"""`auricle shards` and `auricle data plan` on small shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch import main
from launch.cli import tables
from launch.exit_codes import ExitCode
from tests.support.tiny_shards import sounds, write_shards


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes two shards with 40 segments, 160 s."""
    content = [sounds([2.0, 3.0, 4.0, 5.0, 6.0] * 4, corpus=name) for name in ("first", "second")]
    return write_shards(tmp_path_factory.mktemp("shards"), content)


def test_stats_count_shards_segments_and_hours(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["shards", "stats", str(root)]) == 0
    said = capsys.readouterr().out
    assert "first" in said
    assert "40" in said
    assert "0.04" in said, "hours"
    assert "median 4.0 s" in said


def test_inspect_shows_a_segment_by_key(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["shards", "inspect", str(root), "--key", "second-0002"]) == 0
    said = capsys.readouterr().out
    assert "second-0002" in said
    assert "4.00" in said
    assert "first" not in said


def test_samples_are_shown_whole_on_a_narrow_terminal(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "PIPED_WIDTH", 80)
    assert main.main(["shards", "inspect", str(root), "-n", "1"]) == 0
    said = capsys.readouterr().out
    names = ["key", "seconds", "from", "at", "speaker", "language", "shard"]
    assert [line.split()[0] for line in said.splitlines() if line] == names
    assert main.main(["shards", "stats", str(root)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_verify_finds_a_changed_byte_and_a_missing_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_shards(tmp_path / "shards", [sounds([2.0] * 3, corpus=name) for name in ("a", "b", "c")])
    assert main.main(["shards", "verify", str(root)]) == 0
    tars = sorted(root.glob("*.tar"))
    content = bytearray(tars[0].read_bytes())
    content[1000] ^= 1
    tars[0].write_bytes(content)
    tars[1].with_suffix(".parquet").unlink()
    assert main.main(["shards", "verify", str(root)]) == ExitCode.FAILED
    said = capsys.readouterr().out
    assert f"{tars[0].name}: checksum mismatch" in said
    assert tars[1].stem in said
    assert "1 of 3 shards are intact" in said


def test_a_folder_without_shards_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for subcommand in ("stats", "inspect", "verify"):
        for folder in (tmp_path / "none", tmp_path):
            assert main.main(["shards", subcommand, str(folder)]) == ExitCode.USAGE
            assert "auricle preprocess" in capsys.readouterr().err


def test_plan_of_a_config(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["+experiment=best_rq_tiny", f"data.shards={root}", "data.batch_seconds=40", "data.max_seconds=6"]
    assert main.main(["data", "plan", *overrides]) == 0
    said = capsys.readouterr().out
    assert "ranks      1, 2, 4" in said
    assert "2 shards" in said
    assert main.main(["data", "plan", *overrides, "data.batch_seconds=1e6"]) == ExitCode.USAGE
    assert "less than a fiftieth" in capsys.readouterr().err


def test_stats_count_the_speakers_that_have_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [(name, "first") for name in ("ann", "bob")] + [("ann", "second"), ("", "second")]
    content = [sounds([2.0] * 3, corpus=corpus, speaker=name) for name, corpus in named]
    for number, segments in enumerate(content):
        content[number] = [replace(one, key=f"{number}-{one.key}") for one in segments]
    assert main.main(["shards", "stats", str(write_shards(tmp_path / "shards", content))]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["corpus", "language", "speakers", "segments", "hours"]
    assert [row[-3:-1] for row in rows[1:4]] == [["2", "6"], ["1", "6"], ["3", "12"]]
