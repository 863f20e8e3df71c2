"""The trainer: transformers' loop over packed rows, with the noise, the loss and the teacher of block diffusion."""

import itertools
import math
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState

from .arguments import PARAMETER_GROUPS, BlockDiffusionArguments, DistillArguments, RecipeError
from .checkpoints import COMPLETE, complete_checkpoints, mark_complete, writing
from .data import PackedBatch, PackingCollator, SkippedChats
from .losses import LinearLosses, likeliest, linear_losses, position_weights
from .noise import corrupt_rows, corruption_probabilities, replacement_ids
from .own_answers import prompt_inputs
from .packing import TILE, Layout, PackedRows, Sample, deal, dense_mask, fair, flex_mask

NUM_TIMES = 4  # metrics by quarters of t
NOISES = ("masked", "replaced", "visible")  # what the noise did to a token
EVALUATION_SEED = 0
SHOWN_TOKENS = 48  # of an answer that is shown


@dataclass
class NoisyRows:
    """One micro-batch as the model is trained on it; tensors are (rows, length).

    Attributes:
        rows: the packed samples, clean.
        input_ids: with the noise in the noisy copies.
        masked, replaced: where that noise is.
        t: its time, 1 is clean.
        drafted: masks whose place the model's own drafts are to take.
        weights: of each position's loss; 0 where there is none.
        taught: where a teacher is followed; None without one.
        slowest: columns of the largest micro-batch that any process has at the same time.
        idle: whether nothing need be done, on any process.
    """

    rows: PackedBatch
    input_ids: torch.Tensor
    masked: torch.Tensor
    replaced: torch.Tensor
    t: torch.Tensor
    drafted: torch.Tensor
    weights: torch.Tensor
    taught: torch.Tensor | None = None
    slowest: int = 0
    idle: bool = False

    def to(self, device: torch.device) -> "NoisyRows":
        """The same on a device."""
        rows: Any = self.rows.to(device)
        others: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, rows=rows, **others)


@dataclass
class Teacher:
    """A frozen model that a student learns from.

    Attributes:
        model: a Bard-VL model; for the autoregressive kind with Qwen3-VL's weights.
        block_size: tokens per block that it runs at; 1 for the autoregressive kind.
        kind: "block": it sees the student's noisy tokens and predicts the same positions. "ar": it sees the clean
            tokens, causally, and predicts the next one.
    """

    model: nn.Module
    block_size: int
    kind: Literal["block", "ar"]
    settings: DistillArguments

    @torch.no_grad()
    def hidden_states(self, batch: NoisyRows, index: torch.Tensor, mask: Any) -> torch.Tensor:
        """Its last hidden states (n, hidden) for the flat positions `index` (n,) of a batch."""
        rows = batch.rows
        ids = batch.input_ids
        if self.kind == "ar":
            ids = rows.input_ids
            first = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
            index = (rows.previous + first).flatten()[index]
        found: list[torch.Tensor] = []

        def select(hidden_states: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
            found.append(hidden_states.flatten(0, 1)[index])
            return hidden_states.new_zeros(())

        self.model(**model_inputs(rows, ids, mask), objective=select)
        return found[0]

    def teaches(self, rows: PackedRows, masked: torch.Tensor) -> torch.Tensor:
        """Noisy tokens (rows, length) where it is followed, given where the noise masks.

        Not in blocks of padding behind an answer, of which a model of smaller blocks has seen none.
        """
        found = rows.noisy & ~padding_blocks(rows, self.block_size)
        if self.settings.kd_positions == "fair":
            layouts = rows.layout(), rows.layout(self.block_size)
            found &= fair(*layouts, shown=rows.noisy & ~masked, sees_own=self.kind == "block")
        return found


def model_inputs(rows: PackedRows, input_ids: torch.Tensor, mask: Any) -> dict[str, Any]:
    """Arguments of the model's `forward` for packed rows."""
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": rows.position_ids,
        "visual_index": rows.visual_index,
        "use_cache": False,
        **rows.visual_inputs,
    }


