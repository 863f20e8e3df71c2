"""Tiny Qwen3-VL checkpoints in the Hub's layout, pictures and videos: what the test files share.

The same bytes come out on every transformers line: weights are filled from one generator in the order of their names,
and every JSON file is written here, as the published Qwen3-VL repositories have it.
"""

import base64
import importlib.util
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TokenizerName = Literal["small", "qwen"]

# Qwen3-VL's added tokens in the order of their ids; the first fourteen are special ones.
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
NUM_SPECIAL_TOKENS = 14

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = (
    "A red circle is to the left of the blue square.",
    "How many green triangles are there in the picture? There are three triangles in the picture.",
    "What is the colour of the circle? The colour of the circle is red.",
    "Describe the image. The image shows a yellow star above the black square, and the word bard below the square.",
    "user assistant system The answer is the number of shapes in the picture: one, two, three, four, five seconds.",
)

CHAT_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for item in content -%}
{%- if item.type in ('image', 'image_url') or 'image' in item -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' or 'video' in item -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in item -%}{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}{{- show(message.content) -}}{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class TinyIds:
    """The ids of one tokenizer that tests need, under the names of the configs."""

    vocab_size: int  # embedding rows
    mask_token_id: int  # an embedding row without a tokenizer entry
    pad_token_id: int  # <|endoftext|>
    im_start_token_id: int
    eos_token_id: int  # <|im_end|>
    vision_start_token_id: int
    vision_end_token_id: int
    image_token_id: int
    video_token_id: int

    @classmethod
    def after(cls, num_base_tokens: int, vocab_size: int, mask_token_id: int) -> "TinyIds":
        """Ids where the added tokens follow `num_base_tokens` byte-pair tokens."""
        first = num_base_tokens
        return cls(
            vocab_size, mask_token_id, first, first + 1, first + 2, first + 9, first + 10, first + 12, first + 13
        )


IDS: dict[str, TinyIds] = {
    "small": TinyIds.after(384, vocab_size=448, mask_token_id=447),
    "qwen": TinyIds.after(151_643, vocab_size=151_936, mask_token_id=151_671),
}


def write_qwen3vl(
    path: str | Path,
    *,
    tie_word_embeddings: bool = True,
    tokenizer: TokenizerName = "small",
    seed: int = 0,
    max_shard_size: str | int | None = None,
    dtype: torch.dtype = torch.float32,
    text_config: dict[str, Any] | None = None,
) -> Path:
    """Write a random Qwen3-VL checkpoint folder with every file the Hub repositories have; about 0.3 M parameters.

    `max_shard_size` (bytes, or "100KB") splits the weights into shards with an index; `text_config` overrides single
    settings of the text model.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    path = Path(path)
    config = qwen3vl_config(tie_word_embeddings, tokenizer, dtype, text_config)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**json.loads(json.dumps(config))))
    fill_weights(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size or "5GB")
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", generation_config(IDS[tokenizer]))
    write_processor_files(path, tokenizer)
    return path


def qwen3vl_config(
    tie_word_embeddings: bool = True,
    tokenizer: TokenizerName = "small",
    dtype: torch.dtype = torch.float32,
    text_config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of config.json, in the spelling of the published repositories (`rope_theta` and `rope_scaling`)."""
    ids = IDS[tokenizer]
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": ids.eos_token_id,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        "rope_theta": 5_000_000,
        "tie_word_embeddings": tie_word_embeddings,
        "use_cache": True,
        "vocab_size": ids.vocab_size,
    }
    vision = {
        "deepstack_visual_indexes": [0, 2],
        "depth": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": ids.image_token_id,
        "model_type": "qwen3_vl",
        "text_config": {**text, **(text_config or {})},
        "tie_word_embeddings": tie_word_embeddings,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": ids.video_token_id,
        "vision_config": vision,
        "vision_end_token_id": ids.vision_end_token_id,
        "vision_start_token_id": ids.vision_start_token_id,
    }


def generation_config(ids: TinyIds) -> dict[str, Any]:
    """The content of generation_config.json: sampling defaults and two end ids, as published."""
    return {
        "bos_token_id": ids.pad_token_id,
        "pad_token_id": ids.pad_token_id,
        "do_sample": True,
        "eos_token_id": [ids.eos_token_id, ids.pad_token_id],
        "top_p": 0.8,
        "top_k": 20,
        "temperature": 0.7,
        "repetition_penalty": 1.0,
        "transformers_version": "4.56.0",
    }


