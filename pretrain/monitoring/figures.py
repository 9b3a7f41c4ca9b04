"""Shows a Snapshot in TensorBoard: audio with silent masked parts, spectrogram with units, frames to project."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from tensorboard.plugins.projector import ProjectorConfig  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.core.text import table_cell, visible
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.interfaces.monitoring import HeadMedia
from pretrain.monitoring.snapshot import LabelledFrames, Snapshot
from pretrain.nn.spectral import LogMel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PROJECTED = 500
SQUARE = 8
"""Pixels of the square that shows a frame's colour in the projector."""
LEGEND = 12
"""Values in the legend of a picture of frames; others are grey."""


def add_snapshot(board: SummaryWriter, snapshot: Snapshot, step: int) -> None:
    """Adds audio and figure of the first utterance, and the embedding of all of them."""
    length = int(snapshot.batch.lengths_B[0])
    wave_T = snapshot.batch.wave_BT[0, :length].float()
    board.add_audio("audio/heard", wave_T[None].clamp(-1, 1), step, SAMPLE_RATE)
    board.add_audio("audio/masked_parts_silent", masked_audio(snapshot)[None].clamp(-1, 1), step, SAMPLE_RATE)
    board.add_figure("units/spectrogram", spectrogram(snapshot), step)
    frames_ND, header, metadata = projected(snapshot)
    if len(frames_ND) > 1:
        add_frames(board, frames_ND, rows=metadata, header=header, tag="frames", step=step)
        board.add_figure("frames/principal_axes", scatter(frames_ND, header, metadata), step)


def add_media(board: SummaryWriter, head: str, media: HeadMedia, step: int) -> None:
    """Adds what a head shows of one utterance, as media/HEAD/NAME."""
    from matplotlib.figure import Figure  # here: ranks without figures need not import it

    for name, wave_T in media.audio.items():
        board.add_audio(f"media/{head}/{name}", wave_T[None].clamp(-1, 1), step, SAMPLE_RATE)
    for name, image_YX in media.images.items():
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        axes.imshow(image_YX.numpy(), origin="lower", aspect="auto", interpolation="nearest")
        axes.set_xlabel("frame")
        board.add_figure(f"media/{head}/{name}", figure, step)


def add_frames(
    board: SummaryWriter, frames_ND: Tensor, rows: list[list[str]], header: list[str], tag: str, step: int
) -> None:
    """Adds (N, D) frames and a row of values for each to the projector; frames of earlier writers are kept.

    Values are escaped as cells of a TSV file, so names cannot add rows or columns.

    Args:
        board: TensorBoard's writer.
        frames_ND: (N, D) frames.
        rows: values of each frame.
        header: names of the values.
        tag: name in the projector.
        step: updates done.
    """
    config = Path(board.log_dir) / "projector_config.pbtxt"
    if config.is_file() and not hasattr(board, "_projector_config"):
        # each SummaryWriter starts an empty list of embeddings, which would drop the frames of earlier starts
        listed = text_format.Parse(config.read_text(encoding="utf-8"), ProjectorConfig())
        for embedding in [e for e in listed.embeddings if int(e.tensor_name.rpartition(":")[2]) >= step]:
            listed.embeddings.remove(embedding)
        board._projector_config = listed
    cells, names = [[table_cell(text) for text in row] for row in rows], [table_cell(name) for name in header]
    squares = colours([row[coloured_by(header, rows)] for row in rows])
    images_NCHW = torch.from_numpy(squares).float()[:, :, None, None].expand(-1, -1, SQUARE, SQUARE)
    board.add_embedding(frames_ND, cells, label_img=images_NCHW, tag=tag, global_step=step, metadata_header=names)


def coloured_by(header: list[str], rows: list[list[str]]) -> int:
    """Returns the column that frames are coloured by: the first label with several known values, or the unit.

    Without units, as for objectives that predict vectors, it is whether they were masked. Columns of no use for that
    (segment, second) are left out.
    """
    places = [number for number, name in enumerate(header) if name not in ("segment", "second", "utterance")]
    places.sort(key=lambda number: {"unit": 1, "masked": 2}.get(header[number], 0))  # labels first
    return next((number for number in places if len({row[number] for row in rows} - {""}) > 1), places[0])