class EveryEpoch(Sampler[int]):
    """The order of a whole run: `num_samples` numbers, one shuffled pass over the data after the other.

    One sampler for all passes keeps batches whole across their edges, and makes the place after an interruption a count
    of batches, whatever the number of processes.
    """

    def __init__(self, size: int, num_samples: int, seed: int):
        self.size, self.num_samples, self.seed = size, num_samples, seed

    def __len__(self) -> int:
        """Numbers in all."""
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """Go through the numbers."""
        for epoch in range(math.ceil(self.num_samples / self.size)):
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            left = self.num_samples - epoch * self.size
            yield from torch.randperm(self.size, generator=generator)[:left].tolist()


class FullRows(Sampler[list[int]]):
    """One process's micro-batches of a whole run, as `deal` lays out the samples of every step.

    Args:
        order: the samples of the run.
        lengths: columns that each sample of the data takes.
        max_length: columns of a row.
        step_size: samples of a step, over all processes.
        micro_batches, processes: of a step.
        process: whose share.
    """

    def __init__(
        self,
        order: EveryEpoch,
        lengths: Sequence[int],
        max_length: int,
        step_size: int,
        micro_batches: int,
        processes: int,
        process: int,
    ):
        self.order, self.lengths, self.step_size, self.process = order, lengths, step_size, process
        self.deal = partial(deal, max_length=max_length, processes=processes, micro_batches=micro_batches)
        self.num_batches = len(order) // step_size * micro_batches

    def __len__(self) -> int:
        """Micro-batches in all."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Go through the numbers of each micro-batch's samples."""
        for step in self.steps():
            yield from (shares[self.process] for shares in step)

    def steps(self) -> Iterator[list[list[list[int]]]]:
        """Each step's samples by micro-batch and process."""
        numbers = iter(self.order)
        while chosen := list(itertools.islice(numbers, self.step_size)):
            dealt = self.deal([self.lengths[number] for number in chosen])
            yield [[[chosen[place] for place in share] for share in shares] for shares in dealt]


class Repeated(torch.utils.data.IterableDataset):
    """A stream that begins again at its end, in another order, unless nothing more is wanted of it (`is_over`)."""

    def __init__(self, stream: Any):
        self.stream, self.is_over = stream, False

    def __iter__(self) -> Iterator[Any]:
        """Go through the stream, for ever."""
        for epoch in () if self.is_over else itertools.count():
            self.stream.set_epoch(epoch)
            item = None
            for item in self.stream:
                yield item
            if item is None:  # a worker of the data loader that has no share
                return


