"""Classes of an episode: a classifier that starts from the means of the support (Triantafillou et al. 2020, §3).

The nearest mean p is the linear classifier with weights 2·p and biases −|p|² (Snell et al. 2017, arXiv 1703.05175,
eq. 8); the steps of an episode go on from it. Episodes have a learned projection of the channels in common, which
starts as the identity, so that learning starts from prototypes of the features as they are. It is the same for all
quarters of an utterance: one of all their channels together fits the words of training and little else
(docs/findings.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config
from data_pipeline.core.types import WAY, Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMonitoringRecord
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput
from pretrain.nn.numerics import full_precision
from pretrain.self_supervision.deferred_fit import FittedOnce

QUARTERS = 4


@config
class Config(HeadConfig):
    name: Literal["episode"] = "episode"
    ways: Annotated[int, about("classes of an episode, as data.episodes.ways", ge=2)] = 5
    pool: Annotated[
        Literal["quarters", "mean"],
        about("quarters: the means of an utterance's four quarters, as for words; mean: that of all its frames"),
    ] = "quarters"


class EpisodeClassifier(Head):
    """Predicts the way of each row, its class in the episode; rows without one do not count.

    Pooled frames, P = quarters · D channels, are standardised by the first update's mean and deviation, projected in
    each quarter, divided by the root of P, so that rates of inner steps do not depend on it, and classified.
    """

    starts_from_support = True

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        dim = shape.dim * (QUARTERS if config.pool == "quarters" else 1)
        self.fit = FittedOnce()
        self.register_buffer("mean_P", torch.zeros(dim))
        self.register_buffer("deviation_P", torch.ones(dim))
        self.mean_P: Tensor
        self.deviation_P: Tensor
        self.project = nn.Linear(shape.dim, shape.dim)
        self.classes = nn.Linear(dim, config.ways)
        with torch.no_grad():
            self.project.weight.copy_(torch.eye(shape.dim))
            self.project.bias.zero_()

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        known_B = torch.tensor([0 <= way < self.config.ways for way in _ways(batch)])
        rows_B = known_B & (model.frontend.frame_lengths(batch.lengths_B) > 0)
        return HeadPlan(rows_B.sum().double(), rows_B)

    def forget(self) -> None:
        self.fit.forget()

    def after_step(self, ctx: StepContext) -> None:
        """Fits mean and deviation to the rows of the first update."""
        rows_NP = self.fit.take()
        if rows_NP is not None:
            self.mean_P.copy_(rows_NP.mean(0))
            self.deviation_P.copy_(rows_NP.std(0).clamp(min=1e-5))

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def pooled(self, encoded: EncoderOutput) -> Tensor:
        """Returns the pooled frames of each row, (B, P) fp32, neither standardised nor projected."""
        frames = self.frames(encoded)
        return pooled(frames, QUARTERS if self.config.pool == "quarters" else 1)

    def standardise(self, pooled_BP: Tensor) -> Tensor:
        """Returns pooled frames minus the mean of the first update, divided by its deviation, (B, P)."""
        return (pooled_BP - self.mean_P) / self.deviation_P

    def embed(self, standardised_BP: Tensor) -> Tensor:
        """Returns what is classified, (B, P), of standardised rows."""
        rows, dim = standardised_BP.shape
        projected_BQD: Tensor = self.project(standardised_BP.view(rows, -1, self.project.in_features))
        return projected_BQD.flatten(1) / math.sqrt(dim)

    def first_weights(self, encoded: EncoderOutput, batch: Batch) -> Mapping[str, Tensor]:
        """Returns weights and biases of the classes: the nearest mean of the support."""
        with full_precision(self.mean_P.device):
            embedded_BP = self.embed(self.standardise(self.pooled(encoded)))
            weight_WP, bias_W = prototypes(embedded_BP, torch.tensor(_ways(batch)), self.config.ways)
        return {"classes.weight": weight_WP, "classes.bias": bias_W}

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        pooled_BP = self.pooled(encoded)
        device = pooled_BP.device
        rows_B = plan.rows_B.to(device)
        if self.fit.due and not batch.is_empty:
            self.fit.rows[batch.micro_batch] = pooled_BP.detach()[rows_B]
        with full_precision(device):
            logits_BW = self.classes(self.embed(self.standardise(pooled_BP)))
            targets_B = torch.tensor(_ways(batch), device=device).clamp(0, self.config.ways - 1)
            losses_B = F.cross_entropy(logits_BW, targets_B, reduction="none")
        hits = ((logits_BW.argmax(1) == targets_B) & rows_B).sum()
        count = rows_B.sum()
        labelled = torch.tensor(float(sum(map(bool, batch.label_values(WAY)))), dtype=torch.float64, device=device)
        metrics = {"accuracy": (hits, count), INFEASIBLE: (labelled - count, labelled)}
        return LossOutput(losses_B.masked_fill(~rows_B, 0.0).sum(), count, metrics)


def _ways(batch: Batch) -> list[int]:
    """Returns the class of each row, -1 where there is none."""
    return [int(value) if value.isdecimal() else -1 for value in batch.label_values(WAY)]


def prototypes(x_BP: Tensor, ways_B: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Returns weights (W, P) and biases (W,) of the classifier of the nearest mean; zeros for a class without rows.

    Args:
        x_BP: vectors.
        ways_B: class of each, 0 … W − 1; others are left out.
        ways: number of classes, W.
    """
    member_WB = (ways_B[None] == torch.arange(ways)[:, None]).to(x_BP)
    means_WP = member_WB @ x_BP / member_WB.sum(1, keepdim=True).clamp(min=1.0)
    return 2 * means_WP, -means_WP.square().sum(1)


def pooled(frames: Frames, parts: int) -> Tensor:
    """Returns the means of `parts` equal parts of each row's valid frames, one after another, (B, parts · D) fp32.

    A row with fewer frames than parts repeats each of them, so that its parts are equal, too.
    """
    n_frames = frames.x_BFD.shape[1]
    shares = torch.stack([_shares(length, parts, n_frames) for length in frames.lengths_B.tolist()])
    x_BFD = frames.x_BFD.float().masked_fill(~frames.valid_BF()[:, :, None], 0.0)
    return torch.einsum("bpf,bfd->bpd", shares.to(x_BFD.device), x_BFD).flatten(1)


@functools.lru_cache(maxsize=4096)
def _shares(length: int, parts: int, n_frames: int) -> Tensor:
    """Returns the weight of each frame in each part, (parts, F), as `tensor_split` divides frames."""
    shares_PF = torch.zeros(parts, n_frames)
    repeats = parts if length < parts else 1
    for part, places in enumerate(torch.arange(length * repeats).tensor_split(parts)):
        for place in places.tolist():
            shares_PF[part, place // repeats] += 1 / len(places)
    return shares_PF


def build(config: Config, shape: ModelShape) -> EpisodeClassifier:
    return EpisodeClassifier(config, shape)
