"""Configuration of the corpora that `auricle preprocess` reads: one class per layout."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Final, Literal

from data_pipeline.core.schema import PluginConfig, about, config

# fmt: off
SOUND_ENDINGS: Final = (
    "wav", "wave", "flac", "ogg", "opus", "oga", "spx", "mp3", "mp2", "mpga", "m4a", "m4b", "m4r", "aac", "adts", "mp4",
    "m4v", "mov", "3gp", "3g2", "webm", "weba", "mkv", "mka", "ogv", "avi", "flv", "asf", "wma", "wmv", "amr", "awb",
    "g722", "g726", "gsm", "sph", "nist", "au", "snd", "aif", "aiff", "aifc", "caf", "w64", "rf64", "voc", "ac3", "ape",
    "wv", "tta", "ts", "m2ts", "mts", "mpg", "mpeg",
)
"""Endings of files that hold sound, films included."""
# fmt: on


@config
class CorpusConfig(PluginConfig):
    """Base class of the config of a corpus."""

    path: Annotated[str, about("folder or fsspec URL", min_length=1)]
    language: Annotated[str, about("language of recordings for which the corpus names none")] = ""
    splits: Annotated[tuple[str, ...], about("keep recordings of these splits only; empty keeps all")] = ()


@config
class PathCorpus(CorpusConfig):
    """Every sound file below a folder."""

    name: Literal["path"] = "path"
    path: Annotated[str, about("folder or fsspec URL; ~ is understood", min_length=1)]
    corpus: Annotated[str, about("the corpus's name in the shards; empty takes the folder's")] = ""
    language: Annotated[str, about("language of all files, where the pattern gives none")] = ""
    pattern: Annotated[
        str,
        about(
            "regular expression searched in the path below the folder; its groups give speaker, language, text, split"
        ),
    ] = ""
    extensions: Annotated[
        tuple[str, ...],
        about("endings of sound files, in lower case and without the dot", min_length=1),
    ] = SOUND_ENDINGS
    probe: Annotated[
        bool, about("open files of other endings too, and take those that hold audio (remote ones are copied for it)")
    ] = False
    splits: Annotated[tuple[str, ...], about("keep files of these splits only; empty keeps all")] = ()


@config
class ManifestCorpus(CorpusConfig):
    """A table of files: tsv, csv (first line names the columns) or jsonl. A row with begin and end, or offset and
    duration, in seconds means that stretch of its file and becomes a segment of its own."""

    name: Literal["manifest"] = "manifest"
    path: Annotated[str, about("the manifest, a .tsv, .csv, .jsonl or .json (one object a line) file", min_length=1)]
    root: Annotated[str, about("folder that the paths in it are relative to; empty takes the manifest's")] = ""
    corpus: Annotated[str, about("the corpus's name where the manifest has no column for it; empty: the file's")] = ""
    language: Annotated[str, about("language where the manifest has no column for it")] = ""
    columns: Annotated[
        dict[str, str],
        about(
            "column of path, speaker, language, text, corpus, split, seconds, begin, end, channel where it has another "
            "name; channels count from 0"
        ),
    ] = dataclasses.field(default_factory=dict)
    labels: Annotated[
        str, about("a second table with a column path; its other columns (phones, say) become labels of the samples")
    ] = ""
    splits: Annotated[tuple[str, ...], about("keep rows of these splits only; empty keeps all")] = ()
    allow_outside: Annotated[bool, about("accept absolute paths and .. that leave the root")] = False


@config
class LibriSpeechCorpus(CorpusConfig):
    """LibriSpeech and Libri-light's labelled parts: SUBSET/SPEAKER/CHAPTER/ID.flac beside SPEAKER-CHAPTER.trans.txt."""

    name: Literal["librispeech"] = "librispeech"
    path: Annotated[str, about("the folder LibriSpeech, or the one that holds it", min_length=1)]
    splits: Annotated[tuple[str, ...], about("subsets, such as train-clean-100; empty keeps all")] = ()
    language: Annotated[str, about("language of all files")] = "en"
    download: Annotated[bool, about("fetch the subsets named by splits first, with torchaudio's downloader")] = False


@config
class MlsCorpus(CorpusConfig):
    """Multilingual LibriSpeech: SPLIT/audio/SPEAKER/BOOK/ID.flac and SPLIT/transcripts.txt."""

    name: Literal["mls"] = "mls"
    path: Annotated[str, about("folder of one language, such as mls_german", min_length=1)]
    splits: Annotated[tuple[str, ...], about("train, dev, test; empty keeps all")] = ()
    language: Annotated[str, about("language of all files; empty takes it from the folder's name")] = ""


