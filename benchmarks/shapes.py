"""Models of known shapes with random weights: what a forward costs depends on nothing else.

Every shape is a text stack; the vision tower is a token one, since the prompts here are text.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration
from torch import nn
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration


@dataclass(frozen=True)
class Shape:
    """Sizes of a text stack, under the names of its config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 151_936
    tie_word_embeddings: bool = True

    # The last ids of the vocabulary, which no prompt holds.
    @property
    def mask_token_id(self) -> int:
        """Stands for an undecided token."""
        return self.vocab_size - 1

    @property
    def eos_token_id(self) -> int:
        """Ends a response; never chosen, see `fill_weights`."""
        return self.vocab_size - 2

    @property
    def num_prompt_ids(self) -> int:
        """Ids below this one are ordinary tokens."""
        return self.vocab_size - 6


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 16, 128, vocab_size=512),
    # 101 M parameters: 75.5 M in the layers, 25.2 M in the shared embedding of a small vocabulary. With Qwen's own, the
    # head alone would outweigh the layers, which it does in no real model.
    "100m": Shape(768, 12, 12, 4, 64, 2048, vocab_size=32_768),
    "2b": Shape(2048, 28, 16, 8, 128, 6144),
    "4b": Shape(2560, 36, 32, 8, 128, 9728),
    "8b": Shape(4096, 36, 32, 8, 128, 12_288, tie_word_embeddings=False),
}


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> BardVLForConditionalGeneration:
    """A Bard-VL model of a shape, made and filled on its device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = BardVLForConditionalGeneration(BardVLConfig(**config_of(shape)))
    finally:
        torch.set_default_dtype(default)
    fill_weights(model, shape, seed)
    return model.eval()


def config_of(shape: Shape) -> dict[str, Any]:
    """The content of a config.json."""
    sections = {16: [4, 2, 2], 64: [12, 10, 10], 128: [24, 20, 20]}
    text = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "max_position_embeddings": 262_144,
        "rope_theta": 5_000_000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": sections[shape.head_dim], "rope_type": "default"},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": shape.hidden_size,
        "deepstack_visual_indexes": [0],
    }
    visual_ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "mask_token_id": shape.mask_token_id,
        **{name: shape.num_prompt_ids + place for place, name in enumerate(visual_ids)},
    }


@torch.no_grad()
def fill_weights(model: BardVLForConditionalGeneration, shape: Shape, seed: int) -> None:
    """Fill every matrix with noise of variance 1 / inputs.

    With transformers' own, much smaller noise the masked positions of a block are near copies of each other, and
    rounding would decide their order: no two decoders would agree on a token.
    """
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[1:].numel()), generator=generator)
    # A logit of zero is never the largest of hundreds: no response ends early, none holds a visual token.
    model.get_output_embeddings().weight[shape.num_prompt_ids : shape.mask_token_id] = 0


def stock_twin(model: BardVLForConditionalGeneration, attention: str) -> Qwen3VLForConditionalGeneration:
    """transformers' own Qwen3-VL on the same weights, which are shared, with an attention implementation of its own."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        twin = Qwen3VLForConditionalGeneration(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    # Their frequencies are no part of the state.
    twin.model.language_model.rotary_emb = model.model.language_model.rotary_emb
    twin.model.visual = model.model.visual
    twin.tie_weights()
    twin.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    twin.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return twin.eval()


def num_parameters(model: BardVLForConditionalGeneration) -> int:
    """Parameters of the text stack, head included and shared ones once."""
    return sum(parameter.numel() for parameter in _text_parameters(model, with_embedding=True))


def bytes_read_per_forward(model: BardVLForConditionalGeneration) -> int:
    """Bytes of the weights that every forward reads whole: layers and head, not a separate embedding."""
    return sum(
        parameter.numel() * parameter.element_size() for parameter in _text_parameters(model, with_embedding=False)
    )


def _text_parameters(model: BardVLForConditionalGeneration, with_embedding: bool) -> list[nn.Parameter]:
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    layers = [p for p in model.model.language_model.parameters() if p is not embedding and p is not head]
    shared = model.config.text_config.tie_word_embeddings
    return [*layers, head, embedding] if with_embedding and not shared else [*layers, head]
