"""Frame labels from tables, CTM, TextGrid and .PHN, and their folding."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate import definitions, label_sets
from pretrain.evaluate.alignments import read_alignment
from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.manifest import Interval, Utterance, grid_labels, intervals_of
from pretrain.evaluate.task_data import alignments as required_alignments
from pretrain.evaluate.task_inputs import TaskInputs

SYMBOLS = """bcl b dcl d gcl g pcl p tcl t kcl k dx q jh ch s sh z zh f th v dh m n ng em en eng nx l r w y hh hv el iy
ih eh ey ae aa aw ay ah ao oy ow uh uw ux er ax ix axr ax-h pau epi h#"""
TIMIT = set(re.findall(r"\S+", SYMBOLS))
EXPECTED = [Interval(0.0, 0.5, "sil"), Interval(0.5, 0.75, "AH0"), Interval(0.75, 1.0, "")]


def long_textgrid(intervals: list[Interval]) -> str:
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", "xmax = 1", "tiers? <exists>"]
    lines += ["size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"', '        name = "phones"']
    lines += ["        xmin = 0", "        xmax = 1", f"        intervals: size = {len(intervals)}"]
    for number, one in enumerate(intervals, start=1):
        lines += [f"        intervals [{number}]:", f"            xmin = {one.start}", f"            xmax = {one.end}"]
        lines.append(f'            text = "{one.phone}"')
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("form", ["tsv", "jsonl", "ctm", "TextGrid", "beside"])
def test_every_form_gives_the_same_labels(form: str, tmp_path: Path) -> None:
    one = Utterance(str(tmp_path / "a" / "one.wav"), "a/one.wav", file="a/one.wav")
    (tmp_path / "a").mkdir()
    spoken = EXPECTED[:2]
    given = f"labels.{form}"
    if form == "tsv":
        rows = ["path\tbegin\tend\tlabel", *(f"a/one.wav\t{i.start}\t{i.end}\t{i.phone}" for i in spoken)]
        (tmp_path / given).write_text("\n".join(rows))
    elif form == "jsonl":
        rows = [
            f'{{"audio": "a/one.wav", "start_s": {i.start}, "end_s": {i.end}, "phone": "{i.phone}"}}' for i in spoken
        ]
        (tmp_path / given).write_text("\n".join(rows))
    elif form == "ctm":
        rows = [";; comment", *(f"one 1 {i.start} {i.end - i.start} {i.phone} 0.9" for i in spoken)]
        (tmp_path / given).write_text("\n".join(rows))
    elif form == "TextGrid":
        pytest.importorskip("praatio")
        given, spoken = "grids", EXPECTED
        (tmp_path / "grids" / "a").mkdir(parents=True)
        (tmp_path / "grids" / "a" / "one.TextGrid").write_text(long_textgrid(EXPECTED))
        (tmp_path / "grids" / "one.TextGrid").write_text(long_textgrid(EXPECTED[:1]))  # of another recording
    else:
        given = ".PHN"
        (tmp_path / "a" / "one.phn").write_text("0 8000 sil\n8000 12000 AH0\n")
    other = Utterance(str(tmp_path / "b.wav"), "b.wav", file="b.wav")
    assert read_alignment(given, tmp_path, [one, other], "phones") == {"a/one.wav": spoken}


@pytest.mark.parametrize("form", ["tsv", "ctm", "phn", "TextGrid"])
def test_a_manifest_names_a_file_of_labels_per_row(form: str, tmp_path: Path) -> None:
    rows = ["path,phones,speaker,split"]
    for name, split in zip("abc", ("train", "valid", "test"), strict=True):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(16_000), 16_000)
        file = tmp_path / "phones" / f"{name}1.{form}"
        file.parent.mkdir(exist_ok=True)
        if form == "TextGrid":
            pytest.importorskip("praatio")
            file.write_text(long_textgrid(EXPECTED[:2]))
        elif form == "ctm":
            file.write_text("\n".join(f"{name} 1 {i.start} {i.end - i.start} {i.phone}" for i in EXPECTED[:2]))
        elif form == "phn":
            file.write_text("0 8000 sil\n8000 12000 AH0\n")
        else:
            file.write_text("\n".join(["start_s\tend_s\tphone", "0\t0.5\tsil", "0.5\t0.75\tAH0"]))
        rows.append(f"{name}.wav,phones/{name}1.{form},{name},{split}")
    soundfile.write(tmp_path / "d.wav", np.zeros(16_000), 16_000)
    (tmp_path / "list.csv").write_text("\n".join([*rows, "d.wav,phones/gone.ctm,d,test"]))
    said: list[str] = []
    config = EvaluateConfig(checkpoint="x", manifest=str(tmp_path / "list.csv"))
    assert list(required_alignments(config)) == []
    task = TaskInputs(config, "phones", said.append)
    assert {name: [i.phone for i in found] for name, found in task.phones.items()} == {
        f"{name}.wav": ["sil", "AH"] for name in "abc"
    }
    assert "1 of 4 utterances have no frame labels, such as d.wav" in said[-1]
    (tmp_path / "list.csv").write_text("\n".join([rows[0].replace("phones", "grid"), *rows[1:]]))
    assert len(TaskInputs(dataclasses.replace(config, phones="grid"), "phones", said.append).phones) == 3


