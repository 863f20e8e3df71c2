"""How a command ends: exit codes, and one line on standard error that a script can rely on."""

import os
import sys
import traceback

FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # beside 0; as shells have them
TRACEBACK_VARIABLE = "BARD_VL_TRACEBACK"


class UsageError(ValueError):
    """A command line that cannot be meant; ends the program with exit code 2."""


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def report(error: BaseException) -> int:
    """Print `error: ...` on standard error, in one line; the exit code.

    The traceback comes before it where the variable BARD_VL_TRACEBACK is set.
    """
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    # What the command line's own parser raises knows its exit code and how to say it.
    message = error.format_message() if hasattr(error, "format_message") else one_line(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE if isinstance(error, UsageError) else getattr(error, "exit_code", FAILURE)
