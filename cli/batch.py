"""`bard-vl batch`: many questions about pictures, by as many workers as there are GPUs."""

import importlib.util
import json
from enum import Enum
from typing import Annotated, Any

import typer

from .ending import Misuse, interrupted_at_once
from .options import asks_for_form, open_session, opens_session, print_notices

INPUTS, WORK = "Input", "Work"
WHERE = ("revision", "device", "dtype", "max_pixels", "min_pixels", "quantize", "device_map")  # of a session


class Engine(str, Enum):
    """The engine of a worker."""

    generate = "generate"
    vllm = "vllm"


@opens_session
@asks_for_form
def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A JSONL or parquet file, a folder of them or of pictures, or a data set of the Hub (OWNER/NAME). "
            "Paths, or addresses like s3://bucket/questions.jsonl.",
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT",
            help="A file that ends in .jsonl, in the order of the input; else a folder of JSONL parts.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to ask where a row has no prompt. Default for a folder of pictures: a description.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.", rich_help_panel=INPUTS)] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME=COLUMN",
            help="Which column is the id, prompt, image, images or messages, if another than that of the name.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a data set of the Hub.", metavar="NAME", rich_help_panel=INPUTS)
    ] = "train",
    config: Annotated[
        str | None,
        typer.Option(help="Configuration of a data set of the Hub.", metavar="NAME", rich_help_panel=INPUTS),
    ] = None,
    *,
    options: dict[str, Any],
    structured: dict[str, Any] | None,
    engine: Annotated[
        Engine, typer.Option(help="What decodes: this package, or vLLM.", rich_help_panel=WORK)
    ] = Engine.generate,
    vllm: Annotated[
        list[str] | None,
        typer.Option(
            "--vllm",
            metavar="NAME=VALUE",
            help="An argument of vLLM's LLM, for instance max_model_len=8192. Repeatable.",
            rich_help_panel=WORK,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Requests decoded together. Default: 8, with vLLM 256.", rich_help_panel=WORK),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes with the model. Default: one per GPU, else 1.", rich_help_panel=WORK),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="A Ray cluster to work on. Default: this machine.",
            rich_help_panel=WORK,
        ),
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again what ended in an error.", rich_help_panel=WORK)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress on standard error.", rich_help_panel=WORK)
    ] = False,
) -> None:
    """Answer every row of an input, and resume where an earlier run stopped.

    A row is a prompt with images, or a chat under messages. Answers are on disk as they come: the same command goes on
    after any interruption. Rows that cannot be answered get an error. The exit code is 3 if there is any.
    """
    if importlib.util.find_spec("ray") is None:
        raise Misuse('batches need Ray: pip install "bard-vl[batch]"')
    named = read_columns(columns or [])
    arguments = dict(read_argument(text) for text in vllm or [])
    if engine is Engine.vllm:
        check_vllm(options, structured)
    elif vllm:
        raise Misuse("--vllm goes with --engine vllm")
    session = open_session(options)
    if not quiet:
        print_notices(session)
    session.read_form(structured)
    with interrupted_at_once():
        from bard_vl.batch import files
        from bard_vl.batch.job import Plan, run_batch
        from bard_vl.batch.requests import PICTURES, QUESTION, Asking, find_pieces
        from bard_vl.batch.workers import Recipe

    pieces = find_pieces(source, config, split)
    if prompt is None and any(piece.kind == PICTURES for piece in pieces):
        prompt = QUESTION
    settings = session.settings.explicit()
    recipe = Recipe(
        model=files.anywhere(session.name),
        seed=settings.pop("seed", None),
        settings=settings,
        asking=Asking(prompt, system, named),
        where={name: options[name] for name in WHERE},
        gpus=int(session.device.type == "cuda"),
        engine=engine.value,
        structured=structured,
        vllm=arguments,
    )
    plan = Plan(batch_size or (8 if engine is Engine.generate else 256), workers, ray_address)
    code = run_batch(pieces, output, recipe, plan, retry_errors, quiet)
    if code:
        raise typer.Exit(code)


EXAMPLES = """\
[bold]Examples[/bold]

bard-vl batch questions.jsonl answers.jsonl --model Bard-VL-4B

bard-vl batch photos captions --prompt "What is in the picture?" --model Bard-VL-4B

bard-vl batch s3://bucket/questions s3://bucket/answers --ray-address auto --model Bard-VL-4B
"""


def check_vllm(options: dict[str, Any], structured: Any) -> None:
    """Raise `Misuse` for what vLLM does not do here."""
    if structured:
        raise Misuse("answers of a given form are not for --engine vllm")
    for name in ("quantize", "device_map"):
        if options[name] is not None:
            raise Misuse(f"--{name.replace('_', '-')} is not for --engine vllm")


def read_argument(text: str) -> tuple[str, Any]:
    """The name and the value of an argument, which is JSON or else a text; `Misuse` if it has no name."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Misuse(f"--vllm takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def read_columns(texts: list[str]) -> dict[str, str]:
    """Columns by the names that they stand for; `Misuse` if one stands for nothing."""
    known = ("id", "prompt", "image", "images", "messages")
    columns = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not equals or name not in known or not column:
            raise Misuse(f"--column takes NAME=COLUMN with a NAME of {', '.join(known)}, got {text!r}")
        columns[name] = column
    return columns
