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
"""Endings of audio files, including videos."""
# fmt: on


@config
class CorpusConfig(PluginConfig):
    """Base class of the config of a corpus."""

    path: Annotated[str, about("folder or fsspec URL", min_length=1)]
    language: Annotated[str, about("language of recordings without one in the corpus")] = ""
    splits: Annotated[tuple[str, ...], about("keep recordings of these splits only; empty keeps all")] = ()
    licence: Annotated[
        str,
        about(
            "licence of recordings without one in the corpus, such as CC-BY-4.0; kept beside the shards, for model "
            "cards of exports"
        ),
    ] = ""


@config
class PathCorpus(CorpusConfig):
    """All audio files below a folder."""

    name: Literal["path"] = "path"
    path: Annotated[str, about("folder or fsspec URL; ~ is expanded", min_length=1)]
    corpus: Annotated[str, about("the corpus's name in the shards; empty takes the folder's")] = ""
    language: Annotated[str, about("language of files for which the pattern gives none")] = ""
    pattern: Annotated[
        str,
        about(
            "regular expression searched in the path below the folder; its groups give speaker, language, text, split, "
            "and labels under any other name"
        ),
    ] = ""
    extensions: Annotated[
        tuple[str, ...],
        about("endings of sound files, in lower case and without the dot", min_length=1),
    ] = SOUND_ENDINGS
    probe: Annotated[
        bool, about("also open files of other endings, and use those that contain audio (copies remote files)")
    ] = False
    splits: Annotated[tuple[str, ...], about("keep files of these splits only; empty keeps all")] = ()


@config
class ManifestCorpus(CorpusConfig):
    """A table of files: tsv, csv (with a header line) or jsonl. A row with begin and end, or offset and duration, in
    seconds selects a part of its file, which becomes a separate segment."""

    name: Literal["manifest"] = "manifest"
    path: Annotated[str, about("the manifest, a .tsv, .csv, .jsonl or .json (one object a line) file", min_length=1)]
    root: Annotated[str, about("folder that the paths in it are relative to; empty takes the manifest's")] = ""
    corpus: Annotated[str, about("the corpus's name if the manifest has no column for it; empty: the file's")] = ""
    language: Annotated[str, about("language if the manifest has no column for it")] = ""
    columns: Annotated[
        dict[str, str],
        about(
            "names of the columns path, speaker, language, text, corpus, split, seconds, begin, end, channel, image if "
            "they differ from the usual ones; an empty name leaves a column out; channels count from 0"
        ),
    ] = dataclasses.field(default_factory=dict)
    units_per_second: Annotated[
        float,
        about(
            "unit of times whose column has none in its name (start_ms has one): 1 for seconds, 1000 for "
            "milliseconds, 16000 for samples at 16 kHz, 1e7 for HTK's times",
            gt=0,
        ),
    ] = 1.0
    labels: Annotated[
        str, about("a second table with a column path; its other columns, such as phones, become labels of the samples")
    ] = ""
    splits: Annotated[tuple[str, ...], about("keep rows of these splits only; empty keeps all")] = ()
    allow_outside: Annotated[bool, about("accept absolute paths and .. that leave the root")] = False


@config
class LibriSpeechCorpus(CorpusConfig):
    """LibriSpeech and Libri-light's labelled parts: SUBSET/SPEAKER/CHAPTER/ID.flac with SPEAKER-CHAPTER.trans.txt."""

    name: Literal["librispeech"] = "librispeech"
    path: Annotated[str, about("the folder LibriSpeech, or its parent", min_length=1)]
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
    """Common Voice: clips/*.mp3 and one tsv per split; a clip belongs to the first split that lists it."""

    name: Literal["common_voice"] = "common_voice"
    path: Annotated[str, about("folder of one locale", min_length=1)]
    splits: Annotated[tuple[str, ...], about("tables to read, without .tsv", min_length=1)] = ("train", "dev", "test")
    language: Annotated[str, about("language if the table has no column locale")] = ""


@config
class VoxPopuliCorpus(CorpusConfig):
    """VoxPopuli: LANGUAGE/YEAR/ID.ogg, with LANGUAGE/asr_SPLIT.tsv for transcribed data."""

    name: Literal["voxpopuli"] = "voxpopuli"
    path: Annotated[str, about("folder unlabelled_data or transcribed_data", min_length=1)]
    splits: Annotated[tuple[str, ...], about("train, dev, test of transcribed data; empty keeps all")] = ()
    language: Annotated[str, about("keep this language only; empty keeps all")] = ""


