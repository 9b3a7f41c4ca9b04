"""Sets of frame labels as data: which symbols are silence, and which ones count as the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final

from data_pipeline.core.schema import about, config, refuse
from pretrain.evaluate import definitions
from pretrain.evaluate.manifest import Interval

REST: Final = "*"


@config
class LabelSetConfig:
    """A file of conf/label_set."""

    silence: Annotated[tuple[str, ...], about("symbols that count as silence, before folding")] = ()
    fold: Annotated[
        dict[str, str], about("symbol -> the one it counts as; empty: its frames are not used; * stands for all others")
    ] = dataclasses.field(default_factory=dict)
    remove: Annotated[str, about("regular expression removed from symbols first, such as the stress [0-2]$")] = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.remove)
        except re.error as error:
            refuse("remove", self.remove, f"is not a regular expression ({error})")


@dataclass(frozen=True)
class LabelSet:
    """The labels of a task after folding.  silence: those that do not count as speech."""

    config: LabelSetConfig
    silence: frozenset[str]

    def folded(self, symbol: str) -> str | None:
        """Returns the label that a symbol counts as; None if its frames are not used."""
        if self.config.remove:
            symbol = re.sub(self.config.remove, "", symbol)
        label = self.config.fold.get(symbol, self.config.fold.get(REST, symbol))
        return None if label == "" and symbol != "" else label

    def intervals(self, given: Iterable[Interval]) -> list[Interval]:
        """Folds the labels of intervals; those that are not used are left out."""
        labels = ((interval, self.folded(interval.phone)) for interval in given)
        return [Interval(i.start, i.end, label) for i, label in labels if label is not None]


def read(name: str) -> LabelSet:
    """Reads a set of conf/label_set, of a plug-in folder, or a YAML file. Raises ConfigError if it cannot be used."""
    config = definitions.read("label_set", name, LabelSetConfig)
    folded = LabelSet(config, frozenset())
    silence = (folded.folded(symbol) for symbol in config.silence)
    return LabelSet(config, frozenset(label for label in silence if label is not None))
