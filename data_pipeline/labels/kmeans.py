"""Frame labels by k-means over shards: streaming and distributed, without storing features.

Full-batch Lloyd's algorithm: in each round a task per shard computes its features, assigns them to the centres and
returns sums, counts and inertia, K × (D + 1) numbers for any corpus size. Sums are added in the order of the shards in
float64, so that the result does not depend on the number of workers. Finished rounds are saved, and a repeated call
continues after them. The result is one file, whose sha256 is stored in all label files (store.py).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from data_pipeline.audio.codecs import AudioError, Wave
from data_pipeline.audio.samples import open_sample
from data_pipeline.core.integrity import write_checksums
from data_pipeline.core.progress import Advance, Begin, silent
from data_pipeline.core.ray_tasks import cluster, run_tasks
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.features import Extractor, Matrix, kaldi_mfcc
from data_pipeline.labels.store import ADDED, LabelMetadata, file_name, require_same_settings, write_labels
from data_pipeline.shards.records import DoneRecord, done_records, read_index

KMEANS = "kmeans.safetensors"
RESTARTS = 5
"""Number of seedings, of which the best is used."""
SEED_ROUNDS = 20
"""Lloyd iterations after which seedings are compared."""
SEEDS = 20_000
"""Number of frames among which k-means++ draws the first centres."""
LONGEST_SECONDS = 3_600
"""Longest sample, since whole samples are held in memory."""
ROWS = 8_192
"""Number of frames compared with the centres at a time."""


@dataclass(frozen=True)
class TargetsSummary:
    """inertia: mean squared distance of a frame to its centre, by round (empty without fitting)."""

    artefact: str
    shards: int
    classes: int
    rate_hz: int
    inertia: tuple[float, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows of a table for the terminal."""
        return [
            ("shards labelled", f"{self.shards:,}"),
            ("classes", f"{self.classes:,} at {self.rate_hz} Hz"),
            ("inertia", " → ".join(f"{value:.4g}" for value in self.inertia[:: max(1, len(self.inertia) - 1)]) or "–"),
            ("artefact", self.artefact),
        ]


def make_targets(
    config: TargetsConfig,
    extractor: Callable[[], Extractor] = kaldi_mfcc,
    weights: str = "",
    begin: Begin = silent,
) -> TargetsSummary:
    """Fits centres by k-means, then labels every shard. Finished work is not repeated.

    Args:
        config: shards, features, number of classes and output.
        extractor: returns the feature extractor; called once in each worker, where it must be importable.
        weights: checksum of the extractor's weights; "" if it has none.
        begin: shows stages of the work.

    Returns:
        The artefact (sha256 of the centres) and the inertia, the mean squared distance of a frame to its centre, by
        round.

    Raises:
        ConfigError: the folder has labels of other settings or weights, or there are fewer frames than classes.
        OSError: a shard cannot be read or the output cannot be written.
    """
    records = done_records(config.shards)
    store = FileStore(config.out)
    with cluster(config.ray):
        settings = settings_of(config, records, weights)
        require_same_settings(store, settings)
        centres, inertia = (
            (_given(config, _cached(extractor).rate_hz), ())
            if config.kmeans
            else _fit(config, records, extractor, store, begin)
        )
        content = save_tensors({"centres": centres}, metadata={"settings": json.dumps(settings, sort_keys=True)})
        if config.kmeans:
            content = _read_centres(config)
        artefact = hashlib.sha256(content).hexdigest()
        store.replace(KMEANS, content)
        labels = LabelMetadata(artefact, _cached(extractor).rate_hz, len(centres))
        labels.write(config.out)
        arguments = {record.shard: (config, record, extractor, centres, labels) for record in records}
        failed = run_tasks(label_shard, arguments.items(), config.ray, begin("labelling shards", len(records)))
    if failed:
        raise OSError(f"{len(failed)} of {len(records)} shards could not be labelled: {next(iter(failed.items()))}")
    rounds = [f"_fit/{name}" for name in store.names("_fit", ".safetensors")]
    sidecars = [file_name(record.shard) for record in records]
    write_checksums(store, [KMEANS, "labels.json", "targets.json", *rounds, *sidecars])
    return TargetsSummary(artefact, len(records), labels.classes, labels.rate_hz, inertia)


