"""Configuration of the data of a run: shards, batches and reading."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from data_pipeline.audio.augmentation import AugmentConfig
from data_pipeline.core.schema import Places, about, config, one_or_several, refuse


@config
class ImagesConfig:
    """Images that shards hold beside their audio."""

    size: Annotated[
        int,
        about(
            "side in pixels of the square that a segment's image is scaled and cropped to; 0: images are not read",
            ge=0,
            le=4096,
        ),
    ] = 0
    channels: Annotated[Literal[1, 3], about("1: grey, 3: RGB")] = 3


@config
class EpisodesConfig:
    """Episodes of meta-learning: each micro-batch is a task of a few classes with a few examples each."""

    label: Annotated[
        str,
        about(
            "which label of a segment is its class in an episode, such as word, speaker or language; empty: "
            "micro-batches are no episodes"
        ),
    ] = ""
    ways: Annotated[int, about("classes of an episode", ge=2)] = 5
    shots: Annotated[
        tuple[int, ...],
        about("examples of each class, the support; several: one is drawn for each episode", min_length=1),
    ] = (5,)
    queries: Annotated[
        int, about("most further segments of each class, by other speakers, on which the adapted weights are judged")
    ] = 5

    def __post_init__(self) -> None:
        if min(self.shots) < 1:
            refuse("shots", list(self.shots), "each must be 1 or more")
        if self.queries < 1:
            refuse("queries", self.queries, "must be 1 or more")


@config
class DataConfig:
    """The shards of a run, and how they are read as global steps."""

    shards: Annotated[
        Places,
        about(
            "folder or URL that `auricle preprocess` or `auricle shards index` wrote, several as [a,b], or a pattern "
            "such as shards/*",
            resume="data",
            min_length=1,
        ),
    ]
    tars: Annotated[
        Places,
        about(
            "folders or URLs of tars that an index in shards or valid may name (`auricle shards index index_out=`), "
            "beside those that this user indexed",
            resume="free",
        ),
    ] = ()
    valid: Annotated[
        Places,
        about(
            "folder or URL (or several, as for shards) of shards of held-out audio, as `auricle preprocess "
            "split.valid=0.05` writes; their loss is measured every train.valid_every steps; empty: none",
            resume="free",
        ),
    ] = ()
    valid_seconds: Annotated[
        float,
        about(
            "held-out audio that is used, over all ranks: a fixed random choice of segments, kept in memory "
            "(64 kB per second)",
            resume="free",
            gt=0,
        ),
    ] = 600.0
    valid_targets: Annotated[
        dict[str, str],
        about(
            "folders of the held-out audio's frame labels, by the names in data.targets (`auricle targets "
            "kmeans=FOLDER` labels it with the same centres)",
            resume="free",
        ),
    ] = dataclasses.field(default_factory=dict)
    reader: Annotated[
        Literal["plan", "webdataset"],
        about(
            "plan: exact steps from the index, resumable at any step on any number of ranks; webdataset: streams tars "
            "without an index (shards: a folder, or paths and URLs with braces), not exactly resumable: a resume "
            "starts a new pass over the shards"
        ),
    ] = "plan"
    shuffle_buffer: Annotated[
        int, about("size of each worker's shuffle buffer in samples, with reader=webdataset; 0: no shuffling", ge=0)
    ] = 2000
    batch_seconds: Annotated[
        float, about("seconds of audio per optimizer update, over all ranks and accumulation steps", gt=0)
    ] = 5600.0
    micro_batches: Annotated[
        int, about("micro-batches V per optimizer update; at most as many ranks can run", ge=1)
    ] = 64
    min_seconds: Annotated[float, about("shorter segments are skipped", ge=0)] = 2.0
    max_seconds: Annotated[float, about("longer segments are cropped at random to this length", gt=0)] = 15.6
    bucket_ratio: Annotated[
        float, about("ratio of neighbouring bucket edges; padding of a batch is at most 1 - 1/ratio", gt=1, le=4)
    ] = 1.05
    crop_to_shortest: Annotated[
        bool, about("crop segments to the lower edge of their bucket: no padding, and few shapes")
    ] = False
    shuffle_window: Annotated[
        int, about("number of shards among which samples are shuffled; bounds the cache", ge=1)
    ] = 32
    mix_alpha: Annotated[
        float,
        about("corpora and languages are drawn in proportion to hours^alpha; 1 keeps the natural mix", gt=0, le=1),
    ] = 1.0
    cap_seconds: Annotated[
        float, about("most padded seconds of a micro-batch, from `auricle data find-caps`; 0: no cap", ge=0)
    ] = 0.0
    cap_quadratic: Annotated[
        float, about("a segment of s seconds counts s * (1 + cap_quadratic * s) against the cap", ge=0)
    ] = 0.0
    augment: Annotated[AugmentConfig, about("augmentation of the audio")] = dataclasses.field(
        default_factory=AugmentConfig
    )
    sources: Annotated[
        Literal[0, 2, 3],
        about(
            "utterances in each mixture that augment.mix_prob makes, whose clean parts are kept for a head that "
            "separates them; they are of other segments and, if data.labels has speaker, of other speakers"
        ),
    ] = 0
    targets: Annotated[
        dict[str, str], about("folders of frame labels, by the name in the objective's config", resume="data")
    ] = dataclasses.field(default_factory=dict)
    tokens: Annotated[
        dict[str, str],
        about("folders of tokens.json, by the name that heads use; a cropped segment has no tokens", resume="data"),
    ] = dataclasses.field(default_factory=dict)
    lines: Annotated[
        str,
        about(
            "text file with a sentence a line, for heads that learn from text without audio: every segment of a batch "
            "comes with a line drawn at random; empty: none",
            resume="data",
        ),
    ] = ""
    images: Annotated[ImagesConfig, about("images of segments; a cropped segment has none")] = dataclasses.field(
        default_factory=ImagesConfig
    )
    labelled_share: Annotated[
        float,
        about(
            "share of the segments that keep their text, chosen by their keys; other segments count as ones without "
            "text, such as for a curve over the amount of labels",
            ge=0,
            le=1,
        ),
    ] = 1.0
    text_share: Annotated[
        float,
        about(
            "share of the audio of every update that has a text: segments with a text, or without, are repeated to "
            "reach it, and every update has both; 0: as the data are, at random",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    episodes: Annotated[EpisodesConfig, about("micro-batches as episodes, for engine.name=meta")] = dataclasses.field(
        default_factory=EpisodesConfig
    )
    labels: Annotated[
        tuple[str, ...], about("per-segment metadata to pass to the model: speaker, language, corpus, text ...")
    ] = ()
    workers: Annotated[
        int, about("decoding processes per rank; 0 decodes in the training process", resume="free", ge=0)
    ] = 2
    prefetch: Annotated[int, about("global steps read ahead", resume="free", ge=1)] = 2
    verify: Annotated[bool, about("check a shard's sha256 before its first use", resume="free")] = False
    timeout_seconds: Annotated[
        float, about("end the run if no data arrives for this long", resume="free", gt=0, le=31_536_000)
    ] = 300.0
    retry_seconds: Annotated[
        float,
        about(
            "retry reads of remote storage after transient errors for this long, then end the run",
            resume="free",
            ge=0,
        ),
    ] = 120.0
    cache: Annotated[
        str, about("local folder for copies of remote shards and large indexes; empty: a temporary one", resume="free")
    ] = ""
    cache_gigabytes: Annotated[
        float,
        about(
            "space for local copies of remote shards; 0: read single segments from the remote storage instead",
            resume="free",
            ge=0,
        ),
    ] = 0.0
    keys_log: Annotated[
        str,
        about(
            "folder where each rank logs the keys of every step, to prove a resume; empty: none",
            resume="free",
        ),
    ] = ""
    on_bad_shard: Annotated[
        Literal["error", "skip"],
        about("on a missing, truncated or altered shard: stop, or skip and count it", resume="free"),
    ] = "error"

    def __post_init__(self) -> None:
        """Refuses crops beside tokens, which a cropped segment lacks, and held-out audio that is trained on.

        Refuses sources where nothing is mixed.
        """
        if self.sources and not self.augment.mix_prob:
            refuse("sources", self.sources, "needs mixtures; set augment.mix_prob, such as 1.0")
        if self.tokens and self.crop_to_shortest:
            remedy = "leaves hardly a segment with its text, and heads need it (data.tokens); set it to false"
            refuse("crop_to_shortest", self.crop_to_shortest, remedy)
        if self.lines and not self.tokens:
            refuse("lines", self.lines, "needs tokens, by which lines are read; set data.tokens.text=FOLDER")
        if self.text_share:
            self._check_text_share()
        if self.episodes.label:
            self._check_episodes()
        for name in ("shards", "valid"):  # a config made in Python may name one path as text
            object.__setattr__(self, name, one_or_several(getattr(self, name)))
        if both := set(self.valid) & set(self.shards):
            refuse("valid", min(both), "is one of data.shards; held-out audio must not be trained on")

    def _check_episodes(self) -> None:
        """Refuses settings that would change an episode's rows, and held-out audio, which has no episodes."""
        wrong = {
            "reader": (self.reader, self.reader != "plan", "set reader=plan, whose index has the labels"),
            "on_bad_shard": (
                self.on_bad_shard,
                self.on_bad_shard == "skip",
                "an episode needs all rows; set error",
            ),
            "text_share": (self.text_share, self.text_share > 0, "set it to 0"),
            "mix_alpha": (self.mix_alpha, self.mix_alpha != 1, "classes are drawn equally often; set it to 1"),
            "crop_to_shortest": (self.crop_to_shortest, self.crop_to_shortest, "set it to false"),
            "sources": (self.sources, self.sources > 0, "set it to 0"),
            "valid": (list(self.valid), bool(self.valid), "leave it out; auricle evaluate task=few_shot measures"),
        }
        for field, (value, is_wrong, remedy) in wrong.items():
            if is_wrong:
                refuse(field, value, f"cannot be combined with episodes.label={self.episodes.label}: {remedy}")

    def _check_text_share(self) -> None:
        """Refuses settings under which an update cannot have this share of texts."""
        if self.reader != "plan":
            refuse("text_share", self.text_share, "needs data.reader=plan, whose index has the texts")
        if self.micro_batches < 2:
            refuse("text_share", self.text_share, "needs micro-batches with and without texts; set micro_batches to 2")
        if self.crop_to_shortest:
            refuse(
                "text_share", self.text_share, "needs texts, which cropped segments lack; set crop_to_shortest=false"
            )
        if not self.tokens and "text" not in self.labels:
            refuse("text_share", self.text_share, "needs texts that are read; add text to labels, or set tokens")
