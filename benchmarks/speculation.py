r"""Would lossless speculation pay? Forwards that draft-and-verify would save, counted on real decoding.

    python benchmarks/speculation.py examples/checkpoint --image examples/images/*.png --ask "Describe the picture."

FreeDave (arXiv 2510.00294) drafts without a model: a step's predictions are also those of the steps to come, until a
forward says otherwise. The first state that the rule makes of them is right; up to `--depth` states in a row go through
one forward, side by side, and as many are accepted as the forwards before them agree with. The tokens stay the same.

The states that count are those of plain decoding. So one plain run, with the predictions of every step, tells exactly
how many forwards each depth takes, and how many tokens they process. The checkpoint has to be a trained one: a random
model's predictions agree with nothing.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bard_vl import BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.remasking_bard_vl import REMASKING_RULES, pick_tokens, probability_of, transfer_schedule


@dataclass
class State:
    """A block at one of its steps, and what the forward there predicts; all (block size,) on the CPU.

    Attributes:
        block: index of the block in the response.
        step: steps that the block has behind it.
        ids, after: tokens before and after the step, the mask id where undecided.
        predicted: token that each undecided position would take.
        measure: what the rule ranks by, at undecided positions.
    """

    block: int
    step: int
    ids: torch.Tensor
    after: torch.Tensor
    predicted: torch.Tensor
    measure: torch.Tensor


@dataclass
class Decision:
    """A schedule of states: a rule, its bound, and the quota of each step."""

    rule: str
    bound: float
    schedule: torch.Tensor
    mask_token_id: int

    def after(self, ids: torch.Tensor, step: int, predicted: torch.Tensor, measure: torch.Tensor) -> torch.Tensor:
        """The block (block size,) after a step that decides on these predictions."""
        masked = ids == self.mask_token_id
        is_last = step >= len(self.schedule) - 1
        quota = torch.tensor([len(ids)]) if is_last else self.schedule[step : step + 1]
        commit = REMASKING_RULES[self.rule].commit(measure[None], masked[None], quota, self.bound)[0]
        return torch.where(commit, predicted, ids)


class Recorder:
    """A logits processor that changes nothing and keeps each undecided position's prediction."""

    def __init__(self, rule: str, mask_token_id: int):
        self.rule, self.mask_token_id = rule, mask_token_id
        self.predictions: list[tuple[int, float]] = []

    def __call__(self, left: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep the prediction of one position, given its (1, vocabulary) scores."""
        ids = pick_tokens(scores[None], self.mask_token_id)
        measure = REMASKING_RULES[self.rule].measure(scores[None], probability_of(scores[None], ids))
        self.predictions.append((int(ids), float(measure)))
        return scores


def record(
    model: BardVLForConditionalGeneration, inputs: Mapping[str, Any], **settings: Any
) -> tuple[list[State], Decision]:
    """Decode one prompt greedily; return the states that its forwards had, in order, and how they follow each other.

    Args:
        inputs: the processor's output.
        settings: those of `generate` that name block size, steps, rule and bound; all of them are needed.
    """
    rule, size = settings["remasking_strategy"], settings["block_size"]
    mask = settings.get("mask_token_id", model.config.mask_token_id)
    bound = settings[REMASKING_RULES[rule].bound]
    recorder = Recorder(rule, mask)
    output = model.generate(
        **inputs,
        **settings,
        do_sample=False,
        logits_processor=[recorder],
        output_history=True,
        return_dict_in_generate=True,
    )
    states: list[State] = []
    predictions = iter(recorder.predictions)
    for step in output.history[0]:
        same_block = bool(states) and states[-1].block == step.block
        ids = states[-1].after if same_block else torch.full((size,), mask)
        predicted, measure = ids.clone(), torch.zeros(size)
        for place in (ids == mask).nonzero()[:, 0].tolist():
            predicted[place], measure[place] = next(predictions)
        states.append(State(step.block, states[-1].step + 1 if same_block else 0, ids, step.ids, predicted, measure))
    return states, Decision(rule, bound, transfer_schedule(size, settings["denoising_steps"]), mask)


def drafts(state: State, decision: Decision, depth: int) -> Iterator[torch.Tensor]:
    """Up to `depth` blocks (block size,) that follow if the predictions stay as they are, a finished one at last."""
    ids = state.ids
    for ahead in range(depth):
        ids = decision.after(ids, state.step + ahead, state.predicted, state.measure)
        yield ids
        if not (ids == decision.mask_token_id).any():
            return


@dataclass
class Count:
    """The cost of decoding: forwards, and response tokens in them."""

    forwards: int = 0
    tokens: int = 0


def speculate(states: list[State], decision: Decision, depth: int) -> Count:
    """Count what decoding takes with drafts `depth` states deep; with 1 it is plain decoding.

    A finished block goes through its forward together with the masks of the next, as in the engine: two blocks wide.
    """
    size = len(states[0].ids)
    count, place = Count(1, size), 0
    while place < len(states) - 1:
        # The last state's step ends the response: no forward follows it.
        ahead, accepted = states[place:-1], 0
        for number, draft in enumerate(drafts(states[place], decision, depth)):
            finished = not (draft == decision.mask_token_id).any()
            count.tokens += 2 * size if finished else size
            if number < len(ahead) and ahead[number].block == states[place].block:
                accepted += accepted == number and torch.equal(draft, ahead[number].after)
        count.forwards += 1
        place += accepted
    return count


def table(counts: dict[int, Count], num_tokens: int, size: int) -> str:
    """Markdown: a row per depth, compared with plain decoding, which is depth 1."""
    lines = [
        "| depth | forwards | of plain | tokens per forward | block widths per forward |",
        "|---:|---:|---:|---:|---:|",
    ]
    for depth, count in sorted(counts.items()):
        lines.append(
            f"| {depth} | {count.forwards} | {count.forwards / counts[1].forwards:.2f} "
            f"| {num_tokens / count.forwards:.2f} | {count.tokens / count.forwards / size:.2f} |"
        )
    return "\n".join(lines)


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line: the task and its settings."""
    add = parser.add_argument
    add("model", help="folder or Hub id of a trained checkpoint")
    add("--image", nargs="+", type=Path, help="pictures to ask about (default: none)")
    add("--ask", nargs="+", default=["Describe the picture."], help="questions; each is asked of every picture")
    add("--block-size", type=int, help="default: the checkpoint's")
    add("--steps", type=int, help="denoising steps per block at most (default: block size)")
    add("--rule", default="low_confidence_dynamic", choices=REMASKING_RULES)
    add("--bound", type=float, default=0.9, help="the rule's threshold, entropy or factor (default: 0.9)")
    add("--new-tokens", type=int, default=128, help="response tokens at most (default: 128)")


def decoding_settings(chosen: argparse.Namespace, model: BardVLForConditionalGeneration) -> dict[str, Any]:
    """The arguments of `generate` that the command line asks for."""
    size = chosen.block_size or model.config.block_size
    return {
        "block_size": size,
        "denoising_steps": chosen.steps or size,
        "remasking_strategy": chosen.rule,
        REMASKING_RULES[chosen.rule].bound: chosen.bound,
        "max_new_tokens": chosen.new_tokens,
    }


def encoded_conversations(chosen: argparse.Namespace, processor: BardVLProcessor) -> Iterator[Mapping[str, Any]]:
    """The processor's output for every picture and question."""
    for image in chosen.image or [None]:
        for text in chosen.ask:
            picture = [{"type": "image", "image": str(image)}] if image else []
            yield processor.apply_chat_template(
                [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_decoding_arguments(parser)
    add = parser.add_argument
    add("--depth", nargs="+", type=int, default=[2, 3, 4, 8], help="states in a row per forward (default: 2 3 4 8)")
    add("--json", type=Path, metavar="FILE", help="write the counts")
    chosen = parser.parse_args(arguments)
    if min(chosen.depth) < 1:
        parser.error(f"--depth must be at least 1, got {min(chosen.depth)}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Decode, count, print."""
    chosen = parse_arguments(arguments)
    model = BardVLForConditionalGeneration.from_pretrained(chosen.model, dtype=torch.float32).eval()
    settings = decoding_settings(chosen, model)
    counts = {depth: Count() for depth in (1, *chosen.depth)}
    num_tokens, size = 0, settings["block_size"]
    for inputs in encoded_conversations(chosen, BardVLProcessor.from_pretrained(chosen.model)):
        states, decision = record(model, inputs, **settings)
        num_tokens += size * len({state.block for state in states})
        for depth, count in counts.items():
            more = speculate(states, decision, depth)
            count.forwards, count.tokens = count.forwards + more.forwards, count.tokens + more.tokens
    print(table(counts, num_tokens, size))
    if chosen.json:
        content = {"settings": settings, "tokens": num_tokens, "counts": {d: vars(c) for d, c in counts.items()}}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
