"""On a GPU: the reference's tokens, compiled and eager alike, no wait between two looks, bfloat16, gradients.

Skipped without one. `BARD_VL_TEST_DEVICE=cpu` runs what the tests do there, but for waiting and the gradients.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration, BardVLGenerationConfig, BardVLGenerationOutput, kernel_bard_vl
from bard_vl.attention_bard_vl import Slots
from bard_vl.generation_config_bard_vl import DecodingSettings
from bard_vl.recording_bard_vl import Recording, layers_of, recording, release_idle
from bard_vl.rows_bard_vl import Denoiser
from bard_vl.training.packing import TILE, dense_mask, flex_mask, pack
from fresh import call
from ragged import MASK, NO_ID, PAD, Row, collate
from test_golden import GOLDEN, VISUAL, cases_of, tensors_of
from test_golden import load as load_golden

DEVICE = torch.device(os.environ.get("BARD_VL_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
BATCH = [
    Row().add_text(9, 1),
    Row().add_text(5, 2).add_image((1, 4, 4), 3).add_text(3, 4),
    Row().add_text(17, 5),
    Row().add_video((2, 4, 4), 6).add_text(2, 7),
]
SETTINGS: dict[str, Any] = {"block_size": 4, "confidence_threshold": 0.15, "eos_token_id": NO_ID, "max_new_tokens": 28}
MODES = {
    "recorded": {},
    "eager": {"cache_implementation": "dynamic"},
    "eager, in chunks": {"cache_implementation": "dynamic", "prefill_chunk_size": 4},
    "watched": {"stopping_criteria": [lambda ids, _: torch.zeros(len(ids), dtype=torch.bool, device=ids.device)]},
}


@cache
def load(folder: str = "untied", dtype: torch.dtype = torch.float32) -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(GOLDEN / folder, dtype=dtype).to(DEVICE).eval()


def run(batch: list[Row], dtype: torch.dtype = torch.float32, **arguments: Any) -> BardVLGenerationOutput:
    inputs = {name: value.to(DEVICE) for name, value in collate(batch).items()}
    settings = {**SETTINGS, "mask_token_id": MASK, "pad_token_id": PAD, **arguments}
    return load(dtype=dtype).generate(**inputs, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("mode", ["recorded", "eager"])
@pytest.mark.parametrize(("folder", "case"), cases_of("generate"))
def test_the_references_tokens(folder: str, case: str, mode: str) -> None:
    _, tensors, cases = load_golden(folder)
    golden, arguments = tensors_of(tensors, case), cases[case]["arguments"]
    inputs = {name: golden[name].to(DEVICE) for name in ("input_ids", *VISUAL) if name in golden}
    ids, stats = load(folder).generate(inputs, return_step_stats=True, **arguments, **MODES[mode])
    assert ids[0].tolist() == golden["output_ids"][0, : ids.shape[1]].tolist()
    assert stats["block_step_counts"].tolist() == golden["block_step_counts"].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"remasking_strategy": "margin"}, {"revision": "remask"}, {"repetition_penalty": 1.4}),
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[7], [11, 12]], "sequence_bias": [[[9, 8], 3.0]]},
    ],
    ids=str,
)
def test_every_mode_decides_alike(mode: str, settings: dict[str, Any]) -> None:
    expected = run(BATCH, **settings)
    for _ in range(4):  # a CUDA graph runs, is recorded, is replayed
        output = run(BATCH, **settings, **MODES[mode])
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.block_step_counts, expected.block_step_counts)
    width = max(collate([row])["input_ids"].shape[1] for row in BATCH)
    for row, whole in zip(BATCH, expected.sequences[:, width:].tolist(), strict=True):
        alone = run([row], **settings).sequences[0, collate([row])["input_ids"].shape[1] :].tolist()
        assert alone + [PAD] * (len(whole) - len(alone)) == whole


def test_samples_follow_the_seed() -> None:
    sampled = {"temperature": 1.5, "top_p": 0.95, "num_return_sequences": 3}
    for mode in MODES.values():
        first, again, other = (run(BATCH, **sampled, **mode, seed=seed).sequences for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        generator = torch.Generator(DEVICE).manual_seed(1)
        one, two = (run(BATCH, **sampled, **mode, generator=generator).sequences for _ in range(2))
        assert torch.equal(one, first)
        assert not torch.equal(one, two)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error that the host waits for the device."""
    on_cuda = DEVICE.type == "cuda"
    if on_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_recorded_step_waits_for_nothing_and_leaves_its_memory() -> None:
    model, device = load(), DEVICE
    config = BardVLGenerationConfig(**SETTINGS, mask_token_id=MASK, cache_implementation="static")
    settings = DecodingSettings.resolve(config, model.config, 16)
    denoiser = Denoiser(settings, device)
    with recording(model, layers_of(model, settings), denoiser, (2, 256)) as lent:
        assert isinstance(lent, Recording)
        for _ in range(2):
            lent._replay(2, 2)
        with no_waiting():
            for _ in range(4):
                lent._replay(2, 2)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        del lent
        release_idle(model)
        assert torch.cuda.memory_allocated() < before


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the kernel runs on a GPU; test_kernel.py interprets it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 32, 8, 128), (4, 8, 2, 64), (32, 4, 2, 16), (1, 6, 2, 80)], ids=str)
def test_the_kernel_sees_what_it_should(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    block, heads, key_heads, size = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    make = {"device": DEVICE, "dtype": dtype, "generator": generator}
    key, value = (torch.randn(3, key_heads, 700, size, **make) for _ in range(2))
    key[:, :, 690:] = float("nan")  # nobody may look there
    for number in (1, 5, 200):
        rows = [slot % 3 for slot in range(number)]
        ends = [1 + block + (97 * slot) % 600 for slot in range(number)]
        slots = Slots.of(rows, [block] * number, ends, DEVICE)
        query = torch.randn(number * block, heads, size, **make)
        found = kernel_bard_vl.attend_slots(query, key, value, slots).unflatten(0, (number, block))
        for slot in range(0, number, 7):
            seen = (x[rows[slot]][None, :, : ends[slot]].double() for x in (key, value))
            mine = query[slot * block : (slot + 1) * block].double().transpose(0, 1)[None]
            expected = torch.nn.functional.scaled_dot_product_attention(mine, *seen, enable_gqa=True)[0].transpose(0, 1)
            error = (found[slot].double() - expected).norm() / expected.norm()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_decodes(mode: str) -> None:
    output = run(BATCH, torch.bfloat16, **MODES[mode])
    assert output.past_key_values.layers[0].keys.dtype == torch.bfloat16
    assert output.confidences.dtype == torch.float32
    response = output.sequences[:, -28:]
    assert ((response >= 0) & (response < 512) & (response != MASK)).all()


def test_the_next_turn_and_the_score_are_those_of_the_cpu() -> None:
    first = run([BATCH[1]])
    second = BATCH[1].then(first.sequences[0, -28:].tolist()).add_text(7, 9)
    assert torch.equal(run([second], past_key_values=first.past_key_values).sequences, run([second]).sequences)
    answers = torch.tensor([[5, 6, 7], [8, -100, -100]])
    inputs = collate([BATCH[1]])
    given = {"block_size": 4, "mask_token_id": MASK}
    on_cpu = BardVLForConditionalGeneration.from_pretrained(GOLDEN / "untied", dtype=torch.float32).eval()
    expected = on_cpu.score(inputs, answers, **given)
    found = load().score({name: value.to(DEVICE) for name, value in inputs.items()}, answers.to(DEVICE), **given)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="FlexAttention has no gradients on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_attention_learns_what_the_dense_mask_does(dtype: torch.dtype) -> None:
    from test_packing import conversation, summed_loss

    model, gradients = load(dtype=dtype), []
    samples = [conversation("mixture", lengths, number)[0] for number, lengths in enumerate([[9, 5], [60, 90]])]
    rows = pack(samples, 4, 1024, PAD, NO_ID, pad_to_multiple_of=TILE).to(DEVICE)
    for mask in (dense_mask(rows.layout())[:, None], flex_mask(rows.layout())):
        model.zero_grad()
        model(
            input_ids=rows.input_ids,
            attention_mask=mask,
            position_ids=rows.position_ids,
            visual_index=rows.visual_index,
            use_cache=False,
            objective=summed_loss(rows),
            **{name: value.to(dtype) if "pixel" in name else value for name, value in rows.visual_inputs.items()},
        ).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    similarity = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert similarity > (0.9999 if dtype == torch.float32 else 0.98)


def tokens_from_threads() -> list[bool]:
    """Of each of several batches: whether a thread's tokens are those of the main thread."""
    batches = [[Row().add_text(4 + seed, seed)] for seed in range(8)]
    expected = [run(batch, cache_implementation="dynamic").sequences.tolist() for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(run, batches))
    return [output.sequences.tolist() == tokens for output, tokens in zip(outputs, expected, strict=True)]


# Last, and in a process of its own: torch 2.11 crashes if anything compiles after a thread that compiled has ended.
def test_threads_decide_as_one(tmp_path: Path) -> None:
    assert call("test_cuda.tokens_from_threads", home=tmp_path, package=True) == [True] * 8
