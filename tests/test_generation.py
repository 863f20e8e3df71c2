"""Features of `generate` and `score`, against a slow twin where one exists."""

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bard_vl import BardVLGenerationOutput, inputs_bard_vl
from golden_models import PROMPTS, calls_of, slow_generate, slow_score, word_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ragged import MASK, NO_ID, PAD, Row, collate, load, rows, settings
from thorough import cases
from transformers import (
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

SETTINGS: dict[str, Any] = {"max_new_tokens": 20, "block_size": 8, "confidence_threshold": 0.15, "pad_token_id": PAD}
TEXT, IMAGE = PROMPTS["text"], PROMPTS["image"]


def run(batch: Row | list[Row], **arguments: Any) -> BardVLGenerationOutput:
    batch = batch if isinstance(batch, list) else [batch]
    return load().generate(**collate(batch), return_dict_in_generate=True, **(SETTINGS | arguments))


def tokens_of(output: BardVLGenerationOutput, row: int = 0) -> list[int]:
    """The response of one row without padding."""
    length = int((output.confidences[row] > 0).sum())
    prompt = output.sequences.shape[1] - output.confidences.shape[1]
    return output.sequences[row, prompt : prompt + length].tolist()


# Length --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tight() -> Iterator[Callable[[int], None]]:
    """Gives the model fewer positions, for a test."""
    text, before = load().config.text_config, load().config.text_config.max_position_embeddings
    yield lambda positions: setattr(text, "max_position_embeddings", positions)
    text.max_position_embeddings = before


LONG = {"eos_token_id": NO_ID, "confidence_threshold": 0.1}
WAYS = [{}, {"check_interval": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2}, {"max_length": 999}]


@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("size", [8, 5])
def test_a_length_beyond_the_positions_is_a_limit_of_whole_blocks_to_each_row(
    size: int, way: dict[str, Any], tight: Callable[[int], None]
) -> None:
    batch = [Row().add_text(length, length) for length in (3, 24, 40)] + [IMAGE]
    visual = {name: value for name, value in collate([IMAGE]).items() if name == "image_grid_thw"}
    first = int(load().get_position_ids(torch.tensor([IMAGE.ids]), None, **visual)[1:].max()) + 1
    assert first < len(IMAGE.ids)
    rooms = [(60 - position) // size * size for position in (3, 24, 40, first)]
    wanted = [run(row, **LONG, block_size=size, max_new_tokens=room) for row, room in zip(batch, rooms, strict=True)]
    tight(60)
    asked = {"max_new_tokens": None if "max_length" in way else 1000, "block_size": size}
    with torch.compiler.set_stance("force_eager"):
        output = run(batch, **LONG, **asked, **way)
    copies = way.get("num_return_sequences", 1)
    for place, alone in enumerate(wanted):
        for copy_of in range(copies):
            assert tokens_of(output, place * copies + copy_of) == tokens_of(alone)
    assert "overrun" not in output.num_forwards or way.get("check_interval", 1) > 1


def test_a_stated_length_that_is_cut_is_told_once(tight: Callable[[int], None], caplog: Any) -> None:
    tight(40)
    inputs_bard_vl.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        run(TEXT, **LONG, max_new_tokens=None)  # the default of 256
        assert not caplog.records
        for _ in range(2):
            run(TEXT, **LONG, max_new_tokens=1000)
    (record,) = caplog.records
    assert record.getMessage() == (
        "1000 new tokens are asked for: responses end earlier where prompt and response reach the model's 40 positions "
        "(`max_position_embeddings`)"
    )


def test_the_last_block_has_room_or_the_prompt_is_refused(tight: Callable[[int], None]) -> None:
    row = Row().add_text(9, 0)
    expected = tokens_of(run(row, **LONG, block_size=8, max_new_tokens=8))
    tight(17)
    assert tokens_of(run(row, **LONG, block_size=8, max_new_tokens=99)) == expected
    assert tokens_of(run(row, **LONG, block_size=8, max_new_tokens=5)) == expected[:5]
    tight(16)
    with pytest.raises(ValueError, match=r"with 5 new tokens in blocks of 8 it passes the model's 16 .* room for 0$"):
        run(row, **LONG, block_size=8, max_new_tokens=5)
    with pytest.raises(ValueError, match="there is room for 0"):  # a row of a batch, too
        run([Row().add_text(2, 0), row], **LONG, block_size=8, max_new_tokens=99)


# Decoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough(every=9)
@pytest.mark.parametrize("rule", ["low_confidence_static", "low_confidence_dynamic"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize(("block_size", "steps"), [(8, None), (4, 3), (1, None), (16, 5)])
def test_generate_equals_a_loop_without_cache(kind: str, rule: str, block_size: int, steps: int | None) -> None:
    arguments = {"block_size": block_size, "denoising_steps": steps, "remasking_strategy": rule, "max_new_tokens": 18}
    arguments["confidence_threshold"] = 0.12
    slow = slow_generate(load(), PROMPTS[kind], **arguments)
    output = run(PROMPTS[kind], **arguments)
    assert output.sequences[0].tolist() == PROMPTS[kind].ids + slow.tokens
    assert output.block_step_counts[0].tolist() == slow.steps
    torch.testing.assert_close(output.confidences[0], torch.tensor(slow.confidences), atol=1e-4, rtol=0)
    assert output.tokens_per_forward.item() == pytest.approx(len(slow.tokens) / sum(slow.steps))


@pytest.mark.thorough(every=5)
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize(("block_size", "blocks", "attention"), [(4, 2, "bard_vl"), (3, 4, "bard_vl"), (4, 2, "eager")])
def test_blocks_ahead_equal_a_loop_without_cache(kind: str, block_size: int, blocks: int, attention: str) -> None:
    arguments = {"block_size": block_size, "concurrent_blocks": blocks, "max_new_tokens": 18, "end_at_first_eos": True}
    arguments |= {"confidence_threshold": 0.12, "eos_token_id": tuple(range(0, 500, 40))}
    slow = slow_generate(load(), PROMPTS[kind], **arguments)
    output = load(attention).generate(**collate([PROMPTS[kind]]), return_dict_in_generate=True, **arguments)
    assert output.sequences[0].tolist() == PROMPTS[kind].ids + slow.tokens
    assert output.block_step_counts[0].tolist() == slow.steps
    torch.testing.assert_close(output.confidences[0], torch.tensor(slow.confidences), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", PROMPTS)
def test_calling_conventions_agree(kind: str) -> None:
    inputs, prompt = collate([PROMPTS[kind]]), PROMPTS[kind].ids
    keywords = load().generate(**inputs, **SETTINGS)
    assert keywords[0, : len(prompt)].tolist() == prompt
    response = keywords[:, len(prompt) :]
    for mapping in (inputs, BatchFeature(inputs), BatchFeature(inputs | {"mm_token_type_ids": inputs["input_ids"]})):
        assert torch.equal(load().generate(mapping, **SETTINGS), response)
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(load().generate(inputs["input_ids"], **others, **SETTINGS), keywords)
    assert torch.equal(load().generate(inputs=inputs["input_ids"], **others, **SETTINGS), keywords)
    assert torch.equal(run(PROMPTS[kind]).sequences, keywords)
    as_dict = load().generate(inputs, return_dict_in_generate=True, **SETTINGS)
    assert torch.equal(as_dict.sequences, keywords), "prompt and response, always"


def test_ids_of_32_bits_are_as_good() -> None:
    inputs = collate([PROMPTS["mixture"]])
    expected = load().generate(**inputs, block_size=8, max_new_tokens=12)
    narrow = {**inputs, "input_ids": inputs["input_ids"].int()}
    assert torch.equal(load().generate(**narrow, block_size=8, max_new_tokens=12), expected)
    answers = torch.tensor([[5, 6, 7]])
    scores = [load().score(one, ids, block_size=8) for one, ids in ((inputs, answers), (narrow, answers.int()))]
    assert torch.equal(*scores)


def test_none_is_as_good_as_an_absent_visual_input() -> None:
    nothing = {"pixel_values": None, "image_grid_thw": None, "attention_mask": None}
    ids = torch.tensor([TEXT.ids])
    assert torch.equal(load().generate(input_ids=ids, **nothing, **SETTINGS), run(TEXT).sequences)


def test_other_mask_token_is_used_throughout() -> None:
    slow = slow_generate(load(), TEXT, 8, 20, confidence_threshold=0.15, mask_token_id=509)
    output = run(TEXT, mask_token_id=509)
    assert tokens_of(output) == slow.tokens
    assert tokens_of(run(TEXT)) != slow.tokens


@pytest.mark.thorough
@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_every_length_is_the_beginning_of_a_longer_one(block_size: int) -> None:
    longest = tokens_of(run(IMAGE, max_new_tokens=20, block_size=block_size))
    assert len(longest) == 20
    for length in range(1, 20):
        output = run(IMAGE, max_new_tokens=length, block_size=block_size)
        assert tokens_of(output) == longest[:length]
        assert output.confidences.shape == (1, length)
        assert output.tokens_per_forward.item() == pytest.approx(length / output.block_step_counts.sum().item())


@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("cut", [1, 8, 11, 16])
@pytest.mark.parametrize("kind", ["text", "mixture"])
def test_begun_assistant_turn_is_continued(kind: str, cut: int) -> None:
    begun = PROMPTS[kind].then(tokens_of(run(PROMPTS[kind]))[:cut])
    slow = slow_generate(load(), begun, 8, 12, confidence_threshold=0.15)
    assert tokens_of(run(begun, max_new_tokens=12)) == slow.tokens


def test_turn_begun_on_a_block_edge_goes_on_as_if_never_interrupted() -> None:
    prompt = PROMPTS["aligned text"]
    whole = tokens_of(run(prompt, max_new_tokens=24))
    assert tokens_of(run(prompt.then(whole[:8]), max_new_tokens=16)) == whole[8:]


# Invariants ----------------------------------------------------------------------------------------------------------


@given(st.lists(rows(max_length=24), min_size=1, max_size=3), settings(max_new_tokens=20), st.booleans(), st.data())
@hypothesis_settings(max_examples=cases(20))
def test_no_mask_token_nothing_behind_the_end_and_never_too_long(
    batch: list[Row], arguments: dict[str, Any], sample: bool, data: st.DataObject
) -> None:
    if sample:
        arguments |= {"temperature": data.draw(st.sampled_from([0.3, 1.0, 5.0])), "seed": data.draw(st.integers(0, 99))}
    output = load().generate(**collate(batch), return_dict_in_generate=True, output_history=True, **arguments)
    size, width = arguments["block_size"], max(len(row.ids) for row in batch)
    responses = output.sequences[:, width:]
    assert responses.shape == output.confidences.shape
    assert 1 <= responses.shape[1] <= arguments["max_new_tokens"]
    assert not (output.sequences == MASK).any()
    for index, row in enumerate(responses.tolist()):
        tokens = tokens_of(output, index)
        ends = [place for place, token in enumerate(tokens) if token in arguments["eos_token_id"]]
        assert ends in ([], [len(tokens) - 1])
        assert ends or len(tokens) == arguments["max_new_tokens"]
        assert row[len(tokens) :] == [PAD] * (len(row) - len(tokens))
        assert -(-len(tokens) // size) == (output.block_step_counts[index] > 0).sum()
        check_history(output, index, tokens, size)


def check_history(output: BardVLGenerationOutput, row: int, tokens: list[int], block_size: int) -> None:
    """The commits of a row partition each block, never change a token, and give the response and its confidences."""
    response, confidences = [], []
    for block, count in enumerate(output.block_step_counts[row].tolist()):
        steps = [step for step in output.history[row] if step.block == block]
        assert len(steps) == count
        before = torch.full((block_size,), MASK)
        values = torch.zeros(block_size)
        for step in steps:
            assert step.committed.any()
            assert (before[step.committed] == MASK).all()
            assert torch.equal(step.ids[~step.committed], before[~step.committed])
            assert (step.ids[step.committed] != MASK).all()
            values[step.committed], before = step.confidence[step.committed], step.ids
        if steps:
            assert (before != MASK).all()
            response += before.tolist()
            confidences += values.tolist()
    assert response[: len(tokens)] == tokens
    assert output.confidences[row, : len(tokens)].tolist() == confidences[: len(tokens)]


# Counting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "several images", "video"])
@pytest.mark.parametrize("rule", ["low_confidence_static", "low_confidence_dynamic"])
def test_forwards_of_one_row_are_its_steps(kind: str, rule: str) -> None:
    with calls_of(load().model.language_model) as calls:
        output = run(PROMPTS[kind], remasking_strategy=rule, max_new_tokens=30)
    steps = output.block_step_counts[0].tolist()
    assert len(steps) == 4
    expected = {"prefill+denoise": 1, "commit+denoise": 3, "denoise": sum(steps) - 4}
    assert output.num_forwards == expected
    assert len(calls) == sum(steps)
    widths = [shape[1] for shape in calls]
    assert widths[0] == len(PROMPTS[kind].ids) + 8
    assert [widths[sum(steps[:block])] for block in (1, 2, 3)] == [16] * 3, "a finished block beside the next one"
    assert sorted(widths)[: sum(steps) - 4] == [8] * (sum(steps) - 4)


def test_forwards_of_a_batch_are_counted_once() -> None:
    batch = [TEXT, IMAGE, PROMPTS["video"]]
    with calls_of(load().model.language_model) as calls:
        output = run(batch, max_new_tokens=30)
    steps = output.block_step_counts.sum(1)
    assert len(set(steps.tolist())) > 1
    assert len(calls) == sum(output.num_forwards.values()) == steps.max()
    torch.testing.assert_close(output.tokens_per_forward, 30 / steps)


def test_tokens_per_forward_stops_at_the_end_of_sequence() -> None:
    eos = tokens_of(run(TEXT))[10]
    output = run([TEXT, IMAGE], eos_token_id=eos, max_new_tokens=30)
    for row in range(2):
        expected = len(tokens_of(output, row)) / output.block_step_counts[row].sum().item()
        assert output.tokens_per_forward[row].item() == pytest.approx(expected)
    assert len(tokens_of(output)) < 12


def test_prompt_logits_are_never_computed() -> None:
    batch = [PROMPTS["several images"], PROMPTS["mixture"]]
    with calls_of(load().lm_head) as calls:
        output = run(batch, max_new_tokens=16, output_history=True)
    assert len(calls) == sum(output.num_forwards.values())
    assert {shape[1] for shape in calls} == {8}
    with calls_of(load().lm_head) as calls:
        same = run(batch, max_new_tokens=16)
    assert torch.equal(same.sequences, output.sequences)
    # On a CPU not even those of decided positions, unless the history shows them.
    undecided = [(step.committed | (step.ids == MASK)).sum().item() for row in output.history for step in row]
    assert sum(shape[0] for shape in calls) == sum(undecided) < 8 * len(undecided)
    assert len(calls) == sum(output.num_forwards.values())
    with calls_of(load().lm_head) as calls:
        load().score(collate([PROMPTS["mixture"]]), torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, -100, -100]]), 4)
    assert [shape[:2] for shape in calls] == [(2, 5)]


# The reference's returns ---------------------------------------------------------------------------------------------


def test_reference_returns_by_flags() -> None:
    inputs = collate([IMAGE])
    ids = load().generate(inputs, **SETTINGS)
    plain, stats = load().generate(inputs, return_step_stats=True, **SETTINGS)
    assert torch.equal(plain, ids)
    assert set(stats) == {"block_step_counts", "num_response_tokens", "num_denoising_steps", "tpf"}
    assert torch.equal(stats["block_step_counts"], run(IMAGE).block_step_counts)
    assert stats["num_response_tokens"] == 20
    assert stats["num_denoising_steps"] == stats["block_step_counts"].sum()
    assert stats["tpf"] == pytest.approx(20 / stats["num_denoising_steps"])
    plain, history = load().generate(inputs, output_history=True, **SETTINGS)
    assert [len(state[0]) for state in history] == [8, 16, 20]
    for state in history:
        assert state.device.type == "cpu"
        assert torch.equal(state, plain[:, : state.shape[1]])
    plain, history, stats = load().generate(inputs, output_history=True, return_step_stats=True, **SETTINGS)
    assert torch.equal(plain, ids)
    assert torch.equal(history[-1], ids)
    assert stats["num_response_tokens"] == 20


def test_history_has_a_place_to_go() -> None:
    with pytest.raises(ValueError, match="`output_history=True` needs `return_dict_in_generate=True`"):
        load().generate(**collate([TEXT]), output_history=True, **SETTINGS)
    assert run(TEXT).history is None


# Sampling ------------------------------------------------------------------------------------------------------------


def sampled(**arguments: Any) -> list[int]:
    return tokens_of(run(IMAGE, **({"temperature": 1.0} | arguments)))


@pytest.mark.thorough
def test_seed_and_generator_repeat_a_run() -> None:
    assert sampled(seed=3) == sampled(seed=3) == sampled(generator=torch.Generator().manual_seed(3))
    assert sampled(seed=3) != sampled(seed=4)
    stated = {"generation_config": GenerationConfig(seed=3)}
    assert sampled(**stated) == sampled(seed=3)
    assert sampled(**stated, seed=4) == sampled(seed=4)
    assert sampled(**stated, generator=torch.Generator().manual_seed(4)) == sampled(seed=4)
    generator = torch.Generator().manual_seed(3)
    assert sampled(generator=generator) != sampled(generator=generator)
    with pytest.raises(ValueError, match="`generator` or `seed`, not both"):
        sampled(generator=generator, seed=3)


def test_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sampled(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    first = sampled()
    torch.manual_seed(0)
    assert sampled() == first, "without a seed the global generator decides"


def test_sampling_narrows_to_greedy() -> None:
    greedy = tokens_of(run(IMAGE))
    assert sampled(seed=1) != greedy
    assert sampled(seed=1, top_k=1) == greedy
    assert sampled(seed=1, top_p=1e-6) == greedy
    assert sampled(seed=1, temperature=1e-4) == greedy
    assert sampled(seed=1, temperature=0.0, do_sample=True) == greedy
    assert sampled(seed=1, do_sample=False) == greedy


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 5e-324])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    greedy = sampled(temperature=0.0)
    assert sampled(seed=1, temperature=temperature) == greedy
    assert sampled(seed=1, temperature=temperature, top_p=0.9, top_k=5) == greedy


@pytest.mark.parametrize("narrow", [{"top_k": 3}, {"top_p": 0.2}])
def test_samples_come_from_the_most_probable_tokens(narrow: dict[str, Any]) -> None:
    seen: list[torch.Tensor] = []

    def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores[0].clone())
        return scores

    output = run(TEXT, temperature=1.0, seed=5, block_size=1, max_new_tokens=30, logits_processor=[note], **narrow)
    for token, scores in zip(tokens_of(output), seen, strict=True):
        scores[MASK] = -torch.inf
        better = scores.softmax(0)[scores > scores[token]]
        assert len(better) < narrow.get("top_k", 512)
        assert better.sum() < narrow.get("top_p", 1.0)


def test_several_responses_share_one_prompt_pass() -> None:
    with calls_of(load().model.language_model) as calls, calls_of(load().model.visual) as images:
        output = run([IMAGE, TEXT], num_return_sequences=3, temperature=1.0, seed=2)
    # Each prompt once, with one first block behind it, end to end; then every response.
    assert calls[0][:2] == (1, len(IMAGE.ids) + len(TEXT.ids) + 2 * SETTINGS["block_size"])
    assert calls[1][:2] == (1, 6 * SETTINGS["block_size"])
    assert len(images) == 1
    width = len(IMAGE.ids)
    assert output.sequences.shape == (6, width + 20)
    assert (output.sequences[:3, :width] == torch.tensor(IMAGE.ids)).all()
    assert len({tuple(row) for row in output.sequences.tolist()}) == 6
    assert output.num_encoded_tokens.tolist() == [len(IMAGE.ids)] * 3 + [len(TEXT.ids)] * 3
    assert len(output.tokens_per_forward) == len(output.block_step_counts) == len(output.confidences) == 6


def test_tokens_are_counted_whatever_their_confidence() -> None:
    """Chance may take tokens that the model gives a probability of 0."""
    model = copy.deepcopy(load())
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    batch, arguments = (
        collate([IMAGE, TEXT]),
        {**SETTINGS, "temperature": 1e9, "seed": 3, "eos_token_id": list(range(40))},
    )
    output = model.generate(**batch, **arguments, num_return_sequences=4, return_dict_in_generate=True)
    assert (output.confidences == 0).sum() > 20
    lengths = set()
    for count, row in zip(output.num_tokens.tolist(), output.sequences[:, len(IMAGE.ids) :].tolist(), strict=True):
        assert count == next((place + 1 for place, token in enumerate(row) if token < 40), 20)
        lengths.add(count)
    assert len(lengths) > 2


def test_several_greedy_responses_are_the_one() -> None:
    output, alone = run([IMAGE, TEXT], num_return_sequences=2), [run(IMAGE), run(TEXT)]
    for row in range(4):
        assert tokens_of(output, row) == tokens_of(alone[row // 2])


# Ends ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "image", "video"])
def test_response_is_cut_at_the_first_end_of_sequence(kind: str) -> None:
    free = tokens_of(run(PROMPTS[kind]))
    for eos in ([free[3]], [free[15], free[6]], [511, free[12]]):
        first = min(free.index(token) for token in eos if token in free)
        for given_eos in (eos, torch.tensor(eos), eos[0] if len(eos) == 1 else tuple(eos)):
            output = run(PROMPTS[kind], eos_token_id=given_eos)
            assert tokens_of(output) == free[: first + 1]
            assert output.block_step_counts.shape[1] == first // 8 + 1, "no block behind the end is decoded"


def test_padding_is_the_first_end_id_unless_stated() -> None:
    eos = [tokens_of(run(TEXT))[2], 511]
    arguments = SETTINGS | {"eos_token_id": eos, "pad_token_id": None}
    sequences = load().generate(**collate([TEXT, IMAGE]), **arguments)
    assert sequences[0, -1] == eos[0]
    assert run([TEXT, IMAGE], eos_token_id=eos).sequences[0, -1] == PAD


@pytest.mark.parametrize("stop", ["L", " ar", ["never said", " are"], [" are", "L"]])
def test_stop_string_cuts_at_the_first_prefix_that_holds_it(stop: str | list[str]) -> None:
    tokenizer, free = word_tokenizer(), tokens_of(run(TEXT))
    texts = [stop] if isinstance(stop, str) else stop
    prefixes = [free[:count] for count in range(1, len(free) + 1)]
    hits = [prefix for prefix in prefixes if any(text in tokenizer.decode(prefix) for text in texts)]
    assert len(hits[0]) < len(free)
    assert tokens_of(run(TEXT, stop_strings=stop, tokenizer=tokenizer)) == hits[0]


def test_stop_string_may_span_tokens_and_blocks() -> None:
    tokenizer, free = word_tokenizer(), tokens_of(run(TEXT))
    stop = tokenizer.decode(free[6:9])
    assert stop not in tokenizer.decode(free[:8])
    assert tokens_of(run(TEXT, stop_strings=[stop], tokenizer=tokenizer)) == free[:9]


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"`stop_strings` = \['a'\] needs `tokenizer=`"):
        run(TEXT, stop_strings=["a"])


def test_stop_strings_take_a_processor_for_its_tokenizer() -> None:
    tokenizer, arguments = word_tokenizer(), {"stop_strings": "L"}
    processor = SimpleNamespace(tokenizer=tokenizer)
    expected = tokens_of(run(TEXT, tokenizer=tokenizer, **arguments))
    assert tokens_of(run(TEXT, tokenizer=processor, **arguments)) == expected


class StopAt(StoppingCriteria):
    """Stops at a length of prompt and response, and keeps what it is shown."""

    def __init__(self, length: int):
        self.length = length
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert input_ids.shape[0] == 1
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 19])
def test_criteria_see_every_prefix_of_finished_blocks_in_order(count: int) -> None:
    free, criterion = tokens_of(run(IMAGE)), StopAt(len(IMAGE.ids) + count)
    output = run(IMAGE, stopping_criteria=[criterion])
    assert tokens_of(output) == free[:count]
    assert criterion.seen == [IMAGE.ids + free[:length] for length in range(1, count + 1)]
    assert output.block_step_counts.shape[1] == (count - 1) // 8 + 1