@config
class CommonVoiceCorpus(CorpusConfig):
    """Common Voice: clips/*.mp3 and one tsv a split; a clip belongs to the first split that lists it."""

    name: Literal["common_voice"] = "common_voice"
    path: Annotated[str, about("folder of one locale", min_length=1)]
    splits: Annotated[tuple[str, ...], about("tables to read, without .tsv", min_length=1)] = ("train", "dev", "test")
    language: Annotated[str, about("language where the table has no column locale")] = ""


@config
class VoxPopuliCorpus(CorpusConfig):
    """VoxPopuli: LANGUAGE/YEAR/ID.ogg, for transcribed data beside LANGUAGE/asr_SPLIT.tsv."""

    name: Literal["voxpopuli"] = "voxpopuli"
    path: Annotated[str, about("folder unlabelled_data or transcribed_data", min_length=1)]
    splits: Annotated[tuple[str, ...], about("train, dev, test of transcribed data; empty keeps all")] = ()
    language: Annotated[str, about("keep this language only; empty keeps all")] = ""


@config
class GigaSpeechCorpus(CorpusConfig):
    """GigaSpeech: the segments that GigaSpeech.json lists, by their own subsets; all of a recording that lists none."""

    name: Literal["gigaspeech"] = "gigaspeech"
    path: Annotated[str, about("folder that holds GigaSpeech.json", min_length=1)]
    splits: Annotated[tuple[str, ...], about("subsets, such as {M}; empty keeps all")] = ()
    language: Annotated[str, about("language where the table names none")] = "en"


@config
class WebDatasetCorpus(CorpusConfig):
    """WebDataset tars: audio members, labels from the JSON and .txt members of their sample."""

    name: Literal["webdataset"] = "webdataset"
    path: Annotated[str, about("folder or fsspec URL of the tars", min_length=1)]
    corpus: Annotated[str, about("corpus of samples whose JSON names none; empty takes the folder's name")] = ""
    language: Annotated[str, about("language of samples whose JSON names none")] = ""
    splits: Annotated[tuple[str, ...], about("keep samples whose JSON names one of these; empty keeps all")] = ()


@config
class LhotseSharCorpus(CorpusConfig):
    """Lhotse Shar: cuts.NNNNNN.jsonl.gz beside recording.NNNNNN.tar; supervisions become segments."""

    name: Literal["lhotse_shar"] = "lhotse_shar"
    path: Annotated[str, about("folder or fsspec URL of the Shar files", min_length=1)]
    audio_field: Annotated[str, about("field of the cuts that holds the audio")] = "recording"
    corpus: Annotated[str, about("the corpus's name in the shards; empty takes the folder's")] = ""
    language: Annotated[str, about("language where supervisions name none")] = ""
    splits: Annotated[tuple[str, ...], about("not used: Shar names no splits; must be empty", max_length=0)] = ()


@config
class NemoTarredCorpus(CorpusConfig):
    """NeMo's tarred data sets: audio_N.tar and a JSON-lines manifest whose rows name members."""

    name: Literal["nemo_tarred"] = "nemo_tarred"
    path: Annotated[str, about("folder or fsspec URL of tars and manifests", min_length=1)]
    manifest: Annotated[str, about("regular expression of the manifests' paths below the folder")] = (
        r"(^|/)(sharded_)?(tarred_audio_)?manifest(s/manifest)?(_\d+)?\.jsonl?$"
    )
    corpus: Annotated[str, about("the corpus's name in the shards; empty takes the folder's")] = ""
    language: Annotated[str, about("language where the manifest names none")] = ""
    splits: Annotated[tuple[str, ...], about("not used: manifests name no splits; must be empty", max_length=0)] = ()


TarredCorpus = WebDatasetCorpus | LhotseSharCorpus | NemoTarredCorpus
"""Corpora in tars, see tarred.py."""
CORPORA: Final[dict[str, type[CorpusConfig]]] = {
    "path": PathCorpus,
    "manifest": ManifestCorpus,
    "librispeech": LibriSpeechCorpus,
    "mls": MlsCorpus,
    "common_voice": CommonVoiceCorpus,
    "voxpopuli": VoxPopuliCorpus,
    "gigaspeech": GigaSpeechCorpus,
    "webdataset": WebDatasetCorpus,
    "lhotse_shar": LhotseSharCorpus,
    "nemo_tarred": NemoTarredCorpus,
}
"""Config class of every kind of corpus by its name; discovery.py finds their files."""


def corpus_names() -> list[str]:
    """Names of all kinds of corpora."""
    return sorted(CORPORA)


def corpus_type(name: str) -> type[CorpusConfig]:
    """The config class of a kind of corpus. Raises ValueError for an unknown name."""
    if name not in CORPORA:
        raise ValueError(f"there is no corpus {name!r}; there are: {', '.join(corpus_names())}")
    return CORPORA[name]
