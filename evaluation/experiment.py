"""The parts of a cell of the study: samples, one stage of training, one measurement."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Qwen3VLForConditionalGeneration

from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..training.arguments import BlockDiffusionArguments, DistillArguments
from ..training.chats import ChatEncoder, ChatLimits
from ..training.data import PackingCollator
from ..training.packing import Layout, Sample, dense_mask
from ..training.trainer import BlockDiffusionTrainer, Teacher
from .cells import Decoding, Stage
from .scenes import Scene
from .tiny_model import PAD_TOKEN_ID, autoregressive_batch

ROW_LENGTH = 320
LONGEST_ANSWER = 96
ROWS_DECODED = 128


def chat(scene: Scene, question: str, told: str) -> dict[str, Any]:
    """A chat in the form that the package's data reader takes."""
    asked = [{"type": "image", "image": scene.draw()}, {"type": "text", "text": question}]
    turns = [("user", asked), ("assistant", [{"type": "text", "text": told}])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def encode(processor: Any, config: Any, chats: Iterable[tuple[Scene, str, str]]) -> list[Sample]:
    """The chats as samples; both chats about a scene share its pixels."""
    encoder = ChatEncoder(processor, config, ChatLimits(1, ROW_LENGTH))
    samples: list[Sample] = []
    for number, (scene, question, told) in enumerate(chats):
        sample = encoder.encode(chat(scene, question, told), number)
        if not isinstance(sample, Sample):
            raise ValueError(f"chat {number} cannot be used: {sample}")
        if number % 2:
            sample.visual_inputs = samples[-1].visual_inputs
        samples.append(sample)
    return samples


class FaultyMaskTrainer(BlockDiffusionTrainer):
    """The reference's fault as a control: clean queries see noisy keys of their own and of earlier blocks."""

    def attention_mask(self, layout: Layout) -> torch.Tensor:
        """The dense mask (rows, 1, length, length)."""
        query, key = (Layout(*(part.unsqueeze(axis) for part in layout)) for axis in (2, 1))
        same_turn = (query.sample == key.sample) & (query.turn == key.turn) & (query.turn > 0)
        fault = same_turn & ~query.noisy & key.noisy & (key.rank <= query.rank)
        return (dense_mask(layout) | fault)[:, None]


def train_stage(
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
) -> dict[str, float]:
    """Train `model` in place with the package's trainer; what it took, and the mean loss of the last tenth."""
    rate = learning_rate * stage.rate
    arguments = BlockDiffusionArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=rate,
        min_learning_rate=rate / 10,
        warmup_steps=min(20, steps // 10),
        noise=stage.noise,
        complementary_masks=stage.complementary_masks,
        visible_weight=stage.visible_weight,
        draft_share=stage.draft_share,
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
    trainer = (FaultyMaskTrainer if stage.faulty_mask else BlockDiffusionTrainer)(
        model,
        arguments,
        stage.block_size,
        processor,
        samples,
        PackingCollator(encoder),
        teacher=None if teacher is None else as_teacher(teacher, stage),
    )
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
def measure(
    model: BardVLForConditionalGeneration, samples: Sequence[Sample], decoding: Decoding
) -> dict[str, float | str | None]:
    """Decode the answers of `samples`, alternately captions and questions, and compare them with what they should be.

    Returns:
        Percentages of exact answers; the mean over answers of tokens per forward, that is of tokens up to the end of
        sequence over the forwards that the answer took part in, whatever they were for; seconds.
    """
    exact, speed = torch.zeros(len(samples)), torch.zeros(len(samples))
    order = sorted(range(len(samples)), key=lambda number: len(answer(samples[number])))
    start = time.monotonic()
    for first in range(0, len(order), ROWS_DECODED):
        numbers = order[first : first + ROWS_DECODED]
        responses, tokens_per_forward = decode(model, [samples[number] for number in numbers], decoding)
        speed[numbers] = tokens_per_forward
        for number, response in zip(numbers, responses, strict=True):
            expected = answer(samples[number])
            exact[number] = torch.equal(response[: len(expected)], expected)
    return {
        "threshold": decoding.threshold,
        "revision": decoding.revision,
        **percentages(exact),
        "tokens_per_forward": round(speed.mean().item(), 3),
        "seconds": round(time.monotonic() - start, 1),
    }


def decode(
    model: BardVLForConditionalGeneration, samples: Sequence[Sample], decoding: Decoding, **others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Responses (samples, length) and tokens per forward (samples,), decoded as one batch.

    `others` are further arguments of `generate`.
    """
    prompts = [sample.input_ids[: sample.responses[0][0]] for sample in samples]
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), PAD_TOKEN_ID)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **pictures(samples)}
    output = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        confidence_threshold=decoding.threshold,
        revision=decoding.revision,
        max_new_tokens=LONGEST_ANSWER,
        return_dict_in_generate=True,
        **others,
    )
    return output.sequences[:, width:].cpu(), output.tokens_per_forward.cpu()


def pictures(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Pixels and grids of all samples."""
    return {
        name: torch.cat([sample.visual_inputs[name] for sample in samples])
        for name in ("pixel_values", "image_grid_thw")
    }


@torch.no_grad()
def measure_autoregressive(model: Qwen3VLForConditionalGeneration, samples: Sequence[Sample]) -> dict[str, Any]:
    """As `measure`, for greedy decoding of an autoregressive model.

    Greedy decoding writes the expected answer exactly if each of its tokens is the likeliest after those before it, so
    one forward over the expected answers tells.
    """
    exact = torch.zeros(len(samples))
    start = time.monotonic()
    for first in range(0, len(samples), ROWS_DECODED):
        batch = autoregressive_batch(samples[first : first + ROWS_DECODED])
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch).logits[:, :-1].argmax(-1)
        exact[first : first + ROWS_DECODED] = ((predicted == labels) | (labels == -100)).all(1).float()
    return {
        "threshold": None,
        "revision": None,
        **percentages(exact),
        "tokens_per_forward": 1.0,
        "seconds": round(time.monotonic() - start, 1),
    }


def percentages(exact: torch.Tensor) -> dict[str, float]:
    """Exact answers in percent: all, captions (even numbers) and questions (odd ones)."""
    parts = {"exact": exact, "captions": exact[::2], "questions": exact[1::2]}
    return {name: round(100 * part.mean().item(), 2) for name, part in parts.items()}
