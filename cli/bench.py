"""`bard-vl bench`: the decoding benchmark of the repository, under the program's name."""

import runpy
import sys
from pathlib import Path

import typer

from .options import load_package

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def bench(context: typer.Context) -> None:
    """Measure speed and memory of decoding, side by side with plain decoders.

    The options are those of benchmarks/decoding.py: --shape, --device, --steps, ...
    """
    if not (FOLDER / "decoding.py").is_file():
        raise FileNotFoundError(f"the benchmarks are not installed: run bard-vl from a checkout ({FOLDER} is missing)")
    load_package()
    sys.path.insert(0, str(FOLDER))  # its files import each other by name
    benchmark = runpy.run_path(str(FOLDER / "decoding.py"))["main"]
    sys.argv[0] = "bard-vl bench"  # what its own help and errors are headed by
    benchmark(context.args)
