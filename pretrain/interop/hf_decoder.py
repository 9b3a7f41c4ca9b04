"""The attention decoder of an exported model: transformers' SpeechEncoderDecoderModel with a Blenderbot decoder.

Of the decoders that SpeechEncoderDecoderModel can hold, Blenderbot's has our form: pre-norm blocks with
cross-attention, a norm at the end, none after the embedding, and a table of positions. Its output layer has no bias;
ours is added to the last norm's shift where the output weights allow it exactly.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError, hint
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from pretrain.config import Config
from pretrain.heads import sequence
from pretrain.heads.sequence import Sequence
from pretrain.interfaces.frames import EncoderOutput
from pretrain.models.decoders.transformer import TransformerDecoder
from pretrain.nn.positions import sinusoids
from pretrain.train_module import TrainModule

END, START = "</s>", "<s>"
EXACT = 1e-9
"""Largest error, in double precision, of an output bias that is added to the last norm's shift."""


def sequence_head(config: Config, module: TrainModule, name: str) -> Sequence | None:
    """Returns the attention decoder that is exported; None: none is.

    Args:
        config: of the run.
        module: its modules.
        name: of the head; empty: the only head of a run without a self-supervised loss.

    Raises:
        ConfigError: its form has no counterpart in transformers.
    """
    heads = {key: head for key, head in module.heads.items() if isinstance(head, Sequence)}
    if not name and not config.objective.has_loss and len(module.heads) == 1:
        name = next(iter(heads), "")
    if name not in heads:
        return None
    head, settings = heads[name], config.heads[name]
    assert isinstance(settings, sequence.Config)
    obstacles = []
    last = module.model.encoder.n_layers
    if settings.layers not in ((), (last,)):
        obstacles.append(f"layers={list(settings.layers)} (transformers' decoders read the last layer alone)")
    if settings.memory_layers not in ((), (last,)):
        obstacles.append(f"memory_layers={list(settings.memory_layers)} (they read one memory)")
    if settings.tokens not in config.data.tokens:
        known = config.data.tokens
        obstacles.append(f"tokens={settings.tokens} (data.tokens has none of this name{hint(settings.tokens, known)})")
    if obstacles:
        raise ConfigError(f"heads.{name}.{obstacles[0]}: SpeechEncoderDecoderModel has no such decoder")
    return head


