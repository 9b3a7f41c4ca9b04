"""Checksums of a run's tokens in its checkpoints: weights of a head have a meaning with these tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from data_pipeline.text.tokenizer import load_tokenizer
from pretrain.checkpointing.stored import read_state
from pretrain.config import Config


def saved_tokens(folder: Path) -> Mapping[str, str]:
    """Returns the sha256 of each token set of a checkpoint, by its name in data.tokens; empty in older checkpoints."""
    tokens: dict[str, str] = read_state(folder).get("tokens") or {}
    return tokens


def require_same_tokens(folder: Path, config: Config, name: str) -> None:
    """Raises ConfigError if the tokens that a checkpoint was trained with are no longer in their folder.

    Args:
        folder: the checkpoint.
        config: the config saved in it.
        name: of the tokens in data.tokens.
    """
    trained, root = saved_tokens(folder).get(name), config.data.tokens[name]
    found = load_tokenizer(root).sha256
    if trained not in (None, found):
        raise ConfigError(
            f"data.tokens.{name}={root}: its tokens have sha256 {found[:12]}…, and {folder} was trained with "
            f"{str(trained)[:12]}…; restore that tokens.json, or make it again with the same `auricle tokens` command"
        )
