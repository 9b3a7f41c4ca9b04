"""The transformer decoder against torch's and Whisper's with equal weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pretrain.interfaces.models import Memory
from pretrain.models.decoders.transformer import Block, DecoderConfig, TransformerDecoder
from tests.support.hugging_face import randomize
from tests.support.parity_table import Parity, difference

DIM, TOKENS = 32, 17


def ours(activation: str = "gelu") -> TransformerDecoder:
    config = DecoderConfig(layers=2, heads=4, ffn_dim=64, max_tokens=20, activation=activation)  # type: ignore[arg-type]
    made = TransformerDecoder(config, dim=DIM, tokens=TOKENS, classes=TOKENS).eval()
    randomize(made)
    return made


def block_weights(decoder: TransformerDecoder, names: dict[str, str]) -> Iterator[tuple[int, str, Tensor]]:
    """Yields (block, name of the other implementation, weight); keys and values of an attention are apart."""
    for name, weight in decoder.blocks.state_dict().items():
        number, _, rest = name.partition(".")
        part, _, kind = rest.rpartition(".")
        parts = zip(("key", "value"), weight.chunk(2), strict=True) if part.endswith("key_value") else [("", weight)]
        for half, values in parts:
            yield int(number), f"{names[part.replace('key_value', half)]}.{kind}", values


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, TOKENS, (2, 9), generator=generator), torch.randn(2, 12, DIM, generator=generator)


WHISPER = {
    "attention_norm": "self_attn_layer_norm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.out": "self_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm", "cross.query": "encoder_attn.q_proj", "cross.key": "encoder_attn.k_proj",
    "cross.value": "encoder_attn.v_proj", "cross.out": "encoder_attn.out_proj",
    "ffn_norm": "final_layer_norm", "ffn_in": "fc1", "ffn_out": "fc2",
}  # fmt: skip


def test_the_decoder_equals_that_of_whisper(parity: Parity) -> None:
    """Hidden states and gradients of the memory. Whisper's keys have no bias, which changes no attention weight."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    configuration = transformers.WhisperConfig(
        vocab_size=TOKENS, d_model=DIM, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_target_positions=20, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs, mine = modeling.WhisperDecoder(configuration).eval(), ours()
    state = {f"layers.{number}.{name}": weight for number, name, weight in block_weights(mine, WHISPER)}
    state = {name: weight for name, weight in state.items() if not name.endswith("k_proj.bias")}
    assert mine.positions is not None
    state |= {"embed_tokens.weight": mine.embedding.weight, "embed_positions.weight": mine.positions.weight}
    state |= {f"layer_norm.{name}": weight for name, weight in mine.norm.state_dict().items()}
    theirs.load_state_dict(state)
    read_BN, memory_BMD = inputs()
    memory_BMD.requires_grad_()
    expected = theirs(input_ids=read_BN, encoder_hidden_states=memory_BMD).last_hidden_state
    found = hidden(mine, read_BN, memory_BMD)
    parity("decoder against transformers' WhisperDecoder", 1e-5, difference(found, expected))
    gradients = [torch.autograd.grad(out.square().sum(), memory_BMD)[0] for out in (found, expected)]
    parity("decoder: gradients against transformers' WhisperDecoder", 1e-4, difference(*gradients))


