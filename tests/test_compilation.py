"""Compiled steps: the same tokens, one compilation a shape, and a fall-back that says so once."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration, BardVLGenerationOutput
from bard_vl.compilation_bard_vl import compiled_step
from ragged import MASK, NO_ID, Row, collate
from torch._dynamo.utils import counters

SETTINGS = {"block_size": 4, "confidence_threshold": 0.1, "eos_token_id": NO_ID, "max_new_tokens": 24}
BATCH = [Row().add_text(3 + 5 * seed, seed) for seed in range(5)]


@pytest.fixture(scope="module")
def model() -> BardVLForConditionalGeneration:
    path = Path(__file__).parent / "golden" / "untied"
    return BardVLForConditionalGeneration.from_pretrained(path, dtype=torch.float32, mask_token_id=MASK)


def run(model: BardVLForConditionalGeneration, batch: list[Row], **arguments: object) -> BardVLGenerationOutput:
    return model.generate(**collate(batch), return_dict_in_generate=True, **(SETTINGS | arguments))


def test_one_compilation_a_shape_and_the_same_tokens(model: BardVLForConditionalGeneration) -> None:
    for batch in ([BATCH[0]], BATCH):
        counters.clear()
        model.warm_up(len(batch), max(len(row.ids) for row in batch), max_new_tokens=24, block_size=4)
        assert counters["stats"]["unique_graphs"] == 2  # a block, and a finished block with the next
        for interval, chunk in ((1, None), (1, 4), (3, None)):
            mode = {"cache_implementation": "static", "check_interval": interval, "prefill_chunk_size": chunk}
            output, expected = run(model, batch, **mode), run(model, batch)
            assert torch.equal(output.sequences, expected.sequences)
            assert torch.equal(output.block_step_counts, expected.block_step_counts)
            torch.testing.assert_close(output.confidences, expected.confidences, atol=1e-4, rtol=1e-3)
        if len(batch) == 1:  # other prompts, other lengths, images, other settings: the same graphs
            image = Row().add_text(9, 7).add_image((1, 4, 4), 1).add_text(50, 8)
            other = {"max_new_tokens": 60, "denoising_steps": 2, "remasking_strategy": "low_confidence_static"}
            output = run(model, [image], cache_implementation="static", **other)
            assert torch.equal(output.sequences, run(model, [image], **other).sequences)
        assert counters["stats"]["unique_graphs"] == 2


def test_steps_do_not_keep_a_model_alive() -> None:
    model = torch.nn.Linear(2, 2)
    compiled_step(model, (1, 4, 256, 4))
    assert compiled_step(model, (1, 4, 256, 4)) is compiled_step(model, (1, 4, 256, 4))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


FALL_BACK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from ragged import Row, collate, load
batch, settings = collate([Row().add_text(9, 0)]), dict(block_size=4, max_new_tokens=12, eos_token_id=511)
expected = load().generate(**batch, **settings)
for _ in range(2):
    assert torch.equal(load().generate(**batch, cache_implementation="static", **settings), expected)
print("same tokens")
"""


def test_without_a_compiler_the_step_runs_eagerly_and_says_so_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FALL_BACK, str(Path(__file__).parent)]
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "same tokens\n", done.stderr
    assert done.stderr.count("cannot compile the decoding step") == 1
