"""Base classes of plug-in configs: the properties that other code may use of any plug-in.

A plug-in's `Config` derives from the base class of its kind, adds fields and overrides properties.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from data_pipeline.core.schema import PluginConfig, about, config, refuse


@config
class FrontendConfig(PluginConfig):
    """The config of a front end."""

    @property
    def packable(self) -> bool:
        """Whether utterances can be computed end to end in one row (`engine.packed`)."""
        return True


@config
class EncoderConfig(PluginConfig):
    """The config of an encoder."""

    dim: Annotated[int, about("channels", ge=1)] = 768
    layers: Annotated[int, about("blocks", ge=1)] = 12


@config
class EmbeddingConfig(PluginConfig):
    """The config of an embedding, the input of a tower for something other than audio."""

    @property
    def needed_tokens(self) -> dict[str, int]:
        """The token sets that it reads, among `data.tokens`, and the number of tokens that it is built for."""
        return {}

    @property
    def image_shape(self) -> tuple[int, int]:
        """Side in pixels and channels of the images that it reads, `data.images`; 0, 0: it reads none."""
        return 0, 0


class FrameLabels(NamedTuple):
    """Frame labels that an objective or a head reads from the data, and the fields of its config that choose them."""

    name: str
    """Key in `data.targets`."""
    rate_hz: float
    classes: int
    """Largest number of classes; 0 for any number."""
    name_field: str
    rate_field: str = ""
    """Empty where the rate cannot be chosen."""
    classes_field: str = ""
    """Empty where the number of classes cannot be chosen."""


@config
class ObjectiveConfig(PluginConfig):
    """The config of an objective."""

    @property
    def frame_labels(self) -> FrameLabels | None:
        """The frame labels that the objective needs; None if it computes its targets itself."""
        return None

    @property
    def accepts_frame_labels(self) -> bool:
        """Whether it has the fields labels, label_rate_hz and units, which name frame labels of the data."""
        return False

    @property
    def has_loss(self) -> bool:
        """Whether it has a loss of its own; without one, heads alone learn."""
        return True

    @property
    def freezes(self) -> bool:
        """Whether front end and encoder are left as they are for some updates."""
        return False

    @property
    def gives_all_layers(self) -> bool:
        """Whether heads get every layer of the encoder, and not its last one alone."""
        return True

    @property
    def gives_own_output(self) -> bool:
        """Whether heads get the encoder's output as it is, so that the gradients of both can be separated."""
        return True

    @property
    def supernet(self) -> bool:
        """Whether micro-batches of an update train different subnets of the model."""
        return False

    @property
    def varies_depth(self) -> bool:
        """Whether these subnets have different numbers of blocks."""
        return False

    @property
    def teacher_run(self) -> str:
        """Run or checkpoint whose frozen model teaches this one; "" for none."""
        return ""

    def cautions(self, total_steps: int) -> list[str]:
        """Returns a sentence for each setting that has no effect in a run of `total_steps` steps."""
        return []


@config
class HeadConfig(PluginConfig):
    """The config of a head."""

    weight: Annotated[float, about("weight of its loss relative to the objective's", gt=0)] = 1.0
    warmup: Annotated[
        tuple[int, int],
        about(
            "the weight is 0 up to the first of these steps and rises linearly until the second; 0, 0: whole at once"
        ),
    ] = (0, 0)
    layers: Annotated[
        tuple[int, ...],
        about("encoder layers that it reads, 0 is the encoder's input; several: a learned mix; empty: the last layer"),
    ] = ()
    input: Annotated[
        Literal["objective", "whole"],
        about(
            "objective: the objective's own pass, masked; whole: one further pass without a mask, shared by all heads "
            "that ask for it"
        ),
    ] = "objective"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup[0] <= self.warmup[1]:
            refuse(
                "warmup", list(self.warmup), "must be two steps, the first not after the second, such as 2000, 10000"
            )
        if any(number < 0 for number in self.layers) or len(set(self.layers)) < len(self.layers):
            refuse("layers", list(self.layers), "must be different numbers from 0 on")

    @property
    def layer_fields(self) -> dict[str, tuple[int, ...]]:
        """The fields that name encoder layers, with their values."""
        return {"layers": self.layers}

    @property
    def input_files(self) -> dict[str, str]:
        """The files that the head is built from, by the name of their field."""
        return {}

    @property
    def segment_labels(self) -> tuple[str, ...]:
        """The segment labels that the head needs, among `data.labels`."""
        return ()

    @property
    def needed_tokens(self) -> dict[str, int]:
        """The token sets that the head needs, among `data.tokens`, and the number of tokens that it is built for."""
        return {}

    @property
    def lines_of(self) -> str:
        """Name in `data.tokens` of the tokens by which the head reads `data.lines`; empty: it reads no lines."""
        return ""

    @property
    def image_shapes(self) -> tuple[tuple[int, int], ...]:
        """Sides in pixels and channels of the images that the head reads, `data.images`; empty: it reads none."""
        return ()

    @property
    def frame_labels(self) -> tuple[FrameLabels, ...]:
        """The frame labels that the head needs, among `data.targets`."""
        return ()

    @property
    def signed(self) -> bool:
        """Whether its loss may be negative."""
        return False

    @property
    def twice_differentiable(self) -> bool:
        """Whether its loss has a second derivative, which adaptation by gradients of gradients needs."""
        return True

    @property
    def needed_sources(self) -> int:
        """Number of sources of a mixture that the head separates, `data.sources`; 0: it needs none."""
        return 0


