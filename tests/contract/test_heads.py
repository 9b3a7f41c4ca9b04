"""Contract of every head, on every front end and encoder; new heads are tested automatically."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch, Images
from pretrain import registry
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Head, Sum
from pretrain.train_module import TrainModule
from tests.support.contract_cases import (
    CASES,
    ENCODERS,
    FRONTENDS,
    HEADS,
    SELF_SUPERVISED,
    TEXTS,
    batch,
    labelled,
    make,
)

PAIRS = [*itertools.zip_longest(FRONTENDS, ENCODERS, fillvalue="transformer"), ("multiscale", "u_shape")]
EVERY = pytest.mark.parametrize(("head", "frontend", "encoder"), [(head, *pair) for head in HEADS for pair in PAIRS])
HEAD = pytest.mark.parametrize("head", HEADS)
CTX = StepContext(seed=3, step=5)


def module_of(head: str, frontend: str = "log_mel", encoder: str = "transformer", **more: str) -> TrainModule:
    return make("none", frontend, encoder, heads={"task": HEADS[head]}, **more)


def head_config(head: str) -> HeadConfig:
    config: HeadConfig = load(registry.config_type("heads", HEADS[head]["name"]), HEADS[head])
    return config


def run(module: TrainModule, data: Batch, counts: Tensor | None = None) -> tuple[Tensor, dict[str, Sum]]:
    torch.manual_seed(17)
    plan = module.prepare(data, CTX)
    out: tuple[Tensor, dict[str, Sum]] = module(data, plan, plan.counts_K if counts is None else counts, CTX)
    return out


def couples(module: TrainModule) -> frozenset[str]:
    (head,) = module.heads.values()
    return head.couples | module.model.frontend.couples | module.model.encoder.couples


def first_row(data: Batch) -> Batch:
    length = int(data.lengths_B[0])
    return dataclasses.replace(
        data,
        wave_BT=data.wave_BT[:1, :length],
        lengths_B=data.lengths_B[:1],
        keys=data.keys[:1],
        targets={name: units[:1] for name, units in data.targets.items()},
        labels={name: values[:1] for name, values in data.labels.items()},
        tokens={name: ids[:1] for name, ids in data.tokens.items()},
        images={name: Images(*(part[:1] for part in images)) for name, images in data.images.items()},
        sources_BST=None if data.sources_BST is None else data.sources_BST[:1, :, :length],
    )


@EVERY
def test_the_plan_counts_what_the_loss_counts(head: str, frontend: str, encoder: str) -> None:
    module = module_of(head, frontend, encoder).eval()
    for data in (labelled(batch()), labelled(batch(), ("", TEXTS[1])), labelled(batch(), ("", ""))):
        counted = module.prepare(data, CTX).counts_K[1]
        assert float(run(module, data)[1]["loss/task"][1]) == float(counted)


@EVERY
def test_rows_without_a_label_change_nothing(head: str, frontend: str, encoder: str) -> None:
    module = module_of(head, frontend, encoder).eval()
    if head in SELF_SUPERVISED:
        pytest.skip("every row has a target")
    if "batch" in couples(module):
        pytest.skip("declared: samples are coupled")
    alone, metrics = run(module, first_row(labelled(batch((1.0, 0.7)))))
    beside, joined = run(module, labelled(batch((1.0, 0.7)), (TEXTS[0], "")))
    torch.testing.assert_close(beside, alone, rtol=2e-5, atol=1e-6)
    assert joined["loss/task"][1] == metrics["loss/task"][1]


@EVERY
def test_without_any_label_loss_and_gradients_are_zero_and_not_missing(head: str, frontend: str, encoder: str) -> None:
    module = module_of(head, frontend, encoder)
    unlabelled = [] if head in SELF_SUPERVISED else [labelled(batch(), ("", ""))]
    for data in (*unlabelled, labelled(batch()).emptied(9)):
        module.zero_grad()
        loss, metrics = run(module, data)
        assert float(loss.detach()) == 0.0
        assert float(metrics["loss/task"][1]) == 0.0
        loss.backward()
        weights = dict(module.heads.named_parameters())
        assert [name for name, weight in weights.items() if weight.grad is None] == []
        assert max(float(weight.grad.abs().max()) for weight in weights.values()) == 0.0
        assert all(float(total) == float(total) for total, _ in (metrics["loss/task"],))


@EVERY
def test_padding_never_changes_the_loss(head: str, frontend: str, encoder: str) -> None:
    module = module_of(head, frontend, encoder).eval()
    if "padding" in couples(module):
        pytest.skip("declared: depends on padding")
    narrow, wide = run(module, labelled(batch())), run(module, labelled(batch(width=1.4)))
    torch.testing.assert_close(wide[0], narrow[0], rtol=2e-5, atol=1e-6)


@EVERY
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(head: str, frontend: str, encoder: str) -> None:
    module = module_of(head, frontend, encoder).eval()
    if "batch" in couples(module):
        pytest.skip("declared: samples are coupled")
    whole = labelled(batch())
    counts = module.prepare(whole, CTX).counts_K
    parts = []
    for row in range(2):
        one = labelled(batch((1.0, 0.7)[row : row + 1], first_seed=row), TEXTS[row : row + 1])
        parts.append(run(module, one, counts)[0])
    torch.testing.assert_close(sum(parts), run(module, whole)[0], rtol=2e-5, atol=1e-6)


@HEAD
def test_equal_step_contexts_give_equal_bits(head: str) -> None:
    module = module_of(head)
    assert torch.equal(run(module, labelled(batch()))[0], run(module, labelled(batch()))[0])


@EVERY
def test_gradients_reach_every_weight_of_head_and_encoder(head: str, frontend: str, encoder: str) -> None:
    module = module_of(head, frontend, encoder)
    run(module, labelled(batch()))[0].backward()
    read = [max(layers) for layers in head_config(head).layer_fields.values() if layers]
    unread = tuple(f"model.encoder.blocks.{number}." for number in range(max(read), 9)) if read else ()
    without = [
        name
        for name, weight in module.named_parameters()
        if weight.requires_grad and (weight.grad is None or not weight.grad.abs().max() > 0)
        if not name.startswith(unread)
    ]
    assert [name for name in without if name.startswith("heads.")] == []
    assert len(without) < 0.2 * len(list(module.parameters()))


@HEAD
def test_a_single_batch_can_be_overfitted(head: str) -> None:
    module = module_of(head)
    optimizer = torch.optim.AdamW(module.parameters(), 5e-3)
    losses = []
    for _ in range(40):
        loss, _ = run(module, labelled(batch()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@HEAD
def test_the_metric_of_unusable_rows_is_in_every_micro_batch(head: str) -> None:
    module = module_of(head).eval()
    named = module.infeasible_metrics()
    assert set(named) == (set() if head in SELF_SUPERVISED else {"task"})
    for texts in (TEXTS, ("", "")):
        metrics = run(module, labelled(batch(), texts))[1]
        # a row without parts is a mixture that found no partner
        labelled_rows = len(texts) if HEADS[head]["name"] == "separation" else sum(map(bool, texts))
        assert [float(metrics[name][1]) for name in named.values()] == [labelled_rows] * len(named)


@HEAD
def test_the_loss_in_bf16_is_close_to_that_in_fp32(head: str) -> None:
    loss, _ = run(module_of(head).eval(), labelled(batch()))
    half, _ = run(module_of(head, precision="bf16").eval(), labelled(batch()))
    assert float(half.detach()) == pytest.approx(float(loss.detach()), rel=3e-2)


@HEAD
def test_the_state_of_a_head_gives_another_module_the_same_loss(head: str) -> None:
    one, other = (make("none", heads={"task": HEADS[head]}, seed=seed).eval() for seed in (0, 1))
    other.load_state_dict(one.state_dict())
    assert torch.equal(run(one, labelled(batch()))[0], run(other, labelled(batch()))[0])


@HEAD
def test_packed_rows_give_the_same_loss(head: str) -> None:
    module = module_of(head, "waveform_conv").eval()
    plain = run(module, labelled(batch()))[0]
    module.model.frontend.packed = module.model.encoder.packed = True
    torch.testing.assert_close(run(module, labelled(batch()))[0], plain, rtol=2e-5, atol=1e-6)


@HEAD
@pytest.mark.parametrize("objective", CASES)
def test_every_objective_trains_beside_a_head_with_an_unchanged_loss(head: str, objective: str) -> None:
    data = labelled(batch())
    alone = make(objective).eval()
    beside = make(objective, heads={"task": HEADS[head] | {"input": "whole"}}).eval()
    missing = beside.load_state_dict(alone.state_dict(), strict=False)
    assert not missing.unexpected_keys
    loss, metrics = run(beside, data)
    assert float(run(alone, data)[1]["loss/objective"][0]) == float(metrics["loss/objective"][0])
    assert float(metrics["loss/task"][1]) > 0
    assert torch.isfinite(loss)


@pytest.mark.parametrize("head", [name for name in HEADS if name not in SELF_SUPERVISED])
def test_the_whole_pass_computes_rows_with_a_target_alone(head: str) -> None:
    module = make("best_rq", heads={"task": HEADS[head] | {"input": "whole"}, "other": HEADS["ctc"]}).eval()
    if "batch" in module.heads["task"].couples:
        pytest.skip("declared: samples are coupled")
    computed: list[int] = []
    module.model.encoder.register_forward_hook(lambda _, given, out: computed.append(len(out.lengths_B)))
    data = labelled(batch((0.6, 1.0, 0.7)), ("", TEXTS[0], ""))
    beside = run(module, data)[1]["loss/task"]
    assert computed == [3, 1]
    alone = run(module, first_row(labelled(batch((1.0,), first_seed=1), TEXTS[:1])))[1]["loss/task"]
    torch.testing.assert_close(beside[0], alone[0], rtol=2e-5, atol=1e-6)
    assert beside[1] == alone[1] > 0
    computed.clear()
    loss, _ = run(module.train(), labelled(batch(), ("", "")))
    loss.backward()
    assert computed == [2, 1], "one row keeps the ranks alike"
    assert all(weight.grad is not None for weight in module.heads.parameters())


def test_the_weight_of_a_head_rises_during_its_warm_up() -> None:
    module = make("none", heads={"task": HEADS["ctc"] | {"weight": 0.5, "warmup": [10, 20]}})
    head = module.heads["task"]
    assert isinstance(head, Head)
    assert [head.weight_at(step) for step in (0, 10, 15, 20, 30)] == [0.0, 0.0, 0.25, 0.5, 0.5]


def test_a_text_that_does_not_fit_its_frames_is_no_target_and_is_counted() -> None:
    module = module_of("ctc").eval()
    frames = int(module.model.frontend.frame_lengths(torch.tensor([11_200])))
    fitting, too_long = "ab" * (frames // 2), "ab" * frames
    data = labelled(batch(), ("go on", too_long))
    assert int(module.prepare(data, CTX).counts_K[1]) == len("go on")
    metrics = run(module, data)[1]
    assert tuple(map(float, metrics["metric/task/infeasible"])) == (1.0, 2.0)
    assert int(module.prepare(labelled(batch(), ("go on", fitting)), CTX).counts_K[1]) == len("go on") + len(fitting)


def test_a_transducer_leaves_out_texts_whose_lattice_would_be_too_large() -> None:
    made = make("none", heads={"task": HEADS["transducer"] | {"max_tokens": 5}}).eval()
    data = labelled(batch(), ("go on", "a longer text"))
    assert int(made.prepare(data, CTX).counts_K[1]) == len("go on")
    metrics = run(made, data)[1]
    assert tuple(map(float, metrics["metric/task/infeasible"])) == (1.0, 2.0)
    assert float(metrics["loss/task"][1]) == len("go on")


@pytest.mark.parametrize("head", ["ctc", "transducer"])
def test_symbols_outside_the_alphabet_are_counted(head: str) -> None:
    module = module_of(head).eval()
    metrics = run(module, labelled(batch(), ("nä 3", "ok")))[1]
    assert tuple(map(float, metrics["metric/task/foreign_symbols"])) == (2.0, 6.0)


def test_a_segment_of_an_unknown_class_is_no_target_and_is_counted() -> None:
    module = module_of("classifier").eval()
    data = dataclasses.replace(batch(), labels={"speaker": ("zoe", "bob")})
    assert int(module.prepare(data, CTX).counts_K[1]) == 1
    metrics = run(module, data)[1]
    for name in ("unknown_classes", "infeasible"):
        assert tuple(map(float, metrics[f"metric/task/{name}"])) == (1.0, 2.0)


def test_a_reconstruction_of_masked_frames_counts_them_and_no_others() -> None:
    masked = {"task": {"name": "reconstruction", "frames": "masked", "n_mels": 20}}
    module = make("best_rq", heads=masked).eval()
    plan = module.prepare(labelled(batch()), CTX)
    assert int(plan.counts_K[1]) == int(plan.counts_K[0]) * 20 * 4
    assert float(run(module, labelled(batch()))[1]["loss/task"][1]) == float(plan.counts_K[1])
    with pytest.raises(ConfigError, match="frames=all"):
        make("none", heads=masked).prepare(batch(), CTX)


@pytest.mark.parametrize("head", ["ctc", "transducer"])
def test_a_repeated_symbol_is_refused(head: str) -> None:
    with pytest.raises(ConfigError, match=r"symbols=.*aab.*'a'"):
        make("none", heads={"task": HEADS[head] | {"symbols": "aab"}})
