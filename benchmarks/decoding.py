"""Beam search of the attention decoder beside `generate` of transformers with the same weights and memory.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py [--json benchmarks/results/decoding_cpu.json]

Both write the same number of tokens, so that they run the same number of decoder steps; the end mark is never likely.
Above 1: ours is faster. Joint search also scores CTC prefixes, which transformers cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.inference.joint_decoding import JointConfig, joint_search
from pretrain.interfaces.models import Memory
from pretrain.models.decoders.transformer import DecoderConfig, TransformerDecoder
from pretrain.profiling.processor import model_name

DIM, VOCABULARY, FRAMES, TOKENS, BEAM, ROUNDS = 512, 5000, 375, 60, 8, 5
END, START = VOCABULARY, VOCABULARY + 1
NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "cross.query": "encoder_attn.q_proj",
    "cross.key": "encoder_attn.k_proj",
    "cross.value": "encoder_attn.v_proj",
    "cross.out": "encoder_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_in": "fc1",
    "ffn_out": "fc2",
}
"""Names of a block's weights in transformers' WhisperDecoderLayer; its keys have no bias, which changes nothing."""


def decoders() -> tuple[TransformerDecoder, Any]:
    """Returns our decoder of Whisper base's size, with random weights, and transformers' with the same."""
    import transformers

    torch.manual_seed(0)
    config = DecoderConfig(layers=6, heads=8, ffn_dim=2048, dropout=0.0)
    ours = TransformerDecoder(config, dim=DIM, tokens=VOCABULARY + 2, classes=VOCABULARY + 2).eval()
    ours.out.weight.data.mul_(3)  # a sharper choice of tokens, as in a trained model
    ours.out.weight.data[[END, START]] *= 0
    ours.out.bias.data.zero_()
    settings = transformers.WhisperConfig(
        vocab_size=VOCABULARY + 2, d_model=DIM, decoder_layers=6, decoder_attention_heads=8, decoder_ffn_dim=2048,
        encoder_layers=1, encoder_attention_heads=8, encoder_ffn_dim=64, max_source_positions=FRAMES,
        max_target_positions=config.max_tokens, pad_token_id=END, bos_token_id=START, eos_token_id=END,
        decoder_start_token_id=START, tie_word_embeddings=False, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    theirs = transformers.WhisperForConditionalGeneration(settings).eval()
    state = {"embed_tokens.weight": ours.embedding.weight, "embed_positions.weight": ours.positions.weight}
    state |= {f"layer_norm.{name}": weight for name, weight in ours.norm.state_dict().items()}
    for name, weight in ours.blocks.state_dict().items():
        number, _, rest = name.partition(".")
        part, _, kind = rest.rpartition(".")
        parts = zip(("key", "value"), weight.chunk(2), strict=True) if part.endswith("key_value") else [("", weight)]
        for half, values in parts:
            renamed = NAMES[part.replace("key_value", half)]
            if (renamed.rpartition(".")[2], kind) != ("k_proj", "bias"):
                state[f"layers.{number}.{renamed}.{kind}"] = values
    theirs.model.decoder.load_state_dict(state)
    theirs.proj_out.weight.data.copy_(ours.out.weight)
    return ours, theirs


def fastest(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each, the best of several alternating rounds."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def measure(beam: int) -> dict[str, Any]:
    """Times a search of `beam` hypotheses both ways, and with CTC."""
    from transformers.generation import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    ours, theirs = decoders()
    memory = Memory(torch.randn(1, FRAMES, DIM), torch.tensor([FRAMES]))
    log_probs_FV = (4 * torch.randn(FRAMES, VOCABULARY + 1)).log_softmax(-1)
    seconds = (TOKENS - 1) / 25 + 1e-6  # gives TOKENS as the longest text
    alone = JointConfig(beam=beam, ctc_weight=0.0, bonus=1e6)  # the longest text wins
    joint = JointConfig(beam=beam, bonus=1e6)
    found: dict[str, list[int]] = {}

    def search(name: str, config: JointConfig, ctc: torch.Tensor | None) -> None:
        found[name] = joint_search(ours, [memory], ctc, vocabulary=VOCABULARY, seconds=seconds, config=config).tokens

    def generate() -> None:
        with torch.inference_mode():
            written = GenerationMixin.generate(
                theirs, encoder_outputs=BaseModelOutput(memory.x_BMD), decoder_input_ids=torch.tensor([[START]]),
                num_beams=beam, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, use_cache=True,
            )  # fmt: skip
        found["transformers"] = written[0, 1:].tolist()

    works = {
        "attention": lambda: search("attention", alone, None),
        "transformers": generate,
        "joint": lambda: search("joint", joint, log_probs_FV),
    }
    times = fastest(works)
    same = sum(one == other for one, other in zip(found["attention"], found["transformers"], strict=True))
    return {
        "beam": beam, "tokens": TOKENS, "equal_tokens": same,
        **{f"{name}_s": round(value, 4) for name, value in times.items()},
        "times_transformers": round(times["transformers"] / times["attention"], 2),
        "joint_times_transformers": round(times["transformers"] / times["joint"], 2),
    }  # fmt: skip


def main() -> None:
    """Prints a row per beam, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [measure(beam) for beam in (1, BEAM)]
    import transformers

    found = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/decoding.py",
        "machine": f"{model_name()}, {torch.get_num_threads()} thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": f"6 blocks of {DIM}, {VOCABULARY} tokens, {FRAMES} frames of memory",
        "rows": rows,
    }
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
