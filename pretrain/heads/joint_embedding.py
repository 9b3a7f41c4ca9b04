"""One space for speech, texts and images: towers whose unit vectors are near for what belongs together.

The speech tower is the run's own encoder. Every other tower is an embedding of tokens or patches and an encoder. Losses
are those of SigLIP (arXiv 2303.15343) or CLIP (arXiv 2103.00020). Where only some pairs of kinds are trained, the other
ones emerge (ImageBind, arXiv 2305.05665).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import Batch
from pretrain import registry
from pretrain.interfaces.configs import EmbeddingConfig, EncoderConfig, HeadConfig
from pretrain.interfaces.frames import EncoderOutput, Frames, StepContext
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMonitoringRecord
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput, Sum
from pretrain.nn.numerics import full_precision
from pretrain.nn.pair_losses import sigmoid_loss, softmax_loss

SPEECH = "speech"
LARGEST_SCALE = 100.0
"""Largest factor of the cosines, as in CLIP."""


@config
class TowerConfig:
    """A tower for something other than speech."""

    embedding: Annotated[EmbeddingConfig, registry.choice("embeddings")]
    encoder: Annotated[EncoderConfig | None, registry.choice("encoders", optional=True)] = None
    """None: the frames of the embedding are pooled without an encoder."""


@config
class Config(HeadConfig):
    name: Literal["joint_embedding"] = "joint_embedding"
    towers: Annotated[dict[str, TowerConfig], about("towers beside speech, by name, such as text and image")]
    pairs: Annotated[
        tuple[str, ...], about("pairs of kinds to train, such as [speech-text, text-image]; empty: all of them")
    ] = ()
    loss: Annotated[Literal["sigmoid", "softmax"], about("sigmoid of each pair (SigLIP), or softmax (CLIP)")] = (
        "sigmoid"
    )
    embedding_dim: Annotated[int, about("channels of the common space", ge=1)] = 256
    queue: Annotated[
        int, about("embeddings of earlier updates that every micro-batch is also compared with", ge=0, le=1_000_000)
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.towers:
            refuse("towers", {}, "needs a tower beside speech, such as towers.text.embedding.name=tokens")
        for name in self.towers:
            if not name.isidentifier() or name == SPEECH:
                refuse("towers", name, "the name of a tower is a word of letters, digits and _, other than speech")
        for pair in self.pairs:
            kinds = pair.split("-")
            if len(kinds) != 2 or kinds[0] == kinds[1] or not set(kinds) <= set(self.kinds):
                refuse("pairs", pair, f"must be two of {', '.join(self.kinds)} with a - between them")
        if len({frozenset(pair.split("-")) for pair in self.pairs}) < len(self.pairs):
            refuse("pairs", list(self.pairs), "must be different pairs")
        unused = set(self.kinds) - {kind for pair in self.all_pairs for kind in pair}
        if unused:
            refuse("pairs", list(self.pairs), f"{min(unused)} is in none of them and would not learn")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Speech and the towers, in the order of their vectors."""
        return (SPEECH, *sorted(self.towers))

    @property
    def all_pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of kinds that are trained."""
        if not self.pairs:
            return tuple(itertools.combinations(self.kinds, 2))
        return tuple((one, other) for one, other in (pair.split("-") for pair in self.pairs))

    @property
    def needed_tokens(self) -> dict[str, int]:
        """The token sets of the towers."""
        return {name: size for tower in self.towers.values() for name, size in tower.embedding.needed_tokens.items()}

    @property
    def image_shapes(self) -> tuple[tuple[int, int], ...]:
        """The images of the towers."""
        return tuple(tower.embedding.image_shape for tower in self.towers.values() if any(tower.embedding.image_shape))


class Pool(nn.Module):
    """Pools frames: mean over the valid ones, a linear layer, normalisation to length 1."""

    def __init__(self, dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, embedding_dim)

    def forward(self, frames: Frames) -> Tensor:
        """Returns (B, E) unit vectors of (B, F, D) frames, fp32."""
        x_BFD = frames.x_BFD.masked_fill(~frames.valid_BF()[:, :, None], 0.0)
        mean_BD = x_BFD.sum(1, dtype=torch.float32) / frames.lengths_B.clamp(min=1).to(x_BFD.device)[:, None]
        vectors_BE: Tensor = self.project(mean_BD)
        with full_precision(vectors_BE.device):
            return F.normalize(vectors_BE.float(), dim=1, eps=1e-6)


class Tower(nn.Module):
    """Embedding, encoder and pooling of one kind."""

    def __init__(self, config: TowerConfig, embedding_dim: int) -> None:
        super().__init__()
        encoder = config.encoder
        self.embedding = registry.build_embedding(config.embedding, encoder.dim if encoder else 0)
        self.encoder = registry.build_encoder(encoder) if encoder else None
        self.pool = Pool(self.embedding.dim, embedding_dim)

    def forward(self, batch: Batch, ctx: StepContext | None = None) -> Tensor:
        """Returns the unit vector of each sample, (B, E) fp32; arbitrary for samples without the tower's kind."""
        frames: Frames = self.embedding(batch)
        if self.encoder is not None:
            frames = self.encoder(frames, ctx).final
        vectors_BE: Tensor = self.pool(frames)
        return vectors_BE


