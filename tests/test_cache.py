"""A returned cache serves the next turn: same tokens as without it, and only what is new is encoded."""

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from bard_vl import BardVLCache, BardVLGenerationOutput
from golden_models import PROMPTS, calls_of
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import IMAGE, VIDEO, Row, collate, load
from thorough import cases
from transformers import DynamicCache

SETTINGS: dict[str, Any] = {
    "max_new_tokens": 20,
    "block_size": 8,
    "confidence_threshold": 0.15,
    "suppress_tokens": [IMAGE, VIDEO],  # as text in the next prompt they would lack pixels
    "return_dict_in_generate": True,
}


def run(batch: Row | list[Row], **arguments: Any) -> BardVLGenerationOutput:
    rows = batch if isinstance(batch, list) else [batch]
    return load().generate(**collate(rows), **(SETTINGS | arguments))


def next_turn(row: Row, output: BardVLGenerationOutput, index: int = 0, seed: int = 99) -> Row:
    """The conversation so far and a question of 7 tokens."""
    width = output.sequences.shape[1] - output.confidences.shape[1]
    length = int((output.confidences[index] > 0).sum())
    return row.then(output.sequences[index, width : width + length].tolist()).add_text(7, seed)


def assert_same(ours: BardVLGenerationOutput, fresh: BardVLGenerationOutput) -> None:
    assert torch.equal(ours.sequences, fresh.sequences)
    assert torch.equal(ours.block_step_counts, fresh.block_step_counts)
    torch.testing.assert_close(ours.confidences, fresh.confidences, atol=1e-4, rtol=0)


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("kind", PROMPTS)
def test_next_turn_gives_the_tokens_of_a_fresh_call(kind: str) -> None:
    prompt = PROMPTS[kind]
    first = run(prompt)
    second_prompt = next_turn(prompt, first)
    second = run(second_prompt, past_key_values=first.past_key_values)
    assert_same(second, run(second_prompt))
    # Blocks of 8: the response of 20 has two committed blocks, which fit the new partition behind 16 tokens.
    reused = len(prompt.ids) + 16 if len(prompt.ids) % 8 == 0 else len(prompt.ids) // 8 * 8
    assert second.num_encoded_tokens.tolist() == [len(second_prompt.ids) - reused]
    assert second.past_key_values is first.past_key_values


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_what_another_context_computed_is_encoded_again(context: Any) -> None:
    prompt = PROMPTS["aligned text"]
    with context():
        first = run(prompt)
    second_prompt = next_turn(prompt, first)
    second = run(second_prompt, past_key_values=first.past_key_values)
    assert_same(second, run(second_prompt))
    assert second.num_encoded_tokens.tolist() == [len(second_prompt.ids)]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_autocast_decodes_prompts_of_any_lengths(mode: str) -> None:
    batch = [PROMPTS["text"], PROMPTS["image"], PROMPTS["aligned text"]]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.compiler.set_stance("force_eager"):
        output = run(batch, cache_implementation=mode)
    assert {states.dtype for layer in output.past_key_values.layers for states in (layer.keys, layer.values)} == {
        torch.bfloat16
    }


def test_only_what_is_new_runs_through_the_model() -> None:
    prompt = PROMPTS["aligned text"]
    first = run(prompt)
    second_prompt = next_turn(prompt, first)
    with calls_of(load().model.language_model) as calls:
        second = run(second_prompt, past_key_values=first.past_key_values)
    new_tokens = len(second_prompt.ids) - 32
    assert second.num_encoded_tokens.tolist() == [new_tokens]
    assert calls[0][:2] == (1, new_tokens + 8), "the new tokens, and the first block to denoise"
    assert len(calls) == second.block_step_counts.sum() == sum(second.num_forwards.values())


def test_returned_cache_says_what_it_encodes() -> None:
    for kind, encoded in (("aligned text", 32), ("text", 8)):
        output = run(PROMPTS[kind])
        cache = output.past_key_values
        assert [row.tolist() for row in cache.contents] == [output.sequences[0, :encoded].tolist()]
        assert cache.block_size == 8
        assert cache.get_seq_length() == encoded
        assert all(layer.keys.shape[2] == layer.values.shape[2] == encoded for layer in cache.layers)


