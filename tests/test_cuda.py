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
from bard_vl import BardVLForConditionalGeneration, BardVLGenerationConfig, BardVLGenerationOutput
from bard_vl.cache_bard_vl import BardVLCache
from bard_vl.decoding_bard_vl import BlockDecoder
from bard_vl.generation_config_bard_vl import DecodingSettings
from bard_vl.hooks_bard_vl import DecodingHooks
from bard_vl.training.packing import dense_mask, flex_mask, pack
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
    "dynamic": {},
    "dynamic, looked at now and then": {"check_interval": 3},
    "chunks": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
    "static, looked at now and then": {"cache_implementation": "static", "check_interval": 4},
}


@cache
def load(folder: str = "untied", dtype: torch.dtype = torch.float32) -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(GOLDEN / folder, dtype=dtype).to(DEVICE).eval()


def run(batch: list[Row], dtype: torch.dtype = torch.float32, **arguments: Any) -> BardVLGenerationOutput:
    inputs = {name: value.to(DEVICE) for name, value in collate(batch).items()}
    settings = {**SETTINGS, "mask_token_id": MASK, "pad_token_id": PAD, **arguments}
    return load(dtype=dtype).generate(**inputs, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("mode", ["dynamic", "dynamic, looked at now and then", "chunks"])
@pytest.mark.parametrize(("folder", "case"), cases_of("generate"))
def test_the_references_tokens(folder: str, case: str, mode: str) -> None:
    _, tensors, cases = load_golden(folder)
    golden, arguments = tensors_of(tensors, case), cases[case]["arguments"]
    inputs = {name: golden[name].to(DEVICE) for name in ("input_ids", *VISUAL) if name in golden}
    ids, stats = load(folder).generate(inputs, return_step_stats=True, **arguments, **MODES[mode])
    assert ids[0].tolist() == golden["output_ids"][0, : ids.shape[1]].tolist()
    assert stats["block_step_counts"].tolist() == golden["block_step_counts"].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"remasking_strategy": "margin"}, {"revision": "remask"}], ids=str)
def test_every_mode_decides_alike(mode: str, settings: dict[str, Any]) -> None:
    expected = run(BATCH, **settings)
    for _ in range(4):  # a CUDA graph runs, is recorded, is replayed
        output = run(BATCH, **settings, **MODES[mode])
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.block_step_counts, expected.block_step_counts)
    for row, whole in zip(BATCH, expected.sequences[:, -28:].tolist(), strict=True):
        assert run([row], **settings).sequences[0, -28:].tolist() == whole


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


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("way", [{}, {"temperature": 1.0, "top_p": 0.9}, {"revision": "remask"}], ids=str)
@torch.no_grad()
def test_steps_between_two_looks_wait_for_nothing(way: dict[str, Any], is_static: bool) -> None:
    model, inputs = load(), {name: value.to(DEVICE) for name, value in collate(BATCH[::2]).items()}
    cache_kind = {"cache_implementation": "static"} if is_static else {}
    config = BardVLGenerationConfig(**SETTINGS, mask_token_id=MASK, check_interval=8, **way, **cache_kind)
    settings = DecodingSettings.resolve(config, model.config, inputs["input_ids"].shape[1])
    hooks = DecodingHooks(None, [], [], None, None, keep_history=False, deadline=float("inf"))
    for is_measured in (False, True):  # what is made at first use may wait
        prompt = model._realign(inputs["input_ids"], inputs["attention_mask"], {})
        block_cache = BardVLCache(model.config.text_config.num_hidden_layers)
        decoder = BlockDecoder(model, prompt, settings, block_cache, hooks)
        decoder.prefill(0, [] if is_static else None)
        with no_waiting() if is_measured else contextlib.nullcontext():
            for _ in range(6):
                decoder.step()


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
    rows = pack([conversation("mixture", [9, 5])[0]], 4, 250, PAD, NO_ID).to(DEVICE)
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
    expected = [run(batch).sequences.tolist() for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda batch: run(batch, cache_implementation="static"), batches))
    return [output.sequences.tolist() == tokens for output, tokens in zip(outputs, expected, strict=True)]


# Last, and in a process of its own: torch 2.11 crashes if anything compiles after a thread that compiled has ended.
def test_threads_decide_as_one(tmp_path: Path) -> None:
    assert call("test_cuda.tokens_from_threads", home=tmp_path, package=True) == [True] * 8
