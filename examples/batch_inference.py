r"""Answer a file of questions about pictures, on as many GPUs and machines as there are, and resume where it stopped.

    accelerate launch examples/batch_inference.py --model Bard-VL-4B --input questions.jsonl --output answers.jsonl

Each line of the input is a JSON object: `prompt` and `images` (a list of paths, relative to the file), or a chat under
`messages` (its paths relative to the working directory); and `id`, by default the number of its line. Each line of the
output has the `id`, and `text`, `tokens` and `tokens_per_forward`, or `error`, in the order of the input. A line that
cannot be read has an `error`, too. The exit code is 3 if there is any, 1 if the run did not end.

Until the output is complete, finished answers stand in the folder OUTPUT.parts; the same command takes up the work from
there, with any number of processes. With --retry-errors it asks again what ended in an error, even in a full output.
Several machines need a file system in common.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import bard_vl
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from bard_vl import check_chat, complete_settings, is_text, one_line, read_config, read_picture
from transformers import AutoModelForImageTextToText

FAILED = 3  # exit code of a run that ended, with errors among its answers
Record = dict[str, Any]


@dataclass
class Request:
    """A line of the input.

    Attributes:
        line: its number, which its answer is kept by until the output is complete.
        id: what it calls itself, else its number.
        body: the whole object.
        fault: why it cannot be asked at all.
    """

    line: int
    id: Any
    body: Record = field(default_factory=dict)
    fault: str | None = None

    def answer(self, **found: Any) -> Record:
        """A line of the output, with the number of the input's."""
        return {"line": self.line, "id": self.id, **found}


