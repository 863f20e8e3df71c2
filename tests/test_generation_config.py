"""Settings of `generate`: stored, loaded, merged and validated in one place."""

import ast
import copy
import inspect
import json
import shutil
from collections import Counter
from decimal import Decimal
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLGenerationConfig
from bard_vl.generation_config_bard_vl import SETTINGS, DecodingSettings
from bard_vl.remasking_bard_vl import Sampling
from golden_models import PROMPTS
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ragged import MASK, collate, load
from thorough import cases
from transformers import GenerationConfig

GOLDEN = Path(__file__).parent / "golden" / "untied"
QWEN = {  # as in the published Qwen3-VL repositories
    "bos_token_id": 5,
    "pad_token_id": 6,
    "do_sample": True,
    "eos_token_id": [511, 6],
    "top_p": 0.8,
    "top_k": 20,
    "temperature": 0.7,
    "repetition_penalty": 1.0,
    "transformers_version": "4.56.0",
}


def checkpoint(path: Path, generation_config: dict[str, Any] | None = None, **config: Any) -> Path:
    """The golden checkpoint with another generation_config.json and with more in its config.json."""
    shutil.copytree(GOLDEN, path, ignore=shutil.ignore_patterns("cases*"))
    stated = json.loads((path / "config.json").read_text()) | {"mask_token_id": MASK, **config}
    (path / "config.json").write_text(json.dumps(stated))
    if generation_config is not None:
        (path / "generation_config.json").write_text(json.dumps(generation_config))
    return path


def open_checkpoint(path: Path) -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)


def own_copy(**config: Any) -> BardVLForConditionalGeneration:
    """The golden model with settings that no other test sees."""
    model = open_checkpoint(GOLDEN)
    for name, value in ({"mask_token_id": MASK} | config).items():
        setattr(model.config, name, value)
    return model


def resolve(**fields: Any) -> DecodingSettings:
    return DecodingSettings.resolve(
        BardVLGenerationConfig(**{"mask_token_id": MASK, "block_size": 8} | fields), load().config, prompt_length=10
    )


def block_size_used(model: BardVLForConditionalGeneration, **arguments: Any) -> int:
    """Found out from the number of blocks in 24 tokens."""
    output = model.generate(
        **collate([PROMPTS["text"]]), max_new_tokens=24, confidence_threshold=0.0, return_dict_in_generate=True,
        **arguments,
    )  # fmt: skip
    return 24 // output.block_step_counts.shape[1]


@st.composite
def valid_fields(draw: st.DrawFn) -> dict[str, Any]:
    fields = {
        "max_new_tokens": st.integers(1, 10**6),
        "block_size": st.integers(16, 64),
        "denoising_steps": st.integers(1, 16),
        "remasking_strategy": st.sampled_from(["low_confidence_static", "low_confidence_dynamic"]),
        "confidence_threshold": st.floats(0, 1),
        "temperature": st.floats(0, 10),
        "do_sample": st.booleans(),
        "top_k": st.integers(0, 100),
        "top_p": st.floats(0, 1, exclude_min=True),
        "repetition_penalty": st.floats(0.5, 2),
        "bad_words_ids": st.just([[3], [4, 5]]),
        "stop_strings": st.sampled_from(["stop", ["a", "b"]]),
        "eos_token_id": st.sampled_from([0, 511, [3, 4]]),
        "pad_token_id": st.integers(0, 511),
        "mask_token_id": st.integers(0, 511),
        "num_return_sequences": st.integers(1, 4),
        "return_dict_in_generate": st.booleans(),
        "output_history": st.booleans(),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(fields))))
    return {name: draw(fields[name]) for name in sorted(chosen)}


