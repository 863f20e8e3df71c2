"""The benchmark compares like with like: its plain decoder is the reference's, every rung gives the engine's tokens."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import VISUAL, cases_of, load, tensors_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from plain_decoder import LADDER, MASKLESS, LadderDecoder, Rung, Task  # noqa: E402
from shapes import SHAPES, Shape, build_model, config_of, num_parameters, stock_twin  # noqa: E402

CPU = torch.device("cpu")


def golden_decoder(folder: str, case: str, rung: Rung) -> tuple[LadderDecoder, list[int], torch.Tensor]:
    """A decoder set on a golden case, and the tokens and steps that are expected."""
    model, tensors, cases = load(folder)
    golden, task = tensors_of(tensors, case), Task(**cases[case]["arguments"])
    inputs = {name: golden[name] for name in ("input_ids", *VISUAL) if name in golden}
    positions = model.get_position_ids(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})
    twin = stock_twin(model, MASKLESS if rung.maskless else "sdpa")
    expected = golden["output_ids"][0, : task.max_new_tokens].tolist()
    if task.eos_token_id in expected:
        expected = expected[: expected.index(task.eos_token_id) + 1]
    return LadderDecoder(twin, rung, task, inputs, positions), expected, golden["block_step_counts"]


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
@pytest.mark.parametrize(("folder", "case"), cases_of("generate"))
def test_every_rung_reproduces_the_golden_cases(folder: str, case: str, rung: Rung) -> None:
    decoder, expected, steps = golden_decoder(folder, case, rung)
    assert decoder.run() == expected
    assert [decoder.steps] == steps.tolist()
