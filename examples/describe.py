r"""Describe a picture, and watch the blocks being written.

    python examples/describe.py [examples/images/3.png]
    python examples/describe.py photo.jpg --model fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct

Without --model a small checkpoint beside this script answers. It knows coloured shapes on a grid of 4 x 4, a few words,
and four questions, word for word, about what is there: "Describe the picture.", "What is at b4?", "What is in row 4?",
"Which word is written?" (of a picture that shows one).
"""

import argparse
import sys
from pathlib import Path

import bard_vl
from bard_vl import DraftStreamer, UsageError, complete_settings, find_device, one_line, read_config, read_picture
from transformers import AutoModelForImageTextToText

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
PICTURE = HERE / "images" / "1.png"


def parse_arguments() -> tuple[argparse.Namespace, bard_vl.BardVLGenerationConfig]:
    """Read the command line; settings out of range end the script with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", default=str(PICTURE), help="path or URL of a picture, default: one of ours")
    parser.add_argument(
        "--model", default=str(CHECKPOINT), help="folder or Hub id of a checkpoint, default: a small one"
    )
    parser.add_argument("--prompt", default="Describe the picture.", help="what to ask, default: %(default)s")
    parser.add_argument("--block-size", type=int, help="default: as its config.json or its name says")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens to write, default: %(default)s")
    arguments = parser.parse_args()
    try:
        settings = bard_vl.BardVLGenerationConfig(
            block_size=arguments.block_size,
            confidence_threshold=arguments.threshold,
            max_new_tokens=arguments.max_new_tokens,
        )
    except ValueError as error:
        parser.error(one_line(error))
    try:
        settings, notices = complete_settings(arguments.model, read_config(arguments.model), settings)
    except UsageError as error:
        parser.error(one_line(error))
    for notice in notices:
        print(notice, file=sys.stderr)
    return arguments, settings


def describe(arguments: argparse.Namespace, settings: bard_vl.BardVLGenerationConfig) -> None:
    """Describe the picture, and say what it cost."""
    content = [{"type": "image", "image": read_picture(arguments.image)}, {"type": "text", "text": arguments.prompt}]
    processor = bard_vl.BardVLProcessor.from_pretrained(arguments.model)
    device = find_device()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto").to(device)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    output = model.generate(
        **inputs, generation_config=settings, streamer=DraftStreamer(processor), return_dict_in_generate=True
    )
    steps, forwards = output.block_step_counts[0].tolist(), sum(output.num_forwards.values())
    print(f"denoising steps of each block: {', '.join(map(str, steps))}")
    print(f"{forwards} forward{'s' * (forwards != 1)}, {output.tokens_per_forward[0]:.2f} tokens per forward")


def main() -> None:
    """Run the script; a wrong path, picture or setting ends it with one line."""
    try:
        describe(*parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
