"""The typed config of preprocessing, with all defaults; YAML files set only fields that differ."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from data_pipeline.audio.quality import FilterConfig
from data_pipeline.audio.vad import VadConfig
from data_pipeline.core.ray_tasks import RayClusterConfig
from data_pipeline.core.schema import PluginChoice, about, config
from data_pipeline.corpora.config import CorpusConfig, corpus_names, corpus_type
from data_pipeline.preprocess.duplicate_search import DedupConfig


@config
class CutConfig:
    """Segmentation of recordings."""

    max_seconds: Annotated[float, about("longest segment; longer recordings are cut", gt=0.1, le=600)] = 30.0
    min_seconds: Annotated[float, about("shorter segments are rejected", ge=0)] = 0.5


@config
class SplitConfig:
    """Splits by speaker, in the folders train, valid and test; no speaker is in two of them."""

    valid: Annotated[
        float, about("share of speakers for out/valid; 0 and 0 write one set without folders", ge=0, lt=1)
    ] = 0.0
    test: Annotated[float, about("share of speakers for out/test", ge=0, lt=1)] = 0.0
    seed: Annotated[int, about("seed of the choice of speakers", ge=0)] = 0

    @property
    def enabled(self) -> bool:
        """Whether the data set is split."""
        return self.valid + self.test > 0


@config
class PreprocessConfig:
    """One preprocessing job: a corpus in, shards out."""

    out: Annotated[str, about("folder or fsspec URL for the shards; finished ones are kept", min_length=1)]
    corpus: Annotated[CorpusConfig, PluginChoice("corpus", corpus_names, corpus_type)]
    codec: Annotated[Literal["flac", "wav", "opus"], about("format of the audio; flac and wav are lossless")] = "flac"
    copy_flac: Annotated[
        bool,
        about("with codec=flac, copy uncut 16 kHz mono 16-bit FLAC files instead of encoding them again"),
    ] = True
    shard_mb: Annotated[float, about("approximate size of a shard in MB; smaller for small corpora", gt=0)] = 1000.0
    min_shards: Annotated[
        int, about("approximate least number of shards; makes them smaller than shard_mb if necessary", ge=1)
    ] = 16
    cut: CutConfig = dataclasses.field(default_factory=CutConfig)
    vad: VadConfig = dataclasses.field(default_factory=VadConfig)
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    loudness_dbfs: Annotated[
        float | None,
        about("scale each segment to this RMS level without clipping; null keeps levels", lt=0),
    ] = None
    image_side: Annotated[
        int, about("longest side in pixels of the images that shards keep; larger ones are reduced", ge=8, le=4096)
    ] = 256
    dedup: DedupConfig = dataclasses.field(default_factory=DedupConfig)
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    weights: Annotated[
        dict[str, float],
        about("sampling weight of segments by corpus or language, for the reader; 1 for all others"),
    ] = dataclasses.field(default_factory=dict)
    report: Annotated[bool, about("write report.html into the folder at the end")] = True
    ray: RayClusterConfig = dataclasses.field(default_factory=RayClusterConfig)


def content_settings(config: PreprocessConfig) -> dict[str, Any]:
    """Returns the fields of a config that determine the content of shards, as plain values."""
    plain = dataclasses.asdict(config)
    return {
        name: plain[name]
        for name in ("codec", "copy_flac", "cut", "vad", "filters", "loudness_dbfs", "image_side", "split", "weights")
    }