def test_three_turns_share_one_cache() -> None:
    row, output = PROMPTS["mixture"], run(PROMPTS["mixture"])
    cache = output.past_key_values
    for turn in range(3):
        row = next_turn(row, output, seed=turn)
        output = run(row, past_key_values=cache)
        assert_same(output, run(row))
        assert output.num_encoded_tokens.item() < len(row.ids) - 15


def test_same_prompt_again_encodes_no_whole_block_twice() -> None:
    first = run(PROMPTS["aligned text"])
    again = run(PROMPTS["aligned text"], past_key_values=first.past_key_values)
    assert_same(again, first)
    assert again.num_encoded_tokens.tolist() == [0]
    assert "prefill+denoise" not in again.num_forwards
    longer = run(PROMPTS["text"])
    assert run(PROMPTS["text"], past_key_values=longer.past_key_values).num_encoded_tokens.tolist() == [13 - 8]


@given(st.integers(1, 40), st.integers(0, 60), st.sampled_from([1, 3, 4, 8]))
@settings(max_examples=cases(12))
def test_reuse_ends_at_the_block_of_the_first_difference(length: int, place: int, block_size: int) -> None:
    prompt = Row().add_text(length, seed=length)
    arguments = {"block_size": block_size, "max_new_tokens": 9}
    first = run(prompt, **arguments)
    second_prompt = next_turn(prompt, first)
    place %= len(second_prompt.ids)
    second_prompt.ids[place] = (second_prompt.ids[place] + 1) % 500
    second = run(second_prompt, past_key_values=first.past_key_values, **arguments)
    assert_same(second, run(second_prompt, **arguments))
    held = length // block_size * block_size
    if held == length:
        held += (first.block_step_counts.shape[1] - 1) * block_size
    reused = min(held, place) // block_size * block_size
    assert second.num_encoded_tokens.tolist() == [len(second_prompt.ids) - reused]


def test_shorter_prompt_reuses_its_whole_blocks() -> None:
    prompt = Row().add_text(30, seed=3)
    cache = run(prompt).past_key_values
    shorter = Row(prompt.ids[:19])
    output = run(shorter, past_key_values=cache)
    assert_same(output, run(shorter))
    assert output.num_encoded_tokens.tolist() == [3]


def two_images(first_seed: int, second_seed: int) -> Row:
    """Image tokens in columns 3 to 10 and 21 to 28."""
    row = Row().add_text(2, seed=1).add_image((1, 8, 4), first_seed)
    return row.add_text(8, seed=2).add_image((1, 8, 4), second_seed).add_text(10, seed=3)


