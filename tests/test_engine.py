"""The engine wastes nothing and every mode of it decides alike: forwards, host checks, masks and memory are counted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from bard_vl import BardVLGenerationOutput
from bard_vl.attention_bard_vl import TILE, Slots, attend_slots
from bard_vl.remasking_bard_vl import REMASKING_RULES
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import MASK, NO_ID, Row, collate, load, rows
from ragged import settings as arguments_of
from thorough import cases
from torch.overrides import TorchFunctionMode

SYNCHRONISING = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "cpu", "nonzero", "unique", "__bool__", "__int__", "__index__")
}


def run(batch: list[Row], **arguments: Any) -> BardVLGenerationOutput:
    return load().generate(**collate(batch), return_dict_in_generate=True, **arguments)


def assert_same(output: BardVLGenerationOutput, expected: BardVLGenerationOutput) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.block_step_counts, expected.block_step_counts)
    torch.testing.assert_close(output.confidences, expected.confidences, atol=1e-4, rtol=1e-3)


class HostChecks(TorchFunctionMode):
    """Counts the calls that make the host wait for the device, and those that send it numbers of the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.num_sent = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in SYNCHRONISING
        self.num_sent += function is torch.tensor
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):  # as many values as a device finds
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index)
        return function(*args, **(kwargs or {}))


@contextmanager
def forwards_of(model: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each forward of the language model: rows, width, whether there is a mask, its size."""
    seen: list[dict[str, Any]] = []

    def look(_module: Any, _args: Any, kwargs: Any) -> None:
        mask, shape = kwargs["attention_mask"], kwargs["inputs_embeds"].shape
        seen.append({"rows": shape[0], "width": shape[1], "mask": 0 if mask is None else mask.numel()})

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@st.composite
def any_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments with every rule, and with revision, or with blocks ahead and early ends."""
    arguments = draw(arguments_of()) | {
        "remasking_strategy": draw(st.sampled_from(sorted(REMASKING_RULES))),
        "entropy_bound": draw(st.sampled_from([0.0, 1.0, 6.0, 40.0])),
        "factor": draw(st.sampled_from([0.5, 2.0, 8.0])),
        "revision": draw(st.sampled_from([None, None, "overwrite", "remask"])),
        "revision_threshold": draw(st.sampled_from([None, 0.0, 0.1, 0.3, 1.0])),
    }
    if arguments["revision"] is None:
        arguments["end_at_first_eos"] = draw(st.booleans())
        if arguments["remasking_strategy"] != "low_confidence_static":
            arguments["concurrent_blocks"] = draw(st.sampled_from([1, 2, 4]))
    return arguments


@settings(max_examples=cases(30))
@given(batch=st.lists(rows(), min_size=1, max_size=4), arguments=any_arguments())
def test_every_rule_ends_in_time_with_revision_and_without(batch: list[Row], arguments: dict[str, Any]) -> None:
    output = run(batch, output_history=True, **arguments)
    assert (output.block_step_counts <= arguments["denoising_steps"]).all()
    assert not (output.sequences[:, -output.confidences.shape[1] :] == MASK).any()
    for place, row in enumerate(batch):
        alone = run([row], **arguments)
        length = int((alone.confidences > 0).sum())
        mine = output.sequences[place, -output.confidences.shape[1] :][:length]
        assert torch.equal(mine, alone.sequences[0, -alone.confidences.shape[1] :][:length])
        for step in output.history[place]:
            assert not (step.committed & step.revised).any()
            assert arguments["revision"] or not step.revised.any()


def test_revision_revises_and_the_history_tells() -> None:
    row = Row().add_text(20, 3)
    settings = {"block_size": 16, "denoising_steps": 16, "max_new_tokens": 64, "output_history": True}
    for revision, threshold in (("overwrite", 0.0), ("remask", 1.0)):
        output = run([row], revision=revision, revision_threshold=threshold, **settings)
        history = output.history[0]
        assert any(step.revised.any() for step in history)
        for before, step in pairwise(history):
            if step.block == before.block:
                changed = (before.ids != step.ids) & (before.ids != MASK)
                assert torch.equal(changed, step.revised)
                assert ((step.ids == MASK) & step.revised).any() == (revision == "remask" and step.revised.any())


@settings(max_examples=cases(20))
@given(batch=st.lists(rows(), min_size=1, max_size=4), arguments=arguments_of(), blocks=st.sampled_from([1, 3]))
def test_an_early_end_changes_no_token_and_takes_no_more_steps(
    batch: list[Row], arguments: dict[str, Any], blocks: int
) -> None:
    arguments |= {"remasking_strategy": "low_confidence_dynamic", "concurrent_blocks": blocks}
    whole, early = run(batch, **arguments), run(batch, **arguments, end_at_first_eos=True)
    assert torch.equal(early.sequences, whole.sequences)
    torch.testing.assert_close(early.confidences, whole.confidences, atol=1e-4, rtol=1e-3)
    fewer = whole.block_step_counts - early.block_step_counts
    is_last = torch.arange(fewer.shape[1]) == (whole.block_step_counts > 0).sum(-1, keepdim=True) - 1
    assert (fewer >= 0).all()
    assert (fewer[~is_last] == 0).all()


def test_an_early_end_waits_for_what_is_left_of_the_eos_and_for_nothing_else() -> None:
    row, sizes = Row().add_text(20, 7), {"block_size": 16, "denoising_steps": 16, "confidence_threshold": 1.0}
    whole = run([row], max_new_tokens=16, eos_token_id=NO_ID, output_history=True, **sizes)
    order = {int(step.committed.nonzero()): number for number, step in enumerate(whole.history[0], 1)}
    response = whole.sequences[0, len(row.ids) :].tolist()
    needed = [max(order[place] for place in range(length)) for length in range(1, 17)]  # steps of the first so many
    length = 11
    assert needed[length - 1] == 13
    assert response.index(response[length - 1]) == length - 1
    for limits in ({"max_new_tokens": 16, "eos_token_id": response[length - 1]}, {"max_new_tokens": length}):
        early = run([row], **{"eos_token_id": NO_ID, **limits}, end_at_first_eos=True, **sizes)
        assert early.sequences[0, len(row.ids) :].tolist() == response[:length]
        assert int(early.block_step_counts) == 13


def test_blocks_ahead_of_their_turn_are_decided_once_and_the_history_tells() -> None:
    row, sizes = Row().add_text(20, 3), {"block_size": 4, "confidence_threshold": 0.1, "max_new_tokens": 48}
    alone = run([row], **sizes)
    with forwards_of(load()) as seen:
        output = run([row], concurrent_blocks=3, output_history=True, **sizes)
    assert len(seen) == sum(output.num_forwards.values()) == int(output.block_step_counts.sum())
    assert len(seen) < sum(alone.num_forwards.values())
    assert max(forward["width"] for forward in seen[1:]) == 4 * 4  # a carried block, its own, two ahead
    times = torch.zeros(12, 4)
    for step in output.history[0]:
        times[step.block] += step.committed
    assert (times == 1).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"concurrent_blocks": 0}, "`concurrent_blocks`.* 0"),
        ({"concurrent_blocks": 2, "revision": "remask"}, "`concurrent_blocks=2`.*`revision='remask'`"),
        ({"end_at_first_eos": True, "revision": "overwrite"}, "`end_at_first_eos=True`.*`revision='overwrite'`"),
        ({"concurrent_blocks": 2, "remasking_strategy": "low_confidence_static"}, "not `low_confidence_static`"),
        ({"concurrent_blocks": 2, "repetition_penalty": 1.1}, "`concurrent_blocks=2`.*settings that change scores"),
        ({"concurrent_blocks": 2, "logits_processor": [lambda ids, scores: scores]}, "`logits_processor`"),
    ],
)
def test_what_cannot_go_with_blocks_ahead_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run([Row().add_text(5, 0)], block_size=4, **arguments)


