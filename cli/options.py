"""Options that several commands take, and what becomes of them."""

import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .ending import Misuse, interrupted_at_once

if TYPE_CHECKING:
    from bard_vl.app.session import Session
    from bard_vl.forms_bard_vl import Form

MODEL, GENERATION, MEDIA, FORM = (
    "Model",
    "Generation",
    "Pictures and videos",
    "Form of the answer",
)  # panels of the help

# The settings of `generate` that have an option of their own, by their names; --set takes every other.
SETTINGS = {
    "block_size": Annotated[
        int | None,
        typer.Option(
            help="Tokens denoised together. Default: as the checkpoint's config says, or its name.",
            rich_help_panel=GENERATION,
        ),
    ],
    "confidence_threshold": Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Commit every token more probable than this; lower is faster. Default: the checkpoint's, or 0.9.",
            rich_help_panel=GENERATION,
        ),
    ],
    "denoising_steps": Annotated[
        int | None,
        typer.Option(
            "--steps", help="Denoising steps per block at most. Default: one per token.", rich_help_panel=GENERATION
        ),
    ],
    "max_new_tokens": Annotated[
        int | None,
        typer.Option(help="Longest response. Default: the checkpoint's, or 256.", rich_help_panel=GENERATION),
    ],
    "temperature": Annotated[
        float | None, typer.Option(help="Sample above 0. Default: 0, greedy.", rich_help_panel=GENERATION)
    ],
    "seed": Annotated[int | None, typer.Option(help="Repeat a sampled response.", rich_help_panel=GENERATION)],
}
# Options of all commands that open a checkpoint, in the order of their help.
OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="BARD_VL_MODEL",
            metavar="FOLDER|HUB_ID",
            help="Bard-VL checkpoint. Default: the small trained one of a checkout of the repository.",
            rich_help_panel=MODEL,
        ),
    ],
    "revision": Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", metavar="NAME", rich_help_panel=MODEL)
    ],
    "device": Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, mps, xpu. Default: the best that is there.",
            rich_help_panel=MODEL,
        ),
    ],
    "dtype": Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32. Default: the checkpoint's.", rich_help_panel=MODEL),
    ],
    "quantize": Annotated[
        str | None,
        typer.Option(
            help="int8 or nf4: the language model's linear layers in 8 or 4 bits.",
            metavar="int8|nf4",
            rich_help_panel=MODEL,
        ),
    ],
    "device_map": Annotated[
        str | None,
        typer.Option(
            help="auto: spread the weights over all GPUs, and over the CPU's memory if they are too small.",
            metavar="auto",
            rich_help_panel=MODEL,
        ),
    ],
    **SETTINGS,
    "others": Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of generation, for instance remasking_strategy=margin. Repeatable.",
            rich_help_panel=GENERATION,
        ),
    ],
    "max_pixels": Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most pixels of a picture, or of a video in all its frames. Default: the checkpoint's.",
            rich_help_panel=MEDIA,
        ),
    ],
    "min_pixels": Annotated[int | None, typer.Option(min=1, help="Least pixels of the same.", rich_help_panel=MEDIA)],
}

# The form of an answer, `structured` of `generate`, in one of the ways that users state it.
FORMS: dict[str, Any] = {
    "choices": Annotated[
        str | None, typer.Option(metavar="A|B|C", help="The answer is one of these texts.", rich_help_panel=FORM)
    ],
    "regex": Annotated[
        str | None, typer.Option(help="All of the answer matches this expression.", rich_help_panel=FORM)
    ],
    "json_schema": Annotated[
        str | None,
        typer.Option(
            metavar="JSON|FILE|boxes|points",
            help="The answer is JSON of this schema, or things with boxes or points as Qwen3-VL writes them.",
            rich_help_panel=FORM,
        ),
    ],
    "template": Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The answer is this text, each {name} filled in; prints the values.",
            rich_help_panel=FORM,
        ),
    ],
    "slots": Annotated[
        list[str] | None,
        typer.Option(
            "--slot",
            metavar="NAME=A|B or NAME=JSON",
            help='What may fill {name}: choices, or a form as JSON, for instance {"max_length": 20}. Repeatable.',
            rich_help_panel=FORM,
        ),
    ],
}
READY = {"boxes": "bbox_2d", "points": "point_2d"}  # schemas that have a name