def test_criteria_see_nothing_behind_an_end_or_the_limit() -> None:
    free = tokens_of(run(TEXT))
    eos, criterion = free[10], StopAt(10**6)
    first = free.index(eos)
    assert tokens_of(run(TEXT, stopping_criteria=[criterion], eos_token_id=eos)) == free[: first + 1]
    assert len(criterion.seen) == first + 1
    criterion = StopAt(10**6)
    run(TEXT, stopping_criteria=[criterion], max_new_tokens=11)
    assert len(criterion.seen) == 11


def test_criteria_of_a_batch_see_rows_without_padding() -> None:
    batch, criterion = [TEXT, PROMPTS["begun image"]], StopAt(20)
    output = run(batch, stopping_criteria=[criterion])
    for index, row in enumerate(batch):
        assert tokens_of(output, index) == tokens_of(run(row))[: 20 - len(row.ids)]
        assert all(seen[: len(row.ids)] == row.ids for seen in criterion.seen if seen[0] == row.ids[0])


def test_time_limit_ends_a_response() -> None:
    assert len(tokens_of(run(TEXT, max_time=0.0))) == 8  # the first block, whole
    assert len(tokens_of(run(TEXT, max_time=600.0))) == 20


# Logits processors ---------------------------------------------------------------------------------------------------


