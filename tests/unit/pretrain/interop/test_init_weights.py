"""Initialising a run from another run: equal weights, or a refusal that names a weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import ConfigError, dump, load
from data_pipeline.text.tokenizer import load_tokenizer, write_tokens
from launch.commands.replay import model_at
from pretrain.config import Config
from pretrain.interop.init_weights import load_initial
from pretrain.train_module import build_model
from tests.support.checkpoint_states import write_run


def config(**encoder: Any) -> Config:
    small = {"name": "transformer", "dim": 16, "layers": 2, "heads": 2, "ffn_dim": 16, "positions": "rope"}
    values = {
        "frontend": {"name": "log_mel"},
        "encoder": small | encoder,
        "objective": {"name": "best_rq", "n_codes": 8},
    }
    return load(Config, values | {"data": {"shards": "none"}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Makes a run folder with one checkpoint."""
    write_run(tmp_path, config(), build_model(config()))
    return tmp_path


def start(run: Path, **encoder: Any) -> Any:
    described = dataclasses.replace(config(**encoder), init=str(run), seed=1)
    module = build_model(described)
    load_initial(described, module)
    return module


def test_all_weights_are_loaded(run: Path) -> None:
    """This includes those of the same objective."""
    module, source = start(run, dropout=0.3, attention="chunked"), build_model(config())
    for name, weight in source.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight), name


def test_a_replay_before_the_first_checkpoint_uses_the_initial_weights(run: Path, tmp_path: Path) -> None:
    described = dataclasses.replace(config(), init=str(run), seed=1)
    module, source = model_at(described, tmp_path / "diverged", 3)
    assert source == f"step 0 (from {run})"
    for name, weight in build_model(config()).state_dict().items():
        assert torch.equal(module.state_dict()[name], weight), name


def test_another_objective_starts_with_random_weights(run: Path) -> None:
    described = dataclasses.replace(config(), init=str(run), seed=1)
    described = dataclasses.replace(described, objective=dataclasses.replace(described.objective, n_codes=9))
    module = build_model(described)
    fresh = {name: weight.clone() for name, weight in module.objective.state_dict().items()}
    load_initial(described, module)
    assert all(torch.equal(weight, fresh[name]) for name, weight in module.objective.state_dict().items())


@pytest.mark.parametrize(
    ("there", "taken"), [({"weight": 0.5}, True), ({"symbols": " abcdefghijklmnopqrstuvwxyz"}, False)]
)
def test_a_head_is_loaded_where_name_and_task_agree(tmp_path: Path, there: dict[str, Any], taken: bool) -> None:
    def with_head(**fields: Any) -> Config:
        values = {"heads": {"text": {"name": "ctc", "symbols": " 'abcdefghijklmnopqrstuvwxy"} | fields}}
        return load(Config, dump(config()) | values)

    source = build_model(with_head(**there))
    write_run(tmp_path, with_head(**there), source)
    described = dataclasses.replace(with_head(), init=str(tmp_path), seed=1)
    module = build_model(described)
    report = load_initial(described, module)
    weight = "heads.text.linear.weight"
    assert torch.equal(module.state_dict()[weight], source.state_dict()[weight]) == taken
    assert (weight in report.heads, weight in report.made, weight in report.left) == (taken, not taken, not taken)


@pytest.mark.parametrize(("symbols", "taken"), [("ab", True), ("ba", False)])
def test_a_head_of_other_tokens_starts_anew(tmp_path: Path, symbols: str, taken: bool) -> None:
    def with_tokens(symbols: str) -> Config:
        made = {"kind": "characters", "label": "text", "case": "lower", "symbols": list(symbols)}
        write_tokens(str(tmp_path / symbols), made)
        data = {"shards": "none", "tokens": {"text": str(tmp_path / symbols)}}
        heads = {"text": {"name": "ctc", "tokens": "text", "vocabulary": 2}}
        return load(Config, dump(config()) | {"data": data, "heads": heads})

    theirs = with_tokens("ab")
    write_run(tmp_path, theirs, build_model(theirs), tokens={"text": load_tokenizer(str(tmp_path / "ab")).sha256})
    described = dataclasses.replace(with_tokens(symbols), init=str(tmp_path), seed=1)
    report = load_initial(described, build_model(described))
    assert ("heads.text.linear.weight" in report.heads) == taken


def test_fields_of_positions_that_are_not_used_may_differ(run: Path) -> None:
    expected, found = build_model(config()), start(run, conv_positions_kernel=19, conv_positions_depth=2)
    load_initial(dataclasses.replace(config(), init=str(run)), expected)
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(weight, found.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ({"layers": 3}, "encoder.layers=3 here and 2 there; to match it, add encoder.layers=2"),
        ({"dim": 32}, "encoder.dim=32 here and 16 there"),
        ({"heads": 4}, "encoder.heads=4 here and 2 there"),
        ({"norm": "pre"}, "encoder.norm=pre here and post there"),
        ({"positions": "none"}, "encoder.positions=none here and rope there"),
        (
            {"name": "conformer"},
            "encoder.name=conformer here and transformer there; to match it, add encoder=transformer",
        ),
        ({"attention": "local_global", "registers": 2}, "missing or have another shape"),
    ],
)
def test_another_model_is_refused(run: Path, encoder: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start(run, **encoder)
