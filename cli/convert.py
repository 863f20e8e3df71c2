"""`bard-vl convert`: the converter of the repository, under the program's name."""

import sys

import typer

from .. import convert_qwen3vl_to_bard


def convert(context: typer.Context) -> None:
    """Make a Bard-VL repository of a Qwen3-VL or Bard-VL checkpoint.

    The options are those of convert_qwen3vl_to_bard.py: --source, --output, --block-size, ...
    """
    sys.argv[0] = "bard-vl convert"  # what its own help and errors are headed by
    raise SystemExit(convert_qwen3vl_to_bard.main(context.args))
