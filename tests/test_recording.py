"""The step that CUDA graphs record, run here launch by launch: the same tokens, and nothing that the host waits for."""

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration, BardVLGenerationOutput, layers_bard_vl, recording_bard_vl
from bard_vl.generation_config_bard_vl import BardVLGenerationConfig, DecodingSettings
from bard_vl.recording_bard_vl import NUM_IDLE, Recording, layers_of
from bard_vl.remasking_bard_vl import REMASKING_RULES
from bard_vl.rows_bard_vl import Denoiser
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import MASK, NO_ID, Row, collate, rows
from ragged import settings as arguments_of
from test_engine import HostChecks, any_arguments
from thorough import cases
from torch.utils._python_dispatch import TorchDispatchMode

BLOCKS: dict[str, Any] = {"block_size": 4, "confidence_threshold": 0.1, "eos_token_id": NO_ID, "max_new_tokens": 24}
BATCH = [Row().add_text(3 + 5 * seed, seed) for seed in range(5)]
STATIC = {"cache_implementation": "static"}
GOLDEN = Path(__file__).parent / "golden" / "untied"


@cache
def load() -> BardVLForConditionalGeneration:
    """A model that no other test has hooked or changed."""
    return BardVLForConditionalGeneration.from_pretrained(GOLDEN, dtype=torch.float32, mask_token_id=MASK).eval()


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls that ask for compiled steps take the way of recorded ones; nothing is compiled."""
    monkeypatch.setattr(recording_bard_vl, "DEVICES", recording_bard_vl.DEVICES)
    recording_bard_vl.DEVICES.add("cpu")
    with torch.compiler.set_stance("force_eager"):
        yield
    recording_bard_vl.DEVICES.discard("cpu")


def run(batch: list[Row], model: Any = None, **arguments: Any) -> BardVLGenerationOutput:
    return (model or load()).generate(**collate(batch), return_dict_in_generate=True, **arguments)


def assert_same(output: BardVLGenerationOutput, expected: BardVLGenerationOutput) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.block_step_counts, expected.block_step_counts)
    torch.testing.assert_close(output.confidences, expected.confidences, atol=1e-4, rtol=1e-3)
    overrun = output.num_forwards.get("overrun", 0)
    assert overrun <= 1
    assert sum(output.num_forwards.values()) - overrun == sum(expected.num_forwards.values())


@settings(max_examples=cases(20))
@given(batch=st.lists(rows(), min_size=1, max_size=5), arguments=any_arguments())
def test_recorded_steps_decide_as_eager_ones(batch: list[Row], arguments: dict[str, Any]) -> None:
    assert_same(run(batch, **arguments, **STATIC), run(batch, **arguments))


def test_more_blocks_ahead_than_a_response_has_take_no_room() -> None:
    several = {**BLOCKS, "concurrent_blocks": 10**12}
    assert_same(run(BATCH, **several, **STATIC), run(BATCH, **several))


@settings(max_examples=cases(8))
@given(lengths=st.lists(st.integers(1, 30), min_size=9, max_size=14), arguments=arguments_of(), seed=st.integers(0, 99))
def test_many_rows_of_which_some_carry_and_some_have_ended(
    lengths: list[int], arguments: dict[str, Any], seed: int
) -> None:
    batch = [Row().add_text(length, seed + place) for place, length in enumerate(lengths)]
    output = run(batch, **arguments, **STATIC)
    assert "overrun" not in output.num_forwards
    assert_same(output, run(batch, **arguments))


class Follower:
    """A streamer that notes what it gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[int]]] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(("put", value.flatten().tolist()))

    def put_draft(self, value: torch.Tensor) -> None:
        self.seen.append(("draft", value.tolist()))

    def end(self) -> None:
        self.seen.append(("end", []))


