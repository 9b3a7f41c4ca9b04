"""The typed config of a pretraining run. Defaults are here and in the plug-ins; YAML files contain only deviations."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator

from data_pipeline.core.schema import about, config, dump, refuse
from data_pipeline.sampling.config import DataConfig
from pretrain import registry
from pretrain.interfaces.configs import (
    BalanceConfig,
    EncoderConfig,
    FrontendConfig,
    HeadConfig,
    ObjectiveConfig,
    TuneConfig,
)
from pretrain.interfaces.engine_configs import FederatedConfig, MetaConfig, require_smooth


@config
class OptimizerConfig:
    """AdamW and gradient clipping."""

    lr: Annotated[float, about("peak learning rate", gt=0)] = 5e-4
    betas: Annotated[tuple[float, float], about("Adam's decay rates of the first and second moment")] = (0.9, 0.98)
    eps: Annotated[float, about("Adam's epsilon", gt=0)] = 1e-6
    weight_decay: Annotated[float, about("decoupled weight decay; norms and biases get none", ge=0)] = 0.01
    clip_norm: Annotated[float, about("clip the global gradient norm to this; 0 does not clip", ge=0)] = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            refuse("betas", list(self.betas), "each must be ≥ 0 and < 1, as in 0.9 and 0.98")


@config
class ScheduleConfig:
    """Learning rate over optimizer steps."""

    name: Annotated[Literal["linear", "cosine", "tri_stage", "noam", "constant"], about("shape after the warm-up")] = (
        "linear"
    )
    warmup_steps: Annotated[int, about("steps of linear warm-up from 0", ge=0)] = 32_000
    hold_fraction: Annotated[float, about("tri_stage: share of all steps at the peak", ge=0, le=1)] = 0.9
    final_scale: Annotated[float, about("last learning rate as a share of the peak", ge=0, le=1)] = 0.0
    continuation: Annotated[
        Literal["as_planned", "rewarm", "constant"],
        about(
            "learning rate of a resumed run whose train.steps changed (also written schedule.continue): that of the "
            "schedule of the new length at once, warmed up to it again, or the last rate kept",
            resume="free",
            aliases=("continuation", "continue"),
        ),
    ] = "as_planned"


@config
class EngineConfig:
    """Engine, precision and memory options of an optimizer step."""

    name: Annotated[
        Literal["deepspeed", "torch", "federated", "meta"],
        BeforeValidator(lambda value: "torch" if value == "local" else value),
        about(
            "deepspeed, or plain torch (torch) with the same losses; federated: devices compute on audio that never "
            "leaves them; meta: weights are adapted to episodes; local is the former name of torch"
        ),
    ] = "deepspeed"
    zero_stage: Annotated[int, about("DeepSpeed ZeRO stage (deepspeed only)", ge=0, le=3)] = 1
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        about(
            "bf16 and fp16 run the forward pass under autocast, fp16 with a scaled loss; weights, softmax and code "
            "look-ups stay fp32"
        ),
    ] = "fp32"
    tf32: Annotated[bool, about("let fp32 matrix products use TF32 on GPUs that have it")] = True
    activation_checkpointing: Annotated[
        Literal["none", "full", "selective"],
        BeforeValidator(
            lambda value: {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value
        ),
        about(
            "recompute encoder blocks in the backward pass: full, all of a block (least memory, a third more compute); "
            "selective, norms, activations and dropout, but no matrix product or attention"
        ),
    ] = "none"
    packed: Annotated[
        bool, about("compute no padding: utterances of a micro-batch end to end in one row, same outputs and gradients")
    ] = False
    offload: Annotated[
        Literal["none", "cpu", "nvme"],
        about("keep optimizer states in host memory (deepspeed, ZeRO 1 to 3), or on a disk (deepspeed, ZeRO 3)"),
    ] = "none"
    offload_folder: Annotated[str, about("offload=nvme: a folder on a fast disk of each node")] = ""
    fused: Annotated[bool, about("torch's fused AdamW: one kernel for all parameters; the same up to rounding")] = False
    compile: Annotated[
        bool, about("torch.compile the encoder: slow first steps, then faster; dropout draws differ")
    ] = False
    fake_int8: Annotated[
        float,
        about(
            "share of the updates, the last ones, in which the encoder's linear layers round weights and inputs as an "
            "INT8 graph does (needs torchao); 0: none",
            ge=0,
            le=1,
        ),
    ] = 0.0
    peak_tflops: Annotated[
        float,
        about("peak of one device in this precision, for perf/mfu; 0: built-in figures of common GPUs", ge=0),
    ] = 0.0
    timeout_minutes: Annotated[float, about("time limit of a collective operation", gt=0, le=525_600)] = 30.0
    federated: Annotated[FederatedConfig, about("rounds of engine.name=federated")] = dataclasses.field(
        default_factory=FederatedConfig
    )
    meta: Annotated[MetaConfig, about("adaptation to episodes of engine.name=meta")] = dataclasses.field(
        default_factory=MetaConfig
    )

    def __post_init__(self) -> None:
        if self.name in ("federated", "meta") and self.precision == "fp16":
            remedy = f"repeats updates that overflow; engine.name={self.name} takes fp32 or bf16"
            refuse("precision", self.precision, remedy)
        if self.name == "meta":
            self._check_meta()
        if self.offload != "none" and self.name != "deepspeed":
            refuse(
                "offload", self.offload, "needs engine.name=deepspeed; the plain torch engine keeps its states in place"
            )
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "nvme" else 1):
            least = "engine.zero_stage=3" if self.offload == "nvme" else "engine.zero_stage of 1 to 3"
            refuse("offload", self.offload, f"needs {least}, and it is {self.zero_stage}")
        if self.offload == "nvme" and not self.offload_folder:
            refuse("offload_folder", "", "offload=nvme needs a folder on a fast disk of each node")
        if self.compile and self.activation_checkpointing == "selective":
            remedy = "cannot run with engine.compile=true, which selects what to recompute; take none or full"
            refuse("activation_checkpointing", "selective", remedy)
        if self.fake_int8:
            self._check_fake_int8()
        if self.compile and self.packed:
            refuse("packed", self.packed, "cannot run with engine.compile=true: its loops differ from batch to batch")

    def _check_fake_int8(self) -> None:
        """Refuses what rounding to 8 bits does not work with."""
        if self.name not in ("torch", "deepspeed"):
            refuse("fake_int8", self.fake_int8, f"cannot run with engine.name={self.name}; take torch or deepspeed")
        if self.name == "deepspeed" and self.zero_stage == 3:
            refuse(
                "fake_int8", self.fake_int8, "needs whole weights, which ZeRO 3 partitions; set zero_stage of 0 to 2"
            )
        for field in ("compile", "packed"):
            if getattr(self, field):
                refuse("fake_int8", self.fake_int8, f"cannot run with engine.{field}=true; set it to false")

    def _check_meta(self) -> None:
        """Refuses what cannot run inside an adaptation, whose weights are functions of the module's."""
        reason = "weights that are adapted to an episode are no parameters of the module"
        wrong = {
            "zero_stage": (self.zero_stage, self.zero_stage > 1, f"ZeRO partitions parameters, and {reason}; set 0"),
            "compile": (self.compile, self.compile, f"compiled code holds parameters, and {reason}; set false"),
            "packed": (self.packed, self.packed, "its attention has no second derivative; set false"),
            "activation_checkpointing": (
                self.activation_checkpointing,
                self.activation_checkpointing != "none",
                f"blocks are recomputed with their parameters, and {reason}; set none",
            ),
        }
        for field, (value, is_wrong, remedy) in wrong.items():
            if is_wrong:
                refuse(field, value, f"cannot run with engine.name=meta: {remedy}")


