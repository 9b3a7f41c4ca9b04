"""Tuned weights alone: small, of one base, and the same run again with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.schema import ConfigError
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.checkpointing.tuned import write_tuned
from pretrain.checkpointing.weights import MODEL, load_checkpoint, merged
from pretrain.interop.hf_export import export
from pretrain.interop.init_weights import load_initial
from pretrain.train_module import build_model
from tests.support import training

STEP = 2


def tuned_run(base: Path, folder: Path, **tune: Any) -> Path:
    """Tunes a run for two steps; returns its checkpoint."""
    settings = training.config(STEP, init=str(base), tune=tune)
    training.save(folder, STEP, init=str(base), tune=tune)
    module = build_model(settings)
    load_initial(settings, module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return rewritten(find_checkpoint(str(folder)), module)


def rewritten(checkpoint: Path, module: torch.nn.Module) -> Path:
    """Gives a checkpoint the weights of a module."""
    save_tensors({name: weight.clone() for name, weight in module.state_dict().items()}, checkpoint / MODEL)
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"][MODEL] = sha256_of(checkpoint / MODEL)
    (checkpoint / "state.json").write_text(json.dumps(state))
    return checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "base"
    training.save(folder, 4)
    return find_checkpoint(str(folder))


@pytest.mark.parametrize("way", ["prompt", "lora", "adapter", "bias", "head"])
def test_tuned_weights_are_few_and_give_the_run_again(base: Path, tmp_path: Path, way: str) -> None:
    checkpoint = tuned_run(base, tmp_path / "run", name=way)
    write_tuned(checkpoint, tmp_path / "tuned")
    whole, again = load_checkpoint(checkpoint).module, load_checkpoint(tmp_path / "tuned").module
    theirs = again.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in whole.state_dict().items())
    assert (tmp_path / "tuned" / MODEL).stat().st_size < 0.7 * (checkpoint / MODEL).stat().st_size
    settings = training.config(STEP, init=str(tmp_path / "tuned"), tune={"name": way})
    continued = build_model(settings)
    load_initial(settings, continued)
    assert all(torch.equal(w, theirs[f"model.{n}"]) for n, w in continued.model.state_dict().items())


def test_another_base_is_refused_by_both_checksums(base: Path, tmp_path: Path) -> None:
    write_tuned(tuned_run(base, tmp_path / "run", name="lora"), tmp_path / "tuned")
    training.save(tmp_path / "other", 4, seed=1)
    other, state = find_checkpoint(str(tmp_path / "other")), tmp_path / "tuned" / "state.json"
    values = json.loads(state.read_text())
    state.write_text(json.dumps(values | {"base": values["base"] | {"checkpoint": str(other)}}))
    with pytest.raises(ConfigError, match="was tuned on a base with sha256") as refused:
        load_checkpoint(tmp_path / "tuned")
    theirs = json.loads((other / "state.json").read_text())["sha256"][MODEL]
    assert values["base"]["sha256"][:12] in str(refused.value)
    assert theirs[:12] in str(refused.value)
    assert "base.checkpoint" in str(refused.value)
    state.write_text(json.dumps(values | {"base": values["base"] | {"checkpoint": str(tmp_path / "gone")}}))
    with pytest.raises(ConfigError, match="its base cannot be read"):
        load_checkpoint(tmp_path / "tuned")


def test_what_has_no_base_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.name=full"):
        write_tuned(base, tmp_path / "tuned")
    training.save(tmp_path / "foreign", STEP, seed=3, init=str(base), tune={"name": "lora"})
    with pytest.raises(ConfigError, match="is not the base of"):
        write_tuned(find_checkpoint(str(tmp_path / "foreign")), tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_lora_is_merged_where_a_run_starts_from_it_and_prompts_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    lora, prompt = (tuned_run(base, tmp_path / way, name=way) for way in ("lora", "prompt"))
    plain = training.config(STEP, init=str(lora))
    module = build_model(plain)
    load_initial(plain, module)
    expected = merged(load_checkpoint(lora))
    assert expected.config.tune.name == "full"
    theirs = expected.module.model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in module.model.state_dict().items())
    for given in (
        training.config(STEP, init=str(prompt)),
        training.config(STEP, init=str(prompt), tune={"name": "lora"}),
    ):
        with pytest.raises(ConfigError, match=r"has weights of tune\.name=prompt"):
            load_initial(given, build_model(given))
    found = load_checkpoint(prompt)
    with pytest.raises(ConfigError, match=r"tune\.name=prompt"):
        export(found.config, found.module, tmp_path / "hub")
