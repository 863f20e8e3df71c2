"""`python -m bard_vl.serving MODEL [OPTIONS]`: `transformers serve`, with this package's classes, not remote code.

A folder that carries its code needs no more than `transformers serve FOLDER --trust-remote-code`. This serves it
without that trust, and checkpoints that carry none. It opens no file and no address that a request names, and tells a
client what is wrong with a request. Options beside those of `transformers serve`:
"""

import argparse
import sys
from typing import Any

import transformers
from packaging.version import Version
from transformers.utils import logging

from .. import BardVLConfig, BardVLForConditionalGeneration, BardVLGenerationConfig
from ..app.checkpoints import complete_settings, read_config
from ..app.session import build_settings
from ..configuration_bard_vl import check_integer

logger = logging.get_logger(__name__)

PROGRAM = "python -m bard_vl.serving"
OLDEST = "5.9.0"  # the first transformers whose `serve` loads other classes than its own


def main() -> None:
    """Register what serving loads models by, and hand the command line over."""
    if Version(transformers.__version__) < Version(OLDEST):
        sys.exit(f"error: serving needs transformers {OLDEST} or newer, this is {transformers.__version__}")
    from transformers import AutoModelForMultimodalLM
    from transformers.cli.transformers import app

    stated, settings, others = parse_arguments(sys.argv[1:])
    AutoModelForMultimodalLM.register(BardVLConfig, model_with(settings))
    try:
        from transformers.cli.serving import server

        from .gate import Limits, guarded

        # `serve` looks its factory up when it starts, and has no other place for what goes around its handlers.
        limits = Limits(stated.max_picture_pixels, stated.allow_addresses, stated.max_new_tokens)
        server.build_server = guarded(server.build_server, limits)
        app(["serve", *others], prog_name=PROGRAM)
    except (ImportError, ValueError) as error:  # what serving needs beside transformers, or a model
        sys.exit(f"error: {' '.join(str(error).split())}")


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, BardVLGenerationConfig, list[str]]:
    """The options as stated, the settings that requests begin with, and the arguments of `transformers serve`.

    Exit code 2 if one is wrong.
    """
    parser = argparse.ArgumentParser(PROGRAM, f"{PROGRAM} MODEL [OPTIONS]", __doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--block-size", type=int, help="default: as the checkpoint's config.json or its name says")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any other setting that requests begin with, for instance remasking_strategy=margin; repeatable",
    )
    parser.add_argument("--allow-addresses", action="store_true", help="open pictures at http(s) addresses, too")
    parser.add_argument(
        "--max-picture-pixels",
        type=int,
        default=100_000_000,
        metavar="N",
        help="of a request's pictures together, default: %(default)s",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="of a response, whatever a request asks for, default: %(default)s",
    )
    stated, others = parser.parse_known_args(arguments)
    if "--help" in others:
        parser.print_help()
    try:
        named = {"block_size": stated.block_size, "confidence_threshold": stated.threshold}
        settings = build_settings(named, stated.set)
        check_integer("--max-picture-pixels", stated.max_picture_pixels, minimum=1)
        check_integer("--max-new-tokens", stated.max_new_tokens, minimum=1)
    except ValueError as error:
        parser.error(str(error))
    return stated, settings, others


def model_with(settings: BardVLGenerationConfig) -> type[BardVLForConditionalGeneration]:
    """The model's class, which loads checkpoints with `settings` on top of those stored with them."""

    class Served(BardVLForConditionalGeneration):
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            name = pretrained_model_name_or_path
            where = {"revision": kwargs["revision"]} if kwargs.get("revision") else {}
            completed, notices = complete_settings(str(name), read_config(str(name), **where), settings, **where)
            for notice in notices:
                logger.warning(notice)
            model = super().from_pretrained(name, *args, **kwargs)
            model.generation_config = model.merge_settings(completed, {})
            return model

    Served.__name__ = BardVLForConditionalGeneration.__name__  # by which `serve` knows that it sees pictures
    return Served


if __name__ == "__main__":
    main()
