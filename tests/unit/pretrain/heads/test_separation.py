"""The head that separates mixtures: silent parts, rows without a partner, the waveform loss, refused configs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch
from data_pipeline.loader.held_out import HeldOut
from launch.workers.build import require_fitting_labels
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.heads.separation import BandMagnitudes, Separation, magnitude_costs
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring.batch_dump import load_batches, save_batches
from pretrain.train_module import TrainModule
from tests.support.contract_cases import SEPARATION, batch, labelled, make
from tests.support.training import config, run

CTX = StepContext(seed=3, step=5)


def module_of(**fields: Any) -> TrainModule:
    return make("none", heads={"apart": SEPARATION | fields}).eval()


def head_of(module: TrainModule) -> Separation:
    head = module.heads["apart"]
    assert isinstance(head, Separation)
    return head


def measured(module: TrainModule, data: Batch, step: int = 5) -> dict[str, tuple[float, float]]:
    ctx = dataclasses.replace(CTX, step=step)
    plan = module.prepare(data, ctx)
    _, metrics = module(data, plan, plan.counts_K, ctx)
    return {name: (float(total), float(count)) for name, (total, count) in metrics.items()}


def test_a_row_without_a_partner_is_left_out_and_counted() -> None:
    found = measured(module_of(), labelled(batch(), ("go on", "")))
    assert found["loss/apart"][1] == 2
    assert found["metric/apart/infeasible"] == (1, 2)


def test_a_silent_part_is_a_target_and_its_improvement_is_not_counted() -> None:
    data = labelled(batch())
    assert data.sources_BST is not None
    data.sources_BST[1, 0], data.sources_BST[1, 1] = data.wave_BT[1], 0
    for fields in ({}, {"waveform_from": 0}):
        found = measured(module_of(**fields), data)
        assert found["loss/apart"][1] == 4
        assert found["metric/apart/si_snr_improvement"][1] == 2
        assert all(total == total for total, _ in found.values())


def test_rows_that_are_not_mixed_can_be_left_out() -> None:
    data = labelled(batch())
    assert data.sources_BST is not None
    alone = dataclasses.replace(data, sources_BST=data.sources_BST.clone())
    alone.sources_BST[1, 0], alone.sources_BST[1, 1] = data.wave_BT[1], 0
    module = module_of(unmixed=False)
    found = measured(module, alone)
    assert found["loss/apart"][1] == 2
    assert found["metric/apart/infeasible"] == (0, 2)
    assert found["loss/apart"] == measured(module, labelled(batch(), ("go on", "")))["loss/apart"]


def test_masks_that_know_no_speaker_cost_least_at_the_mean_share() -> None:
    """Absolute errors would cost least at the median: one mask of 1 and one of 0."""
    mixture_BKC = torch.ones(1, 10, 1, dtype=torch.complex64)
    first_K = (torch.arange(10) < 6).to(torch.complex64)
    sources_BSKC = torch.stack([first_K, 1 - first_K])[None, :, :, None]

    def cost(first: float) -> float:
        masks_BSKC = torch.tensor([first, 1 - first])[None, :, None, None].expand(1, 2, 10, 1)
        return float(magnitude_costs(masks_BSKC, mixture_BKC, sources_BSKC)[0].trace())

    assert cost(0.6) == pytest.approx(2 * 0.24)
    assert cost(1.0) == pytest.approx(2 * 0.4)


def test_the_loss_changes_to_waveforms_at_its_update() -> None:
    module, data = module_of(waveform_from=7), labelled(batch())
    early, late = (measured(module, data, step)["loss/apart"][0] for step in (6, 7))
    assert early == measured(module_of(), data)["loss/apart"][0]
    assert late == pytest.approx(measured(module_of(waveform_from=0), data)["loss/apart"][0])
    assert early != late
    assert module.heads["apart"].signed


def test_the_separated_parts_of_a_row_do_not_depend_on_the_batch() -> None:
    module = module_of()
    head = head_of(module)
    both, alone = batch(), batch((0.7,), first_seed=1)
    with torch.no_grad():
        found, expected = (
            head.separate(module.model(data.wave_BT, data.lengths_B), data.wave_BT, data.lengths_B)
            for data in (both, alone)
        )
    length = int(alone.lengths_B[0])
    torch.testing.assert_close(found[1, :, :length], expected[0], rtol=1e-4, atol=1e-6)
    assert not found[1, :, length:].any()


def test_the_first_mixture_of_an_evaluation_can_be_heard() -> None:
    module, data = module_of(), labelled(batch(), ("", "a tool"))
    head = head_of(module)
    measured(module, data)
    assert head.take_media() is None
    head.record_next()
    measured(module.train(), data)
    measured(module.eval(), data)
    measured(module, labelled(batch((0.5, 0.5))))
    media = head.take_media()
    assert media is not None
    assert media.images == {}
    found = media.audio
    assert list(found) == ["mixture", "part_1", "part_2", "estimate_1", "estimate_2"]
    length = int(data.lengths_B[1])
    assert {len(wave_T) for wave_T in found.values()} == {length}
    assert torch.equal(found["mixture"], data.wave_BT[1, :length])


def test_tensorboard_has_the_parts_of_a_held_out_mixture(tmp_path: Path) -> None:
    """At each measurement, and the improvement in dB beside it; no head of a training batch is heard."""
    length = {"steps": 3, "checkpoint_every": 3, "valid_every": 2, "media_every": 100}
    settings = config(heads={"apart": SEPARATION}, train=length, health={"on_collapse": "warn"})
    run(tmp_path, settings, held_out=HeldOut((labelled(batch()),), 1, 2, 1.7))
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"audio": 0}).Reload()
    assert [event.step for event in events.Audio("media/apart/estimate_2")] == [2, 3]
    assert len(events.Tags()["audio"]) == 5
    rows = {row["step"]: row for row in read_rows(tmp_path / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "valid/metric/apart/si_snr_improvement" in row] == [2, 3]


def test_bands_are_single_bins_below_and_500_hz_wide_above() -> None:
    bands = BandMagnitudes(512, 4000.0)
    of_bin = bands.band_of_bin_C.tolist()
    assert of_bin[:128] == list(range(128))
    assert [of_bin.count(band) for band in range(128, bands.number)] == [16] * 8 + [1]


def config_of(sources: int, head: int = 2, **heads: Any) -> Config:
    values = {
        "data": {"shards": "x", "sources": sources, "augment": {"mix_prob": 1.0}},
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "transformer", "dim": 32, "layers": 2, "heads": 2},
        "objective": {"name": "none"},
        "heads": {"apart": SEPARATION | {"sources": head} | heads},
    }
    return load(Config, values)


def test_data_and_head_must_have_fitting_numbers_of_sources() -> None:
    require_fitting_labels(config_of(2))
    require_fitting_labels(config_of(2, head=3))
    for sources, head in ((0, 2), (3, 2)):
        with pytest.raises(ConfigError, match=rf"data\.sources={sources}: heads\.apart separates {head} sources; set"):
            require_fitting_labels(config_of(sources, head))


@pytest.mark.parametrize("balance", ["uncertainty", "dwa"])
def test_balances_of_losses_that_are_positive_refuse_the_waveform_loss(balance: str) -> None:
    values = {"balance": {"name": balance}, "heads": {"apart": SEPARATION | {"waveform_from": 100}}}
    with pytest.raises(
        ConfigError, match=rf"balance\.name=\"{balance}\": heads\.apart has a loss that may be negative"
    ):
        config(**values)
    config(balance={"name": balance}, heads={"apart": SEPARATION})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"hop": 300}, "hop=300: must be at most half of window=512"), ({"window": 255}, "window=255: must be even")],
)
def test_a_spectrogram_that_cannot_be_inverted_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(2, **fields)


def test_a_saved_batch_keeps_its_parts(tmp_path: Path) -> None:
    data = labelled(batch())
    run = RunFolder(tmp_path)
    run.claim()
    kept = save_batches(run, 0, CTX, [data.to("cpu")], "a spike")
    assert kept is not None
    _, [found], _ = load_batches(kept)
    assert data.sources_BST is not None
    assert found.sources_BST is not None
    assert torch.equal(found.sources_BST, data.sources_BST)
