"""Compiled steps: the same tokens, one compilation a shape, and a fall-back that says so once."""

import gc
import logging
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bard_vl import (
    BardVLForConditionalGeneration,
    BardVLGenerationOutput,
    compilation_bard_vl,
)
from bard_vl.attention_bard_vl import with_own_code
from bard_vl.compat_bard_vl import one_cache
from bard_vl.compilation_bard_vl import (
    NUM_IDLE_BUFFERS,
    NUM_STEPS,
    NUM_WARM_UP_RUNS,
    Step,
    compile_with_fallback,
    compiled_step,
    lent_buffers,
)
from bard_vl.remasking_bard_vl import REMASKING_RULES, Chooser
from ragged import MASK, NO_ID, Row, collate
from torch._dynamo.utils import counters

SETTINGS = {"block_size": 4, "confidence_threshold": 0.1, "eos_token_id": NO_ID, "max_new_tokens": 24}
BATCH = [Row().add_text(3 + 5 * seed, seed) for seed in range(5)]


GOLDEN = Path(__file__).parent / "golden" / "untied"


def load(**arguments: object) -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(
        GOLDEN, dtype=torch.float32, mask_token_id=MASK, **arguments
    ).eval()


@pytest.fixture(scope="module")
def model() -> BardVLForConditionalGeneration:
    return load()


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


def test_threads_share_a_compiled_step_and_no_buffer(model: BardVLForConditionalGeneration) -> None:
    batches = [[Row().add_text(4 + seed, seed)] for seed in range(12)]
    expected = [run(model, batch).sequences.tolist() for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda batch: run(model, batch, cache_implementation="static"), batches))
    assert [output.sequences.tolist() for output in outputs] == expected


@pytest.mark.parametrize("rule", REMASKING_RULES)
def test_every_rules_choice_is_one_graph(rule: str) -> None:
    chooser = Chooser(MASK, 0.0, 0, 1.0, REMASKING_RULES[rule].measure, keeps_present=True)
    generator = torch.Generator().manual_seed(0)
    logits, held = torch.randn(2, 4, 512, generator=generator), torch.randint(512, (2, 4), generator=generator)
    compiled = torch.compile(lambda *args: chooser.choose(*args), fullgraph=True, backend="aot_eager")
    for mine, expected in zip(compiled(logits, held), chooser.choose(logits, held), strict=True):
        torch.testing.assert_close(mine, expected)


@contextmanager
def addresses_in_steps(model: BardVLForConditionalGeneration) -> Iterator[list[int]]:
    """Where the keys of the last layer lie before each forward on a static cache; it runs eagerly to be looked at."""
    seen: list[int] = []

    def look(_module: object, _args: tuple, kwargs: dict) -> None:
        if (layer := one_cache(kwargs.get("past_key_values"), kwargs.get("cache")).layers[-1]).is_lent:
            seen.append(layer.keys.data_ptr())

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        hook.remove()


def test_steps_of_later_calls_find_the_same_buffers() -> None:
    model = load()
    static = {"cache_implementation": "static"}
    with addresses_in_steps(model) as seen:
        for batch in (BATCH, BATCH[::-1], BATCH[1:] + BATCH[:1]):
            run(model, batch, **static)
        assert len(seen) > 30
        assert len(set(seen)) == 1
        seen.clear()
        for interval, rule in ((1, "margin"), (3, "entropy_bounded")):
            run(model, [BATCH[0]], **static, check_interval=interval, remasking_strategy=rule)
        run(model, [BATCH[0]], **static, temperature=1.0)
        assert len(set(seen)) == 1