def hidden(decoder: TransformerDecoder, read_BN: Tensor, memory_BMD: Tensor) -> Tensor:
    """Returns the normalised output of the last block."""
    kept: list[Tensor] = []
    handle = decoder.norm.register_forward_hook(lambda module, given, out: kept.append(out))
    decoder(read_BN, [Memory(memory_BMD, torch.full((len(memory_BMD),), memory_BMD.shape[1]))])
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_decoder_equals_that_of_torch(activation: str, parity: Parity) -> None:
    """With padded memories."""
    mine = ours(activation)
    layer = nn.TransformerDecoderLayer(DIM, 4, 64, 0.0, activation, batch_first=True, norm_first=True)
    theirs = nn.TransformerDecoder(layer, 2, nn.LayerNorm(DIM)).eval()
    theirs.norm.load_state_dict(mine.norm.state_dict())  # type: ignore[union-attr]
    for number, block in enumerate(mine.blocks):
        target = theirs.layers[number]
        for attention, other in ((block.attention, target.self_attn), (block.cross, target.multihead_attn)):  # type: ignore[union-attr]
            for kind in ("weight", "bias"):
                joined = torch.cat([getattr(attention.query, kind), getattr(attention.key_value, kind)])
                getattr(other, f"in_proj_{kind}").data.copy_(joined)
            other.out_proj.load_state_dict(attention.out.state_dict())  # type: ignore[union-attr]
        pairs = zip(
            (block.attention_norm, block.cross_norm, block.ffn_norm, block.ffn_in, block.ffn_out),
            (target.norm1, target.norm2, target.norm3, target.linear1, target.linear2),
            strict=True,
        )
        for mine_part, other_part in pairs:
            other_part.load_state_dict(mine_part.state_dict())  # type: ignore[union-attr, arg-type]
    read_BN, memory_BMD = inputs()
    lengths_B = torch.tensor([12, 7])
    assert mine.positions is not None
    embedded = mine.embedding(read_BN) + mine.positions.weight[:9]
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    padding_BM = torch.arange(12)[None] >= lengths_B[:, None]
    expected = theirs(embedded, memory_BMD, tgt_mask=causal, memory_key_padding_mask=padding_BM)
    kept: list[Tensor] = []
    mine.norm.register_forward_hook(lambda module, given, out: kept.append(out))
    mine(read_BN, [Memory(memory_BMD, lengths_B)])
    parity("decoder against torch's TransformerDecoder", 1e-5, difference(kept[0], expected))


def test_cross_attention_over_joined_memories_equals_that_of_speecht5(parity: Parity) -> None:
    """Two memories of different lengths in each row are one sequence of keys with a mask for SpeechT5."""
    modeling = pytest.importorskip("transformers.models.speecht5.modeling_speecht5")
    theirs, generator = modeling.SpeechT5Attention(DIM, 4, is_decoder=True).eval(), torch.Generator().manual_seed(0)
    config = DecoderConfig(layers=1, heads=4, ffn_dim=64, max_tokens=20)
    mine = TransformerDecoder(config, dim=DIM, tokens=TOKENS, classes=TOKENS, memories=2).eval()
    randomize(mine)
    block = mine.blocks[0]
    assert isinstance(block, Block)
    named = {"q_proj": block.cross.query, "out_proj": block.cross.out}
    for name, linear in named.items():
        getattr(theirs, name).load_state_dict(linear.state_dict())
    for number, name in enumerate(("k_proj", "v_proj")):
        halves = {key: value.chunk(2)[number] for key, value in block.cross.key_value.state_dict().items()}
        getattr(theirs, name).load_state_dict(halves)
    parts = [torch.randn(2, width, DIM, generator=generator) for width in (7, 5)]
    memories = [Memory(part, torch.tensor(lengths)) for part, lengths in zip(parts, ([7, 4], [2, 5]), strict=True)]
    x_BND = torch.randn(2, 6, DIM, generator=generator)
    state = mine.start(memories)
    found_BND = block.cross.attend(x_BND, *state.memory[0], state.visible_BM[:, None, None])  # type: ignore[index]
    assert mine.kinds is not None
    seen_BMD = torch.cat(
        [
            (part + kind).masked_fill(~memory.valid_BM()[:, :, None], 0.0)
            for part, kind, memory in zip(parts, mine.kinds.weight, memories, strict=True)
        ],
        dim=1,
    )
    hidden_BM = torch.cat([~memory.valid_BM() for memory in memories], dim=1)
    mask_B1NM = torch.zeros(2, 1, 6, 12).masked_fill(hidden_BM[:, None, None], torch.finfo(torch.float32).min)
    wanted_BND = theirs(x_BND, key_value_states=seen_BMD, attention_mask=mask_B1NM)[0]
    parity("cross-attention over several memories (SpeechT5)", 1e-5, difference(found_BND, wanted_BND))