class LastLoss(TrainerCallback):
    """Logs the loss up to the last step, wherever the count of steps between logs ends."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class ShownAnswers(TrainerCallback):
    """Prints what the model answers to a few chats, before the first step and after the last.

    Args:
        trainer: whose model answers; one process does, the others wait for it at their next common step.
        samples: the chats, encoded.
    """

    def __init__(self, trainer: "BlockDiffusionTrainer", samples: list[Sample]):
        self.trainer, self.samples = trainer, samples
        self.before: list[str] = []  # stays empty where an interrupted run goes on

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decode them, unless steps were taken already."""
        if args.should_save and not state.global_step:
            self.before = self.trainer.answers(self.samples)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decode them again, and print both."""
        if not args.should_save:
            return
        after = self.trainer.answers(self.samples)
        for number, sample in enumerate(self.samples):
            start, end = sample.responses[-1]
            question = (
                self.trainer.text_of(sample.input_ids[:start]).rpartition("user\n")[2].removesuffix("assistant\n")
            )
            told = {"question": question, "wanted": self.trainer.text_of(sample.input_ids[start:end])}
            told |= {"before": self.before[number]} if self.before else {}
            for name, text in {**told, "after": after[number]}.items():
                print(f"{name:>10}: {textwrap.shorten(text, 100, placeholder=' ...')}", flush=True)


class BlockDiffusionTrainer(Trainer):
    """Trains one stage: one model at one block size (arXiv 2604.16514, equations of sections 3.1 to 3.3).

    A step corrupts its micro-batches before the first forward, so that the loss is normalised over all accumulation
    steps and processes exactly; the noise of a sample depends only on (seed, step, sample), and on the
    repetition if a sample occurs several times in a step.

    Args:
        model: a Bard-VL model, or PEFT's wrapper around one.
        args: settings; `max_steps` is set.
        block_size: tokens per block.
        processing_class: the processor, saved beside the weights.
        train_dataset, eval_dataset: of `Sample`.
        data_collator: packs samples in blocks of `block_size`.
        teacher: distil from it, where it is followed; else the loss is the cross entropy.
    """

    args: BlockDiffusionArguments
    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: Any,
        args: BlockDiffusionArguments,
        block_size: int,
        processing_class: Any,
        train_dataset: Any,
        data_collator: PackingCollator,
        eval_dataset: Dataset | None = None,
        teacher: Teacher | None = None,
        callbacks: list[Any] | None = None,
    ):
        if isinstance(train_dataset, torch.utils.data.IterableDataset):
            train_dataset = Repeated(train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*([] if args.logging_strategy == "no" else [LastLoss()]), *(callbacks or [])],
        )
        # The loss is a sum over the whole batch's normaliser: no further division by accumulation steps.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            keep_sums_in_float32(self.accelerator.state.fsdp_plugin)
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # saves a copy of all gradients
        self.block_size = block_size
        self.teacher = teacher
        if teacher is not None:
            teacher.model.to(args.device)
        tokenizer = processing_class.tokenizer
        self.mask_token_id = self.bare_model.config.mask_token_id
        # Not all that a tokenizer flags as special has a name in `all_special_ids`.
        flagged = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
        special_ids = {*tokenizer.all_special_ids, *flagged}
        self.replacements = replacement_ids(
            len(tokenizer), self.mask_token_id, special_ids, args.replace_with_special_tokens
        )
        self.num_language_parameters = sum(
            getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves empty parameters behind
            for name, parameter in model.named_parameters()
            if group_of(name) == "language"
        )
        self.tally = LossTally()
        self.skipped = SkippedChats()

    @property
    def bare_model(self) -> Any:
        """The model under the wrappers of accelerate and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # --- Data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """transformers' data loader, whose batches stay on the CPU until the forward of each."""
        if self.args.fill_rows:
            return self.full_rows_loader()
        loader = super().get_train_dataloader()
        loader.device = None  # else accelerate holds all micro-batches of a step on the GPU
        return loader

    def full_rows_loader(self) -> DataLoader:
        """A loader of this process's share of full rows, which accelerate has nothing to share out of."""
        args = self.args
        dataset: Any = self.train_dataset
        return DataLoader(
            dataset,
            batch_sampler=self.full_rows(),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def full_rows(self) -> FullRows:
        """The rows into which the samples of the run are dealt."""
        args = self.args
        data: Any = self.train_dataset
        collator: Any = self.data_collator
        if not hasattr(data, "lengths"):
            raise RecipeError("`fill_rows` needs measured chats, not a stream")
        order = EveryEpoch(len(data), args.max_steps * args.global_batch_size, args.seed)
        row_length = collator.encoder.limits.max_length
        shape = args.global_batch_size, args.gradient_accumulation_steps, args.world_size, args.process_index
        return FullRows(order, data.lengths, row_length, *shape)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return None
        return EveryEpoch(len(dataset), self.args.max_steps * self.args.global_batch_size, self.args.seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[NoisyRows], torch.Tensor]:
        """Corrupt the micro-batches of one step; returns them and the normaliser over all of them and all processes."""
        micro_batches = list(itertools.islice(epoch_iterator, num_batches))
        batches, normaliser = [], 0.0
        repeats = self.repeats([rows.sample_ids for rows in micro_batches], num_batches)
        slowest = self.slowest(micro_batches, num_batches)
        for number, (rows, repeat) in enumerate(zip(micro_batches, repeats, strict=False)):
            self.skipped.add(rows.broken)
            batch, part = self.corrupt(rows, self.args.seed, self.state.global_step, repeat)
            batch.slowest = slowest[number]
            # The last one takes part in what processes do at the end of a step; DeepSpeed counts them all.
            batch.idle = not slowest[number] and number + 1 < len(micro_batches) and not self.is_deepspeed_enabled
            batches.append(batch)
            normaliser += part
        total = torch.tensor(normaliser, dtype=torch.float64)
        return batches, self.sum_over_processes(total).clamp(min=1.0)

    def slowest(self, micro_batches: list[PackedBatch], num_batches: int) -> list[int]:
        """Columns of the largest micro-batch that any process has, for each of a step; 0 if all are empty."""
        own = torch.zeros(1, num_batches, dtype=torch.long)
        for number, rows in enumerate(micro_batches):
            own[0, number] = rows.sample.numel() if len(rows.sample_ids) else 0
        return self.accelerator.gather(own.to(self.args.device)).amax(0).tolist()

    def repeats(self, sample_ids: list[torch.Tensor], num_batches: int) -> torch.Tensor:
        """The number of earlier draws of each sample in its step, in the order of the data over all processes.

        Args:
            sample_ids: of this process's micro-batches.
            num_batches: micro-batches of a step, the same on all processes.

        Returns:
            (num_batches, samples of a micro-batch at most).
        """
        args = self.args
        own = torch.full(
            (num_batches, args.global_batch_size if args.fill_rows else args.per_device_train_batch_size), -1
        )
        for row, ids in zip(own, sample_ids, strict=False):
            row[: len(ids)] = ids
        # (processes, micro-batches, samples): the data loader deals out one micro-batch to each process in turn.
        gathered = self.accelerator.gather(own[None].to(self.args.device)).cpu().transpose(0, 1)
        drawn, is_one = gathered.flatten(), gathered.flatten() != -1
        ids, earlier = drawn[is_one], torch.zeros_like(drawn)
        earlier[is_one] = (ids[:, None] == ids).tril(-1).sum(1)
        return earlier.view_as(gathered)[:, self.args.process_index]

    def corrupt(
        self, rows: PackedBatch, seed: int, step: int, repeats: torch.Tensor | None = None
    ) -> tuple[NoisyRows, float]:
        """Noise for packed rows, given how often their samples came before, and what their losses are divided by."""
        args = self.args
        noise = corrupt_rows(
            rows,
            self.block_size,
            args.noise,
            args.time_sampling,
            self.mask_token_id,
            self.replacements,
            seed,
            step,
            args.time_low,
            args.time_high,
            repeats,
            args.draft_share,
        )
        weights, normaliser = position_weights(
            args.loss_form,
            noise.corrupted,
            torch.stack(corruption_probabilities(args.noise, noise.t)).sum(0),
            rows.noisy,
            rows.answer,
            rows.is_response_padding,
            args.padding_weight,
            visible=rows.noisy & ~noise.corrupted,
            visible_weight=args.visible_weight,
        )
        taught = None if self.teacher is None else self.teacher.teaches(rows, noise.masked)
        return NoisyRows(rows, *noise, weights, taught), normaliser

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of every process's tensor."""
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: NoisyRows) -> int:
        """Operations of a micro-batch in the language model's matrix products, forward and backward."""
        return 6 * self.num_language_parameters * inputs.input_ids.numel()

    # --- Loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of one micro-batch in the loss of its step."""
        if self.args.draft_share:
            inputs = self.with_drafts(model, inputs)
        loss = self.loss_sum(model, inputs, self.tally)
        # Data parallelism averages gradients over processes; the normaliser counts all of them.
        loss = loss * (self.accelerator.num_processes / num_items_in_batch.item())
        return (loss, None) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch forward and backward, unless it is empty on all processes."""
        if inputs.idle:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def with_drafts(self, model: nn.Module, batch: NoisyRows) -> NoisyRows:
        """The micro-batch with the model's own drafts in place of some masks: errors as parallel decoding shows them.

        One forward more (on-policy noise of DMax, arXiv 2604.08302). The loss stays on the same positions.
        """
        index = batch.drafted.flatten().nonzero()[:, 0]
        ids = batch.input_ids.clone()

        def write(hidden_states: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
            chosen = hidden_states.flatten(0, 1)[index]
            ids.view(-1)[index] = likeliest(chosen, lm_head.weight, self.mask_token_id, self.args.loss_chunk_size)
            return hidden_states.new_zeros(())

        model(**model_inputs(batch.rows, ids, self.attention_mask(batch.rows.layout())), objective=write)
        masked, replaced = batch.masked & ~batch.drafted, batch.replaced | batch.drafted
        taught = None if self.teacher is None else self.teacher.teaches(batch.rows, masked)
        return replace(batch, input_ids=ids, masked=masked, replaced=replaced, taught=taught)

    def loss_sum(self, model: nn.Module, batch: NoisyRows, tally: "LossTally") -> torch.Tensor:
        """Weighted sum of the losses of a micro-batch's positions, which are added to the tally."""
        rows, teacher = batch.rows, self.teacher
        index = batch.weights.flatten().nonzero()[:, 0]
        targets, weights = rows.input_ids.flatten()[index], batch.weights.flatten()[index]
        settings: dict[str, Any] = {
            "certainty_weight": self.args.certainty_weight,
            "certainty_temperature": self.args.certainty_temperature,
        }
        if teacher is not None:
            mask = self.attention_mask(rows.layout(teacher.block_size))
            settings |= {
                "teacher": (teacher.hidden_states(batch, index, mask), teacher.model.lm_head),
                "taught": None if batch.taught is None else batch.taught.flatten()[index],
                "ce_weight": teacher.settings.ce_weight,
                "kd_weight": teacher.settings.kd_weight,
                "direction": teacher.settings.kd_direction,
                "temperature": teacher.settings.kd_temperature,
                "top_k": teacher.settings.kd_top_k,
            }

        def objective(hidden_states: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
            # Not the head itself: its hooks would gather sharded weights once a chunk, and processes differ in chunks.
            losses = linear_losses(
                hidden_states.flatten(0, 1)[index],
                lm_head.weight,
                targets,
                weights,
                chunk_size=self.args.loss_chunk_size,
                **settings,
            )
            tally.add(batch, index, losses)
            return losses.loss

        inputs = model_inputs(rows, batch.input_ids, self.attention_mask(rows.layout()))
        return model(**inputs, objective=objective).loss

    def attention_mask(self, layout: Layout) -> Any:
        """The mask of a layout in the form that `mask_form` asks for."""
        if self.args.mask_form != "flex":
            return dense_mask(layout)[:, None]
        columns = layout.rank.shape[1]
        if columns % TILE:  # where FlexAttention's gradients failed on a GPU
            raise ValueError(
                f"`mask_form: flex` takes rows of whole tiles of {TILE} columns, got {columns}: "
                f"collate with `pad_to_multiple_of={TILE}`"
            )
        return flex_mask(layout)

    # --- Optimizer ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over the parameter groups, each with its own rate; norms and biases do not decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if settings.keys() & {"params", "model", "optimizer_dict"}:
                raise RecipeError(f"`optim: {self.args.optim}` makes parameter groups of its own; choose an AdamW")
            self.optimizer = optimizer(self.optimizer_groups(model), **settings)
        return self.optimizer

    def optimizer_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters by group and by whether they decay; empty groups are left out.

        The language model comes first, whose rate is the one that is logged.
        """
        decaying = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((group_of(name), name in decaying), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.args.group_learning_rate(group),
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (group, decays), parameters in sorted(groups.items(), key=in_logs_order)
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule; with `min_learning_rate` a warmup and a cosine that ends there for every group."""
        if self.args.min_learning_rate is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        warmup = self.args.get_warmup_steps(num_training_steps)
        # A resumed optimizer holds the rate of its step beside the peak.
        peaks = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        floors = [min(1.0, self.args.min_learning_rate / peak) if peak else 1.0 for peak in peaks]
        shapes: list[Any] = [
            partial(cosine_with_floor, warmup=warmup, steps=num_training_steps, floor=floor) for floor in floors
        ]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shapes)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train as transformers does, which would take one more step of a stream behind the last step's checkpoint."""
        self.bare_model.config.trained = None  # from here on it is no seed
        if resume_from_checkpoint is not None and isinstance(self.train_dataset, Repeated):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            self.train_dataset.is_over = state.global_step >= self.args.max_steps
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, then say so in a file: without it a checkpoint counts as half-written.

        Older checkpoints go only then.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with writing(folder):
                mark_complete(folder, self.state.global_step)
            kept = complete_checkpoints(Path(self.args.output_dir))
            best = Path(self.state.best_model_checkpoint or "").name if self.args.load_best_model_at_end else ""
            for old in [each for each in kept[: -limit if limit else 0] if each.name != best]:
                (old / COMPLETE).unlink()
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as transformers does of weights that a checkpoint lacks, but not of those tied to what it has."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(parameter) for name, parameter in parameters.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(parameters.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    # --- Logging and evaluation ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as transformers does; a step's loss comes with its parts, and epochs are passes over the data."""
        if "loss" in logs:
            logs |= self.summed(self.tally).metrics(self.teacher is not None)
            self.tally = LossTally()
        if not isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            self.state.epoch = self.state.global_step * self.args.global_batch_size / len(self.train_dataset)
        super().log(logs, *args, **kwargs)

    def summed(self, tally: "LossTally") -> "LossTally":
        """A tally over all processes."""
        return LossTally(self.sum_over_processes(tally.by_noise), self.sum_over_processes(tally.totals))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss on held-out samples under noise that never changes, and decoding of `decode_samples` of them.

        Returns:
            `eval_loss` and its parts, with `decode_samples` also `eval_exact_match` and `eval_tokens_per_forward`.
        """
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise RecipeError("`eval_strategy` is set, but `eval_data` is not: name held-out chats")
        metrics = self.held_out_loss(samples)
        if self.args.decode_samples:
            metrics |= self.decode(samples)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_loss(self, samples: Any) -> dict[str, float]:
        """The training loss on held-out samples, each process a share of them."""
        model = self.model_wrapped
        model.eval()
        tally, loss, normaliser = LossTally(), torch.zeros((), dtype=torch.float64), 0.0
        share = self.args.per_device_eval_batch_size * self.args.world_size
        for first in range(0, len(samples), share):
            batch = range(first, min(first + share, len(samples)))[self.args.process_index :: self.args.world_size]
            rows = self.data_collator([samples[number] for number in batch])
            noisy, part = self.corrupt(rows, EVALUATION_SEED, 0)
            loss += self.loss_sum(model, noisy.to(self.args.device), tally).double().cpu()
            normaliser += part
        total, count = self.sum_over_processes(torch.stack([loss, torch.tensor(normaliser, dtype=torch.float64)]))
        return {"loss": (total / count.clamp(min=1.0)).item()} | self.summed(tally).metrics(self.teacher is not None)

    @torch.no_grad()
    def decode(self, samples: Any) -> dict[str, float]:
        """Share of held-out samples whose last answer is decoded exactly, and their tokens per forward."""
        numbers = range(min(self.args.decode_samples, len(samples)))
        # Sharded parameters are gathered by all processes together: they decode the same samples, in step.
        replicated = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if replicated:
            numbers = numbers[self.args.process_index :: self.args.world_size]
        model = self.accelerator.unwrap_model(self.model) if replicated else self.model
        model.eval()
        scores = torch.zeros(3, dtype=torch.float64)
        size = self.args.per_device_eval_batch_size
        for first in range(0, len(numbers), size):
            chosen = [samples[number] for number in numbers[first : first + size]]
            scores += self.decoding_scores(model, [sample for sample in chosen if isinstance(sample, Sample)])
        count, exact, tokens_per_forward = self.sum_over_processes(scores).tolist()
        count = max(count, 1)
        return {"exact_match": exact / count, "tokens_per_forward": tokens_per_forward / count}

    def decoding_scores(self, model: Any, samples: list[Sample]) -> torch.Tensor:
        """Sums over samples, (3,): how many there are, how many last answers are exact, tokens per forward."""
        if not samples:
            return torch.zeros(3, dtype=torch.float64)
        answers = [sample.input_ids[slice(*sample.responses[-1])] for sample in samples]
        responses, tokens_per_forward = self.respond(model, samples, self.args.decode_max_new_tokens)
        exact = sum(torch.equal(row[: len(answer)], answer) for row, answer in zip(responses, answers, strict=True))
        return torch.tensor([len(samples), exact, tokens_per_forward.double().sum().item()], dtype=torch.float64)

    def respond(self, model: Any, samples: list[Sample], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Last answers of at most `longest` tokens, decoded: ids (n, length), and tokens per forward (n,)."""
        args = self.args
        inputs = prompt_inputs(samples, self.processing_class.tokenizer.pad_token_id)
        given = {
            "confidence_threshold": args.decode_confidence_threshold,
            "denoising_steps": args.decode_denoising_steps,
        }
        with self.accelerator.autocast():
            output = model.generate(
                **{name: value.to(args.device) for name, value in inputs.items()},
                block_size=self.block_size,
                max_new_tokens=longest,
                return_dict_in_generate=True,
                **{name: value for name, value in given.items() if value is not None},
            )
        return output.sequences[:, inputs["input_ids"].shape[1] :].cpu(), output.tokens_per_forward

    def show_answers(self, count: int) -> None:
        """Print the answers to `count` chats before and after training: held-out ones, if there are any.

        Not of a stream, nor where weights are sharded.
        """
        chats = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if count and not is_sharded and not isinstance(chats, torch.utils.data.IterableDataset):
            chosen = [chats[number] for number in range(min(count, len(chats)))]
            self.add_callback(ShownAnswers(self, [sample for sample in chosen if isinstance(sample, Sample)]))

    @torch.no_grad()
    def answers(self, samples: list[Sample]) -> list[str]:
        """The last answers of the model to chats, one after the other, the first words of long ones."""
        model = self.accelerator.unwrap_model(self.model).eval()
        longest = min(SHOWN_TOKENS, self.args.decode_max_new_tokens)
        return [self.text_of(self.respond(model, [sample], longest)[0][0]) for sample in samples]

    def text_of(self, ids: torch.Tensor) -> str:
        """Ids (length,) as text, without special tokens."""
        return self.processing_class.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass
