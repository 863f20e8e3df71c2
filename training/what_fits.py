"""The models that fit on a GPU: the estimates of `cost` for the published sizes, as a table in Markdown.

python -m bard_vl.training.what_fits [--columns 4096]
"""

import argparse
import copy
import json
from typing import Any

import torch

from ..app.quantization import saved_bytes
from ..configuration_bard_vl import BardVLConfig
from ..modeling_bard_vl import BardVLForConditionalGeneration
from .arguments import ModelArguments
from .cost import GIB, memory_of
from .stages import CODE_FOLDER, DTYPES, with_adapters

# The differences from the repository's config.json, which is the 4B model's.
LARGER_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "2B": {
        "text_config": {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 6144,
        },
        "vision_config": {"out_hidden_size": 2048},
    },
    "4B": {},
    "8B": {
        "text_config": {"hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False},
        "vision_config": {**LARGER_VISION, "out_hidden_size": 4096},
    },
}
# As recipes/lora.yaml and recipes/finetune.yaml have it; GPUs, and how the weights are spread over them.
WAYS = (
    ("adapters on nf4 weights, one GPU", ModelArguments(use_lora=True, quantize="nf4", dtype="bfloat16"), 1, "none"),
    ("adapters, one GPU", ModelArguments(use_lora=True, dtype="bfloat16"), 1, "none"),
    ("all weights, one GPU", ModelArguments(), 1, "none"),
    ("all weights, 8 GPUs by FSDP2", ModelArguments(), 8, "fsdp"),
)
CARDS = (24, 80)  # GB


def config_of(size: str) -> BardVLConfig:
    """The config of a published size."""
    stated = copy.deepcopy(json.loads((CODE_FOLDER / "config.json").read_text("utf-8")))
    for part, changes in SIZES[size].items():
        stated[part] |= changes
    stated["tie_word_embeddings"] = stated["text_config"]["tie_word_embeddings"]
    return BardVLConfig(**stated)


def memory(size: str, settings: ModelArguments, num_processes: int, sharding: str, columns: int) -> float:
    """Bytes on each GPU for one packed row of `columns` tokens at a time, with gradient checkpointing and bfloat16."""
    config = config_of(size)
    with torch.device("meta"):
        model: Any = BardVLForConditionalGeneration(config).to(DTYPES[settings.dtype])
        saved = saved_bytes(model, settings.quantize) if settings.quantize else 0
        model = with_adapters(model, settings) if settings.use_lora else model
    rows = (1, columns)
    parts = memory_of(
        model,
        config,
        rows,
        sharding,
        num_processes,
        bf16=True,
        checkpointing=True,
        loss_chunk_size=1024,
        mask_form="dense",
    )
    return sum(parts.values()) - saved


def table(columns: int) -> str:
    """GiB on each GPU by way and size, and the cards that have them."""
    lines = [f"| | {' | '.join(SIZES)} |", f"|---|{'---:|' * len(SIZES)}"]
    for name, settings, num_processes, sharding in WAYS:
        sizes = [memory(size, settings, num_processes, sharding, columns) for size in SIZES]
        lines.append(f"| {name} | {' | '.join(f'{each / GIB:.0f} GiB, {card(each)}' for each in sizes)} |")
    return "\n".join(lines)


def card(size: float) -> str:
    """The smallest card that has a number of bytes, with a tenth to spare for what is not counted."""
    return next((f"{each} GB" for each in CARDS if size * 1.1 <= each * 1e9), "too much for 80 GB")


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=4096, help="tokens of a packed row (default: 4096)")
    columns = parser.parse_args(arguments).columns
    if columns < 1:
        parser.error(f"--columns must be at least 1, got {columns}")
    print(table(columns))


if __name__ == "__main__":
    main()