@config
class TextHeadConfig(HeadConfig):
    """The config of a head that writes the text of a segment as symbols, or as tokens of the data, and a blank."""

    label: Annotated[str, about("which label of a segment holds its text", min_length=1)] = "text"
    symbols: Annotated[str, about("characters to write; others are left out", min_length=1)] = (
        " 'abcdefghijklmnopqrstuvwxyz"
    )
    tokens: Annotated[str, about("name in data.tokens of the tokens to write; empty: the characters in symbols")] = ""
    vocabulary: Annotated[int, about("number of these tokens, as `auricle tokens` prints it", ge=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.tokens) != bool(self.vocabulary):
            refuse(
                "vocabulary", self.vocabulary, "the number of tokens goes with their name: set tokens and vocabulary"
            )
        repeated = sorted({symbol for symbol in self.symbols if self.symbols.count(symbol) > 1})
        if repeated:
            refuse("symbols", self.symbols, f"each character once; repeated: {' '.join(map(repr, repeated))}")

    @property
    def twice_differentiable(self) -> bool:
        """False: the sum over alignments has no second derivative, or it is not finite."""
        return False

    @property
    def segment_labels(self) -> tuple[str, ...]:
        """The text, unless the data have its tokens."""
        return () if self.tokens else (self.label,)

    @property
    def needed_tokens(self) -> dict[str, int]:
        """`tokens`."""
        return {self.tokens: self.vocabulary} if self.tokens else {}

    @property
    def symbol_classes(self) -> dict[str, int]:
        """The class of each symbol, from 1 on, since 0 is the blank; empty where tokens are written."""
        return {} if self.tokens else {symbol: number for number, symbol in enumerate(self.symbols, start=1)}

    @property
    def n_classes(self) -> int:
        """Number of classes, with the blank."""
        return (self.vocabulary or len(self.symbol_classes)) + 1


@config
class TuneConfig:
    """Which weights of front end and encoder learn; heads and the objective always do."""

    name: Annotated[
        Literal["full", "head", "bias", "prompt", "lora", "adapter"],
        about(
            "full: all; head: none; bias: the biases (BitFit); prompt: learned frames before each block; lora: "
            "low-rank updates of matrices; adapter: a bottleneck after each feed-forward part"
        ),
    ] = "full"
    prompts: Annotated[int, about("prompt: learned frames before each block", ge=1, le=1024)] = 8
    rank: Annotated[int, about("lora: rank of each update; at most the smaller side of its matrix", ge=1)] = 2
    alpha: Annotated[float, about("lora: an update counts alpha / rank times", gt=0)] = 2.0
    modules: Annotated[
        tuple[str, ...],
        about("lora: linear layers that get an update, by the ends of their names; empty: all of the blocks"),
    ] = ()
    bottleneck: Annotated[int, about("adapter: inner channels", ge=1)] = 16


@config
class BalanceConfig:
    """Factors of the tasks' losses beside their weights."""

    name: Annotated[
        Literal["fixed", "uncertainty", "dwa", "gradnorm"],
        about("fixed: weights alone; uncertainty: 1 / loss; dwa: slower tasks more; gradnorm: equal training rates"),
    ] = "fixed"
    measure: Annotated[
        bool, about("log each task's share of the gradient at the encoder's output; gradnorm does it always")
    ] = False
    smoothing: Annotated[float, about("decay of the mean of each task's loss", ge=0, lt=1)] = 0.99
    window: Annotated[int, about("dwa: updates over which the loss is compared", ge=1, le=10_000)] = 100
    temperature: Annotated[float, about("dwa: temperature of the softmax", gt=0)] = 2.0
    asymmetry: Annotated[float, about("gradnorm: power of the relative training rate", ge=0)] = 1.5
    rate: Annotated[float, about("gradnorm: power of each update's correction", gt=0, le=1)] = 0.1
    largest: Annotated[
        float, about("gradnorm: bound of a factor and of its inverse, before their mean is made 1", gt=1)
    ] = 10.0

    @property
    def measures(self) -> bool:
        """Whether the gradients of tasks are measured."""
        return self.measure or self.name == "gradnorm"
