"""Writes every logged number to metrics.jsonl and TensorBoard.

Prefixes of names: loss/ metric/ valid/ health/ opt/ perf/ data/ federated/ meta/ hist/.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data_pipeline.core.text import markdown_block
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.objectives import Head
from pretrain.monitoring.append_log import AppendLog, drop_rows_after
from pretrain.monitoring.board import Board, add_counts
from pretrain.monitoring.config_pages import compared_fields, config_page
from pretrain.monitoring.figures import add_media, add_snapshot
from pretrain.monitoring.snapshot import SnapshotHook
from pretrain.profiling import mfu
from pretrain.train_module import TrainModule

MAX_TEXT = 50_000
"""Characters of the git diff that are shown; all of it is in RUN/git.diff."""
MEDIA_APART = 10
"""Least steps between media where train.media_every is null."""
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "learning": {
        "losses": ["Multiline", ["loss/.*"]],
        "training and held-out loss": ["Multiline", ["loss/total", "valid/loss/total"]],
        "accuracy": ["Multiline", ["metric/accuracy.*"]],
        "codes in use": ["Multiline", ["metric/perplexity.*", "metric/soft_perplexity"]],
        "quality (filled by: auricle evaluate checkpoint=RUN follow=true)": ["Multiline", ["evaluate/.*"]],
    },
    "tasks": {
        "loss of each task": ["Multiline", ["loss/(?!total).*"]],
        "share of each task in the gradient": ["Multiline", ["balance/share/.*"]],
        "factor of each loss": ["Multiline", ["balance/factor/.*"]],
        "accuracy of heads": ["Multiline", ["metric/.+/accuracy"]],
        "improvement by separation, dB": ["Multiline", [".*metric/.+/si_snr_improvement"]],
        "segments with a usable label": ["Multiline", ["data/usable_segments/.*"]],
        "share of labels that cannot be used": [
            "Multiline",
            ["metric/.+/(infeasible|foreign_symbols|unknown_classes)"],
        ],
    },
    "health": {
        "deviation of each stage": ["Multiline", ["health/std/.*"]],
        "RankMe of each layer": ["Multiline", ["health/rank/.*"]],
        "gradient norm": ["Multiline", ["opt/grad_norm"]],
        "alarms and skipped updates": ["Multiline", ["health/alarms", "health/skipped"]],
    },
    "devices of a federated run": {
        "asked, answered, left out": ["Multiline", ["federated/(asked|devices|left_out)"]],
        "bytes of a round": ["Multiline", ["federated/bytes_.*"]],
        "seconds of a round": ["Multiline", ["federated/round_seconds"]],
        "ε spent": ["Multiline", ["federated/epsilon"]],
    },
    "adaptation to episodes": {
        "loss of the support": ["Multiline", ["meta/support_loss_.*"]],
        "loss of the queries": ["Multiline", ["meta/query_loss_.*"]],
        "rate of inner steps": ["Multiline", ["meta/inner_rate"]],
    },
    "speed": {
        "× real time": ["Multiline", ["perf/audio_seconds_per_second"]],
        "waiting and padding": ["Multiline", ["perf/data_wait_share", "data/padding_share"]],
        "model FLOP utilisation": ["Multiline", ["perf/mfu"]],
        "memory, GiB": ["Multiline", ["perf/memory_gib"]],
    },
}
"""Groups of curves on the custom-scalars page."""


class MetricsWriter:
    """Writes one row per logged step; on a resume, rows of steps that will be repeated are removed first.

    Write errors never end training. Raises StaleIncarnationError if a newer start of the run exists, before anything is
    removed or written.

    Args:
        run: the run folder.
        config: config of the run.
        module: its objective and heads name their metrics.
        resumed_at: updates done when this start began; rows of later ones are removed.
        world: number of ranks and device, for the utilisation; None: one rank on a CPU.
        say: prints warnings.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        module: TrainModule,
        resumed_at: int,
        world: DistributedContext | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._run, self._config, self._say = run, config, say
        world = world or DistributedContext()
        self._utilisation = mfu.measure(config, world.device, world.size)
        every = config.train.media_every
        self._media_every = max(MEDIA_APART, config.train.steps // 10) if every is None else every
        self._media_at_first = every is None
        self._snapshot = SnapshotHook(module.objective) if self._media_every else None
        heads = module.heads.items() if self._media_every else ()
        self._heads = {name: head for name, head in heads if isinstance(head, Head)}
        self._rows = AppendLog(run, run.metrics, say)
        self._histograms_due = True
        self._open(resumed_at)

    def _open(self, resumed_at: int) -> None:
        self._run.require_current()
        try:
            self._run.path.mkdir(parents=True, exist_ok=True)
            drop_rows_after(self._run.metrics, resumed_at)
        except OSError as error:
            self._say(f"warning: rows after step {resumed_at} stay in {self._run.metrics} ({error})")
        self._board = Board(self._run.tensorboard, resumed_at + 1, self._say)
        page = config_page(self._config)
        self._board.write(lambda board: board.add_text("config", page, resumed_at))
        diff = self._run.path / "git.diff"
        if diff.is_file() and (text := diff.read_text(encoding="utf-8", errors="replace")):
            changes = markdown_block(text[:MAX_TEXT], "diff")
            self._board.write(lambda board: board.add_text("git_diff", changes, resumed_at))
        compared = {"loss/total": None, "metric/accuracy": None, "valid/loss/total": None}
        chosen = compared_fields(self._config, self._run.path)
        summaries = list(hparams(chosen, compared))  # type: ignore[no-untyped-call]
        for summary in summaries:
            self._board.write(lambda board, s=summary: board._get_file_writer().add_summary(s))  # type: ignore[misc]
        self._board.write(lambda board: board.add_custom_scalars(LAYOUT))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def expect(self, step: int) -> None:
        """Requests a snapshot of update number `step`, the next, if one is due (`train.media_every`)."""
        if self._snapshot is None:
            return
        is_first = self._media_at_first and step == self._config.train.log_every
        if is_first or self._is_due(step, self._media_every):
            self._snapshot.arm()
            self._arm_heads()

    def expect_held_out(self) -> None:
        """Requests what heads show of held-out audio, from the measurement that follows."""
        if self._media_every:
            self._arm_heads()

    def _arm_heads(self) -> None:
        for head in self._heads.values():
            head.record_next()

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Writes the scalars of one step, and to TensorBoard also counts per code and snapshots, when due.

        Raises:
            StaleIncarnationError: when a newer start of the run exists.
        """
        if self._utilisation is not None:
            share = self._utilisation.share(scalars["perf/audio_seconds_per_second"])
            scalars = {**scalars, "perf/mfu": share}
        self._rows.append({"step": step, "time": round(time.time(), 3), **scalars})

        def add_scalars(board: SummaryWriter) -> None:
            for name, value in scalars.items():
                board.add_scalar(name, value, step)

        def add_histograms(board: SummaryWriter) -> None:
            for name, counts in histograms.items():
                add_counts(board, name, counts, step)

        self._board.write(add_scalars)
        every = self._config.train.histograms_every
        if every and (self._histograms_due or self._is_due(step, every)):
            self._board.write(add_histograms)
            self._histograms_due = False
        if self._snapshot is not None and (snapshot := self._snapshot.take()):
            self._board.write(lambda board: add_snapshot(board, snapshot, step))
        for name, head in self._heads.items():
            if media := head.take_media():
                self._board.write(lambda board, n=name, m=media: add_media(board, n, m, step))  # type: ignore[misc]

    def _is_due(self, step: int, every: int) -> bool:
        """Returns whether `step` is the first logged step of its interval."""
        log_every = self._config.train.log_every
        return step % log_every == 0 and step % every < log_every

    def go_back(self, resumed_at: int) -> None:
        """Removes rows after step `resumed_at`, to which the run has rolled back."""
        self.close()
        self._open(resumed_at)

    def close(self) -> None:
        """Flushes and closes all files."""
        self._board.close()