def colours(values: list[str]) -> np.ndarray:
    """Returns an RGB colour in [0, 1] for each value, (N, 3); the most frequent values have the most distinct ones."""
    from matplotlib import colormaps

    order = [value for value, _ in Counter(values).most_common()]
    palette = np.asarray(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    return np.stack([palette[order.index(value) * 2 % 20 + order.index(value) // 10 % 2] for value in values])


def scatter(frames_ND: Tensor, header: list[str], rows: list[list[str]]) -> Figure:
    """Draws frames on their first two principal axes, coloured by a label, with a legend of its values."""
    from matplotlib.figure import Figure

    column = coloured_by(header, rows)
    values = [row[column] or "none" for row in rows]
    centred_ND = frames_ND.double() - frames_ND.double().mean(0)
    _, spread_R, axes_RD = torch.linalg.svd(centred_ND, full_matrices=False)
    plane_N2 = (centred_ND @ axes_RD[:2].T).numpy()
    shares = (spread_R.square() / spread_R.square().sum().clamp(min=1e-12)).tolist()
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    rgb_N3 = colours(values)
    common = [value for value, _ in Counter(values).most_common(LEGEND)]
    for value in common:
        chosen = np.array([other == value for other in values])
        label = f"{visible(value)} ({int(chosen.sum())})"
        axes.scatter(plane_N2[chosen, 0], plane_N2[chosen, -1], s=12, c=rgb_N3[chosen], label=label.replace("$", r"\$"))
    rest = np.array([value not in common for value in values])
    if rest.any():
        others = f"{len(set(values)) - LEGEND} other values"
        axes.scatter(
            plane_N2[rest, 0],
            plane_N2[rest, -1],
            s=8,
            c="lightgrey",
            label=others,
            zorder=0,
        )
    names = [f"principal axis {n + 1} ({share:.0%} of the variance)" for n, share in enumerate(shares[:2])]
    axes.set(xlabel=names[0], ylabel=names[-1])
    axes.set_title(f"{len(values)} frames of the last layer by {visible(header[column])}", parse_math=False)
    figure.legend(loc="outside right upper", title=visible(header[column]))
    return figure


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
    from matplotlib.figure import Figure

    length = int(snapshot.batch.lengths_B[0])
    mel_FD = LogMel(80)(snapshot.batch.wave_BT[:1, :length].float(), torch.tensor([length])).x_BFD[0]
    seconds, n_frames = length / SAMPLE_RATE, int(snapshot.frame_lengths_B[0])
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    image = top.imshow(mel_FD.T, origin="lower", aspect="auto", extent=(0, seconds, 0, 80), cmap="magma")
    title = visible(snapshot.batch.keys[0])
    top.set(ylabel="mel band (of 80)")
    rows = np.full((2, max(1, n_frames)), np.nan)
    masked_F = snapshot.mask_BF[0].numpy()[:n_frames]
    n_spans = 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], masked_F, [False]]).astype(int)))
    for first, last in edges.reshape(-1, 2) / snapshot.rate_hz:
        top.axvspan(first, last, facecolor="white", alpha=0.35, label="_" if n_spans else "masked")
        n_spans += 1
    n_masked = int(masked_F.sum())
    for row, units in enumerate((snapshot.predictions_N, snapshot.targets_N)):
        if units is not None and n_masked:
            rows[row, : len(masked_F)][masked_F] = units[:n_masked].numpy() * 61 % 97  # neighbours differ in colour
    both = snapshot.predictions_N, snapshot.targets_N
    if both[0] is not None and both[1] is not None and n_masked:
        hits = float((both[0][:n_masked] == both[1][:n_masked]).float().mean())
        title += f": {hits:.0%} of {n_masked} masked frames predicted correctly"
    top.set_title(title, parse_math=False)  # a $ in a name does not begin a formula
    if n_spans:
        top.legend(loc="upper right", facecolor="grey")
    figure.colorbar(image, ax=top, label="log energy", pad=0.01)
    if any(units is not None for units in (snapshot.predictions_N, snapshot.targets_N)):
        below.set_title("units of masked frames; equal colours are equal units", fontsize="small")
    else:
        below.set_title("this objective predicts vectors, no units", fontsize="small")
    below.imshow(rows, aspect="auto", cmap="nipy_spectral", vmin=0, vmax=96, interpolation="nearest",
                 extent=(0, n_frames / snapshot.rate_hz, 0, 2))  # fmt: skip
    below.set(xlabel="time, s", yticks=(0.5, 1.5), yticklabels=("target", "predicted"), xlim=(0, seconds))
    return figure


def projected(snapshot: Snapshot) -> tuple[Tensor, list[str], list[list[str]]]:
    """Returns up to MAX_PROJECTED frames of the last layer, (N, D), a header, and a row of values for each frame.

    The values are segment, time, whether it is masked, unit, and labels of the segment (`Batch.labels`: those of
    data.labels, speaker, language, corpus) and of the frame (data.targets). Frames of further micro-batches, whose
    masks and units are not known, are added where they can be coloured by a label.
    """
    batch = snapshot.batch
    first = LabelledFrames(
        batch.keys, batch.lengths_B, batch.labels, batch.targets, snapshot.frames_BFD, snapshot.frame_lengths_B
    )
    parts = [first, *snapshot.others]
    names = list(dict.fromkeys(name for part in parts for name in part.labels))
    sets = sorted(batch.targets)
    header = ["segment", "second", "masked", "unit", *names, *sets]
    position = torch.full(snapshot.frames_BFD.shape[:2], -1)
    if snapshot.targets_N is not None:
        position[snapshot.mask_BF] = snapshot.targets_N
    frames, metadata, of_first = [], [], 0
    every = max(1, sum(int(part.frame_lengths_B.sum()) for part in parts) // MAX_PROJECTED)
    for part in parts:
        for row, key in enumerate(part.keys):
            segment = [part.labels[name][row] if name in part.labels else "" for name in names]
            for frame in range(0, int(part.frame_lengths_B[row]), every):
                time = frame / snapshot.rate_hz
                known = ["", ""]
                if part is first:
                    known = ["yes" if snapshot.mask_BF[row, frame] else "no", str(int(position[row, frame]))]
                labels = [*segment, *(frame_label(part, name, row, time + 0.5 / snapshot.rate_hz) for name in sets)]
                frames.append(part.frames_BFD[row, frame])
                metadata.append([key, f"{time:.2f}", *known, *labels])
        of_first = of_first or len(frames)
    if header[coloured_by(header, metadata)] in ("masked", "unit"):
        frames, metadata = frames[:of_first], metadata[:of_first]
    return torch.stack(frames), header, metadata


def frame_label(part: LabelledFrames, name: str, row: int, second: float) -> str:
    """Returns the label of the set `name` at a time of a segment; a row's labels are evenly spaced in its audio."""
    labels_F = part.targets[name][row]
    count = int((labels_F >= 0).sum())
    place = int(second / (int(part.lengths_B[row]) / SAMPLE_RATE) * count)
    return str(int(labels_F[min(place, count - 1)])) if count else ""
