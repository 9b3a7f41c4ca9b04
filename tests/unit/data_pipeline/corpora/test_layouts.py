"""Known corpora, on small folders with their directory layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora.config import (
    CommonVoiceCorpus,
    GigaSpeechCorpus,
    LibriSpeechCorpus,
    MlsCorpus,
    VoxPopuliCorpus,
)
from data_pipeline.corpora.discovery import discover
from tests.support.sounds import write_corpus


def found(corpus: object) -> list[tuple[str, str, str, str, str]]:
    files = discover(corpus).files
    return [(file.file_id.rsplit("/", 1)[-1], file.speaker, file.language, file.text, file.split) for file in files]


def test_librispeech(tmp_path: Path) -> None:
    names = ["dev-clean/84/121123/84-121123-0000.flac", "test-clean/61/70968/61-70968-0001.flac"]
    root = write_corpus(tmp_path / "LibriSpeech", dict.fromkeys(names, 0.1))
    (root / "dev-clean/84/121123/84-121123.trans.txt").write_text("84-121123-0000 GO ON\n")
    (root / "SPEAKERS.TXT").write_text("no audio")
    assert found(LibriSpeechCorpus(path=str(root), splits=("dev-clean",))) == [
        ("84-121123-0000.flac", "84", "en", "GO ON", "dev-clean")
    ]
    assert len(found(LibriSpeechCorpus(path=str(tmp_path)))) == 2


def test_a_failed_download_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchaudio.datasets")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    with pytest.raises(ConfigError, match=r"name the subsets in corpus\.splits"):
        discover(LibriSpeechCorpus(path=str(tmp_path), download=True))
    monkeypatch.setattr(datasets, "LIBRISPEECH", offline)
    with pytest.raises(ConfigError, match=r"dev-clean could not be fetched .* copy the corpus to"):
        discover(LibriSpeechCorpus(path=str(tmp_path), splits=("dev-clean",), download=True))


def test_mls(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "mls_german", {"train/audio/10/20/10_20_0.flac": 0.1})
    (root / "train" / "transcripts.txt").write_text("10_20_0\tguten tag\n")
    assert found(MlsCorpus(path=str(root))) == [("10_20_0.flac", "10", "german", "guten tag", "train")]


def test_common_voice(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "de", {"clips/a.wav": 0.1, "clips/b.wav": 0.1, "clips/unlisted.wav": 0.1})
    (root / "train.tsv").write_text('client_id\tpath\tsentence\tlocale\nx1\ta.wav\tsie sagt "ja\tde\n')
    (root / "dev.tsv").write_text("client_id\tpath\tsentence\tlocale\nx2\tb.wav\tnein\tde\nx1\ta.wav\t-\tde\n")
    corpus = CommonVoiceCorpus(path=str(root), splits=("train", "dev"))
    assert found(corpus) == [("a.wav", "x1", "de", 'sie sagt "ja', "train"), ("b.wav", "x2", "de", "nein", "dev")]
    assert discover(corpus).skipped == {".wav": 1}, "tables do not count as skipped files"
    with pytest.raises(ConfigError, match=r"holds no other\.tsv; the tables there are corpus\.splits=\[dev,train\]"):
        discover(CommonVoiceCorpus(path=str(root), splits=("other",)))


def test_voxpopuli(tmp_path: Path) -> None:
    names = ["de/2019/u1.ogg", "fr/2020/u2.ogg"]
    root = write_corpus(tmp_path / "transcribed_data", dict.fromkeys(names, 0.1))
    (root / "de" / "asr_train.tsv").write_text("id\tnormalized_text\tspeaker_id\tsplit\nu1\thallo\t7\ttrain\n")
    assert found(VoxPopuliCorpus(path=str(root))) == [
        ("u1.ogg", "7", "de", "hallo", "train"),
        ("u2.ogg", "", "fr", "", ""),
    ]
    assert len(found(VoxPopuliCorpus(path=str(root), language="fr"))) == 1


def test_gigaspeech(tmp_path: Path) -> None:
    root = write_corpus(
        tmp_path / "giga", {"audio/podcast/P0/p1.opus": 0.5, "audio/other.opus": 0.5}, format="OGG", subtype="OPUS"
    )
    audios = [{"path": "audio/podcast/P0/p1.opus", "duration": 0.5, "subsets": ["{XL}", "{M}"]}]
    (root / "GigaSpeech.json").write_text(json.dumps({"language": "EN", "audios": audios}))
    assert found(GigaSpeechCorpus(path=str(root), splits=("{M}",))) == [("p1.opus", "", "en", "", "{M}")]
    with pytest.raises(ConfigError, match=r"no GigaSpeech\.json"):
        discover(GigaSpeechCorpus(path=str(tmp_path)))


def test_a_corpus_that_does_not_fit_into_memory_is_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"train/audio/{speaker}/2/{speaker}_2_{number}.flac" for speaker in range(5) for number in range(9)]
    root = write_corpus(tmp_path / "mls_german", dict.fromkeys(names, 0.05))
    keys = [Path(name).stem for name in names]
    lines = [f"{key}\ttext {key}" for key in [*reversed(keys[3:]), "7_2_0", "0_2_99"]]
    (root / "train" / "transcripts.txt").write_text("\n".join(lines))
    whole = discover(MlsCorpus(path=str(root)))
    monkeypatch.setattr("data_pipeline.core.external_sort.ROWS", 7)
    sorted_on_disk = discover(MlsCorpus(path=str(root)), tmp_path)
    assert sorted_on_disk.files == whole.files
    assert sorted_on_disk.rejects == whole.rejects
    assert [file.text for file in whole.files[:4]] == ["", "", "", "text 0_2_3"]
    assert [(reject.file_id, reject.row) for reject in whole.rejects] == [
        ("train/audio/7/2/7_2_0", 43),
        ("train/audio/0/2/0_2_99", 44),
    ]


def test_a_table_of_gigaspeech_is_read_recording_by_recording(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "giga", {"a.flac": 0.5, "b.flac": 0.5})
    audios = [{"path": f"{name}.flac", "duration": 0.5, "subsets": ["{XL}"]} for name in ("b", "a")]
    (root / "GigaSpeech.json").write_text(json.dumps({"audios": audios, "language": "DE"}))
    assert [row[:3] for row in found(GigaSpeechCorpus(path=str(root)))] == [("a.flac", "", "de"), ("b.flac", "", "de")]
    (root / "GigaSpeech.json").write_text(json.dumps({"audios": audios})[:-2])
    with pytest.raises(ConfigError, match=r"GigaSpeech\.json cannot be read"):
        discover(GigaSpeechCorpus(path=str(root)))
