"""The model on its own: masks, loss, loading and saving, gradients, devices, quantisation."""

import json
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLModel
from tiny import write_qwen3vl
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model() -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(GOLDEN / "untied", dtype=torch.float32)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 490, (2, 13), generator=torch.Generator().manual_seed(0))


def qwen_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return Qwen3VL.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits


def bard_from_qwen(source: Path) -> BardVLForConditionalGeneration:
    """The same weights under Bard-VL's class, as the converter leaves them."""
    config = json.loads((source / "config.json").read_text()) | {"model_type": "bard_vl", "block_size": 4}
    config["mask_token_id"] = config["text_config"]["vocab_size"] - 1
    (source / "config.json").write_text(json.dumps(config))
    return AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)


@pytest.mark.parametrize("tie", [True, False])
def test_block_size_one_is_qwen3vl(tmp_path: Path, tie: bool) -> None:
    path = write_qwen3vl(tmp_path / "qwen", tie_word_embeddings=tie)
    ids = torch.randint(0, 200, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = qwen_logits(path, ids)
    model = bard_from_qwen(path)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, block_size=1).logits, expected)
        assert not torch.allclose(model(input_ids=ids, block_size=4).logits, expected, atol=1e-3)
    assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) is tie


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_published_checkpoint_loads_by_plain_auto_classes(auto_class: type) -> None:
    config = json.loads((GOLDEN / "untied" / "config.json").read_text())
    assert config["text_config"]["model_type"] == "bard_vl_text"
    assert config["vision_config"]["model_type"] == "bard_vl"
    model, info = auto_class.from_pretrained(GOLDEN / "untied", output_loading_info=True)
    assert type(model) is BardVLForConditionalGeneration
    assert type(model.model) is BardVLModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.block_size is None


def test_padding_does_not_change_a_row(model: BardVLForConditionalGeneration, ids: torch.Tensor) -> None:
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 13)], dim=1).long()
    with torch.no_grad():
        alone = model(input_ids=ids, block_size=4).logits
        together = model(input_ids=padded, attention_mask=mask, block_size=4).logits
    assert together.isfinite().all()
    torch.testing.assert_close(together[:, 5:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_every_form_agree(ids: torch.Tensor, attention: str) -> None:
    model = BardVLForConditionalGeneration.from_pretrained(
        GOLDEN / "untied", dtype=torch.float32, attn_implementation=attention
    )
    blocks = (torch.arange(13) // 4).expand(2, -1)
    boolean = (blocks[:, :, None] >= blocks[:, None])[:, None]
    additive = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(input_ids=ids, block_size=4).logits
        for name, value in {"block_ids": blocks, "attention_mask": boolean}.items():
            torch.testing.assert_close(model(input_ids=ids, **{name: value}).logits, expected)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=additive).logits, expected)
        model.config.block_size = 4
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 13, 13, dtype=torch.long), "must be boolean, or floating to be added, got torch.int64"),
        (torch.ones(2, 1, 13, 12, dtype=torch.bool), r"= \(2, 1, 13, 13\), got shape \(2, 1, 13, 12\)"),
        (torch.ones(3, 1, 13, 13, dtype=torch.bool), r"= \(2, 1, 13, 13\), got shape \(3, 1, 13, 13\)"),
    ],
)
def test_explicit_masks_that_would_be_misread_are_refused(
    model: BardVLForConditionalGeneration, ids: torch.Tensor, mask: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, attention_mask=mask)


def test_text_layers_without_a_mask_are_refused(model: BardVLForConditionalGeneration, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="text layers needs a 4-D mask"):
        model.model.language_model(inputs_embeds=model.get_input_embeddings()(ids))


