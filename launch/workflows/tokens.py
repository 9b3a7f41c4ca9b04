"""Tokens of a data set: reads the texts of its shards, then makes the tokens."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from data_pipeline.loader.fetch import read_texts
from data_pipeline.text.artefact import TokensConfig, TokensSummary, make_tokens


def make(config: TokensConfig) -> TokensSummary:
    """Makes the tokens of the texts in `config.shards`; the same texts give the same bytes.

    Raises:
        ConfigError: there are no shards or texts, or the settings do not fit.
        OSError: a shard cannot be read or the output cannot be written.
    """
    try:
        return make_tokens(config, read_texts(config.shards, config.label))
    except FileNotFoundError as error:
        raise ConfigError(f"shards={config.shards}: {error}") from None
