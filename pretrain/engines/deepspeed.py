"""The DeepSpeed engine: ZeRO partitions optimizer states (1), gradients (2) and weights (3) over the ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engines.base import Engine, buffers, copy_buffers, fitting, host_copy
from pretrain.engines.distributed import DistributedContext, limit_groups
from pretrain.engines.optimizer import MOMENTS, first_state, make_optimizer
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Sum
from pretrain.train_module import TrainModule, TrainPlan


def deepspeed_config(
    config: EngineConfig,
    optimizer: OptimizerConfig,
    slots: int,
    world: DistributedContext,
    module: nn.Module,
    same_blocks: bool = True,
) -> dict[str, Any]:
    """Returns DeepSpeed's own config for a run.

    Precision is not set here: TrainModule enters autocast itself, the same way under every engine, and weights,
    gradients and their sums stay fp32.

    Args:
        config: the engine's settings, ZeRO stage and offload among them.
        optimizer: the limit of the gradient norm.
        slots: micro-batches of each rank in a step.
        world: number of ranks and device.
        module: its number of weights bounds ZeRO's buckets.
        same_blocks: whether all ranks run the same blocks at the same time.
    """
    bucket = min(sum(parameter.numel() for parameter in module.parameters()), 50_000_000)
    bucket += bucket % 2  # DeepSpeed's alignment
    frozen = any(not parameter.requires_grad for parameter in module.parameters())
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": slots,
        "train_batch_size": slots * world.size,
        "gradient_clipping": optimizer.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on CPU and GPU and needs no compiler
        "zero_optimization": {
            "offload_optimizer": {
                "device": config.offload,
                "pin_memory": world.device != "cpu",
                **({"nvme_path": config.offload_folder} if config.offload == "nvme" else {}),
            },
            "stage": config.zero_stage,
            # overlapped, gradients are reduced in the order of the backward pass
            "overlap_comm": world.device != "cpu" and same_blocks,
            "contiguous_gradients": True,
            "memory_efficient_linear": False,  # it would replace torch's own linear layer in the whole process
            # DeepSpeed allocates its buckets at full size: 2 GB by default, for any model
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # ZeRO-3 refreshes weights that it keeps whole only after its own updates, so would miss a teacher's
            "stage3_param_persistence_threshold": 0 if frozen else 100_000,
        },
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine(Engine):
    """Runs the step with DeepSpeed.

    Args:
        module: model and objective.
        config: engine settings.
        optimizer: AdamW settings.
        world: this rank and the number of ranks.
        slots: micro-batches of each rank in one global step.

    Raises:
        ConfigError: engine.offload=nvme is not supported on this machine.
    """

    def __init__(
        self,
        module: TrainModule,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        world: DistributedContext,
        slots: int,
    ) -> None:
        super().__init__(module, config, optimizer, world)
        if config.offload == "nvme":
            _require_nvme()
        self.slots = slots
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        # DeepSpeed would compile a faster CPU all-reduce at the first start: takes half a minute and needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes over torch's process group
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module, optimizer, config.fused),
            config=deepspeed_config(config, optimizer, slots, world, module, same_blocks=not module.varies_depth),
            dist_init_required=False,
        )
        limit_groups(config.timeout_minutes)

    def _forward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        assert isinstance(plan, TrainPlan)
        loss, metrics = self.engine(batch, plan, counts_K, ctx)
        return loss, metrics

    def _forward_backward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        loss, metrics = self._forward(batch, plan, counts_K, ctx)
        self.on_phase("backward pass")
        scale = 1.0 if self.config.zero_stage else self.scale.value
        if self.config.zero_stage and self.scale.dynamic:
            self.optimizer.override_loss_scale(self.scale.value)
        # DeepSpeed averages over ranks and slots; the loss is divided by the global count already, so undo that.
        self.engine.backward(loss * (self.world.size * self.slots * scale))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        return loss, metrics

    def _apply(self, lr: float, skip_above: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        plain_norm = None
        if self.config.zero_stage == 0:  # the only stage at which DeepSpeed keeps no norm
            grads = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            if self.scale.value != 1.0:
                torch._foreach_mul_(grads, 1.0 / self.scale.value)
            plain_norm = torch.nn.utils.get_total_norm(grads)
        adam = self.optimizer if self.config.zero_stage == 0 else self.optimizer.optimizer
        adam.norm, adam.limit = lambda: self._norm(plain_norm), skip_above
        if self.config.zero_stage == 3 and self.config.offload != "none":
            self._hand_over_missing_gradients()
        self.engine.step()
        if self.config.zero_stage == 3:
            # otherwise a parameter without a gradient in the next step (layer drop) would reuse this step's
            self.optimizer.grad_partitions_flat_buffer.zero_()
        return self._norm(plain_norm)

    def _hand_over_missing_gradients(self) -> None:
        """Copies zero gradients to host memory or disk for parameters without a gradient in this step (layer drop).

        ZeRO-3 copies existing gradients only and would keep the last step's for these parameters.
        """
        zero = self.optimizer
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        missing = [parameter for parameter in trained if zero.get_param_id(parameter) not in zero.norm_for_param_grads]
        zero._offload_boundary_param_ids = {parameter.ds_id for parameter in missing}  # type: ignore[attr-defined]
        zero._finalize_offload_gradient_accumulation()

    def _norm(self, plain_norm: Tensor | None) -> float:
        """Returns the gradient norm; ZeRO sets it before calling the optimizer, but ZeRO-3 not after an overflow."""
        if plain_norm is not None:
            return float(plain_norm)
        return math.inf if self.optimizer.overflow else float(self.optimizer._global_grad_norm)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        self._link_moments()
        for parameter in self.module.parameters():
            name = self.names[id(parameter)]
            yield f"model/{name}", self._weight(parameter)
            for moment in MOMENTS if parameter.requires_grad else ():
                yield f"{moment}/{name}", self._moment(parameter, moment)
        yield from buffers(self.module)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        if self.config.zero_stage and parameter.requires_grad:
            return host_copy(safe_get_full_fp32_param(parameter))
        with _whole(parameter):
            return host_copy(parameter)

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self.config.zero_stage == 0:
            return host_copy(self.optimizer.state[parameter][moment])
        return host_copy(safe_get_full_optimizer_state(parameter, moment))

    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        copy_buffers(self.module, tensors)
        if step:
            self._create_moments(step)
        for parameter in self.module.parameters():
            name = self.names[id(parameter)]
            with _whole(parameter):
                shape, weight = parameter.shape, fitting(tensors, f"model/{name}", parameter.shape)
                parameter.data.copy_(weight)
            if parameter.requires_grad:
                self._set_partition(parameter, weight, None)
                for moment in MOMENTS if step else ():
                    self._set_partition(parameter, fitting(tensors, f"{moment}/{name}", shape), moment)
        self.engine.global_steps = step

    def _create_moments(self, step: int) -> None:
        """Creates the moments before the first step, in which torch would create and ZeRO link them."""
        stage = self.config.zero_stage
        if stage == 0:
            adam, owners = self.optimizer, [p for p in self.module.parameters() if p.requires_grad]
        elif stage == 3:
            adam, owners = self.optimizer.optimizer, self.optimizer.fp32_partitioned_groups_flat
        else:
            adam, owners = self.optimizer.optimizer, self.optimizer.single_partition_of_fp32_groups
        for number, owner in enumerate(owners):
            on_disk = self.config.offload == "nvme" and self.optimizer._swappable_optimizer_subgroup(number)
            if on_disk:  # the weights of this group are empty until they are read
                self.optimizer._optimizer_states_and_gradient_swap_in(number)
            adam.state[owner] = first_state(owner, step, self.config.fused)
            if on_disk:
                self.optimizer._optimizer_states_and_gradient_swap_out(number)
        self._link_moments()

    def _link_moments(self) -> None:
        """Links the moments of all groups: ZeRO 1 and 2 do so after the first group's first step, without the rest."""
        if self.config.zero_stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_partition(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        stage = self.config.zero_stage
        if stage == 0:
            if moment is not None:
                self.optimizer.state[parameter][moment].copy_(value)
            return
        if stage == 3:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            value = padded[size * self.world.rank : size * (self.world.rank + 1)].to(self.world.device)
        write_weight, write_moment = _WRITERS[stage == 3]
        if moment is None:
            write_weight(parameter, value)
        else:
            write_moment(parameter, value, moment)


def _require_nvme() -> None:
    """Raises ConfigError, with the remedy, if DeepSpeed cannot offload to a disk."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "engine.offload=nvme: DeepSpeed's async_io operator cannot be built here; install libaio-dev, ninja and a "
            "C++ compiler, or take engine.offload=cpu"
        )


_WRITERS = {
    False: (safe_set_full_fp32_param, safe_set_full_optimizer_state),
    True: (safe_set_local_fp32_param, safe_set_local_optimizer_state),
}


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Returns a context in which a parameter partitioned by ZeRO-3 is whole on every rank; rank 0's write is kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return context
