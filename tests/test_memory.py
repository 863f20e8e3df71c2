"""Memory is estimated before it is used: the cache and the weights to the byte, peaks within the stated factor."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import psutil
import pytest
import tiny
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, estimate_memory
from bard_vl.app import devices
from bard_vl.app.devices import free_memory
from bard_vl.app.memory import TOLERANCE, certain_bytes, check_fits, read_prompt, readable
from bard_vl.inputs_bard_vl import PromptSize, largest_pixels
from torch.profiler import ProfilerActivity, profile

IDS = tiny.IDS["small"]
SETTINGS = {
    "block_size": 16,
    "denoising_steps": 2,
    "remasking_strategy": "low_confidence_static",
    "eos_token_id": [],
    "max_new_tokens": 40,
}
# Proportions between the parts as published models have them, unlike those of the smallest test models.
TEXT = {
    **{"hidden_size": 512, "intermediate_size": 1920, "head_dim": 64, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 2**40, "vocab_size": 20_000},
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [16, 8, 8], "rope_type": "default"},
}
VISION = {"hidden_size": 512, "intermediate_size": 2048, "depth": 3, "num_heads": 8, "out_hidden_size": 512}


@cache
def load(
    dtype: torch.dtype = torch.float32, attention: str = "bard_vl", device: str = "cpu", vision: str = "sdpa"
) -> Any:
    config = tiny.qwen3vl_config(True, "small", dtype, TEXT)
    config["vision_config"] |= VISION
    config |= {"model_type": "bard_vl", "mask_token_id": IDS.mask_token_id}
    torch.manual_seed(0)
    with torch.device(device):
        model = BardVLForConditionalGeneration(BardVLConfig(**config)).to(dtype).eval()
    model.config.text_config._attn_implementation = attention
    model.config.vision_config._attn_implementation = vision
    return model


def prompt(*grids: tuple[int, int, int], text: int = 20, rows: int = 1) -> dict[str, Any]:
    """`text` tokens and images of these grids, in every row."""
    row = [65] * text
    for frames, height, width in grids:
        tokens = [IDS.image_token_id] * (frames * height * width // 4)
        row += [IDS.vision_start_token_id, *tokens, IDS.vision_end_token_id]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([row] * rows)}
    if grids:
        patches = sum(frames * height * width for frames, height, width in grids)
        inputs |= {"pixel_values": torch.zeros(patches * rows, 1536), "image_grid_thw": torch.tensor(grids * rows)}
    return inputs


def highest_use(function: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that the allocator gave at most at once while `function` ran, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest, result


def bytes_of(output: Any) -> int:
    layers = output.past_key_values.layers
    return sum(states.untyped_storage().nbytes() for layer in layers for states in (layer.keys, layer.values))


# Measured ------------------------------------------------------------------------------------------------------------

LARGE, SMALL = (1, 40, 40), (1, 12, 16)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "image": (prompt(LARGE), {}),
    "images": (prompt(*[SMALL] * 6), {}),
    "text": (prompt(text=900), {}),
    "text in chunks": (prompt(text=900), {"prefill_chunk_size": 128}),
    "image in chunks": (prompt(SMALL, text=900), {"prefill_chunk_size": 64}),
    "long response": (prompt(text=100), {"max_new_tokens": 300}),
    "batch": (prompt(SMALL, text=200, rows=3), {}),
    "several responses": (prompt(text=40), {"num_return_sequences": 4}),
    "one block": (prompt(text=23), {"max_new_tokens": 3}),
    "sampling": (prompt(text=20, rows=6), {"temperature": 1.0}),
    "nucleus sampling": (prompt(text=20, rows=6), {"temperature": 1.0, "top_p": 0.9}),
    "top k": (prompt(text=20, rows=6), {"temperature": 1.0, "top_k": 50}),
    "entropy": (prompt(text=20, rows=6), {"remasking_strategy": "entropy_bounded"}),
    "margin": (prompt(text=20, rows=6), {"remasking_strategy": "margin"}),
    "remask": (prompt(text=20, rows=6), {"revision": "remask"}),
}


# Every kind of prompt and of settings once more, in the dtype that a CPU computes slowly.
IN_BFLOAT16 = ("image in chunks", "batch", "several responses", "nucleus sampling", "remask")
AT_ONCE = ("image in chunks", "batch")  # in float32, by the quick selection


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, marks=() if case in AT_ONCE else pytest.mark.thorough) for case in CASES),
        *(pytest.param(case, torch.bfloat16, marks=pytest.mark.thorough) for case in IN_BFLOAT16),
    ],
    ids=str,
)
def test_cache_is_known_to_the_byte_and_the_peak_within_the_factor(case: str, dtype: torch.dtype) -> None:
    inputs, settings = CASES[case]
    settings = {**SETTINGS, **settings}
    model = load(dtype)
    estimate = estimate_memory(model, inputs, **settings)
    peak, output = highest_use(lambda: model.generate(**inputs, return_dict_in_generate=True, **settings))
    assert estimate.cache == bytes_of(output)
    assert peak / TOLERANCE < estimate.working < peak * TOLERANCE


@pytest.mark.thorough
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["text", "text in chunks"])
def test_other_attention_takes_what_is_estimated(case: str, attention: str) -> None:
    inputs, settings = CASES[case]
    settings = {**SETTINGS, **settings}
    model = load(attention=attention)
    estimate = estimate_memory(model, inputs, **settings)
    peak, _ = highest_use(lambda: model.generate(**inputs, **settings))
    assert peak / TOLERANCE < estimate.working < peak * TOLERANCE


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "dtype"), [("image", torch.float32), ("images", torch.bfloat16)], ids=str)
def test_a_vision_tower_of_plain_products_takes_what_is_estimated(case: str, dtype: torch.dtype) -> None:
    inputs, settings = CASES[case][0], SETTINGS
    model = load(dtype, vision="eager")
    estimate = estimate_memory(model, inputs, **settings)
    peak, _ = highest_use(lambda: model.generate(**inputs, **settings))
    assert peak / TOLERANCE < estimate.working < peak * TOLERANCE


def test_weights_are_counted_once_and_without_being_read() -> None:
    model = load()
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    held = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    found = estimate_memory(model, prompt(LARGE), **SETTINGS)
    assert found.weights == held
    assert estimate_memory(load(device="meta"), prompt(LARGE), **SETTINGS) == found
    assert found.total == found.weights + max(found.vision, found.prefill, found.decode)
    assert (found.prompt_tokens, found.visual_tokens, found.new_tokens) == (422, 400, 48)


def test_a_held_prefix_is_not_paid_again() -> None:
    model, inputs = load(), prompt(LARGE, text=64)
    size, settings = read_prompt(model, inputs, **SETTINGS)
    whole = estimate_memory(model, inputs, **SETTINGS)
    realigned = model.read_call(inputs, None, SETTINGS).prompt
    behind = PromptSize.of(model.config, realigned, first=size.lengths[0] - 1)
    assert behind.items == ()
    check_fits(model, behind, settings, torch.device("cpu"), whole.prefill // 4)
    with pytest.raises(ValueError, match="needs about"):
        check_fits(model, size, settings, torch.device("cpu"), whole.prefill // 4)


def test_free_memory_is_the_systems() -> None:
    assert free_memory(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (123e6, "123 MB"),
        (99.7e6, "100 MB"),
        (999.6e6, "1 GB"),
        (8.8e9, "8.8 GB"),
    ],
)
def test_readable_sizes(size: float, text: str) -> None:
    assert readable(int(size)) == text


# Too large -----------------------------------------------------------------------------------------------------------


def test_what_no_machine_has_is_refused() -> None:
    model, cpu = load(), torch.device("cpu")
    size, settings = read_prompt(model, prompt(text=9), **{**SETTINGS, "max_new_tokens": 10**9})
    with pytest.raises(
        ValueError, match=r"^a prompt of 9 .* about .* TB at most .* has .* GB free; or lower `max_new_tokens`"
    ):
        check_fits(model, size, settings, cpu, free_memory(cpu))


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.92 GB, ...)"),
    ],
    ids=["cuda", "cpu", "mps"],
)
def test_a_device_that_runs_out_of_memory_is_told_with_advice(error: RuntimeError) -> None:
    model, inputs = copy.deepcopy(load()), prompt(SMALL, text=20, rows=2)
    model.lm_head.register_forward_pre_hook(partial(fail, error))
    with pytest.raises(torch.OutOfMemoryError, match=r"^cpu ran out of memory over 2 row") as caught:
        model.generate(**inputs, **SETTINGS)
    assert caught.value.__cause__ is error
    for advice in ("`max_new_tokens`, which is 40", "`prefill_chunk_size`", "pixels", "fewer than 2 rows"):
        assert advice in str(caught.value)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model.generate(**prompt(text=20), **SETTINGS, prefill_chunk_size=16)
    for advice in ("`prefill_chunk_size`", "pixels", "fewer than"):
        assert advice not in str(caught.value)


def test_another_error_is_handed_on_as_it_is() -> None:
    model, error = copy.deepcopy(load()), RuntimeError("shapes do not match")
    model.lm_head.register_forward_pre_hook(partial(fail, error))
    with pytest.raises(RuntimeError) as caught:
        model.generate(**prompt(text=9), **SETTINGS)
    assert caught.value is error


def fail(error: RuntimeError, *_: Any) -> None:
    raise error


def test_responses_that_may_end_early_are_not_refused() -> None:
    model, long = load(), {**SETTINGS, "max_new_tokens": 100_000}
    size, settings = read_prompt(model, prompt(text=9, rows=8), **long)
    needed = estimate_memory(model, prompt(text=9, rows=8), **long).working
    free = needed // 10
    check_fits(model, size, settings, torch.device("cpu"), free)
    with pytest.raises(ValueError, match=r"or lower `max_new_tokens`, which is 100000; or give fewer than 8 prompts"):
        check_fits(model, size, replace(settings, cache_implementation="static"), torch.device("cpu"), needed // 4)


def test_what_is_sure_is_what_the_shortest_answers_take() -> None:
    model, inputs = load(), prompt(text=9, rows=8)
    ends = [token_id for token_id in range(20_000) if token_id != IDS.mask_token_id]
    settings = {**SETTINGS, "max_new_tokens": 20_000, "eos_token_id": ends}
    peak, output = highest_use(lambda: model.generate(**inputs, **settings, pad_token_id=0))
    assert output.shape[1] == 9 + 1
    sure = certain_bytes(model, *read_prompt(model, inputs, **settings))
    assert peak / TOLERANCE < sure < peak * TOLERANCE


def test_a_containers_limit_counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "CONTROL_GROUP", tmp_path)
    files = {"memory.max": "max", "memory.current": "60000000", "memory.stat": "anon 5\ninactive_file 20000000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    unlimited = free_memory(torch.device("cpu"))
    assert unlimited == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    for limit, free in ((100_000_000, 60_000_000), (30_000_000, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free_memory(torch.device("cpu")) == free


def test_the_error_names_the_estimate_and_the_pixels_that_fit() -> None:
    model, inputs = load(), prompt(LARGE, SMALL)
    size, settings = read_prompt(model, inputs, **SETTINGS)
    estimate, free = estimate_memory(model, inputs, **SETTINGS), 10_000_000
    with pytest.raises(ValueError, match="needs about") as caught:
        check_fits(model, size, settings, torch.device("cpu"), free)
    message = str(caught.value)
    assert message.startswith("a prompt of 472 tokens, 448 of images and videos needs about ")
    for part in (estimate.working, estimate.vision, estimate.prefill, estimate.decode, free):
        assert readable(part) in message
    limit = int(message.rpartition("`max_pixels` of an image is ")[2].partition(";")[0])
    smaller = estimate_memory(model, prompt_within(inputs, limit), **SETTINGS)
    larger = estimate_memory(model, prompt_within(inputs, limit + 32**2), **SETTINGS)
    assert smaller.working <= free / TOLERANCE < larger.working
    peak, _ = highest_use(lambda: model.generate(**prompt_within(inputs, limit), **SETTINGS))
    assert peak <= free


def prompt_within(inputs: dict[str, Any], max_pixels: int) -> dict[str, Any]:
    """The same prompt with pictures under a limit of pixels."""
    size, _ = read_prompt(load(), inputs, **SETTINGS)
    items = size.within(max_pixels, load().config.vision_config).items
    return prompt(*[(item.frames, item.height, item.width) for item in items])


def test_the_error_says_if_chunks_would_do() -> None:
    model, inputs = load(), prompt(text=6000)
    size, settings = read_prompt(model, inputs, **SETTINGS)
    with pytest.raises(ValueError, match="or set `prefill_chunk_size` to 1024"):
        check_fits(model, size, settings, torch.device("cpu"), 200_000_000)
    with pytest.raises(ValueError, match=r"free; no limit on the pixels of an image makes it fit$"):
        check_fits(model, read_prompt(model, prompt(SMALL), **SETTINGS)[0], settings, torch.device("cpu"), 1000)


@pytest.mark.parametrize("with_weights", [False, True])
def test_weights_count_where_they_are_still_to_be_read(with_weights: bool) -> None:
    model, inputs = load(), prompt(text=9)
    size, settings = read_prompt(model, inputs, **SETTINGS)
    estimate, free = estimate_memory(model, inputs, **SETTINGS), 5_000_000
    assert estimate.working < free < estimate.weights
    if with_weights:
        with pytest.raises(ValueError, match=f"{readable(estimate.weights)} of weights, "):
            check_fits(model, size, settings, torch.device("cpu"), free, estimate.weights)
    else:
        check_fits(model, size, settings, torch.device("cpu"), free, 0)


# Pixels --------------------------------------------------------------------------------------------------------------


def processed(processor: Any, images: list[Any], video: Any = None) -> dict[str, Any]:
    text = "<|vision_start|><|image_pad|><|vision_end|>a" * len(images)
    videos = [] if video is None else [(video, {"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4})]
    text += "<|vision_start|><|video_pad|><|vision_end|>" * len(videos)
    return dict(processor(text=[text], images=images or None, videos=videos or None, return_tensors="pt"))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from bard_vl import BardVLProcessor

    return BardVLProcessor.from_pretrained(tiny.write_processor_files(tmp_path_factory.mktemp("processor")))


@pytest.mark.parametrize("pixels", [5_000, 12_345, 40_000, 65_536])
def test_a_size_under_a_limit_is_what_the_processor_makes(processor: Any, pixels: int) -> None:
    from bard_vl.app.session import set_pixels

    images, frames = [tiny.draw((256, 192)), tiny.draw((96, 250)), tiny.draw((64, 64))], tiny.draw_frames(4, (160, 128))
    model = load()
    for part in (processor.image_processor, processor.video_processor):
        part.size = {"shortest_edge": 1024, "longest_edge": 10**6}
    size, _ = read_prompt(model, processed(processor, images, frames), **SETTINGS)
    set_pixels(processor, 1024, pixels)
    wanted, _ = read_prompt(model, processed(processor, images, frames), **SETTINGS)
    assert wanted != size
    assert size.within(pixels, model.config.vision_config) == wanted


def test_a_prompt_past_the_positions_is_refused_with_the_pixels_that_fit() -> None:
    model, inputs = load(), prompt((1, 64, 48), (1, 16, 40), rows=2)
    model = type(model)(BardVLConfig(**{**model.config.to_dict()}))
    model.config.text_config.max_position_embeddings = 90
    with pytest.raises(
        ValueError, match=r"reaches position 76: with 16 new tokens .* room for 0; it fits if"
    ) as caught:
        model.generate(**inputs, **SETTINGS)
    limit = int(str(caught.value).rpartition(" is ")[2])
    size, _ = read_prompt(load(), inputs, **SETTINGS)
    vision = model.config.vision_config
    assert max(size.within(limit, vision).positions) + 16 <= 90 < max(size.within(limit + 1024, vision).positions) + 16
    with pytest.raises(ValueError, match=r"no limit on the pixels of an image makes it fit$"):
        model.generate(**prompt((1, 64, 48), text=90), **SETTINGS)


def test_the_largest_limit_is_found_for_any_threshold() -> None:
    model = load()
    size, _ = read_prompt(model, prompt((1, 30, 22), (1, 12, 60), (1, 8, 8)), **SETTINGS)
    vision = model.config.vision_config
    for tokens in range(5, 361, 7):
        found = largest_pixels(size, vision, lambda smaller: sum(i.patches for i in smaller.items) // 4 <= tokens)  # noqa: B023
        counts = [sum(i.patches for i in size.within(limit, vision).items) // 4 for limit in (found, found + 1024)]
        assert counts[0] <= tokens < counts[1]
