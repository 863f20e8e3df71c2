"""The end of a command: exit codes, and one line on standard error that a script can rely on."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # beside 0; as shells have them
TRACEBACK_VARIABLE = "BARD_VL_TRACEBACK"


class Misuse(ValueError):
    """An invalid command line, found before the package is loaded."""

    exit_code = USAGE


def report(error: BaseException) -> int:
    """Print `error: ...` on standard error, in one line; the exit code.

    The traceback comes before it where the variable BARD_VL_TRACEBACK is set.
    """
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    # Errors of the command line's own parser know how to say what is wrong.
    message = error.format_message() if hasattr(error, "format_message") else str(error) or type(error).__name__
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return getattr(error, "exit_code", FAILURE)


@contextlib.contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Within, an interrupt ends the program on the spot, for the time of imports.

    As an exception it could rise inside any module that is being loaded: some swallow it, some print it.
    """
    is_own = threading.current_thread() is threading.main_thread()
    if not is_own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(*_: Any) -> None:
    """End the process; nothing is open yet that would need to be closed."""
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)