PROCESSED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4, "suppress_tokens": [3, 5]},
    {"no_repeat_ngram_size": 2, "bad_words_ids": [[7], [11, 12]], "revision": "remask"},
    {"sequence_bias": [[[4], 2.0], [[9, 8, 7], 5.0]]},
]


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("processed", PROCESSED, ids=lambda chosen: ",".join(chosen))
@torch.no_grad()
def test_the_processors_of_the_settings_are_part_of_a_step(
    processed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [BLOCKS | processed, BLOCKS | {"repetition_penalty": 0.7}, BLOCKS | processed]
    for arguments in calls:
        assert_same(run(BATCH, **arguments, **STATIC), run(BATCH, **arguments))
    lent = recording_bard_vl._kept[load()].idle[-1][1]
    assert lent.processors is not None
    monkeypatch.setattr(layers_bard_vl, "attend_slots", lambda query, *_: query)  # a kernel on a GPU
    with HostChecks() as checks:
        lent.step(5, 5)
    assert (checks.count, checks.num_sent) == (0, 0)


def test_callers_that_look_at_the_steps_see_the_same() -> None:
    row, seen = BATCH[2], []
    for mode in ({}, STATIC):
        follower = Follower()
        run([row], **BLOCKS, **mode, streamer=follower)
        seen.append(follower.seen)
    assert seen[0] == seen[1]
    assert [kind for kind, _ in seen[0]].count("draft") >= 4
    plain, static = (run(BATCH, **BLOCKS, **mode, output_history=True).history for mode in ({}, STATIC))
    for mine, theirs in zip(plain, static, strict=True):
        for step, other in zip(mine, theirs, strict=True):
            assert step.block == other.block
            assert all(torch.equal(getattr(step, name), getattr(other, name)) for name in ("ids", "committed"))
            torch.testing.assert_close(step.confidence, other.confidence, atol=1e-4, rtol=1e-3)


def test_a_criterion_ends_rows_between_recorded_steps() -> None:
    whole = run(BATCH, **BLOCKS).sequences[:, -24:]
    stops = {int(whole[row, 5 + 4 * row]) for row in range(3)}

    def criterion(ids: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.tensor([int(ids[0, -1]) in stops])

    outputs = [run(BATCH, **BLOCKS, **mode, stopping_criteria=[criterion]) for mode in ({}, STATIC)]
    assert_same(outputs[1], outputs[0])
    assert outputs[0].num_forwards == outputs[1].num_forwards
    lengths = (outputs[0].confidences > 0).sum(-1).tolist()
    assert min(lengths) < 24
    assert all(int(whole[row, length - 1]) in stops for row, length in enumerate(lengths) if length < 24)


@pytest.mark.thorough
def test_recorded_samples_follow_the_seed_and_the_generator() -> None:
    sampled = {**BLOCKS, **STATIC, "temperature": 1.5, "num_return_sequences": 4}
    first, again, other = (run(BATCH[:2], **sampled, seed=seed).sequences for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == len(first)
    generator = torch.Generator().manual_seed(1)
    one, two = (run(BATCH[:2], **sampled, generator=generator).sequences for _ in range(2))
    assert torch.equal(one, first)
    assert not torch.equal(one, two)
    cold = run(BATCH[:2], **BLOCKS, **STATIC, temperature=1e-6, seed=3)
    assert torch.equal(cold.sequences, run(BATCH[:2], **BLOCKS).sequences)


def test_the_next_turn_and_several_responses() -> None:
    first, static = (run(BATCH[:2], **BLOCKS, **mode) for mode in ({}, STATIC))
    turns = [row.then(first.sequences[place, -24:].tolist()).add_text(5, 9) for place, row in enumerate(BATCH[:2])]
    expected = run(turns, **BLOCKS)
    for kept in (first.cache, static.cache):
        assert_same(run(turns, **BLOCKS, **STATIC, past_key_values=kept), expected)
    assert_same(
        run(BATCH[1:3], **BLOCKS, **STATIC, num_return_sequences=3), run(BATCH[1:3], **BLOCKS, num_return_sequences=3)
    )


def test_a_returned_cache_owns_its_memory_and_later_calls_find_the_same_buffers() -> None:
    model = load()
    first = run(BATCH[3:4], **BLOCKS, **STATIC)
    kept = [layer.keys.clone() for layer in first.cache.layers]
    (_, lent), *_ = recording_bard_vl._kept[model].idle[-1:]
    addresses = {states.data_ptr() for pair in lent.buffers for states in pair}
    assert not addresses & {layer.keys.data_ptr() for layer in first.cache.layers}
    run(BATCH[2:3], **BLOCKS, **STATIC)
    assert recording_bard_vl._kept[model].idle[-1][1] is lent
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(first.cache.layers, kept, strict=True))


@pytest.mark.thorough
def test_threads_share_no_recording() -> None:
    batches = [[Row().add_text(4 + seed, seed)] for seed in range(9)]
    expected = [run(batch, **BLOCKS).sequences.tolist() for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda batch: run(batch, **BLOCKS, **STATIC), batches))
    assert [output.sequences.tolist() for output in outputs] == expected
    assert len(recording_bard_vl._kept[load()].idle) <= NUM_IDLE


@pytest.mark.thorough
def test_few_recordings_wait_and_none_keeps_a_model_alive() -> None:
    model = BardVLForConditionalGeneration.from_pretrained(GOLDEN).eval()
    for size in (2, 4, 8, 3):
        run(BATCH[:1], model, mask_token_id=MASK, **(BLOCKS | {"block_size": size}), **STATIC)
    assert len(recording_bard_vl._kept[model].idle) == NUM_IDLE
    recording_bard_vl.release_idle(model)
    assert recording_bard_vl._kept[model].idle == []
    run(BATCH[:1], model, mask_token_id=MASK, **BLOCKS, **STATIC)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_failed_call_leaves_a_recording_that_serves_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("cancelled")

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "_look", fail)
        with pytest.raises(RuntimeError, match="cancelled"):
            run(BATCH[:2], **BLOCKS, **STATIC)
    assert_same(run(BATCH[:2], **BLOCKS, **STATIC), run(BATCH[:2], **BLOCKS))


