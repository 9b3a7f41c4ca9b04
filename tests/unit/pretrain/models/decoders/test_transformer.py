"""The transformer decoder: one token at a time equals all at once, and padding of memories changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.interfaces.models import Memory
from pretrain.models.decoders.transformer import DecoderConfig, TransformerDecoder
from tests.support.parity_table import Parity

TOKENS = 11


def decoder(memories: int = 1, **values: object) -> TransformerDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(layers=2, heads=4, ffn_dim=64, max_tokens=20, **values)  # type: ignore[arg-type]
    return TransformerDecoder(config, dim=32, tokens=TOKENS + 2, classes=TOKENS + 1, memories=memories).eval()


def memory(frames: int, lengths: list[int], seed: int = 0) -> Memory:
    generator = torch.Generator().manual_seed(seed)
    return Memory(torch.randn(len(lengths), frames, 32, generator=generator), torch.tensor(lengths))


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, TOKENS, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("memories", [1, 2])
def test_steps_equal_the_whole_pass(positions: str, memories: int, parity: Parity) -> None:
    made, read_BN = decoder(memories, positions=positions), tokens(3, 9)
    heard = [memory(12, [12, 7, 0], k) for k in range(memories)]
    expected_BNV, state = made(read_BN, heard), made.start(heard)
    for place in range(9):
        logits_BV, state = made.step(state, read_BN[:, place])
        parity("decoder with a cache = whole pass", 1e-5, float((logits_BV - expected_BNV[:, place]).abs().max()))


def test_selected_rows_continue_their_own_text() -> None:
    made, read_BN = decoder(), tokens(3, 6)
    heard = memory(12, [12, 7, 3])
    state = made.start([heard])
    for place in range(5):
        _, state = made.step(state, read_BN[:, place])
    rows = torch.tensor([2, 0, 2])
    found, _ = made.step(state.select(rows), read_BN[rows, 5])
    torch.testing.assert_close(found, made(read_BN, [heard])[rows, 5], atol=1e-5, rtol=0)


def test_one_memory_serves_all_rows() -> None:
    made, read_BN, heard = decoder(), tokens(4, 5), memory(10, [8])
    repeated = Memory(heard.x_BMD.expand(4, -1, -1), heard.lengths_B.expand(4))
    expected_BNV, state = made(read_BN, [repeated]), made.start([heard])
    for place in range(5):
        logits_BV, state = made.step(state, read_BN[:, place])
        torch.testing.assert_close(logits_BV, expected_BNV[:, place], atol=1e-5, rtol=0)


def test_later_tokens_and_padding_of_memories_change_nothing() -> None:
    made, read_BN, heard = decoder(2), tokens(2, 8), [memory(12, [12, 5], k) for k in range(2)]
    before = made(read_BN, heard)
    changed = read_BN.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % TOKENS
    torch.testing.assert_close(made(changed, heard)[:, :5], before[:, :5], atol=1e-6, rtol=0)
    wider = [Memory(torch.nn.functional.pad(part.x_BMD, (0, 0, 0, 9), value=1e3), part.lengths_B) for part in heard]
    torch.testing.assert_close(made(read_BN, wider), before, atol=1e-5, rtol=0)


def test_memories_differ_by_their_kind() -> None:
    made, read_BN, first, second = decoder(2), tokens(1, 4), memory(6, [6], 0), memory(6, [6], 1)
    with torch.no_grad():
        made.kinds.weight[1] += 1.0  # type: ignore[union-attr]
    assert (made(read_BN, [first, second]) - made(read_BN, [second, first])).abs().max() > 1e-3


def test_a_row_without_frames_is_finite() -> None:
    made = decoder()
    made(tokens(2, 3), [memory(4, [0, 4])]).sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in made.parameters() if weight.grad is not None)
