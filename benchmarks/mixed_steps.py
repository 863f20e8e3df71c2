r"""Steps in which some rows of a batch have finished a block and others have not, timed.

    python benchmarks/mixed_steps.py --shape 100m --batch 8 --ragged 64 256

A row that has finished a block runs it, now clean, together with the next one. The engine lays rows of one block and
of two end to end (packed); padded to the widest, every row would run two. Columns are ms per forward, medians.
"""

import argparse
import statistics

import torch
from bard_vl import BardVLForConditionalGeneration, BardVLGenerationConfig
from bard_vl.cache_bard_vl import BardVLCache
from bard_vl.decoding_bard_vl import BlockDecoder
from bard_vl.generation_config_bard_vl import DecodingSettings
from bard_vl.hooks_bard_vl import DecodingHooks
from contenders import collate, make_prompts
from decoding import prompt_lengths
from measuring import seconds_of
from shapes import SHAPES, build_model


def started(model: BardVLForConditionalGeneration, prompts: list[torch.Tensor], block_size: int) -> BlockDecoder:
    """A decoder that has encoded the prompts, with room for four blocks behind them."""
    config = BardVLGenerationConfig(block_size=block_size, max_new_tokens=4 * block_size, eos_token_id=[])
    inputs = collate(prompts)
    settings = DecodingSettings.resolve(config, model.config, inputs["input_ids"].shape[1])
    cache = BardVLCache(model.config.text_config.num_hidden_layers)
    hooks = DecodingHooks(None, [], [], None, None, keep_history=False, deadline=float("inf"))
    prompt = model._realign(inputs["input_ids"], inputs["attention_mask"], {})
    decoder = BlockDecoder(model, prompt, [4 * block_size] * len(prompts), settings, cache, hooks)
    decoder.prefill(0, None)
    return decoder


def seconds_of_step(decoder: BlockDecoder, num_moved_on: int, is_padded: bool) -> float:
    """Seconds of the forward in which the first rows carry a finished block along; padded, all rows do."""
    size = decoder.settings.block_size
    carried = [size if is_padded or row < num_moved_on else 0 for row in decoder.rows]
    starts = [length + size - more for length, more in zip(decoder.lengths, carried, strict=True)]
    widths = [size + more for more in carried]
    return seconds_of(lambda: decoder.encoder.encode(decoder.slots, starts, widths, size), decoder.device)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Time every mixture in turn, round after round; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="100m")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--batch", type=int, default=8, help="rows (default: 8)")
    add("--ragged", type=int, nargs=2, metavar=("LOW", "HIGH"), default=(64, 256), help="lengths of their prompts")
    add("--block-size", type=int, default=16)
    add("--repetitions", type=int, default=9, help="timed rounds (default: 9)")
    chosen = parser.parse_args(arguments)
    device, shape = torch.device(chosen.device), SHAPES[chosen.shape]
    model = build_model(shape, device, getattr(torch, chosen.dtype), seed=0)
    decoder = started(model, make_prompts(prompt_lengths(chosen), shape, 0, device), chosen.block_size)
    mixtures = sorted({0, 1, chosen.batch // 2, chosen.batch - 1, chosen.batch})
    ways = [(mixture, padded) for mixture in mixtures for padded in (False, True)]
    seconds: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    for number in range(chosen.repetitions + 1):
        for way in ways:
            found = seconds_of_step(decoder, *way)
            if number:  # the first round warms up
                seconds[way].append(found)
    print("| rows with a finished block | packed | padded | packed over padded |", "|---:|---:|---:|---:|", sep="\n")
    for mixture in mixtures:
        packed, padded = (1000 * statistics.median(seconds[mixture, is_padded]) for is_padded in (False, True))
        print(f"| {mixture} of {chosen.batch} | {packed:.1f} | {padded:.1f} | {packed / padded:.2f} |")


if __name__ == "__main__":
    main()
