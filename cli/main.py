"""The program `bard-vl`: its commands, and how it ends."""

import inspect
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..app.errors import FAILURE, INTERRUPTED, USAGE, report
from ..app.session import quieten
from . import chat, demo, run
from .bench import bench
from .convert import convert

EPILOG = (
    "[bold]Exit codes[/bold]: 0 done, 1 failure, 2 a command line that cannot be meant, 130 interrupted. The last line "
    "on standard error then says why, behind `error: `. BARD_VL_TRACEBACK=1 puts the traceback above it."
)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
RAW = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
for command, examples in ((run.run, run.EXAMPLES), (chat.chat, chat.EXAMPLES), (demo.demo, demo.EXAMPLES)):
    # Line breaks of the source are none of the help's.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    folded = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    app.command(help=folded, epilog=examples)(command)
for front in (convert, bench):
    app.command(context_settings=RAW, add_help_option=False)(front)


@app.callback(invoke_without_command=True, epilog=EPILOG)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Bard-VL: a vision-language model that writes blocks of tokens at a time.

    `bard-vl COMMAND --help` shows what a command does, with examples.
    """
    if version:
        print(f"bard-vl {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        print("error: no command", file=sys.stderr)
        raise typer.Exit(USAGE)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code after an error was said in one line."""
    quieten()
    try:
        code = app(args=arguments, prog_name="bard-vl", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except SystemExit as ended:  # of the converter and the benchmarks, which have said why
        return ended.code if isinstance(ended.code, int) else FAILURE if ended.code else 0
    except Exception as error:
        return report(error)
    if code == INTERRUPTED:
        print("error: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0
