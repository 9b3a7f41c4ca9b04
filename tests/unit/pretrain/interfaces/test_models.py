"""Helpers of the model interfaces: shortest inputs, and states of decoders."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.interfaces.models import DecoderState, shortest_input


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_the_shortest_input_is_the_least_that_gives_the_frames(layers: list[tuple[int, int]], frames: int) -> None:
    """Of convolutions in a row: one sample less gives fewer frames."""

    def lengths(samples_B: torch.Tensor) -> torch.Tensor:
        for kernel, stride in layers:
            samples_B = ((samples_B - kernel) // stride + 1).clamp(min=0)
        return samples_B

    found = shortest_input(lengths, frames)
    assert int(lengths(torch.tensor([found]))) >= frames
    assert int(lengths(torch.tensor([found - 1]))) < frames


def test_rows_of_a_state_are_selected_with_or_without_their_memories() -> None:
    past = tuple((torch.arange(6.0).reshape(3, 1, 2, 1) + n, torch.randn(3, 1, 2, 1)) for n in range(2))
    memory = ((torch.randn(3, 1, 4, 1), torch.randn(3, 1, 4, 1)),)
    state = DecoderState(2, past, memory, torch.tensor([[True], [False], [True]]))
    rows = torch.tensor([2, 0, 2])
    chosen = state.select(rows)
    assert chosen.place == 2
    assert torch.equal(chosen.past[1][0], past[1][0][rows])
    assert torch.equal(chosen.memory[0][1], memory[0][1][rows])
    assert chosen.visible_BM is not None
    assert chosen.visible_BM[:, 0].tolist() == [True, True, True]
    shared = state.select(rows, memory=False)
    assert torch.equal(shared.past[0][0], past[0][0][rows])
    assert shared.memory is memory
