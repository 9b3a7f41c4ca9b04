"""Attention decoder from speech to text: cross-entropy of each token, given those before it.

Beside CTC it is the hybrid of Watanabe et al. (2017), alone it is Whisper's training (arXiv 2212.04356). Its label
smoothing and sizes are those of ESPnet's recipes.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import Memory, ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMonitoringRecord
from pretrain.interfaces.objectives import HeadPlan, LossOutput, WritingHead
from pretrain.models.decoders.transformer import DecoderConfig, TransformerDecoder
from pretrain.nn.numerics import full_precision


@config
class Config(HeadConfig):
    name: Literal["sequence"] = "sequence"
    tokens: Annotated[str, about("name in data.tokens of the tokens to predict", min_length=1)] = "text"
    vocabulary: Annotated[int, about("number of these tokens, as `auricle tokens` prints it", ge=1)]
    label_smoothing: Annotated[float, about("share of the target's probability spread over all", ge=0, lt=1)] = 0.1
    memory_layers: Annotated[
        tuple[int, ...],
        about("encoder layers to attend to, joined in time, each with a learned vector; empty: what `layers` gives"),
    ] = ()
    memory_drop: Annotated[
        float, about("of several memories, each is left out with this probability in training", ge=0, lt=1)
    ] = 0.1
    decoder: Annotated[DecoderConfig, about("the decoder")] = dataclasses.field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers and self.memory_layers:
            refuse("memory_layers", list(self.memory_layers), "layers are joined in time or mixed; leave out layers")
        if any(layer < 0 for layer in self.memory_layers):
            refuse("memory_layers", list(self.memory_layers), "must be numbers from 0 on")

    @property
    def layer_fields(self) -> dict[str, tuple[int, ...]]:
        """Also `memory_layers`."""
        return super().layer_fields | {"memory_layers": self.memory_layers}

    @property
    def needed_tokens(self) -> dict[str, int]:
        """The token set of the text."""
        return {self.tokens: self.vocabulary}


class Sequence(WritingHead):
    """Transformer decoder over encoder layers. Tokens are 0 … vocabulary − 1, then the end and the start mark.

    A text that is longer than the decoder's longest, or without a frame of audio, does not count.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config, config.tokens)
        if any(layer > shape.n_layers for layer in config.memory_layers):
            raise ValueError(f"memory_layers={list(config.memory_layers)}: each must be at most {shape.n_layers}")
        self.config = config
        self.end, self.start = config.vocabulary, config.vocabulary + 1
        dim = config.decoder.dim or shape.dim
        memories = max(len(config.memory_layers), 1)
        self.memory_dims = (dim,) * memories
        """Channels of each of `memories`."""
        # the last layer is normalised already
        inner = [layer < shape.n_layers for layer in config.memory_layers or config.layers or (shape.n_layers,)]
        normalised = inner if config.memory_layers else [any(inner)]
        self.norms = nn.ModuleList(nn.LayerNorm(shape.dim) if needed else nn.Identity() for needed in normalised)
        self.projections = nn.ModuleList(
            nn.Linear(shape.dim, dim) if dim != shape.dim else nn.Identity() for _ in range(memories)
        )
        tokens, classes = config.vocabulary + 2, config.vocabulary + 1
        self.decoder = TransformerDecoder(config.decoder, dim=dim, tokens=tokens, classes=classes, memories=memories)

    def memories(self, encoded: EncoderOutput) -> list[Memory]:
        """Returns the encoder layers that the decoder attends to, (B, F, decoder.dim) each."""
        layers = [encoded.layers[layer] for layer in self.config.memory_layers] or [self.frames(encoded).x_BFD]
        parts = zip(layers, self.norms, self.projections, strict=True)
        return [Memory(projection(norm(x_BFD)), encoded.lengths_B) for x_BFD, norm, projection in parts]

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        lengths_B = (batch.token_rows(self.config.tokens) >= 0).sum(1) + 1  # with the end mark
        frames_B = model.frontend.frame_lengths(batch.lengths_B)
        rows_B = (lengths_B > 1) & (lengths_B <= self.decoder.max_tokens) & (frames_B > 0)
        return HeadPlan((lengths_B * rows_B).sum().double(), rows_B)

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        memories = self.memories(encoded)
        device = encoded.layers[-1].device
        read_BN, targets_BN = (ids_BN.to(device, non_blocking=True) for ids_BN in self._shifted(batch, plan))
        if self.training and len(memories) > 1:
            memories = self._without_some(memories, batch, ctx)
        logits_BNV = self.decoder(read_BN, memories)
        counted_BN = targets_BN >= 0
        with full_precision(logits_BNV.device):
            losses_N = F.cross_entropy(
                logits_BNV.float().flatten(0, 1),
                targets_BN.clamp(min=0).flatten(),
                reduction="none",
                label_smoothing=self.config.label_smoothing,
            )
        total = losses_N.masked_fill(~counted_BN.flatten(), 0.0).sum()
        count = counted_BN.sum()
        hits = ((logits_BNV.argmax(-1) == targets_BN) & counted_BN).sum()
        labelled_B = (batch.token_rows(self.config.tokens) >= 0).any(1)
        infeasible = (labelled_B & ~plan.rows_B.cpu()).sum()
        return LossOutput(total, count, {"accuracy": (hits, count), INFEASIBLE: (infeasible, labelled_B.sum())})

    def _shifted(self, batch: Batch, plan: HeadPlan) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of the decoder, (B, N) each, on the host; rows without a usable text have -1."""
        rows_B1 = plan.rows_B.cpu()[:, None]
        ids_BN = batch.token_rows(self.config.tokens).masked_fill(~rows_B1, -1)
        lengths_B1 = (ids_BN >= 0).sum(1, keepdim=True)
        ids_BN = ids_BN[:, : int(lengths_B1.max()) if len(ids_BN) else 0]
        begin_B1 = torch.full_like(lengths_B1, self.start)
        read_BN = torch.cat([begin_B1, ids_BN.masked_fill(ids_BN < 0, self.end)], dim=1)
        targets_BN = torch.cat([ids_BN, torch.full_like(lengths_B1, -1)], dim=1)
        ends_BN = torch.arange(targets_BN.shape[1], device=ids_BN.device) == lengths_B1
        return read_BN, targets_BN.masked_fill(ends_BN & rows_B1, self.end)

    def _without_some(self, memories: list[Memory], batch: Batch, ctx: StepContext) -> list[Memory]:
        """Leaves out whole memories of rows at random, keyed by the segment; one at least stays."""
        draws = [keyed_rng(ctx.seed, ctx.step, key, "memories").random(len(memories)) for key in batch.keys]
        kept = torch.tensor([[value >= self.config.memory_drop for value in row] for row in draws])
        kept_BK = kept.reshape(len(batch.keys), len(memories))
        kept_BK = kept_BK | ~kept_BK.any(1, keepdim=True)
        return [memory._replace(lengths_B=memory.lengths_B * kept_BK[:, k]) for k, memory in enumerate(memories)]


def build(config: Config, shape: ModelShape) -> Sequence:
    return Sequence(config, shape)
