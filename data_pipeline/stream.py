"""Reads a plan: worker processes decode what this rank needs next, in plan order.

A request is (epoch, step, micro-batch); what it returns depends on nothing else, so neither the number of workers nor
that of ranks can change a batch, and a resume at any step starts there directly.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import multiprocessing
import os
import resource
import signal
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import Synchronized

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipeline import shards
from data_pipeline.catalogue import load_catalogue
from data_pipeline.config import ReaderConfig
from data_pipeline.plan import Plan, accumulation, audio_per_step_check, make_plan
from data_pipeline.samples import Row, Sample, read_samples
from data_pipeline.schema import ConfigError
from data_pipeline.shard_files import ShardError, ShardFiles
from data_pipeline.types import Batch, Cursor, Step

log = logging.getLogger(__name__)
Request = tuple[int, int, int]


@dataclass(frozen=True)
class Loaded:
    """What a worker sends: a micro-batch and the size of its global step; or `error`. `skipped`: (shard, reason)."""

    batch: Batch | None
    samples: int = 0
    padded_samples: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    error: str = ""

    def pin_memory(self) -> Loaded:
        """Called by torch's pinning thread."""
        if self.batch is None:
            return self
        targets = {name: target.pin_memory() for name, target in self.batch.targets.items()}
        wave_BT, lengths_B = self.batch.wave_BT.pin_memory(), self.batch.lengths_B.pin_memory()
        return replace(self, batch=replace(self.batch, wave_BT=wave_BT, lengths_B=lengths_B, targets=targets))


class PlannedBatches(Dataset[Loaded]):
    """Micro-batches by request; lives in the worker processes."""

    def __init__(self, plan: Plan, files: ShardFiles, config: ReaderConfig) -> None:
        self.plan, self.files, self.config = plan, files, config

    def __getitem__(self, request: Request) -> Loaded:
        try:
            return self._load(*request)
        except ShardError as error:
            return Loaded(None, error=str(error))

    def _load(self, epoch: int, step: int, j: int) -> Loaded:
        window, inside = self.plan.place(epoch, step)
        rows = window.micro_batch(inside, j)
        columns = (rows.shard_n, rows.row_n, rows.length_n, rows.repeat_n)
        wanted = [
            Row(int(s), int(r), int(n), int(k), epoch, self.plan.seed) for s, r, n, k in zip(*columns, strict=True)
        ]
        read, skipped = self._read(wanted)
        read = read or [self._substitute(wanted[0])]
        lengths = [len(sample.wave) for sample in read]
        wave_BT = np.zeros((len(read), max(lengths)), np.float32)
        for line, sample in zip(wave_BT, read, strict=True):
            line[: len(sample.wave)] = sample.wave
        batch = Batch(
            torch.from_numpy(wave_BT),
            torch.tensor(lengths),
            tuple(sample.key for sample in read),
            j,
            labels={name: tuple(sample.labels[name] for sample in read) for name in self.config.labels},
        )
        return Loaded(batch, window.samples(inside), window.padded_samples(inside), tuple(skipped))

    def _read(self, rows: list[Row]) -> tuple[list[Sample], list[tuple[str, str]]]:
        read, skipped = [], []
        for got in read_samples(self.files, rows, self.config.labels):
            if isinstance(got, Sample):
                read.append(got)
            elif self.config.on_bad_shard == "error":
                raise got
            else:
                skipped.append((got.shard, got.reason))
        return read, skipped

    def _substitute(self, row: Row) -> Sample:
        """The first segment after `row`'s shard that can be read, so that no rank ever lacks a micro-batch."""
        n_shards = len(self.plan.catalogue.shards)
        for distance in range(1, n_shards + 1):
            shard = (row.shard + distance) % n_shards
            lengths = self.plan.catalogue.length_N[slice(*self.plan.catalogue.starts_S[shard : shard + 2])]
            usable = np.flatnonzero(self.plan.rules.usable(np.asarray(lengths)))[:3]
            others = [replace(row, shard=shard, row=int(r), length=min(row.length, int(lengths[r]))) for r in usable]
            for got in read_samples(self.files, others, self.config.labels):
                if isinstance(got, Sample):
                    return got
        raise ShardError(self.plan.catalogue.shards[row.shard], "cannot be read, nor can any other shard")