@pytest.mark.parametrize(
    ("changed", "first_changed_column"), [(two_images(1, 7), 21), (two_images(7, 2), 3), (two_images(2, 1), 3)]
)
def test_changed_image_of_the_same_size_invalidates_from_its_first_token(
    changed: Row, first_changed_column: int
) -> None:
    original = two_images(1, 2)
    assert changed.ids == original.ids
    cache = run(original).past_key_values
    output = run(changed, past_key_values=cache)
    assert_same(output, run(changed))
    assert output.num_encoded_tokens.tolist() == [len(changed.ids) - first_changed_column // 8 * 8]


def test_changed_video_invalidates_from_its_first_token() -> None:
    original, changed = (Row().add_text(12, seed=1).add_video((2, 4, 4), seed) for seed in (5, 6))
    cache = run(original).past_key_values
    output = run(changed, past_key_values=cache)
    assert_same(output, run(changed))
    assert output.num_encoded_tokens.tolist() == [len(changed.ids) - 8]


def test_vision_tower_runs_for_new_images_alone() -> None:
    tower, prompt = load().model.visual, two_images(1, 2)
    first = run(prompt)
    second_prompt = next_turn(prompt, first)
    with calls_of(tower) as calls:
        second = run(second_prompt, past_key_values=first.past_key_values)
    assert calls == []
    third_prompt = next_turn(second_prompt, second).add_image((1, 2, 6), seed=8).add_text(3, seed=4)
    with calls_of(tower) as calls:
        third = run(third_prompt, past_key_values=second.past_key_values)
    assert [shape[0] for shape in calls] == [12], "patches of the new image"
    assert_same(third, run(third_prompt))


def test_image_across_the_edge_of_reuse_is_encoded_again() -> None:
    prompt = Row().add_text(4, seed=1).add_image((1, 8, 4), seed=2)  # image tokens in columns 5 to 12, reuse to 8
    first = run(prompt)
    second_prompt = next_turn(prompt, first)
    with calls_of(load().model.visual) as calls:
        second = run(second_prompt, past_key_values=first.past_key_values)
    assert [shape[0] for shape in calls] == [32]
    assert second.num_encoded_tokens.tolist() == [len(second_prompt.ids) - 8]
    assert_same(second, run(second_prompt))


def test_other_block_size_is_not_reused() -> None:
    cache = run(PROMPTS["aligned text"]).past_key_values
    output = run(PROMPTS["aligned text"], block_size=4, past_key_values=cache)
    assert_same(output, run(PROMPTS["aligned text"], block_size=4))
    assert output.num_encoded_tokens.tolist() == [16]


def test_rows_of_a_batch_that_ended_at_different_blocks_go_on() -> None:
    rows = [PROMPTS["text"], PROMPTS["aligned text"], PROMPTS["several images"]]
    places = zip(rows, (30, 2, 14), strict=True)
    ends = [run(row, max_new_tokens=40).sequences[0, len(row.ids) + place].item() for row, place in places]
    eos = {"eos_token_id": ends, "max_new_tokens": 40}
    first = run(rows, **eos)
    assert len({int((row > 0).sum()) for row in first.block_step_counts}) > 1, "rows end at different blocks"
    turns = [next_turn(row, first, index) for index, row in enumerate(rows)]
    second = run(turns, past_key_values=first.past_key_values, **eos)
    assert_same(second, run(turns, **eos))
    assert len({int(n) for n in second.num_encoded_tokens - torch.tensor([len(row.ids) for row in turns])}) == 1
    assert (second.num_encoded_tokens < torch.tensor([len(row.ids) for row in turns])).all()


def test_several_responses_to_one_prompt_go_on_as_rows() -> None:
    prompt = PROMPTS["image"]
    first = run(prompt, num_return_sequences=3, temperature=1.0, seed=4)
    turns = [next_turn(prompt, first, index) for index in range(3)]
    assert len({tuple(row.ids) for row in turns}) == 3
    second = run(turns, past_key_values=first.past_key_values)
    assert_same(second, run(turns))
    assert second.num_encoded_tokens.tolist() == [len(row.ids) - len(prompt.ids) // 8 * 8 for row in turns]


def test_cache_goes_on_after_an_end_of_sequence() -> None:
    prompt = PROMPTS["aligned text"]
    eos = run(prompt).sequences[0, 16 + 10].item()
    first = run(prompt, eos_token_id=eos)
    second_prompt = next_turn(prompt, first)
    assert eos in second_prompt.ids
    second = run(second_prompt, eos_token_id=eos, past_key_values=first.past_key_values)
    assert_same(second, run(second_prompt, eos_token_id=eos))
    assert second.num_encoded_tokens.item() < len(second_prompt.ids) - 15


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("stopped", ["at a block's end", "inside a block", "by time"])
def test_cache_of_a_stopped_call_holds_what_was_encoded(stopped: str, mode: str) -> None:
    prompt = PROMPTS["aligned text"]
    lengths = {"at a block's end": 24 + 8, "inside a block": 24 + 5, "by time": 16 + 8}
    stop = (
        {"max_time": 0.0}
        if stopped == "by time"
        else {"stopping_criteria": [lambda ids, _: torch.tensor([ids.shape[1] >= lengths[stopped]])]}
    )
    with torch.compiler.set_stance("force_eager"):
        first = run(prompt, cache_implementation=mode, **stop)
    assert first.sequences.shape[1] == lengths[stopped]
    assert (
        first.past_key_values.contents[0].tolist() == first.sequences[0, : 16 if stopped == "by time" else 24].tolist()
    )
    second_prompt = next_turn(prompt, first)
    second = run(second_prompt, past_key_values=first.past_key_values)
    assert_same(second, run(second_prompt))


def test_call_that_fails_leaves_the_cache_usable() -> None:
    prompt = PROMPTS["mixture"]
    first = run(prompt)
    second_prompt = next_turn(prompt, first)

    def fail(input_ids: torch.Tensor, scores: None) -> bool:
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        run(second_prompt, past_key_values=first.past_key_values, stopping_criteria=[fail])
    second = run(second_prompt, past_key_values=first.past_key_values)
    assert_same(second, run(second_prompt))
    assert second.num_encoded_tokens.item() == len(second_prompt.ids) - len(prompt.ids) // 8 * 8


def test_cache_works_with_a_mapping_and_a_streamer_alike() -> None:
    prompt = PROMPTS["aligned text"]
    cache = run(prompt).past_key_values
    plain = {name: value for name, value in SETTINGS.items() if name != "return_dict_in_generate"}
    response = load().generate(collate([prompt]), past_key_values=cache, **plain)
    assert torch.equal(response, load().generate(collate([prompt]), **plain))
    assert cache.contents[0].tolist() == [*prompt.ids, *response[0, :16].tolist()]


@pytest.mark.parametrize("wrong", [DynamicCache(), ((torch.zeros(1),),), "cache"])
def test_wrong_type_of_cache_is_named_before_any_compute(wrong: Any) -> None:
    with (
        calls_of(load().model.language_model) as calls,
        pytest.raises(ValueError, match=rf"`past_key_values`.*{type(wrong).__name__}"),
    ):
        run(PROMPTS["text"], past_key_values=wrong)
    assert calls == []


def test_wrong_number_of_rows_is_named_before_any_compute() -> None:
    cache = run(PROMPTS["text"]).past_key_values
    with (
        calls_of(load().model.language_model) as calls,
        pytest.raises(ValueError, match="`past_key_values` holds 1 rows, the prompt has 2"),
    ):
        run([PROMPTS["text"], PROMPTS["image"]], past_key_values=cache)
    assert calls == []
    assert_same(run(PROMPTS["text"], past_key_values=cache), run(PROMPTS["text"]))


TAMPERING: dict[str, tuple[Any, bool]] = {  # what somebody does with a cache, and whether it still holds the prompt
    "nothing": (lambda cache: None, True),
    "reset": (lambda cache: cache.reset(), False),
    "crop": (lambda cache: cache.crop(-5), False),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([0])), True),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([0])), True),
    "select by bool": (lambda cache: cache.batch_select_indices(torch.tensor([True])), True),
    "repeat": (lambda cache: cache.batch_repeat_interleave(1), True),
    "append": (lambda cache: [layer.update(layer.keys, layer.values) for layer in cache.layers], False),
    "append to one layer": (lambda cache: cache.update(cache.layers[1].keys, cache.layers[1].values, 1), False),
    "write": (lambda cache: cache.layers[0].keys.mul_(2), False),
    "replace": (lambda cache: setattr(cache.layers[-1], "values", cache.layers[-1].values * 2), False),
    "drop a layer's states": (lambda cache: cache.layers[1].reset(), False),
    "write one number": (lambda cache: cache.layers[2].values[0, 0, 3, :1].add_(1e-3), False),
    "layers in another order": (lambda cache: cache.layers.reverse(), False),
    "crop and select": (lambda cache: [cache.crop(-5), cache.batch_select_indices(torch.tensor([0]))], False),
    "reset and reorder": (lambda cache: [cache.reset(), cache.reorder_cache(torch.tensor([0]))], False),
    "offload": (lambda cache: cache.layers[0].offload(), True),
}


