"""Streams WebDataset tars that are not indexed, through the webdataset library: `data.reader=webdataset`.

Shards are split among ranks and workers, and samples are shuffled in a buffer. There is no plan: batches depend on the
numbers of ranks and workers, and a resume starts a new pass instead of continuing at a sample. An index
(`auricle shards index`) removes both limits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.audio.augmentation import Augmenter
from data_pipeline.audio.codecs import AudioError, Wave
from data_pipeline.audio.samples import open_sample
from data_pipeline.core.retries import StorageReadError, error_text, retry
from data_pipeline.core.rng import keyed_rng, keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.tar_samples import UnusableError, member_labels
from data_pipeline.core.types import SAMPLE_RATE, Batch, Cursor, Step
from data_pipeline.labels.store import pad
from data_pipeline.loader.fetch import SEARCHED_SAMPLES, SEARCHED_SHARDS, check_tokens
from data_pipeline.loader.tar_urls import open_tar, shard_urls
from data_pipeline.loader.texts import SegmentTexts
from data_pipeline.loader.workers import become_worker
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.constraints import BatchConstraints
from data_pipeline.sampling.plan import accumulation
from data_pipeline.sampling.window import cut_evenly
from data_pipeline.shards.local import Array, ShardError

log = logging.getLogger(__name__)
AUDIO: Final = ("flac", "wav", "opus", "ogg", "mp3")
MOST_IN_VAIN: Final = 10_000
"""Number of successive unusable or too short samples after which the run ends."""
POOL: Final = 16
"""Size, in micro-batches, of the pools that are sorted by length."""
PREFIX: Final = "webdataset-"
"""Prefix of the plan hash of a stream."""


@dataclass(frozen=True)
class CroppedSegment:
    """One decoded and cropped segment."""

    key: str
    wave: Wave
    labels: dict[str, str]
    whole: bool
    """Whether it is all of the segment."""


@dataclass(frozen=True)
class StreamBatch:
    """One micro-batch of a worker. error: set instead of a batch."""

    wave: Wave = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    lengths: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: dict[str, Array] = field(default_factory=dict)
    skipped: int = 0
    error: ShardError | StorageReadError | None = None


class StreamReader:
    """The StepReader of one rank over tars without an index.

    `Step.samples` and `padded_samples` are estimates, this rank's times the number of ranks, since ranks do not know
    each other's batches.

    Args:
        config: the run's `data`.
        seed: keys order, crops and augmentation.
        rank: this rank's number.
        world: number of ranks; must divide `config.micro_batches`, since each rank reads tars of its own.
        least_samples: shortest segment that the model can use; shorter ones are skipped.
        say: prints a line; called when a resume starts a new pass.

    Raises:
        ConfigError: no shards, settings that need an index, or tokens of another alphabet.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int,
        world: int,
        *,
        least_samples: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        for name, wanted in (
            ("targets", not config.targets),
            ("mix_alpha", config.mix_alpha == 1),
            ("images.size", not config.images.size),
            ("sources", not config.sources),
            ("lines", not config.lines),
        ):
            if not wanted:
                raise ConfigError(
                    f"data.{name} needs an index of the shards, which data.reader=webdataset does without; run "
                    "`auricle shards index` on them and set data.reader=plan"
                )
        self.slots = accumulation(config.micro_batches, world)
        if config.micro_batches % world:
            raise ConfigError(
                f"data.micro_batches={config.micro_batches} is not a multiple of {world} ranks, which "
                f"data.reader=webdataset requires: set data.micro_batches={self.slots * world}, or data.reader=plan"
            )
        self.config, self.seed, self.rank, self.world, self._say = config, seed, rank, world, say
        self.constraints = BatchConstraints.of(config)
        if least_samples > self.constraints.shortest:
            self.constraints = self.constraints.with_shortest(least_samples)
        self.urls = shard_urls(config.shards)
        names = [url.rpartition("/")[2] for url in self.urls]
        identity = f"{names}\n{self.constraints.identity}\n{seed}"
        plan_hash = hashlib.sha256(identity.encode()).hexdigest()[:16]
        texts = SegmentTexts(config)
        check_tokens(texts, self.some_texts, log.warning)
        self.plan_hash = PREFIX + texts.extend_hash(plan_hash)
        self._closing: Synchronized[int] = multiprocessing.Value("b", 0)
        self._batches: Iterator[StreamBatch] = iter(())

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        """Yields this rank's part of the global steps, without end.

        Args:
            cursor: number of finished steps; the stream starts a new pass in a new order.

        Raises:
            ConfigError: the cursor is of a plan, i.e. the run was started with `data.reader=plan`.
            ShardError: a tar or member cannot be used, with `on_bad_shard=error`.
            StorageReadError: the storage did not recover within `retry_seconds`.
        """
        self.close()
        cursor = cursor or Cursor(self.plan_hash, 0, 0)
        if not cursor.plan_hash.startswith(PREFIX):
            raise ConfigError(
                f"the checkpoint was made with data plan {cursor.plan_hash}, but data.reader=webdataset streams; set "
                "data.reader=plan, or start a new run"
            )
        if cursor.plan_hash != self.plan_hash:
            self._say(
                "data.reader=webdataset: names of the tars, limits of batches, token sets or the seed differ from "
                "those of the checkpoint"
            )
        if cursor.step:
            self._say(
                f"data.reader=webdataset: not exactly resumable; step {cursor.step} continues with a new pass over the "
                "shards in a new order"
            )
        self._closing = multiprocessing.Value("b", 0)
        self._batches = iter(self._loader(cursor.step))
        return self._steps(cursor)

    def some_texts(self, label: str) -> list[str]:
        """Returns this label of the first segments that have it, from several tars; those that cannot be read are left
        to `steps`."""
        searched = self.urls[:: -(-len(self.urls) // SEARCHED_SHARDS)]
        return [text for url in searched for text in self._texts_of(url, label)]

    def _texts_of(self, url: str, label: str) -> list[str]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        found: list[str] = []
        try:
            with retry(functools.partial(open_tar, url), url, self.config.retry_seconds) as stream:
                samples = group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
                for sample in itertools.islice(samples, SEARCHED_SAMPLES):
                    documents = documents_of(sample)
                    with contextlib.suppress(UnusableError):
                        found += [
                            member_labels(documents, sample["__key__"], stem).get(label, "")
                            for stem, _ in audio_members(sample)
                        ]
        except (tarfile.TarError, ValueError, OSError) as error:
            log.warning("%s: no texts were compared (%s)", url, error_text(error))
        return [text for text in found if text]

    def close(self) -> None:
        """Stops the workers."""
        self._closing.value = 1
        self._batches = iter(())

    def _steps(self, cursor: Cursor) -> Iterator[Step]:
        batches = self._batches
        for number in itertools.count(cursor.step + 1):
            parts = list(itertools.islice(batches, self.slots))
            if failed := next((part.error for part in parts if part.error), None):
                raise failed
            if len(parts) < self.slots:
                return
            made = [
                Batch(
                    wave_BT=torch.from_numpy(np.asarray(part.wave)),
                    lengths_B=torch.tensor(part.lengths),
                    keys=part.keys,
                    micro_batch=self.rank + slot * self.world,
                    labels=part.labels,
                    tokens={name: torch.from_numpy(ids) for name, ids in part.tokens.items()},
                )
                for slot, part in enumerate(parts)
            ]
            yield Step(
                batches=tuple(made),
                samples=self.world * sum(sum(part.lengths) for part in parts),
                padded_samples=self.world * sum(batch.wave_BT.numel() for batch in made),
                after=Cursor(self.plan_hash, 0, number),
                skipped=sum(part.skipped for part in parts),
            )

    def _loader(self, start: int) -> DataLoader[StreamBatch]:
        from webdataset import DataPipeline, split_by_worker

        mine = self.urls[self.rank :: self.world] if len(self.urls) >= self.world else self.urls
        workers = min(self.config.workers, len(mine))
        stream = _Stream(
            self.config, self.constraints, keyed_seed(self.seed, "webdataset", self.rank, start), self.seed
        )
        pipeline = DataPipeline(
            _Passes(mine, stream.key), split_by_worker, stream.opened, stream.samples, stream.shuffled,
            stream.clips, stream.batches,
        )  # fmt: skip
        if not workers:
            return DataLoader(pipeline, batch_size=None)
        begin = functools.partial(become_worker, os.getpid(), self._closing)
        return DataLoader(
            pipeline, batch_size=None, num_workers=workers, prefetch_factor=max(2, self.config.prefetch * self.slots),
            multiprocessing_context="fork", worker_init_fn=begin, timeout=self.config.timeout_seconds,
        )  # fmt: skip


def documents_of(sample: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the JSON and text members of a sample of webdataset by name."""
    key = sample["__key__"]
    return {f"{key}.{ending}": data for ending, data in sample.items() if ending.endswith(("json", "txt"))}


def audio_members(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (name without the last ending, part of the name after the key) of each audio member of a sample."""
    endings = [ending for ending in sample if ending.rpartition(".")[2] in AUDIO]
    return [(f"{sample['__key__']}.{ending}".rpartition(".")[0], ending) for ending in endings]


class _Passes(IterableDataset[dict[str, Any]]):
    """Yields shard URLs, pass after pass, each in a different order."""

    def __init__(self, urls: Sequence[str], key: int) -> None:
        self._urls, self._key = urls, key

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            order = keyed_rng(self._key, number, "shards").permutation(len(self._urls))
            yield from ({"url": self._urls[i], "pass": number} for i in order)


class _Stream:
    """The stages of the pipeline in one process."""

    def __init__(self, config: DataConfig, constraints: BatchConstraints, key: int, seed: int) -> None:
        self.config, self.constraints, self.key, self.seed = config, constraints, key, seed
        self.augmenter, self.texts = Augmenter(config.augment), SegmentTexts(config)
        if config.augment.speeds:
            raise ConfigError("data.augment.speeds needs data.reader=plan")
        self._pass = self._skipped = self._read = self._in_vain = 0

    def opened(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Opens each shard through fsspec."""
        for shard in shards:
            url, self._pass = shard["url"], shard["pass"]
            if self._pass and not self._read:
                raise ShardError(url, "neither it nor any other shard holds samples")
            try:
                stream = retry(functools.partial(open_tar, url), url, self.config.retry_seconds)
            except FileNotFoundError:
                self._bad(url, "is missing")
                continue
            with stream:
                yield {"url": url, "stream": stream}

    def samples(self, opened: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Groups the members of each shard into samples."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for shard in opened:
            url, before = shard["url"], self._read
            try:
                for sample in group_by_keys(tar_file_expander([shard])):
                    self._read += 1
                    yield sample
            except tarfile.TarError as error:
                self._bad(url, f"is not a whole tar ({error_text(error)})")
            except ValueError as error:
                self._bad(url, str(error.args[0]) if error.args else "cannot be read")
            except OSError as error:
                raise StorageReadError(url, f"cannot be read ({error_text(error)})") from error
            if self._read == before:
                log.warning("%s: holds no samples", url)

    def shuffled(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Shuffles samples in a buffer."""
        from webdataset import shuffle

        size, worker = self.config.shuffle_buffer, get_worker_info()
        rng = random.Random(keyed_seed(self.key, "buffer", worker.id if worker else 0))
        yield from shuffle(size, initial=max(1, size // 4), rng=rng)(samples) if size else samples

    def clips(self, samples: Iterable[dict[str, Any]]) -> Iterator[CroppedSegment]:
        """Decodes and crops every audio member."""
        for sample in samples:
            key, url = sample["__key__"], sample["__url__"]
            documents = documents_of(sample)
            for stem, ending in audio_members(sample):
                try:
                    labels = member_labels(documents, key, stem) if self.texts.labels else {}
                    wave, whole = self._decoded(stem, sample[ending])
                except (UnusableError, AudioError) as error:
                    self._bad(url, f"{key}.{ending} cannot be used ({error})")
                    wave, whole, labels = np.zeros(0, np.float32), False, {}
                self._in_vain = 0 if len(wave) else self._in_vain + 1
                if self._in_vain >= MOST_IN_VAIN:
                    raise ShardError(url, f"none of {MOST_IN_VAIN:,} samples in a row can be used")
                if len(wave):
                    yield CroppedSegment(stem, wave, {name: labels.get(name, "") for name in self.texts.labels}, whole)

    def _decoded(self, key: str, data: bytes) -> tuple[Wave, bool]:
        """Decodes and crops a member; returns an empty array if it is shorter than `data.min_seconds`."""
        with open_sample(data) as sample:
            if (sample.rate, sample.channels) != (SAMPLE_RATE, 1):
                raise UnusableError(
                    "rate", f"{sample.rate} Hz, {sample.channels} channels; convert it with corpus=webdataset"
                )
            longest, frames, start = self.constraints.longest, sample.frames, 0
            if frames < self.constraints.shortest:
                return np.zeros(0, np.float32), False
            if longest < frames < 1 << 40:
                rng = keyed_rng(self.seed, self._pass, key, "crop")
                start = int(rng.integers(0, frames - longest + 1))
            wave = sample.read(start, min(frames, longest))
        return wave if len(wave) >= self.constraints.shortest else wave[:0], frames <= longest

    def batches(self, clips: Iterable[CroppedSegment]) -> Iterator[StreamBatch]:
        """Sorts pools of clips by length and cuts them into micro-batches of equal seconds."""
        budget = self.constraints.batch / self.constraints.micro_batches
        pool: list[CroppedSegment] = []
        try:
            for clip in clips:
                pool.append(clip)
                if sum(len(one.wave) for one in pool) >= POOL * budget:
                    yield from self._cut(pool, budget)
                    pool = []
        except (ShardError, StorageReadError) as error:
            yield StreamBatch(error=error)

    def _cut(self, pool: list[CroppedSegment], budget: float) -> Iterator[StreamBatch]:
        pool.sort(key=lambda clip: len(clip.wave))
        lengths = np.array([len(clip.wave) for clip in pool])
        first = cut_evenly(lengths, max(1, min(len(pool), round(float(lengths.sum()) / budget))))
        order = keyed_rng(self.key, self._read, "batches").permutation(len(first) - 1)
        for k in order:
            yield self._batch(pool[first[k] : first[k + 1]])

    def _batch(self, clips: Sequence[CroppedSegment]) -> StreamBatch:
        most = min(len(clip.wave) for clip in clips) if self.constraints.crop else self.constraints.longest
        waves = [clip.wave[:most] for clip in clips]
        labels = [self.texts.of_crop(clip.labels, clip.key, clip.whole and len(clip.wave) <= most) for clip in clips]
        tokens = [self.texts.encode(of_clip) for of_clip in labels]
        if self.augmenter.changes_waves:
            rngs = [keyed_rng(self.seed, self._pass, clip.key, "augment") for clip in clips]
            waves = [self.augmenter.apply(wave, waves, rng).wave for wave, rng in zip(waves, rngs, strict=True)]
        padded = np.zeros((len(waves), max(map(len, waves))), np.float32)
        for line, wave in zip(padded, waves, strict=True):
            line[: len(wave)] = wave
        skipped, self._skipped = self._skipped, 0
        return StreamBatch(
            wave=padded,
            lengths=tuple(map(len, waves)),
            keys=tuple(clip.key for clip in clips),
            labels={name: tuple(of_clip[name] for of_clip in labels) for name in self.config.labels},
            tokens={name: pad([of_clip[name] for of_clip in tokens]) for name in self.config.tokens},
            skipped=skipped,
        )

    def _bad(self, url: str, reason: str) -> None:
        """Counts a shard or member that cannot be used. Raises ShardError with `on_bad_shard=error`."""
        if self.config.on_bad_shard == "error":
            raise ShardError(url, reason)
        self._skipped += 1
        log.warning("left out: %s: %s", url, reason)