class PlanReader:
    """The StepReader over a plan. One `steps` iterator at a time."""

    def __init__(self, config: ReaderConfig, seed: int, rank: int, world: int) -> None:
        self.slots = accumulation(config.micro_batches, world)
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not one of {world} ranks")
        self.config, self.rank, self.world = config, rank, world
        records = shards.done_records(config.shards)
        self._files = ShardFiles(config.shards, records, 2 * config.shuffle_window, config.verify)
        bad = self._files.check()
        self._report(bad)
        self.plan = make_plan(load_catalogue(self._files, config.cache), config, seed)
        self.plan_hash = self.plan.hash
        audio_per_step_check(self.plan, world, self.slots)
        self._steps: Iterator[Step] | None = None
        self._closing: Synchronized[int] = multiprocessing.Value("b", 0)
        atexit.register(_close, weakref.ref(self))

    def _report(self, bad: list[ShardError]) -> None:
        if not bad:
            return
        listed = "; ".join(str(error) for error in bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        if self.config.on_bad_shard == "error":
            raise ConfigError(
                f"{len(bad)} of {len(self._files.records)} shards in {self.config.shards} are bad: {listed}. "
                "Run `auricle preprocess` again to restore them, or set data.on_bad_shard=skip to train without them"
            )
        log.warning("leaving out %d bad shards: %s", len(bad), listed)

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        """Global steps from `cursor` on, for ever. Raises ConfigError for another plan, ShardError for a bad shard."""
        self.close()
        cursor = cursor or Cursor(self.plan_hash, 0, 0)
        if cursor.plan_hash != self.plan_hash:
            raise ConfigError(
                f"the checkpoint was made with data plan {cursor.plan_hash}, and this run's is {self.plan_hash}: the "
                "shards, the seed, or a data.* field that shapes batches changed; restore it, or start a new run"
            )
        self._steps = self._run(cursor)
        return self._steps

    def close(self) -> None:
        """Stops the workers."""
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]
            self._steps = None
        self._files.close()

    def _run(self, cursor: Cursor) -> Iterator[Step]:
        requests = _Requests(self.plan, cursor, self.rank, self.world)
        self._closing.value = 0
        loaded = iter(self._loader(requests))
        where = cursor
        try:
            while True:
                parts = [self._next(loaded) for _ in range(self.slots)]
                last = where.step + 1 == self.plan.layout(where.epoch).steps
                where = Cursor(self.plan_hash, where.epoch + last, 0 if last else where.step + 1)
                batches = tuple(part.batch for part in parts if part.batch is not None)
                skipped = sum(len(part.skipped) for part in parts)
                yield Step(batches, parts[0].samples, parts[0].padded_samples, where, skipped)
        finally:
            self._closing.value = 1
            del loaded  # ends the workers

    def _next(self, loaded: Iterator[Loaded]) -> Loaded:
        try:
            part = next(loaded)
        except (RuntimeError, OSError, EOFError) as error:  # what comes of a worker that is dead or silent
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"the data workers of rank {self.rank} stopped: {reason} (data.timeout_seconds="
                f"{self.config.timeout_seconds:g}). A worker killed by the system usually means too little memory: "
                "lower data.workers or data.prefetch"
            ) from error
        if part.error:
            raise ShardError(*part.error.split(": ", 1))
        for shard, reason in part.skipped:
            log.warning("left out a segment: %s: %s", shard, reason)
        return part

    def _loader(self, requests: _Requests) -> DataLoader[Loaded]:
        workers = self.config.workers
        batches = PlannedBatches(self.plan, self._files, self.config)
        if not workers:
            return DataLoader(batches, sampler=requests, batch_size=None)
        _allow_open_files()
        begin = functools.partial(_become_worker, os.getpid(), self._closing)
        ahead = max(2, -(-self.config.prefetch * self.slots // workers))
        return DataLoader(
            batches, sampler=requests, batch_size=None, num_workers=workers, prefetch_factor=ahead,
            timeout=self.config.timeout_seconds, multiprocessing_context="fork", worker_init_fn=begin,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip


class _Requests(Sampler[Request]):
    """What rank `rank` of `world` reads, from a cursor on, for ever."""

    def __init__(self, plan: Plan, cursor: Cursor, rank: int, world: int) -> None:
        self.plan, self.cursor, self.rank, self.world = plan, cursor, rank, world

    def __iter__(self) -> Iterator[Request]:
        epoch, step = self.cursor.epoch, self.cursor.step
        while True:
            for g in range(step, self.plan.layout(epoch).steps):
                for j in range(self.rank, self.plan.rules.micro_batches, self.world):
                    yield epoch, g, j
            epoch, step = epoch + 1, 0


def _become_worker(parent: int, closing: Synchronized[int], _: int) -> None:
    """Signals in a worker: it ends when its trainer does, even by `kill -9`, and not before.

    A cluster signals every process of a job to ask for a checkpoint; the trainer needs its data until that is written.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)


def _close(reader: weakref.ref[PlanReader]) -> None:
    if (alive := reader()) is not None:
        alive.close()


def _allow_open_files() -> None:
    """Every batch in flight holds a file descriptor of shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_reader(config: ReaderConfig, seed: int, rank: int, world: int) -> PlanReader:
    """The reader of one rank. Raises ConfigError for too few data, bad shards, or a world that does not divide V."""
    return PlanReader(config, seed, rank, world)
