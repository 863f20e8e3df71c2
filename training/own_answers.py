"""A model's own answers to the training prompts: written to files, judged, and read as samples with their order.

A file holds a line of JSON for each chat whose turns are all answered: `{"chat": id, "turns": [...]}`, the turns with
the members of `OwnAnswer`. Lines are complete or not there, whatever ended the run that wrote them.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..app.terminal import counted
from .arguments import Judge, RecipeError, SelfDistillArguments, require
from .chats import Broken
from .checkpoints import GOES_ON
from .data import ChatSamples, Mixture
from .packing import NEVER, Sample, packed_length, until, whole_blocks

Chats = ChatSamples | Mixture


@dataclass
class OwnAnswer:
    """A model's answer to one turn of a chat.

    Attributes:
        start: tokens of the prompt.
        told: the data's answer.
        text: the model's.
        ids: its tokens, with the end of sequence if it came to it.
        order: for each of these tokens, and of what fills up their last block, the step of its block that decided it;
            None for what no step decided, or decided to be something else than padding.
        ended: whether it came to its end.
    """

    start: int
    told: str
    text: str
    ids: list[int]
    order: list[int | None]
    ended: bool


class AnswerFiles:
    """The answers on disk: a file for each process that writes, and the settings that they were written with."""

    def __init__(self, folder: Path, process: int = 0):
        self.folder, self.process = folder, process
        self.own = folder / f"process-{process}.jsonl"

    def begin(self, settings: dict[str, Any]) -> None:
        """Take up a folder of answers; each process drops the line that a kill cut short in its file.

        Raises:
            RecipeError: the answers there were written with other settings, or to other chats.
        """
        noted = self.folder / "settings.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if noted.exists():
            before = json.loads(noted.read_text("utf-8"))
            for name, value in settings.items():
                require(
                    before.get(name) == value,
                    f"{self.folder} was begun with `{name}` {before.get(name)!r}, now it is {value!r}: "
                    "name another folder, or remove it to ask again",
                )
        elif not self.process:
            partial = noted.with_suffix(".partial")
            partial.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
            partial.rename(noted)
        if self.own.exists():
            with self.own.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def read(self) -> dict[int, list[OwnAnswer]]:
        """The answers to each chat's turns, by the chat's `sample_id`."""
        found: dict[int, list[OwnAnswer]] = {}
        for path in sorted(self.folder.glob("process-*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    record = json.loads(line)
                    found.setdefault(record["chat"], [OwnAnswer(**turn) for turn in record["turns"]])
                except (ValueError, KeyError, TypeError):  # a machine that went down may have left anything
                    continue
        return found

    def append(self, answered: dict[int, list[OwnAnswer]]) -> None:
        """Write the answers to some chats, and have them on the disk."""
        lines = [
            json.dumps({"chat": chat, "turns": [asdict(turn) for turn in turns]}, ensure_ascii=False)
            for chat, turns in answered.items()
        ]
        try:
            with self.own.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecipeError(f"{self.own} cannot be written: {error.strerror}; {GOES_ON}") from error


@dataclass
class Writer:
    """Answers prompts with a model, greedily.

    Args:
        model: in evaluation, on its device.
        tokenizer: of its processor.
        block_size: tokens per block.
    """

    model: Any
    tokenizer: Any
    block_size: int
    settings: SelfDistillArguments

    def write(self, chats: Chats, numbers: Sequence[int], files: AnswerFiles, is_quiet: bool) -> None:
        """Answer the chats of some numbers; every few of them are on disk before the next are begun."""
        size = self.settings.answer_batch_size
        with tqdm(total=len(numbers), unit="chat", desc="Own answers", disable=is_quiet, mininterval=10) as bar:
            for first in range(0, len(numbers), size):
                part = numbers[first : first + size]
                samples = [each for each in (chats[number] for number in part) if not isinstance(each, Broken)]
                files.append(self.answers(samples))
                bar.update(len(part))

    def answers(self, samples: list[Sample]) -> dict[int, list[OwnAnswer]]:
        """Own answers to every turn of some chats, each behind the data's earlier turns, by `sample_id`."""
        asked = iter([until(sample, turn) for sample in samples for turn in range(len(sample.responses))])
        answered: dict[int, list[OwnAnswer]] = {sample.sample_id: [] for sample in samples}
        while batch := list(islice(asked, self.settings.answer_batch_size)):
            for sample, own in zip(batch, self.decode(batch), strict=True):
                answered[sample.sample_id].append(own)
        return answered

    @torch.no_grad()
    def decode(self, samples: list[Sample]) -> Iterator[OwnAnswer]:
        """Answers to the last turn of each sample."""
        inputs = prompt_inputs(samples, self.tokenizer.pad_token_id)
        threshold = self.settings.answer_confidence_threshold
        output = self.model.generate(
            **{name: value.to(self.model.device) for name, value in inputs.items()},
            block_size=self.block_size,
            max_new_tokens=self.settings.answer_max_new_tokens,
            do_sample=False,
            output_history=True,
            return_dict_in_generate=True,
            **({} if threshold is None else {"confidence_threshold": threshold}),
        )
        responses = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()
        for sample, response, history in zip(samples, responses, output.history, strict=True):
            yield self.own_answer(sample, response, order_of(history))

    def own_answer(self, sample: Sample, response: torch.Tensor, order: tuple[torch.Tensor, torch.Tensor]) -> OwnAnswer:
        """What a response (length,) and the order of its blocks make of a sample's last turn."""
        start, end = sample.responses[-1]
        eos = self.tokenizer.eos_token_id
        ends = (response == eos).nonzero()[:, 0].tolist()
        ids = response[: ends[0] + 1] if ends else response
        written, steps = (part[: whole_blocks(len(ids), self.block_size)] for part in order)
        decided = (steps != NEVER) & (written == torch.cat([ids, ids.new_full((len(written) - len(ids),), eos)]))
        return OwnAnswer(
            start,
            self.text_of(sample.input_ids[start:end]),
            self.text_of(ids),
            ids.tolist(),
            [step if is_so else None for step, is_so in zip(steps.tolist(), decided.tolist(), strict=True)],
            bool(ends),
        )

    def text_of(self, ids: torch.Tensor) -> str:
        """Ids (length,) as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def order_of(history: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a row's blocks when each was finished, and the order of commitment, both (blocks * block size,).

    A token's step is the one after which its place holds it for good, counted within its block from 0; `NEVER` where
    the block ended before it was decided.

    Args:
        history: the row's `DenoisingStep`s.
    """
    blocks: dict[int, list[Any]] = {}
    for step in history:
        blocks.setdefault(step.block, []).append(step)
    written, orders = [], []
    for number in sorted(blocks):
        ids = torch.stack([step.ids for step in blocks[number]])
        decided = torch.stack([step.committed | step.revised for step in blocks[number]]).any(0)
        number_of = torch.arange(1, len(ids) + 1)[:, None]
        steps = ((ids != ids[-1]) * number_of).amax(0)
        written.append(ids[-1])
        orders.append(torch.where(decided, steps, NEVER))
    return torch.cat(written), torch.cat(orders)


