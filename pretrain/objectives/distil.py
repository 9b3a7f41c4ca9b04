"""Distillation: predict layers of a frozen teacher (DPHuBERT, arXiv 2305.17651; DistilHuBERT, arXiv 2110.01900).

The teacher's input is not masked. Each of its layers is predicted from the student's layer at the same share of the
depth, by a linear layer that the teacher layers of a group share. With `sparsity`, heads and channels are pruned at
the same time (pretrain/nn/gates.py). With `elastic`, the student is a supernet (OFA, arXiv 1908.09791; LightHuBERT,
arXiv 2203.15610): of each update, micro-batch 0 trains its largest subnet, 1 the smallest, and others a drawn one (the
sandwich rule of BigNAS, arXiv 2003.11142).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError, about, config, refuse
from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import ObjectiveConfig
from pretrain.interfaces.frames import EncoderOutput, ModelGates, StepContext, valid_frames
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import MicroBatchRecord, MonitoringRecord
from pretrain.interfaces.objectives import LossOutput, MicroBatchPlan, Objective, Pruning
from pretrain.interfaces.subnets import ElasticConfig, Space, Subnet
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.gates import FASTER, Gated, HardConcreteGates
from pretrain.nn.importance import sort_by_importance
from pretrain.nn.numerics import full_precision
from pretrain.self_supervision.masking import MaskedPlan, draw_frame_mask, draw_span_mask
from pretrain.self_supervision.teacher import Teacher, deviation


@config
class Config(ObjectiveConfig):
    name: Literal["distil"] = "distil"
    teacher: Annotated[
        str,
        # the checkpoint has the teacher's sha256, so it may be moved
        about("run folder or checkpoint of the teacher; empty: the initial weights of this run", resume="free"),
    ] = ""
    teacher_dim: Annotated[int, about("the teacher's channels; 0: as many as the student's", ge=0)] = 0
    layers: Annotated[
        tuple[tuple[int, ...], ...],
        about("layers of the teacher to predict, in groups that share a projection; empty: first, middle and last"),
    ] = ()
    mask_prob: Annotated[
        float, about("share of frames in masked spans of the student's input (LightHuBERT); 0: none", ge=0, le=1)
    ] = 0.2
    mask_span: Annotated[int, about("encoder frames per masked span", ge=1)] = 6
    sparsity: Annotated[float, about("share of the weights of heads and channels to prune; 0: none", ge=0, lt=1)] = 0.0
    prune_frontend: Annotated[
        bool, about("sparsity: also of the channels between the front end's convolutions, and not of the encoder alone")
    ] = True
    sparsity_steps: Annotated[int, about("updates over which the share rises from 0 to sparsity", ge=1)] = 5_000
    elastic: Annotated[ElasticConfig, about("sizes of the subnets of a supernet")] = field(
        default_factory=ElasticConfig
    )

    def __post_init__(self) -> None:
        if self.sparsity and self.elastic.given:
            refuse("sparsity", self.sparsity, "prunes one model, and objective.elastic trains many; leave out one")

    @property
    def supernet(self) -> bool:
        """Whether `elastic` is given."""
        return self.elastic.given

    @property
    def varies_depth(self) -> bool:
        """True for a supernet whose subnets differ in their number of blocks."""
        return len(self.elastic.blocks) > 1

    @property
    def gives_all_layers(self) -> bool:
        """False where subnets differ in their number of blocks."""
        return not self.varies_depth

    @property
    def teacher_run(self) -> str:
        """The run that teaches."""
        return self.teacher

    def cautions(self, total_steps: int) -> list[str]:
        """Warns of a sparsity that is reached too late."""
        if not self.sparsity or 2 * self.sparsity_steps <= total_steps:
            return []
        return [
            f"objective.sparsity_steps={self.sparsity_steps}: with train.steps={total_steps} less than half of the run "
            "is left to train at the full sparsity"
        ]


@dataclass
class DistilPlan(MaskedPlan):
    flat_N: Tensor
    """Frames with a target, as indices into B·F."""
    subnet: Subnet | None = None
    """What is trained of a supernet; None: the whole student."""


class Distil(Objective):
    """Per frame and layer: mean absolute error plus 1 − cosine; the mean over layers is summed over frames."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.groups = config.layers or ((0,), (-2,), (-1,))  # negative: the middle, the last
        target_dim = config.teacher_dim or shape.dim
        self.projections = nn.ModuleList(nn.Linear(shape.dim, target_dim) for _ in self.groups)
        self.mask_embedding = nn.Parameter(torch.rand(shape.dim)) if config.mask_prob else None
        self.teacher: Teacher | None = None
        self.gates: HardConcreteGates | None = None
        self._space: Space | None = None
        self._given: list[SpeechModel] = []
        self._given_sha256 = b""
        if config.teacher:
            self.register_buffer("teacher_sha256", torch.zeros(32, dtype=torch.uint8))
            self.teacher_sha256: Tensor

    def attach(self, model: SpeechModel) -> None:
        if not self.config.teacher:
            if self.config.teacher_dim not in (0, self.shape.dim):
                raise ConfigError(
                    f"objective.teacher_dim={self.config.teacher_dim}: without objective.teacher the run's own first "
                    f"weights teach, which have encoder.dim={self.shape.dim}; leave it out"
                )
            self.teacher = Teacher(model)
            self._require_layers(self.shape, "objective.teacher=")
        if self.config.sparsity and self.gates is None:
            if not isinstance(model.encoder, BlockStack):
                raise ConfigError(f"objective.sparsity={self.config.sparsity}: only stacks of blocks can be pruned")
            self.gates = HardConcreteGates(model.frontend if self.config.prune_frontend else None, model.encoder)
            if not model.encoder.stack_config.heads_may_differ:
                raise ConfigError(
                    f"objective.sparsity={self.config.sparsity}: encoder.relative_bias=true is shared by all heads, "
                    "which cannot be pruned"
                )
        if self.config.elastic.given:
            self._make_elastic(model.encoder)

    def _make_elastic(self, encoder: nn.Module) -> None:
        """Sorts heads and channels, the most important first, so that subnets keep the first ones."""
        elastic = self.config.elastic
        if not isinstance(encoder, BlockStack):
            raise ConfigError("objective.elastic: only stacks of blocks can be a supernet")
        stack = encoder.stack_config
        if stack.widths:
            raise ConfigError(f"objective.elastic: encoder.widths={[*map(list, stack.widths)]} must be empty")
        if len(elastic.blocks) > 1 and stack.half_rate_blocks:
            limit = f"encoder.half_rate_blocks={stack.half_rate_blocks} need all blocks"
            raise ConfigError(f"objective.elastic.blocks={list(elastic.blocks)}: {limit}; leave it empty")
        if len(elastic.heads) > 1 and not stack.heads_may_differ:
            limit = "encoder.relative_bias=true is shared by all heads"
            raise ConfigError(f"objective.elastic.heads={list(elastic.heads)}: {limit}; leave it empty")
        self._space = Space(elastic, stack.layers, stack.heads, stack.ffn_dim, len(encoder.feed_forwards))
        sort_by_importance(encoder)

    def take_teacher(self, model: SpeechModel, sha256: str) -> None:
        where = f"objective.teacher={self.config.teacher}"
        theirs, dim = model.shape, self.config.teacher_dim or self.shape.dim
        if theirs.rate_hz != self.shape.rate_hz:
            raise ConfigError(
                f"{where}: has {theirs.rate_hz:g} frames per second and the student {self.shape.rate_hz:g}; they "
                "must be equal (frontend.subsampling)"
            )
        if theirs.dim != dim:
            raise ConfigError(f"{where}: has {theirs.dim} channels; set objective.teacher_dim={theirs.dim}, not {dim}")
        self._require_layers(theirs, where)
        self._given, self._given_sha256 = [model.requires_grad_(False).eval()], bytes.fromhex(sha256)
        self.teacher_sha256.copy_(torch.frombuffer(bytearray(self._given_sha256), dtype=torch.uint8))

    def _require_layers(self, theirs: ModelShape, where: str) -> None:
        beyond = [layer for group in self.config.layers for layer in group if not 0 <= layer <= theirs.n_layers]
        if beyond or not all(self.groups):
            raise ConfigError(
                f"objective.layers={[list(group) for group in self.config.layers]}: {where} has the layers 0 to "
                f"{theirs.n_layers}, and each group needs one or more of them"
            )

    def _teacher(self, device: torch.device) -> SpeechModel:
        """Returns the teacher on a device. Raises ConfigError where it is not the one that the run began with."""
        if self.teacher is not None:
            copy: SpeechModel = self.teacher.copy  # type: ignore[assignment]
            return copy
        if not self._given:
            raise ConfigError(f"objective.teacher={self.config.teacher}: was not loaded")
        begun = bytes(self.teacher_sha256.cpu().tolist())
        if begun != self._given_sha256:
            raise ConfigError(
                f"objective.teacher={self.config.teacher}: its weights have sha256 {self._given_sha256.hex()[:12]}…, "
                f"and this run began with {begun.hex()[:12]}…; give the same checkpoint"
            )
        return self._given[0].to(device)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> DistilPlan:
        frontend, device = model.frontend, batch.wave_BT.device
        if self.config.mask_prob:
            mask = draw_span_mask(frontend, batch, ctx, self.config.mask_prob, self.config.mask_span)
        else:
            mask = draw_frame_mask(frontend, batch, ctx, lambda length, rng: np.zeros(length, dtype=bool))
        width, teacher = mask.mask_BF.shape[1], self._teacher(device)
        lengths_B = torch.minimum(*(part.frame_lengths(batch.lengths_B) for part in (frontend, teacher.frontend)))
        # a row of one frame has no context to learn from, and no mask
        targets_BF = valid_frames(lengths_B, width, lengths_B.device) & (lengths_B > 1)[:, None]
        flat_N = targets_BF.flatten().nonzero()[:, 0].to(device, non_blocking=True)
        count = torch.tensor(float(len(flat_N)), dtype=torch.float64)
        return DistilPlan(mask, count, flat_N, self.subnet_of(batch.micro_batch, ctx))

    def subnet_of(self, micro_batch: int, ctx: StepContext) -> Subnet | None:
        """Returns what a micro-batch trains, the same on any number of ranks; None: the whole student."""
        if self._space is None or not self.training or not micro_batch or ctx.step < self.config.elastic.warmup_steps:
            return None
        if micro_batch == 1:
            return self._space.smallest
        return self._space.draw(keyed_rng(ctx.seed, ctx.step, micro_batch, "subnet"))

    def forward(
        self, model: SpeechModel, batch: Batch, plan: MicroBatchPlan, ctx: StepContext
    ) -> tuple[LossOutput, EncoderOutput]:
        assert isinstance(plan, DistilPlan)
        gated: Gated | None = None if self.gates is None else self.gates(self.target_sparsity(ctx.step))
        gates = ModelGates() if gated is None else gated.gates
        if self._space is not None and plan.subnet is not None:
            gates = ModelGates(blocks=self._space.gates(plan.subnet, batch.wave_BT.device))
        frames = model.project(model.extract(batch.wave_BT, batch.lengths_B, gates.frontend), gates.frontend)
        if self.mask_embedding is not None:
            embedding_D = self.mask_embedding.to(frames.x_BFD.dtype)
            frames = frames._replace(x_BFD=torch.where(plan.mask.mask_BF[:, :, None], embedding_D, frames.x_BFD))
        encoded: EncoderOutput = model.encoder(frames, ctx, gates.blocks)
        count = plan.count.to(frames.x_BFD.device)
        total, pairs = self.compare(encoded, self.targets(batch, frames.x_BFD.shape[1]), plan.flat_N)
        targets_ND, predictions_ND = pairs
        metrics = {
            "health/target_std": (deviation(targets_ND) * count, count),
            "health/prediction_std": (deviation(predictions_ND) * count, count),
        }
        if gated is not None:
            total = total + gated.penalty * count.float()  # the sum of counts divides it: once per update
            metrics["metric/sparsity"] = (gated.sparsity.detach() * count, count)
        if self._space is not None:
            shares = {"largest": plan.subnet is None, "smallest": plan.subnet == self._space.smallest}
            for name, own in shares.items():
                metrics[f"metric/loss_{name}"] = (total.detach() * own, count * own)
        self.record(lambda: self.recorded(plan, frames.x_BFD.shape[1], len(batch.keys), targets_ND, predictions_ND))
        return LossOutput(total, count, metrics), encoded

    def recorded(
        self, plan: DistilPlan, width: int, rows: int, targets_ND: Tensor, found_ND: Tensor
    ) -> MicroBatchRecord:
        """Returns targets and predictions of the masked frames, or of all frames where none is masked.

        Args:
            plan: mask and frames with a target.
            width: F of the padded batch.
            rows: B.
            targets_ND, found_ND: the teacher's and the student's vectors at the frames with a target.
        """
        chosen_BF = torch.zeros(rows * width, dtype=torch.bool, device=plan.flat_N.device)
        chosen_BF[plan.flat_N] = True
        if self.mask_embedding is not None:
            chosen_BF &= plan.mask.mask_BF.flatten()
        kept_N = chosen_BF[plan.flat_N]
        return MicroBatchRecord(
            chosen_BF.view(rows, width), targets_ND=targets_ND[kept_N], predictions_ND=found_ND[kept_N]
        )

    @torch.no_grad()
    def targets(self, batch: Batch, width: int) -> tuple[Tensor, ...]:
        """Returns all layers of the teacher, (B, width, D) each, padded or cut to the student's frames."""
        layers = self._teacher(batch.wave_BT.device)(batch.wave_BT, batch.lengths_B).layers
        return tuple(F.pad(layer, (0, 0, 0, max(0, width - layer.shape[1])))[:, :width] for layer in layers)

    def compare(
        self, encoded: EncoderOutput, targets: tuple[Tensor, ...], flat_N: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the loss summed over frames, and target and prediction (N, D) of the last layer compared.

        Args:
            encoded: the student's layers.
            targets: (B, F, D) of each layer of the teacher.
            flat_N: frames with a target, as indices into B·F.
        """
        n_student, n_teacher = len(encoded.layers) - 1, len(targets) - 1
        numbers = {-2: n_teacher // 2, -1: n_teacher}
        total = encoded.layers[0].new_zeros((), dtype=torch.float32)
        compared = [(group, numbers.get(layer, layer)) for group, layers in enumerate(self.groups) for layer in layers]
        target_ND = found_ND = total
        for group, layer in compared:
            own = encoded.layers[(2 * layer * n_student + n_teacher) // (2 * n_teacher)]
            found_ND = self.projections[group](own.flatten(0, 1)[flat_N]).float()
            target_ND = targets[layer].flatten(0, 1)[flat_N].float()
            with full_precision(found_ND.device):
                error_N = (found_ND - target_ND).abs().mean(1) + 1 - F.cosine_similarity(found_ND, target_ND, dim=1)
            total = total + error_N.sum() / len(compared)
        return total, (target_ND, found_ND)

    def target_sparsity(self, step: int) -> float:
        """Returns the share of weights to remove at an update: linear from 0, then constant."""
        return self.config.sparsity * min(1.0, step / self.config.sparsity_steps)

    @torch.no_grad()
    def pruning(self) -> Pruning | None:
        if self.gates is None:
            return None
        gates_N = self.gates.closed(FASTER * self.gates.theta_N)
        removed = float(self.gates.share_removed((gates_N > 0).float()))
        return Pruning(self.gates.by_part(gates_N), self.config.sparsity, removed)

    def space(self) -> Space | None:
        return self._space

    def monitoring(self) -> MonitoringRecord:
        return MonitoringRecord.of_regression(self._last)


def build(config: Config, shape: ModelShape) -> Distil:
    return Distil(config, shape)
