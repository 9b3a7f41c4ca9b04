"""ABX error rates against fastabx, cell by cell; fastabx/make.py writes the reference fastabx/cells.json."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate import abx, fastabx_cells

CELLS = Path(__file__).resolve().parent / "fastabx" / "cells.json"
RNG = np.random.default_rng(0)


def reference() -> tuple[list[abx.Token], dict[str, list[dict[str, object]]]]:
    values = json.loads(CELLS.read_text())
    tokens = [(phone, speaker, np.array(x)) for phone, speaker, x in values.pop("tokens")]
    return tokens, values


@pytest.mark.parametrize("library", ["own", "fastabx"])
@pytest.mark.parametrize("name", ["within", "across"])
def test_every_cell_equals_that_of_fastabx(name: str, library: str) -> None:
    tokens, theirs = reference()
    if library == "fastabx":
        pytest.importorskip("fastabx")
    ours = (abx.cells if library == "own" else fastabx_cells.cells)(tokens, name == "across", others=2)
    expected = {
        (cell["phone"], cell["phone_b"], cell["speaker"], cell.get("speaker_x", cell["speaker"])): cell["score"]
        for cell in theirs[name]
    }
    found = {(cell.phone, cell.against, cell.speaker, cell.other): cell.error for cell in ours}
    assert len(expected) == {"within": 27, "across": 72}[name]
    assert found == pytest.approx(expected, abs=1e-6)


def test_alignment_ignores_tempo() -> None:
    x, same, other = np.eye(8)[[0, 1, 2, 3]], np.eye(8)[[0, 0, 1, 2, 2, 2, 3]], np.eye(8)[[4, 5, 6]]
    assert abx.distances([x], [same, other], np.array([[0, 0], [0, 1]])) == pytest.approx([0.0, 0.5], abs=1e-6)


@pytest.mark.parametrize("across", [False, True])
def test_separable_features_have_no_errors_and_random_ones_half(across: bool) -> None:
    def cells(informed: float) -> list[abx.Cell]:
        centres = np.eye(16)[:4]
        tokens = [
            (f"p{p}", f"s{s}", informed * centres[p] + RNG.normal(0, 0.1, (4, 16)))
            for p in range(4)
            for s in range(5)
            for _ in range(5)
        ]
        return abx.cells(tokens, across)

    assert abx.error(cells(1.0)).value < 0.01
    guessing = abx.error(cells(0.0), 200)
    assert guessing.value == pytest.approx(0.5, abs=0.1)
    assert guessing.low < guessing.value < guessing.high


def test_phone_pairs_have_equal_weights_and_so_have_speakers_within_a_pair() -> None:
    cells = [abx.Cell("a", "b", "s", "s", 0.0), abx.Cell("a", "b", "t", "t", 0.4), abx.Cell("b", "a", "s", "s", 0.6)]
    assert abx.error(cells).value == pytest.approx((0.2 + 0.6) / 2)


def test_thinning_limits_the_tokens_per_phone_and_speaker() -> None:
    tokens: list[abx.Token] = [(phone, speaker, np.ones((2, 2))) for phone in "ab" for speaker in "st"] * 5
    assert len(abx.thinned(tokens, 3)) == 12


def test_speech_without_a_triple_is_refused() -> None:
    with pytest.raises(ValueError, match="no triple"):
        abx.cells([("a", "s", np.ones((2, 2)))], across=False)


def test_fastabx_is_optional_and_named_where_it_is_missing() -> None:
    if importlib.util.find_spec("fastabx"):
        pytest.skip("fastabx is installed")
    with pytest.raises(ConfigError, match=r"abx=fastabx: needs the package fastabx, on Python 3.12.*abx=own"):
        fastabx_cells.cells([("a", "s", np.ones((2, 2)))], across=False)
