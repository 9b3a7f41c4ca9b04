"""Words of a style: what describes a segment, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.models.synthesis.style import (
    VOCABULARY,
    Measured,
    StyleWords,
    StyleWordsConfig,
    classes_of,
    described,
    padded,
    words_of,
)

CONFIG = StyleWordsConfig(pitch_hz=(140.0, 220.0), tokens_per_second=(8.0, 12.0))


@pytest.mark.parametrize(
    ("found", "classes"),
    [
        (Measured("m", "adult", 100.0, 5.0), ["sex m", "age adult", "pitch low", "rate slow"]),
        (Measured("Female", "35", 220.0, 12.0), ["sex f", "age adult", "pitch high", "rate fast"]),
        (Measured("f", "9", 150.0, 9.0), ["girl", "age child", "pitch medium", "rate medium"]),
        (Measured("", "child", 0.0, 0.0), ["age child"]),
        (Measured("unknown", "old", 0.0, 0.0), []),
    ],
)
def test_what_is_known_of_a_segment_becomes_classes(found: Measured, classes: list[str]) -> None:
    assert classes_of(found, CONFIG) == classes


def test_drawn_words_describe_the_segment_and_name_a_share_of_it() -> None:
    found = Measured("m", "adult", 100.0, 5.0)
    rows = [described(found, CONFIG, np.random.default_rng(seed)) for seed in range(300)]
    words = {VOCABULARY[number] for row in rows for number in row}
    assert words == {"man", "male", "adult", "grown", "low", "deep", "slow", "slowly"}
    assert sum(map(len, rows)) / (4 * len(rows)) == pytest.approx(CONFIG.named, abs=0.05)
    assert [VOCABULARY[number] for number in described(found, CONFIG, None)] == ["man", "adult", "low", "slow"]


def test_a_style_is_read_in_any_order_and_unknown_words_are_refused() -> None:
    assert sorted(words_of("A child, slow and high!")) == sorted(words_of("high, slow child"))
    with pytest.raises(ConfigError, match=r"the word 'slwo' is not known \(did you mean slow\?\); these are: man"):
        words_of("slwo")
    with pytest.raises(ConfigError, match="says nothing"):
        words_of("a voice")


def test_rows_without_words_have_no_style_and_order_does_not_matter() -> None:
    torch.manual_seed(0)
    made = StyleWords(8, 6)(padded([[], [1, 4], [4, 1], [1]]))
    assert not made[0].any()
    torch.testing.assert_close(made[1], made[2])
    assert not torch.equal(made[1], made[3])


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="pitch_hz"):
        StyleWordsConfig(pitch_hz=(220.0, 140.0))