def test_files_of_labels_that_do_not_exist_are_named(tmp_path: Path) -> None:
    listed = [Utterance("a.wav", "a.wav", file="a.wav", labels={"phones": "gone.TextGrid"})]
    with pytest.raises(ConfigError, match=r"none of the 1 files in this column .* such as .*gone\.TextGrid"):
        read_alignment("phones", tmp_path, listed, "phones")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.tsv", "file\tfrom\tuntil\na\t0\t1", "its columns are: file, from, until"),
        ("x.ctm", "one 1 0.5", "line 1 is not"),
        ("x.tsv", "path\tstart\tend\tphone\na\tzero\t1\tx", "row 1: a time is not a number"),
    ],
)
def test_a_damaged_alignment_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_alignment(name, tmp_path, [Utterance("a", "a", file="a")], "phones")


def test_a_missing_tier_names_those_that_exist(tmp_path: Path) -> None:
    pytest.importorskip("praatio")
    (tmp_path / "one.TextGrid").write_text(long_textgrid(EXPECTED))
    with pytest.raises(ConfigError, match="has no tier 'words'; it has: phones"):
        read_alignment(
            ".TextGrid", tmp_path, [Utterance(str(tmp_path / "one.wav"), "one.wav", file="one.wav")], "words"
        )


def test_labels_of_a_part_of_a_recording_begin_at_its_start() -> None:
    part = Utterance("x.wav", "x.wav:8000-16000", file="x.wav", start=8_000, stop=16_000)
    found = intervals_of(part, {"x.wav": [*EXPECTED, Interval(1.0, 2.0, "B")]})
    assert found == [Interval(0.0, 0.25, "AH0"), Interval(0.25, 0.5, "")]
    assert grid_labels(found, 0.5, 4) == ["AH0", ""]


def test_timit_folds_61_symbols_to_39() -> None:
    symbols = label_sets.read("timit_39")
    assert len(TIMIT) == 61
    labels = {symbols.folded(symbol) for symbol in TIMIT} - {None}
    assert len(labels) == 39
    assert symbols.silence == {"sil"}
    assert symbols.folded("q") is None
    silent = {symbol for symbol in TIMIT if symbols.folded(symbol) in symbols.silence}
    assert silent == {"h#", "pau", "epi", "bcl", "dcl", "gcl", "pcl", "tcl", "kcl"}
    assert label_sets.read("timit_61").silence == silent
    assert label_sets.read("any").silence >= silent


def test_stress_is_removed_and_silence_is_kept_apart() -> None:
    symbols = label_sets.read("arpabet")
    assert symbols.intervals([Interval(0, 1, "AH0"), Interval(1, 2, "SIL")]) == [
        Interval(0, 1, "AH"),
        Interval(1, 2, "SIL"),
    ]
    assert {"SIL", "spn", ""} <= symbols.silence


def test_every_shipped_set_can_be_read_and_a_wrong_name_has_a_hint(tmp_path: Path) -> None:
    for name in definitions.names("label_set"):
        assert label_sets.read(name).silence
    with pytest.raises(ConfigError, match="did you mean timit_39"):
        label_sets.read("timit_3")
    (tmp_path / "own.yaml").write_text("silence: [x]\nfolds: {}\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: folds"):
        label_sets.read(str(tmp_path / "own.yaml"))
