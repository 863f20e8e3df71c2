"""How far Bard-VL models agree with answers that their autoregressive parent wrote, one token after the other."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..processing_bard_vl import BardVLProcessor
from ..training.chats import ChatEncoder, ChatLimits
from ..training.data import PackingCollator
from ..training.losses import likeliest
from ..training.packing import Sample, dense_mask
from ..training.trainer import model_inputs
from .tiny_model import write_json

ROW_LENGTH = 256
ROWS = 16  # chats at a time
STATES = 4  # of a block, evenly spread, in which the next token is asked for


def score(
    models: Sequence[Path], chats: Path, num_chats: int, thresholds: Sequence[float], path: Path | None
) -> dict[str, Any]:
    """Compare models with the answers in a JSONL file; each model's figures are written as they come.

    Returns:
        By the name of a model's folder what `compare` found.
    """
    lines = chats.read_text("utf-8").splitlines()[:num_chats]
    found: dict[str, Any] = {}
    for folder in models:
        found[folder.name] = compare(folder, [json.loads(line) for line in lines], thresholds)
        print(json.dumps({folder.name: found[folder.name]}, indent=1), flush=True)
        if path is not None:
            write_json(path, found)
    return found


def compare(folder: Path, chats: Sequence[dict[str, Any]], thresholds: Sequence[float]) -> dict[str, Any]:
    """Shares of the parent's tokens and answers that a model gives, and its tokens per forward at each threshold."""
    start = time.monotonic()
    processor = BardVLProcessor.from_pretrained(folder)
    model = BardVLForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    encoder = ChatEncoder(processor, model.config, ChatLimits(model.config.block_size, ROW_LENGTH))
    samples = [encoder.encode(chat, number) for number, chat in enumerate(chats)]
    whole = [sample for sample in samples if isinstance(sample, Sample)]
    if len(whole) < len(samples) or not samples:
        raise ValueError(f"{len(samples) - len(whole)} of {len(samples)} chats cannot be used")
    return {
        "block_size": model.config.block_size,
        "chats": len(whole),
        "tokens": sum(len(answer(sample)) for sample in whole),
        **at_parents_states(model, PackingCollator(encoder, needs_vision=False), whole),
        "decoded": [{"threshold": each, **decoded(model, whole, each)} for each in thresholds],
        **held_out_losses(folder),
        "seconds": round(time.monotonic() - start),
    }


def answer(sample: Sample) -> torch.Tensor:
    """Ids (length,) of a sample's last answer, its end of sequence included."""
    return sample.input_ids[slice(*sample.responses[-1])]


@torch.no_grad()
def at_parents_states(model: Any, collator: PackingCollator, samples: Sequence[Sample]) -> dict[str, float]:
    """How often the model chooses the parent's token where all that it sees of the answer is the parent's.

    Returns:
        `next_token`: of the first masked token, in states of a block with none, a quarter, half and three quarters of
        its tokens there, or in each one of a small block. `whole_block`: of every token of blocks that are all masked.
    """
    size, right = model.config.block_size, {"next_token": [0, 0], "whole_block": [0, 0]}
    for first in range(0, len(samples), ROWS):
        rows = collator(samples[first : first + ROWS])
        place = (rows.place - rows.origin) % size
        learnt = rows.noisy & ~rows.is_response_padding
        for shown in range(0, size, max(1, size // STATES)):
            ids = rows.input_ids.masked_fill(rows.noisy & (place >= shown), model.config.mask_token_id)
            hit = choices(model, rows, ids) == rows.input_ids
            asked = {"next_token": learnt & (place == shown)} | ({} if shown else {"whole_block": learnt})
            for name, where in asked.items():
                right[name][0] += int((hit & where).sum())
                right[name][1] += int(where.sum())
    return {name: round(hits / max(count, 1), 4) for name, (hits, count) in right.items()}


def choices(model: Any, rows: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The likeliest token at each noisy position of packed rows (rows, length), the mask left out; -1 elsewhere."""
    found, index = torch.full_like(input_ids, -1), rows.noisy.flatten().nonzero()[:, 0]

    def choose(hidden_states: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
        chosen = hidden_states.flatten(0, 1)[index]
        found.view(-1)[index] = likeliest(chosen, lm_head.weight, model.config.mask_token_id, 1024)
        return hidden_states.new_zeros(())

    model(**model_inputs(rows, input_ids, dense_mask(rows.layout())[:, None]), objective=choose)
    return found


def decoded(model: Any, samples: Sequence[Sample], threshold: float) -> dict[str, float]:
    """Decode answers at a threshold: shares of equal answers and of equal tokens at their start, tokens per forward."""
    equal, prefix, speed = [], [], []
    for first in range(0, len(samples), ROWS):
        batch = samples[first : first + ROWS]
        prompts = [sample.input_ids[: sample.responses[-1][0]] for sample in batch]
        wanted = [answer(sample) for sample in batch]
        inputs = left_padded(prompts, model.generation_config.pad_token_id)
        output = model.generate(
            **inputs,
            confidence_threshold=threshold,
            max_new_tokens=max(map(len, wanted)),
            return_dict_in_generate=True,
        )
        speed += output.tokens_per_forward.tolist()
        for given, expected in zip(output.sequences[:, inputs["input_ids"].shape[1] :], wanted, strict=True):
            length = min(len(given), len(expected))  # shorter where all answers of the batch ended before
            same = (given[:length] == expected[:length]).long().cumprod(0).sum().item()
            equal.append(same == len(expected))
            prefix.append(same / len(expected))
    figures = {"equal_answers": equal, "equal_prefix": prefix, "tokens_per_forward": speed}
    return {name: round(sum(values) / len(values), 4) for name, values in figures.items()}


def left_padded(prompts: Sequence[torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Prompts of ids (length,) as one batch."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def held_out_losses(folder: Path) -> dict[str, float]:
    """The first and the last held-out loss of the stage that wrote a folder, if it evaluated."""
    path = folder / "trainer_state.json"
    history = json.loads(path.read_text("utf-8"))["log_history"] if path.is_file() else []
    losses = [round(entry["eval_loss"], 4) for entry in history if "eval_loss" in entry]
    return {"loss_before": losses[0], "loss_after": losses[-1]} if losses else {}