class Recorder(LogitsProcessor):
    """Keeps what it is shown and changes nothing."""

    def __init__(self) -> None:
        self.left: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert (input_ids.shape[0], scores.shape) == (1, (1, 512))
        self.left.append(input_ids[0].tolist())
        return scores


@pytest.mark.parametrize("kind", ["text", "mixture"])
def test_processors_see_the_committed_tokens_left_of_every_undecided_position(kind: str) -> None:
    recorder, prompt = Recorder(), PROMPTS[kind].ids
    output = run(PROMPTS[kind], logits_processor=[recorder], output_history=True)
    expected, done, block = [], [], [MASK] * 8
    for step in output.history[0]:
        expected += [
            [token for token in prompt + done + block[:place] if token != MASK]
            for place in range(8)
            if block[place] == MASK
        ]
        block = step.ids.tolist()
        if MASK not in block:
            done, block = done + block, [MASK] * 8
    assert recorder.left == expected
    assert torch.equal(output.sequences, run(PROMPTS[kind]).sequences)


def penalise(left: list[int], scores: torch.Tensor) -> torch.Tensor:
    """A repetition penalty of 1.5."""
    scores = scores.clone()
    for token in set(left):
        scores[token] = scores[token] / 1.5 if scores[token] > 0 else scores[token] * 1.5
    return scores


