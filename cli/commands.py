"""The commands of `bard-vl`."""

import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from . import batch, chat, check, demo, models, run
from .bench import bench
from .convert import convert
from .ending import INTERRUPTED, USAGE

EPILOG = (
    "[bold]Exit codes[/bold]: 0 done, 1 failure, 2 an invalid command line, 3 a batch with errors among its answers, "
    "130 interrupted. Except for 0 and 3, the last line on standard error then says why, behind `error: `. "
    "BARD_VL_TRACEBACK=1 puts the traceback above it."
)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an interrupt as an exit code: typer would print an empty line for the exception."""

    @functools.wraps(command)
    def interruptible_command(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return interruptible_command


RAW = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
DOCUMENTED = (
    (run.run, run.EXAMPLES),
    (chat.chat, chat.EXAMPLES),
    (batch.batch, batch.EXAMPLES),
    (demo.demo, demo.EXAMPLES),
    (models.models, models.EXAMPLES),
    (check.check, check.EXAMPLES),
)
for command, examples in DOCUMENTED:
    # Line breaks of the source are none of the help's.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    folded = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    app.command(help=folded, epilog=examples)(interruptible(command))
for front in (convert, bench):
    app.command(context_settings=RAW, add_help_option=False)(interruptible(front))


@app.callback(invoke_without_command=True, epilog=EPILOG)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Bard-VL: a vision-language model that writes blocks of tokens at a time.

    `bard-vl COMMAND --help` shows what a command does, with examples.
    """
    if version:
        print(f"bard-vl {importlib.metadata.version('bard-vl')}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        print("error: no command", file=sys.stderr)
        raise typer.Exit(USAGE)


def execute(arguments: list[str] | None) -> int:
    """Run the command that `arguments` state, by default those of the process; its exit code."""
    try:
        code = app(args=arguments, prog_name="bard-vl", standalone_mode=False)
    except typer.Abort:  # an interrupt outside the commands
        code = INTERRUPTED
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