def test_a_returned_cache_owns_its_memory() -> None:
    model, row = load(), Row().add_text(16, 1)
    static = {"cache_implementation": "static"}
    with addresses_in_steps(model) as seen:
        first = run(model, [row], **static)
        assert not any(layer.is_lent or layer.keys.data_ptr() in seen for layer in first.past_key_values.layers)
        kept = [layer.keys.clone() for layer in first.past_key_values.layers]
        run(model, [Row().add_text(40, 2)], **static)  # in the same buffers
        assert len(set(seen)) == 1
        for layer, keys in zip(first.past_key_values.layers, kept, strict=True):
            assert layer.keys.shape[2] == sum(map(len, first.past_key_values.contents)) < 64
            assert torch.equal(layer.keys, keys)
        second = row.then(first.sequences[0, 16:].tolist()).add_text(5, 3)
        output = run(model, [second], past_key_values=first.past_key_values, **static)
    assert torch.equal(output.sequences, run(model, [second]).sequences)
    assert output.num_encoded_tokens.item() < len(second.ids) - 16


def test_buffers_in_use_are_not_lent_again_and_few_wait() -> None:
    model, made = torch.nn.Linear(2, 2), []
    with lent_buffers(model, (1, 256)) as first, lent_buffers(model, (1, 256)) as second:
        first.append("first")
        second.append("second")
        assert first != second
    with pytest.raises(KeyboardInterrupt), lent_buffers(model, (1, 256)):
        raise KeyboardInterrupt
    with lent_buffers(model, (1, 256)) as third, lent_buffers(model, (1, 256)) as fourth:
        assert sorted(third + fourth) == ["first", "second"]
    for columns in range(NUM_IDLE_BUFFERS):
        with lent_buffers(model, (1, columns)) as buffers:
            made.append(buffers)
            buffers.append(columns)
    with lent_buffers(model, (1, 256)) as again, lent_buffers(model, (1, 0)) as kept:
        assert again == []
        assert kept is made[0]


def test_steps_are_a_bounded_set_and_the_least_recently_used_goes_first() -> None:
    model = load()
    shapes = [(1, 256 * number, 4) for number in range(NUM_STEPS)]
    steps = [compiled_step(model, shape) for shape in shapes]
    assert compiled_step(model, shapes[0]) is steps[0]  # now the one used last
    dropped = weakref.ref(steps[1])
    compiled_step(model, (2, 256, 4))
    assert len(compilation_bard_vl._compiled[model].steps) == NUM_STEPS
    assert [compiled_step(model, shape) for shape in (shapes[0], *shapes[2:])] == [steps[0], *steps[2:]]
    del steps
    gc.collect()
    assert dropped() is None
    compiled_step(model, shapes[1])
    assert len(compilation_bard_vl._compiled[model].steps) == NUM_STEPS


def test_neither_steps_nor_buffers_keep_a_model_alive() -> None:
    model = load()
    assert compiled_step(model, (1, 4, 256, 4)) is compiled_step(model, (1, 4, 256, 4))
    with addresses_in_steps(model):
        run(model, BATCH[:1], cache_implementation="static")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("last_layer", ["cpu", "disk"])
