"""The answers of `generate` to the prompts that vLLM is asked."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fresh
import tiny
import torch
from bard_vl import BardVLForConditionalGeneration, BardVLProcessor

IDS = tiny.IDS["small"]
ENDS = [IDS.eos_token_id, IDS.pad_token_id, 313]
# Attention on a CPU takes heads of 32 numbers at least.
SHAPE = {
    "head_dim": 32,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
}


def make_checkpoint(room: Path) -> Path:
    """A tiny seed of Bard-VL, of block size 4, that comes upon one of its ends now and then."""
    qwen = tiny.write_qwen3vl(room / "qwen", text_config=SHAPE)
    settings = json.loads((qwen / "generation_config.json").read_text())
    tiny.write_json(qwen / "generation_config.json", {**settings, "eos_token_id": ENDS})
    return fresh.convert(qwen, room / "bard", "--block-size", 4, "--mask-token-id", IDS.mask_token_id)


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of ordinary tokens."""
    return [random.Random(1000 * seed + n).choices(range(IDS.pad_token_id), k=n) for n in lengths]


@dataclass
class Said:
    """Responses, the text of each, and the denoising steps that they took."""

    tokens: list[list[int]] = field(default_factory=list)
    steps: int = 0


class Oracle:
    """A checkpoint by `generate`, in float32."""

    def __init__(self, folder: Path):
        self.model = BardVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = BardVLProcessor.from_pretrained(folder)

    def say(self, prompts: list[list[int]], **settings: Any) -> Said:
        """Answer prompts together, each up to and with its first end."""
        longest = max(map(len, prompts))
        rows = [[IDS.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
        real = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(real)}
        return self._run(inputs, **{"eos_token_id": [], "pad_token_id": IDS.mask_token_id - 1, **settings})

    def see(self, messages: list[dict[str, Any]], **settings: Any) -> Said:
        """Answer a chat with pictures."""
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return self._run(inputs, **settings)

    def _run(self, inputs: Any, **settings: Any) -> Said:
        out = self.model.generate(
            **inputs, **settings, return_dict_in_generate=True, tokenizer=self.processor.tokenizer
        )
        counts, length = (out.confidences > 0).sum(-1).tolist(), inputs["input_ids"].shape[1]
        tokens = [row[length : length + n].tolist() for row, n in zip(out.sequences, counts, strict=True)]
        return Said(tokens, int(out.block_step_counts.sum()))

    def text(self, tokens: list[int]) -> str:
        """Tokens as text."""
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