@pytest.mark.parametrize("kind", ["text", "image"])
def test_repetition_penalty_counts_for_choice_and_confidence(kind: str) -> None:
    slow = slow_generate(load(), PROMPTS[kind], 8, 20, confidence_threshold=0.15, process=penalise)
    output = run(PROMPTS[kind], repetition_penalty=1.5)
    assert tokens_of(output) == slow.tokens
    assert output.block_step_counts[0].tolist() == slow.steps
    torch.testing.assert_close(output.confidences[0], torch.tensor(slow.confidences), atol=1e-4, rtol=0)
    assert tokens_of(output) != tokens_of(run(PROMPTS[kind]))


def test_ban_list_counts_for_choice_and_confidence() -> None:
    banned = sorted(set(tokens_of(run(TEXT))))

    def ban(left: list[int], scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(0, torch.tensor(banned), -torch.inf)

    slow = slow_generate(load(), TEXT, 8, 20, confidence_threshold=0.15, process=ban)
    for arguments in ({"bad_words_ids": [[token] for token in banned]}, {"suppress_tokens": banned}):
        output = run(TEXT, **arguments)
        assert tokens_of(output) == slow.tokens
        assert not set(banned) & set(tokens_of(output))
        torch.testing.assert_close(output.confidences[0], torch.tensor(slow.confidences), atol=1e-4, rtol=0)


def test_banned_pair_and_repeated_ngram_never_appear_left_to_right() -> None:
    static = {"remasking_strategy": "low_confidence_static", "block_size": 1, "max_new_tokens": 30}
    free = tokens_of(run(TEXT, **static))
    pair = free[4:6]
    output = tokens_of(run(TEXT, bad_words_ids=[pair], **static))
    assert pair not in [output[place : place + 2] for place in range(len(output) - 1)]
    tokens = TEXT.ids + tokens_of(run(TEXT, no_repeat_ngram_size=2, **static))
    pairs = [tuple(tokens[place : place + 2]) for place in range(len(tokens) - 1)]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("form", [dict, lambda pairs: [[list(ids), bias] for ids, bias in pairs]])
def test_a_bias_favours_a_token_and_what_follows_it(form: Any) -> None:
    output = run(TEXT, sequence_bias=form([((7,), 100), ((7, 9), 200.0)]), block_size=1, max_new_tokens=5)
    assert tokens_of(output) == [7, 9, 7, 9, 7]


def test_a_bias_set_later_is_taken_in_the_form_that_servers_set_it() -> None:
    config = copy.deepcopy(load().generation_config)
    config.sequence_bias = {(7,): 100, (7, 9): 200.0}
    output = run(TEXT, generation_config=config, block_size=1, max_new_tokens=5)
    assert tokens_of(output) == [7, 9, 7, 9, 7]
    assert config.to_diff_dict()["sequence_bias"] == [[[7], 100], [[7, 9], 200.0]]
    config.sequence_bias = {5: 1.0}
    with pytest.raises(ValueError, match=r"`sequence_bias` must be a list of pairs .* got \[\[5, 1.0\]\]"):
        run(TEXT, generation_config=config)


@pytest.mark.parametrize("nothing", [{"stop_strings": []}, {"stop_strings": ""}, {"sequence_bias": {}}], ids=str)
def test_what_names_no_text_or_token_asks_for_nothing(nothing: dict[str, Any]) -> None:
    config = copy.deepcopy(load().generation_config)
    for name, value in nothing.items():
        setattr(config, name, value)
    free = run(TEXT).sequences
    assert torch.equal(run(TEXT, generation_config=config).sequences, free)
    assert torch.equal(run(TEXT, **nothing).sequences, free)


def test_processor_in_a_batch_sees_its_row_alone() -> None:
    batch = [TEXT, IMAGE]
    output = run(batch, repetition_penalty=1.5)
    for index, row in enumerate(batch):
        assert tokens_of(output, index) == tokens_of(run(row, repetition_penalty=1.5))


def test_processor_cannot_bring_the_mask_token_in() -> None:
    def favour_mask(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, MASK] += 1000
        return scores

    output = run(TEXT, logits_processor=[favour_mask])
    assert MASK not in output.sequences
    assert output.block_step_counts.tolist() == [[8, 8, 8]], "nothing is sure beside the mask token"


def test_the_one_token_left_is_chosen() -> None:
    banned = [token for token in range(512) if token not in (7, MASK)]
    for temperature in (0.0, 1.0):
        output = run(TEXT, suppress_tokens=banned, temperature=temperature, max_new_tokens=8)
        assert tokens_of(output) == [7] * 8


# Streamers -----------------------------------------------------------------------------------------------------------


class Listener:
    """Notes what a streamer is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append(("put", value.clone()))

    def end(self) -> None:
        self.events.append(("end", None))


class DraftListener(Listener):
    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        self.events.append(("draft", value.clone()))


def test_streamer_hears_the_prompt_each_block_and_each_draft() -> None:
    listener = DraftListener()
    output = run(IMAGE, streamer=listener, output_history=True)
    free, steps = tokens_of(output), output.block_step_counts[0].tolist()
    kinds = ["put"] + [kind for count in steps for kind in ["draft"] * count + ["put"]] + ["end"]
    assert [kind for kind, _ in listener.events] == kinds
    puts = [value for kind, value in listener.events if kind == "put"]
    assert [value.tolist() for value in puts] == [[IMAGE.ids], free[:8], free[8:16], free[16:]]
    drafts = [value for kind, value in listener.events if kind == "draft"]
    for draft, step in zip(drafts, output.history[0], strict=True):
        assert draft.tolist() == [step.ids.tolist()]


def test_streamer_without_drafts_hears_no_token_behind_the_end() -> None:
    free = tokens_of(run(TEXT))
    eos = free[10]
    for arguments in ({"eos_token_id": eos}, {"stopping_criteria": [StopAt(len(TEXT.ids) + free.index(eos) + 1)]}):
        listener = Listener()
        run(TEXT, streamer=listener, **arguments)
        puts = [value.tolist() for kind, value in listener.events if kind == "put"]
        assert puts[0] == [TEXT.ids]
        assert [token for put in puts[1:] for token in put] == free[: free.index(eos) + 1]
        assert listener.events[-1][0] == "end"


def test_text_streamer_prints_the_response(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = word_tokenizer()
    free = tokens_of(run(TEXT, streamer=TextStreamer(tokenizer, skip_prompt=True)))
    assert capsys.readouterr().out == tokenizer.decode(free) + "\n"


def test_text_iterator_streamer_yields_while_generating() -> None:
    tokenizer = word_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=run, args=(TEXT,), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(tokens_of(run(TEXT)))


DRAFT_STREAMERS = [getattr(transformers, name) for name in ("TextDiffusionStreamer",) if hasattr(transformers, name)]


def test_text_diffusion_streamer_shows_drafts_where_it_exists(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = word_tokenizer()
    for streamer_class in [TextStreamer, *DRAFT_STREAMERS]:
        free = tokens_of(run(TEXT, streamer=streamer_class(tokenizer, skip_prompt=True)))
        printed = capsys.readouterr().out
        assert ("<510>" in printed) is (streamer_class in DRAFT_STREAMERS)
        final = "".join(part.rsplit("\0338\033[J", 1)[-1] for part in printed.split("\0337"))
        assert final == tokenizer.decode(free) + "\n"


@pytest.mark.parametrize("arguments", [{}, {"num_return_sequences": 2}])
def test_batch_with_a_streamer_is_refused_before_any_compute(arguments: dict[str, Any]) -> None:
    batch = [TEXT] if arguments else [TEXT, IMAGE]
    listener = Listener()
    with (
        calls_of(load().model.language_model) as calls,
        pytest.raises(ValueError, match="a streamer follows one row, this batch has 2"),
    ):
        run(batch, streamer=listener, **arguments)
    assert calls == []
    assert listener.events == []


# Score ---------------------------------------------------------------------------------------------------------------


def answers(*lengths: int, seed: int = 0) -> torch.Tensor:
    """Random answers padded with -100."""
    ids = torch.randint(0, 500, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], -100)


def slow_scores(batch: list[Row], given_answers: torch.Tensor, block_size: int) -> torch.Tensor:
    expected = torch.zeros(given_answers.shape)
    for index, answer in enumerate(given_answers.tolist()):
        tokens = [token for token in answer if token != -100]
        row = batch[index % len(batch)]
        expected[index, : len(tokens)] = torch.tensor(slow_score(load(), row, tokens, block_size))
    return expected


@pytest.mark.thorough(every=8)
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_score_of_several_answers_to_one_prompt(kind: str, block_size: int) -> None:
    given_answers = answers(3, 11, 8, 1)
    scores = load().score(collate([PROMPTS[kind]]), given_answers, block_size=block_size)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, slow_scores([PROMPTS[kind]], given_answers, block_size), atol=1e-4, rtol=0)


@pytest.mark.parametrize("block_size", [4, 6])
def test_score_of_one_answer_a_prompt(block_size: int) -> None:
    batch, given_answers = list(PROMPTS.values()), answers(9, 1, 4, 8, 12, 3, 7, seed=1)
    scores = load().score(collate(batch), given_answers, block_size=block_size)
    torch.testing.assert_close(scores, slow_scores(batch, given_answers, block_size), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_score_does_not_depend_on_the_chunk(chunk: int) -> None:
    given_answers = answers(11, 4)
    expected = slow_scores([IMAGE], given_answers, 4)
    with calls_of(load().lm_head) as calls:
        scores = load().score(collate([IMAGE]), given_answers, block_size=4, positions_per_forward=chunk)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert len(calls) == -(-11 // chunk)


def test_score_encodes_prompt_and_images_once() -> None:
    with calls_of(load().model.visual) as images, calls_of(load().model.language_model) as calls:
        load().score(collate([PROMPTS["several images"]]), answers(5, 6, 7), block_size=4)
    assert len(images) == 1
    assert calls[0][:2] == (1, len(PROMPTS["several images"].ids))
    assert calls[1][:2] == (1, 3 * 8), "two blocks of each answer, end to end"
    assert [shape[0] for shape in calls[2:]] == [3]


def test_score_prefers_what_greedy_decoding_of_single_tokens_writes() -> None:
    chosen = tokens_of(run(TEXT, block_size=1, max_new_tokens=1))
    scores = load().score(collate([TEXT]), torch.arange(500)[:, None], block_size=1)
    assert scores.argmax().item() == chosen[0]


@pytest.mark.parametrize(
    ("given_answers", "message"),
    [
        (torch.tensor([[1, 2], [1, MASK]]), f"answer id {MASK}"),
        (torch.tensor([[1, 512], [1, -100]]), "answer id 512"),
        (torch.tensor([[1, 2], [-100, 1]]), "`answers`"),
        (torch.tensor([[1, -100, 2], [1, 2, 3]]), "`answers`"),
        (torch.tensor([[1.0, 2.0]]), "`answers`"),
        (torch.tensor([1, 2]), "`answers`"),
        ([[1, 2]], "`answers`"),
        (torch.zeros(3, 2, dtype=torch.long), "3 answers for 2 prompts"),
        (torch.zeros(1, 2, dtype=torch.long), "1 answers for 2 prompts"),
    ],
)
def test_wrong_answers_are_named_before_any_compute(given_answers: Any, message: str) -> None:
    with calls_of(load().model.language_model) as calls, pytest.raises(ValueError, match=message):
        load().score(collate([TEXT, IMAGE]), given_answers, block_size=4)
    assert calls == []