class LossTally:
    """Sums over positions, to be averaged over an interval and over processes.

    Attributes:
        by_noise: (3 kinds: masked, replaced, visible; `NUM_TIMES` parts of t; cross entropy, positions).
        totals: cross entropy, divergence, positions, packed tokens, row padding, samples, broken samples, positions
            where a teacher is followed, packed tokens of the process that has most.
    """

    by_noise: torch.Tensor = field(default_factory=lambda: torch.zeros(3, NUM_TIMES, 2, dtype=torch.float64))
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(9, dtype=torch.float64))

    def add(self, batch: NoisyRows, index: torch.Tensor, losses: LinearLosses) -> None:
        """Count the positions `index` (n,) of a micro-batch with their losses, without a wait for the device."""
        entropy, rows = losses.cross_entropy.double(), batch.rows
        part = (batch.t.flatten()[index] * NUM_TIMES).long().clamp(max=NUM_TIMES - 1)
        kind = torch.where(batch.masked, 0, torch.where(batch.replaced, 1, 2)).flatten()[index]
        slot = part + NUM_TIMES * kind
        sums = torch.stack([entropy, torch.ones_like(entropy)], dim=1)
        counted = torch.zeros(3 * NUM_TIMES, 2, dtype=torch.float64, device=sums.device).index_add_(0, slot, sums)
        divergence = torch.zeros_like(entropy) if losses.divergence is None else losses.divergence.double()
        sizes = [len(index), rows.sample.numel(), 0, len(rows.sample_ids), len(rows.broken), 0, batch.slowest]
        totals = [entropy.sum(), divergence.sum(), *(torch.tensor(size, dtype=torch.float64) for size in sizes)]
        totals[4] = (rows.sample < 0).sum()
        if batch.taught is not None:
            totals[7] = batch.taught.flatten()[index].sum()
        self.by_noise = self.by_noise.to(sums.device) + counted.view_as(self.by_noise)
        self.totals = self.totals.to(sums.device) + torch.stack([x.to(sums.device, torch.float64) for x in totals])

    def metrics(self, distils: bool) -> dict[str, float]:
        """Averages by name, without those that nothing was counted for."""
        parts = {f"loss_{name}": self.by_noise[kind].sum(0) for kind, name in enumerate(NOISES)}
        for part in range(NUM_TIMES):
            parts[f"loss_t{part / NUM_TIMES:g}-{(part + 1) / NUM_TIMES:g}"] = self.by_noise[:, part].sum(0)
        found = {name: (total / count).item() for name, (total, count) in parts.items() if count > 0}
        entropy, divergence, positions, tokens, padding, samples, broken, taught, slowest = self.totals.tolist()
        if distils:
            found |= {"cross_entropy": entropy / max(positions, 1), "divergence": divergence / max(taught, 1)}
            found |= {"taught_share": taught / max(positions, 1)}
        counts = {"packed_tokens": tokens, "samples": samples, "broken_samples": broken}
        shares = {"padding_share": padding / max(tokens, 1)}
        if slowest:
            shares["busy_share"] = min(tokens / slowest, 1.0)
        return found | counts | shares