def test_beside_a_device_map_the_step_compiles_or_says_why_not(
    last_layer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, model: BardVLForConditionalGeneration
) -> None:
    parts = ("model.visual", "lm_head", *(f"model.language_model.{part}" for part in ("embed_tokens", "norm")))
    layers = {f"model.language_model.layers.{number}": "cpu" for number in range(2)}
    mapped = load(
        device_map={**dict.fromkeys(parts, "cpu"), **layers, "model.language_model.layers.2": last_layer},
        offload_folder=tmp_path,
    )
    before = counters["stats"]["unique_graphs"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output = run(mapped, BATCH[:1], cache_implementation="static", check_interval=2)
    assert torch.equal(output.sequences, run(model, BATCH[:1]).sequences)
    assert counters["stats"]["unique_graphs"] - before == (last_layer == "cpu")
    warnings = [record.getMessage() for record in caplog.records if "compile" in record.getMessage()]
    assert len(warnings) == (last_layer == "disk")
    assert all("spread over cpu, disk" in warning for warning in warnings)


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


def fail_at_run(number: int, error: Exception) -> Step:
    """What stands for a compiled function: it doubles, but for the failure of one run."""
    runs = []

    def run(value: int) -> int:
        runs.append(value)
        if len(runs) == number:
            raise error
        return 2 * value

    return run


def double(value: int) -> int:
    return 2 * value


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_step_that_fails_while_it_warms_up_runs_eagerly(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compilation_bard_vl.logger.warning_once.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail_at_run(number, RuntimeError("no graph")))
    step = compile_with_fallback(double, records_graphs=True)
    with caplog.at_level(logging.WARNING):
        assert [step(value) for value in range(6)] == [0, 2, 4, 6, 8, 10]
    assert [record.getMessage() for record in caplog.records] == [
        "cannot compile the decoding step, it runs eagerly: RuntimeError: no graph"
    ]


def constant(value: int) -> torch.Tensor:
    return torch.full((2,), value)


def test_copies_of_a_function_share_no_limit_of_compilations() -> None:
    limited = {"recompile_limit": 3, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(**limited):
        for _ in range(3):
            compiled = torch.compile(with_own_code(constant), backend="eager", dynamic=False)
            assert [compiled(value).tolist() for value in range(3)] == [[value] * 2 for value in range(3)]
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(3)


def test_a_lack_of_memory_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail_at_run(1, torch.OutOfMemoryError("full")))
    step = compile_with_fallback(double, records_graphs=False)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        step(1)
    assert step(1) == 2


@pytest.mark.parametrize(("interval", "block_size"), [(1, 4), (3, 4), (1, 1)])
def test_warming_up_runs_every_width_as_often_as_a_graph_needs(interval: int, block_size: int) -> None:
    model, settings = load(), {"block_size": block_size, "check_interval": interval, "max_new_tokens": 24}
    widths: Counter[int] = Counter()

    def look(_module: object, _args: tuple, kwargs: dict) -> None:
        widths[kwargs["inputs_embeds"].shape[1]] += (
            one_cache(kwargs.get("past_key_values"), kwargs.get("cache")).layers[-1].is_lent
        )

    model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.compiler.set_stance("force_eager"):
        model.warm_up(1, 9, **settings)
        assert all(count >= NUM_WARM_UP_RUNS for count in (+widths).values())
        warmed = set(+widths)
        run(model, [Row().add_text(9, 0)], cache_implementation="static", **settings)
    assert set(+widths) == warmed


def test_what_greedy_decoding_ignores_makes_no_other_step(model: BardVLForConditionalGeneration) -> None:
    with torch.compiler.set_stance("force_eager"):
        run(model, BATCH[:1], cache_implementation="static")
        steps = set(compilation_bard_vl._compiled[model].steps)
        run(model, BATCH[:1], cache_implementation="static", do_sample=False, temperature=0.7, top_p=0.8, top_k=20)
    assert set(compilation_bard_vl._compiled[model].steps) == steps


def test_a_lack_of_memory_gives_back_the_buffers_that_wait() -> None:
    model, static = load(), {"cache_implementation": "static"}
    with torch.compiler.set_stance("force_eager"):
        expected = run(model, BATCH[:1], **static).sequences
        assert len(compilation_bard_vl._compiled[model].idle) == 1
        hook = model.lm_head.register_forward_pre_hook(exhaust)
        with pytest.raises(torch.OutOfMemoryError, match="ran out of memory over 1 row"):
            run(model, BATCH[:1], **static)
        assert compilation_bard_vl._compiled[model].idle == []
        hook.remove()
        assert torch.equal(run(model, BATCH[:1], **static).sequences, expected)


def exhaust(*_: object) -> None:
    raise torch.OutOfMemoryError("full")


def test_without_a_compiler_the_step_runs_eagerly_and_says_so_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FALL_BACK, str(Path(__file__).parent)]
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "same tokens\n", done.stderr
    assert done.stderr.count("cannot compile the decoding step") == 1
