"""Bad input: a clear error that names the value before anything is computed; a passed cache stays as it was."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as once
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLGenerationConfig
from ragged import IMAGE, MASK, VIDEO, VISION_END, VISION_START, Row, collate, load, pixels
from transformers import GenerationConfig

GRID = torch.tensor([[1, 4, 4]])
PIXELS = pixels((1, 4, 4), 0)
ONE_IMAGE = [1, VISION_START, *[IMAGE] * 4, VISION_END]
LIMIT = 4096  # `max_position_embeddings` of the tiny model

ALL_BUT_MASK = [token_id for token_id in range(512) if token_id != MASK]


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def image(tokens: list[int], pixel_values: Any = PIXELS, grid: Any = GRID) -> dict[str, Any]:
    return {"input_ids": ids(tokens), "pixel_values": pixel_values, "image_grid_thw": grid}


def video(tokens: list[int], grid: list[int]) -> dict[str, Any]:
    values = pixels((grid[0], grid[1], grid[2]), 0)
    return {"input_ids": ids(tokens), "pixel_values_videos": values, "video_grid_thw": torch.tensor([grid])}


@contextmanager
def nothing_computed(model: Any) -> Iterator[None]:
    """Fail if a module of the model was called inside."""
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert called == []


def snapshot(cache: Any) -> list[Any]:
    layers = [(layer.keys.clone(), layer.values.clone(), layer.writing) for layer in cache.layers]
    return [layers, copy.deepcopy(cache.contents), cache.block_size]


def test_a_call_computes_what_the_checks_below_look_for() -> None:
    model = load()
    with pytest.raises(AssertionError, match="visual"), nothing_computed(model):
        model.generate(**image(ONE_IMAGE), block_size=4, max_new_tokens=4)


def changed_later(**fields: Any) -> BardVLGenerationConfig:
    """A config whose fields were set behind its back, as servers do with a copy of the model's."""
    config = BardVLGenerationConfig(block_size=4)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"block_size": 0}, "`block_size` must be an integer of at least 1, got 0"),
    ({"block_size": -1}, "`block_size` must be an integer of at least 1, got -1"),
    ({"block_size": True}, "`block_size` must be an integer of at least 1, got True"),
    ({"block_size": "4"}, "`block_size` must be an integer of at least 1, got '4'"),
    ({"block_size": 1.5}, "`block_size` must be an integer of at least 1, got 1.5"),
    ({"block_size": None}, "no `block_size`: neither the call nor the checkpoint's config.json states it"),
    ({"denoising_steps": 0}, "`denoising_steps` must be an integer of at least 1, got 0"),
    ({"denoising_steps": 5}, "`denoising_steps` must be between 1 and `block_size` = 4, got 5"),
    ({"confidence_threshold": -0.1}, "`confidence_threshold` must be a number in [0.0, 1.0], got -0.1"),
    ({"confidence_threshold": 1.5}, "`confidence_threshold` must be a number in [0.0, 1.0], got 1.5"),
    ({"confidence_threshold": "x"}, "`confidence_threshold` must be a number in [0.0, 1.0], got 'x'"),
    ({"confidence_threshold": float("nan")}, "`confidence_threshold` must be a number in [0.0, 1.0], got nan"),
    ({"temperature": -0.5}, "`temperature` must be a number in [0.0, inf), got -0.5"),
    ({"temperature": float("inf")}, "`temperature` must be a number in [0.0, inf), got inf"),
    ({"top_p": 0}, "`top_p` must be a number in (0.0, 1.0], got 0"),
    ({"top_p": 1.1}, "`top_p` must be a number in (0.0, 1.0], got 1.1"),
    ({"top_k": -1}, "`top_k` must be an integer of at least 0, got -1"),
    ({"top_k": 2.5}, "`top_k` must be an integer of at least 0, got 2.5"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be a number in (0.0, inf), got 0.0"),
    ({"remasking_strategy": "best"}, "`remasking_strategy` must be one of ['low_confidence_static', "),
    ({"remasking_strategy": "best"}, "got 'best'"),
    ({"no_such_thing": 1}, "no_such_thing"),
    ({"do_sample": "no"}, "`do_sample` must be one of [True, False], got 'no'"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1, got 0"),
    ({"max_new_tokens": None, "max_length": 3}, "`max_length` = 3 leaves no room after 3 prompt tokens"),
    (
        {"block_size": LIMIT - 2, "max_new_tokens": LIMIT - 2},
        f"position 3: with {LIMIT - 2} new tokens in blocks of {LIMIT - 2} it passes the model's {LIMIT}",
    ),
    ({"block_size": LIMIT - 2, "max_new_tokens": 1}, "(`max_position_embeddings`); there is room for 0"),
    ({"num_return_sequences": 0}, "`num_return_sequences` must be an integer of at least 1, got 0"),
    ({"mask_token_id": 512}, "`mask_token_id` = 512 lies outside the vocabulary of 512 tokens"),
    ({"mask_token_id": -1}, "`mask_token_id` must be an integer of at least 0, got -1"),
    ({"mask_token_id": 2}, "the prompt contains the mask token 2"),
    ({"eos_token_id": [511, "x"]}, "`eos_token_id` must be an integer of at least 0, got 'x'"),
    ({"eos_token_id": [511, 600]}, "`eos_token_id` = 600 lies outside the vocabulary of 512 tokens"),
    ({"pad_token_id": MASK}, f"`pad_token_id` = {MASK} is the mask token"),
    ({"eos_token_id": [511, MASK]}, f"`eos_token_id` = {MASK} is the mask token"),
    ({"pad_token_id": 600}, "`pad_token_id` = 600 lies outside the vocabulary of 512 tokens"),
    ({"seed": 1, "generator": torch.Generator()}, "give `generator` or `seed`, not both"),
    ({"seed": "x"}, "`seed` must be an integer, got 'x'"),
    ({"seed": 2**70}, f"`seed` must lie in [-2**63, 2**64), got {2**70}"),
    ({"seed": -(2**63) - 1}, f"`seed` must lie in [-2**63, 2**64), got {-(2**63) - 1}"),
    ({"generator": 5}, "`generator` must be a torch.Generator, got int"),
    ({"generation_config": {"block_size": 4}}, "`generation_config` must be a GenerationConfig, got dict"),
    ({"stop_strings": ["end"]}, "`stop_strings` = ['end'] needs `tokenizer=`"),
    ({"stop_strings": 5}, "`stop_strings` must be a non-empty text or a list of them, got 5"),
    ({"stop_strings": ["a", 3]}, "`stop_strings` must be a non-empty text or a list of them, got ['a', 3]"),
    ({"stop_strings": ["a", ""]}, "`stop_strings` must be a non-empty text or a list of them, got ['a', '']"),
    ({"stop_strings": "a", "tokenizer": "x"}, "`tokenizer` must be a tokenizer or a processor, got str"),
    ({"streamer": "x"}, "`streamer` must have the methods `put` and `end`, got 'x'"),
    ({"streamer": SimpleNamespace(put=print)}, "`streamer` must have the methods `put` and `end`, got namespace(put="),
    ({"logits_processor": max}, "`logits_processor` must be a list of callables, got <built-in function max>: give a"),
    ({"logits_processor": 5}, "`logits_processor` must be a list of callables, got 5"),
    (
        {"logits_processor": [max, 5]},
        "`logits_processor` must be a list of callables, got [<built-in function max>, 5]",
    ),
    ({"stopping_criteria": max}, "got <built-in function max>: give a list, `stopping_criteria=[...]`"),
    ({"stopping_criteria": "x"}, "`stopping_criteria` must be a list of callables, got 'x'"),
    ({"bad_words_ids": []}, "bad_words_ids"),
    ({"bad_words_ids": [[]]}, "`bad_words_ids` must be a list of non-empty lists of token ids, got [[]]"),
    ({"bad_words_ids": [5]}, "`bad_words_ids` must be a list of non-empty lists of token ids, got [5]"),
    ({"bad_words_ids": [[5, -1]]}, "`bad_words_ids` must be a list of non-empty lists of token ids, got [[5, -1]]"),
    ({"bad_words_ids": [[5], [6, 512]]}, "`bad_words_ids`: 512 lies outside the vocabulary of 512 tokens"),
    ({"suppress_tokens": 5}, "`suppress_tokens` must be a list of token ids, got 5"),
    ({"suppress_tokens": [-1]}, "`suppress_tokens` must be a list of token ids, got [-1]"),
    ({"suppress_tokens": [True]}, "`suppress_tokens` must be a list of token ids, got [True]"),
    ({"suppress_tokens": [10**6]}, "`suppress_tokens`: 1000000 lies outside the vocabulary of 512 tokens"),
    ({"sequence_bias": [[[6, 512], 1.0]]}, "`sequence_bias`: 512 lies outside the vocabulary of 512 tokens"),
    ({"sequence_bias": {5: 1.0}}, "`sequence_bias` must be a list of pairs of a list of token ids and a number"),
    ({"sequence_bias": [[[5], float("nan")]]}, "got [[[5], nan]]"),
    ({"generation_config": changed_later(num_beams=4)}, "`num_beams=4` is not supported by block-diffusion decoding"),
    ({"generation_config": GenerationConfig(seed="x")}, "`seed` must be an integer, got 'x'"),
    ({"suppress_tokens": ALL_BUT_MASK}, "`suppress_tokens` and `bad_words_ids` leave no token to choose"),
    ({"suppress_tokens": ALL_BUT_MASK[1:], "bad_words_ids": [[ALL_BUT_MASK[0]]]}, "leave no token to choose"),
    ({"_foo": 1}, "unknown generation settings: _foo"),
    ({"return_step_stats": True}, "`return_step_stats=True` needs `return_dict_in_generate=True`, or the inputs as a"),
    ({"output_history": True}, "`output_history=True` needs `return_dict_in_generate=True`"),
    ({"num_beams": 4}, "`num_beams=4` is not supported by block-diffusion decoding"),
    ({"assistant_model": "draft"}, "assistant_model"),
    ({"constraints": ["x"]}, "constraints"),
    ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens=3` is not supported"),
    ({"cache_implementation": "paged"}, "got 'paged'"),
    ({"use_cache": False}, "`use_cache` must be one of [True], got False"),
    ({"past_key_values": (1, 2)}, "`past_key_values` must be a cache that `generate` returned, got tuple"),
]
PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "the prompt is empty: `input_ids` has shape (1, 0)"),
    ({"input_ids": None}, "no `input_ids`"),
    ({"input_ids": torch.tensor([1, 2])}, "`input_ids` must be an integer tensor (batch, length), got (2,)"),
    ({"input_ids": torch.tensor([[1.0, 2.0]])}, "got (1, 2) of torch.float32"),
    ({"input_ids": torch.tensor([[True, False]])}, "got (1, 2) of torch.bool"),
    ({"input_ids": [[1, 2]]}, "`input_ids` must be an integer tensor (batch, length), got list"),
    ({"input_ids": ids([1, 512])}, "token id 512 lies outside the vocabulary of 512 tokens"),
    ({"input_ids": ids([1, -1])}, "token id -1 lies outside the vocabulary of 512 tokens"),
    ({"input_ids": ids([1, MASK, 2])}, f"the prompt contains the mask token {MASK}"),
    ({"input_ids": ids([5] * (LIMIT + 1))}, f"a prompt reaches position {LIMIT + 1}, the model has {LIMIT}"),
    ({"input_ids": ids([5] * (LIMIT - 3)), "max_new_tokens": 4}, f"position {LIMIT - 3}: with 4 new tokens"),
    (
        {"input_ids": ids([1, 2], [1, 2]), "attention_mask": ids([1, 1], [0, 0])},
        "row 1 of `attention_mask` has no real",
    ),
    ({"attention_mask": ids([1, 1, 0])}, "row 0 of `attention_mask` has padding right of a real token"),
    ({"attention_mask": ids([1, 0, 1])}, "row 0 of `attention_mask` has padding right of a real token"),
    ({"attention_mask": ids([1, 1])}, "`attention_mask` has shape (1, 2), `input_ids` (1, 3)"),
    ({"attention_mask": torch.ones(1, 1, 3, 3)}, "`attention_mask` has shape (1, 1, 3, 3), `input_ids` (1, 3)"),
    ({"attention_mask": ids([1, 2, 2])}, "`attention_mask` must hold 0 for padding and 1 for real tokens, got 2"),
    ({"attention_mask": [[1, 1, 1]]}, "`attention_mask` must be a tensor (batch, length), got list"),
    ({"inputs": ids([1, 2, 3])}, "`input_ids` is given twice"),
    ({"inputs": {"input_ids": ids([1, 2, 3])}}, "`input_ids` is given twice"),
    ({"inputs": {"no_such_input": ids([1, 2, 3])}}, "unexpected inputs: no_such_input"),
    ({"synced_gpus": True}, "synced_gpus"),
    ({"prefix_allowed_tokens_fn": max}, "prefix_allowed_tokens_fn"),
    ({"negative_prompt_ids": ids([1])}, "negative_prompt_ids"),
    ({"custom_generate": "some/repository"}, "custom_generate"),
    ({"use_model_defaults": False}, "use_model_defaults"),
    ({"position_ids": ids([0, 1, 2])}, "position_ids"),
    ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds"),
    ({"token_type_ids": ids([0, 1, 1])}, "token_type_ids"),
    (image(ONE_IMAGE, pixel_values=PIXELS.tolist()), "`pixel_values` must be a tensor, got list"),
    (image(ONE_IMAGE, grid="1 4 4"), "`image_grid_thw` must be a tensor, got str"),
    (image(ONE_IMAGE, grid=GRID.float()), "`image_grid_thw` must have shape (items, 3) of integers, got (1, 3) of"),
    (image([2, *[IMAGE] * 4, VISION_END]), f"a run of image tokens must follow a vision start token {VISION_START}"),
    (image([*ONE_IMAGE, IMAGE]), "the prompt has 5 image tokens, `image_grid_thw` stands for 4 features"),
    (image(ONE_IMAGE[:-2]), "the prompt has 3 image tokens, `image_grid_thw` stands for 4 features"),
    (image([1, 2, 3]), "the prompt has 0 image tokens, `image_grid_thw` stands for 4 features"),
    ({"input_ids": ids(ONE_IMAGE)}, "the prompt has 4 image tokens but there is no `pixel_values`"),
    ({"input_ids": ids([VISION_START, VIDEO])}, "the prompt has 1 video tokens but there is no `pixel_values_videos`"),
    (image(ONE_IMAGE, grid=None), "`pixel_values` and `image_grid_thw` belong together: one of them is missing"),
    (image(ONE_IMAGE, pixel_values=None), "`pixel_values` and `image_grid_thw` belong together"),
    (image(ONE_IMAGE, PIXELS[:15]), "`image_grid_thw` speaks of 16 patches, `pixel_values` holds 15"),
    (image(ONE_IMAGE, PIXELS[:, :100]), "`pixel_values` must have shape (patches, 384), got (16, 100)"),
    (image(ONE_IMAGE, grid=GRID[0]), "`image_grid_thw` must have shape (items, 3) of integers, got (3,)"),
    (image(ONE_IMAGE, grid=torch.tensor([[1, 1, 16]])), "`image_grid_thw` holds [1, 1, 16]"),
    (image(ONE_IMAGE, grid=torch.tensor([[1, -4, -4]])), "`image_grid_thw` holds [1, -4, -4]"),
    (
        image([VISION_START, IMAGE, IMAGE, VISION_END, VISION_START, IMAGE, IMAGE, VISION_END]),
        "image tokens in runs of [2, 2], `image_grid_thw` asks for runs of [4]",
    ),
    (
        image([VISION_START, *[IMAGE] * 8, VISION_END], torch.cat([PIXELS] * 2), torch.cat([GRID] * 2)),
        "image tokens in runs of [8], `image_grid_thw` asks for runs of [4, 4]: one for each image",
    ),
    (
        video([VISION_START, *[VIDEO] * 8, VISION_END], [2, 4, 4]),
        "video tokens in runs of [8], `video_grid_thw` asks for runs of [4, 4]: one for each frame",
    ),
]


@once
def cache_of_four() -> Any:
    """What refused calls are given, and leave as it is."""
    output = load().generate(ids([1, 2, 3, 4]), block_size=4, max_new_tokens=8, return_dict_in_generate=True)
    return output.past_key_values


@pytest.mark.parametrize(("wrong", "message"), SETTINGS + PROMPTS)
def test_generate_refuses_by_name_before_any_compute(wrong: dict[str, Any], message: str) -> None:
    model = load()
    good = {"input_ids": ids([1, 2, 3]), "block_size": 4, "max_new_tokens": 8}
    cache = cache_of_four()
    before = snapshot(cache)
    with pytest.raises(ValueError, match=re.escape(message)), nothing_computed(model):
        model.generate(**{"past_key_values": cache, **good, **wrong})
    torch.testing.assert_close(snapshot(cache), before, atol=0, rtol=0)


class Streamer:
    def put(self, value: torch.Tensor) -> None:
        raise AssertionError("nothing is streamed")

    def end(self) -> None:
        raise AssertionError("nothing is streamed")


@pytest.mark.parametrize("copies", [{"input_ids": ids([1], [2])}, {"input_ids": ids([1]), "num_return_sequences": 2}])
def test_a_streamer_refuses_more_than_one_row(copies: dict[str, Any]) -> None:
    model = load()
    with pytest.raises(ValueError, match="a streamer follows one row, this batch has 2"), nothing_computed(model):
        model.generate(**copies, block_size=4, max_new_tokens=4, streamer=Streamer())


def test_a_cache_of_other_rows_is_refused_and_kept() -> None:
    model = load()
    arguments = {"block_size": 4, "max_new_tokens": 8, "return_dict_in_generate": True}
    cache = model.generate(ids([1, 2, 3, 4], [5, 6, 7, 8]), **arguments).past_key_values
    before = snapshot(cache)
    with pytest.raises(ValueError, match="`past_key_values` holds 2 rows, the prompt has 1"), nothing_computed(model):
        model.generate(ids([1, 2, 3, 4, 9]), past_key_values=cache, **arguments)
    torch.testing.assert_close(snapshot(cache), before, atol=0, rtol=0)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_other_attention_implementations_are_refused_by_name_at_load(attention: str) -> None:
    path = Path(__file__).parent / "golden" / "untied"
    for wanted in (attention, {"text_config": attention, "vision_config": "sdpa"}):
        with pytest.raises(ValueError, match=f"'sdpa' and 'eager', not '{attention}'"):
            BardVLForConditionalGeneration.from_pretrained(path, attn_implementation=wanted)


@pytest.mark.parametrize("call", ["generate", "forward", "score"])
def test_an_attention_implementation_set_later_is_refused_by_name(call: str) -> None:
    model, arguments = load(), {"inputs": {"input_ids": ids([1, 2])}, "block_size": 4}
    if call == "forward":
        arguments = {"input_ids": ids([1, 2]), "block_size": 4}
    if call == "score":
        arguments["answers"] = ids([1, 2])
    with pytest.raises(ValueError, match="flex_attention"):
        model.set_attn_implementation("flex_attention")
    before = model.config.text_config._attn_implementation
    model.config.text_config._attn_implementation = "flex_attention"  # what a registered implementation gets past
    try:
        with pytest.raises(ValueError, match="not 'flex_attention'"), nothing_computed(model.model.language_model):
            getattr(model, call)(**arguments)
    finally:
        model.config.text_config._attn_implementation = before


THREE = ids([1, 2, 3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention_mask": torch.ones(1, 3, 3)}, "`attention_mask` must be 4-D or (batch, keys) = (1, 3), got"),
        ({"attention_mask": torch.ones(1, 2)}, "`attention_mask` must be 4-D or (batch, keys) = (1, 3), got"),
        ({"block_ids": torch.zeros(1, 2)}, "`block_ids` must have shape (batch, keys) = (1, 3), got (1, 2)"),
        ({"block_size": None}, "no `block_size`"),
        ({"block_size": 0}, "`block_size` must be an integer of at least 1, got 0"),
        ({"input_ids": None}, "give exactly one of `input_ids` and `inputs_embeds`"),
        (image([*ONE_IMAGE, IMAGE]), "the prompt has 5 image tokens, `image_grid_thw` stands for 4 features"),
        ({"input_ids": ids(ONE_IMAGE)}, "the prompt has 4 image tokens but there is no `pixel_values`"),
        (image(ONE_IMAGE, PIXELS[:15]), "`image_grid_thw` speaks of 16 patches, `pixel_values` holds 15"),
    ],
)
def test_forward_refuses_by_name(wrong: dict[str, Any], message: str) -> None:
    model = load()
    with (
        pytest.raises(ValueError, match=re.escape(message)),
        nothing_computed(model.model.language_model),
        nothing_computed(model.model.visual),
    ):
        model(**{"input_ids": THREE, "block_size": 4, **wrong})


def test_forward_refuses_several_tokens_behind_a_cache_without_their_blocks() -> None:
    model = load()
    with torch.no_grad():
        cache = model(input_ids=THREE, block_size=4, use_cache=True).past_key_values
    positions = torch.arange(3, 5).expand(4, 1, -1)
    with (
        pytest.raises(ValueError, match="2 query tokens with a cache of 3: where their blocks begin cannot be known"),
        nothing_computed(model.model.language_model),
    ):
        model(input_ids=ids([4, 5]), block_size=4, past_key_values=cache, position_ids=positions)
    with pytest.raises(ValueError, match="the positions cannot be derived: pass `position_ids`"):
        model(input_ids=ids([4]), block_size=4, past_key_values=cache)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[1, 2]], "`answers` must be a non-empty integer tensor (answers, length), got [[1, 2]]"),
        (torch.tensor([1, 2]), "`answers` must be a non-empty integer tensor (answers, length), got tensor([1, 2])"),
        (torch.tensor([[1.0]]), "`answers` must be a non-empty integer tensor"),
        (torch.empty(2, 0, dtype=torch.long), "`answers` must be a non-empty integer tensor"),
        (ids([-100, 1]), "`answers` must have a token in front and be padded with -100 on the right"),
        (ids([1, -100, 2]), "`answers` must have a token in front and be padded with -100 on the right"),
        (ids([1, 512]), "answer id 512 is the mask token or outside the vocabulary of 512 tokens"),
        (ids([1, -7]), "answer id -7 is the mask token or outside the vocabulary of 512 tokens"),
        (ids([MASK]), f"answer id {MASK} is the mask token or outside the vocabulary of 512 tokens"),
        (ids([1] * LIMIT), f"with {LIMIT} new tokens in blocks of 4 it passes the model's {LIMIT}"),
    ],
)
def test_score_refuses_by_name_before_any_compute(answers: Any, message: str) -> None:
    model = load()
    with pytest.raises(ValueError, match=re.escape(message)), nothing_computed(model):
        model.score({"input_ids": ids([1, 2, 3])}, answers, block_size=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inputs": ids([1, 2, 3])}, "`inputs` must be the processor's output, a mapping, got Tensor"),
        ({"inputs": None}, "`inputs` must be the processor's output, a mapping, got NoneType"),
        ({"inputs": [[1, 2, 3]]}, "`inputs` must be the processor's output, a mapping, got list"),
        ({"positions_per_forward": 0}, "`positions_per_forward` must be an integer of at least 1, got 0"),
        ({"positions_per_forward": 1.5}, "`positions_per_forward` must be an integer of at least 1, got 1.5"),
    ],
)
def test_score_refuses_other_arguments_by_name_before_any_compute(wrong: dict[str, Any], message: str) -> None:
    model = load()
    good = {"inputs": {"input_ids": ids([1, 2, 3])}, "answers": ids([1, 2]), "block_size": 4}
    with pytest.raises(ValueError, match=re.escape(message)), nothing_computed(model):
        model.score(**(good | wrong))


def test_score_refuses_answers_that_match_no_prompt() -> None:
    model = load()
    inputs = collate([Row([1]), Row([2, 3])])
    with pytest.raises(ValueError, match="3 answers for 2 prompts: give one prompt, or one an answer"):
        model.score(inputs, ids([1], [2], [3]), block_size=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 0}, "`block_size` must be an integer of at least 1, got 0"),
        ({"block_size": 2.0}, "`block_size` must be an integer of at least 1, got 2.0"),
        ({"mask_token_id": -1}, "`mask_token_id` must be an integer of at least 0, got -1"),
        ({"mask_token_id": None}, "`mask_token_id` must be an integer of at least 0, got None"),
    ],
)
def test_a_model_config_refuses_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BardVLConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(wrong, message) for wrong, message in SETTINGS if set(wrong) & {"top_p", "temperature", "num_beams"}],
)
def test_a_generation_config_refuses_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BardVLGenerationConfig(**wrong)
