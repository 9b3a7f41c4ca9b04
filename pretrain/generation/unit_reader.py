"""Texts of recordings by a trained head `units` with direction=units_to_text: recording to units to text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.labels.unit_labels import UnitLabeller, open_labeller
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpointing.head_choice import checkpoint_with_heads, chosen_device, chosen_head
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.stored import read_state
from pretrain.checkpointing.token_sets import require_same_tokens
from pretrain.checkpointing.weights import load_checkpoint
from pretrain.generation.units import read_units
from pretrain.heads.units import Units
from pretrain.inference.sampling import Sampling
from pretrain.nn.unit_runs import runs_of

MOST_PROBABLE = Sampling(temperature=0.0)


@dataclass(frozen=True)
class UnitReader:
    """A head in evaluation mode that writes text of units, without a prompt, and what labels recordings with units."""

    head: Units
    tokenizer: Tokenizer
    label: UnitLabeller
    name: str

    def read(self, wave_T: np.ndarray, sampling: Sampling = MOST_PROBABLE) -> tuple[list[str], float]:
        """Returns the symbols of a recording's text, and the mean of their ln p.

        Args:
            wave_T: (T,) samples at 16 kHz.
            sampling: the draws.

        Raises:
            ConfigError: it has more units than the head was trained with.
            NoEndError: the end mark was not written.
        """
        labels_F = self.label(wave_T)
        if not len(labels_F):
            return [], 0.0
        runs = runs_of(torch.from_numpy(labels_F)[None])
        written, log_prob = read_units(self.head, runs.ids_BN[0].tolist(), sampling)
        return [self.tokenizer.decode([number]) for number in written], log_prob

    def text(self, wave_T: np.ndarray, sampling: Sampling = MOST_PROBABLE) -> str:
        """Returns the text of a recording; arguments and errors as of `read`."""
        return "".join(self.read(wave_T, sampling)[0])


def reads_units(given: str, head: str = "") -> bool:
    """Returns whether a run writes texts by a head `units`, of that name where one is given, and by no other kind.

    Args:
        given: run folder (its newest checkpoint) or checkpoint.
        head: name of the head; empty: any.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    try:
        folder = find_checkpoint(given)
    except ConfigError:  # whatever opens it says so, or knows an earlier layout
        return False
    if not (folder / "state.json").is_file():
        return False
    heads = read_state(folder)["config"].get("heads") or {}
    if head:
        return bool(heads.get(head, {}).get("name") == "units")
    names = {values.get("name") for values in heads.values()}
    return "units" in names and not names & {"ctc", "transducer", "sequence"}


def open_reader(given: str, head: str = "", device: str = "cpu") -> UnitReader:
    """Loads a run with a head that writes text of units.

    Args:
        given: run folder (its newest checkpoint) or checkpoint.
        head: name of the head; empty: the only one of its kind.
        device: torch device, or "auto".

    Raises:
        ConfigError: there is no such checkpoint or head, or its tokens or units are not those of training.
        ValueError: the checkpoint is damaged; names the file and the remedy.
    """
    device, folder = chosen_device(device), checkpoint_with_heads(given)
    module, config, _ = load_checkpoint(folder)
    remedy = "train one with heads.NAME.name=units and direction=units_to_text"
    name, chosen = chosen_head(
        given, module, config, kind=Units, head=head, described="that reads units", remedy=remedy
    )
    if chosen.config.speaks:
        raise ConfigError(f"checkpoint={given}: head {name} writes units; {remedy}")
    require_same_tokens(folder, config, chosen.config.tokens)
    tokenizer = load_tokenizer(config.data.tokens[chosen.config.tokens])
    label = open_labeller(str(config.data.targets[chosen.config.levels[0]]))
    return UnitReader(chosen.eval().to(device), tokenizer, label, config.name)