def read_form(slots: list[str] | None, **forms: str | None) -> dict[str, Any] | None:
    """The form that the options of `FORMS` ask for; None for none, `Misuse` for half of one."""
    named: dict[str, Any] = {name: value for name, value in forms.items() if value is not None}
    if len(named) > 1 or (slots and "template" not in named):
        raise Misuse("give one of --choices, --regex, --json-schema and --template, and --slot only with the last")
    if (schema := named.get("json_schema")) in READY:
        from bard_vl.app.boxes import things_schema

        return {"json_schema": things_schema(READY[schema])}
    if schema is not None and not schema.lstrip().startswith("{"):
        try:
            named["json_schema"] = Path(schema).read_text(encoding="utf-8")
        except OSError as error:
            raise Misuse(f"--json-schema: {schema} cannot be read: {error.strerror}") from error
    if "choices" in named:
        named["choices"] = named["choices"].split("|")
    if "template" in named:
        named["slots"] = dict(read_slot(slot) for slot in slots or [])
    return named or None


def read_form_line(line: str) -> dict[str, Any] | None:
    """The form that a line of these options asks for; None for none. Errors are the command line's."""

    @asks_for_form
    def form(*, structured: dict[str, Any] | None) -> dict[str, Any] | None:
        return structured

    program = typer.Typer(add_completion=False)
    program.command(add_help_option=False)(form)
    return typer.main.get_command(program)(shlex.split(line), prog_name="/form", standalone_mode=False)


def shows_values(form: "Form | None") -> bool:
    """Whether an answer's values are printed, as JSON, in the place of its text."""
    return form is not None and form.is_template


def read_slot(text: str) -> tuple[str, Any]:
    """The name and the form of a slot."""
    name, equals, value = text.partition("=")
    if not equals:
        raise Misuse(f"--slot takes NAME=A|B or NAME=JSON, got {text!r}")
    if not value.startswith("{"):
        return name, {"choices": value.split("|")}
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise Misuse(f"--slot {name}: {error}") from error


def opens_session(command: Callable[..., Any], names: Iterable[str] = OPTIONS) -> Callable[..., Any]:
    """Give a command these options of `OPTIONS`, for its argument `options` and in its place."""
    own = {name: OPTIONS[name] for name in names}
    return with_options(command, "options", own, lambda **given: {**dict.fromkeys(OPTIONS), **given})


def asks_for_form(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `FORMS`, for its argument `structured` and in its place."""
    return with_options(command, "structured", FORMS, read_form)


def with_options(
    command: Callable[..., Any], argument: str, options: dict[str, Any], read: Callable[..., Any]
) -> Callable[..., Any]:
    """A command with these options in the place of an argument, which is what `read` makes of their values."""
    added = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=options[name]) for name in options]

    @functools.wraps(command)
    def expanded(**given: Any) -> Any:
        return command(**{argument: read(**{name: given.pop(name) for name in options})}, **given)

    signature = inspect.signature(command)
    own = signature.parameters.values()
    parameters = [each for parameter in own for each in (added if parameter.name == argument else [parameter])]
    expanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded


def load_package() -> None:
    """Import the package, which takes seconds; from here on transformers keeps its bars and advice to itself."""
    with interrupted_at_once():
        from bard_vl.app.session import quieten
    quieten()


def open_session(options: dict[str, Any], memory: int | None = None) -> "Session":
    """A session as the options of `OPTIONS` state it, before its weights are read; `UsageError` if one is wrong."""
    load_package()
    with interrupted_at_once():
        from bard_vl.app.session import Session, build_settings

        named = {name: value for name, value in options.items() if name in SETTINGS}
        others = {name: value for name, value in options.items() if name not in SETTINGS}
        return Session(others.pop("model"), build_settings(named, others.pop("others")), memory=memory, **others)


def print_notices(session: "Session") -> None:
    """Say on standard error what one should know about the checkpoint and its settings."""
    for notice in session.notices:
        print(notice, file=sys.stderr)