@given(valid_fields())
@hypothesis_settings(max_examples=cases(20))
def test_every_setting_but_block_size_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    BardVLGenerationConfig(**fields).save_pretrained(folder)
    stored = json.loads((folder / "generation_config.json").read_text())
    expected = {"remasking_strategy": "low_confidence_dynamic", **fields}
    expected.pop("block_size", None)
    assert {name: value for name, value in stored.items() if name != "transformers_version"} == expected
    assert BardVLGenerationConfig.from_pretrained(folder).explicit() == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "top_k": 50},
        {"do_sample": False, "temperature": 0.7},
        {"confidence_threshold": 0.5, "temperature": 0.7},
        {"max_length": 20},
    ],
)
def test_values_that_equal_plain_defaults_survive_a_models_reload(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = own_copy(block_size=4)
    model.generation_config = BardVLGenerationConfig(**fields)
    model.save_pretrained(tmp_path)
    again = open_checkpoint(tmp_path).generation_config
    assert again.explicit() == {"remasking_strategy": "low_confidence_dynamic", **fields}


def test_steps_of_another_block_size_do_not_bind() -> None:
    model = own_copy(block_size=16)
    model.generation_config = BardVLGenerationConfig(denoising_steps=16)
    inputs = collate([PROMPTS["text"]])
    expected = model.generate(**inputs, block_size=4, max_new_tokens=4)
    assert torch.equal(
        model.generate(**inputs, generation_config=BardVLGenerationConfig(block_size=4), max_new_tokens=4), expected
    )
    both = BardVLGenerationConfig(block_size=4, denoising_steps=2)
    output = model.generate(**inputs, generation_config=both, max_new_tokens=4, return_dict_in_generate=True)
    assert output.block_step_counts.max() <= 2


def test_none_takes_the_value_of_the_other_as_in_the_reference() -> None:
    model = own_copy(block_size=None)
    inputs = collate([PROMPTS["text"]])
    expected = model.generate(inputs, block_size=4, denoising_steps=4, max_new_tokens=6)
    assert torch.equal(model.generate(inputs, block_size=None, denoising_steps=4, max_new_tokens=6), expected)
    assert torch.equal(model.generate(inputs, block_size=4, denoising_steps=None, max_new_tokens=6), expected)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"do_sample": False}, {"do_sample": False, "temperature": 0}])
def test_greedy_settings_are_saved_and_loaded_with_a_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = own_copy(block_size=4)
    model.generation_config = BardVLGenerationConfig(remasking_strategy="low_confidence_static", **fields)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: stored[name] for name in fields} == fields
    again = open_checkpoint(tmp_path).generation_config
    assert again.remasking_strategy == "low_confidence_static"
    assert DecodingSettings.resolve(again, model.config, 5).sampling.temperature == 0


def test_sampling_settings_are_saved_and_loaded_with_a_model(tmp_path: Path) -> None:
    model, fields = own_copy(block_size=4), {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "confidence_threshold": 0.3}
    model.generation_config = BardVLGenerationConfig(remasking_strategy="low_confidence_static", **fields)
    model.save_pretrained(tmp_path)
    again = open_checkpoint(tmp_path).generation_config
    assert again.explicit() == {"remasking_strategy": "low_confidence_static", **fields}


def test_block_size_set_in_the_model_config_counts_after_loading(tmp_path: Path) -> None:
    model = open_checkpoint(checkpoint(tmp_path / "model", block_size=4))
    assert block_size_used(model) == 4
    model.config.block_size = 8
    assert block_size_used(model) == 8


def test_block_size_is_never_stored(tmp_path: Path) -> None:
    model = own_copy()
    model.generation_config.block_size = 8
    model.generation_config.confidence_threshold = 0.25
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert "block_size" not in stored
    assert stored["confidence_threshold"] == 0.25
    assert "block_size" not in model.generation_config.to_json_string()


def test_block_size_order_is_argument_then_code_then_config() -> None:
    model = own_copy()
    model.config.block_size = 4
    assert block_size_used(model) == 4
    model.generation_config.block_size = 6
    assert block_size_used(model) == 6
    assert block_size_used(model, generation_config=BardVLGenerationConfig(block_size=12)) == 12
    assert block_size_used(model, generation_config=BardVLGenerationConfig(block_size=12), block_size=8) == 8
    assert block_size_used(model, block_size=None) == 4


def test_missing_block_size_is_named_with_the_place_to_find_it() -> None:
    with pytest.raises(ValueError, match=r"`block_size`.*number after B in the name of a published checkpoint"):
        load().generate(**collate([PROMPTS["text"]]), max_new_tokens=4)
    with pytest.raises(ValueError, match="`block_size`"):
        load().score(collate([PROMPTS["text"]]), torch.tensor([[1, 2]]))


