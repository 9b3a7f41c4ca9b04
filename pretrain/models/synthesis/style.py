"""The style of synthesis: the voice of a recording, and words such as "a child, slow and high".

Words are learned from what is known of each segment: sex and age from labels, pitch and rate of speech as measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError, about, config, hint, refuse
from pretrain.interfaces.frames import Frames
from pretrain.nn.numerics import zero_padding

WORDS: Final[dict[str, tuple[str, ...]]] = {
    "sex m": ("man", "male"),
    "sex f": ("woman", "female", "lady"),
    "boy": ("boy",),
    "girl": ("girl",),
    "age child": ("child", "kid", "young"),
    "age adult": ("adult", "grown"),
    "pitch low": ("low", "deep"),
    "pitch medium": ("medium", "ordinary"),
    "pitch high": ("high", "bright"),
    "rate slow": ("slow", "slowly"),
    "rate medium": ("steady", "moderate"),
    "rate fast": ("fast", "quick", "quickly"),
}
"""The words of each class."""
NEEDLESS: Final = frozenset(
    "a an the and or with in of at who is voice voiced speaker speech speaks speaking pitch pitched rate tone".split()  # noqa: SIM905
)
"""Words of a style that say nothing."""
VOCABULARY: Final = tuple(word for words in WORDS.values() for word in words)
IDS: Final = {word: number for number, word in enumerate(VOCABULARY)}
CHILD_YEARS: Final = 14
"""An age in years below this is a child's."""
SEXES: Final = {"m": "m", "male": "m", "man": "m", "f": "f", "female": "f", "woman": "f"}
AGES: Final = {"child": "child", "kid": "child", "adult": "adult"}


@config
class StyleWordsConfig:
    """How segments are described by words."""

    sex: Annotated[str, about("name in data.labels of m or f; empty: not described")] = "sex"
    age: Annotated[str, about("name in data.labels of child or adult, or years; empty: not described")] = "age"
    pitch_hz: Annotated[
        tuple[float, float],
        about("mean F0: below the first is low, from the second on high; thirds of the data are good"),
    ] = (140.0, 220.0)
    tokens_per_second: Annotated[
        tuple[float, float], about("below the first is slow, from the second on fast; thirds of the data are good")
    ] = (8.0, 12.0)
    named: Annotated[float, about("share of a segment's known classes that are named in training", gt=0, le=1)] = 0.7
    dim: Annotated[int, about("channels of a word", ge=1)] = 32

    def __post_init__(self) -> None:
        for name in ("pitch_hz", "tokens_per_second"):
            bounds = getattr(self, name)
            if not 0 < bounds[0] <= bounds[1]:
                refuse(name, list(bounds), "must be two positive numbers, the smaller one first")


class Measured(NamedTuple):
    """What is known of one segment; "" and 0 where it is not.  f0_hz: mean.  rate: tokens per second."""

    sex: str
    age: str
    f0_hz: float
    rate: float


def classes_of(found: Measured, config: StyleWordsConfig) -> list[str]:
    """Returns the classes of `WORDS` that describe a segment."""
    sex, age = SEXES.get(found.sex.lower(), ""), AGES.get(found.age.lower(), "")
    if found.age.isdecimal():
        age = "child" if int(found.age) < CHILD_YEARS else "adult"
    made = [f"{name} {value}" for name, value in (("sex", sex), ("age", age)) if value]
    if sex and age == "child":
        made[0] = "boy" if sex == "m" else "girl"
    for name, value, bounds, levels in (
        ("pitch", found.f0_hz, config.pitch_hz, ("low", "medium", "high")),
        ("rate", found.rate, config.tokens_per_second, ("slow", "medium", "fast")),
    ):
        if value > 0:
            made.append(f"{name} {levels[sum(value >= bound for bound in bounds)]}")
    return made


def described(found: Measured, config: StyleWordsConfig, rng: np.random.Generator | None) -> list[int]:
    """Returns the ids of words that describe a segment.

    Args:
        found: what is known of it.
        config: bounds, and the share of classes that are named.
        rng: draws which classes are named, and by which words; None: all, by their first word.
    """
    ids = []
    for name in classes_of(found, config):
        words = WORDS[name]
        if rng is None:
            ids.append(IDS[words[0]])
            continue
        kept, place = rng.random(2)
        if kept < config.named:
            ids.append(IDS[words[int(place * len(words))]])
    return ids


def words_of(text: str) -> tuple[int, ...]:
    """Returns the ids of the words of a style.

    Raises:
        ConfigError: it has a word that is not known, or none that says anything.
    """
    words = re.findall(r"[^\W_]+", text.lower())
    for word in words:
        if word not in IDS and word not in NEEDLESS:
            raise ConfigError(
                f"style={text!r}: the word {word!r} is not known{hint(word, VOCABULARY)}; these are: "
                f"{', '.join(VOCABULARY)}"
            )
    found = tuple(IDS[word] for word in words if word in IDS)
    if not found:
        raise ConfigError(f"style={text!r}: says nothing; the words are {', '.join(VOCABULARY)}")
    return found


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Returns ids of words, (B, W) int64 with W at least 1, padded with -1."""
    ids_BW = torch.full((len(rows), max([1, *map(len, rows)])), -1)
    for row, ids in enumerate(rows):
        ids_BW[row, : len(ids)] = torch.tensor(list(ids), dtype=torch.int64)
    return ids_BW


class StyleWords(nn.Module):
    """One vector for each row's words; their order does not matter. Rows without words have zeros."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.vectors, self.out = nn.Embedding(len(VOCABULARY), dim), nn.Linear(dim, out_dim, bias=False)

    def forward(self, ids_BW: Tensor) -> Tensor:
        """Returns (B, out_dim) of ids (B, W), padded with -1."""
        vectors_BWD: Tensor = self.vectors(ids_BW.clamp(min=0))
        out_BD: Tensor = self.out(torch.tanh(vectors_BWD.masked_fill((ids_BW < 0)[:, :, None], 0.0).sum(1)))
        return out_BD


class Style(nn.Module):
    """One vector for each row's voice: a learned one, plus what the encoder's mean frame adds through few channels."""

    def __init__(self, dim: int, style_dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(dim, style_dim), nn.Linear(style_dim, out_dim)

    def forward(self, frames: Frames, styled_B: Tensor) -> Tensor:
        """Returns (B, out_dim); rows where `styled_B` is False get the learned voice alone."""
        count_B1 = frames.lengths_B.to(frames.x_BFD.device).clamp(min=1)[:, None]
        mean_BD = zero_padding(frames.x_BFD, frames.lengths_B).sum(1) / count_B1
        style_BS = torch.tanh(self.reduce(mean_BD)) * styled_B[:, None]
        out: Tensor = self.expand(style_BS)
        return out
