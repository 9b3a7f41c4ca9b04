"""Configs of engines whose updates are not gradients of one batch: federated rounds, adaptation to episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from data_pipeline.core.loopback import is_loopback, split_address
from data_pipeline.core.schema import about, config, refuse


def require_loopback(server: str) -> None:
    """Raises an error at the field `server` unless it is HOST:PORT of the loopback."""
    try:
        host, port = split_address(server)
    except ValueError as error:
        refuse("server", server, str(error))
    if not is_loopback(host):
        remedy = (
            f"run `ssh -N -L {port}:127.0.0.1:{port} SERVER` on the device and give server=127.0.0.1:{port}, since "
            "messages are neither encrypted nor signed"
        )
        refuse("server", server, remedy)


@config
class FederatedConfig:
    """Rounds of a federated run (`engine.name=federated`): who takes part, and what devices send."""

    rule: Annotated[
        Literal["gradient", "fedavg", "fedprox", "fedadam"],
        about(
            "gradient: devices send sums of gradients, an update is that of all their audio (FedSGD); other rules: "
            "devices take local steps and send the change of the weights; fedadam updates with it by AdamW",
            resume="fixed",
        ),
    ] = "gradient"
    per_round: Annotated[
        int, about("devices asked in a round, drawn among the connected ones", resume="fixed", ge=1)
    ] = 8
    min_devices: Annotated[int, about("least number of devices that are connected and answer", ge=1)] = 2
    attempts: Annotated[int, about("draws of devices in a round in which too few answer", ge=1)] = 3
    answer_seconds: Annotated[float, about("time in which a device must answer", gt=0)] = 120.0
    wait_seconds: Annotated[float, about("time to wait until min_devices are connected", gt=0)] = 600.0
    transport: Annotated[
        Literal["flower", "ray"],
        about(
            "flower: devices are `auricle device` on their own machines; ray: each subfolder of data.shards is a "
            "device, and its answers are Ray tasks"
        ),
    ] = "flower"
    ray: Annotated[
        str, about("transport=ray: address of a running Ray cluster, or auto; empty: Ray is started here")
    ] = ""
    secure: Annotated[
        bool,
        about(
            "secure aggregation by Flower's SecAgg+: devices clip their updates to the norm clip and mask them for "
            "each other; the server learns the mean of equal weights alone, and no metrics but the loss",
            resume="fixed",
        ),
    ] = False
    noise: Annotated[
        float,
        about(
            "differential privacy of devices: deviation of the noise in the sum of their updates, as a multiple of "
            "clip; 0: none. Updates then have equal weights and are divided by per_round",
            resume="fixed",
            ge=0,
        ),
    ] = 0.0
    clip: Annotated[float, about("with noise or secure: largest norm of a device's update", resume="fixed", gt=0)] = 1.0
    devices: Annotated[
        int, about("with noise: number of devices of which a round samples per_round", resume="fixed", ge=0)
    ] = 0
    epsilon: Annotated[float, about("with noise: budget; the run ends before it is spent", gt=0)] = 8.0
    delta: Annotated[float, about("with noise: δ of the budget, below 1 / devices", resume="fixed", gt=0, lt=1)] = 1e-5
    accountant: Annotated[
        Literal["rdp", "prv"],
        about(
            "with noise: rdp: Rényi accountant, never below what is spent; prv: privacy loss distribution, whose ε is "
            "a sixth to a half lower for the same rounds"
        ),
    ] = "rdp"
    server: Annotated[
        str, about("HOST:PORT of the loopback on which the server listens; other machines reach it by an SSH tunnel")
    ] = "127.0.0.1:9092"
    local_steps: Annotated[
        int,
        about(
            "steps of gradient descent on a device, each on data.batch_seconds / per_round of audio",
            resume="fixed",
            ge=1,
        ),
    ] = 1
    device_lr: Annotated[float, about("learning rate of these steps", resume="fixed", gt=0)] = 0.1
    proximal: Annotated[float, about("fedprox: μ, the pull of local weights to the server's", resume="fixed", ge=0)] = (
        0.01
    )
    max_norm: Annotated[
        float,
        about(
            "answers with a larger norm are left out: of the gradient per target, or of the change of the weights",
            gt=0,
        ),
    ] = 1e6

    @property
    def longest_seconds(self) -> float:
        """Longest duration of a round: all attempts wait for devices, and then for the four exchanges of SecAgg+."""
        return self.attempts * (self.wait_seconds + 4 * self.answer_seconds)

    def __post_init__(self) -> None:
        require_loopback(self.server)
        if self.min_devices > self.per_round:
            refuse("min_devices", self.min_devices, f"must be at most per_round={self.per_round}")
        if self.secure and self.min_devices < 3:
            limit = (
                "must be 3 or more with secure=true: of two devices, each could subtract its own update from the sum"
            )
            refuse("min_devices", self.min_devices, limit)
        if self.secure and self.transport == "ray":
            refuse("transport", self.transport, "cannot be combined with secure=true: tasks have no keys of their own")
        if self.secure and self.noise:
            refuse("noise", self.noise, "cannot be combined with secure=true: the server clips updates that it sees")
        if self.noise and self.devices < self.per_round:
            limit = (
                f"noise needs the number of devices that a sample is drawn from, at least per_round={self.per_round}"
            )
            refuse("devices", self.devices, limit)
        if self.noise and self.delta * self.devices >= 1:
            refuse("delta", self.delta, f"must be below 1 / devices = {1 / self.devices:g}")
        if self.rule == "gradient" and self.local_steps > 1:
            refuse("local_steps", self.local_steps, "rule=gradient takes no local steps; choose fedavg or fedadam")


@config
class MetaConfig:
    """Adaptation of a run with `engine.name=meta`: how weights are adapted to the support of each episode.

    An update moves the weights from which adaptation starts. The names of weights are those of a checkpoint, such as
    model.encoder.blocks.3 or heads.NAME.classes; a name stands for all weights below it.
    """

    method: Annotated[
        Literal["maml", "fomaml", "anil", "reptile", "foblo"],
        about(
            "maml: gradient of the queries' loss through the inner steps; fomaml: without second derivatives; anil: "
            "maml that adapts the inner task's head alone; reptile: towards the adapted weights; foblo: along the "
            "steps of the outer task on the queries after those of the inner task on the support",
            resume="fixed",
        ),
    ] = "maml"
    inner: Annotated[
        str,
        about("task whose loss on the support adapts the weights: objective, or a head by its name", resume="fixed"),
    ] = "objective"
    outer: Annotated[
        str, about("task whose loss on the queries judges the adapted weights; empty: that of inner", resume="fixed")
    ] = ""
    inner_steps: Annotated[int, about("steps of gradient descent on the support", resume="fixed", ge=1)] = 5
    inner_lr: Annotated[float, about("their learning rate, or its initial value", resume="fixed", gt=0)] = 0.01
    learn_lr: Annotated[
        bool, about("learn one rate for each adapted tensor and inner step (maml, fomaml, anil)", resume="fixed")
    ] = False
    multi_step: Annotated[
        int,
        about(
            "updates at the start in which the queries' loss counts after every inner step, with shares that move to "
            "the last step alone; 0: the last step alone (maml, fomaml, anil)",
            resume="fixed",
            ge=0,
        ),
    ] = 0
    outer_steps: Annotated[int, about("foblo: steps of the outer task on the queries", resume="fixed", ge=1)] = 1
    adapt: Annotated[
        tuple[str, ...],
        about("names of the weights that are adapted; empty: all that learn, with anil the inner head", resume="fixed"),
    ] = ()
    reset: Annotated[
        tuple[str, ...],
        about("names of weights that start each episode as zeros, such as heads.NAME.classes", resume="fixed"),
    ] = ()

    @property
    def outer_task(self) -> str:
        """The task of the queries."""
        return self.outer or self.inner

    @property
    def second_order(self) -> bool:
        """Whether an update needs second derivatives."""
        return self.method in ("maml", "anil")

    @property
    def follows_steps(self) -> bool:
        """Whether an update moves along steps of the inner loop, and is not a gradient."""
        return self.method in ("reptile", "foblo")

    def __post_init__(self) -> None:
        if self.follows_steps:
            remedy = f"method={self.method} has no gradient through its steps; set method=maml, fomaml or anil"
            if self.learn_lr:
                refuse("learn_lr", self.learn_lr, remedy)
            if self.multi_step:
                refuse("multi_step", self.multi_step, remedy)
        if self.outer_steps > 1 and self.method != "foblo":
            refuse("outer_steps", self.outer_steps, f"method={self.method} takes none on the queries; set method=foblo")
        if self.method == "anil":
            if self.inner == "objective":
                refuse("inner", self.inner, "method=anil adapts a head; name one, or set method=maml")
            own = f"heads.{self.inner}"
            for name in self.adapt:
                if name != own and not name.startswith(f"{own}."):
                    refuse("adapt", name, f"method=anil adapts weights of {own} alone; set method=maml")


def require_smooth(part: str, values: Mapping[str, Any]) -> None:
    """Refuses dropout and dropped layers: inner steps and queries would have different ones.

    Args:
        part: field of the config that `values` are of.
        values: a plug-in's config as plain values.

    Raises:
        ValidationError: a probability is above 0.
    """
    for field, value in values.items():
        if isinstance(value, Mapping):
            require_smooth(f"{part}.{field}", value)
        elif (field.endswith("dropout") or field in RANDOM_FIELDS) and value:
            refuse(f"{part}.{field}", value, "draws at random inside an adaptation (engine.name=meta); set it to 0")


RANDOM_FIELDS = frozenset({"layer_drop", "stochastic_depth"})
"""Probabilities of plug-ins, beside those whose names end with dropout."""
