"""Reads a plan: worker processes decode the next micro-batches of this rank, in plan order.

A request is (epoch, step, micro-batch), and its result depends on nothing else. Therefore the numbers of workers and
ranks do not change batches, and a resume starts directly at its step.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import multiprocessing
import os
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from data_pipeline.core.jsonl import append_rows
from data_pipeline.core.retries import StorageError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Cursor, Step
from data_pipeline.labels.store import LabelMetadata
from data_pipeline.loader.episodes import read_episode_plan
from data_pipeline.loader.fetch import check_images, check_labels, check_tokens, some_texts
from data_pipeline.loader.open_shards import open_files
from data_pipeline.loader.shared_buffers import SharedBuffers
from data_pipeline.loader.texts import SegmentsWithText, SegmentTexts
from data_pipeline.loader.workers import BatchRequest, Loaded, PlannedBatches, become_worker
from data_pipeline.sampling.catalog import load_catalogue
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.plan import Plan, accumulation, audio_per_step_check, make_plan
from data_pipeline.sampling.prefetch_order import PlanSchedule
from data_pipeline.shards.local import ShardError, ShardFiles
from data_pipeline.shards.records import DoneRecord, done_records

log = logging.getLogger(__name__)


class PlanReader:
    """The StepReader of one rank over a plan. One `steps` iterator at a time.

    Args:
        config: the run's `data`.
        seed: keys order, crops and augmentation.
        rank: this rank's number.
        world: number of ranks, at most `config.micro_batches`.
        least_samples: shortest segment that the model can use; the plan skips shorter ones.
        records: the shards to read; None: all of `config.shards`.

    Raises:
        ConfigError: too little audio, settings that exclude each other, or more ranks than micro-batches.
        ValueError: shards are bad, with `on_bad_shard=error`.
        StorageReadError: the storage does not answer.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int,
        world: int,
        least_samples: int = 0,
        records: Sequence[DoneRecord] | None = None,
    ) -> None:
        self.slots = accumulation(config.micro_batches, world)
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not one of {world} ranks")
        self.config, self.rank, self.world = config, rank, world
        records = done_records(config.shards, config.tars) if records is None else records
        self._files = open_files(config, records)
        self.remote = self._files.shards.remote
        self._report(self._files.check())
        texts = SegmentTexts(config, log.warning)
        search = SegmentsWithText(config, texts.sources) if config.text_share else None
        catalogue = load_catalogue(self._files, config.cache, config.on_bad_shard == "skip", search)
        check_labels(self._files, config.labels)
        if config.episodes.label:
            self.plan: Plan = read_episode_plan(self._files, catalogue, config, seed, least_samples)
        else:
            self.plan = make_plan(catalogue, config, seed, least_samples)
        check_labels(self._files, [label for label in texts.labels if label not in config.labels])
        check_tokens(texts, self.some_texts, log.warning)
        check_images(self._files, config.images.size)
        self.plan_hash = texts.extend_hash(_with_targets(self.plan.hash, config))
        self._files.follow(PlanSchedule(self.plan))
        if not config.episodes.label:  # the audio of an episode follows from its rows
            audio_per_step_check(self.plan, world, self.slots)
        self._cursor = Cursor(self.plan_hash, 0, 0)
        self._iterator: _StepIterator | None = None
        atexit.register(_close, weakref.ref(self))

    @property
    def records(self) -> Sequence[DoneRecord]:
        """The records of the shards that are read."""
        return self._files.records

    def _report(self, bad: list[ShardError]) -> None:
        if not bad:
            return
        listed = "; ".join(str(error) for error in bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        if self.config.on_bad_shard == "error":
            raise ValueError(
                f"{len(bad)} of {len(self._files.records)} shards in {', '.join(self.config.shards)} are bad: "
                f"{listed}. "
                "Run `auricle preprocess` again to restore them, or set data.on_bad_shard=skip to train without them"
            )
        log.warning("leaving out %d bad shards: %s", len(bad), listed)

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        """Yields this rank's part of the global steps, without end.

        Args:
            cursor: where to start; default: the position of `load_state_dict`, or the beginning.

        Raises:
            ConfigError: the cursor is of another plan.
            ShardError: a shard cannot be read, with `on_bad_shard=error`.
            StorageReadError: the storage did not recover within `retry_seconds`.
            RuntimeError: a data worker died or does not respond.
        """
        self.close()
        cursor = cursor or self._cursor
        if cursor.plan_hash != self.plan_hash:
            raise ConfigError(
                f"the checkpoint was made with data plan {cursor.plan_hash}, and this run's is {self.plan_hash}: the "
                "shards, the seed, or a data.* field that shapes batches changed; restore it, or start a new run"
            )
        self._iterator = _StepIterator(self, cursor)
        return self._observed(self._iterator)

    def _observed(self, iterator: _StepIterator) -> Iterator[Step]:
        for step in iterator:
            if self.config.keys_log:
                self._note_keys(step)
            self._cursor = step.after
            yield step

    def _note_keys(self, step: Step) -> None:
        folder = Path(self.config.keys_log)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "epoch": step.after.epoch,
                "after": step.after.step,
                "micro_batch": batch.micro_batch,
                "keys": batch.keys,
                "lengths": batch.lengths_B.tolist(),
            }
            for batch in step.batches
            if not batch.is_empty
        ]
        append_rows(folder / f"rank_{self.rank}.jsonl", rows)

    def some_texts(self, label: str) -> list[str]:
        """Returns this label of some segments that have it, from several shards."""
        return some_texts(self._files, label)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last yielded step, for a resume on any number of ranks and workers."""
        return {"plan_hash": self._cursor.plan_hash, "epoch": self._cursor.epoch, "step": self._cursor.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next `steps()` continue from `state`."""
        self._cursor = Cursor(str(state["plan_hash"]), int(state["epoch"]), int(state["step"]))

    def close(self) -> None:
        """Stops the workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self._files.close()


class _StepIterator:
    """Iterates over steps: workers load micro-batches, and a thread combines them to steps ahead of training."""

    def __init__(self, reader: PlanReader, cursor: Cursor) -> None:
        self._plan, self._slots, self._config, self._rank = reader.plan, reader.slots, reader.config, reader.rank
        # micro-batches of this rank in each step; its last slot is empty where ranks do not divide them
        self._own = len(range(reader.rank, reader.config.micro_batches, reader.world))
        self._cursor = cursor
        self._closing: Synchronized[int] = multiprocessing.Value("b", 0)
        self._pin = torch.cuda.is_available()
        self._buffers: SharedBuffers | None = None
        self._retries = reader.config.retry_seconds if reader.remote else 0.0
        requests = _Requests(reader.plan, cursor, reader.rank, reader.world)
        # Workers are forked here and not in the thread, since they end with the thread that forks them.
        others = multiprocessing.active_children()
        self._loaded: Iterator[Loaded] = iter(self._loader(requests, reader._files))
        self._workers = [child for child in multiprocessing.active_children() if child not in others]
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        if reader.config.workers:
            self._thread = threading.Thread(target=self._fill_queue, name="auricle-reader", daemon=True)
            self._thread.start()

    def _loader(self, requests: _Requests, files: ShardFiles) -> DataLoader[Loaded]:
        workers = self._config.workers
        if not workers:
            return DataLoader(PlannedBatches(self._plan, files, self._config, None), sampler=requests, batch_size=None)
        ahead = max(2, -(-self._config.prefetch * self._slots // workers))
        self._buffers = SharedBuffers(workers, ahead, self._plan.largest_micro_batch() * (1 + self._config.sources))
        batches = PlannedBatches(self._plan, files, self._config, self._buffers)
        begin = functools.partial(become_worker, os.getpid(), self._closing)
        return DataLoader(
            batches, sampler=requests, batch_size=None, num_workers=workers, prefetch_factor=ahead,
            multiprocessing_context="fork", worker_init_fn=begin,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Step]:
        try:
            while not self._closing.value:
                got = self._wait() if self._thread else self._next_step()
                if isinstance(got, BaseException):
                    raise got
                yield got
        except StorageError:
            raise
        except (RuntimeError, OSError, EOFError) as error:  # raised for a worker that is dead or does not respond
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"the data workers of rank {self._rank} stopped: {reason}. A worker killed by the system usually means "
                "too little memory: lower data.workers or data.prefetch"
            ) from error
        finally:
            self.close()

    def _wait(self) -> Step | BaseException:
        try:
            return self._ready.get(timeout=self._config.timeout_seconds + self._retries)
        except queue.Empty:
            raise RuntimeError(f"no data for data.timeout_seconds={self._config.timeout_seconds:g}") from None

    def _fill_queue(self) -> None:
        got: Step | BaseException | None = None
        while not self._closing.value and not isinstance(got, BaseException):
            try:
                got = self._next_step()
            except BaseException as error:  # passed to the main thread
                got = error
            while not self._closing.value:
                try:
                    self._ready.put(got, timeout=0.2)
                    break
                except queue.Full:
                    continue

    def _next_step(self) -> Step:
        parts, batches = [], []
        for _ in range(self._own):
            part = self._next_micro_batch()
            parts.append(part)
            batches.append(part.batch(self._buffers, self._pin))
        if self._own < self._slots:
            batches.append(batches[0].emptied(self._config.micro_batches + self._rank))
        now = self._cursor
        last = now.step + 1 == self._plan.layout(now.epoch).steps
        self._cursor = Cursor(now.plan_hash, now.epoch + last, 0 if last else now.step + 1)
        skipped = sum(len(part.skipped) for part in parts)
        return Step(tuple(batches), parts[0].samples, parts[0].padded_samples, self._cursor, skipped)

    def _next_micro_batch(self) -> Loaded:
        part = next(self._loaded)
        if part.error:
            raise part.error
        for shard, reason in part.skipped:
            log.warning("left out a segment: %s: %s", shard, reason)
        for shard, reason in part.bad_images:
            log.warning("left out an image: %s: %s", shard, reason)
        return part

    def close(self) -> None:
        """Ends thread and workers."""
        self._closing.value = 1
        if self._thread is not None:
            self._thread.join(timeout=1)
            if self._thread.is_alive():  # it waits for a worker that is dead or stuck
                for worker in self._workers:
                    worker.terminate()
                self._thread.join(timeout=20)
            self._thread = None
        self._loaded = iter(())  # the loader's iterator ends its workers when nothing refers to it


class _Requests(Sampler[BatchRequest]):
    """Yields the requests of rank `rank` of `world` from a cursor on, without end."""

    def __init__(self, plan: Plan, cursor: Cursor, rank: int, world: int) -> None:
        self.plan, self.cursor, self.rank, self.world = plan, cursor, rank, world

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, first = self.cursor.epoch, self.cursor.step
        while True:
            for step in range(first, self.plan.layout(epoch).steps):
                for micro_batch in range(self.rank, self.plan.constraints.micro_batches, self.world):
                    yield BatchRequest(epoch, step, micro_batch)
            epoch, first = epoch + 1, 0


def _with_targets(plan_hash: str, config: DataConfig) -> str:
    """Returns a hash that includes the frame labels, since a run must not continue with different ones."""
    if not config.targets:
        return plan_hash
    artefacts = sorted((name, LabelMetadata.read(root).artefact) for name, root in config.targets.items())
    return hashlib.sha256(f"{plan_hash} {artefacts}".encode()).hexdigest()[:16]


def _close(reader: weakref.ref[PlanReader]) -> None:
    if (alive := reader()) is not None:
        alive.close()


def open_reader(
    config: DataConfig,
    seed: int,
    rank: int,
    world: int,
    least_samples: int = 0,
    records: Sequence[DoneRecord] | None = None,
) -> PlanReader:
    """Opens the indexed shards of a run for one rank and plans their steps.

    Args:
        config: the run's `data`.
        seed: the run's seed.
        rank: this rank, from 0.
        world: number of ranks, at most `micro_batches`.
        least_samples: shortest segment, in samples at 16 kHz, that the model can use.
        records: the shards to read; None: all of `config.shards`.

    Returns:
        The reader, at the start of the plan; `steps` yields micro-batches of (B, T) audio.

    Raises:
        ConfigError: `config` does not fit these shards and ranks, or `config.reader` is not "plan".
        ValueError: shards are damaged, with `on_bad_shard=error`.
    """
    if config.reader != "plan":
        raise ConfigError(f"data.reader={config.reader}: there is no plan without an index; set data.reader=plan")
    return PlanReader(config, seed, rank, world, least_samples, records)
