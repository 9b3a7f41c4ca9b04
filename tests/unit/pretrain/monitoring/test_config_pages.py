"""The page of a run's config: fields without a default are shown as well."""

from __future__ import annotations

from data_pipeline.core.schema import load
from pretrain.config import Config
from pretrain.monitoring.config_pages import config_page, differences


def test_fields_without_a_default_are_left_as_they_are() -> None:
    values = {
        "data": {"shards": "none", "tokens": {"text": "tokens"}},
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer"},
        "objective": {"name": "none"},
        "heads": {"text": {"name": "sequence", "vocabulary": 5, "label_smoothing": 0.2}},
    }
    config = load(Config, values)
    found = {path: value for path, _, value in differences(config)}
    assert found == {"data.tokens.text": "tokens", "heads.text.label_smoothing": 0.2}
    assert "heads.text.vocabulary" not in config_page(config).partition("## All fields")[0]
