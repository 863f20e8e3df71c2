"""No state on modules: threads share a model, and a cancelled call leaves a passed cache usable."""

import copy
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import ragged
import torch
from bard_vl import cache_bard_vl
from ragged import Row, collate, generate, load
from thorough import cases, stride


def text(length: int, seed: int) -> Row:
    return Row().add_text(length, seed)


JOBS: list[tuple[list[Row], dict[str, Any]]] = [
    ([text(9, 1)], {"block_size": 4}),
    ([text(3, 2).add_image((1, 4, 4), 3).add_text(4, 4)], {"block_size": 3}),
    ([text(20, 5), text(2, 6).add_image((1, 2, 6), 7), text(7, 8)], {"block_size": 8, "confidence_threshold": 0.1}),
    ([text(2, 9).add_video((2, 4, 4), 10)], {"block_size": 2, "remasking_strategy": "low_confidence_static"}),
    ([text(11, 11)], {"block_size": 4, "temperature": 1.0, "seed": 3}),
    ([text(6, 12)], {"block_size": 5, "num_return_sequences": 2, "repetition_penalty": 1.3}),
]


def run(job: int) -> list[list[int]]:
    batch, arguments = JOBS[job]
    output = generate(load(), batch, max_new_tokens=8, eos_token_id=ragged.NO_ID, **arguments)
    return output.sequences.tolist() + output.block_step_counts.tolist()


def test_threads_on_one_model_get_what_they_get_in_turn() -> None:
    expected = [run(job) for job in range(len(JOBS))]
    jobs = [job for seed in range(cases(12)) for job in random.Random(seed).sample(range(len(JOBS)), len(JOBS))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # switch threads within a step, not only between calls
    try:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(run, jobs))
    finally:
        sys.setswitchinterval(interval)
    assert results == [expected[job] for job in jobs]


