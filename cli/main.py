"""The program `bard-vl`: how it starts and how it ends.

The folder is installed as the package `bard_vl_cli`, beside `bard_vl`, which loads torch and transformers: help, the
version and mistyped options need not wait for them. So the package is imported inside the commands only.
"""

import os
import sys

from .ending import FAILURE, INTERRUPTED, interrupted_at_once, report


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code after an error was said in one line."""
    try:
        with interrupted_at_once():
            from .commands import execute
        code = execute(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except SystemExit as ended:  # of the converter and the benchmarks, which have said why
        return ended.code if isinstance(ended.code, int) else FAILURE if ended.code else 0
    except Exception as error:
        return report(error)
    return code
