"""The typed schema of preprocessing. Defaults stand here; YAML names only what differs."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Final, Literal

from data_pipeline.core.schema import PluginChoice, about, config

# fmt: off
SOUND_ENDINGS: Final = (
    "wav", "flac", "ogg", "opus", "oga", "mp3", "m4a", "aac", "mp4", "webm", "mkv", "mov", "avi", "wma", "amr", "g722",
    "sph", "nist", "au", "snd", "aif", "aiff", "aifc", "caf", "w64", "rf64", "voc", "ac3", "ape", "wv", "tta",
)
# fmt: on


@config
class PathCorpus:
    """Every sound file below a folder."""

    name: Literal["path"] = "path"
    path: Annotated[str, about("folder or fsspec URL; ~ is understood", min_length=1)]
    corpus: Annotated[str, about("the corpus's name in the shards; empty takes the folder's")] = ""
    language: Annotated[str, about("language of all files, where the pattern gives none")] = ""
    pattern: Annotated[
        str,
        about("regular expression on the path below the folder; its groups speaker, language, text, split are kept"),
    ] = ""
    extensions: Annotated[
        tuple[str, ...],
        about("endings of sound files, in lower case and without the dot", min_length=1),
    ] = SOUND_ENDINGS
    splits: Annotated[tuple[str, ...], about("keep files of these splits only; empty keeps all")] = ()


@config
class ManifestCorpus:
    """A table of files: tsv, csv (first line names the columns) or jsonl."""

    name: Literal["manifest"] = "manifest"
    path: Annotated[str, about("the manifest, a .tsv, .csv, .jsonl or .json (one object a line) file", min_length=1)]
    root: Annotated[str, about("folder that the paths in it are relative to; empty takes the manifest's")] = ""
    corpus: Annotated[str, about("the corpus's name where the manifest has no column for it; empty: the file's")] = ""
    language: Annotated[str, about("language where the manifest has no column for it")] = ""
    columns: Annotated[
        dict[str, str],
        about("column of path, speaker, language, text, corpus, split, seconds, begin, end where it has another name"),
    ] = dataclasses.field(default_factory=dict)
    labels: Annotated[
        str, about("a second table with a column path; its other columns (phones, say) become labels of the samples")
    ] = ""
    splits: Annotated[tuple[str, ...], about("keep rows of these splits only; empty keeps all")] = ()
    allow_outside: Annotated[bool, about("accept absolute paths and .. that leave the root")] = False


@config
class LibriSpeechCorpus:
    """LibriSpeech and Libri-light's labelled parts: SUBSET/SPEAKER/CHAPTER/ID.flac beside SPEAKER-CHAPTER.trans.txt."""

    name: Literal["librispeech"] = "librispeech"
    path: Annotated[str, about("the folder LibriSpeech, or the one that holds it", min_length=1)]
    splits: Annotated[tuple[str, ...], about("subsets, such as train-clean-100; empty keeps all")] = ()
    language: Annotated[str, about("language of all files")] = "en"
    download: Annotated[bool, about("fetch the subsets named by splits first, with torchaudio's downloader")] = False


@config
class MlsCorpus:
    """Multilingual LibriSpeech: SPLIT/audio/SPEAKER/BOOK/ID.flac and SPLIT/transcripts.txt."""

    name: Literal["mls"] = "mls"
    path: Annotated[str, about("folder of one language, such as mls_german", min_length=1)]
    splits: Annotated[tuple[str, ...], about("train, dev, test; empty keeps all")] = ()
    language: Annotated[str, about("language of all files; empty takes it from the folder's name")] = ""


@config
class CommonVoiceCorpus:
    """Common Voice: clips/*.mp3 and one tsv a split; a clip belongs to the first split that lists it."""

    name: Literal["common_voice"] = "common_voice"
    path: Annotated[str, about("folder of one locale", min_length=1)]
    splits: Annotated[tuple[str, ...], about("tables to read, without .tsv", min_length=1)] = ("train", "dev", "test")
    language: Annotated[str, about("language where the table has no column locale")] = ""


@config
class VoxPopuliCorpus:
    """VoxPopuli: LANGUAGE/YEAR/ID.ogg, for transcribed data beside LANGUAGE/asr_SPLIT.tsv."""

    name: Literal["voxpopuli"] = "voxpopuli"
    path: Annotated[str, about("folder unlabelled_data or transcribed_data", min_length=1)]
    splits: Annotated[tuple[str, ...], about("train, dev, test of transcribed data; empty keeps all")] = ()
    language: Annotated[str, about("keep this language only; empty keeps all")] = ""


@config
class GigaSpeechCorpus:
    """GigaSpeech: the segments that GigaSpeech.json lists in each recording; where it lists none, all of it."""

    name: Literal["gigaspeech"] = "gigaspeech"
    path: Annotated[str, about("folder that holds GigaSpeech.json", min_length=1)]
    splits: Annotated[tuple[str, ...], about("subsets, such as {M}; empty keeps all")] = ()
    language: Annotated[str, about("language where the table names none")] = "en"


