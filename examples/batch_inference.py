r"""Answer a file of questions about pictures, on as many GPUs and machines as there are, and resume where it stopped.

    accelerate launch examples/batch_inference.py --model Bard-VL-4B --input questions.jsonl --output answers.jsonl

Each line of the input is a JSON object: `prompt` and `images` (a list of paths, relative to the file), or a chat under
`messages` (its paths relative to the working directory); and `id`, by default the number of its line. Each line of the
output has the `id`, and `text`, `tokens` and `tokens_per_forward`, or `error`, in the order of the input.

Until the output is complete, finished answers stand in the folder OUTPUT.parts; the same command takes up the work from
there, with any number of processes. With --retry-errors it asks again what ended in an error, even in a full output.
Several machines need a file system in common.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import bard_vl
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from bard_vl.app.media import read_picture
from bard_vl.app.session import check_config, read_config
from transformers import AutoModelForImageTextToText

Record = dict[str, Any]


class Answerer:
    """A model that answers batches of requests."""

    def __init__(self, model: str, settings: Record, folder: Path, device: torch.device):
        self.settings, self.folder = settings, folder
        self.processor = bard_vl.BardVLProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").to(device)

    def answer(self, requests: list[Record]) -> list[Record]:
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
                return [{"id": requests[0]["id"], "error": " ".join(str(error).split()) or type(error).__name__}]
        return [answer for request in requests for answer in self.answer([request])]

    def generate(self, requests: list[Record]) -> list[Record]:
        """Answers of requests that are decoded together."""
        chats = [self.chat(request) for request in requests]
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
            {"id": request["id"], "text": text, "tokens": count, "tokens_per_forward": round(speed, 3)}
            for request, text, count, speed in zip(requests, texts, tokens, speeds, strict=True)
        ]

    def chat(self, request: Record) -> list[Record]:
        """A request's messages; pictures are opened here, so that a broken one is known by its request."""
        if "messages" in request:
            return request["messages"]
        if "prompt" not in request:
            raise ValueError("the request has neither `prompt` nor `messages`")
        pictures = [read_picture(str(self.folder / path)) for path in request.get("images", [])]
        content = [{"type": "image", "image": picture} for picture in pictures]
        return [{"role": "user", "content": [*content, {"type": "text", "text": request["prompt"]}]}]


class Progress:
    """Finished answers on disk: `answers.jsonl.parts` holds a file of each process, and one of all earlier runs."""

    def __init__(self, output: Path):
        self.output, self.parts = output, output.with_name(f"{output.name}.parts")

    def begin(self, run: Record, retry_errors: bool = False) -> None:
        """Gather what earlier runs have finished. For one process alone, which then owns the folder until it ends.

        With `retry_errors` a complete output counts as such a run, and errors do not count.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        self.lock = (self.parts / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing {self.output}") from None
        begun = self.parts / "run.json"
        if begun.exists() and json.loads(begun.read_text()) != run:
            raise ValueError(f"{self.parts} was begun with other settings or requests: {begun.read_text().strip()}")
        write_whole(begun, json.dumps(run) + "\n")
        answers = self.answers()
        if retry_errors:
            complete = whole_lines(self.output) if self.output.exists() else ()
            answers = {**{answer["id"]: answer for answer in complete}, **answers}
            answers = {request_id: answer for request_id, answer in answers.items() if "error" not in answer}
        write_lines(self.parts / "done.jsonl", answers.values())
        for path in self.parts.glob("process-*.jsonl"):
            path.unlink()

    def answers(self) -> dict[Any, Record]:
        """Every finished answer by its id, each once: a run may have been killed between gathering and clearing."""
        records = (record for path in sorted(self.parts.glob("*.jsonl")) for record in whole_lines(path))
        return {record["id"]: record for record in records}

    def append(self, process: int, answers: list[Record]) -> None:
        """Write answers behind those of a process; they survive whatever ends it from here on."""
        with (self.parts / f"process-{process}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, ids: list[Any]) -> list[Record]:
        """Write the output in the order of the ids, and drop the parts."""
        answers = self.answers()
        ordered = [answers[request_id] for request_id in ids]
        write_lines(self.output, ordered)
        leavings = self.parts.with_name(f"{self.parts.name}.done")
        shutil.rmtree(leavings, ignore_errors=True)
        self.parts.rename(leavings)  # at once: a part of the parts would be taken for an unfinished run
        shutil.rmtree(leavings)
        return ordered


def is_fault_of_device(error: Exception) -> bool:
    """Whether no request can be answered any more; of an older torch the message alone tells."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def whole_lines(path: Path) -> Iterator[Record]:
    """The records of a file but the last one, if a kill cut it short."""
    *lines, _ = path.read_bytes().split(b"\n")
    yield from map(json.loads, lines)


def write_lines(path: Path, records: Any) -> None:
    """Write records; the file has all of them or is as before."""
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_whole(path: Path, text: str) -> None:
    """Write a file; it has all of the text or is as before."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_requests(path: Path) -> list[Record]:
    """The lines of the input, each with an id; `ValueError` names the first that is wrong."""
    requests = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                request = {"id": number, **json.loads(line)}
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object: {error}") from error
            if not isinstance(request["id"], str | int):
                raise ValueError(f"{path}, line {number}: `id` must be a text or a number, got {request['id']!r}")
            requests.append(request)
    ids = [request["id"] for request in requests]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: `id` {next(one for one in ids if ids.count(one) > 1)!r} occurs twice")
    return requests


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
    check_config(arguments.model, read_config(arguments.model), settings)
    return settings.explicit()


def check_output(output: Path, requests: list[Record], retry_errors: bool) -> None:
    """Raise `ValueError` if the output is complete, unless errors are to be asked again and it answers the requests."""
    if not retry_errors:
        raise ValueError(f"{output} exists: a run that ended has written it; --retry-errors asks its errors again")
    if [answer["id"] for answer in whole_lines(output)] != [request["id"] for request in requests]:
        raise ValueError(f"{output} answers other requests")


def main() -> None:
    """Answer what is left of the input, and gather the answers when all are there."""
    arguments = parse_arguments()
    settings, requests = read_settings(arguments), read_requests(arguments.input)
    # A process that is done waits for the others, however long they take.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator, progress = Accelerator(kwargs_handlers=[patience]), Progress(arguments.output)
    if accelerator.is_main_process:
        if arguments.output.exists() and not progress.parts.exists():
            check_output(arguments.output, requests, arguments.retry_errors)
        asked = hashlib.sha256(json.dumps(requests).encode()).hexdigest()
        progress.begin({"model": arguments.model, **settings, "requests": asked}, arguments.retry_errors)
    accelerator.wait_for_everyone()

    finished = {record["id"] for record in whole_lines(progress.parts / "done.jsonl")}
    left = [request for request in requests if request["id"] not in finished]
    share = left[accelerator.process_index :: accelerator.num_processes]
    if share:
        answerer = Answerer(arguments.model, settings, arguments.input.parent, accelerator.device)
        for start in range(0, len(share), arguments.batch_size):
            answers = answerer.answer(share[start : start + arguments.batch_size])
            progress.append(accelerator.process_index, answers)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        answers = progress.finish([request["id"] for request in requests])
        errors = sum("error" in answer for answer in answers)
        print(f"{len(answers)} answers in {arguments.output}, {len(finished)} from earlier runs, {errors} errors")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
