"""Shared by tests of decoding: prompts, a slow twin of `generate` and `score`, and a record of a module's calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from bard_vl import BardVLForConditionalGeneration
from ragged import MASK, Row, collate
from tiny import tokenizer_files
from transformers import AutoTokenizer, PreTrainedTokenizerBase

VOCAB_SIZE = 512
# Seeds for which no response in these tests holds a visual id, which the slow twin could not embed as a token.
PROMPTS: dict[str, Row] = {
    "text": Row().add_text(13, seed=1),
    "aligned text": Row().add_text(16, seed=2),
    "image": Row().add_text(5, seed=3).add_image((1, 4, 4), seed=4).add_text(6, seed=5),
    "several images": Row().add_image((1, 4, 2), seed=6).add_text(3, seed=6).add_image((1, 2, 6), seed=8),
    "video": Row().add_text(2, seed=9).add_video((3, 2, 2), seed=10).add_text(4, seed=11),
    "mixture": Row().add_image((1, 2, 6), seed=12).add_video((2, 4, 4), seed=13).add_text(2, seed=14),
    "begun image": Row().add_text(3, seed=16).add_image((1, 4, 4), seed=16, closed=False),
}


@dataclass
class SlowOutput:
    """Response tokens up to the first EOS or the limit, steps of each block, confidence of each token."""

    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


@torch.no_grad()
def last_block_logits(
    model: BardVLForConditionalGeneration, row: Row, response: list[int], block_size: int
) -> torch.Tensor:
    """Logits (block, vocabulary) of the last block of the response: one forward, no cache, an explicit 4-D mask."""
    length, inputs = len(row.ids), collate([row])
    prompt = inputs.pop("input_ids")
    del inputs["attention_mask"]
    first = -(-length // block_size)
    blocks = [i // block_size for i in range(length)] + [first + i // block_size for i in range(len(response))]
    visible = torch.tensor([[key <= query for key in blocks] for query in blocks])
    grids = {name: grid for name, grid in inputs.items() if name.endswith("grid_thw")}
    positions = model.get_position_ids(torch.cat([prompt, torch.zeros(1, len(response), dtype=torch.long)], 1), **grids)
    return model(
        input_ids=torch.cat([prompt, torch.tensor([response])], 1),
        attention_mask=visible[None, None],
        position_ids=positions,
        logits_to_keep=block_size,
        **inputs,
    ).logits[0]


def committed_positions(
    confidence: list[float], undecided: list[int], quota: int, threshold: float, rule: str
) -> list[int]:
    """The rules as their author states them, with a branch: all sure ones if they are enough, else the best ones."""
    sure = [place for place in undecided if confidence[place] > threshold]
    if rule == "low_confidence_dynamic" and len(sure) >= quota:
        return sure
    return sorted(undecided, key=lambda place: -confidence[place])[:quota]


def slow_generate(
    model: BardVLForConditionalGeneration,
    row: Row,
    block_size: int,
    max_new_tokens: int,
    denoising_steps: int | None = None,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.9,
    eos_token_id: tuple[int, ...] = (),
    process: Callable[[list[int], torch.Tensor], torch.Tensor] = lambda left, scores: scores,
    mask_token_id: int = MASK,
    concurrent_blocks: int = 1,
    end_at_first_eos: bool = False,
) -> SlowOutput:
    """Greedy decoding of one prompt, one full forward per block and step.

    `process` maps (tokens left, scores (vocabulary,)). Blocks behind the present one are looked at from the second step
    of the response on.
    """
    out, response = SlowOutput(), []
    steps = block_size if denoising_steps is None else denoising_steps
    ahead: list[tuple[list[int], list[float]]] = []

    def is_open(block: list[int]) -> bool:
        kept = block[: max_new_tokens - len(response)] if end_at_first_eos else block
        ends = [place for place, token in enumerate(kept) if end_at_first_eos and token in eos_token_id]
        return mask_token_id in kept[: ends[0] + 1 if ends else None]

    while True:
        block, sure = ahead.pop(0) if ahead else ([mask_token_id] * block_size, [0.0] * block_size)
        step = 0
        while step == 0 or is_open(block):
            if response or step:
                room = -(-(max_new_tokens - len(response)) // block_size)
                while len(ahead) < min(concurrent_blocks, room) - 1:
                    ahead.append(([mask_token_id] * block_size, [0.0] * block_size))
            due = block_size // steps + (step < block_size % steps)
            running, found = [(block, sure), *ahead], []
            for number, (tokens, _) in enumerate(running):
                shown = [token for other, _ in running[:number] for token in other]
                logits = last_block_logits(model, row, response + shown + tokens, block_size)
                undecided = [place for place, token in enumerate(tokens) if token == mask_token_id]
                for place in undecided:
                    left = [token for token in row.ids + response + tokens[:place] if token != mask_token_id]
                    logits[place] = process(left, logits[place])
                probabilities = logits.softmax(-1)
                probabilities[:, mask_token_id] = -1
                confidence, ids = (value.tolist() for value in probabilities.max(-1))
                quota = 0 if number else due
                places = committed_positions(confidence, undecided, quota, confidence_threshold, remasking_strategy)
                found.append((places, ids, confidence))
            for (tokens, certainties), (places, ids, confidence) in zip(running, found, strict=True):
                for place in places:
                    tokens[place], certainties[place] = ids[place], confidence[place]
            step += 1
        response += block
        out.steps.append(step)
        for token, confidence in zip(block, sure, strict=True):
            out.tokens.append(token)
            out.confidences.append(confidence)
            if token in eos_token_id or len(out.tokens) == max_new_tokens:
                return out


def slow_score(model: BardVLForConditionalGeneration, row: Row, answer: list[int], block_size: int) -> list[float]:
    """Log-probability of each answer token: one forward with that token masked, and masks behind the answer."""
    scores = []
    for place, token in enumerate(answer):
        start = place // block_size * block_size
        response = answer[: start + block_size]
        response = response + [MASK] * (start + block_size - len(response))
        response[place] = MASK
        logits = last_block_logits(model, row, response, block_size)
        scores.append(logits[place - start].log_softmax(-1)[token].item())
    return scores


@contextmanager
def calls_of(module: torch.nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the first input of every call of a module meanwhile."""
    calls: list[tuple[int, ...]] = []

    def note(_: torch.nn.Module, args: tuple, kwargs: dict, __: object) -> None:
        calls.append(tuple((args[0] if args else kwargs["inputs_embeds"]).shape))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@cache
def word_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with a text for every id of the golden models; the mask token reads `<510>`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_files("small"))
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), VOCAB_SIZE)])
    return tokenizer