def describe(head: Sequence, encoder: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json of the class with both; `encoder` are the fields of the encoder alone."""
    settings = head.config.decoder
    special = {"eos_token_id": head.end, "pad_token_id": head.end, "decoder_start_token_id": head.start}
    decoder = {
        "model_type": "blenderbot",
        "architectures": ["BlenderbotForCausalLM"],
        "is_decoder": True,
        "is_encoder_decoder": False,
        "add_cross_attention": True,
        "tie_word_embeddings": False,
        "vocab_size": head.config.vocabulary + 2,
        "d_model": head.decoder.embedding.embedding_dim,
        "max_position_embeddings": settings.max_tokens,
        "decoder_layers": settings.layers,
        "encoder_layers": settings.layers,  # what transformers takes as its number of layers
        "decoder_attention_heads": settings.heads,
        "encoder_attention_heads": settings.heads,
        "decoder_ffn_dim": settings.ffn_dim,
        "activation_function": settings.activation,
        "dropout": settings.dropout,
        "attention_dropout": settings.attention_dropout,
        "activation_dropout": 0.0,
        "scale_embedding": False,
        "encoder_no_repeat_ngram_size": 0,
        "forced_eos_token_id": None,
        "bos_token_id": head.start,
        "dtype": "float32",
        **special,
    }
    return {
        "architectures": ["SpeechEncoderDecoderModel"],
        "model_type": "speech-encoder-decoder",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "vocab_size": head.config.vocabulary + 2,
        "encoder": encoder,
        "decoder": decoder,
        "dtype": "float32",
        **special,
    }


def weights(head: Sequence, encoder: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Returns all weights by their names in SpeechEncoderDecoderModel; `encoder` those of its encoder.

    Raises:
        ConfigError: the output layer's bias has no counterpart.
    """
    decoder = head.decoder
    found = {f"encoder.{key}": weight for key, weight in encoder.items()}
    found |= {f"enc_to_dec_proj.{key}": weight for key, weight in head.projections[0].state_dict().items()}
    root = "decoder.model.decoder"
    found[f"{root}.embed_tokens.weight"] = decoder.embedding.weight
    found[f"{root}.embed_positions.weight"] = _positions(decoder)
    for number, block in enumerate(decoder.blocks):
        state, at = block.state_dict(), f"{root}.layers.{number}"
        for ours, theirs in (("attention", "self_attn"), ("cross", "encoder_attn")):
            for kind in ("weight", "bias"):
                key, value = state[f"{ours}.key_value.{kind}"].chunk(2)
                found[f"{at}.{theirs}.q_proj.{kind}"] = state[f"{ours}.query.{kind}"]
                found[f"{at}.{theirs}.k_proj.{kind}"], found[f"{at}.{theirs}.v_proj.{kind}"] = key, value
                found[f"{at}.{theirs}.out_proj.{kind}"] = state[f"{ours}.out.{kind}"]
                found[f"{at}.{theirs}_layer_norm.{kind}"] = state[f"{ours}_norm.{kind}"]
        for ours, theirs in (("ffn_in", "fc1"), ("ffn_out", "fc2"), ("ffn_norm", "final_layer_norm")):
            for kind in ("weight", "bias"):
                found[f"{at}.{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    shift_D = _shift_for_bias(head, name)
    found[f"{root}.layer_norm.weight"] = decoder.norm.weight
    found[f"{root}.layer_norm.bias"] = (decoder.norm.bias.double() + shift_D).float()
    # the start mark, which is never predicted, is a class of theirs; generation_config.json suppresses it
    rows_VD = decoder.out.weight
    found["decoder.lm_head.weight"] = torch.cat([rows_VD, rows_VD.new_zeros(1, rows_VD.shape[1])])
    return found


def _positions(decoder: TransformerDecoder) -> Tensor:
    """Returns the position vectors as a table, (max_tokens, D)."""
    if decoder.positions is not None:
        return decoder.positions.weight
    return sinusoids(torch.arange(decoder.max_tokens), decoder.embedding.embedding_dim)


def _shift_for_bias(head: Sequence, name: str) -> Tensor:
    """Returns what to add to the last norm's shift, (D,) float64, so that the output needs no bias.

    Raises:
        ConfigError: there is no such vector, as with more classes than channels.
    """
    weight_VD = head.decoder.out.weight.detach().double()
    if not head.config.decoder.output_bias:
        return weight_VD.new_zeros(weight_VD.shape[1])
    # a constant in all logits changes no probability
    ones_V1 = weight_VD.new_ones(len(weight_VD), 1)
    wanted_V = head.decoder.out.bias.detach().double()
    solved: Tensor = torch.linalg.lstsq(
        torch.cat([weight_VD, ones_V1], dim=1), wanted_V[:, None], driver="gelsd"
    ).solution
    shift_D, constant = solved[:-1, 0], solved[-1, 0]
    error = float((weight_VD @ shift_D + constant - wanted_V).abs().max())
    if not error <= EXACT:
        raise ConfigError(
            f"heads.{name}.decoder.output_bias=true: transformers' decoder has no output bias, and with "
            f"{len(weight_VD)} classes of {weight_VD.shape[1]} channels it cannot be part of another weight; train "
            f"with heads.{name}.decoder.output_bias=false"
        )
    return shift_D


def vocabulary(config: Config, head: Sequence) -> dict[str, dict[str, Any]]:
    """Returns the files of tokenizer and generation by name, as values of JSON.

    Raises:
        ConfigError: the run's tokens cannot be read, or are phones.
    """
    tokenizer: Tokenizer = load_tokenizer(config.data.tokens[head.config.tokens])
    made = tokenizer.in_library()
    if made is None:
        raise ConfigError(
            f"data.tokens.{head.config.tokens}={config.data.tokens[head.config.tokens]}: phones, which transformers' "
            "tokenizers cannot make of a text; choose a head with characters or byte-pair units"
        )
    made.add_special_tokens([END, START])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": head.decoder.max_tokens,
    }
    generation = {
        "decoder_start_token_id": head.start,
        "bos_token_id": head.start,
        "eos_token_id": head.end,
        "pad_token_id": head.end,
        "suppress_tokens": [head.start],
        "max_length": head.decoder.max_tokens,
    }
    return {
        "tokenizer.json": json.loads(made.to_str()),
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }


@torch.no_grad()
def difference(head: Sequence, theirs: Any, wave_BT: Tensor, encoded: EncoderOutput) -> float:
    """Returns the largest difference of ln p of the next tokens of a random text, without the start mark.

    Args:
        head: the attention decoder, in any precision; it is compared in double precision.
        theirs: transformers' model, in double precision.
        wave_BT: (B, T) audio, as its feature extractor gives it.
        encoded: our encoder's output for the same audio, in double precision.
    """
    exact = copy.deepcopy(head).cpu().double().eval()
    random = torch.Generator().manual_seed(0)
    longest = min(exact.decoder.max_tokens, 16)
    tokens_BN = torch.randint(exact.config.vocabulary, (len(wave_BT), longest), generator=random)
    tokens_BN[:, 0] = exact.start
    log_probs_BNV = exact.decoder(tokens_BN, exact.memories(encoded)).log_softmax(-1)
    logits_BNV = theirs(input_values=wave_BT, decoder_input_ids=tokens_BN).logits[..., : head.end + 1]
    return float((logits_BNV.log_softmax(-1) - log_probs_BNV).abs().max())
