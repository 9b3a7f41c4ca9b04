"""Untrusted names of segments, runs and files are escaped in TensorBoard and in tables of results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pretrain.checkpointing.run_folder import RunFolder
from pretrain.evaluate.report import markdown, table
from pretrain.evaluate.rows import ResultRow
from pretrain.monitoring.figures import add_frames, spectrogram
from pretrain.monitoring.metrics_writer import MetricsWriter
from pretrain.monitoring.snapshot import Snapshot
from pretrain.train_module import build_model
from tests.support.synthetic_reader import synthetic_batch
from tests.support.training import config


def test_text_of_a_diff_or_config_cannot_end_its_code_block(tmp_path: Path) -> None:
    (tmp_path / "git.diff").write_bytes(b"+x\r````\r# title\n+esc \x1b[31m\n+````\n")
    run = RunFolder(tmp_path)
    run.claim()
    named = config(1, name="`[x](http://y)`")
    with MetricsWriter(run, named, build_model(named), 0, say=lambda line: None):
        pass
    events = EventAccumulator(str(tmp_path / "tb"), {"tensors": 0}).Reload()
    diff = events.Tensors("git_diff/text_summary")[0].tensor_proto.string_val[0].decode()
    assert diff == "`````diff\n+x\n````\n# title\n+esc \\x1b[31m\n+````\n\n`````"
    shown = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    table, _, block = shown.partition("```json\n")
    assert json.loads(block.removesuffix("```"))["name"] == named.name
    assert r"\[x\](http://y)" in table, "the table of differences has it as text"


def test_names_add_no_rows_to_the_projector_and_are_never_formulas(tmp_path: Path) -> None:
    rows = [["a\tb", "=1+1"], ["two\nlines\r", "-"], ["esc\x1b[0m", "-1.5"]]
    with SummaryWriter(str(tmp_path)) as board:
        add_frames(board, torch.zeros(3, 2), rows, ["segment", "label\tx"], "frames", 1)
    (made,) = tmp_path.rglob("metadata.tsv")
    assert [line.split("\t") for line in made.read_text(encoding="utf-8").splitlines()] == [
        ["segment", "label\\tx"], ["a\\tb", "'=1+1"], ["two\\nlines\\r", "-"], ["esc\\x1b[0m", "-1.5"],
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["$\\nosuch{", "a$b$c", "esc\x1b[31m\n"])
def test_a_segment_with_any_name_is_drawn(key: str, tmp_path: Path) -> None:
    batch = synthetic_batch(0, 0)
    batch = dataclasses.replace(batch, keys=(key, *batch.keys[1:]))
    frames = int(batch.lengths_B[0]) // 320
    mask_BF = torch.zeros(len(batch.keys), frames, dtype=torch.bool)
    shown = Snapshot(batch, mask_BF, None, None, torch.zeros(*mask_BF.shape, 2), batch.lengths_B // 320, 50.0)
    figure = spectrogram(shown)
    figure.savefig(tmp_path / "x.png")
    title = figure.axes[0].get_title()
    assert title.isprintable()
    assert title.startswith(key[:4].split("\x1b")[0])


def test_names_in_tables_of_results_are_escaped(tmp_path: Path) -> None:
    from launch.cli.tables import console

    rows = [ResultRow("phones", "accuracy", "[/b] a|b <i>\x1b[31m", 0.5)]
    assert r"| \[/b\] a\|b \<i\>\\x1b\[31m |" in markdown(rows)
    with (tmp_path / "shown").open("w+", encoding="utf-8") as file:
        console(file).print(table(rows))
        file.seek(0)
        assert "[/b] a|b <i>\\x1b[31m" in file.read()