def test_cached_tokens_need_stated_blocks(model: BardVLForConditionalGeneration, ids: torch.Tensor) -> None:
    positions = model.get_position_ids(ids)
    blocks = (torch.arange(13) // 4).expand(2, -1)
    with torch.no_grad():
        whole = model(input_ids=ids, block_size=4).logits
        cache = DynamicCache()
        model(input_ids=ids[:, :8], block_size=4, past_key_values=cache, use_cache=True)
        rest = {"input_ids": ids[:, 8:], "position_ids": positions[:, :, 8:], "past_key_values": cache}
        with pytest.raises(ValueError, match="5 query tokens with a cache of 8"):
            model(**rest, block_size=4)
        with pytest.raises(ValueError, match="position_ids"):
            model(**{**rest, "position_ids": None}, block_ids=blocks)
        torch.testing.assert_close(model(**rest, block_ids=blocks).logits, whole[:, 8:], atol=1e-4, rtol=0)


def test_one_cached_query_sees_everything(model: BardVLForConditionalGeneration, ids: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(input_ids=ids, block_size=1).logits[:, -1:]
        cache = DynamicCache()
        model(input_ids=ids[:, :12], block_size=1, past_key_values=cache, use_cache=True)
        last = model.get_position_ids(ids)[:, :, 12:]
        logits = model(input_ids=ids[:, 12:], position_ids=last, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_loss_is_of_the_same_position(model: BardVLForConditionalGeneration, ids: torch.Tensor) -> None:
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5, -100)
    output = model(input_ids=ids, labels=labels, block_size=4)
    picked = output.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    torch.testing.assert_close(output.loss, -picked.mean())
    accumulated = model(input_ids=ids, labels=labels, block_size=4, num_items_in_batch=100)
    torch.testing.assert_close(accumulated.loss, -picked.sum() / 100)
    assert model(input_ids=ids, labels=torch.full_like(ids, -100), block_size=4).loss.item() == 0
    loss, logits = model(input_ids=ids, labels=labels, block_size=4, use_cache=False, return_dict=False)[:2]
    torch.testing.assert_close(loss, output.loss)
    assert logits.shape == output.logits.shape


@pytest.mark.parametrize("keep", [3, torch.tensor([0, 5, 12])])
def test_logits_to_keep(model: BardVLForConditionalGeneration, ids: torch.Tensor, keep: int | torch.Tensor) -> None:
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    with torch.no_grad():
        whole = model(input_ids=ids, labels=ids, block_size=4)
        part = model(input_ids=ids, labels=ids, block_size=4, logits_to_keep=keep)
    torch.testing.assert_close(part.logits, whole.logits[:, kept])
    torch.testing.assert_close(part.loss, torch.nn.functional.cross_entropy(part.logits.mT, ids[:, kept]))


def test_trainer_passes_the_number_of_labels() -> None:
    assert BardVLForConditionalGeneration.accepts_loss_kwargs is True


def test_gradient_checkpointing_gives_the_same_gradients(ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = BardVLForConditionalGeneration.from_pretrained(GOLDEN / "tied", dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids, block_size=4, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("folder", ["tied", "untied"])
def test_sharded_save_and_reload(tmp_path: Path, folder: str, ids: torch.Tensor) -> None:
    model = BardVLForConditionalGeneration.from_pretrained(GOLDEN / folder, dtype=torch.float32)
    model.config.block_size = 8
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.block_size == 8
    assert "block_size" not in json.loads((tmp_path / "generation_config.json").read_text())
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"model.visual": "cpu", "model.language_model": "cpu", "lm_head": "disk"}],
    ids=["auto", "head on disk"],
)
def test_device_map_generates_the_same(tmp_path: Path, device_map: str | dict, ids: torch.Tensor) -> None:
    settings = {"block_size": 4, "max_new_tokens": 8, "mask_token_id": 510, "eos_token_id": 511}
    plain = BardVLForConditionalGeneration.from_pretrained(GOLDEN / "untied", dtype=torch.float32)
    expected = plain.generate(input_ids=ids, **settings)
    model = BardVLForConditionalGeneration.from_pretrained(
        GOLDEN / "untied", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert torch.equal(model.generate(input_ids=ids, **settings), expected)


def test_int8_weights_by_torchao(ids: torch.Tensor) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = AutoModelForImageTextToText.from_pretrained(
        GOLDEN / "untied",
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ not in ("Tensor", "Parameter"), type(weight)
    settings = {"block_size": 4, "max_new_tokens": 10, "mask_token_id": 510, "eos_token_id": 511}
    sequences = model.generate(input_ids=ids, **settings)
    assert sequences.shape == (2, 23)
    assert (sequences != 510).all()


@pytest.mark.parametrize("levels", ["text", "outer", "both", "contradicting"])
@pytest.mark.parametrize("tie", [True, False])
def test_tie_flag_is_read_from_the_text_level_first(levels: str, tie: bool) -> None:
    config = json.loads((GOLDEN / "tied" / "config.json").read_text())
    config.pop("tie_word_embeddings")
    config["text_config"].pop("tie_word_embeddings")
    if levels != "outer":
        config["text_config"]["tie_word_embeddings"] = tie
    if levels != "text":
        config["tie_word_embeddings"] = tie if levels != "contradicting" else not tie
    config.pop("model_type")
    written = BardVLConfig(**config).to_dict()
    assert written["tie_word_embeddings"] is tie
    assert written["text_config"]["tie_word_embeddings"] is tie


def test_config_round_trip_keeps_rope_in_the_spelling_both_lines_read(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(GOLDEN / "untied")
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 5_000_000
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    again = AutoConfig.from_pretrained(tmp_path)
    again.name_or_path = config.name_or_path
    assert again.to_dict() == config.to_dict()


def test_repository_config_builds_the_4b_shapes() -> None:
    config = AutoConfig.from_pretrained(Path(__file__).parents[1])
    with torch.device("meta"):
        model = BardVLForConditionalGeneration(config)
    assert 4.4e9 < sum(p.numel() for name, p in model.named_parameters() if name != "lm_head.weight") < 4.5e9
    assert config.block_size == 16


def save(*paths: str) -> None:
    """Save folders on a line of transformers: (source, target) pairs."""
    for source, target in zip(paths[::2], paths[1::2], strict=True):
        model = BardVLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        model.config.block_size = 4
        model.generation_config.confidence_threshold = 0.3
        model.save_pretrained(target, max_shard_size="5GB")


def load(*folders: str) -> list[Any]:
    """The results of models on a line of transformers: tokens, a setting, the sum of their logits."""
    found = []
    ids = torch.randint(0, 490, (1, 9), generator=torch.Generator().manual_seed(5))
    for folder in folders:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        out = model.generate(input_ids=ids, max_new_tokens=12, mask_token_id=510, eos_token_id=511)
        with torch.no_grad():
            total = model(input_ids=ids).logits.sum().item()
        found.append([out.tolist(), model.generation_config.confidence_threshold, round(total, 2)])
    return found


@pytest.mark.process(group="lines")
def test_saved_on_any_line_loads_on_any_other(tmp_path: Path) -> None:
    folders, options = ("tied", "untied"), {"home": tmp_path / "home", "package": True}
    for number, line in enumerate(fresh.LINES):
        pairs = ((GOLDEN / name, tmp_path / f"{name}{number}") for name in folders)
        fresh.call("test_modeling.save", *(path for pair in pairs for path in pair), line=line, **options)
    saved = [tmp_path / f"{name}{number}" for name in folders for number in range(len(fresh.LINES))]
    outputs = [fresh.call("test_modeling.load", *saved, line=line, **options) for line in fresh.LINES]
    for first in (0, len(fresh.LINES)):  # of either folder
        (alike,) = {json.dumps(each) for found in outputs for each in found[first : first + len(fresh.LINES)]}
        assert json.loads(alike)[1] == 0.3
