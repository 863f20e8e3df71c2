"""A Llama in Qwen3-VL's text stack: other modules, the same logits.

Qwen3-VL normalises every query and key, a Llama does not. Heads of twice the size make room to undo that:

1. Dimension i of an old head goes to 2i, in both halves: at even places a head of twice the size has the old rotary
   frequencies.
2. The spare dimensions of queries and keys hold a bias so large that the norm is the same whatever the others hold.
3. The weight of the norm is 0 there. On the other dimensions it undoes the norm, and the larger head's larger divisor.

All of that is exact up to rounding, in bfloat16 too, whose eight digits hold both numbers. Training must leave the four
tensors alone that hold them: `freeze` takes `FROZEN`.
"""

import json
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from ..compat_bard_vl import write_rope

FROZEN = ("*.q_norm.weight", "*.k_norm.weight", "*.q_proj.bias", "*.k_proj.bias")
SPARE = 8448.0  # bias of spare dimensions
UNDO = SPARE * 2**-0.25  # their norm is SPARE / sqrt(2), and queries and keys each make up for 2 ** 0.25
KEPT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "vocab_size", "hidden_act", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "initializer_range"),
)


def text_config(llama: LlamaConfig) -> dict[str, Any]:
    """The settings of a text stack that a Llama's weights fit, in the spelling of the published repositories.

    Raises:
        ValueError: the Llama has biases, or rotary frequencies that are scaled.
    """
    stated = llama.to_dict()
    write_rope(stated)
    scaling = stated.get("rope_scaling") or {}
    if scaling.get("rope_type", "default") != "default":
        raise ValueError(f"rotary frequencies of type {scaling['rope_type']!r} cannot be moved, only default ones")
    for name in ("attention_bias", "mlp_bias"):
        if stated.get(name):
            raise ValueError(f"a Llama with `{name}` cannot be moved")
    size = head_size(llama)
    third = 5 * size // 16  # as in Qwen3-VL: 24, 20 and 20 of 64
    sections = [size - 2 * third, third, third]
    return {name: stated[name] for name in KEPT} | {
        "model_type": "qwen3_vl_text",
        "attention_bias": True,
        "head_dim": 2 * size,
        "rope_theta": stated["rope_theta"],
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": sections, "rope_type": "default"},
        "dtype": "float32",
    }


def head_size(llama: LlamaConfig) -> int:
    """Dimensions of a Llama's heads."""
    return getattr(llama, "head_dim", None) or llama.hidden_size // llama.num_attention_heads


@torch.no_grad()
def move(llama: LlamaForCausalLM, config: dict[str, Any]) -> Qwen3VLForConditionalGeneration:
    """A new Qwen3-VL, float32, whose text stack computes what the Llama does; its vision tower is random.

    Args:
        llama: in float32.
        config: of a Qwen3-VL, with the Llama's `text_config`.
    """
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**json.loads(json.dumps(config)))).float().eval()
    text: Any = model.model.language_model
    source: Any = llama.model
    text.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    text.norm.load_state_dict(source.norm.state_dict())
    for new, old in zip(text.layers, source.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            getattr(new, name).load_state_dict(getattr(old, name).state_dict())
        move_attention(new.self_attn, old.self_attn, head_size(llama.config))
    model.tie_weights()
    if not config["tie_word_embeddings"]:
        model.lm_head.load_state_dict(llama.lm_head.state_dict())
    return model


def move_attention(new: Any, old: Any, size: int) -> None:
    """Copy a layer's attention into heads of twice the `size`."""
    halves = torch.arange(size) // (size // 2), torch.arange(size) % (size // 2)
    used = halves[0] * size + 2 * halves[1]
    new.o_proj.bias.zero_()
    widened = new.o_proj.weight.zero_().view(new.o_proj.out_features, -1, 2 * size)
    widened[:, :, used] = old.o_proj.weight.view(new.o_proj.out_features, -1, size)
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(new, name)
        projection.bias.zero_()
        widened = projection.weight.zero_().view(-1, 2 * size, projection.in_features)
        widened[:, used] = getattr(old, name).weight.view(-1, size, projection.in_features)
    for projection, norm in ((new.q_proj, new.q_norm), (new.k_proj, new.k_norm)):
        bias = projection.bias.view(-1, 2 * size)
        bias.fill_(SPARE)
        bias[:, used] = 0
        norm.weight.zero_()[used] = UNDO
