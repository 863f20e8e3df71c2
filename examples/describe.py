r"""Describe a picture, and watch the blocks being written.

    python examples/describe.py photo.jpg --block-size 16 \
        --model fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct
"""

import argparse
import sys

import bard_vl
import torch
from transformers import AutoModelForImageTextToText, TextStreamer


class DraftStreamer(TextStreamer):
    """Prints finished blocks; on a terminal, also the block in progress in grey, with a glyph for each open token."""

    def __init__(self, processor: bard_vl.BardVLProcessor):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.processor = processor
        self.draft_length = 0

    def put_draft(self, value: torch.Tensor) -> None:
        """Replace the grey text by the block's present state: ids (1, block size)."""
        if sys.stdout.isatty():
            self.clear_draft()
            draft = self.processor.decode_draft(value[0]).replace("\n", " ")
            print(f"\033[90m{draft}\033[0m", end="", flush=True)
            self.draft_length = len(draft)

    def put(self, value: torch.Tensor) -> None:
        """Print a finished block in the place of its draft."""
        self.clear_draft()
        super().put(value)

    def clear_draft(self) -> None:
        """Erase the grey text."""
        print("\b \b" * self.draft_length, end="", flush=True)
        self.draft_length = 0


def main() -> None:
    """Read the command line, describe the picture, say what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="path or URL of a picture")
    parser.add_argument("--model", required=True, help="folder or Hub id of a Bard-VL checkpoint")
    parser.add_argument("--prompt", default="Describe the image.")
    parser.add_argument("--block-size", type=int, help="needed where the checkpoint's config.json does not state it")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()

    processor = bard_vl.BardVLProcessor.from_pretrained(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.bfloat16).to(device)
    content = [{"type": "image", "image": arguments.image}, {"type": "text", "text": arguments.prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    output = model.generate(
        **inputs,
        block_size=arguments.block_size,
        confidence_threshold=arguments.threshold,
        max_new_tokens=arguments.max_new_tokens,
        streamer=DraftStreamer(processor),
        return_dict_in_generate=True,
    )
    forwards = sum(output.num_forwards.values())
    print(f"{forwards} forwards, {output.tokens_per_forward[0]:.2f} tokens per forward")


if __name__ == "__main__":
    main()