@config
class TrainConfig:
    """Length of a run, logging and checkpoints."""

    steps: Annotated[int, about("optimizer steps in total", ge=1)] = 400_000
    log_every: Annotated[int, about("steps between rows of metrics", ge=1)] = 1
    valid_every: Annotated[
        int | None,
        about("steps between measurements of the loss of data.valid; null: a tenth of the run, and at its end", ge=1),
    ] = None
    media_every: Annotated[
        int | None,
        about(
            "steps between audio, spectrograms with units and frames in TensorBoard; null: at the first update and "
            "every tenth of the run, ten steps apart or more; 0: never",
            ge=0,
        ),
    ] = None
    histograms_every: Annotated[
        int, about("steps between histograms of code use in TensorBoard, of at most 256 bins; 0: never", ge=0)
    ] = 100
    checkpoint_every: Annotated[int, about("steps between checkpoints", ge=1)] = 1_000
    keep_last: Annotated[int, about("number of newest checkpoints that are kept", ge=1)] = 3
    keep_every: Annotated[int, about("also keep checkpoints at multiples of this step; 0: none", ge=0)] = 0
    save_behind: Annotated[bool, about("write checkpoints in the background, from a copy of the weights")] = True


@config
class HealthConfig:
    """Limits of the health detectors (pretrain/monitoring/detectors.py), and the action when one is exceeded."""

    on_nan: Annotated[
        Literal["stop", "rollback"],
        about("loss or gradient not finite: end the run, or go back to the last healthy checkpoint with other data"),
    ] = "stop"
    on_spike: Annotated[
        Literal["warn", "skip"], about("on a gradient norm far above earlier ones: warn, or skip the update")
    ] = "skip"
    on_collapse: Annotated[
        Literal["warn", "stop", "rollback"], about("collapsed codes or a dead stage, confirmed several times")
    ] = "stop"
    on_chance: Annotated[
        Literal["warn", "stop", "rollback"], about("loss at chance, dead codes or a falling rank or probe, confirmed")
    ] = "warn"
    on_recipe: Annotated[
        Literal["warn", "stop"], about("on updates with another amount of audio than data.batch_seconds")
    ] = "warn"
    max_updates_without_targets: Annotated[
        int,
        about(
            "stop when the objective had no target in this many updates in a row (at most train.steps): its loss of 0 "
            "is then meaningless; for heads the limit is health.window",
            ge=1,
        ),
    ] = 5
    max_silent_share: Annotated[
        float, about("largest share of an update's segments that may be silent or constant", ge=0, le=1)
    ] = 0.5
    max_rollbacks: Annotated[int, about("number of rollbacks after which the run stops instead", ge=0)] = 3
    every: Annotated[int, about("steps between checks", ge=1)] = 10
    confirm: Annotated[int, about("consecutive checks that confirm a finding", ge=1)] = 3
    window: Annotated[int, about("steps over which losses, codes and times are pooled", ge=1)] = 50
    grace_steps: Annotated[
        int, about("steps, at most two thirds of all, before chance and codes are checked", ge=0)
    ] = 2_000
    spike_factor: Annotated[
        float, about("an outlier is this many times the running median of gradient norms", gt=1)
    ] = 10.0
    chance_margin: Annotated[float, about("share by which the loss must be below chance level", ge=0, lt=1)] = 0.01
    min_perplexity: Annotated[float, about("least perplexity of the targets as a share of the codes", ge=0, le=1)] = 0.1
    max_dead_codes: Annotated[float, about("largest share of codes that may never be used", ge=0, le=1)] = 0.5
    min_target_entropy: Annotated[
        float, about("fixed targets: least entropy before training, as a share of log(codes)", ge=0, le=1)
    ] = 0.6
    min_stage_std: Annotated[
        float, about("least deviation of each stage's output, as a share of its first one", ge=0, lt=1)
    ] = 0.1
    min_prediction_std: Annotated[float, about("the same for predictions, if the objective reports it", ge=0)] = 0.01
    min_rank: Annotated[
        float, about("least RankMe of a stage as a share of its best since the warm-up", ge=0, lt=1)
    ] = 0.2
    audio_tolerance: Annotated[float, about("permitted relative difference of the audio per update", gt=0)] = 0.1
    max_data_wait: Annotated[float, about("largest share of a step that a rank may wait for data", gt=0, le=1)] = 0.5