def prompt_inputs(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The prompts of the last turn of each sample as inputs of `generate`, padded on the left."""
    prompts = [sample.input_ids[: sample.responses[-1][0]] for sample in samples]
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    real = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        real[row, width - len(prompt) :] = 1
    names = {name for sample in samples for name in sample.visual_inputs}
    visual = {
        name: torch.cat([sample.visual_inputs[name] for sample in samples if name in sample.visual_inputs])
        for name in sorted(names)
    }
    return {"input_ids": tokens, "attention_mask": real, **visual}


class OwnAnswers(torch.utils.data.Dataset):
    """The turns of chats whose own answers are accepted, as samples with those answers.

    Attributes:
        indices: (chat's number, turn) of every sample.
        lengths: columns that each takes in a packed row.
        left_out: how many answers were, by reason.

    Args:
        chats: that were answered.
        answers: by `sample_id`, as `AnswerFiles.read` gives them.
        judge: of (chat, own answer, the data's answer).
        with_order: whether the samples have the order of commitment.

    Raises:
        RecipeError: no answer is accepted, or the judge raises an error.
    """

    def __init__(self, chats: Chats, answers: dict[int, list[OwnAnswer]], judge: Judge, with_order: bool):
        self.chats, self.answers, self.with_order = chats, answers, with_order
        self.indices: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        self.left_out: Counter[str] = Counter()
        limits = chats.encoder.limits
        for number, sample_id in enumerate(chats.sample_ids):
            for turn, own in enumerate(answers.get(sample_id, [])):
                end = own.start + len(own.ids)
                columns = packed_length([(own.start, end)], end, limits.block_size, limits.noisy_copies)
                fault = self.fault(number, own, columns, judge)
                if fault is None:
                    self.indices.append((number, turn))
                    self.lengths.append(columns)
                else:
                    self.left_out[fault] += 1
        require(bool(self.indices), f"no own answer can be learnt: {self}")

    def fault(self, number: int, own: OwnAnswer, columns: int, judge: Judge) -> str | None:
        """Why an answer is left out, None if it is learnt."""
        if not own.ended:
            return "unfinished"
        if columns > self.chats.encoder.limits.max_length:
            return "too long for a row"
        try:
            return None if judge(self.chats.chat(number), own.text, own.told) else "not accepted"
        except Exception as error:  # of the user's function
            told = f"`accept` failed on chat {number}: {type(error).__name__}: {error}"
            raise RecipeError(" ".join(told.split())) from error

    def __len__(self) -> int:
        """Accepted answers."""
        return len(self.indices)

    def __str__(self) -> str:
        """For instance "6 own answers are learnt, 2 left out (1 not accepted, 1 unfinished)"."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        told = f"{counted(len(self.indices), 'own answer')} learnt, {self.left_out.total()} left out"
        return f"{told} ({reasons})" if reasons else told

    def __getitem__(self, place: int) -> Sample | Broken:
        """A sample, or why there is none after all."""
        number, turn = self.indices[place]
        sample = self.chats[number]
        if isinstance(sample, Broken):
            return sample
        own = self.answers[sample.sample_id][turn]
        return replace(with_answer(until(sample, turn), own, self.with_order), sample_id=place)


def with_answer(sample: Sample, own: OwnAnswer, with_order: bool) -> Sample:
    """A sample whose last turn has another answer, the only one that is learnt."""
    start = sample.responses[-1][0]
    ids = torch.tensor(own.ids)
    positions = sample.position_ids[:, :start]
    behind = positions.max() + 1 + torch.arange(len(ids))
    return replace(
        sample,
        input_ids=torch.cat([sample.input_ids[:start], ids]),
        position_ids=torch.cat([positions, behind.expand(3, -1)], dim=1),
        responses=[(start, start + len(ids))],
        visual_index=torch.cat([sample.visual_index[:start], torch.full_like(ids, -1)]),
        orders=[torch.tensor([NEVER if step is None else step for step in own.order])] if with_order else [],
    )


__all__ = ["AnswerFiles", "OwnAnswer", "OwnAnswers", "Writer", "order_of", "prompt_inputs", "with_answer"]
