"""Golden cases and ragged batches in every mode: cache, compilation, chunks, rows.

Compilation is real here. What is compiled serves all shapes of a model.
"""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from bard_vl import BardVLGenerationOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import MASK, NO_ID, PAD, Row, collate, rows
from test_golden import VISUAL, cases_of, load, tensors_of
from thorough import cases
from torch._dynamo.utils import counters

MODES = [  # of cache and layers: only calls with a static cache compile them
    ("dynamic", "eager"),
    ("static", "eager"),
    pytest.param("static", "compiled", marks=pytest.mark.compiled),
]
CHUNKS = {"whole prompt": None, "one block a chunk": 1}
BATCHES = [1, 5]
COMPANIONS = [
    Row().add_text(5, 1).add_image((1, 4, 4), 2).add_text(3, 3),
    Row().add_text(1, 4),
    Row().add_text(22, 8),
    Row().add_video((2, 4, 4), 5).add_text(2, 6),
]
# Cases that share a graph are side by side.
CASES = sorted(cases_of("generate"), key=lambda case: (case[0], load(case[0])[2][case[1]]["arguments"]["block_size"]))

graphs: Counter[str | None] = Counter()  # what this process has compiled, by model


@contextlib.contextmanager
def compilation(kind: str, folder: str | None) -> Any:
    """Forbid compilation, or let it be and expect few graphs of a model, whatever the shapes."""
    before = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("force_eager") if kind == "eager" else contextlib.nullcontext():
        yield
    # Three functions, each for the first number of tokens, for any, and for one alone.
    made = counters["stats"]["unique_graphs"] - before
    graphs[folder] += made
    assert made == 0 if folder is None or kind == "eager" else graphs[folder] <= 9


def row_of(golden: dict[str, torch.Tensor]) -> Row:
    """A golden prompt as a row of a batch."""
    items = {}
    for pixels, grids in (VISUAL[:2], VISUAL[2:]):
        grid = golden.get(grids, torch.empty(0, 3, dtype=torch.long))
        parts = golden[pixels].split(grid.prod(-1).tolist()) if len(grid) else ()
        items[pixels] = list(zip(parts, map(tuple, grid.tolist()), strict=True))
    return Row(golden["input_ids"][0].tolist(), items["pixel_values"], items["pixel_values_videos"])


@pytest.mark.thorough(every=11)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("cache", "kind"), MODES)
@pytest.mark.parametrize("num_rows", BATCHES)
@pytest.mark.parametrize(("folder", "case"), CASES)
def test_golden_cases(folder: str, case: str, num_rows: int, cache: str, kind: str, chunk: str) -> None:
    model, tensors, cases = load(folder)
    golden, arguments = tensors_of(tensors, case), cases[case]["arguments"]
    place = num_rows // 2
    batch = [*COMPANIONS[:place], row_of(golden), *COMPANIONS[place : num_rows - 1]]
    mode = {"cache_implementation": cache, "check_interval": 2, "prefill_chunk_size": CHUNKS[chunk]}
    with compilation(kind, folder if cache == "static" else None):
        output = model.generate(**collate(batch), return_dict_in_generate=True, pad_token_id=PAD, **arguments, **mode)
    expected = golden["output_ids"][0, : arguments["max_new_tokens"]].tolist()
    if arguments["eos_token_id"] in expected:
        expected = expected[: expected.index(arguments["eos_token_id"]) + 1]
    width = output.confidences.shape[1]
    assert output.sequences[place, -width:].tolist() == expected + [PAD] * (width - len(expected))
    steps = output.block_step_counts[place]
    assert steps[steps > 0].tolist() == golden["block_step_counts"].flatten().tolist()


@st.composite
def arguments_of_a_family(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments whose calls share the graphs of block size 4."""
    return {
        "block_size": 4,
        "denoising_steps": draw(st.integers(1, 4)),
        "remasking_strategy": draw(st.sampled_from(["low_confidence_dynamic", "low_confidence_static", "factor"])),
        "confidence_threshold": draw(st.sampled_from([0.0, 0.1, 0.2, 0.9])),
        "max_new_tokens": draw(st.integers(1, 24)),
        "eos_token_id": draw(st.sampled_from([[NO_ID], list(range(0, 500, 12))])),
        "revision": draw(st.sampled_from([None, "overwrite"])),
        "mask_token_id": MASK,
        "pad_token_id": PAD,
    }


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("cache", "kind"), MODES)
@pytest.mark.parametrize("num_rows", BATCHES)
def test_ragged_batches(num_rows: int, cache: str, kind: str, chunk: str) -> None:
    model = load("untied")[0]

    def run(batch: list[Row], arguments: dict[str, Any], **mode: Any) -> BardVLGenerationOutput:
        return model.generate(**collate(batch), return_dict_in_generate=True, **arguments, **mode)

    @settings(max_examples=cases(8))
    @given(batch=st.lists(rows(), min_size=num_rows, max_size=num_rows), arguments=arguments_of_a_family())
    def compare(batch: list[Row], arguments: dict[str, Any]) -> None:
        output = run(batch, arguments, cache_implementation=cache, prefill_chunk_size=CHUNKS[chunk])
        expected = run(batch, arguments)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.block_step_counts, expected.block_step_counts)
        torch.testing.assert_close(output.confidences, expected.confidences, atol=1e-4, rtol=1e-3)

    with torch.compiler.set_stance("force_eager") if kind == "eager" else contextlib.nullcontext():
        compare()
