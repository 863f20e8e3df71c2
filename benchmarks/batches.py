r"""Rows that advance on their own against rows in lock-step, counted on real decoding.

    python benchmarks/batches.py examples/checkpoint --image examples/images/*.png --batch 4 8

In lock-step a block takes as many forwards as its slowest row needs; with a cursor each, a batch takes as many as
the slowest row alone. A step in which some rows have finished a block and others have not is mixed: this engine runs
two blocks of the former and one of the latter, end to end; padded to the widest, all would run two. How many steps a
block takes depends on the text, so the checkpoint has to be a trained one.
"""

import argparse
from dataclasses import dataclass

import torch
from bard_vl import BardVLForConditionalGeneration, BardVLProcessor
from speculation import Count, add_decoding_arguments, decoding_settings, encoded_conversations


@dataclass
class Ways:
    """The work of one batch, prompts aside."""

    lock_step: Count
    padded_cursors: Count
    cursors: Count


def compare(step_counts: torch.Tensor, size: int) -> Ways:
    """Count forwards and tokens for (rows, blocks) denoising steps, 0 where a row has no such block."""
    lock_step = Count()
    for block in step_counts.unbind(1):
        rows, slowest = int((block > 0).sum()), int(block.max())
        lock_step.forwards += slowest
        lock_step.tokens += rows * size * slowest
    # A finished block runs along with the first step of the next, which every row that has one takes together.
    lock_step.tokens += size * int((step_counts[:, 1:] > 0).sum())
    padded, packed = Count(), Count()
    begins, totals = step_counts.cumsum(1), step_counts.sum(1)
    for number in range(int(totals.max())):
        running = totals > number
        moved_on = running & (begins == number).any(1) if number else torch.zeros_like(running)
        blocks = 1 + int(moved_on.any())
        padded.tokens += size * blocks * int(running.sum())
        packed.tokens += size * int(running.sum() + moved_on.sum())
    padded.forwards = packed.forwards = int(totals.max())
    return Ways(lock_step, padded, packed)


def main(arguments: list[str] | None = None) -> None:
    """Decode every conversation once, form batches of them in their order, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_decoding_arguments(parser)
    parser.add_argument("--batch", nargs="+", type=int, default=[4, 8], help="rows of a batch (default: 4 8)")
    chosen = parser.parse_args(arguments)
    model = BardVLForConditionalGeneration.from_pretrained(chosen.model, dtype=torch.float32).eval()
    settings = decoding_settings(chosen, model)
    counts = [
        model.generate(**inputs, **settings, do_sample=False, return_dict_in_generate=True).block_step_counts[0]
        for inputs in encoded_conversations(chosen, BardVLProcessor.from_pretrained(chosen.model))
    ]
    size = settings["block_size"]
    print("| rows | way | forwards | of lock-step | blocks per forward |", "|---:|---|---:|---:|---:|", sep="\n")
    for rows in chosen.batch:
        batches = [counts[first : first + rows] for first in range(0, len(counts) - rows + 1, rows)]
        ways = [compare(torch.nn.utils.rnn.pad_sequence(batch, batch_first=True), size) for batch in batches]
        lock_step = sum(way.lock_step.forwards for way in ways)
        for name in vars(Ways(Count(), Count(), Count())) if ways else ():
            forwards = sum(getattr(way, name).forwards for way in ways)
            tokens = sum(getattr(way, name).tokens for way in ways)
            print(
                f"| {rows} | {name.replace('_', ' ')} | {forwards} | {forwards / lock_step:.2f} "
                f"| {tokens / size / forwards:.2f} |"
            )


if __name__ == "__main__":
    main()
