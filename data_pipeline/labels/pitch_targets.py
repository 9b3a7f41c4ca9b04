"""Pitch labels of shards: `auricle targets features=pitch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from data_pipeline.core.integrity import write_checksums
from data_pipeline.core.progress import Begin, silent
from data_pipeline.core.ray_tasks import cluster, run_tasks
from data_pipeline.core.storage import FileStore
from data_pipeline.labels import pitch
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.labels.kmeans import artefact_of, settings_of, shard_waves
from data_pipeline.labels.store import LabelMetadata, file_name, require_same_settings, write_labels
from data_pipeline.shards.records import DoneRecord, done_records

PITCH: Final = "pitch"
"""Value of `TargetsConfig.features` for pitch labels."""


@dataclass(frozen=True)
class PitchSummary:
    """Labels that were made; voiced: share of the frames with a voice in shards that were labelled now."""

    artefact: str
    shards: int
    frames: int
    voiced: float

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows of a table for the terminal."""
        share = f"; {self.voiced:.0%} of {self.frames:,} new frames have a voice" if self.frames else ""
        return [
            ("shards labelled", f"{self.shards:,}"),
            ("pitch", f"{pitch.CLASSES} classes at {pitch.RATE_HZ} Hz{share}"),
            ("artefact", self.artefact),
        ]


def make_pitch_targets(config: TargetsConfig, begin: Begin = silent) -> PitchSummary:
    """Labels every shard with the pitch of its samples. Finished shards are not labelled again.

    Args:
        config: shards and output; the fields of k-means have no effect.
        begin: shows the progress.

    Raises:
        ConfigError: the folder has other labels, or the package swift-f0 is missing.
        OSError: a shard cannot be read or the output cannot be written.
    """
    records, store = done_records(config.shards), FileStore(config.out)
    labels = LabelMetadata(pitch.artefact(), pitch.RATE_HZ, pitch.CLASSES)
    counted: list[tuple[int, int]] = []
    with cluster(config.ray):
        require_same_settings(store, settings_of(config, records, labels.artefact))
        labels.write(config.out)
        advance = begin("labelling shards", len(records))

        def add(part: tuple[int, int]) -> None:
            counted.append(part)
            advance(part)

        arguments = {record.shard: (config, record, labels) for record in records}
        failed = run_tasks(label_pitch, arguments.items(), config.ray, add)
    if failed:
        raise OSError(f"{len(failed)} of {len(records)} shards could not be labelled: {next(iter(failed.items()))}")
    write_checksums(store, ["labels.json", "targets.json", *(file_name(record.shard) for record in records)])
    frames, voiced = (sum(column) for column in zip(*counted, strict=True)) if counted else (0, 0)
    return PitchSummary(labels.artefact, len(records), frames, voiced / max(frames, 1))


def label_pitch(config: TargetsConfig, record: DoneRecord, labels: LabelMetadata) -> tuple[int, int]:
    """Writes the pitch labels of one shard if they do not exist; returns its new frames, and those with a voice."""
    store = FileStore(config.out)
    if store.exists(file_name(record.shard)) and artefact_of(store, record.shard) == labels.artefact:
        return 0, 0
    compute = pitch.pitch_labels()
    found = [(key, compute(wave)) for key, wave in shard_waves(record)]
    rows = [row for _, row in found]
    write_labels(config.out, record.shard, labels, [key for key, _ in found], rows)
    return sum(map(len, rows)), sum(int((row > 0).sum()) for row in rows)
