"""The parts of a cell of the study: samples, one stage of training, one measurement."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.ops import box_iou
from transformers import Qwen3VLForConditionalGeneration

from ..app.boxes import SCALE, Thing, find_things
from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..training.arguments import BlockDiffusionArguments, DistillArguments
from ..training.chats import ChatEncoder, ChatLimits
from ..training.data import PackingCollator
from ..training.packing import Layout, Sample, dense_mask
from ..training.trainer import BlockDiffusionTrainer, Teacher
from .cells import Decoding, Stage
from .scenes import Scene, facts_f1, is_valid, phrase_spans
from .tiny_model import EOS_TOKEN_ID, PAD_TOKEN_ID

ROW_LENGTH = 320
LONGEST_ANSWER = 96
ROWS_DECODED = 128
SHOWN = 3  # last tokens of a phrase that the probe of the right context shows


def chat(scene: Scene, question: str, told: str) -> dict[str, Any]:
    """A chat in the form that the package's data reader takes."""
    asked = [{"type": "image", "image": scene.draw()}, {"type": "text", "text": question}]
    turns = [("user", asked), ("assistant", [{"type": "text", "text": told}])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def encode(processor: Any, config: Any, chats: Iterable[tuple[Scene, str, str]]) -> list[Sample]:
    """The chats as samples; chats about one scene that follow each other share its pixels."""
    encoder = ChatEncoder(processor, config, ChatLimits(1, ROW_LENGTH))
    samples: list[Sample] = []
    before = None
    for number, (scene, question, told) in enumerate(chats):
        sample = encoder.encode(chat(scene, question, told), number)
        if not isinstance(sample, Sample):
            raise ValueError(f"chat {number} cannot be used: {sample}")
        if scene is before:
            sample.visual_inputs = samples[-1].visual_inputs
        samples.append(sample)
        before = scene
    return samples


class FaultyMaskTrainer(BlockDiffusionTrainer):
    """The reference's fault as a control: clean queries see noisy keys of their own and of earlier blocks."""

    def attention_mask(self, layout: Layout) -> torch.Tensor:
        """The dense mask (rows, 1, length, length)."""
        query, key = (Layout(*(part.unsqueeze(axis) for part in layout)) for axis in (2, 1))
        same_turn = (query.sample == key.sample) & (query.turn == key.turn) & (query.turn > 0)
        fault = same_turn & ~query.noisy & key.noisy & (key.rank <= query.rank)
        return (dense_mask(layout) | fault)[:, None]


def trainer_of(
    model: BardVLForConditionalGeneration,
    stage: Stage,
    samples: Sequence[Sample],
    processor: Any,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    folder: Path,
    teacher: BardVLForConditionalGeneration | None = None,
) -> BlockDiffusionTrainer:
    """The package's trainer with the settings of a stage."""
    rate = learning_rate * stage.rate
    arguments = BlockDiffusionArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=max(round(batch_size * stage.batch_share), 1),
        per_device_eval_batch_size=batch_size,
        learning_rate=rate,
        min_learning_rate=rate / 10,
        warmup_steps=min(20, steps // 10),
        noise=stage.noise,
        complementary_masks=stage.complementary_masks,
        visible_weight=stage.visible_weight,
        draft_share=stage.draft_share,
        certainty_weight=stage.certainty_weight,
        loss_form=stage.loss_form,
        padding_weight=stage.padding_weight,
        time_sampling="stratified",
        seed=seed,
        logging_steps=max(steps // 10, 1),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    model.config.block_size = stage.block_size
    copies = 1 + stage.complementary_masks
    limits = ChatLimits(stage.block_size, ROW_LENGTH + LONGEST_ANSWER * (copies - 1), noisy_copies=copies)
    encoder = ChatEncoder(processor, model.config, limits)
    return (FaultyMaskTrainer if stage.faulty_mask else BlockDiffusionTrainer)(
        model,
        arguments,
        stage.block_size,
        processor,
        samples,
        PackingCollator(encoder),
        teacher=None if teacher is None else as_teacher(teacher, stage),
    )


def train_stage(
    model: BardVLForConditionalGeneration, stage: Stage, samples: Sequence[Sample], processor: Any, **settings: Any
) -> dict[str, float]:
    """Train `model` in place, with settings of `trainer_of`; what it took, and the mean loss of the last tenth."""
    trainer = trainer_of(model, stage, samples, processor, **settings)
    start = time.monotonic()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    return {"seconds": round(time.monotonic() - start, 1), "loss": round(losses[-1], 4)}


def as_teacher(model: BardVLForConditionalGeneration, stage: Stage) -> Teacher:
    """A model in the role that the stage names; divergence over the whole vocabulary, as in the paper."""
    kind: Literal["ar", "block"] = "ar" if stage.teacher == "autoregressive" else "block"
    settings = DistillArguments(
        teacher_kind=kind, ce_weight=stage.ce_weight, kd_weight=stage.kd_weight, kd_positions=stage.kd_positions
    )
    size = 1 if kind == "ar" else model.config.block_size
    return Teacher(model.eval().requires_grad_(False), size, kind, settings)


def answer(sample: Sample) -> torch.Tensor:
    """Ids (length,) of a sample's only response, its end of sequence included."""
    return sample.input_ids[slice(*sample.responses[0])]


@torch.no_grad()
def held_out_cross_entropy(
    model: BardVLForConditionalGeneration, samples: Sequence[Sample], processor: Any, folder: Path
) -> float:
    """Mean over masked tokens of answers, in nats, under mask noise that is the same for all models of a block size."""
    stage = Stage(model.config.block_size, padding_weight=0.0)
    settings: dict[str, Any] = {"steps": 1, "batch_size": 16, "learning_rate": 1e-3, "seed": 0, "folder": folder}
    return round(trainer_of(model, stage, samples, processor, **settings).held_out_loss(samples)["loss"], 4)


@torch.no_grad()
def right_context(model: BardVLForConditionalGeneration, samples: Sequence[Sample], tokenizer: Any) -> float | None:
    """Mean probability of the true tokens that begin a thing's phrase where all else is visible.

    Of each caption the first phrase that a whole block holds is taken, and all but its last three tokens are masked.
    These three tell which form the phrase has, and follow what they decide: a model that heeds only what comes before
    is near a half at the first token. None if no block holds a phrase.
    """
    found = []
    for sample in samples:
        places = masked_phrase(sample, tokenizer, model.config.block_size)
        if places:
            ids = sample.input_ids[None].clone()
            wanted = ids[0, places].clone()
            ids[0, places] = model.config.mask_token_id
            logits = model(**on(model.device, {"input_ids": ids, **pictures([sample])})).logits[0, places].cpu()
            found.append(logits.softmax(-1).gather(1, wanted[:, None]).mean())
    return round(torch.stack(found).mean().item(), 4) if found else None


def masked_phrase(sample: Sample, tokenizer: Any, block_size: int) -> list[int]:
    """Places of the tokens that `right_context` masks; none if no whole block holds a phrase."""
    start, _ = sample.responses[0]
    text = tokenizer.decode(answer(sample), skip_special_tokens=True)
    spans = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    for first, last in phrase_spans(text):
        places = [start + number for number, (_, end) in enumerate(spans) if first < end <= last]
        if places[0] // block_size == places[-1] // block_size < len(sample.input_ids) // block_size:
            return places[:-SHOWN]
    return []


Judge = Callable[[Sequence[Sample], Sequence[torch.Tensor]], dict[str, Any]]


def exactness(*kinds: str) -> Judge:
    """A judge of answers whose kinds take turns: percent right in every token, of all and of each kind."""

    def judge(samples: Sequence[Sample], responses: Sequence[torch.Tensor]) -> dict[str, Any]:
        pairs = [(answer(sample), response) for sample, response in zip(samples, responses, strict=True)]
        exact = torch.tensor([torch.equal(response[: len(expected)], expected) for expected, response in pairs])
        turns = {kind: exact[number :: len(kinds)] for number, kind in enumerate(kinds)}
        return {name: percent(part) for name, part in {"exact": exact, **turns}.items()}

    return judge


def locating(tokenizer: Any) -> Judge:
    """A judge of answers of one box each: percent exact, and with the right label and an IoU of at least 0.5."""

    def thing(ids: torch.Tensor) -> Thing | None:
        found = find_things(text_of(tokenizer, ids), SCALE, SCALE)
        return found[0] if len(found) == 1 and found[0].is_box else None

    def fits(said: Thing | None, true: Thing | None) -> bool:
        if said is None or true is None or said.label != true.label:
            return False
        return box_iou(torch.tensor([said.place]), torch.tensor([true.place])).item() >= 0.5

    def judge(samples: Sequence[Sample], responses: Sequence[torch.Tensor]) -> dict[str, Any]:
        pairs = zip(samples, responses, strict=True)
        fitting = torch.tensor([fits(thing(response), thing(answer(sample))) for sample, response in pairs])
        return {"boxes": exactness()(samples, responses)["exact"], "box_iou_50": percent(fitting)}

    return judge


def percent(figures: torch.Tensor) -> float:
    """The mean in percent."""
    return round(100 * figures.float().mean().item(), 2)


def reading(tokenizer: Any) -> Judge:
    """A judge that reads captions: valid ones, valid ones that are true in all, and the mean F1 of facts, in percent.

    `is_valid` has a digit for each answer, in the order of the samples.
    """

    def judge(samples: Sequence[Sample], responses: Sequence[torch.Tensor]) -> dict[str, Any]:
        texts = [[text_of(tokenizer, ids) for ids in given] for given in (responses, map(answer, samples))]
        pairs = list(zip(*texts, strict=True))
        f1 = torch.tensor([facts_f1(*pair) for pair in pairs])
        valid = torch.tensor([is_valid(said) for said, _ in pairs])
        figures = {"valid": valid, "right": valid & (f1 == 1), "f1": f1}
        return {
            **{name: percent(figure) for name, figure in figures.items()},
            "is_valid": "".join(map(str, valid.int().tolist())),
        }

    return judge


def text_of(tokenizer: Any, ids: torch.Tensor) -> str:
    """What an answer says up to its end."""
    return tokenizer.decode(until_end(ids), skip_special_tokens=True)


def until_end(ids: torch.Tensor) -> torch.Tensor:
    """Ids (length,) up to the first end of sequence."""
    return ids[: len(ids) - int((ids == EOS_TOKEN_ID).cummax(0).values.sum())]


@torch.no_grad()
def measure(
    model: Qwen3VLForConditionalGeneration | BardVLForConditionalGeneration,
    samples: Sequence[Sample],
    decoding: Decoding,
    judge: Judge,
) -> dict[str, Any]:
    """Decode the answers of `samples` and judge them.

    Returns:
        What the judge says; the mean over answers of tokens per forward, that is of tokens up to the end of
        sequence over the forwards that the answer took part in, whatever they were for; seconds.
    """
    responses: list[torch.Tensor] = [torch.empty(0)] * len(samples)
    speed = torch.zeros(len(samples))
    order = sorted(range(len(samples)), key=lambda number: len(answer(samples[number])))
    start = time.monotonic()
    for first in range(0, len(order), ROWS_DECODED):
        numbers = order[first : first + ROWS_DECODED]
        written, speed[numbers] = decode(model, [samples[number] for number in numbers], decoding)
        for number, response in zip(numbers, written, strict=True):
            responses[number] = response
    return {
        **asdict(decoding),
        **judge(samples, responses),
        "tokens_per_forward": round(speed.mean().item(), 3),
        "seconds": round(time.monotonic() - start, 1),
    }


def decode(
    model: Qwen3VLForConditionalGeneration | BardVLForConditionalGeneration,
    samples: Sequence[Sample],
    decoding: Decoding,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Responses (samples, length) and tokens per forward (samples,), decoded greedily as one batch.

    `others` are further arguments of `generate`.
    """
    prompts = [sample.input_ids[: sample.responses[0][0]] for sample in samples]
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), PAD_TOKEN_ID)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, **pictures(samples)}
    inputs: dict[str, Any] = on(model.device, tensors)
    if not isinstance(model, BardVLForConditionalGeneration):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        written = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, **others)
        return written[:, width:].cpu(), torch.ones(len(samples))
    settings: dict[str, Any] = {"confidence_threshold": decoding.threshold, "revision": decoding.revision}
    if decoding.tokens_per_step is not None:
        steps = -(-model.config.block_size // decoding.tokens_per_step)
        settings = {"remasking_strategy": "low_confidence_static", "denoising_steps": steps}
    output = model.generate(**inputs, **settings, max_new_tokens=LONGEST_ANSWER, return_dict_in_generate=True, **others)
    return output.sequences[:, width:].cpu(), output.tokens_per_forward.cpu()


def on(device: torch.device, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def pictures(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Pixels and grids of all samples."""
    return {
        name: torch.cat([sample.visual_inputs[name] for sample in samples])
        for name in ("pixel_values", "image_grid_thw")
    }