def state_of(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every module; parameters and buffers with their versions."""
    state: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        own = state[name] = {}
        for key, value in vars(module).items():
            if isinstance(value, dict):
                own[key] = {inner: (id(item), getattr(item, "_version", None)) for inner, item in value.items()}
            else:
                own[key] = (id(value), repr(value) if isinstance(value, int | float | str | bool) else None)
    return state


@pytest.mark.parametrize("job", range(len(JOBS)))
def test_generate_changes_no_module(job: int) -> None:
    model = load()
    run(job)  # whatever transformers sets up at a first forward
    before, config = state_of(model), model.config.to_dict()
    settings = model.generation_config.to_dict()
    run(job)
    assert state_of(model) == before
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == settings


def test_score_and_generate_share_a_model_between_threads() -> None:
    model, (batch, _) = load(), JOBS[1]
    answers = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, -100, -100]])
    expected, tokens = model.score(collate(batch), answers, block_size=4), run(1)
    with ThreadPoolExecutor(2) as pool:
        scores = [pool.submit(model.score, collate(batch), answers, block_size=4) for _ in range(8)]
        sequences = [pool.submit(run, 1) for _ in range(8)]
    for score in scores:
        torch.testing.assert_close(score.result(), expected)
    assert all(sequence.result() == tokens for sequence in sequences)


class Cancelled(Exception):
    """Raised by a caller's hook."""


class Countdown:
    """Raises at the call with number `calls`; otherwise lets everything pass. Serves as every kind of hook."""

    def __init__(self, calls: int, error: type[BaseException] = Cancelled):
        self.left, self.error = calls, error

    def tick(self, *_args: Any, **_kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def put(self, value: torch.Tensor) -> None:
        """Part of a streamer that does not count."""

    def end(self) -> None:
        """Part of a streamer that does not count."""

    put_draft = tick

    def logits_processor(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        return scores

    def stopping_criterion(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def in_a_layer(countdown: Countdown) -> Iterator[dict[str, Any]]:
    """Interrupt as a key press does, between the layers of the language model."""
    layers = load().model.language_model.layers
    countdown.error = KeyboardInterrupt
    hooks = [layer.self_attn.register_forward_hook(countdown.tick) for layer in layers]
    try:
        yield {}
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def in_an_argument(countdown: Countdown, argument: Callable[[Countdown], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield argument(countdown)


PLACES: dict[str, Callable[[Countdown], Any]] = {
    "layer": in_a_layer,
    "put_draft": lambda countdown: in_an_argument(countdown, lambda c: {"streamer": c}),
    "logits processor": lambda countdown: in_an_argument(
        countdown, lambda c: {"logits_processor": [c.logits_processor]}
    ),
    "stopping criterion": lambda countdown: in_an_argument(
        countdown, lambda c: {"stopping_criteria": [c.stopping_criterion]}
    ),
}
FIXED = {"block_size": 4, "max_new_tokens": 10, "confidence_threshold": 0.3, "pad_token_id": ragged.PAD}
EOS = list(range(0, 500, 12))


def turns(num_rows: int) -> tuple[list[Row], list[Row]]:
    """Prompts of whole blocks, so that the second turn reuses the first, and the second turn's prompts."""
    first = [text(16, 1), text(5, 2).add_image((1, 4, 4), 3).add_text(5, 4), text(20, 5)][:num_rows]
    assert all(len(row.ids) % 4 == 0 for row in first)
    return first, [row.add_text(3 + place, place) for place, row in enumerate(first)]


def cancel(place: str, calls: int, cache: Any, batch: list[Row], **arguments: Any) -> bool:
    """Run a call that is cancelled at the hook's call with this number; False if it ended before."""
    with PLACES[place](Countdown(calls)) as hooked:
        try:
            load().generate(**collate(batch), **FIXED, eos_token_id=EOS, past_key_values=cache, **hooked, **arguments)
        except (Cancelled, KeyboardInterrupt):
            return True
    return False


def reported(output: Any) -> list[Any]:
    return [output.sequences.tolist(), output.block_step_counts.tolist()]


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize(
    ("place", "num_rows"),
    [*((place, 1) for place in PLACES), *((place, 3) for place in PLACES if place != "put_draft")],
)
def test_a_call_cancelled_at_any_moment_leaves_the_cache_usable(place: str, num_rows: int) -> None:
    model, (first, second) = load(), turns(num_rows)
    expected = generate(model, second, **FIXED, eos_token_id=EOS)
    if num_rows > 1:  # rows retire at different times
        assert len({*expected.block_step_counts.sum(-1).tolist()}) > 1
    moments, kept = 0, generate(model, first, **FIXED, eos_token_id=EOS).past_key_values
    while True:
        cache = copy.deepcopy(kept)
        if not cancel(place, moments, cache, second):
            break
        moments += stride(1 if moments < 9 else 8)  # of three layers every one is met
        output = generate(model, second, **FIXED, eos_token_id=EOS, past_key_values=cache)
        assert reported(output) == reported(expected), f"cancelled at moment {moments}"
        assert output.num_encoded_tokens.tolist() == [len(row.ids) - 16 for row in second]  # the rest is reused
    assert moments > 3


@pytest.mark.thorough(every=2)
@pytest.mark.parametrize("place", ["layer", "logits processor"])
def test_a_call_for_several_sequences_cancelled_at_any_moment_leaves_the_cache_usable(place: str) -> None:
    model, (first, second) = load(), turns(2)
    expected = generate(model, second, **FIXED, eos_token_id=EOS)
    moments, kept = 0, generate(model, first, **FIXED, eos_token_id=EOS).past_key_values
    while True:
        cache = copy.deepcopy(kept)
        if not cancel(place, moments, cache, second, num_return_sequences=3):
            break
        moments += stride(6)
        output = generate(model, second, **FIXED, eos_token_id=EOS, past_key_values=cache)
        assert reported(output) == reported(expected), f"cancelled at moment {moments}"
        assert output.num_encoded_tokens.tolist() == [len(row.ids) - 16 for row in second]
    assert moments > 9


def test_a_cache_survives_many_cancelled_calls_with_other_prompts() -> None:
    model, (first, second) = load(), turns(3)
    expected = generate(model, second, **FIXED, eos_token_id=EOS)
    cache = generate(model, first, **FIXED, eos_token_id=EOS).past_key_values
    rng = random.Random(0)
    for _ in range(cases(10)):
        others = [text(rng.randint(1, 30), rng.randint(0, 99)) for _ in range(3)]
        cancel("layer", rng.randint(0, 20), cache, rng.choice([others, second]))
        output = generate(model, second, **FIXED, eos_token_id=EOS, past_key_values=cache)
        assert reported(output) == reported(expected)


@contextmanager
def interrupted_in_the_cache(line: int) -> Iterator[None]:
    """Raise KeyboardInterrupt at the executed line with this number of the cache's own code, in this thread."""
    countdown = Countdown(line, KeyboardInterrupt)

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename != cache_bard_vl.__file__:
            return None
        if event == "line":
            countdown.tick()
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def test_a_key_press_at_any_line_of_the_cache_leaves_it_usable() -> None:
    model, (first, second) = load(), turns(2)
    arguments = {**FIXED, "max_new_tokens": 6}
    look = {**FIXED, "max_new_tokens": 4, "confidence_threshold": 0.0}  # one forward over what the cache has
    expected = generate(model, second, **look, eos_token_id=EOS)
    line, kept = 0, generate(model, first, **arguments, eos_token_id=EOS).past_key_values
    while True:
        cache = copy.deepcopy(kept)
        try:
            with interrupted_in_the_cache(line):
                generate(model, second, **arguments, eos_token_id=EOS, num_return_sequences=2, past_key_values=cache)
            break
        except KeyboardInterrupt:
            line += stride(14 if line > 60 else 2)
        output = generate(model, second, **look, eos_token_id=EOS, past_key_values=cache)
        assert reported(output) == reported(expected), f"interrupted at line {line}"
        torch.testing.assert_close(output.confidences, expected.confidences)
    assert line > 100
