"""Shows a Snapshot in TensorBoard: audio with silent masked parts, spectrogram with units, frames to project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from tensorboard.plugins.projector import ProjectorConfig  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.core.text import table_cell, visible
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.monitoring.snapshot import Snapshot
from pretrain.nn.spectral import LogMel

MAX_PROJECTED = 500


def add_snapshot(board: SummaryWriter, snapshot: Snapshot, step: int) -> None:
    """Adds audio and figure of the first utterance, and the embedding of all of them."""
    length = int(snapshot.batch.lengths_B[0])
    wave_T = snapshot.batch.wave_BT[0, :length].float()
    board.add_audio("audio/heard", wave_T[None].clamp(-1, 1), step, SAMPLE_RATE)
    board.add_audio("audio/masked_parts_silent", masked_audio(snapshot)[None].clamp(-1, 1), step, SAMPLE_RATE)
    board.add_figure("units/spectrogram", spectrogram(snapshot), step)
    frames_ND, header, metadata = projected(snapshot)
    if len(frames_ND) > 1:
        add_frames(board, frames_ND, metadata, header, "frames", step)


def add_frames(
    board: SummaryWriter, frames_ND: Tensor, rows: list[list[str]], header: list[str], tag: str, step: int
) -> None:
    """Adds (N, D) frames and a row of values for each to the projector; frames of earlier writers are kept.

    Values are escaped as cells of a TSV file, so names cannot add rows or columns.
    """
    config = Path(board.log_dir) / "projector_config.pbtxt"
    if config.is_file() and not hasattr(board, "_projector_config"):
        # each SummaryWriter starts an empty list of embeddings, which would drop the frames of earlier starts
        listed = text_format.Parse(config.read_text(encoding="utf-8"), ProjectorConfig())
        for embedding in [e for e in listed.embeddings if int(e.tensor_name.rpartition(":")[2]) >= step]:
            listed.embeddings.remove(embedding)
        board._projector_config = listed
    cells, names = [[table_cell(text) for text in row] for row in rows], [table_cell(name) for name in header]
    board.add_embedding(frames_ND, cells, tag=tag, global_step=step, metadata_header=names)


def masked_audio(snapshot: Snapshot) -> Tensor:
    """Returns the first utterance with its masked frames silenced, (T,)."""
    wave_T = snapshot.batch.wave_BT[0, : int(snapshot.batch.lengths_B[0])].float()
    hop = round(SAMPLE_RATE / snapshot.rate_hz)
    masked_T = snapshot.mask_BF[0].repeat_interleave(hop)[: len(wave_T)]
    kept_T = torch.ones(len(wave_T))
    kept_T[: len(masked_T)] -= masked_T.float()
    return wave_T * kept_T


def spectrogram(snapshot: Snapshot) -> Figure:
    """Draws the log-mel of the first utterance, and target and predicted unit of each masked frame in its colour."""
    length = int(snapshot.batch.lengths_B[0])
    mel_FD = LogMel(80)(snapshot.batch.wave_BT[:1, :length].float(), torch.tensor([length])).x_BFD[0]
    seconds, n_frames = length / SAMPLE_RATE, int(snapshot.frame_lengths_B[0])
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    top.imshow(mel_FD.T, origin="lower", aspect="auto", extent=(0, seconds, 0, 80), cmap="magma")
    title = visible(snapshot.batch.keys[0])
    top.set(ylabel="mel band")
    rows = np.full((2, max(1, n_frames)), np.nan)
    masked_F = snapshot.mask_BF[0].numpy()[:n_frames]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], masked_F, [False]]).astype(int)))
    for first, last in edges.reshape(-1, 2) / snapshot.rate_hz:
        top.axvspan(first, last, facecolor="white", alpha=0.35)
    n_masked = int(masked_F.sum())
    for row, units in enumerate((snapshot.predictions_N, snapshot.targets_N)):
        if units is not None and n_masked:
            rows[row, : len(masked_F)][masked_F] = units[:n_masked].numpy() * 61 % 97  # neighbours differ in colour
    both = snapshot.predictions_N, snapshot.targets_N
    if both[0] is not None and both[1] is not None and n_masked:
        hits = float((both[0][:n_masked] == both[1][:n_masked]).float().mean())
        title += f": {hits:.0%} of {n_masked} masked frames predicted correctly"
    top.set_title(title, parse_math=False)  # a $ in a name does not start a formula
    below.imshow(rows, aspect="auto", cmap="nipy_spectral", vmin=0, vmax=96, interpolation="nearest",
                 extent=(0, n_frames / snapshot.rate_hz, 0, 2))  # fmt: skip
    below.set(xlabel="seconds", yticks=(0.5, 1.5), yticklabels=("target", "predicted"), xlim=(0, seconds))
    return figure


def projected(snapshot: Snapshot) -> tuple[Tensor, list[str], list[list[str]]]:
    """Returns up to MAX_PROJECTED frames of the last layer, (N, D), a header, and a row of values for each frame.

    The values are segment, time, whether it is masked, unit, and labels of the segment (data.labels: speaker, language
    …) and of the frame (data.targets).
    """
    names, sets = sorted(snapshot.batch.labels), sorted(snapshot.batch.targets)
    header = ["segment", "second", "masked", "unit", *names, *sets]
    position = torch.full(snapshot.frames_BFD.shape[:2], -1)
    if snapshot.targets_N is not None:
        position[snapshot.mask_BF] = snapshot.targets_N
    frames, metadata = [], []
    every = max(1, int(snapshot.frame_lengths_B.sum()) // MAX_PROJECTED)
    for row, key in enumerate(snapshot.batch.keys):
        for frame in range(0, int(snapshot.frame_lengths_B[row]), every):
            masked = bool(snapshot.mask_BF[row, frame])
            frames.append(snapshot.frames_BFD[row, frame])
            labels = [snapshot.batch.labels[name][row] for name in names]
            labels += [frame_label(snapshot, name, row, frame) for name in sets]
            time = f"{frame / snapshot.rate_hz:.2f}"
            metadata.append([key, time, "yes" if masked else "no", str(int(position[row, frame])), *labels])
    return torch.stack(frames), header, metadata


def frame_label(snapshot: Snapshot, name: str, row: int, frame: int) -> str:
    """Returns the label of the set `name` at the centre of a frame; a row's labels are evenly spaced in its audio."""
    labels_F = snapshot.batch.targets[name][row]
    count = int((labels_F >= 0).sum())
    seconds = int(snapshot.batch.lengths_B[row]) / SAMPLE_RATE
    place = int((frame + 0.5) / snapshot.rate_hz / seconds * count)
    return str(int(labels_F[min(place, count - 1)])) if count else ""
