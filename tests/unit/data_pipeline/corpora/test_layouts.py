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