def keep_sums_in_float32(plugin: Any) -> None:
    """Let FSDP2 compute in half precision what a model computes, and keep the loss and sums of gradients in float32."""
    policy = plugin.mixed_precision_policy  # accelerate's casts both, and a loss over thousands of tokens loses digits
    if getattr(plugin, "fsdp_version", 1) == 2 and policy is not None:  # older accelerate knows FSDP1 only
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def padding_blocks(rows: PackedRows, block_size: int) -> torch.Tensor:
    """Noisy tokens (rows, length) whose block of `block_size` begins behind an answer's end.

    A larger block is padded by more than a teacher of smaller blocks has ever seen: behind the block that holds the end
    of sequence it predicts anything at all, which would drown what it knows.
    """
    columns = torch.arange(rows.place.shape[1], device=rows.place.device)
    first = columns - (rows.place - rows.origin) % block_size
    return rows.is_response_padding.gather(1, first.clamp(min=0)) & rows.noisy


def in_logs_order(group: tuple[tuple[str, bool], Any]) -> tuple[int, bool]:
    """Sorts parameter groups: as `PARAMETER_GROUPS` has them, those that decay first."""
    (name, decays), _ = group
    return PARAMETER_GROUPS.index(name), not decays


def group_of(name: str) -> str:
    """Parameter group of a parameter's name: language, merger (the deepstack ones too) or vision."""
    if ".merger." in name or ".deepstack_merger_list." in name:
        return "merger"
    return "vision" if ".visual." in name or name.startswith("visual.") else "language"


def cosine_with_floor(step: int, warmup: int, steps: int, floor: float) -> float:
    """Share of the peak rate at a step: a linear warmup, then half a cosine down to `floor`."""
    if step < warmup:
        return step / max(1, warmup)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