def test_stored_steps_do_not_bind_another_block_size() -> None:
    model = own_copy(block_size=16)
    model.generation_config.denoising_steps = 16
    prompt = collate([PROMPTS["text"]])
    settings = {"max_new_tokens": 4, "remasking_strategy": "low_confidence_static", "return_step_stats": True}
    assert model.generate(prompt, block_size=4, **settings)[1]["block_step_counts"].tolist() == [[4]]
    assert model.generate(prompt, block_size=4, denoising_steps=2, **settings)[1]["block_step_counts"].tolist() == [[2]]


def test_default_length_is_256_new_tokens() -> None:
    model, prompt = load(), PROMPTS["text"]
    sequences = model.generate(**collate([prompt]), block_size=32, denoising_steps=1)
    assert sequences.shape == (1, len(prompt.ids) + 256)


def test_max_length_counts_the_prompt_and_gives_way_to_max_new_tokens() -> None:
    model, prompt, size = load(), PROMPTS["text"], {"block_size": 4, "denoising_steps": 1}
    assert model.generate(**collate([prompt]), max_length=20, **size).shape == (1, 20)
    assert model.generate(**collate([prompt]), max_length=20, max_new_tokens=3, **size).shape == (1, 16)
    with pytest.raises(ValueError, match="`max_length` = 13 leaves no room after 13 prompt tokens"):
        model.generate(**collate([prompt]), max_length=13, **size)


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
    ],
)
def test_decoding_is_greedy_unless_the_temperature_is_above_zero(fields: dict[str, Any], temperature: float) -> None:
    assert resolve(**fields).sampling.temperature == temperature


def test_settings_of_autoregressive_files_do_not_carry_over(tmp_path: Path) -> None:
    model = open_checkpoint(checkpoint(tmp_path / "qwen", QWEN, block_size=8))
    assert type(model.generation_config) is BardVLGenerationConfig
    settings = DecodingSettings.resolve(model.generation_config, model.config, 5)
    assert settings.sampling == Sampling(0.0, 0, 1.0)
    assert (settings.eos_token_ids, settings.pad_token_id) == ((511, 6), 6)
    prompt = collate([PROMPTS["image"]])
    greedy = load().generate(**prompt, max_new_tokens=16, block_size=8, eos_token_id=[511, 6], pad_token_id=6)
    assert torch.equal(model.generate(**prompt, max_new_tokens=16), greedy)


def test_sampling_settings_beside_a_rule_do_carry_over(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "own", QWEN | {"remasking_strategy": "low_confidence_static"}, block_size=8)
    model = open_checkpoint(path)
    settings = DecodingSettings.resolve(model.generation_config, model.config, 5)
    assert settings.sampling == Sampling(0.7, 20, 0.8)
    assert settings.remasking_strategy == "low_confidence_static"


def test_plain_generation_config_is_accepted() -> None:
    model, prompt = load(), PROMPTS["text"]
    model_settings = {"block_size": 4, "denoising_steps": 1}
    plain = GenerationConfig(max_new_tokens=5)
    sequences = model.generate(**collate([prompt]), generation_config=plain, **model_settings)
    assert sequences.shape == (1, len(prompt.ids) + 5)
    assert model.generate(
        **collate([prompt]), generation_config=plain, max_new_tokens=7, **model_settings
    ).shape == (1, len(prompt.ids) + 7)  # fmt: skip