def all_labelled(config: TargetsConfig, weights: str = "") -> bool:
    """Returns whether every shard has labels.

    Args:
        config: see `make_targets`.
        weights: see `make_targets`; "": not compared.

    Raises:
        ConfigError: the folder has labels of other settings.
    """
    records, store = done_records(config.shards), FileStore(config.out)
    if not store.exists("targets.json") or not store.exists("labels.json"):
        return False
    require_same_settings(store, settings_of(config, records, weights))
    artefact = LabelMetadata.read(config.out).artefact
    return all(
        store.exists(file_name(record.shard)) and artefact_of(store, record.shard) == artefact for record in records
    )


def accumulate(
    record: DoneRecord, extractor: Callable[[], Extractor], centres: Matrix
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], float]:
    """Returns one shard's part of a round: (K, D) sums and (K,) counts of the frames nearest to each centre, and the
    sum of their squared distances.

    Args:
        record: the shard.
        extractor: makes the feature extractor, only where audio has to be encoded.
        centres: (K, D) centres of the round before.
    """
    sums, counts, inertia = np.zeros(centres.shape), np.zeros(len(centres), np.int64), 0.0
    for _, features in shard_features(record, extractor):
        nearest, distance = assign(features, centres)
        np.add.at(sums, nearest, features.astype(np.float64))
        counts += np.bincount(nearest, minlength=len(centres))
        inertia += float(distance.sum())
    return sums, counts, inertia


def label_shard(
    config: TargetsConfig,
    record: DoneRecord,
    extractor: Callable[[], Extractor],
    centres: Matrix,
    labels: LabelMetadata,
) -> None:
    """Writes the labels of one shard, by (K, D) centres, if they do not exist."""
    store = FileStore(config.out)
    if store.exists(file_name(record.shard)) and artefact_of(store, record.shard) == labels.artefact:
        return
    keys, rows = [], []
    for key, features in shard_features(record, extractor):
        keys.append(key)
        rows.append(assign(features, centres)[0].astype(np.uint16))
    write_labels(config.out, record.shard, labels, keys, rows)


def shard_features(record: DoneRecord, extractor: Callable[[], Extractor]) -> Iterator[tuple[str, Matrix]]:
    """Yields (key, features) of each sample of a shard, in the order of its index. Raises as `shard_waves`."""
    compute = _cached(extractor).compute
    for key, wave in shard_waves(record):
        yield key, compute(wave)


def shard_waves(record: DoneRecord) -> Iterator[tuple[str, Wave]]:
    """Yields (key, audio) of each sample of a shard, in the order of its index.

    Raises:
        ValueError: a sample cannot be decoded, or is longer than `LONGEST_SECONDS`, regardless of its header.
    """
    rows, store = read_index(record.root, record).to_pylist(), FileStore(record.tar_root)
    with store.fs.open(store.path(record.shard), "rb") as file:
        for row in rows:
            if not 0 < row["n_samples"] <= LONGEST_SECONDS * SAMPLE_RATE:
                raise ValueError(
                    f"{record.shard}: sample {row['key']} has {row['n_samples']:,} samples by its index; frame labels "
                    f"are made for up to {LONGEST_SECONDS} s: cut it shorter with cut.max_seconds"
                )
            file.seek(row["payload_offset"])
            yield row["key"], _read_wave(file.read(row["payload_size"]), row, record.shard)


def _read_wave(content: bytes, row: Mapping[str, Any], shard: str) -> Wave:
    """Decodes the first n_samples of a sample, according to its index. Raises ValueError if there are fewer."""
    try:
        with open_sample(content) as sample:
            if sample.channels != 1:
                raise ValueError(f"{shard}: sample {row['key']} has {sample.channels} channels instead of 1")
            wave = sample.read(count=row["n_samples"])
    except AudioError as error:
        raise ValueError(f"{shard}: sample {row['key']} {error}") from None
    if len(wave) < row["n_samples"]:
        raise ValueError(f"{shard}: sample {row['key']} has {len(wave):,} samples, its index {row['n_samples']:,}")
    return wave


