"""The workers: a process of Ray with the model, by `generate` or by vLLM."""

import contextlib
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..app.errors import one_line
from ..app.session import Session, finish_reason, quieten
from ..generation_config_bard_vl import BardVLGenerationConfig
from .answers import as_line
from .requests import Asking, Record, Request, as_chat

READERS = 8  # pictures opened at once
# Settings that are no `extra_args` of vLLM's: it has parameters of its own for them.
ELSEWHERE = {"max_new_tokens", "temperature", "top_k", "top_p", "block_size", "do_sample", "stop_strings"}


@dataclass(frozen=True)
class Recipe:
    """The settings of a worker; they travel to other machines.

    Attributes:
        model: folder or Hub id.
        settings: of generation, by name.
        asking: what holds for all requests.
        where: the other arguments of `Session`.
        seed: of answers that are sampled.
        gpus: of a worker.
        engine: a key of `ENGINES`.
        structured: the form of every answer, as for `generate`.
        vllm: further arguments of vLLM's `LLM`.
    """

    model: str | None
    settings: Record
    asking: Asking
    where: Record = field(default_factory=dict)
    seed: int | None = None
    gpus: int = 0
    engine: str = "generate"
    structured: Record | None = None
    vllm: Record = field(default_factory=dict)

    @property
    def identity(self) -> Record:
        """All that determines the answers, for JSON; without the device and its use by vLLM."""
        told = {"model": self.model, "seed": self.seed, "engine": self.engine, "structured": self.structured}
        told |= {**self.where, **self.settings}
        return {name: value for name, value in told.items() if value is not None and name != "device"}

    def open_session(self) -> Session:
        """The checkpoint, without its weights."""
        return Session(self.model, BardVLGenerationConfig(**self.settings), **self.where)