def test_plain_generation_config_may_ask_for_sampling() -> None:
    prompt, plain = collate([PROMPTS["text"]]), GenerationConfig(max_new_tokens=16, do_sample=True)
    runs = [load().generate(**prompt, generation_config=plain, block_size=8, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_arguments_override_the_given_config_which_overrides_the_models() -> None:
    model = own_copy(block_size=4)
    model.generation_config.max_new_tokens, model.generation_config.pad_token_id = 9, 3
    given_config = BardVLGenerationConfig(max_new_tokens=6)
    prompt = PROMPTS["text"]
    new = {
        name: model.generate(**collate([prompt]), **arguments).shape[1] - len(prompt.ids)
        for name, arguments in {
            "model": {},
            "given": {"generation_config": given_config},
            "argument": {"generation_config": given_config, "max_new_tokens": 2},
        }.items()
    }
    assert new == {"model": 9, "given": 6, "argument": 2}


def test_calls_leave_the_configs_as_they_were() -> None:
    model, given_config = own_copy(block_size=4), BardVLGenerationConfig(max_new_tokens=3)
    before = model.generation_config.to_dict(), given_config.to_dict(), model.config.to_dict()
    model.generate(**collate([PROMPTS["text"]]), generation_config=given_config, temperature=0.5, seed=1, block_size=2)
    assert (model.generation_config.to_dict(), given_config.to_dict(), model.config.to_dict()) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", 2.5), ("max_new_tokens", True), ("max_length", 0),
        ("block_size", 0), ("block_size", -4), ("block_size", 4.0), ("denoising_steps", 0), ("denoising_steps", 9),
        ("remasking_strategy", "random"), ("confidence_threshold", 1.5), ("confidence_threshold", -0.1),
        ("confidence_threshold", "0.9"), ("confidence_threshold", float("nan")), ("temperature", -1.0),
        ("temperature", float("nan")), ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1),
        ("repetition_penalty", 0.0), ("num_return_sequences", 0), ("mask_token_id", -1), ("pad_token_id", -1),
        ("eos_token_id", "511"), ("eos_token_id", [3, -1]), ("max_time", -1.0),
    ],
)  # fmt: skip
def test_wrong_values_are_named_before_any_compute(name: str, value: Any) -> None:
    last = value[-1] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=rf"`{name}`.*{last}"):
        load().generate(**collate([PROMPTS["text"]]), **{"block_size": 8, name: value})
    with pytest.raises(ValueError, match=rf"`{name}`"):
        BardVLGenerationConfig(**{"block_size": 8, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4), ("assistant_model", object()), ("constraints", [object()]), ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5), ("prompt_lookup_num_tokens", 3), ("force_words_ids", [[1]]), ("num_beam_groups", 2),
        ("min_p", 0.1), ("typical_p", 0.5), ("dola_layers", "high"), ("use_cache", False), ("output_scores", True),
        ("output_attentions", True), ("cache_implementation", "quantized"), ("min_new_tokens", 3), ("wrong_word", 1),
        ("forced_eos_token_id", 3), ("length_penalty", 2.0), ("early_stopping", True), ("watermarking_config", {}),
    ],
)  # fmt: skip
def test_what_block_diffusion_does_not_do_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        load().generate(**collate([PROMPTS["text"]]), block_size=8, max_new_tokens=4, **{name: value})


@pytest.mark.parametrize("fields", [{"num_beams": 4}, {"penalty_alpha": 0.6, "top_k": 4}, {"guidance_scale": 1.5}])
def test_plain_config_with_an_unsupported_setting_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        load().generate(**collate([PROMPTS["text"]]), block_size=8, generation_config=GenerationConfig(**fields))


def test_settings_changed_in_code_are_checked_too() -> None:
    config = BardVLGenerationConfig()
    with pytest.raises(ValueError, match="`confidence_threshold`"):
        config.update(confidence_threshold=2.0)
    model = own_copy(block_size=4)
    model.generation_config.top_p = 7.0
    with pytest.raises(ValueError, match=r"`top_p`.*7\.0"):
        model.generate(**collate([PROMPTS["text"]]))


def test_invalid_file_is_named_when_loaded(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"remasking_strategy": "best", "max_new_tokens": 3}))
    with pytest.raises(ValueError, match=r"`remasking_strategy`.*'best'"):
        BardVLGenerationConfig.from_pretrained(tmp_path)


def test_token_ids_come_from_arguments_then_settings_then_config() -> None:
    assert resolve(eos_token_id=[4, 5]).eos_token_ids == (4, 5)
    assert resolve(eos_token_id=torch.tensor([4, 5])).eos_token_ids == (4, 5)
    assert resolve(eos_token_id=[4, 5]).pad_token_id == 4
    assert resolve(eos_token_id=4, pad_token_id=9).pad_token_id == 9
    assert resolve(mask_token_id=7).mask_token_id == 7
    assert resolve(mask_token_id=None).mask_token_id == MASK
    assert resolve().eos_token_ids == (), "the default of published checkpoints lies outside this vocabulary"
    with pytest.raises(ValueError, match=r"`mask_token_id` = 151671 lies outside the vocabulary of 512"):
        resolve(mask_token_id=151671)


