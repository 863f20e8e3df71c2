"""Trainers, adapters and other programs that call `generate` and `forward` as they call those of any model."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bard_vl import BardVLForConditionalGeneration
from golden_models import PROMPTS
from ragged import collate, load
from transformers import AutoTokenizer, GenerationConfig

EXAMPLE = Path(__file__).parents[1] / "examples" / "checkpoint"
IDS = torch.tensor([[5, 6, 7, 8]])
SETTINGS: dict[str, Any] = {"block_size": 4, "max_new_tokens": 8, "eos_token_id": []}


def example() -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(EXAMPLE)


@pytest.mark.thorough(every=10)
@pytest.mark.parametrize(
    "neutral",
    [
        *({"disable_compile": True}, {"synced_gpus": False}, {"assistant_model": None}, {"assistant_tokenizer": None}),
        *({"prefix_allowed_tokens_fn": None}, {"negative_prompt_ids": None}, {"negative_prompt_attention_mask": None}),
        *({"custom_generate": None}, {"trust_remote_code": True}, {"use_model_defaults": True}, {"position_ids": None}),
        *({"cache_position": None}, {"inputs_embeds": None}, {"token_type_ids": None}, {"labels": IDS}),
        *({"token_type_ids": torch.zeros_like(IDS)}, {"mm_token_type_ids": torch.zeros_like(IDS)}, {"num_beams": 1}),
        *({"num_items_in_batch": 3}, {"generation_mode": "text"}, {"cache": None}, {"past_key_values": None}),
        *({"logits_processor": []}, {"stopping_criteria": []}, {"streamer": None}, {"tokenizer": None}),
        *({"use_cache": True}, {"min_new_tokens": None}, {"min_length": 0}, {"output_scores": False}, {"min_p": None}),
        *(
            {"output_attentions": False},
            {"cache_implementation": None},
            {"compile_config": None},
            {"pixel_values": None},
        ),
        *({"guidance_scale": 1.0}, {"begin_suppress_tokens": []}, {"return_legacy_cache": False}),
        *({"token_type_ids": np.zeros((1, 4))}, {"token_type_ids": [[0] * 4]}),
        *({"generation_config": GenerationConfig(disable_compile=True)}, {"generation_config": GenerationConfig()}),
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_taken(neutral: dict[str, Any]) -> None:
    want = load().generate(IDS, **SETTINGS)
    assert torch.equal(load().generate(IDS, **SETTINGS, **neutral), want)
    inputs = {"input_ids": IDS, **{name: value for name, value in neutral.items() if name.endswith("_ids")}}
    assert torch.equal(load().generate(inputs, **SETTINGS), want[:, 4:])


def test_a_static_cache_is_not_compiled_where_compiling_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    got = load().generate(IDS, cache_implementation="static", disable_compile=True, **SETTINGS)
    assert torch.equal(got, load().generate(IDS, **SETTINGS))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_training_mode_with_gradient_checkpointing_changes_no_token(kind: str) -> None:
    model, inputs = copy.deepcopy(load()), collate([PROMPTS[kind]])
    want = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
    scores = model.score(inputs, torch.tensor([[1, 2, 3]]), block_size=4)
    model.gradient_checkpointing_enable()
    model.train()
    got = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.confidences, want.confidences)
    assert torch.equal(model.score(inputs, torch.tensor([[1, 2, 3]]), block_size=4), scores)
    assert model.training
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
    calls: list[Any] = []
    for layer in model.model.language_model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs, block_size=4).logits.mean().backward()
    assert len(calls) == 2 * len(model.model.language_model.layers), "computed again in the backward pass"


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_learnt_prompts_are_refused_by_name(kind: str) -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    base = copy.deepcopy(load())
    text = base.config.text_config
    config = getattr(peft, kind)(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=text.num_hidden_layers, token_dim=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
    )  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with pytest.raises(ValueError, match="`prepare_inputs_for_generation` of the model was replaced"):
        model.generate(**arguments, **SETTINGS)
    with pytest.raises(ValueError, match=r"block_ids|position_ids"):
        model(**arguments, block_size=4)
    assert torch.equal(base.generate(IDS, **SETTINGS), load().generate(IDS, **SETTINGS)), "the base model goes on"


def test_adapters_generate() -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(load()), config).eval()
    adapted = model.generate(input_ids=IDS, **SETTINGS)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(adapted, merged.generate(IDS, **SETTINGS))
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=IDS, **SETTINGS), load().generate(IDS, **SETTINGS))


def test_adapters_of_single_rows_are_refused_and_nothing_stays_behind() -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(load()), config, adapter_name="one").eval()
    model.add_adapter("two", config)
    model.set_adapter("two")
    want = model.generate(input_ids=IDS, **SETTINGS)
    with pytest.raises(ValueError, match=r"`adapter_names=\['one', 'two'\]`: .*call `generate` once for each adapter"):
        model.generate(input_ids=IDS.repeat(2, 1), adapter_names=["one", "two"], **SETTINGS)
    assert torch.equal(model.generate(input_ids=IDS, **SETTINGS), want)
    model.set_adapter("one")
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=["two"], **SETTINGS), want)


ONES = torch.ones_like(IDS)
FORWARD: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": IDS.tolist()}, "`input_ids` must be a tensor, got list"),
    (
        {"input_ids": IDS.float()},
        r"`input_ids` must be an integer tensor \(batch, length\), got \(1, 4\) of torch.float32",
    ),
    ({"attention_mask": ONES.numpy()}, "`attention_mask` must be a tensor, got ndarray"),
    ({"position_ids": [[0, 1, 2, 3]]}, "`position_ids` must be a tensor, got list"),
    ({"position_ids": torch.zeros(3, 1, 5)}, r"`position_ids` must have shape .*, got \(3, 1, 5\)"),
    ({"block_ids": [[0, 0, 1, 1]]}, "`block_ids` must be a tensor, got list"),
    ({"labels": IDS.numpy()}, "`labels` must be a tensor, got ndarray"),
    ({"labels": IDS.float()}, "`labels` must be an integer tensor"),
    ({"logits_to_keep": "2"}, "`logits_to_keep` must be an integer of at least 0, got '2'"),
    ({"logits_to_keep": -1}, "`logits_to_keep` must be an integer of at least 0, got -1"),
    ({"pixel_values": [[0.0]], "image_grid_thw": [[1, 2, 2]]}, "`pixel_values` must be a tensor, got list"),
]


@pytest.mark.parametrize(("arguments", "message"), FORWARD, ids=range(len(FORWARD)))
def test_a_forward_names_what_is_no_tensor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load()(**{"input_ids": IDS, "block_size": 4, **arguments})


def test_a_forward_takes_what_says_the_same() -> None:
    inputs = collate([PROMPTS["image"]])
    want = load()(**inputs, block_size=4, logits_to_keep=2).logits
    grids = inputs["image_grid_thw"]
    for same in (grids.tolist(), grids.numpy(), tuple(map(tuple, grids.tolist()))):
        given = {**inputs, "image_grid_thw": same, "input_ids": inputs["input_ids"].int()}
        assert torch.equal(load()(**given, block_size=np.int64(4), logits_to_keep=np.int64(2)).logits, want)


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_what_would_decode_from_left_to_right_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match="continuous batching is not supported"):
        getattr(load(), call)([[1, 2, 3]])


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, default_dtype: None) -> None:
    inputs = collate([PROMPTS["text"], PROMPTS["aligned text"]])
    options = [
        {}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}, {"sequence_bias": [[[3], 2.0], [[4, 5], 1.0]]},
        {"bad_words_ids": [[3], [4, 5]], "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        {"remasking_strategy": "entropy_bounded"}, {"revision": "remask", "num_return_sequences": 2},
    ]  # fmt: skip

    def outputs() -> list[Any]:
        found = [load().generate(**inputs, **SETTINGS, **more, return_dict_in_generate=True) for more in options]
        kept = [[out.sequences, out.confidences, out.tokens_per_forward, out.block_step_counts] for out in found]
        return [*kept, load().score(collate([PROMPTS["text"]]), torch.tensor([[1, 2, 3]]), block_size=4)]

    want = outputs()
    torch.set_default_dtype(dtype)
    torch.testing.assert_close(outputs(), want, atol=0, rtol=0)
    image = load().generate(**collate([PROMPTS["image"]]), **SETTINGS)  # transformers 4 rounds positions of patches
    assert image.shape == (1, len(PROMPTS["image"].ids) + 8)


@pytest.mark.parametrize("stored", [{}, {"max_new_tokens": 6}, {"temperature": 0.5}])
def test_seq2seq_trainer_predicts_with_generate(tmp_path: Path, stored: dict[str, Any]) -> None:
    """Twice: after the first batch it fills the model's settings with its defaults."""
    pytest.importorskip("datasets", exc_type=ImportError)  # which must fit, where it is there
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = example()
    plain = {name: value for name, value in model.generation_config.explicit().items() if name.endswith("token_id")}
    model.generation_config = type(model.generation_config)(**plain, **stored)
    before = model.generation_config.explicit()
    rows = [{"input_ids": IDS[0], "attention_mask": torch.ones(4), "labels": IDS[0]}] * 4
    options = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, report_to=[], remove_unused_columns=False, use_cpu=True,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, options, processing_class=AutoTokenizer.from_pretrained(EXAMPLE))
    found = trainer.predict(rows, max_new_tokens=4)
    assert (found.predictions[:, :4] == IDS.numpy()).all()
    assert found.metrics["test_loss"] > 0
    assert model.generation_config.explicit() == before


@pytest.mark.thorough
def test_a_step_of_trls_grpo_trains(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    trl = pytest.importorskip("trl", exc_type=ImportError)
    model, seen = example(), []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float(index) for index, _ in enumerate(completions)]

    options = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=6, max_steps=1,
        use_cpu=True, bf16=False, report_to=[], learning_rate=1e-2, gradient_checkpointing=True, save_strategy="no",
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": "Describe the picture."}] * 2)
    before = model.lm_head.weight.detach().clone()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    trainer = trl.GRPOTrainer(model, reward, options, data, processing_class=tokenizer)
    trainer.train()
    assert len(seen) == 2
    assert not torch.equal(model.lm_head.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    stored = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert stored["remasking_strategy"] == "low_confidence_dynamic"