def assign(features: Matrix, centres: Matrix) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Returns the nearest centre of each of the (F, D) frames, and the squared distance to it."""
    nearest, distance = np.empty(len(features), np.int64), np.empty(len(features))
    half = 0.5 * np.einsum("kd,kd->k", centres, centres)
    for start in range(0, len(features), ROWS):
        part = features[start : start + ROWS]
        scores = half - part @ centres.T
        best = scores.argmin(axis=1)
        nearest[start : start + ROWS] = best
        difference = part.astype(np.float64) - centres[best]
        distance[start : start + ROWS] = np.einsum("fd,fd->f", difference, difference)
    return nearest, distance


def _fit(
    config: TargetsConfig,
    records: list[DoneRecord],
    extractor: Callable[[], Extractor],
    store: FileStore,
    begin: Begin,
) -> tuple[Matrix, tuple[float, ...]]:
    if store.exists(KMEANS):
        return load_tensors(store.read(KMEANS))["centres"], ()
    draw = keyed_rng(config.seed, "targets", "shards")
    count = max(1, round(config.fraction * len(records)))
    chosen = [records[number] for number in sorted(draw.permutation(len(records))[:count].tolist())]
    centres, history = _last_round(store)
    if centres is None:
        centres = _first_centres(config, chosen, extractor, begin)
    while len(history) < config.rounds:
        if len(history) > 1 and history[-2] - history[-1] < config.tolerance * history[-2]:
            break
        parts: list[tuple[str, Any]] = []
        fitted = f", inertia {history[-1]:.4g}" if history else ""
        advance = begin(f"k-means round {len(history) + 1} of at most {config.rounds}{fitted}", len(chosen))

        def add(part: tuple[str, Any], parts: list[Any] = parts, advance: Advance = advance) -> None:
            parts.append(part)
            advance(part)

        arguments = {record.shard: (record, extractor, centres) for record in chosen}
        failed = run_tasks(_accumulate_named, arguments.items(), config.ray, add)
        if failed:
            raise OSError(f"{len(failed)} shards could not be read: {next(iter(failed.items()))}")
        ordered = [part for _, part in sorted(parts, key=lambda part: part[0])]
        sums = np.sum([part[0] for part in ordered], axis=0)
        counts = np.sum([part[1] for part in ordered], axis=0)
        # a centre without frames does not move
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres).astype(np.float32)
        history.append(sum(part[2] for part in ordered) / max(int(counts.sum()), 1))
        saved = save_tensors({"centres": centres, "inertia": np.array(history)})
        store.replace(f"_fit/{len(history):04d}.safetensors", saved)
    return centres, tuple(history)


def _accumulate_named(record: DoneRecord, extractor: Callable[[], Extractor], centres: Matrix) -> tuple[str, Any]:
    return record.shard, accumulate(record, extractor, centres)


def _first_centres(
    config: TargetsConfig, records: list[DoneRecord], extractor: Callable[[], Extractor], begin: Begin
) -> Matrix:
    """Returns the best of `RESTARTS` greedy k-means++ seedings on frames drawn evenly from the shards."""
    each = -(-SEEDS // len(records))
    sampled: dict[str, Matrix] = {}
    arguments = {record.shard: (config, record, extractor, each) for record in records}
    advance = begin("drawing frames for the first centres", len(records))

    def add(part: tuple[str, Matrix]) -> None:
        sampled.update([part])
        advance(part)

    failed = run_tasks(_sample, arguments.items(), config.ray, add)
    if failed:
        raise OSError(f"{len(failed)} shards could not be read: {next(iter(failed.items()))}")
    frames = np.concatenate([sampled[record.shard] for record in records])
    if len(frames) < config.classes:
        raise ConfigError(f"classes={config.classes}: there are only {len(frames)} frames to fit them on")
    found = [_seeded(frames, config, number) for number in range(RESTARTS)]
    return min(found, key=lambda pair: pair[0])[1]


def _seeded(frames: Matrix, config: TargetsConfig, restart: int) -> tuple[float, Matrix]:
    """Returns (inertia, centres) of greedy k-means++ followed by `SEED_ROUNDS` Lloyd iterations on these frames."""
    import torch

    from data_pipeline.labels.seeding import kmeans_plus_plus

    rng = keyed_rng(config.seed, restart, "targets", "centres")
    first = int(rng.integers(len(frames)))
    draws = rng.random((config.classes - 1, 2 + int(np.log(config.classes))))
    chosen = kmeans_plus_plus(torch.from_numpy(frames), first, torch.from_numpy(draws))
    centres = frames[chosen].astype(np.float64)
    for _ in range(SEED_ROUNDS):
        nearest, squared = assign(frames, centres.astype(np.float32))
        counts = np.bincount(nearest, minlength=len(centres))
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, frames)
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
    return float(squared.sum()), centres.astype(np.float32)


def _sample(
    config: TargetsConfig, record: DoneRecord, extractor: Callable[[], Extractor], count: int
) -> tuple[str, Matrix]:
    """Returns `count` frames of a shard, evenly from randomly chosen segments."""
    draw = keyed_rng(config.seed, record.shard, "targets", "frames")
    rate = _cached(extractor).rate_hz
    share = min(1.0, 2 * count / max(record.samples / SAMPLE_RATE * rate, 1))
    found = shard_features(record, extractor)
    frames = np.concatenate([features[draw.random(len(features)) < share] for _, features in found])
    return record.shard, frames[draw.permutation(len(frames))[:count]]


def _last_round(store: FileStore) -> tuple[Matrix | None, list[float]]:
    names = store.names("_fit", ".safetensors")
    if not names:
        return None, []
    kept = load_tensors(store.read(f"_fit/{names[-1]}"))
    return kept["centres"], kept["inertia"].tolist()


def _given(config: TargetsConfig, rate_hz: int) -> Matrix:
    if (other := LabelMetadata.read(config.kmeans).rate_hz) != rate_hz:
        raise ConfigError(f"kmeans={config.kmeans}: its centres are of {other} Hz, not {rate_hz}; set rate_hz={other}")
    centres: Matrix = load_tensors(_read_centres(config))["centres"]
    return centres


def _read_centres(config: TargetsConfig) -> bytes:
    try:
        return FileStore(config.kmeans).read(KMEANS)
    except FileNotFoundError:
        raise ConfigError(f"kmeans={config.kmeans}: holds no {KMEANS}") from None


def settings_of(config: TargetsConfig, records: list[DoneRecord], weights: str) -> dict[str, Any]:
    """Returns all settings that determine the labels."""
    names = ("features", "layer", "classes", "fraction", "seed", "kmeans")
    shards = hashlib.sha256("".join(record.sha256 for record in records).encode()).hexdigest()
    centres = hashlib.sha256(_read_centres(config)).hexdigest() if config.kmeans else ""
    given = {name: text for name, text in (("weights", weights), ("centres", centres)) if text}
    more = {name: getattr(config, name) for name in ADDED if getattr(config, name) != ADDED[name]}
    return {**{name: getattr(config, name) for name in names}, "shards": shards, **more, **given}


def artefact_of(store: FileStore, shard: str) -> str:
    """Returns the artefact that the labels of a shard are of."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(io.BytesIO(store.read(file_name(shard)))).metadata or {}
    return str(metadata.get(b"artefact", b"").decode())


_EXTRACTORS: dict[str, Extractor] = {}


def _cached(extractor: Callable[[], Extractor]) -> Extractor:
    """Returns the process's extractor, cached by value, since unpickled partials are distinct objects."""
    name = repr((extractor.func, extractor.args)) if isinstance(extractor, functools.partial) else repr(extractor)
    if name not in _EXTRACTORS:
        _EXTRACTORS[name] = extractor()
    return _EXTRACTORS[name]