CORPORA: Final[dict[str, type[Any]]] = {
    "path": PathCorpus,
    "manifest": ManifestCorpus,
    "librispeech": LibriSpeechCorpus,
    "mls": MlsCorpus,
    "common_voice": CommonVoiceCorpus,
    "voxpopuli": VoxPopuliCorpus,
    "gigaspeech": GigaSpeechCorpus,
}
"""Name -> config of every kind of corpus; discover.py finds their files."""


def _names() -> list[str]:
    return sorted(CORPORA)


def _config_type(name: str) -> type[Any]:
    if name not in CORPORA:
        raise ValueError(f"there is no corpus {name!r}; there are: {', '.join(_names())}")
    return CORPORA[name]


@config
class CutConfig:
    """How recordings become segments."""

    max_seconds: Annotated[float, about("longest segment; longer recordings are cut", gt=0.1, le=600)] = 30.0
    min_seconds: Annotated[float, about("shorter segments are left out", ge=0)] = 0.5


@config
class VadConfig:
    """Voice activity detection (Silero): keeps stretches of speech, drops what lies between."""

    enabled: Annotated[bool, about("cut recordings into stretches of speech; needs the extra vad")] = False
    threshold: Annotated[float, about("speech probability from which on a stretch begins", gt=0.15, lt=1)] = 0.5
    min_silence_seconds: Annotated[float, about("a pause so long ends a stretch", gt=0)] = 0.5
    pad_seconds: Annotated[float, about("kept before and after a stretch", ge=0)] = 0.1


@config
class DedupConfig:
    """Recordings that are there twice; finding them reads the whole corpus once more, before shards are written."""

    exact: Annotated[bool, about("leave out recordings whose decoded audio is the same, sample by sample")] = False
    near: Annotated[bool, about("leave out recordings of the same sound at another gain, codec or offset")] = False
    min_matches: Annotated[int, about("fingerprints that two recordings must share at one offset", ge=2)] = 4
    min_share: Annotated[
        float, about("and which share of the shorter recording's fingerprints that must be", gt=0, le=1)
    ] = 0.01


@config
class SplitConfig:
    """Speakers held out, in folders of their own (train, valid, test); no speaker is in two of them."""

    valid: Annotated[
        float, about("share of speakers for out/valid; 0 and 0 write one set without folders", ge=0, lt=1)
    ] = 0.0
    test: Annotated[float, about("share of speakers for out/test", ge=0, lt=1)] = 0.0
    seed: Annotated[int, about("keys which speakers", ge=0)] = 0

    @property
    def enabled(self) -> bool:
        """Whether there are folders at all."""
        return self.valid + self.test > 0


@config
class FilterConfig:
    """Segments that are left out, each with a reason in the report."""

    min_level_dbfs: Annotated[
        float | None, about("quieter segments (root mean square, dB of full scale) are `silence`; null keeps them")
    ] = -70.0
    max_clipped: Annotated[
        float | None, about("share of samples at full scale beyond which a segment is `clipped`; null keeps them", ge=0)
    ] = None
    min_snr_db: Annotated[
        float | None, about("segments below this estimated signal-to-noise ratio are `low_snr`; null keeps them")
    ] = None


@config
class RayConfig:
    """Where the work runs."""

    address: Annotated[str, about("of a running Ray cluster, or auto; empty starts a Ray on this machine")] = ""
    num_cpus: Annotated[int, about("cores of a Ray started here; 0 takes all", ge=0)] = 0
    dashboard: Annotated[bool, about("start Ray's dashboard on localhost")] = False
    attempts: Annotated[
        int, about("how often a unit is tried whose worker dies before it is given up and listed", ge=1)
    ] = 3


@config
class PreprocessConfig:
    """One preprocessing job: a corpus in, shards out."""

    out: Annotated[str, about("folder or fsspec URL for the shards; what is done there already stays", min_length=1)]
    corpus: Annotated[Any, PluginChoice("corpus", _names, _config_type)]
    codec: Annotated[Literal["flac", "wav", "opus"], about("how audio is stored; flac and wav are lossless")] = "flac"
    copy_flac: Annotated[
        bool,
        about("with codec=flac, take 16 kHz mono 16-bit FLAC that stays whole as it is instead of encoding it anew"),
    ] = True
    shard_mb: Annotated[float, about("about how many MB a shard gets; small corpora get smaller ones", gt=0)] = 1000.0
    min_shards: Annotated[int, about("make shards smaller than shard_mb until there are about so many", ge=1)] = 16
    cut: CutConfig = dataclasses.field(default_factory=CutConfig)
    vad: VadConfig = dataclasses.field(default_factory=VadConfig)
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    loudness_dbfs: Annotated[
        float | None,
        about("bring each segment to this level (root mean square), short of clipping; null keeps levels", lt=0),
    ] = None
    dedup: DedupConfig = dataclasses.field(default_factory=DedupConfig)
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    weights: Annotated[
        dict[str, float], about("sampling weight of segments by corpus or language, for the reader; others get 1")
    ] = dataclasses.field(default_factory=dict)
    report: Annotated[bool, about("write report.html into the folder at the end")] = True
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)


def content_settings(config: PreprocessConfig) -> dict[str, Any]:
    """The part of a config that decides the content of a shard, as plain values."""
    plain = dataclasses.asdict(config)
    return {
        name: plain[name]
        for name in ("codec", "copy_flac", "cut", "vad", "filters", "loudness_dbfs", "split", "weights")
    }
