"""The inner loop against `higher` (Facebook Research): adapted weights, losses and gradients of the start, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pretrain.engines.inner_loop import descend
from tests.support.parity_table import Parity, difference

higher = pytest.importorskip("higher", reason="needs the package higher, which is no longer maintained")
RATE, STEPS = 0.05, 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)).double()


@pytest.mark.parametrize("second_order", [True, False])
def test_adapted_weights_and_gradients_of_their_start_equal_those_of_higher(second_order: bool, parity: Parity) -> None:
    net, draw = network(), torch.Generator().manual_seed(1)
    x_ND, y_N = torch.randn(20, 6, generator=draw, dtype=torch.float64), torch.arange(20) % 3

    def loss(output_NC: Tensor, part: slice) -> Tensor:
        return nn.functional.cross_entropy(output_NC, y_N[part])

    given, asked = slice(0, 10), slice(10, 20)
    start = dict(net.named_parameters())
    path = descend(
        start,
        lambda weights, step: loss(functional_call(net, weights, (x_ND[given],)), given),
        lambda name, step: torch.tensor(RATE, dtype=torch.float64),
        STEPS,
        second_order,
    )
    ours = loss(functional_call(net, path.weights[-1], (x_ND[asked],)), asked)
    gradients = torch.autograd.grad(ours, list(start.values()))

    theirs = network()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=RATE)
    with higher.innerloop_ctx(theirs, optimizer, copy_initial_weights=False, track_higher_grads=second_order) as (
        adapted,
        inner,
    ):
        for _ in range(STEPS):
            inner.step(loss(adapted(x_ND[given]), given))
        found = loss(adapted(x_ND[asked]), asked)
        by = list(theirs.parameters()) if second_order else list(adapted.parameters())
        expected = torch.autograd.grad(found, by)
    order = "MAML" if second_order else "first-order MAML"
    parity(f"queries' loss after 5 inner steps, fp64: {order} of higher", 1e-9, difference(ours, found))
    for one, other in zip(gradients, expected, strict=True):
        parity(f"gradient of the start through 5 inner steps, fp64: {order} of higher", 1e-9, difference(one, other))
