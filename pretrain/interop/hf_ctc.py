"""The CTC part of an exported model: config, output layer and vocabulary of transformers' …ForCTC classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data_pipeline.core.schema import ConfigError, hint
from pretrain.config import Config
from pretrain.heads.ctc import CTC
from pretrain.nn.text_targets import BLANK
from pretrain.train_module import TrainModule

PREFIXES = {"wav2vec2": "wav2vec2", "hubert": "hubert", "wavlm": "wavlm", "data2vec-audio": "data2vec_audio"}
"""model_type -> attribute of the encoder in the class with an output layer."""
PAD, SPACE, UNKNOWN = "<pad>", "|", "<unk>"
"""transformers' names of the blank, of the space between words, and of symbols without a number."""


def ctc_head(config: Config, module: TrainModule, name: str = "") -> CTC | None:
    """Returns the CTC head that is exported; None: the encoder alone, or with its objective.

    Args:
        config: of the run.
        module: its modules.
        name: of the head; empty: the only CTC head of a run without a self-supervised loss.

    Raises:
        ConfigError: there is no CTC head of this name, or several.
    """
    heads = {key: head for key, head in module.heads.items() if isinstance(head, CTC)}
    if name and name not in heads:
        has = ", ".join(heads) or "none"
        raise ConfigError(f"--head {name}: the run has no CTC head of this name{hint(name, heads)}; it has: {has}")
    if not name and (config.objective.has_loss or not heads):
        return None
    if not name and len(heads) > 1:
        raise ConfigError(f"the run has the CTC heads {', '.join(heads)}; choose one with --head NAME")
    name = name or next(iter(heads))
    if heads[name].tokens:
        remedy = "the exported vocabulary is made of the head's symbols; train a head without tokens"
        raise ConfigError(f"heads.{name}.tokens={heads[name].tokens}: {remedy}")
    layers = config.heads[name].layers
    if layers not in ((), (module.model.encoder.n_layers,)):
        raise ConfigError(f"heads.{name}.layers={list(layers)}: transformers' classes read the last layer alone")
    return heads[name]


def describe_ctc(head: CTC, described: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.json for the class with an output layer; `described` are those of the encoder."""
    base = described["architectures"][0].removesuffix("Model")
    return {
        "architectures": [f"{base}ForCTC"],
        "vocab_size": len(head.symbols) + 1,
        "pad_token_id": BLANK,
        "bos_token_id": None,
        "eos_token_id": None,
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
        "final_dropout": 0.0,
    }


def ctc_weights(head: CTC, encoder: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Returns the weights by their names in the class with an output layer."""
    named = {f"{PREFIXES[model_type]}.{name}": weight for name, weight in encoder.items()}
    return named | {f"lm_head.{name}": weight for name, weight in head.linear.state_dict().items()}


def vocabulary(symbols: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the tokenizer's files by name, as values of JSON.

    Raises:
        ConfigError: a symbol has a meaning of its own in transformers' tokenizer.
    """
    names = [SPACE if symbol == " " else symbol for symbol in symbols]
    if reserved := [name for name in (PAD, SPACE, UNKNOWN) if name in symbols]:
        raise ConfigError(f"the symbol {reserved[0]!r} has another meaning in transformers' tokenizer; not exported")
    numbers = {PAD: BLANK} | {name: number for number, name in enumerate(names, 1)}
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "bos_token": None,
        "eos_token": None,
        "word_delimiter_token": SPACE,
        "replace_word_delimiter_char": " ",
        "do_lower_case": False,
    }
    return {"vocab.json": numbers, "tokenizer_config.json": settings}