class Vectors(NamedTuple):
    """Unit vectors of samples.  vectors_NKE: by kind.  present_NK: bool.

    numbers_NI: int64, of the recording and of each tower's input; samples with an equal number in a column, other than
    0, belong together.
    """

    vectors_NKE: Tensor
    present_NK: Tensor
    numbers_NI: Tensor


class Cosines(NamedTuple):
    """Cosines of two kinds x and y: within the micro-batch, and of each kind with the queue of the other."""

    here_BB: Tensor
    past_xy_BN: Tensor
    past_yx_BN: Tensor


class JointEmbedding(Head):
    """Compares every two samples of a micro-batch, for each pair of kinds that both have.

    Count: samples with both kinds of a pair. Positives are the kinds of one sample, and of samples with equal texts or
    equal images. The loss therefore depends on the micro-batch, which the plan fixes, and not on ranks.
    """

    couples = frozenset({"batch"})

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config, self.kinds, self.gathers = config, config.kinds, config.queue > 0
        self.pairs = [(self.kinds.index(one), self.kinds.index(other)) for one, other in config.all_pairs]
        self.speech = Pool(shape.dim, config.embedding_dim)
        self.towers = nn.ModuleDict({name: Tower(config.towers[name], config.embedding_dim) for name in self.kinds[1:]})
        sigmoid = config.loss == "sigmoid"
        self.log_scale_P = nn.Parameter(torch.full((len(self.pairs),), math.log(10.0 if sigmoid else 1 / 0.07)))
        self.bias_P = nn.Parameter(torch.full((len(self.pairs),), -10.0)) if sigmoid else None
        size = (config.queue, len(self.kinds))
        self.register_buffer("queue_NKE", torch.zeros(*size, config.embedding_dim))
        self.register_buffer("queue_present_NK", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("queue_numbers_NI", torch.zeros(size, dtype=torch.int64))
        self.queue_NKE: Tensor
        self.queue_present_NK: Tensor
        self.queue_numbers_NI: Tensor
        self._pending: list[tuple[int, Vectors]] = []

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        present_BK = self.present(batch, model.frontend.frame_lengths(batch.lengths_B))
        both_PB = torch.stack([present_BK[:, one] & present_BK[:, other] for one, other in self.pairs])
        return HeadPlan(both_PB.sum().double(), both_PB.any(0))

    def present(self, batch: Batch, frames_B: Tensor) -> Tensor:
        """Returns which kinds each sample has, (B, K) bool on the host. frames_B: encoder frames of its audio."""
        towers = [tower.embedding.present(batch) for tower in self._towers()]
        return torch.stack([frames_B > 0, *towers], dim=1)

    def embed_speech(self, encoded: EncoderOutput) -> Tensor:
        """Returns the unit vectors of audio, (B, E) fp32, from the encoder's output."""
        vectors_BE: Tensor = self.speech(self.frames(encoded))
        return vectors_BE

    def embed(self, kind: str, batch: Batch) -> Tensor:
        """Returns the unit vectors of another kind, (B, E) fp32; arbitrary for samples that lack it."""
        vectors_BE: Tensor = self.towers[kind](batch)
        return vectors_BE

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        vectors = [self.embed_speech(encoded), *(tower(batch, ctx) for tower in self._towers())]
        device, present_BK = vectors[0].device, self.present(batch, encoded.lengths_B)
        known = (part.to(device, non_blocking=True) for part in (present_BK, self._numbers(batch)))
        here = Vectors(torch.stack(vectors, 1), *known)
        past = Vectors(self.queue_NKE, self.queue_present_NK.bool(), self.queue_numbers_NI)
        if self.config.queue and self.training and not batch.is_empty:
            self._pending.append((batch.micro_batch, here._replace(vectors_NKE=here.vectors_NKE.detach())))
        own_BB = torch.eye(len(batch.keys), dtype=torch.bool, device=here.present_NK.device)
        together_BB, together_BN = _together(here, here) | own_BB, _together(here, past)
        total, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        given_B = torch.stack([tower.embedding.given(batch) for tower in self._towers()]).any(0)
        alone_B = given_B & ~plan.rows_B.cpu()
        metrics: dict[str, Sum] = {INFEASIBLE: (alone_B.sum(), given_B.sum())}
        with full_precision(device):
            for number, (one, other) in enumerate(self.pairs):
                both_B = here.present_NK[:, one] & here.present_NK[:, other]
                both_N = past.present_NK[:, one] & past.present_NK[:, other]
                x_BE, y_BE = here.vectors_NKE[:, one], here.vectors_NKE[:, other]
                cosines = Cosines(x_BE @ y_BE.T, x_BE @ past.vectors_NKE[:, other].T, y_BE @ past.vectors_NKE[:, one].T)
                valid = (both_B[:, None] & both_B, both_B[:, None] & both_N)
                total = total + self._loss(number, cosines, (together_BB, together_BN), valid)
                count = count + both_B.sum()
                hits = _hits(cosines.here_BB, together_BB, both_B) + _hits(cosines.here_BB.T, together_BB, both_B)
                metrics[f"{self.kinds[one]}_{self.kinds[other]}_recall"] = (hits, 2 * both_B.sum())
        return LossOutput(total, count, metrics)

    def _loss(
        self, number: int, cosines: Cosines, together: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Returns the loss of a pair of kinds. together, valid: (B, B) of the micro-batch and (B, N) of the past."""
        scale = self.log_scale_P[number].exp()
        if self.bias_P is not None:
            logits = Cosines(*(scale * part + self.bias_P[number] for part in cosines))
            return (
                sigmoid_loss(logits.here_BB, together[0], valid[0])
                + sigmoid_loss(logits.past_xy_BN, together[1], valid[1])
                + sigmoid_loss(logits.past_yx_BN, together[1], valid[1])
            )
        logits = Cosines(*(scale.clamp(max=LARGEST_SCALE) * part for part in cosines))
        joined, usable = torch.cat(together, 1), torch.cat(valid, 1)
        to_y = softmax_loss(torch.cat([logits.here_BB, logits.past_xy_BN], 1), joined, usable)
        to_x = softmax_loss(torch.cat([logits.here_BB.T, logits.past_yx_BN], 1), joined, usable)
        return (to_y + to_x) / 2

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def forget(self) -> None:
        self._pending = []

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Appends the embeddings of this update to the queue, in the order of micro-batches."""
        if not self.config.queue:
            return
        new = gathered(self._pending, Vectors(self.queue_NKE, self.queue_present_NK.bool(), self.queue_numbers_NI))
        for buffer, found in zip((self.queue_NKE, self.queue_present_NK, self.queue_numbers_NI), new, strict=True):
            buffer.copy_(torch.cat([buffer, found.to(buffer.dtype)])[-self.config.queue :])
        self._pending = []

    def _numbers(self, batch: Batch) -> Tensor:
        """Returns numbers of each sample's recording, and of the inputs of its towers, (B, I) int64 on the host."""
        keys_B = torch.tensor([_key_number(key) for key in batch.keys])
        return torch.stack([keys_B, *(tower.embedding.identity(batch) for tower in self._towers())], dim=1)

    def _towers(self) -> list[Tower]:
        return [tower for tower in self.towers.values() if isinstance(tower, Tower)]


def _key_number(key: str) -> int:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) if key else 0


def _together(one: Vectors, other: Vectors) -> Tensor:
    """Returns which samples belong together, (B, N) bool."""
    equal_BNI = (one.numbers_NI[:, None] == other.numbers_NI[None]) & (one.numbers_NI[:, None] != 0)
    return equal_BNI.any(2)


def _hits(cosines_BB: Tensor, together_BB: Tensor, both_B: Tensor) -> Tensor:
    """Returns in how many rows the nearest sample of the micro-batch belongs to the row."""
    best_B = cosines_BB.detach().masked_fill(~both_B, -2.0).argmax(1)
    return (together_BB.gather(1, best_B[:, None])[:, 0] & both_B).sum()


def gathered(pending: Sequence[tuple[int, Vectors]], like: Vectors) -> Vectors:
    """Returns the samples of all ranks' micro-batches, in the order of the micro-batches' numbers.

    Args:
        pending: number and samples of each micro-batch of this rank.
        like: gives shapes and device.
    """
    device = like.vectors_NKE.device
    order = [torch.full((len(part.numbers_NI),), number, device=device) for number, part in pending]
    order_N = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *order])
    parts = [torch.cat([empty[:0], *(part[k] for _, part in pending)]) for k, empty in enumerate(like)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        order_N = _from_all(order_N + 1)  # 0 marks padding
        parts = [_from_all(part.float() if part.dtype == torch.bool else part) for part in parts]
        parts, order_N = [part[order_N > 0] for part in parts], order_N[order_N > 0]
    sorted_N = order_N.argsort(stable=True)
    vectors, present, numbers = (part[sorted_N] for part in parts)
    return Vectors(vectors, present.bool(), numbers)


def _from_all(part_N: Tensor) -> Tensor:
    """Returns a tensor's rows of all ranks, padded by zeros to the most rows of a rank."""
    most = torch.tensor(len(part_N), device=part_N.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    padded = torch.cat([part_N, part_N.new_zeros(int(most) - len(part_N), *part_N.shape[1:])])
    found = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(found, padded)
    return torch.cat(found)


def build(config: Config, shape: ModelShape) -> JointEmbedding:
    return JointEmbedding(config, shape)