@config
class Config:
    """One pretraining run."""

    name: Annotated[str, about("name of the run and of its folder", resume="free", min_length=1)] = "run"
    runs: Annotated[str, about("folder that holds the run folders", resume="free", min_length=1)] = "runs"
    seed: Annotated[int, about("keys every random draw", ge=0)] = 0
    init: Annotated[
        str,
        about("start from these weights: a run folder, or a Hugging Face folder with model.safetensors", resume="path"),
    ] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto: a GPU if there is one", resume="free")] = "auto"
    data: DataConfig
    frontend: Annotated[FrontendConfig, registry.choice("frontends")]
    encoder: Annotated[EncoderConfig, registry.choice("encoders")]
    objective: Annotated[ObjectiveConfig, registry.choice("objectives")]
    heads: Annotated[
        dict[str, Annotated[HeadConfig, registry.choice("heads")]],
        about("further tasks on the encoder's output, by a name of your choice"),
    ] = dataclasses.field(default_factory=dict)
    balance: Annotated[BalanceConfig, about("factors of the objective's and the heads' losses")] = dataclasses.field(
        default_factory=BalanceConfig
    )
    tune: Annotated[TuneConfig, about("the weights of front end and encoder that learn")] = dataclasses.field(
        default_factory=TuneConfig
    )
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    engine: Annotated[EngineConfig, about("how one optimizer step runs", resume="free")] = dataclasses.field(
        default_factory=EngineConfig
    )
    train: Annotated[TrainConfig, about("length, logging and checkpoints", resume="free")] = dataclasses.field(
        default_factory=TrainConfig
    )
    health: Annotated[HealthConfig, about("detectors of runs that go wrong", resume="free")] = dataclasses.field(
        default_factory=HealthConfig
    )

    def __post_init__(self) -> None:
        if self.engine.name == "meta":
            self._check_meta()
        elif self.data.episodes.label:
            remedy = "makes micro-batches episodes, which engine.name=meta alone can use; set it, or leave this empty"
            refuse("data.episodes.label", self.data.episodes.label, remedy)
        if self.engine.name == "federated" and self.engine.federated.noise and self.heads:
            remedy = "updates of several tasks have no norm per target; leave out heads, or the noise"
            if self.engine.federated.rule == "gradient":
                refuse("engine.federated.noise", self.engine.federated.noise, remedy)
        if self.engine.name == "federated" and self.objective.teacher_run:
            remedy = "its weights are on the server alone; cut or distil before or after (engine.name=torch)"
            refuse("objective.teacher", self.objective.teacher_run, remedy)
        if self.objective.supernet:
            self._refuse_supernet()
        if self.engine.packed and not self.frontend.packable:
            remedy = "needs a front end without a group norm, which runs over the whole row; set frontend.norm=layer"
            refuse("engine.packed", self.engine.packed, remedy)
        if not self.objective.has_loss and not self.heads:
            refuse("heads", {}, f"objective={self.objective.name} has no loss; add a head, such as heads.text.name=ctc")
        if self.objective.freezes and self.optimizer.weight_decay:
            remedy = "would change weights that are frozen at first; set optimizer.weight_decay=0"
            refuse("optimizer.weight_decay", self.optimizer.weight_decay, remedy)
        if self.balance.name != "fixed" and len(self.heads) + self.objective.has_loss < 2:
            remedy = "balances two losses or more, and this run has one; set balance.name=fixed, or add a head"
            refuse("balance.name", self.balance.name, remedy)
        if self.balance.measures and self.engine.compile:
            refuse("balance.name", self.balance.name, "measures gradients, which needs engine.compile=false")
        for name, head in self.heads.items():
            if head.signed and self.balance.name in ("uncertainty", "dwa"):
                remedy = f"heads.{name} has a loss that may be negative; set balance.name=fixed or gradnorm"
                refuse("balance.name", self.balance.name, remedy)
            if not name.isidentifier() or name == "objective":
                refuse("heads", name, "the name of a head is a word of letters, digits and _, other than objective")
            of_objective = head.input == "objective"
            for field, layers in head.layer_fields.items():
                if any(layer > self.encoder.layers for layer in layers):
                    limit = f"must be at most encoder.layers={self.encoder.layers}"
                    refuse(f"heads.{name}.{field}", list(layers), limit)
                if layers and of_objective and not self.objective.gives_all_layers:
                    remedy = f"{self.objective.name} has its last layer alone; set heads.{name}.input=whole"
                    refuse(f"heads.{name}.{field}", list(layers), remedy)
            if of_objective and self.balance.measures and not self.objective.gives_own_output:
                remedy = (
                    f"cannot separate the gradient of {self.objective.name} from that of heads.{name}, which reads its "
                    f"pass; set heads.{name}.input=whole, or balance.name=fixed and balance.measure=false"
                )
                if self.balance.name == "gradnorm":
                    refuse("balance.name", self.balance.name, remedy)
                refuse("balance.measure", self.balance.measure, remedy)

    def _refuse_supernet(self) -> None:
        """Refuses engines and data with which the subnets of objective.elastic cannot be trained."""
        if self.data.micro_batches < 3:
            remedy = "objective.elastic needs 3 or more: for the largest subnet, the smallest and a drawn one"
            refuse("data.micro_batches", self.data.micro_batches, remedy)
        if self.engine.name in ("federated", "meta"):
            remedy = "objective.elastic needs the micro-batches of an update in one process; take torch or deepspeed"
            refuse("engine.name", self.engine.name, remedy)
        if self.objective.varies_depth and self.engine.name == "deepspeed" and self.engine.zero_stage > 1:
            remedy = "reduces gradients block by block on all ranks, and objective.elastic.blocks differ; take 0 or 1"
            refuse("engine.zero_stage", self.engine.zero_stage, remedy)
        if self.tune.name != "full":
            refuse("tune.name", self.tune.name, "leaves weights as they are; a supernet (objective.elastic) needs full")

    def _check_meta(self) -> None:
        """Refuses tasks that a run with engine.name=meta lacks or cannot differentiate twice, and random layers."""
        meta, tasks = self.engine.meta, ["objective"] * self.objective.has_loss + sorted(self.heads)
        if not self.data.episodes.label:
            remedy = "engine.name=meta adapts to episodes; set it to the label of segments that is their class"
            refuse("data.episodes.label", "", remedy)
        for field, name in (("inner", meta.inner), ("outer", meta.outer_task)):
            if name not in tasks:
                refuse(f"engine.meta.{field}", name, f"must be one of the run's tasks: {', '.join(tasks)}")
        if meta.second_order and meta.inner in self.heads and not self.heads[meta.inner].twice_differentiable:
            remedy = f"the loss of {self.heads[meta.inner].name} has no second derivative; set fomaml, reptile or foblo"
            refuse("engine.meta.method", meta.method, remedy)
        if self.balance.name != "fixed" or self.balance.measure:
            refuse("balance.name", self.balance.name, "engine.name=meta has one loss; set fixed and measure=false")
        parts = {"frontend": self.frontend, "encoder": self.encoder, "objective": self.objective}
        for part, values in {**parts, **{f"heads.{name}": head for name, head in self.heads.items()}}.items():
            require_smooth(part, dump(values))

    def cautions(self) -> list[str]:
        """Returns warnings about settings that are valid but probably not intended, one sentence each."""
        found = []
        if self.schedule.warmup_steps > self.train.steps:
            found.append(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is longer than train.steps={self.train.steps}: "
                "the learning rate never reaches optimizer.lr"
            )
        if self.engine.compile:
            found.append(
                "engine.compile=true: the first update of each batch shape waits for the compiler, together 1 to 5 "
                "minutes; compiled code is kept for later starts (TORCHINDUCTOR_CACHE_DIR)"
            )
        averaged = self.engine.name == "federated" and self.engine.federated.rule in ("fedavg", "fedprox")
        if averaged and self.optimizer.lr < 0.1:
            found.append(
                f"optimizer.lr={self.optimizer.lr:g} is the server's step under "
                f"engine.federated.rule={self.engine.federated.rule}: 1 takes the mean of the devices' weights"
            )
        return found + self.objective.cautions(self.train.steps)
