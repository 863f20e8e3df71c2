"""What the package's own programs keep out of logs: `bard-vl` and `python -m bard_vl...`."""

import logging
import os
import re
import sys

OWN = re.compile(r"(-m)?bard_vl(_cli)?(\.\w+)*|(.*[/\\])?bard-vl(\.exe)?")


def is_own_program() -> bool:
    """Whether this process was started as one of the package's programs; others that import it keep all their logs."""
    started = sys.orig_argv[-len(sys.argv) :][:1]  # the module behind -m, or the script, before its arguments
    return any(map(OWN.fullmatch, started))


def keep_logs_readable() -> None:
    """Leave out torchao's warning, and progress bars where standard error is no terminal.

    transformers imports torchao wherever it is installed, and tqdm reads its settings when it is imported: call this
    before both.
    """
    # torchao uses a call that torch will drop.
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: "Enum subclass" not in record.getMessage())
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # of bars whose owner does not decide
