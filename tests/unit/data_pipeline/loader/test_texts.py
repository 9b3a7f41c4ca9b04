"""Texts and tokens in batches: those of whole segments alone, in either reader, bound to the plan."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch
from data_pipeline.loader.held_out import read_held_out
from data_pipeline.loader.reader import open_reader
from data_pipeline.loader.streaming import StreamReader
from data_pipeline.sampling.config import DataConfig
from data_pipeline.text.tokenizer import load_tokenizer
from launch.main import main
from launch.workers.build import require_fitting_labels, require_symbols_of_texts
from pretrain.config import Config
from tests.support.tiny_shards import sounds, write_shards

LENGTHS = np.random.default_rng(0).uniform(0.5, 2.0, 120).tolist()
SAMPLES = {sound.key: sound.length for sound in sounds(LENGTHS)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    everything = sounds(LENGTHS)
    write_shards(root / "shards", [everything[i::3] for i in range(3)])
    assert main(["tokens", f"shards={root}/shards", f"out={root}/tokens"]) == 0
    return root


def config(corpus: Path, **values: object) -> DataConfig:
    given = {"shards": f"{corpus}/shards", "workers": 0, "batch_seconds": 8.0, "micro_batches": 4, "min_seconds": 0.3}
    tokens = {"text": f"{corpus}/tokens"}
    return load(DataConfig, {**given, "max_seconds": 1.6, "tokens": tokens, "labels": ["text", "speaker"], **values})


def batches(data: DataConfig, steps: int = 30) -> list[Batch]:
    reader = open_reader(data, 0, 0, 1) if data.reader == "plan" else StreamReader(data, 0, 0, 1)
    found = [batch for step in itertools.islice(reader.steps(), steps) for batch in step.batches]
    reader.close()
    return found


@pytest.mark.parametrize("reader", ["plan", "webdataset"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_cropped_segment_has_neither_text_nor_tokens(corpus: Path, reader: str, workers: int) -> None:
    tokenizer = load_tokenizer(f"{corpus}/tokens")
    cropped = whole = 0
    for batch in batches(config(corpus, reader=reader, workers=workers), steps=12):
        ids_BN = batch.tokens["text"]
        assert ids_BN.dtype == torch.int64
        for row, (key, length) in enumerate(zip(batch.keys, batch.lengths_B.tolist(), strict=True)):
            ids = [number for number in ids_BN[row].tolist() if number >= 0]
            if length < SAMPLES[key]:
                cropped += 1
                assert (batch.labels["text"][row], ids) == ("", [])
            else:
                whole += 1
                assert tokenizer.decode(ids) == batch.labels["text"][row] == f"words of {key}"
            assert batch.labels["speaker"][row] == "s"
    assert cropped > 10
    assert whole > 10


def test_tokens_need_no_label_of_the_batch(corpus: Path) -> None:
    batch = batches(config(corpus, labels=[], max_seconds=2.0), steps=1)[0]
    assert "text" not in batch.labels
    assert int((batch.tokens["text"] >= 0).sum()) > 0


def test_a_run_does_not_continue_with_other_tokens(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokens"
    assert main(["tokens", f"shards={corpus}/shards", f"out={other}", "case=upper"]) == 0
    hashes = set()
    for tokens in ({}, {"text": f"{corpus}/tokens"}, {"text": str(other)}):
        reader = open_reader(config(corpus, tokens=tokens, labels=[]), 0, 0, 1)
        hashes.add(reader.plan_hash)
        reader.close()
    assert len(hashes) == 3
    shutil.copytree(f"{corpus}/tokens", tmp_path / "copy")
    again = open_reader(config(corpus, tokens={"text": f"{tmp_path}/copy"}, labels=[]), 0, 0, 1)
    assert again.plan_hash in hashes


def test_tokens_of_another_alphabet_are_refused(corpus: Path, tmp_path: Path) -> None:
    assert main(["tokens", f"shards={corpus}/shards", f"out={tmp_path}/greek", "symbols=αβγ"]) == 0
    with pytest.raises(ConfigError, match=r"data\.tokens\.text: none of"):
        open_reader(config(corpus, tokens={"text": f"{tmp_path}/greek"}), 0, 0, 1)


def test_symbols_of_another_alphabet_are_refused_and_foreign_ones_noted(corpus: Path) -> None:
    def run_of(symbols: str) -> Config:
        head = {"name": "ctc", "symbols": symbols}
        values = {"objective": {"name": "best_rq"}, "frontend": {"name": "log_mel"}, "heads": {"task": head}}
        return load(Config, {"data": {"shards": "none"}, "encoder": {"name": "transformer"}, **values})

    reader, said = open_reader(config(corpus), 0, 0, 1), list[str]()
    require_symbols_of_texts(run_of(" abcdefghijklmnopqrstuvwxyz0123456789-_/"), reader.some_texts, said.append)
    assert said == []
    require_symbols_of_texts(run_of("words"), reader.some_texts, said.append)
    assert "heads.task.symbols lacks" in said[0]
    with pytest.raises(ConfigError, match=r"heads\.task\.symbols='αβγ': has no character of \d+ texts, such as 'words"):
        require_symbols_of_texts(run_of("αβγ"), reader.some_texts, said.append)
    reader.close()


def test_crops_of_every_segment_are_refused_beside_tokens(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="crop_to_shortest"):
        config(corpus, crop_to_shortest=True)


def test_a_missing_label_is_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", f"shards={corpus}/shards", f"out={tmp_path}/t", "label=transcript"]) == 2
    assert "label=transcript" in capsys.readouterr().err


@pytest.mark.parametrize("reader", ["plan", "webdataset"])
def test_a_share_of_the_segments_keeps_its_text(corpus: Path, reader: str) -> None:
    kept: dict[float, set[str]] = {}
    for share in (0.0, 0.2, 0.6, 1.0):
        found = batches(config(corpus, reader=reader, max_seconds=2.0, labelled_share=share), steps=15)
        rows = [(batch, row) for batch in found for row in range(len(batch.keys))]
        kept[share] = {batch.keys[row] for batch, row in rows if batch.labels["text"][row]}
        assert kept[share] == {batch.keys[row] for batch, row in rows if (batch.tokens["text"][row] >= 0).any()}
        assert {batch.labels["speaker"][row] for batch, row in rows} == {"s"}
    assert len(kept[0.0]) == 0
    assert len(kept[1.0]) > len(LENGTHS) / 2
    assert kept[0.2] < kept[0.6] < kept[1.0]
    for share in (0.2, 0.6):
        assert len(kept[share]) / len(kept[1.0]) == pytest.approx(share, abs=0.12)


def test_held_out_audio_keeps_all_texts(corpus: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, [sounds([1.0] * 6, corpus="b")])
    data = config(corpus, valid=str(tmp_path), labelled_share=0.01)
    held_out = read_held_out(data, 0, 1)
    assert all(text for batch in held_out.batches for text in batch.labels["text"])


@pytest.mark.parametrize("labels", [["text"], []])
def test_every_update_has_the_same_share_of_texts(corpus: Path, labels: list[str]) -> None:
    data = config(corpus, text_share=0.5, labelled_share=0.3, batch_seconds=16.0, labels=labels)
    found = batches(data)
    shares = []
    for step in (found[n : n + 4] for n in range(0, len(found), 4)):
        rows = [
            (batch.lengths_B[row], bool((batch.tokens["text"][row] >= 0).any()))
            for batch in step
            for row in range(len(batch.keys))
        ]
        shares.append(float(sum(length for length, text in rows if text) / sum(length for length, _ in rows)))
    assert shares == pytest.approx([0.5] * len(shares), abs=0.2)
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"micro_batches": 1}, "set micro_batches to 2"),
        ({"reader": "webdataset"}, "needs data.reader=plan"),
        ({"labels": [], "tokens": {}}, "add text to labels"),
        ({"crop_to_shortest": True, "tokens": {}}, "set crop_to_shortest=false"),
    ],
)
def test_settings_without_a_share_of_texts_are_refused(corpus: Path, values: dict[str, object], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        config(corpus, text_share=0.5, **values)


def test_an_index_without_texts_is_refused(tmp_path: Path) -> None:
    """Of a shard of an earlier version."""
    write_shards(tmp_path / "shards", [sounds([1.0] * 30)])
    for index in (tmp_path / "shards").glob("*.parquet"):
        pq.write_table(pq.read_table(index).drop_columns(["text_length"]), index)
    with pytest.raises(
        ConfigError, match=r"data\.text_share: the index of the shards does not show .* a text; index them"
    ):
        open_reader(config(tmp_path, tokens={}, text_share=0.5), 0, 0, 1)


def test_every_segment_comes_with_a_line_that_depends_on_its_key_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("words\nof\nroof\nxyz\n")
    tokenizer = load_tokenizer(f"{corpus}/tokens")
    drawn: dict[int, dict[str, str]] = {}
    for size in (4, 8):
        data = config(corpus, lines=str(tmp_path / "lines.txt"), micro_batches=size, batch_seconds=2.0 * size)
        found = batches(data, steps=6)
        drawn[size] = {
            key: tokenizer.decode([number for number in ids_N.tolist() if number >= 0])
            for batch in found
            for key, ids_N in zip(batch.keys, batch.line_rows("text"), strict=True)
        }
    assert set(drawn[4].values()) == {"words", "of", "roof"}
    both = set(drawn[4]) & set(drawn[8])
    assert len(both) > 10
    assert {key: drawn[4][key] for key in both} == {key: drawn[8][key] for key in both}
    assert not batches(config(corpus), steps=1)[0].has_lines


def test_lines_belong_to_the_plan(corpus: Path, tmp_path: Path) -> None:
    hashes = []
    for text in ("of\n", "roof\n"):
        (tmp_path / "lines.txt").write_text(text)
        reader = open_reader(config(corpus, lines=str(tmp_path / "lines.txt")), 0, 0, 1)
        hashes.append(reader.plan_hash)
        reader.close()
    assert len(set(hashes)) == 2


def test_lines_that_nothing_could_learn_from_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("of\n")
    with pytest.raises(ConfigError, match="needs tokens, by which lines are read"):
        config(corpus, lines="lines.txt", tokens={})
    with pytest.raises(ConfigError, match=r"data\.lines needs an index"):
        StreamReader(config(corpus, lines=str(tmp_path / "lines.txt"), reader="webdataset"), 0, 0, 1)
    parts = {
        part: {"name": name}
        for part, name in (("frontend", "log_mel"), ("encoder", "transformer"), ("objective", "best_rq"))
    }
    given = {"shards": f"{corpus}/shards", "tokens": {"text": f"{corpus}/tokens"}, "lines": "lines.txt"}
    with pytest.raises(ConfigError, match="no head learns from lines"):
        require_fitting_labels(load(Config, {"data": given, **parts}))