def test_published_vocabulary_ends_at_im_end_by_default() -> None:
    config = BardVLConfig(text_config={"vocab_size": 151_936}, block_size=4)
    settings = DecodingSettings.resolve(BardVLGenerationConfig(), config, 5)
    assert (settings.eos_token_ids, settings.pad_token_id, settings.mask_token_id) == ((151645,), 151645, 151671)


STORED = {"remasking_strategy": "low_confidence_dynamic", "max_new_tokens": 30}


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize(
    "how",
    [
        lambda folder: {"max_length": 24},
        lambda folder: {"generation_config": GenerationConfig(max_length=24)},
        lambda folder: {"generation_config": BardVLGenerationConfig(max_length=24)},
        lambda folder: {"generation_config": GenerationConfig.from_pretrained(folder, max_length=24)},
        lambda folder: {"generation_config": BardVLGenerationConfig.from_pretrained(folder, max_length=24)},
    ],
)
def test_max_length_of_a_call_wins_over_the_files_new_tokens(tmp_path: Path, how: Any) -> None:
    folder = checkpoint(tmp_path / "model", STORED, block_size=4)
    model, prompt = open_checkpoint(folder), collate([PROMPTS["text"]])
    assert model.generate(**prompt).shape == (1, 13 + 30)
    assert model.generate(**prompt, **how(folder)).shape == (1, 24)
    assert model.generate(**prompt, max_length=24, max_new_tokens=30).shape == (1, 13 + 30)


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize(
    ("stored", "stated", "found"),
    [
        ({"do_sample": False}, {"temperature": 0.7}, {"sampling.temperature": 0.7}),
        ({"do_sample": False}, {"top_k": 5}, {"sampling.temperature": 0.0}),
        ({"temperature": 0.0}, {"do_sample": True}, {"sampling.temperature": 1.0}),
        ({"temperature": 0.5}, {"do_sample": True}, {"sampling.temperature": 0.5}),
        ({"temperature": 0.5}, {"do_sample": False}, {"sampling.temperature": 0.0}),
        ({"revision": "overwrite", "revision_threshold": 0.7}, {"revision": "remask"}, {"revision.threshold": 0.1}),
        ({"denoising_steps": 2}, {"block_size": 16}, {"denoising_steps": 16}),
        ({"max_length": 50}, {"max_new_tokens": 3}, {"max_new_tokens": 3}),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_what_a_call_states_wins_over_what_the_file_states(
    stored: dict[str, Any], stated: dict[str, Any], found: dict[str, Any], copied: bool
) -> None:
    """Also where the call's config is a changed copy of the model's, as servers make it."""
    model = own_copy(block_size=8)
    model.generation_config = BardVLGenerationConfig(**stored)
    if copied:
        given = copy.deepcopy(model.generation_config)
        for name, value in stated.items():
            setattr(given, name, value)
        config = model.merge_settings(given, {})
    else:
        config = model.merge_settings(None, stated)
    settings = DecodingSettings.resolve(config, model.config, 10)
    assert {name: attrgetter(name)(settings) for name in found} == found


def test_sampling_at_a_stated_temperature_of_one_wins_over_the_files() -> None:
    model = own_copy(block_size=8)
    model.generation_config = BardVLGenerationConfig(temperature=0.0, repetition_penalty=1.2)
    plain = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    merged = model.merge_settings(plain, {})
    assert DecodingSettings.resolve(merged, model.config, 10).sampling.temperature == 1.0
    if (
        GenerationConfig().repetition_penalty is None
    ):  # transformers 4 cannot tell a stated default from an unstated one
        assert merged.repetition_penalty == 1.0


LEFTOVERS: list[dict[str, Any]] = [
    *({"use_cache": False}, {"early_stopping": True}, {"min_new_tokens": 1}, {"min_length": 5}, {"num_beams": 4}),
    *({"disable_compile": True}, {"begin_suppress_tokens": [220]}, {"cache_implementation": "hybrid"}),
    *({"cache_implementation": "offloaded"}, {"pad_token_id": -1}, {"eos_token_id": [3, -1]}, {"bos_token_id": -1}),
    *({"output_hidden_states": True}, {"output_scores": True}, {"penalty_alpha": 0.6}, {"guidance_scale": 1.5}),
    *({"forced_eos_token_id": 3}, {"is_assistant": True}, {"token_healing": True}, {"renormalize_logits": True}),
    *({"length_penalty": 2.0}, {"max_new_tokens": 0}, {"top_k": -1}, {"temperature": 0.0}, {"stop_strings": []}),
    *({"no_such_field": [1, {"a": 2}]}, {"prompt_lookup_num_tokens": 3}, {"max_matching_ngram_size": 2}),
    *({"suppress_tokens": [-1]}, {"bad_words_ids": [[]]}, {"sequence_bias": [[[3], "x"]]}, {"max_time": "soon"}),
    *({"bad_words_ids": []}, {"repetition_penalty": 0}, {"max_new_tokens": "100"}, {"constraints": [1]}),
]


@pytest.mark.thorough(every=5)
@pytest.mark.parametrize("leftover", LEFTOVERS, ids=str)
def test_what_other_decoding_left_in_a_file_stops_neither_loading_nor_saving(
    tmp_path: Path, leftover: dict[str, Any]
) -> None:
    model = open_checkpoint(checkpoint(tmp_path / "model", {"do_sample": True, **leftover}, block_size=4))
    assert model.generate(**collate([PROMPTS["text"]]), max_new_tokens=4).shape == (1, 17)
    model.save_pretrained(tmp_path / "saved")
    again = open_checkpoint(tmp_path / "saved").generation_config.explicit()
    assert again == {"remasking_strategy": "low_confidence_dynamic"} | model.generation_config.explicit()


def test_what_is_set_aside_is_said_once_with_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoint(tmp_path / "model", {"use_cache": False, "num_beams": 4, "num_beam_groups": 1}, block_size=4)
    open_checkpoint(folder)
    said = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(said) == 1
    assert str(folder / "generation_config.json") in said[0]
    assert "`use_cache=False`, `num_beams=4`, set aside" in said[0]


@pytest.mark.parametrize("field", [{"use_cache": False}, {"num_beams": 4}, {"pad_token_id": -1}], ids=str)
def test_settings_of_training_do_not_stop_saving(tmp_path: Path, field: dict[str, Any]) -> None:
    model = own_copy(block_size=4)
    for name, value in field.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    assert not {*field} & {*json.loads((tmp_path / "generation_config.json").read_text())}
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"remasking_strategy": "best"}', "`remasking_strategy`.*'best'"),
        ('{"confidence_threshold": 7}', "`confidence_threshold`.*7"),
        ('{"remasking_strategy": "margin", "max_new_tokens": 0}', "`max_new_tokens`.*0"),
        ("[1]", "must hold an object"),
        ("{", "Expecting property name"),
        ("\0" * 50, "Expecting value"),
        ("[" * 100_000, "maximum recursion depth"),
        ('{"max_new_tokens": 1' + "0" * 5000 + "}", "Exceeds the limit"),
    ],
    ids=lambda value: value[:20].replace("\0", "NUL"),
)
def test_an_error_about_a_file_names_it_before_weights_are_read(tmp_path: Path, text: str, message: str) -> None:
    folder = checkpoint(tmp_path / "model", {}, block_size=4)
    (folder / "generation_config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"generation_config.json of {folder}: .*{message}"):
        open_checkpoint(folder)


def test_defaults_that_a_trainer_fills_in_are_not_stated() -> None:
    """`Seq2SeqTrainer` compares `max_length` with lengths, and since 5.0 fills the model's config with defaults."""
    model = own_copy(block_size=4)
    model.generation_config = BardVLGenerationConfig(temperature=0.5)
    defaults = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    if defaults:
        assert model.generation_config.update(**defaults, defaults_only=True) == {}
    assert model.generation_config.max_length == 20
    assert model.generation_config.explicit() == {"temperature": 0.5}
    assert copy.deepcopy(model.generation_config).explicit() == {"temperature": 0.5}
    assert model.generate(**collate([PROMPTS["text"]]), denoising_steps=1).shape == (1, 13 + 256)
    model.generation_config.max_length = 20
    assert model.generation_config.explicit() == {"temperature": 0.5, "max_length": 20}


NUMBERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_new_tokens": np.int64(5)}, {"max_new_tokens": 5}),
    ({"max_new_tokens": pd.Series([5])[0]}, {"max_new_tokens": 5}),
    ({"max_new_tokens": torch.tensor(5)}, {"max_new_tokens": 5}),
    ({"block_size": np.int32(4), "denoising_steps": np.uint8(2)}, {"block_size": 4, "denoising_steps": 2}),
    ({"confidence_threshold": np.float64(0.5)}, {"confidence_threshold": 0.5}),
    ({"temperature": np.float32(0.5), "top_k": np.int16(3)}, {"temperature": 0.5, "top_k": 3}),
    ({"do_sample": np.bool_(True)}, {"do_sample": True}),
    ({"eos_token_id": (3, 4)}, {"eos_token_id": [3, 4]}),
    ({"eos_token_id": np.array([3, 4])}, {"eos_token_id": [3, 4]}),
    ({"eos_token_id": torch.tensor(3)}, {"eos_token_id": 3}),
    ({"suppress_tokens": range(3)}, {"suppress_tokens": [0, 1, 2]}),
    ({"suppress_tokens": pd.Series([1, 2])}, {"suppress_tokens": [1, 2]}),
    ({"bad_words_ids": (torch.tensor([1, 2]), np.array([3]))}, {"bad_words_ids": [[1, 2], [3]]}),
    ({"sequence_bias": {(np.int64(1), 2): np.float32(0.5)}}, {"sequence_bias": [[[1, 2], 0.5]]}),
    ({"stop_strings": ("a", "b")}, {"stop_strings": ["a", "b"]}),
    ({"seed": np.uint64(2**63)}, {"seed": 2**63}),
]