@config
class GigaSpeechCorpus(CorpusConfig):
    """GigaSpeech: the segments in GigaSpeech.json, by their subsets; whole recordings if they have no segments."""

    name: Literal["gigaspeech"] = "gigaspeech"
    path: Annotated[str, about("folder of GigaSpeech.json", min_length=1)]
    splits: Annotated[tuple[str, ...], about("subsets, such as {M}; empty keeps all")] = ()
    language: Annotated[str, about("language if the table has none")] = "en"


@config
class WebDatasetCorpus(CorpusConfig):
    """WebDataset tars: audio members, labels from the JSON and .txt members of their sample."""

    name: Literal["webdataset"] = "webdataset"
    path: Annotated[str, about("folder or fsspec URL of the tars", min_length=1)]
    corpus: Annotated[str, about("corpus of samples without one in their JSON; empty: the folder's name")] = ""
    language: Annotated[str, about("language of samples without one in their JSON")] = ""
    splits: Annotated[tuple[str, ...], about("keep samples with one of these in their JSON; empty keeps all")] = ()


@config
class LhotseSharCorpus(CorpusConfig):
    """Lhotse Shar: cuts.NNNNNN.jsonl.gz with recording.NNNNNN.tar; supervisions become segments."""

    name: Literal["lhotse_shar"] = "lhotse_shar"
    path: Annotated[str, about("folder or fsspec URL of the Shar files", min_length=1)]
    audio_field: Annotated[str, about("field of the cuts with the audio")] = "recording"
    corpus: Annotated[str, about("the corpus's name in the shards; empty takes the folder's")] = ""
    language: Annotated[str, about("language of supervisions without one")] = ""
    splits: Annotated[tuple[str, ...], about("not used: Shar has no splits; must be empty", max_length=0)] = ()


@config
class LhotseCorpus(CorpusConfig):
    """Any corpus that lhotse has a recipe for, or lhotse's manifests: recordings with supervisions, or cuts."""

    name: Literal["lhotse"] = "lhotse"
    path: Annotated[
        str,
        about(
            "with recipe: the corpus's folder; without: a folder of *recordings*.jsonl.gz and *supervisions*.jsonl.gz "
            "or *cuts*.jsonl.gz, or one such file",
            min_length=1,
        ),
    ]
    recipe: Annotated[
        str, about("lhotse's recipe that lists the corpus, such as timit or tedlium; needs lhotse installed")
    ] = ""
    options: Annotated[
        dict[str, str | bool | int | list[str]], about("further arguments of the recipe, such as dataset_parts")
    ] = dataclasses.field(default_factory=dict)
    root: Annotated[
        str, about("folder that relative paths in manifests begin at; empty: corpus.path, or the folder of that file")
    ] = ""
    corpus: Annotated[str, about("the corpus's name in the shards; empty: the recipe's, or the folder's")] = ""
    splits: Annotated[
        tuple[str, ...], about("keep these parts of the recipe, or manifests *_recordings_SPLIT, only; empty keeps all")
    ] = ()


@config
class NemoTarredCorpus(CorpusConfig):
    """NeMo's tarred data sets: audio_N.tar and a JSON-lines manifest whose rows name members."""

    name: Literal["nemo_tarred"] = "nemo_tarred"
    path: Annotated[str, about("folder or fsspec URL of tars and manifests", min_length=1)]
    manifest: Annotated[str, about("regular expression of the manifests' paths below the folder")] = (
        r"(^|/)(sharded_)?(tarred_audio_)?manifest(s/manifest)?(_\d+)?\.jsonl?$"
    )
    corpus: Annotated[str, about("the corpus's name in the shards; empty takes the folder's")] = ""
    language: Annotated[str, about("language of rows without one")] = ""
    splits: Annotated[tuple[str, ...], about("not used: manifests have no splits; must be empty", max_length=0)] = ()


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
    "lhotse": LhotseCorpus,
    "lhotse_shar": LhotseSharCorpus,
    "nemo_tarred": NemoTarredCorpus,
}
"""Config class of each kind of corpus by name; discovery.py finds their files."""


def corpus_names() -> list[str]:
    """Returns the names of all kinds of corpora."""
    return sorted(CORPORA)


def corpus_type(name: str) -> type[CorpusConfig]:
    """Returns the config class of a kind of corpus. Raises ValueError for an unknown name."""
    if name not in CORPORA:
        raise ValueError(f"there is no corpus {name!r}; there are: {', '.join(corpus_names())}")
    return CORPORA[name]
