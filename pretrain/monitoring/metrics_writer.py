"""metrics.jsonl is the truth, TensorBoard the view. Names: loss/ metric/ health/ opt/ perf/ data/ hist/."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data_pipeline.core.atomic_files import write_atomically
from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import dump
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from pretrain.monitoring.figures import add_snapshot
from pretrain.monitoring.snapshot import Camera
from pretrain.profiling import mfu
from pretrain.train_module import TrainModule

MAX_TEXT = 50_000


"""Characters of the git diff that are shown; all of it is in RUN/git.diff."""


HPARAMS = (
    "data.batch_seconds", "data.micro_batches", "encoder.", "engine.precision", "frontend.", "objective.", "optimizer.",
    "schedule.", "seed", "train.steps",
)  # fmt: skip
"""Fields of the config on the page that compares runs by them; all of them are in the text beside."""


LAYOUT: dict[str, dict[str, list[Any]]] = {
    "learning": {
        "losses": ["Multiline", ["loss/.*"]],
        "accuracy": ["Multiline", ["metric/accuracy.*"]],
        "codes in use": ["Multiline", ["metric/perplexity.*", "metric/soft_perplexity"]],
        "quality": ["Multiline", ["evaluate/.*"]],
    },
    "health": {
        "deviation of each stage": ["Multiline", ["health/std/.*"]],
        "RankMe of each layer": ["Multiline", ["health/rank/.*"]],
        "gradient norm": ["Multiline", ["opt/grad_norm"]],
        "alarms and skipped updates": ["Multiline", ["health/alarms", "health/skipped"]],
    },
    "speed": {
        "audio-seconds per second": ["Multiline", ["perf/audio_seconds_per_second"]],
        "waiting and padding": ["Multiline", ["perf/data_wait_share", "data/padding_share"]],
        "model FLOP utilisation": ["Multiline", ["perf/mfu"]],
        "memory, GiB": ["Multiline", ["perf/memory_gib"]],
    },
}
"""What the custom-scalars page puts together."""


class Telemetry:
    """Writes one row per logged step; rows of steps that a resume will run again are dropped first.

    Raises StaleIncarnationError when a newer start of the run exists, before anything is dropped or written.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        module: TrainModule,
        resumed_at: int,
        world: DistributedContext | None = None,
    ) -> None:
        self._run, self._config = run, config
        world = world or DistributedContext()
        self._utilisation = mfu.measure(config, world.device, world.size)
        self._camera = Camera(module) if config.train.media_every else None
        run.path.mkdir(parents=True, exist_ok=True)
        self._open(resumed_at)

    def _open(self, resumed_at: int) -> None:
        self._run.require_current()
        _drop_rows_after(self._run.metrics, resumed_at)
        self._file = self._run.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._run.tensorboard), purge_step=resumed_at + 1, flush_secs=15)
        values = dump(self._config)
        self._board.add_text("config", f"```json\n{json.dumps(values, indent=2)}\n```", resumed_at)
        diff = self._run.path / "git.diff"
        if diff.is_file() and (text := diff.read_text(encoding="utf-8", errors="replace")):
            self._board.add_text("git_diff", f"```diff\n{text[:MAX_TEXT]}\n```", resumed_at)
        shown = {"loss/total": None, "metric/accuracy": None}
        chosen = {name: value for name, value in _flat(values).items() if name.startswith(HPARAMS)}
        for summary in hparams(chosen, shown):  # type: ignore[no-untyped-call]
            self._board._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        self._board.add_custom_scalars(LAYOUT)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def expect(self, step: int) -> None:
        """Update number `step` comes next: it is pictured if it is due (each `train.media_every`, if logged)."""
        settings = self._config.train
        if self._camera is not None:
            self._camera.armed = step % settings.log_every == 0 and step % settings.media_every < settings.log_every

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Scalars go to both; counts per bin to TensorBoard as histograms. Raises StaleIncarnationError."""
        self._run.require_current()
        if self._utilisation is not None:
            share = self._utilisation.share(scalars["perf/audio_seconds_per_second"])
            scalars = {**scalars, "perf/mfu": share}
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3), **scalars}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        for name, counts in histograms.items():
            _add_counts(self._board, name, counts, step)
        if self._camera is not None and (snapshot := self._camera.take()):
            add_snapshot(self._board, snapshot, step)

    def go_back(self, resumed_at: int) -> None:
        """Goes on after step `resumed_at`, to which the run has rolled back."""
        self.close()
        self._open(resumed_at)

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        self._board.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path; lists as text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return found


def _drop_rows_after(path: Path, step: int) -> None:
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _add_counts(board: SummaryWriter, name: str, counts: np.ndarray, step: int) -> None:
    total, bins = float(counts.sum()), np.arange(len(counts), dtype=np.float64)
    if total > 0:
        board.add_histogram_raw(
            name,
            min=0.0,
            max=float(len(counts)),
            num=total,
            sum=float((counts * bins).sum()),
            sum_squares=float((counts * bins**2).sum()),
            bucket_limits=(bins + 1.0).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