@torch.no_grad()
def fill_weights(model: torch.nn.Module, seed: int, scale: float = 0.2) -> None:
    """Fill the parameters in the order of their names; `scale` is large enough for the logits to vary."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = "norm" in name and name.endswith(".weight")
        parameter.copy_(1 + 0.1 * noise if is_norm_weight else scale * noise)


def write_processor_files(path: str | Path, tokenizer: TokenizerName = "small") -> Path:
    """Write tokenizer, chat template, image and video settings, without weights."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tokenizer_files(tokenizer), path, dirs_exist_ok=True)
    vision = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    # 4 to 64 tokens per image, where the published files allow 64 to 16,384: tests stay quick.
    image_size = {"longest_edge": 65_536, "shortest_edge": 4_096}
    image = {"size": image_size, **vision, "image_processor_type": "Qwen2VLImageProcessorFast"}
    write_json(path / "preprocessor_config.json", image)
    video_size = {"longest_edge": 131_072, "shortest_edge": 4_096}
    video = {"size": video_size, **vision, "video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(path / "video_preprocessor_config.json", video)
    write_json(path / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_session_folder = tempfile.TemporaryDirectory(prefix="bard-vl-tests-")


@cache
def tokenizer_files(name: TokenizerName) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json, vocab.json and merges.txt, made once per process."""
    folder = Path(_session_folder.name) / name
    folder.mkdir()
    vocab, merges = qwen_bpe() if name == "qwen" else small_bpe()
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=merges))
    tokens = [AddedToken(t, normalized=False, special=i < NUM_SPECIAL_TOKENS) for i, t in enumerate(ADDED_TOKENS)]
    tokenizer.add_tokens(tokens)
    if tokenizer.token_to_id("<|endoftext|>") != IDS[name].pad_token_id:
        raise RuntimeError(f"the {name} vocabulary has {len(vocab)} tokens, its ids in IDS expect another number")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    write_json(folder / "tokenizer_config.json", tokenizer_config(len(vocab)))
    return folder


def byte_level(model: models.BPE) -> Tokenizer:
    """Qwen2's pipeline around a byte-pair model."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated", invert=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_config(num_base_tokens: int) -> dict[str, Any]:
    """The content of tokenizer_config.json, as published."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(num_base_tokens + i): {"content": token, **flags, "special": i < NUM_SPECIAL_TOKENS}
        for i, token in enumerate(ADDED_TOKENS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(ADDED_TOKENS[1:NUM_SPECIAL_TOKENS]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262_144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def small_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE of 384 tokens, trained on a few sentences."""
    tokenizer = byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def qwen_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Qwen's own vocabulary as byte-level BPE, from the rank file that the dashscope package carries."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise ImportError("Qwen's vocabulary comes from the package dashscope: `pip install dashscope`")
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = byte_letters()
    vocab = {spell(token, letters): rank for token, rank in ranks.items()}
    merges = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    return vocab, [(spell(left, letters), spell(right, letters)) for left, right in merges]


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge gives `token`, by merging its bytes in the order of the ranks."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = pair_ranks.index(min(pair_ranks))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself if printable, else the next free one after 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def spell(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


COLOURS = ("red", "green", "blue", "yellow", "black", "purple", "orange")


def draw(size: tuple[int, int] = (96, 64), seed: int = 0) -> Image.Image:
    """A white picture of `size` (width, height) with coloured shapes and a word."""
    rng = random.Random(seed)
    width, height = size
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    for shape in (canvas.ellipse, canvas.rectangle, canvas.ellipse):
        left, top = rng.randrange(width // 2), rng.randrange(height // 2)
        box = (left, top, left + rng.randrange(width // 8, width // 2), top + rng.randrange(height // 8, height // 2))
        shape(box, fill=rng.choice(COLOURS))
    canvas.text((2, height - 14), f"bard {seed}", fill="black")
    return image


def draw_scene(path: str | Path, size: tuple[int, int] = (96, 64), seed: int = 0) -> Path:
    """Save the picture of `draw`; the suffix of `path` (.png, .jpg) gives the format."""
    draw(size, seed).save(path)
    return Path(path)


def strange_pictures() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Pictures by their file's name, with options of their writer."""
    photo, clear = draw((96, 64), 1), Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    clear.paste(photo.crop((0, 0, 40, 64)), (0, 0))
    clear.putpixel((60, 30), (200, 10, 30, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16))
    moved = {"save_all": True, "append_images": [draw((96, 64), 2)], "duration": 100}
    return {
        "photo.png": (photo, {}),
        "clear.png": (clear, {}),
        "clear.webp": (clear, {"lossless": True}),
        "gray_clear.png": (clear.convert("LA"), {}),
        "palette.png": (photo.quantize(16), {}),
        "clear_palette.png": (clear.quantize(16), {}),
        "still.gif": (photo, {}),
        "moving.gif": (photo, moved),
        "turned.jpg": (photo, {"exif": exif}),
        "turned.png": (photo, {"exif": exif}),
        "deep.png": (deep, {}),
        "deep.tiff": (deep, {}),
        "integers.tiff": (Image.fromarray(np.asarray(deep).astype(np.int32)), {}),
        "floats.tiff": (Image.fromarray((np.asarray(deep) / 65535).astype(np.float32)), {}),
        "print.jpg": (photo.convert("CMYK"), {}),
        "bits.png": (photo.convert("1"), {}),
        "a.bmp": (photo, {}),
        "a.tiff": (photo, {}),
        "a.webp": (photo, {}),
        "a b.png": (photo, {}),
    }


def draw_frames(num_frames: int = 4, size: tuple[int, int] = (96, 64), seed: int = 0) -> list[Image.Image]:
    """A video as a list of frames: a red square that moves over a still scene."""
    width, height = size
    frames = [draw(size, seed) for _ in range(num_frames)]
    for index, frame in enumerate(frames):
        left = index * (width - 16) // max(num_frames - 1, 1)
        ImageDraw.Draw(frame).rectangle((left, height // 2, left + 15, height // 2 + 15), fill="red")
    return frames