class Answerer:
    """A model that answers batches of requests."""

    def __init__(self, model: str, settings: Record, folder: Path, device: torch.device):
        self.settings, self.folder = settings, folder
        self.processor = bard_vl.BardVLProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").to(device)

    def answer(self, requests: list[Request]) -> list[Record]:
        """One answer a request; what cannot be answered says why, and leaves the others alone.

        Raises:
            RuntimeError: the device has failed, and would fail every other request.
        """
        try:
            return self.generate(requests)
        except Exception as error:  # whatever a request can be wrong in; of a full memory a smaller batch takes less
            if is_fault_of_device(error):
                raise
            if len(requests) == 1:
                return [requests[0].answer(error=one_line(error))]
        return [answer for request in requests for answer in self.answer([request])]

    def generate(self, requests: list[Request]) -> list[Record]:
        """Answers of requests that are decoded together."""
        chats = [self.chat(request.body) for request in requests]
        inputs = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device)
        output = self.model.generate(**inputs, **self.settings, return_dict_in_generate=True)
        responses = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(responses, skip_special_tokens=True)
        tokens = (output.confidences > 0).sum(-1).tolist()  # 0 marks padding
        speeds = output.tokens_per_forward.tolist()
        return [
            request.answer(text=text, tokens=count, tokens_per_forward=round(speed, 3))
            for request, text, count, speed in zip(requests, texts, tokens, speeds, strict=True)
        ]

    def chat(self, body: Record) -> list[Record]:
        """A request's messages; pictures are opened here, so that a broken one is known by its request.

        Raises:
            ValueError: the request is no question, or a picture cannot be read.
        """
        if "messages" in body:
            check_chat(body["messages"])
            return body["messages"]
        if "prompt" not in body:
            raise ValueError("the request has neither `prompt` nor `messages`")
        prompt, images = body["prompt"], body.get("images", [])
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` must be a text, got {prompt!r:.80}")
        if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
            raise ValueError(f"`images` must be a list of paths, got {images!r:.80}")
        pictures = [read_picture(path, self.folder) for path in images]
        content = [{"type": "image", "image": picture} for picture in pictures]
        return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]


class Progress:
    """Finished answers on disk: `answers.jsonl.parts` holds a file of each process, and one of all earlier runs."""

    def __init__(self, output: Path):
        self.output, self.parts = output, output.with_name(f"{output.name}.parts")

    def begin(self, run: Record, requests: list[Request], retry_errors: bool = False) -> int:
        """Gather what earlier runs have finished, and refuse what cannot be asked; how many answers there were.

        For one process alone, which then owns the folder until it ends. With `retry_errors` a complete output counts as
        such a run, and errors do not count.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        self.lock = (self.parts / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing {self.output}") from None
        begun = self.parts / "run.json"
        if begun.exists() and read_run(begun) != run:
            raise ValueError(f"{self.parts} was begun with other settings or requests: {begun.read_text().strip()}")
        write_whole(begun, json.dumps(run) + "\n")
        answers = self.answers(says=print_error)
        if retry_errors:
            complete = read_output(self.output, requests) if self.output.exists() else ()
            answers = {**{answer["line"]: answer for answer in complete}, **answers}
            answers = {line: answer for line, answer in answers.items() if "error" not in answer}
        refused = [request.answer(error=request.fault) for request in requests if request.fault is not None]
        write_lines(self.parts / "done.jsonl", {**answers, **{answer["line"]: answer for answer in refused}}.values())
        for path in self.parts.glob("process-*.jsonl"):
            path.unlink()
        return len(answers)

    def answers(self, says: Callable[[str], None] = lambda _: None) -> dict[int, Record]:
        """Every finished answer by its line, each once: a run may have been killed between gathering and clearing.

        `says` is told of each damaged line, whose request is asked again.
        """
        answers = {}
        for path in sorted(self.parts.glob("*.jsonl")):
            for number, record in enumerate(whole_lines(path), 1):
                if record is not None and isinstance(record.get("line"), int) and "id" in record:
                    answers[record["line"]] = record
                else:
                    says(f"{path}, line {number} is damaged: what it answered is asked again")
        return answers

    def append(self, process: int, answers: list[Record]) -> None:
        """Write answers behind those of a process; they survive whatever ends it from here on."""
        with (self.parts / f"process-{process}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(map(as_line, answers))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, requests: list[Request]) -> list[Record]:
        """Write the output in the order of the requests, and drop the parts."""
        answers = self.answers(says=print_error)
        gone = [request.line for request in requests if request.line not in answers]
        if gone:
            raise ValueError(f"{self.parts} has lost the answers of lines {gone}: the same command asks them again")
        ordered = [{name: part for name, part in answers[r.line].items() if name != "line"} for r in requests]
        write_lines(self.output, ordered)
        leavings = self.parts.with_name(f"{self.parts.name}.done")
        shutil.rmtree(leavings, ignore_errors=True)
        self.parts.rename(leavings)  # at once: a part of the parts would be taken for an unfinished run
        shutil.rmtree(leavings)
        return ordered


def is_fault_of_device(error: Exception) -> bool:
    """Whether no request can be answered any more; of an older torch the message alone tells."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def whole_lines(path: Path) -> Iterator[Record | None]:
    """The records of a file but the last one, if a kill cut it short; None for a line that holds none."""
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a machine that went down may have left NULs
            record = None
        yield record if isinstance(record, dict) else None


def read_run(path: Path) -> Record:
    """What the parts were begun with; `ValueError` if the file is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: nothing says which settings the answers beside it belong to; remove {path.parent}"
        ) from error


def read_output(path: Path, requests: list[Request]) -> list[Record]:
    """The answers of a complete output, with the lines of the input; `ValueError` if it answers other requests."""
    answers = list(whole_lines(path))
    if None in answers:
        raise ValueError(f"{path}, line {answers.index(None) + 1} is damaged: remove the file to ask everything again")
    if [answer.get("id") for answer in answers if answer] != [request.id for request in requests]:
        raise ValueError(f"{path} answers other requests")
    return [{**answer, "line": request.line} for answer, request in zip(answers, requests, strict=True) if answer]


def as_line(record: Record) -> str:
    """A record as a line of JSON; half a character of UTF-16, which UTF-8 cannot hold, by its number."""
    text = json.dumps(record, ensure_ascii=False)
    return (text if is_text(text) else json.dumps(record)) + "\n"


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write records; the file has all of them or is as before."""
    write_whole(path, "".join(map(as_line, records)))


def write_whole(path: Path, text: str) -> None:
    """Write a file; it has all of the text or is as before."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_requests(path: Path) -> list[Request]:
    """A request for each line of the input that is not empty; one that cannot be asked has a fault."""
    requests: list[Request] = []
    seen: dict[Any, Any] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            request = read_request(number, line)
            if request.fault is None and seen.setdefault(request.id, number) != number:
                request.fault = f"line {number}: `id` {request.id!r} is that of line {seen[request.id]}"
            requests.append(request)
    return requests


def read_request(number: int, line: bytes) -> Request:
    """The request of a line."""
    try:
        body = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant)
        is_whole = is_text(json.dumps(body, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        return Request(number, number, fault=f"line {number}: no JSON object: {one_line(error)}")
    if not isinstance(body, dict):
        return Request(number, number, fault=f"line {number}: no JSON object, but {body!r:.80}")
    request = Request(number, body.get("id", number), body)
    is_number = isinstance(request.id, int | float) and not isinstance(request.id, bool) and math.isfinite(request.id)
    if not is_number and not isinstance(request.id, str):
        request.fault = f"line {number}: `id` must be a text or a number, got {request.id!r:.80}"
    elif not is_whole:
        request.fault = f"line {number}: half a character (U+D800 to U+DFFF), which is no text"
    return request


def refuse_constant(name: str) -> None:
    """Refuse what Python would take for a number."""
    raise ValueError(f"{name} is no JSON")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a Bard-VL checkpoint")
    parser.add_argument("--input", required=True, type=Path, help="JSONL file of requests")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file of answers")
    parser.add_argument("--batch-size", type=int, default=8, help="requests decoded together, default: %(default)s")
    parser.add_argument("--block-size", type=int, help="needed where the checkpoint's config.json does not state it")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens to write, default: %(default)s")
    parser.add_argument("--retry-errors", action="store_true", help="ask again what ended in an error")
    return parser.parse_args()


def read_settings(arguments: argparse.Namespace) -> Record:
    """The stated settings of generation; `ValueError` if one is wrong, or the checkpoint needs another."""
    settings = bard_vl.BardVLGenerationConfig(
        block_size=arguments.block_size,
        confidence_threshold=arguments.threshold,
        max_new_tokens=arguments.max_new_tokens,
    )
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    settings, _ = complete_settings(arguments.model, read_config(arguments.model), settings)
    return settings.explicit()


def print_error(message: str) -> None:
    """Print a line on standard error."""
    print(message, file=sys.stderr)


def main() -> int:
    """Answer what is left of the input, and gather the answers when all are there; returns the exit code."""
    arguments = parse_arguments()
    settings, requests = read_settings(arguments), read_requests(arguments.input)
    # A process that is done waits for the others, however long they take.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator, progress = Accelerator(kwargs_handlers=[patience]), Progress(arguments.output)
    num_earlier = 0
    if accelerator.is_main_process:
        if arguments.output.exists() and not progress.parts.exists():
            if not arguments.retry_errors:
                raise ValueError(
                    f"{arguments.output} exists: a run that ended has written it; --retry-errors asks its errors again"
                )
            read_output(arguments.output, requests)
        asked = hashlib.sha256(json.dumps([[r.id, r.body, r.fault] for r in requests]).encode()).hexdigest()
        run = {"model": arguments.model, **settings, "requests": asked}
        num_earlier = progress.begin(run, requests, arguments.retry_errors)
    accelerator.wait_for_everyone()

    finished = {record["line"] for record in whole_lines(progress.parts / "done.jsonl") if record}
    left = [request for request in requests if request.line not in finished]
    share = left[accelerator.process_index :: accelerator.num_processes]
    if share:
        answerer = Answerer(arguments.model, settings, arguments.input.parent, accelerator.device)
        for start in range(0, len(share), arguments.batch_size):
            answers = answerer.answer(share[start : start + arguments.batch_size])
            progress.append(accelerator.process_index, answers)
    accelerator.wait_for_everyone()
    num_errors = 0
    if accelerator.is_main_process:
        answers = progress.finish(requests)
        num_errors = sum("error" in answer for answer in answers)
        print(f"{len(answers)} answers in {arguments.output}, {num_earlier} from earlier runs, {num_errors} errors")
    accelerator.end_training()
    return FAILED if num_errors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")
