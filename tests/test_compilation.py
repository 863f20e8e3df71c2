"""Compiled layers in calls of `generate`: the same tokens, nothing compiled again, a fall-back that says so once."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration, BardVLGenerationOutput, layers_bard_vl
from bard_vl.layers_bard_vl import compiled
from ragged import MASK, NO_ID, Row, collate
from torch._dynamo.utils import counters

pytestmark = pytest.mark.compiled

SETTINGS = {"block_size": 4, "confidence_threshold": 0.1, "eos_token_id": NO_ID, "max_new_tokens": 24}
BATCH = [Row().add_text(3 + 5 * seed, seed) for seed in range(5)]
STATIC = {"cache_implementation": "static"}
GOLDEN = Path(__file__).parent / "golden" / "untied"


def load(**arguments: object) -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(
        GOLDEN, dtype=torch.float32, mask_token_id=MASK, **arguments
    ).eval()


def run(model: BardVLForConditionalGeneration, batch: list[Row], **arguments: object) -> BardVLGenerationOutput:
    return model.generate(**collate(batch), return_dict_in_generate=True, **(SETTINGS | arguments))


@pytest.mark.compiled
def test_after_a_warm_up_nothing_is_compiled_again() -> None:
    model = load()
    model.warm_up(5, 23, block_size=4, max_new_tokens=24)
    before = counters["stats"]["unique_graphs"]
    image = Row().add_text(9, 7).add_image((1, 4, 4), 1).add_text(50, 8)
    for batch, settings in (
        (BATCH, {}),
        (BATCH[1:3], {"prefill_chunk_size": 4, "remasking_strategy": "margin"}),
        ([image], {"max_new_tokens": 60, "denoising_steps": 2, "temperature": 1.0, "seed": 1}),
    ):
        output, expected = run(model, batch, **settings, **STATIC), run(model, batch, **settings)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.block_step_counts, expected.block_step_counts)
        torch.testing.assert_close(output.confidences, expected.confidences, atol=1e-4, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == before
    expected = [run(model, [row]).sequences.tolist() for row in BATCH]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda row: run(model, [row], **STATIC), BATCH))
    assert [output.sequences.tolist() for output in outputs] == expected


@pytest.mark.compiled
def test_layers_on_disk_run_as_their_modules_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = ("model.visual", "lm_head", *(f"model.language_model.{part}" for part in ("embed_tokens", "norm")))
    layers = {f"model.language_model.layers.{number}": "cpu" for number in range(2)}
    places = {**dict.fromkeys(parts, "cpu"), **layers, "model.language_model.layers.2": "disk"}
    mapped, before = load(device_map=places, offload_folder=tmp_path), counters["stats"]["unique_graphs"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output = run(mapped, BATCH[:1], **STATIC)
    assert torch.equal(output.sequences, run(load(), BATCH[:1]).sequences)
    assert counters["stats"]["unique_graphs"] == before
    assert sum("hooked or spread over devices" in record.getMessage() for record in caplog.records) == 1


def test_a_lack_of_memory_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([torch.OutOfMemoryError("full"), RuntimeError("no graph")])

    def fail(_: int) -> int:
        raise next(answers)

    layers_bard_vl.logger.warning_once.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    double = compiled(lambda value: 2 * value)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        double(1)
    assert [double(value) for value in range(3)] == [0, 2, 4]


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


@pytest.mark.process
@pytest.mark.compiled
def test_without_a_compiler_the_layers_run_eagerly_and_say_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FALL_BACK, str(Path(__file__).parent)]
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "same tokens\n", done.stderr
    assert "cannot compile the text layers" in done.stderr