class Operations(TorchDispatchMode):
    """Counts what a device is asked to do, views aside."""

    VIEWS = (
        *(
            "view",
            "_unsafe_view",
            "expand",
            "transpose",
            "slice",
            "select",
            "unsqueeze",
            "t",
            "detach",
            "alias",
            "split",
        ),
        *("split_with_sizes", "unbind", "as_strided", "_reshape_alias", "permute", "empty", "empty_like", "unfold"),
        *("squeeze", "lift_fresh", "new_empty", "empty_strided", "unsafe_split"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name.split("::")[1] not in self.VIEWS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", REMASKING_RULES)
@torch.no_grad()
def test_a_step_reads_nothing_and_has_few_operations(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_bard_vl, "attend_slots", lambda query, *_: query)  # one launch on a GPU
    model, counts = load(), []
    config = BardVLGenerationConfig(**BLOCKS, mask_token_id=MASK, remasking_strategy=rule, **STATIC)
    decoding = DecodingSettings.resolve(config, model.config, 8)
    lent = Recording(model, layers_of(model, decoding), Denoiser(decoding, torch.device("cpu")), (4, 256))
    further = Denoiser(replace(decoding, concurrent_blocks=3), torch.device("cpu"))
    several = Recording(model, layers_of(model, decoding), further, (4, 256))
    with HostChecks() as checks:
        lent.step(4, 4)
        several.step(4, 4)
    assert (checks.count, checks.num_sent) == (0, 0)
    layers = lent.layers.layers
    for number in (1, 3):
        monkeypatch.setattr(lent.layers, "layers", layers[:number])
        with Operations() as operations:
            lent.step(4, 4)
        counts.append(operations.count)
    each = (counts[1] - counts[0]) / 2
    assert each <= 47  # as its modules: 58; compiled, three launches and the products
    assert counts[0] - each <= 165