@settings(max_examples=cases(20))
@given(
    batch=st.lists(rows(), min_size=1, max_size=5),
    arguments=any_arguments(),
    chunk=st.sampled_from([None, 1, 7, 16]),
    interval=st.integers(1, 4),
    cache=st.sampled_from(["dynamic", "static"]),
)
def test_every_mode_decides_alike(
    batch: list[Row], arguments: dict[str, Any], chunk: int | None, interval: int, cache: str
) -> None:
    mode = {"prefill_chunk_size": chunk, "check_interval": interval, "cache_implementation": cache}
    with torch.compiler.set_stance("force_eager"):
        output = run(batch, **mode, **arguments)
    assert_same(output, run(batch, **arguments))


@settings(max_examples=cases(10))
@given(batch=st.lists(rows(), min_size=1, max_size=4), arguments=arguments_of(), chunk=st.integers(1, 20))
def test_chunks_cost_a_forward_each_and_the_last_one_holds_the_first_step(
    batch: list[Row], arguments: dict[str, Any], chunk: int
) -> None:
    size = arguments["block_size"]
    whole = max(chunk // size, 1) * size
    num_chunks = -(-max(len(row.ids) for row in batch) // whole)
    with forwards_of(load()) as seen:
        output = run(batch, prefill_chunk_size=chunk, **arguments)
    assert output.num_forwards.get("prefill", 0) == num_chunks - 1
    assert len(seen) == sum(output.num_forwards.values())
    assert max(forward["rows"] * forward["width"] for forward in seen) <= max(whole + size, 2 * size) * len(batch)
    steps, num_blocks = output.block_step_counts.sum(-1), (output.block_step_counts > 0).sum(-1)
    # Every prompt token once, a block per step, and every block but a row's last one once more when it is finished.
    needed = sum(len(row.ids) for row in batch) + size * int((steps + num_blocks - 1).sum())
    assert sum(forward["rows"] * forward["width"] for forward in seen) == needed
    lengths = (output.confidences > 0).sum(-1)
    torch.testing.assert_close(output.tokens_per_forward, lengths / (steps + num_chunks - 1))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_no_forward_has_a_mask(num_rows: int) -> None:
    batch = [Row().add_text(21, seed) for seed in range(num_rows)]
    with forwards_of(load()) as seen:
        run(batch, block_size=8, denoising_steps=4, remasking_strategy="low_confidence_static", max_new_tokens=32)
    assert not any(forward["mask"] for forward in seen)
    widths = [29] + ([8] * 3 + [16]) * 3 + [8] * 3
    assert [forward["rows"] * forward["width"] for forward in seen] == [num_rows * width for width in widths]


# A CPU that decodes greedily counts the undecided positions, as no other device does, unless all of them matter.
@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("way", [{"temperature": 1.0}, {"revision": "overwrite", "revision_threshold": 1.0}], ids=str)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_host_looks_once_a_step(num_rows: int, way: dict[str, Any]) -> None:
    batch = [Row().add_text(12 + seed, seed) for seed in range(num_rows)]
    counts = []
    for num_blocks in (2, 12):
        with HostChecks() as checks:
            output = run(
                batch,
                block_size=4,
                denoising_steps=4,
                remasking_strategy="low_confidence_static",
                max_new_tokens=4 * num_blocks,
                **way,
            )
        assert sum(output.num_forwards.values()) == 4 * num_blocks
        counts.append(checks.count)
    # What a call reads once cancels out; the two are ten blocks of four steps apart.
    assert counts[1] - counts[0] == 40


@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("interval", [3, 7, 10**9])
def test_the_host_looks_when_the_steps_are_over(cache: str, interval: int) -> None:
    batch, slowly = [Row().add_text(12 + seed, seed) for seed in range(3)], "low_confidence_static"
    settings = {"block_size": 8, "max_new_tokens": 19, "check_interval": interval, "cache_implementation": cache}
    for steps in (1, 5):
        with torch.compiler.set_stance("force_eager"):
            output = run(batch, denoising_steps=steps, remasking_strategy=slowly, **settings)
        assert sum(output.num_forwards.values()) == int(output.block_step_counts[0].sum()) == 3 * steps
        assert "overrun" not in output.num_forwards
    # Rows that end their blocks early leave the host less to run than it may have thought.
    with torch.compiler.set_stance("force_eager"):
        output = run(batch, remasking_strategy="low_confidence_dynamic", confidence_threshold=0.0, **settings)
    assert sum(output.num_forwards.values()) <= 3 * 8
    assert sum(output.num_forwards.values()) == int(output.block_step_counts.sum(-1).max())


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@settings(max_examples=cases(12))
@given(data=st.data())
def test_slots_see_what_a_mask_would_show(heads: tuple[int, int], data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    key, value = (torch.randn(3, heads[1], 600, 8, generator=generator) for _ in range(2))
    size, table = data.draw(st.sampled_from([1, 4, 64])), []
    for _ in range(data.draw(st.integers(1, 3))):  # runs of a row's blocks, the last of them short or not
        row, first = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 50))
        ends = range(first + size, first + size * data.draw(st.integers(1, min(8, 2 * TILE // size))) + 1, size)
        table += [(row, size, end) for end in ends]
        table += [(row, 1, ends[-1] + 1)] if data.draw(st.booleans()) else []
    slots = Slots.of(*map(list, zip(*table, strict=True)), torch.device("cpu"))
    query = torch.randn(sum(count for _, count, _ in table), heads[0], 8, generator=generator)
    key[:, :, max(end for *_, end in table) :] = float("nan")  # nobody may look there
    found, begin = attend_slots(query, key, value, slots), 0
    assert sum(total for _, _, total, _ in slots.tiles()) == len(query)
    for row, count, end in table:
        mine = query[begin : begin + count].transpose(0, 1)[None]
        seen = (states[row : row + 1, :, :end].repeat_interleave(heads[0] // heads[1], 1) for states in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(mine, *seen)[0].transpose(0, 1)
        torch.testing.assert_close(found[begin : begin + count], expected)
        begin += count


PEAK = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/../benchmarks")
from measuring import peak_memory, reset_peak_memory
from ragged import Row, collate, load
model, inputs = load(), collate([Row().add_text(16384, 0)])
model.config.text_config.max_position_embeddings = 20000
before = reset_peak_memory(torch.device("cpu"))
chunk = int(sys.argv[2]) or None
ids = model.generate(**inputs, block_size=16, denoising_steps=2, max_new_tokens=16, prefill_chunk_size=chunk)
print(peak_memory(torch.device("cpu")) - before, ids[0, -16:].tolist())
"""


@pytest.mark.process
def test_memory_of_a_16k_prompt_holds_no_mask_and_is_bounded_by_the_chunk() -> None:
    peaks, tokens = [], []
    for chunk in (0, 512):
        command = [sys.executable, "-c", PEAK, __file__.rpartition("/")[0], str(chunk)]
        # An allocator that returns what is freed: else the peak is of what it keeps, which differs from run to run.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        peak, _, ids = output.partition(" ")
        peaks.append(int(peak) / 2**20)  # MiB
        tokens.append(ids)
    assert tokens[0] == tokens[1]
    # The visibility of 16k by 16k tokens alone would be 256 MiB.
    assert peaks[0] < 256
    assert peaks[1] < peaks[0]