@pytest.mark.thorough(every=7)
@pytest.mark.parametrize("name", TAMPERING)
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode])
def test_what_a_cache_says_is_true_whatever_was_done_to_it(name: str, context: Any) -> None:
    """In inference mode nothing counts what is written to a tensor."""
    tamper, holds = TAMPERING[name]
    prompt = PROMPTS["aligned text"]
    with context():
        first = run(prompt)
        tamper(first.past_key_values)
        assert bool(first.past_key_values.contents) == holds
        second_prompt = next_turn(prompt, first)
        second = run(second_prompt, past_key_values=first.past_key_values)
        assert_same(second, run(second_prompt))
    assert second.num_encoded_tokens.tolist() == [len(second_prompt.ids) - (32 if holds else 0)]


def test_rows_of_a_cache_can_be_reordered_selected_and_repeated() -> None:
    rows = [PROMPTS["aligned text"], PROMPTS["text"], PROMPTS["several images"]]
    first = run(rows)
    turns = [next_turn(row, first, index) for index, row in enumerate(rows)]
    cache = first.past_key_values
    for change, order in (
        (lambda: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda: cache.batch_select_indices(torch.tensor([True, True, False])), [2, 0]),
        (lambda: cache.batch_repeat_interleave(2), [2, 2, 0, 0]),
    ):
        change()
        kept = copy.deepcopy(cache)
        batch = [turns[row] for row in order]
        output = run(batch, past_key_values=kept)
        assert_same(output, run(batch))
        assert (output.num_encoded_tokens < torch.tensor([len(row.ids) for row in batch])).all()


