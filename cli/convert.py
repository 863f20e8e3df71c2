"""`bard-vl convert`: the converter of the repository, under the program's name."""

import sys

import typer

from .options import load_package


def convert(context: typer.Context) -> None:
    """Make a Bard-VL repository of a Qwen3-VL or Bard-VL checkpoint.

    The options are those of convert_qwen3vl_to_bard.py: --source, --output, --block-size, ...
    """
    load_package()
    from bard_vl import convert_qwen3vl_to_bard

    sys.argv[0] = "bard-vl convert"  # what its own help and errors are headed by
    raise SystemExit(convert_qwen3vl_to_bard.main(context.args))