@pytest.mark.parametrize(("given_fields", "plain"), NUMBERS, ids=str)
def test_numbers_and_lists_of_other_libraries_become_pythons(
    tmp_path: Path, given_fields: dict[str, Any], plain: dict[str, Any]
) -> None:
    config, later = BardVLGenerationConfig(**given_fields), BardVLGenerationConfig()
    for name, value in given_fields.items():
        setattr(later, name, value)
    for found in (config, later):
        found.validate()
        assert found.explicit() == plain
        assert {type(value) for value in found.explicit().values()} <= {int, float, bool, list}
    config.save_pretrained(tmp_path)


@pytest.mark.parametrize("value", [pd.NA, Decimal(5), "5", object(), [5], {5: 5}, 5j, np.datetime64("2020"), np.nan])
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    for name in ("max_new_tokens", "temperature", "seed", "block_size", "pad_token_id"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            BardVLGenerationConfig(**{name: value})


def test_assigned_plain_config_becomes_the_own_class() -> None:
    model = own_copy()
    model.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=4)
    assert type(model.generation_config) is BardVLGenerationConfig
    assert model.generation_config.explicit() == {"max_new_tokens": 5, "eos_token_id": 4}


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_commands_name_a_setting_once() -> None:
    """A new setting is a row of the table, heeded by `--set`; one with an option of its own, a row of the options."""
    from bard_vl_cli import options

    assert options.SETTINGS.keys() <= SETTINGS.keys()
    counts: Counter[str] = Counter()
    for name in ("options", "run", "chat", "demo"):
        path = Path(__file__).parents[1] / "cli" / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.arg | ast.keyword):
                counts[str(node.arg)] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                counts[node.value] += 1
    assert {name: count for name, count in counts.items() if name in SETTINGS and count > 1} == {}
    assert counts["block_size"] == 1


def test_owners_of_settings_are_known() -> None:
    assert {row.owner for row in SETTINGS.values()} == {"user", "program", "server"}
    assert {name for name, row in SETTINGS.items() if row.owner == "program"} == {
        "num_return_sequences",
        "output_history",
        "return_dict_in_generate",
        "return_step_stats",
    }


def test_settings_that_reach_score_are_its_arguments() -> None:
    arguments = inspect.signature(BardVLForConditionalGeneration.score).parameters.keys()
    assert {name for name, row in SETTINGS.items() if "score" in row.reaches} == arguments & SETTINGS.keys()
