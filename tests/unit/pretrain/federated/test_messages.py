"""Messages of a federated round: what is sent arrives, and what does not fit is refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.federated.messages import RefusedError, RoundRequest, Schema, decode, encode, read_request

REQUEST = RoundRequest(
    run="run", kind="gradient", step=3, attempt=1, seed=7, counts_K=torch.tensor([8.0]).double(), device_lr=0.125
)
SCHEMA = Schema({"a": torch.Size([2]), "b": torch.Size([1, 3])}, tasks=1, max_norm=10.0)
UPDATE = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5, 0.0, 4.0]])}
COUNTS = torch.tensor([8.0]).double()


def tensors(**changed: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of a fitting answer, some of them changed; names with a dot for a slash."""
    sent, _ = decode(REQUEST.answer("d1", COUNTS, loss=2.5, update=UPDATE).encoded())
    return sent | {name.replace(".", "/"): tensor for name, tensor in changed.items()}


def answered(sent: dict[str, Tensor], **fields: Any) -> bytes:
    named = {"run": "run", "kind": "gradient", "step": 3, "attempt": 1, "device": "d1"}
    return encode(sent, named | fields)


def test_a_request_arrives_as_it_was_sent() -> None:
    sent = replace(REQUEST, tensors={"model/a": torch.arange(2.0)}, local_steps=4, proximal=0.01)
    found = read_request(sent.encoded())
    assert torch.equal(found.tensors["model/a"], torch.arange(2.0))
    assert found.counts_K is not None
    assert torch.equal(found.counts_K, COUNTS)
    assert replace(found, tensors={}, counts_K=None) == replace(sent, tensors={}, counts_K=None)


def test_an_answer_arrives_with_its_sums_and_counts() -> None:
    shared = torch.tensor(4.0)  # two metrics with one count
    totals = {"hist": [torch.tensor([1.0, 2.0]), shared], "loss": [torch.tensor(3.0), shared]}
    message = REQUEST.answer("d1", COUNTS, loss=2.5, update=UPDATE, totals=totals).encoded()
    found = SCHEMA.read(message, "d1", REQUEST)
    assert (found.device, found.step, found.attempt, found.loss) == ("d1", 3, 1, 2.5)
    assert all(torch.equal(found.update[name], UPDATE[name]) for name in UPDATE)
    assert {name: (total.tolist(), float(count)) for name, (total, count) in found.totals.items()} == {
        "hist": ([1.0, 2.0], 4.0),
        "loss": ([3.0], 4.0),
    }


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (answered(tensors(), device="d2"), "device is 'd2'"),
        (answered(tensors(), run="another"), "run is 'another'"),
        (answered(tensors(), step=2), "late: it answers step 2"),
        (answered(tensors(), attempt=0), "late: it answers attempt 0"),
        (answered(tensors(**{"update.a": torch.zeros(3)})), r"update/a has shape \[3\]"),
        (answered(tensors(**{"update.a": torch.zeros(2).half()})), "update/a .*float16"),
        (answered(tensors(**{"update.a": torch.tensor([torch.nan, 0.0])})), "update/a has values that are not finite"),
        (answered(tensors(**{"update.a": torch.full((2,), 9.0)})), "max_norm=10"),
        (answered(tensors(counts_K=torch.tensor([-1.0]).double())), "negative counts"),
        (answered(tensors(counts_K=torch.tensor([2.0]).double())), "norm 18.4"),  # per target, as in the global loss
        (answered(tensors(more=torch.zeros(1))), "'more' that is not part"),
        (answered({name: tensor for name, tensor in tensors().items() if name != "loss"}), "lacks loss"),
        (b"\x00" * (SCHEMA.max_bytes + 1), "bytes, and at most"),
        (b"\xff" * 50, "not a message in safetensors"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(message: bytes, reason: str) -> None:
    assert SCHEMA.read(answered(tensors()), "d1", REQUEST).device == "d1"
    with pytest.raises(RefusedError, match=reason):
        SCHEMA.read(message, "d1", REQUEST)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"kind": "weights"}, "'weights', which is not known"), ({"kind": "counts", "step": "x"}, "not a request")],
)
def test_a_request_that_is_none_is_refused(fields: dict[str, Any], reason: str) -> None:
    given = {"run": "r", "step": 0, "attempt": 0, "seed": 0, "local_steps": 1, "device_lr": 0, "proximal": 0}
    with pytest.raises(RefusedError, match=reason):
        read_request(encode({}, given | fields))
