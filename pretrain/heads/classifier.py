"""Classes of whole segments: speaker, language or any other label, from pooled frames.

The frames' mean and deviation are pooled (x-vectors, Snyder et al. 2018) and projected to an embedding.
"""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError, about, config, refuse
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMonitoringRecord
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput
from pretrain.nn.numerics import full_precision


@config
class Config(HeadConfig):
    name: Literal["classifier"] = "classifier"
    label: Annotated[str, about("which label of a segment is its class", min_length=1)] = "speaker"
    classes: Annotated[tuple[str, ...], about("values of the label; segments with another one are left out")] = ()
    classes_file: Annotated[str, about("a text file with one class per line, instead of classes")] = ""
    loss: Annotated[
        Literal["aam", "softmax"], about("aam: additive angular margin; softmax: plain, for few classes")
    ] = "aam"
    margin: Annotated[float, about("aam: margin in radians", ge=0, lt=math.pi / 2)] = 0.2
    scale: Annotated[float, about("aam: factor of the cosines", gt=0)] = 30.0
    embedding_dim: Annotated[int, about("channels of a segment's embedding", ge=1)] = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes and self.classes_file:
            refuse("classes", list(self.classes), "list the classes either here or in classes_file, not in both")
        if self.classes:
            _require_classes(self.classes, "classes")

    @property
    def input_files(self) -> dict[str, str]:
        """The list of classes."""
        return {"classes_file": self.classes_file} if self.classes_file else {}

    @property
    def segment_labels(self) -> tuple[str, ...]:
        """The label that is the class."""
        return (self.label,)

    def all_classes(self) -> tuple[str, ...]:
        """Returns the classes, in the order of their numbers.

        Raises:
            ConfigError: there are none, or the file cannot be read.
            DamagedFileError: the file is no UTF-8 text.
            ValidationError: the file has fewer than two classes or one of them twice.
        """
        if self.classes:
            return self.classes
        if not self.classes_file:
            raise ConfigError(
                f"classes=[] of a head for {self.label!r}: list them there, or name a file in classes_file"
            )
        try:
            lines = Path(self.classes_file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DamagedFileError(
                f"classes_file={self.classes_file}: is no UTF-8 text ({error}); write it again"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"classes_file={self.classes_file}: cannot be read as text with one class per line: {error}"
            ) from None
        found = tuple(line.strip() for line in lines if line.strip())
        _require_classes(found, "classes_file")
        return found


def _require_classes(classes: tuple[str, ...], field: str) -> None:
    if len(set(classes)) < len(classes) or "" in classes:
        twice = next((name for name in classes if classes.count(name) > 1), "")
        refuse(field, twice, "each class must be named once, and none may be empty")
    if len(classes) < 2:
        refuse(field, list(classes), "a classifier needs at least 2 classes")


class Classifier(Head):
    """Predicts a label of the whole segment; segments without it, or with a value outside the classes, do not count.

    Loss per segment: cross-entropy of s·cos(θ + m) for its class and s·cos θ for all other classes, where θ is the
    angle between embedding and class weight (ArcFace, arXiv 1801.07698, eq. 3), or of a plain linear layer. Beyond
    θ = π − m, where cos(θ + m) would rise again, cos θ − m·sin m takes its place, as in the paper's code.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        self.ids = {name: number for number, name in enumerate(config.all_classes())}
        digest = hashlib.sha256("\n".join(self.ids).encode()).digest()
        self._sha256 = digest
        self.register_buffer("classes_sha256", torch.tensor(list(digest), dtype=torch.uint8))
        self.classes_sha256: Tensor
        self._compared = False
        self.project = nn.Linear(2 * shape.dim, config.embedding_dim)
        self.classes = nn.Linear(config.embedding_dim, len(self.ids), bias=config.loss == "softmax")

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        self._require_same_classes()
        known_B = torch.tensor([value in self.ids for value in batch.label_values(self.config.label)])
        rows_B = known_B & (model.frontend.frame_lengths(batch.lengths_B) > 0)
        return HeadPlan(rows_B.sum().double(), rows_B)

    def _require_same_classes(self) -> None:
        """Compares the classes with those of the checkpoint that was loaded, once."""
        if not self._compared and bytes(self.classes_sha256.tolist()) != self._sha256:
            source = f"classes_file={self.config.classes_file}" if self.config.classes_file else "classes"
            raise ConfigError(
                f"{source} of the head for {self.config.label!r}: its {len(self.ids)} classes are not those that the "
                "checkpoint was trained with, in their order; restore them, or start a new run"
            )
        self._compared = True

    def logits(self, encoded: EncoderOutput) -> Tensor:
        """Returns the scores of each segment's classes, (B, C) fp32: cosines (aam), or logits (softmax)."""
        pooled_BP = statistics_pooling(self.frames(encoded))
        embedding_BE: Tensor = self.project(pooled_BP)
        with full_precision(embedding_BE.device):
            embedding_BE = embedding_BE.float()
            if self.config.loss == "softmax":
                scores: Tensor = self.classes(embedding_BE)
                return scores
            return F.linear(F.normalize(embedding_BE), F.normalize(self.classes.weight))

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        scores_BC = self.logits(encoded)
        device, values = scores_BC.device, batch.label_values(self.config.label)
        rows_B = plan.rows_B.to(device)
        targets_B = torch.tensor([self.ids.get(value, 0) for value in values], device=device)
        with full_precision(device):
            logits_BC = scores_BC
            if self.config.loss == "aam":
                logits_BC = with_margin(scores_BC, targets_B, self.config.margin) * self.config.scale
            losses_B = F.cross_entropy(logits_BC, targets_B, reduction="none")
        count = rows_B.sum()
        hits = ((scores_BC.argmax(1) == targets_B) & rows_B).sum()
        one = functools.partial(torch.tensor, dtype=torch.float64, device=device)
        labelled = sum(map(bool, values))
        unknown = sum(bool(value) and value not in self.ids for value in values)
        metrics = {
            "accuracy": (hits, count),
            INFEASIBLE: (one(labelled) - count, one(labelled)),
            "unknown_classes": (one(unknown), one(labelled)),
        }
        return LossOutput(losses_B.masked_fill(~rows_B, 0.0).sum(), count, metrics)


def statistics_pooling(frames: Frames) -> Tensor:
    """Returns mean and deviation over the valid frames of each row, (B, 2·D) fp32."""
    valid_BF1 = frames.valid_BF()[:, :, None]
    count_B1 = frames.lengths_B.to(frames.x_BFD.device, non_blocking=True).clamp(min=1)[:, None]
    x_BFD = frames.x_BFD.float().masked_fill(~valid_BF1, 0.0)
    mean_BD = x_BFD.sum(1) / count_B1
    variance_BD = (x_BFD - mean_BD[:, None]).masked_fill(~valid_BF1, 0.0).square().sum(1) / count_B1
    return torch.cat([mean_BD, variance_BD.clamp(min=1e-6).sqrt()], dim=1)


def with_margin(cosines_BC: Tensor, targets_B: Tensor, margin: float) -> Tensor:
    """Returns the cosines (B, C) with that of each row's target moved by `margin` radians."""
    cosine_B1 = cosines_BC.gather(1, targets_B[:, None])
    sine_B1 = (1 - cosine_B1.square()).clamp(min=1e-7).sqrt()
    moved_B1 = cosine_B1 * math.cos(margin) - sine_B1 * math.sin(margin)
    moved_B1 = torch.where(cosine_B1 > -math.cos(margin), moved_B1, cosine_B1 - margin * math.sin(margin))
    return cosines_BC.scatter(1, targets_B[:, None], moved_B1)


def build(config: Config, shape: ModelShape) -> Classifier:
    return Classifier(config, shape)