def test_a_copy_of_a_cache_serves_and_a_pickled_one_claims_nothing() -> None:
    prompt = PROMPTS["aligned text"]
    first = run(prompt)
    second_prompt = next_turn(prompt, first)
    kept = copy.deepcopy(first.past_key_values)
    for cache, encoded in (
        (kept, len(second_prompt.ids) - 32),
        (first.past_key_values, len(second_prompt.ids) - 32),
        (pickle.loads(pickle.dumps(kept)), len(second_prompt.ids)),
    ):
        output = run(second_prompt, past_key_values=cache)
        assert_same(output, run(second_prompt))
        assert output.num_encoded_tokens.tolist() == [encoded]


def scaled_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=torch.tensor([PROMPTS["aligned text"].ids]), block_size=8).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def written_past_the_count(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


def replaced(model: Any) -> None:
    old = model.model.language_model.layers[0].mlp.up_proj
    old.weight = torch.nn.Parameter(old.weight.detach() * 1.5)


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("change", [scaled_in_place, trained, written_past_the_count, replaced, copy.deepcopy])
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode])
def test_what_other_weights_computed_is_encoded_again(change: Any, context: Any) -> None:
    model, prompt = copy.deepcopy(load()), PROMPTS["aligned text"]
    with context():
        first = model.generate(**collate([prompt]), **SETTINGS)
        again = model.generate(**collate([prompt]), **SETTINGS, past_key_values=first.past_key_values)
    assert again.num_encoded_tokens.tolist() == [0], "the same weights"
    model = change(model) or model
    with context():
        want = model.generate(**collate([prompt]), **SETTINGS)
        got = model.generate(**collate([prompt]), **SETTINGS, past_key_values=first.past_key_values)
    assert_same(got, want)
    assert got.num_encoded_tokens.tolist() == [len(prompt.ids)]


@pytest.mark.thorough
def test_what_another_state_of_adapters_computed_is_encoded_again() -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(load()), config).eval()
    model.add_adapter("other", config)
    inputs, length = collate([PROMPTS["aligned text"]]), len(PROMPTS["aligned text"].ids)

    def check(encoded: int) -> None:
        want = model.generate(**inputs, **SETTINGS)
        assert_same(got := model.generate(**inputs, **SETTINGS, past_key_values=cache), want)
        assert got.num_encoded_tokens.tolist() == [encoded]

    cache = model.generate(**inputs, **SETTINGS).past_key_values
    check(0)
    model.set_adapter("other")
    check(length)
    check(0)
    with model.disable_adapter():
        check(length)
    check(length)
    model.merge_adapter()
    check(length)
    model.unmerge_adapter()
    check(length)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(2.0)
    check(length)


def test_a_cache_of_another_number_of_layers_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="`past_key_values` has 1 layers, the model has"):
        run(PROMPTS["text"], past_key_values=BardVLCache(1))


def test_empty_cache_may_be_passed_in() -> None:
    cache = BardVLCache(load().config.text_config.num_hidden_layers)
    output = run(PROMPTS["video"], past_key_values=cache)
    assert output.past_key_values is cache
    assert_same(output, run(PROMPTS["video"]))
    assert output.num_encoded_tokens.tolist() == [len(PROMPTS["video"].ids)]