class Worker:
    """Answers blocks of requests, as Ray Data hands them over; the weights are read when there is one to ask.

    Ray calls it from two threads: one opens pictures while the other decodes.

    Args:
        recipe: what it is made of.
        count: adds to the number of a name, which all workers share, and returns it.
    """

    attempts = 3  # Ray starts a dead worker anew, without end

    def __init__(self, recipe: Recipe, count: Callable[[str, int], int] = lambda name, change: 1):
        quieten()
        self.recipe, self.count = recipe, count
        self.decoding = threading.RLock()
        self.quiet, self.num_reading = threading.Condition(), 0  # taken before `decoding`
        self.readers = ThreadPoolExecutor(READERS)

    @cached_property
    def session(self) -> Session:
        """The checkpoint."""
        return self.recipe.open_session()

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        """Columns line (the answer as JSON), tokens and is_error, for a column of pickled requests."""
        requests = [pickle.loads(request) for request in block["request"]]
        if self.count(f"block of row {requests[0].row}", 1) > self.attempts:
            answers = [self.answer_alone(request) for request in requests]
        else:
            answers = self.answer(requests)
        return {
            "line": [as_line(answer) for answer in answers],
            "tokens": [answer.get("tokens", 0) for answer in answers],
            "is_error": ["error" in answer for answer in answers],
        }

    def answer(self, requests: list[Request]) -> list[Record]:
        """One answer per request; an error says why, and leaves the others alone."""
        with self.reading():
            chats = list(self.readers.map(self.read, requests))
        asked = [(request, chat) for request, chat in zip(requests, chats, strict=True) if isinstance(chat, list)]
        with self.decoding:
            answered = iter(self.decode(asked) if asked else ())
        return [
            next(answered) if isinstance(chat, list) else request.answer(error=chat)
            for request, chat in zip(requests, chats, strict=True)
        ]

    def answer_alone(self, request: Request) -> Record:
        """An answer while nothing else is read or decoded, so that it is known which request kills the process."""
        begun = f"row {request.row}"
        with self.quiet:
            self.quiet.wait_for(lambda: not self.num_reading)
            with self.decoding:
                if self.count(begun, 1) > self.attempts:
                    return request.answer(error=f"the worker died over it, attempts: {self.attempts}")
                (answer,) = self.answer([request])
                # The worker lives: if it dies before the block is done, another row is to blame.
                self.count(begun, -1)
                return answer

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What threads do together, but not while a request is answered alone."""
        with self.quiet:
            self.num_reading += 1
        try:
            yield
        finally:
            with self.quiet:
                self.num_reading -= 1
                self.quiet.notify_all()

    def read(self, request: Request) -> list[Record] | str:
        """The request's chat with its pictures opened, or why there is none."""
        try:
            return request.fault or as_chat(request, self.recipe.asking)
        except Exception as error:  # whatever a request can be wrong in
            return one_line(error)

    def decode(self, asked: list[tuple[Request, list[Record]]]) -> list[Record]:
        """Answers of requests that are decoded together, or each alone if that fails.

        Raises:
            OSError: the checkpoint cannot be read.
            RuntimeError: the device has failed, and would fail every other request.
        """
        self.load()
        try:
            found = self.generate([chat for _, chat in asked], [request.row for request, _ in asked])
            return [request.answer(**answer) for (request, _), answer in zip(asked, found, strict=True)]
        except Exception as error:  # as above; of a full memory a smaller batch takes less
            if is_fault_of_device(error):
                raise
            if len(asked) == 1:
                return [asked[0][0].answer(error=one_line(error))]
        return [answer for one in asked for answer in self.decode([one])]

    def load(self) -> None:
        """Read the weights."""
        _ = self.session.model

    def generate(self, chats: list[list[Record]], rows: list[int]) -> list[Record]:
        """Answers by `generate`; the first row moves the seed, so that no two batches draw the same numbers."""
        session, model = self.session, self.session.model
        form = session.read_form(self.recipe.structured)
        inputs = session.processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(session.device)
        output = model.generate(
            **inputs,
            generation_config=session.settings,
            return_dict_in_generate=True,
            tokenizer=session.processor,
            structured=form,
            seed=None if self.recipe.seed is None else self.recipe.seed + rows[0],
        )
        call = model.read_call(inputs, session.settings, {}, warn=False)
        answers = []
        for number, response in enumerate(output.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
            response = response[: output.num_tokens[number]]
            text = session.processor.decode(response, skip_special_tokens=True)
            answers.append(
                {
                    "text": text,
                    **({} if form is None else {"value": form.parse(text)}),
                    "finish_reason": finish_reason(response, call.limits[number], call.settings.eos_token_ids),
                    "tokens": len(response),
                    "forwards": round(len(response) / float(output.tokens_per_forward[number])),
                }
            )
        return answers


class VllmWorker(Worker):
    """The same by vLLM, which batches by itself."""

    @cached_property
    def engine(self) -> Any:
        """vLLM with the model."""
        from vllm import LLM

        where, block_size = self.recipe.where, self.recipe.settings.get("block_size")
        pixels = {name: where[name] for name in ("min_pixels", "max_pixels") if where.get(name)}
        stated: Record = {
            "revision": where.get("revision"),
            "dtype": where.get("dtype") or "auto",
            "hf_overrides": {"block_size": block_size} if block_size else {},
            "mm_processor_kwargs": pixels or None,
            "tensor_parallel_size": max(self.recipe.gpus, 1),
        }
        return LLM(self.session.name, **{**stated, **self.recipe.vllm})

    def load(self) -> None:
        """Start vLLM."""
        _ = self.engine

    def generate(self, chats: list[list[Record]], rows: list[int]) -> list[Record]:
        """Answers by vLLM, each of a seed of its own; `forwards` is not known."""
        processor = self.session.processor
        prompts = []
        for chat in chats:
            items = [item for message in chat for item in message["content"]]
            media = {kind: [item[kind] for item in items if item["type"] == kind] for kind in ("image", "video")}
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            shown = {kind: found for kind, found in media.items() if found}
            prompts.append({"prompt": text, "multi_modal_data": shown})
        parameters = [self.parameters(row) for row in rows]
        answers = []
        for output in self.engine.generate(prompts, parameters, use_tqdm=False):
            (found,) = output.outputs
            is_end = found.finish_reason == "stop" and not isinstance(found.stop_reason, str)
            reason = "eos" if is_end else found.finish_reason
            answers.append({"text": found.text, "finish_reason": reason, "tokens": len(found.token_ids)})
        return answers

    @cached_property
    def settings(self) -> Record:
        """The settings as vLLM takes them; it refuses by name what it does not serve."""
        stated, resolved = self.recipe.settings, self.session.decoding
        own = {"max_tokens": resolved.max_new_tokens, **asdict(resolved.sampling)}
        named = {name: value for name, value in stated.items() if name not in ELSEWHERE}
        stop = {"stop": stated.get("stop_strings"), "include_stop_str_in_output": True}
        return {**own, **stop, "extra_args": named}

    def parameters(self, row: int) -> Any:
        """The sampling parameters of vLLM for a row."""
        from vllm import SamplingParams

        return SamplingParams(**self.settings, seed=None if self.recipe.seed is None else self.recipe.seed + row)


ENGINES = {"generate": Worker, "vllm": VllmWorker}


def is_fault_of_device(error: Exception) -> bool:
    """Whether no request can be answered any more; of an older torch the message alone tells."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
