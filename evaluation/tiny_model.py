"""A Qwen3-VL of 1 to 3 M parameters: its folder as the Hub has it, and its autoregressive training on the scenes.

The autoregressive side is transformers' own class and a plain loop; block diffusion has the package's trainer.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

VOCAB_SIZE = 512
MASK_TOKEN_ID = VOCAB_SIZE - 1  # a row without a tokenizer entry, as in the published checkpoints
NUM_BASE_TOKENS = 480
PICTURE_SIDE = 64  # pixels after the processor: 4 x 4 visual tokens of 16 x 16
# In the order of their ids; all but the last two are special.
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<think>", "</think>"),
)
TOKEN_IDS = {token: NUM_BASE_TOKENS + i for i, token in enumerate(ADDED_TOKENS)}
EOS_TOKEN_ID = TOKEN_IDS["<|im_end|>"]
PAD_TOKEN_ID = TOKEN_IDS["<|endoftext|>"]
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif item.type == 'text' -%}{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Shape:
    """Widths and depths of a tiny model."""

    hidden: int = 128
    layers: int = 6
    intermediate: int = 384
    vision_hidden: int = 64
    vision_layers: int = 2


def write_parent(path: Path, texts: Iterable[str], shape: Shape, seed: int) -> Path:
    """Write a Qwen3-VL folder with random weights and a tokenizer trained on `texts`."""
    config = model_config(shape)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**json.loads(json.dumps(config))))
    # Otherwise where a patch lies is lost in what it shows, and the text takes long to find it.
    torch.nn.init.normal_(model.model.visual.pos_embed.weight)
    model.save_pretrained(path)
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"eos_token_id": EOS_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID})
    write_tokenizer(path, texts)
    write_processor(path)
    return path


def model_config(shape: Shape) -> dict[str, Any]:
    """The content of config.json, in the spelling of the published repositories."""
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": PAD_TOKEN_ID,
        "dtype": "float32",
        "eos_token_id": EOS_TOKEN_ID,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.05,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 1024,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": shape.hidden // 32,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.hidden // 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
        "rope_theta": 10_000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }
    vision = {
        "deepstack_visual_indexes": [0],
        "depth": shape.vision_layers,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": shape.vision_hidden,
        "in_channels": 3,
        "initializer_range": 0.1,
        "intermediate_size": 2 * shape.vision_hidden,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": shape.hidden,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": TOKEN_IDS["<|image_pad|>"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": TOKEN_IDS["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
        "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    }


def write_tokenizer(path: Path, texts: Iterable[str]) -> None:
    """Train a byte-level BPE on `texts` and write its files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=NUM_BASE_TOKENS, initial_alphabet=alphabet, show_progress=False)
    )
    # A small corpus may give fewer merges than asked for: the added tokens keep their ids all the same.
    num_missing = NUM_BASE_TOKENS - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<|unused_{number}|>", normalized=False) for number in range(num_missing)])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special="think" not in t) for t in ADDED_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1024,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(path / "tokenizer_config.json", settings)


def write_processor(path: Path) -> None:
    """Write chat template, image and video settings: every picture becomes about 64 x 64 pixels."""
    pixels = PICTURE_SIDE**2
    vision = {
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": pixels, "shortest_edge": pixels},
    }
    write_json(path / "preprocessor_config.json", {**vision, "image_processor_type": "Qwen2VLImageProcessorFast"})
    video = {**vision, "video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(path / "video_preprocessor_config.json", video)
    write_json(path / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def autoregressive_batch(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Right-padded inputs of Qwen3-VL with labels on the responses, from packing's samples of one picture each."""
    length = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), length)
    batch = {
        "input_ids": torch.full(shape, PAD_TOKEN_ID),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros((3, *shape), dtype=torch.long),
    }
    for row, sample in enumerate(samples):
        size = len(sample.input_ids)
        batch["input_ids"][row, :size] = sample.input_ids
        batch["attention_mask"][row, :size] = 1
        batch["position_ids"][:, row, :size] = sample.position_ids
        for start, end in sample.responses:
            batch["labels"][row, start:end] = sample.input_ids[start:end]
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([sample.visual_inputs[name] for sample in samples])
    return batch


def train_autoregressive(
    model: Qwen3VLForConditionalGeneration,
    samples: Sequence[Any],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Next-token training on the responses, in place: AdamW, warmup, cosine to a tenth; the last steps' mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = min(50, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, warmup, steps))
    order = shuffled(len(samples), seed)
    interval = max(steps // 10, 1)
    recent: list[float] = []
    model.train()
    for step in range(1, steps + 1):
        batch = autoregressive_batch([samples[next(order)] for _ in range(batch_size)])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = [*recent, loss.item()][-interval:]
        if step % interval == 0:
            print(f"autoregressive step {step}: loss {sum(recent) / len(recent):.4f}", flush=True)
    model.eval()
    return sum(recent) / len(recent)


def rate_factor(step: int, warmup: int, steps: int, floor: float = 0.1) -> float:
    """Linear warmup, then cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def shuffled(size: int, seed: int) -> Iterator[int]:
    """The indices below `size` in random order, again and again in another one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(size, generator=generator).tolist()
