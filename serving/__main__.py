"""`python -m bard_vl.serving MODEL [OPTIONS]`: `transformers serve`, with this package's classes, not remote code.

A folder that carries its code needs no more than `transformers serve FOLDER --trust-remote-code`. This serves it
without that trust, and checkpoints that carry none. Every option is that of `transformers serve`.
"""

import sys

from transformers import AutoModelForMultimodalLM

from .. import BardVLConfig, BardVLForConditionalGeneration


def main() -> None:
    """Register what serving loads models by, and hand the command line over."""
    from transformers.cli.transformers import app

    AutoModelForMultimodalLM.register(BardVLConfig, BardVLForConditionalGeneration)
    app(["serve", *sys.argv[1:]], prog_name="python -m bard_vl.serving")


if __name__ == "__main__":
    main()
