"""Data workers: turn a request (epoch, step, micro-batch) into a padded micro-batch in shared memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import Synchronized
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from data_pipeline.audio.augmentation import Augmenter
from data_pipeline.audio.codecs import Wave
from data_pipeline.core.retries import StorageError
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.types import IMAGE, LINE, Batch, Images
from data_pipeline.images import decoding
from data_pipeline.labels.store import pad
from data_pipeline.loader.fetch import ORIGIN, Fetched, Fetcher, SegmentRead
from data_pipeline.loader.shared_buffers import SharedBuffers
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.plan import Plan
from data_pipeline.shards.local import ShardError, ShardFiles


class BatchRequest(NamedTuple):
    """A micro-batch of the plan: `step` is its global step within `epoch`."""

    epoch: int
    step: int
    micro_batch: int


@dataclass(frozen=True)
class Loaded:
    """A micro-batch from a worker. The audio is in the shared buffer `place` (worker, turn), or in `wave` without one.

    shape: rows and samples of that audio: a row for each key, then the parts of each, where `data.sources` keeps them.
    samples, padded_samples: of the whole global step.  skipped: (shard, reason) of each skipped segment, and bad_images
    of each image that cannot be used, without which its segment is read.
    error: set if there is no batch.
    """

    micro_batch: int
    keys: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    shape: tuple[int, int] = (0, 0)
    place: tuple[int, int] | None = None
    wave: Wave | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    targets: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    tokens: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    images: Mapping[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]] = field(default_factory=dict)
    samples: int = 0
    padded_samples: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    bad_images: tuple[tuple[str, str], ...] = ()
    error: ShardError | StorageError | None = None

    def batch(self, buffers: SharedBuffers | None, pin: bool) -> Batch:
        """Returns the batch in its own memory, page-locked with `pin`; the shared buffer is free afterwards."""
        wave = self.wave
        if wave is None:
            assert buffers is not None
            assert self.place is not None
            wave = buffers.get(self.place, self.shape)
            assert wave is not None
            audio_RT = torch.empty(self.shape, pin_memory=pin)
            np.copyto(audio_RT.numpy(), wave)  # one thread; torch would use all of them
        else:
            audio_RT = torch.from_numpy(wave)
        rows = len(self.keys)
        wave_BT, sources_BST = audio_RT[:rows], None
        if len(audio_RT) > rows:
            sources_BST = audio_RT[rows:].reshape(rows, -1, audio_RT.shape[1])
        targets = {name: torch.from_numpy(target) for name, target in self.targets.items()}
        tokens = {name: torch.from_numpy(ids) for name, ids in self.tokens.items()}
        images = {name: Images(*map(torch.from_numpy, parts)) for name, parts in self.images.items()}
        lengths_B = torch.tensor(self.lengths)
        return Batch(
            wave_BT,
            lengths_B,
            self.keys,
            self.micro_batch,
            targets=targets,
            labels=self.labels,
            tokens=tokens,
            images=images,
            sources_BST=sources_BST,
        )


class MicroBatches:
    """Assembles micro-batches from the rows of shards, decoded, augmented and padded.

    Args:
        files: the shards.
        config: crops, augmentation, labels and targets of the samples.
        buffers: shared memory for the audio; None: it is returned in new arrays.
    """

    def __init__(self, files: ShardFiles, config: DataConfig, buffers: SharedBuffers | None = None) -> None:
        self.files, self.config, self.buffers = files, config, buffers
        self.augmenter = Augmenter(config.augment, config.sources)
        self.fetcher = Fetcher(files, config, self.augmenter)
        self._tokens = [*config.tokens, *(LINE.format(name) for name in config.tokens if config.lines)]
        self._turn = -1

    def assemble(self, wanted: list[SegmentRead], micro_batch: int) -> Loaded:
        """Returns the segments that can be read as a micro-batch with this number."""
        fetched = self.fetcher.fetch(wanted)
        skipped = [self._bad(got) for got in fetched if isinstance(got, ShardError)]
        good = [got for got in fetched if isinstance(got, Fetched)]
        n_sources = self.config.sources
        place, audio = self._buffer((len(good) * (1 + n_sources), max((got.length for got in good), default=0)))
        wave = audio[: len(good)]
        kept: list[Fetched] = []
        for got in good:
            line = wave[len(kept)]  # the next segment overwrites an undecodable one
            try:
                got.decode(line[: got.length])
            except ShardError as error:
                skipped.append(self._bad(error))
                continue
            line[got.length :] = 0
            kept.append(got)
        audio = audio[: len(kept) * (1 + n_sources)]
        if self.augmenter.changes_waves:
            self._augment(audio, kept)
        images, bad_images = self._images(kept)
        return Loaded(
            micro_batch,
            keys=tuple(got.key for got in kept),
            lengths=tuple(got.length for got in kept),
            shape=(len(audio), audio.shape[1]),
            place=place,
            wave=None if place else audio,
            labels=self._labels(kept),
            targets={name: pad([got.targets[name] for got in kept]) for name in self.config.targets},
            tokens={name: pad([got.tokens[name] for got in kept]) for name in self._tokens},
            images=images,
            skipped=tuple(skipped),
            bad_images=tuple(bad_images),
        )

    def _labels(self, kept: list[Fetched]) -> dict[str, tuple[str, ...]]:
        """Returns the labels of `data.labels` in their order, then those of the origin that any segment has."""
        labels = {name: tuple(got.labels[name] for got in kept) for name in self.config.labels}
        origin = {name: tuple(got.origin[name] for got in kept) for name in ORIGIN if name not in labels}
        return labels | {name: values for name, values in origin.items() if any(values)}

    def _images(self, kept: list[Fetched]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """Returns pixels (B, C, S, S) and presence (B,) of the images, and (shard, reason) of each unusable one."""
        size, channels = self.config.images.size, self.config.images.channels
        if not size:
            return {}, []
        pixels = np.zeros((len(kept), channels, size, size), np.uint8)
        present, bad = np.zeros(len(kept), np.bool_), []
        for row, got in enumerate(kept):
            if got.image:
                try:
                    pixels[row] = decoding.pixels(decoding.decode(got.image), size, channels)
                    present[row] = True
                except decoding.ImageError as error:
                    bad.append((got.shard, f"the image of sample {got.key} {error}"))
        return {IMAGE: (pixels, present)}, bad

    def _augment(self, audio: Wave, kept: list[Fetched]) -> None:
        """Augments the first rows of `audio`, one for each segment, and writes their parts to the following rows."""
        wave, parts = audio[: len(kept)], audio[len(kept) :]
        sources = parts.reshape(len(kept), self.config.sources, audio.shape[1])
        clean = [line[: got.length].copy() for line, got in zip(wave, kept, strict=True)]
        for row, got in enumerate(kept):
            rng = keyed_rng(*got.wanted.key_of_draw(got.key, "augment"))
            others = clean
            if self.config.sources:
                others = [heard for heard, other in zip(clean, kept, strict=True) if differ(got, other)]
            wave[row, : got.length], sources[row, :, : got.length] = self.augmenter.apply(clean[row], others, rng)
            sources[row, :, got.length :] = 0

    def _buffer(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, Wave]:
        info = get_worker_info()
        if info is not None and self.buffers is not None:
            place = (info.id, self._turn)
            buffer = self.buffers.get(place, shape)
            if buffer is not None:
                return place, buffer
        return None, np.empty(shape, np.float32)

    def _bad(self, error: ShardError) -> tuple[str, str]:
        if self.config.on_bad_shard == "error":
            raise error
        return error.shard, error.reason


def differ(one: Fetched, other: Fetched) -> bool:
    """Returns whether two segments can be parts of one mixture: they differ, as do their speakers where known."""
    speakers = one.labels.get("speaker"), other.labels.get("speaker")
    return one.key != other.key and (not all(speakers) or speakers[0] != speakers[1])


class PlannedBatches(MicroBatches, Dataset[Loaded]):
    """Micro-batches by request; used in the worker processes, or in the trainer where there are none.

    Args:
        plan: gives the segments of each micro-batch.
        files: the shards.
        config: crops, augmentation, labels and targets of the samples.
        buffers: shared memory for the audio; None where there are no worker processes.
    """

    def __init__(self, plan: Plan, files: ShardFiles, config: DataConfig, buffers: SharedBuffers | None) -> None:
        super().__init__(files, config, buffers)
        self.plan = plan

    def __getitem__(self, request: BatchRequest) -> Loaded:
        self._turn += 1
        try:
            self.files.look_ahead(request.epoch, request.step)
            return self._load(request)
        except (ShardError, StorageError) as error:
            return Loaded(request.micro_batch, error=error)

    def _load(self, request: BatchRequest) -> Loaded:
        rows = self.plan.micro_batch(request.epoch, request.step, request.micro_batch)
        columns = (rows.shard_n.tolist(), rows.row_n.tolist(), rows.length_n.tolist(), rows.repeat_n.tolist())
        wanted = [
            SegmentRead(shard=s, row=r, length=n, repeat=k, epoch=request.epoch, seed=self.plan.seed)
            for s, r, n, k in zip(*columns, strict=True)
        ]
        loaded = self.assemble(wanted, request.micro_batch)
        if not loaded.keys:
            substitute = self._substitute(wanted[0])
            loaded = replace(self.assemble([substitute], request.micro_batch), skipped=loaded.skipped)
        samples, padded = self.plan.samples(request.epoch, request.step)
        return replace(loaded, labels={**loaded.labels, **rows.labels}, samples=samples, padded_samples=padded)

    def _substitute(self, unreadable: SegmentRead) -> SegmentRead:
        """Returns the first readable segment of a following shard, so that no rank lacks a micro-batch."""
        n_shards = len(self.plan.catalogue.shards)
        for distance in range(1, n_shards + 1):
            shard = (unreadable.shard + distance) % n_shards
            lengths = self.plan.catalogue.length_N[slice(*self.plan.catalogue.starts_S[shard : shard + 2])]
            for other in np.flatnonzero(self.plan.constraints.usable(np.asarray(lengths)))[:3]:
                found = replace(
                    unreadable, shard=shard, row=int(other), length=min(unreadable.length, int(lengths[other]))
                )
                if self.assemble([found], 0).keys:
                    return found
        raise ShardError(self.plan.catalogue.shards[unreadable.shard], "cannot be read, nor can any other shard")


def become_worker(parent: int, closing: Synchronized[int], _: int) -> None:
    """Sets the signals of a worker, which must end with its training process, even after `kill -9`, and not before.

    A cluster signals all processes of a job to request a checkpoint; training needs data until it is written.
    """
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent died before the call above
            os._exit(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
