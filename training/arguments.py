"""Settings of a training run, and recipes: flat YAML files whose every key is also a command-line flag."""

import copy
import dataclasses
import difflib
import fnmatch
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..app.errors import UsageError
from ..app.quantization import check_quantization
from ..app.terminal import counted

PARAMETER_GROUPS = ("language", "merger", "vision")

# Settings of transformers' trainer that would change nothing here, or break what is promised.
UNUSED = {
    "label_smoothing_factor": "the loss is that of block diffusion",
    "group_by_length": "rows are packed",
    "auto_find_batch_size": "a step's samples are part of what makes a run repeatable",
    "push_to_hub": "upload a finished stage with `hf upload`",
    "resume_from_checkpoint": "the same command goes on by itself",
    "use_liger_kernel": "the loss is computed in chunks already",
    "neftune_noise_alpha": "the noise is that of block diffusion",
    "torch_compile": "attention is compiled already, and no stage of a compiled model was ever written",
}


RECIPES = Path(__file__).resolve().parent / "recipes"  # of the package


class RecipeError(ValueError):
    """A recipe, or what it names, cannot be run; nothing was computed or written."""


# Settings of transformers' own, as patterns of names, that decide nothing about the weights: of devices, of how a batch
# is shared out, of what is written, logged and measured. A stage may go on with others.
NEUTRAL = (
    *("output_dir", "overwrite_output_dir", "run_name", "project", "report_to", "resume_from_checkpoint", "do_*"),
    *("log_*", "logging_*", "save_*", "eval_*", "include_*", "trackio_*", "hub_*", "push_to_hub*", "disable_tqdm"),
    *("debug", "skip_memory_metrics", "prediction_loss_only", "batch_eval_metrics", "*_full_eval", "label_names"),
    *("past_index", "jit_mode_eval"),
    *("per_device_*", "per_gpu_*", "gradient_accumulation_steps", "average_tokens_across_devices", "local_rank"),
    *("use_cpu", "no_cuda", "use_mps_device", "_n_gpu", "tpu_*", "mp_parameters", "ray_scope", "parallelism_config"),
    *("accelerator_config", "dataloader_*", "ddp_*", "fsdp*", "deepspeed", "torch_empty_cache_steps", "use_cache"),
    *("gradient_checkpointing*", "activation_checkpointing*", "enable_jit_checkpoint", "ignore_data_skip"),
    *("restore_callback_states_from_checkpoint", "train_sampling_strategy", "length_column_name"),
    *("half_precision_backend", "fp16_backend", "use_legacy_prediction_loop"),
)


def option(default: Any, text: str, decides: bool = True) -> Any:
    """A dataclass field with a help text; where it does not decide a stage's result, a stage may go on with another."""
    return field(default=default, metadata={"help": text, "decides": decides})


def decisive(arguments: Any) -> dict[str, Any]:
    """The settings in a dataclass that a stage's result depends on: all but those whose field says otherwise."""
    return {each.name: getattr(arguments, each.name) for each in dataclasses.fields(arguments) if decides(each)}


def decides(setting: dataclasses.Field) -> bool:
    """Whether a stage's result depends on a setting: what its field says, else yes, but for `NEUTRAL` ones."""
    is_neutral = any(fnmatch.fnmatchcase(setting.name, pattern) for pattern in NEUTRAL)
    return setting.metadata.get("decides", not is_neutral)


@dataclass
class ModelArguments:
    """The weights that a run starts from, and those of them that it trains."""

    model_name_or_path: str | None = option(None, "Qwen3-VL or Bard-VL checkpoint: a folder or a Hub id")
    model_revision: str | None = option(None, "branch, tag or commit of a Hub id")
    mask_token_id: int | None = option(None, "id of the mask token (unset: the source's, else 151671)")
    mask_row: Literal["keep", "mean"] = option(
        "keep", "initial embedding of the mask token when a Qwen3-VL is converted: as it is, or the vocabulary's mean"
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "dtype of the weights that the optimizer updates; with `bf16` they are cast for each product"
    )
    save_dtype: Literal["float32", "bfloat16"] | None = option(None, "dtype of finished stages (unset: the source's)")
    attn_implementation: str | None = option(None, "attention of the model (unset: the package's own)")
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what is not trained: groups of parameters (language, merger, vision), or patterns of parameters' "
            "names, such as *.q_norm.weight"
        },
    )
    use_lora: bool = option(False, "train low-rank adapters (PEFT) and merge them into the finished stage")
    lora_rank: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "scale of the adapters, divided by their rank")
    lora_dropout: float = option(0.0, "dropout in front of the adapters")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "linear layers that get an adapter, by the end of their names"},
    )

    quantize: Literal["nf4"] | None = option(
        None, "bits of the frozen weights under adapters (QLoRA); the finished stage has whole weights again"
    )

    def check(self) -> None:
        """Raise `RecipeError` for invalid settings."""
        require(self.quantize is None or self.use_lora, f"`quantize: {self.quantize}` needs `use_lora: true`")
        try:
            check_quantization(self.quantize)
        except UsageError as error:
            raise RecipeError(str(error)) from error
        require(
            self.model_name_or_path is not None, "`model_name_or_path` is missing: name the checkpoint to start from"
        )
        for each in self.freeze:
            require(
                each in PARAMETER_GROUPS or "." in each or "*" in each,
                f"`freeze` names {each!r}; the groups are {', '.join(PARAMETER_GROUPS)}, other names have a dot or a *",
            )
        require(
            set(self.freeze) != set(PARAMETER_GROUPS), "`freeze` names every parameter group: nothing is left to train"
        )
        for name in self.lora_target_modules if self.use_lora else ():
            require(
                name not in ("lm_head", "embed_tokens"),
                f"`lora_target_modules` names {name!r}: the vocabulary's projection is computed from its weight alone",
            )
        require(self.lora_rank >= 1, f"`lora_rank` must be at least 1, got {self.lora_rank}")


@dataclass
class DataArguments:
    """The chats that a run trains on."""

    train_data: list[str] | None = field(
        default=None,
        metadata={"help": "chats: a JSONL or parquet file, a folder of them, a data set by path or name, or several"},
    )
    train_weights: list[float] | None = field(
        default=None,
        metadata={"help": "times that each chat comes in an epoch, for each source of `train_data` (unset: once)"},
    )
    train_split: str = option("train", "split of a data set to train on")
    eval_data: str | None = option(None, "held-out chats, in the same forms", decides=False)
    eval_split: str = option("train", "split of the data set of held-out chats", decides=False)
    data_name: str | None = option(None, "configuration of a data set on the Hub")
    media_folder: str | None = option(
        None, "where relative paths of images and videos start (unset: the data's folder)"
    )
    streaming: bool = option(False, "read the training chats as a stream of unknown length; needs `max_steps`")
    shuffle_buffer: int = option(1000, "chats of a stream that are shuffled among each other")
    max_length: int = option(8192, "columns of a packed row, copies of responses included")
    overlong: Literal["drop", "truncate"] = option("drop", "what happens to a chat that does not fit in a row")
    max_total_length: int | None = option(None, "tokens of a chat; longer ones are left out")
    min_pixels: int | None = option(None, "smallest area that an image is scaled to (unset: the processor's)")
    max_pixels: int | None = option(None, "largest area that an image is scaled to (unset: the processor's)")
    min_short_side: int | None = option(None, "chats with an image of a shorter side are left out, in pixels")
    max_aspect_ratio: float | None = option(None, "chats with an image of a greater aspect ratio are left out")
    coordinates: Literal["relative", "any"] = option(
        "relative", "leave out chats whose answers have a `bbox_2d` or `point_2d` that is not from 0 to 1000, or any"
    )
    pad_to_multiple_of: int = option(1, "rows are padded to a multiple of this number of columns")
    measuring_processes: int | None = option(
        None, "processes that measure chats before training (unset: one)", decides=False
    )
    max_eval_samples: int = option(256, "number of held-out chats used at most", decides=False)

    def check(self) -> None:
        """Raise `RecipeError` for invalid settings."""
        require(bool(self.train_data), "`train_data` is missing: name the chats to train on")
        assert self.train_data is not None
        require(
            not self.streaming or (len(self.train_data) == 1 and self.train_weights is None),
            f"`streaming` reads one source without a weight, got {len(self.train_data)} in `train_data`",
        )
        if self.train_weights is not None:
            require(
                len(self.train_weights) == len(self.train_data),
                f"`train_weights` has {len(self.train_weights)} numbers for {len(self.train_data)} sources",
            )
            for weight in self.train_weights:
                require(0 < weight < math.inf, f"`train_weights` must be positive, got {weight}")
        low, high = self.min_pixels, self.max_pixels
        require(low is None or high is None or low <= high, f"`min_pixels` {low} is above `max_pixels` {high}")
        for name in ("max_length", "pad_to_multiple_of", "max_eval_samples"):
            require(getattr(self, name) >= 1, f"`{name}` must be at least 1, got {getattr(self, name)}")


@dataclass
class BlockDiffusionArguments(TrainingArguments):
    """transformers' settings with those of block diffusion (arXiv 2604.16514, sections 3 and 4)."""

    adam_beta2: float = option(0.95, "second moment's decay of AdamW")
    lr_scheduler_type: str = option("cosine", "schedule of the learning rates, by transformers' names")
    remove_unused_columns: bool = option(False, "chats have no columns to remove", decides=False)
    save_total_limit: int | None = option(2, "checkpoints kept of a stage that is under way", decides=False)
    logging_steps: float = option(
        10, "steps between logged losses; those of the first and the last step are logged too", decides=False
    )
    logging_first_step: bool = option(True, "log the loss of the first step", decides=False)
    ddp_timeout: int = option(
        86_400, "seconds that processes wait for each other; the first one measures all chats", decides=False
    )

    noise: Literal["mixed", "mask", "uniform"] = option("mixed", "corruption of the noisy copies")
    time_sampling: Literal["sample", "block", "stratified"] = option("sample", "one time a sample, or one a block")
    time_low: float = option(0.0, "smallest time; 0 is all corrupted")
    time_high: float = option(1.0, "largest time; 1 is clean")
    complementary_masks: bool = option(
        False,
        "two noisy copies of each response in a row that holds prompt and clean response once: the second masks what "
        "the first shows",
    )
    draft_share: float = option(
        0.0,
        "share of the masks whose place the model's own predictions take before it learns, by one forward more: the "
        "errors that decoding in parallel shows, for `revision`",
    )
    replace_with_special_tokens: bool = option(False, "uniform noise may draw special tokens too, never the mask")
    loss_form: Literal["sample_mean", "corrupted_mean", "inverse_time"] = option(
        "sample_mean",
        "the paper's mean over corrupted positions within each sample, then over samples; the mean over those of all "
        "samples together; or the reference's weights of 1 / probability",
    )
    padding_weight: float | None = option(
        None, "weight of the padding behind a response (unset: 1, for `inverse_time` 0.5)"
    )
    visible_weight: float = option(
        0.0,
        "weight of response tokens that the noise left alone; above 0 they are learnt too, as `revision` needs",
    )
    certainty_weight: float = option(
        0.0,
        "weight of the entropy of predictions that are right already: they become surer, and fewer steps decide more",
    )
    certainty_temperature: float = option(0.5, "temperature at which that entropy is taken")
    loss_chunk_size: int = option(1024, "positions that are projected to the vocabulary at a time", decides=False)
    fill_rows: bool = option(
        False,
        "lay the samples of a step into rows of `max_length` and deal these to the processes, in at most "
        "`gradient_accumulation_steps` micro-batches; the loss stays the same; not for a stream",
        decides=False,
    )
    mask_form: Literal["dense", "flex"] = option(
        "dense",
        "attention mask: dense, or flex, FlexAttention's, which holds no pairs of tokens; flex needs CUDA, where its "
        "gradients are not tested yet",
        decides=False,
    )
    merger_learning_rate: float | None = option(None, "rate of the vision-language mergers (unset: `learning_rate`)")
    vision_learning_rate: float | None = option(None, "rate of the vision tower (unset: `learning_rate`)")
    min_learning_rate: float | None = option(
        None, "floor of the cosine, the same for every group; a group whose rate is below it stays at its rate"
    )
    early_stopping_patience: int | None = option(
        None, "evaluations in a row without a better `metric_for_best_model` after which a stage ends"
    )
    decode_samples: int = option(0, "held-out chats whose last answer is decoded at every evaluation", decides=False)
    show_answers: int = option(
        3, "chats whose last answer is printed as it is before training and after; 0 for none", decides=False
    )
    decode_max_new_tokens: int = option(256, "longest decoded answer", decides=False)
    decode_confidence_threshold: float | None = option(
        None, "threshold of that decoding (unset: the model's)", decides=False
    )
    decode_denoising_steps: int | None = option(
        None, "steps per block of that decoding (unset: the block size)", decides=False
    )

    def __post_init__(self) -> None:
        """Fill what follows from other settings; transformers checks its own."""
        later = "activation_checkpointing_kwargs"  # the name in newer lines of transformers 5
        defaults = {
            later if hasattr(self, later) else "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "accelerator_config": {"dispatch_batches": False},  # a packed batch cannot be cut into processes' shares
            "report_to": "none",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.early_stopping_patience is not None:
            self.restore_callback_states_from_checkpoint = True  # an interrupted stage goes on counting
        super().__post_init__()

    def check(self) -> None:
        """Raise `RecipeError` for invalid settings."""
        for name, reason in UNUSED.items():
            require(not getattr(self, name, None), f"`{name}` is not supported: {reason}")
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            value = getattr(getattr(self, name), "value", getattr(self, name))
            require(
                value in ("no", "steps"), f"`{name}` must be no or steps, got {value!r}: epochs run into each other"
            )
        require(
            0 <= self.time_low < self.time_high <= 1,
            f"`time_low` and `time_high` must satisfy 0 <= low < high <= 1, got {self.time_low} and {self.time_high}",
        )
        require(
            not self.complementary_masks or abs(self.time_low + self.time_high - 1) < 1e-9,
            "`complementary_masks` gives the second copy the time 1 - t: `time_low` + `time_high` must be 1, "
            f"got {self.time_low} and {self.time_high}",
        )
        require(
            self.min_learning_rate is None or self.scheduler == "cosine",
            f"`min_learning_rate` is the floor of `lr_scheduler_type: cosine`, got {self.scheduler!r}",
        )
        require(0 <= self.draft_share <= 1, f"`draft_share` must lie between 0 and 1, got {self.draft_share}")
        self.check_warmup()
        require(self.n_gpu <= 1, f"{self.n_gpu} GPUs in one process: start with `accelerate launch`, a process per GPU")
        require(
            self.mask_form != "flex" or self.device.type == "cuda",
            f"`mask_form: flex` trains on CUDA only, the device is {self.device}",
        )
        require(self.loss_chunk_size >= 1, f"`loss_chunk_size` must be at least 1, got {self.loss_chunk_size}")
        require(
            self.padding_weight is None or self.padding_weight >= 0,
            f"`padding_weight` must be at least 0, got {self.padding_weight}",
        )
        require(self.visible_weight >= 0, f"`visible_weight` must be at least 0, got {self.visible_weight}")
        weight, temperature = self.certainty_weight, self.certainty_temperature
        require(0 <= weight < math.inf, f"`certainty_weight` must be at least 0, got {weight}")
        require(0 < temperature < math.inf, f"`certainty_temperature` must be above 0, got {temperature}")
        patience = self.early_stopping_patience
        require(patience is None or patience >= 1, f"`early_stopping_patience` must be at least 1, got {patience}")
        require(
            patience is None or self.load_best_model_at_end,
            "`early_stopping_patience` ends a stage with its best checkpoint: set `load_best_model_at_end: true`",
        )
        require(self.decode_samples >= 0, f"`decode_samples` must be at least 0, got {self.decode_samples}")
        require(self.show_answers >= 0, f"`show_answers` must be at least 0, got {self.show_answers}")

    def check_warmup(self) -> None:
        """Raise `RecipeError` if the number of steps is known, and the rate would never reach its peak in them."""
        require(
            self.max_steps <= 0 or self.get_warmup_steps(self.max_steps) < self.max_steps,
            f"`warmup_steps` {self.warmup_steps:g} leaves none of the {counted(self.max_steps, 'step')}",
        )

    @property
    def scheduler(self) -> str:
        """The schedule's name."""
        return getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step, over accumulation steps and processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def steps(self, num_samples: int | None) -> int:
        """Optimizer steps: `max_steps`, or what `num_train_epochs` over `num_samples` come to."""
        if self.max_steps > 0:
            return self.max_steps
        require(num_samples is not None, "a stream has no epochs: `streaming` needs `max_steps`")
        assert num_samples is not None
        return max(1, math.ceil(self.num_train_epochs * num_samples / self.global_batch_size))

    def group_learning_rate(self, group: str) -> float:
        """Peak learning rate of a parameter group."""
        rate = {"merger": self.merger_learning_rate, "vision": self.vision_learning_rate}.get(group)
        return self.learning_rate if rate is None else rate

    def changed(self, **settings: Any) -> "BlockDiffusionArguments":
        """A copy with other settings; unlike `dataclasses.replace` it does not set the devices up again."""
        changed = copy.copy(self)
        for name, value in settings.items():
            setattr(changed, name, value)
        return changed


@dataclass
class MergeArguments:
    """The schedule of progressive block merging."""

    block_sizes: list[int] | None = field(
        default=None, metadata={"help": "stages, ascending, as 4 8 16 32 (unset: the source's block size)"}
    )
    steps_per_stage: list[int] | None = field(
        default=None, metadata={"help": "optimizer steps of each stage (unset: `max_steps` for each)"}
    )

    def check(self) -> None:
        """Raise `RecipeError` for invalid settings."""
        check_block_sizes(self.block_sizes)
        if self.steps_per_stage is not None:
            sizes = self.block_sizes or [0]
            require(
                len(self.steps_per_stage) == len(sizes),
                f"`steps_per_stage` has {len(self.steps_per_stage)} numbers for {len(sizes)} stages",
            )
            require(min(self.steps_per_stage) >= 1, f"`steps_per_stage` must be positive, got {self.steps_per_stage}")


@dataclass
class DistillArguments:
    """Stage-wise distillation: the teacher, and what is learnt from it."""

    block_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "which stages of a block-merging run to distil (unset: all but the anchor)"},
    )
    teacher_name_or_path: str | None = option(None, "teacher (unset: the smallest-block stage beside the student)")
    teacher_kind: Literal["block", "ar"] = option("block", "a Bard-VL checkpoint, or an autoregressive Qwen3-VL")
    teacher_block_size: int | None = option(None, "block size that the teacher runs at (unset: its config's)")
    teacher_dtype: Literal["float32", "bfloat16"] | None = option(None, "dtype of its weights (unset: its own)")
    ce_weight: float = option(1.0, "weight of the cross entropy with the data")
    kd_weight: float = option(0.5, "weight of the divergence from the teacher")
    kd_positions: Literal["all", "fair"] = option(
        "all",
        "where the teacher is followed: everywhere, or where it sees all that the student sees; elsewhere, and in "
        "blocks of padding behind an answer, the cross entropy takes both weights",
    )
    kd_direction: Literal["forward", "reverse"] = option("forward", "KL(teacher || student), or the reverse")
    kd_temperature: float = option(1.0, "temperature of both distributions; the divergence is multiplied by its square")
    kd_top_k: int | None = option(None, "number of the teacher's likeliest tokens to compare on (unset: all)")

    def check(self) -> None:
        """Raise `RecipeError` for invalid settings."""
        check_block_sizes(self.block_sizes)
        require(self.kd_weight > 0, f"`kd_weight` must be above 0, got {self.kd_weight}")
        require(self.ce_weight >= 0, f"`ce_weight` must be at least 0, got {self.ce_weight}")
        require(self.kd_temperature > 0, f"`kd_temperature` must be above 0, got {self.kd_temperature}")
        require(self.kd_top_k is None or self.kd_top_k >= 1, f"`kd_top_k` must be at least 1, got {self.kd_top_k}")
        require(
            self.teacher_kind == "block" or self.teacher_name_or_path is not None,
            "`teacher_kind: ar` needs `teacher_name_or_path`, an autoregressive Qwen3-VL",
        )
        require(
            self.teacher_kind == "block" or self.teacher_block_size is None,
            f"`teacher_block_size` {self.teacher_block_size} has no meaning for `teacher_kind: ar`",
        )


@dataclass
class SelfDistillArguments:
    """Training on the model's own answers: which are kept, and what is learnt of them."""

    accept: str = option(
        "exact",
        "own answers that are learnt: `exact`, those that are the data's; `all` that came to their end; or those for "
        "which a function `module:function` of (chat, answer, the data's answer) is true",
    )
    states: Literal["recorded", "random"] = option(
        "recorded",
        "what stands visible: the tokens that had been decided before a random step of the answer's own decoding; or "
        "what `noise` leaves",
    )
    answer_max_new_tokens: int = option(256, "longest own answer; one that has not ended by then is left out")
    answer_confidence_threshold: float | None = option(None, "threshold of its decoding (unset: the model's)")
    answers: str | None = option(
        None, "folder that the own answers are written to, or were (unset: `answers` in `output_dir`)", decides=False
    )
    answer_batch_size: int = option(16, "answers decoded together by each process", decides=False)

    def check(self) -> None:
        """Raise `RecipeError` for invalid settings."""
        for name in ("answer_max_new_tokens", "answer_batch_size"):
            require(getattr(self, name) >= 1, f"`{name}` must be at least 1, got {getattr(self, name)}")
        threshold = self.answer_confidence_threshold
        require(
            threshold is None or 0 <= threshold <= 1,
            f"`answer_confidence_threshold` must lie between 0 and 1, got {threshold}",
        )
        self.judge()

    def judge(self) -> "Judge":
        """Whether an own answer is learnt: a function of its chat, its text and the data's.

        Raises:
            RecipeError: there is no such function.
        """
        known: dict[str, Judge] = {"exact": lambda _, own, told: own == told, "all": lambda *_: True}
        if self.accept in known:
            return known[self.accept]
        module, _, name = self.accept.partition(":")
        require(bool(module and name), f"`accept` must be exact, all or module:function, got {self.accept!r}")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"`accept` {self.accept!r} names no function: {error}") from error
        require(callable(found), f"`accept` {self.accept!r} is no function")
        return found


Judge = Callable[[Mapping[str, Any], str, str], Any]


def require(condition: bool, message: str) -> None:
    """Raise `RecipeError` unless the condition holds."""
    if not condition:
        raise RecipeError(message)


def check_block_sizes(sizes: list[int] | None) -> None:
    """Raise `RecipeError` unless the sizes are positive and ascend."""
    if sizes is None:
        return
    require(min(sizes) >= 1, f"`block_sizes` must be positive, got {sizes}")
    require(all(a < b for a, b in pairwise(sizes)), f"`block_sizes` must ascend, got {sizes}")


class RecipeParser(HfArgumentParser):
    """transformers' parser, whose errors are exceptions with one line, and which passes a field's metadata on."""

    def add_argument(self, *names: Any, decides: bool = True, **settings: Any) -> Any:
        """Add what a field asks for; whether it decides a result does not matter here."""
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under its usage."""
        raise RecipeError(message)


def parse_recipe(kinds: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Read `[recipe.yaml] [--key value ...]` into one object of each dataclass in `kinds`, and check them.

    `--recipe lora` in its place names one of the package's own.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is of another type or out of range.
    """
    parser = RecipeParser(list(kinds), allow_abbrev=False)
    names = [field.name for kind in kinds for field in dataclasses.fields(kind) if field.init]
    flags = list(arguments)
    if flags[:1] == ["--recipe"]:
        require(len(flags) > 1, "`--recipe` needs a name")
        flags[:2] = [str(own_recipe(flags[1]))]
    recipe = read_recipe(Path(flags.pop(0))) if flags and not flags[0].startswith("-") else {}
    for key in recipe:
        close = difflib.get_close_matches(key, names, 1)
        require(key in names, f"unknown key {key!r} in the recipe" + (f"; did you mean {close[0]!r}?" if close else ""))
    given = [flag for key, value in recipe.items() for flag in as_flags(key, value)]
    # Newer lines of transformers have a default for it, in the working directory.
    names_output = any(flag.replace("-", "_").startswith("__output_dir") for flag in [*given, *flags])
    asks_for_help = not {"-h", "--help"}.isdisjoint(flags)
    require(names_output or asks_for_help, "`output_dir` is missing: name the folder to write to")
    try:
        *parsed, rest = parser.parse_args_into_dataclasses([*given, *flags], return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # transformers' own checks of its settings
        raise RecipeError(" ".join(str(error).split())) from error
    require(not rest, f"unknown argument {' '.join(rest)!r}")
    for settings in parsed:
        settings.check()
    known = {name: value for settings in parsed for name, value in vars(settings).items()}
    if known.get("eval_data") is None:
        evaluates = getattr(known.get("eval_strategy"), "value", "no") != "no"
        needs = "`eval_strategy`" if evaluates else "`decode_samples`" if known.get("decode_samples") else None
        require(needs is None, f"{needs} is set, but `eval_data` is missing: name held-out chats")
    return tuple(parsed)


def own_recipe(name: str) -> Path:
    """The file of a recipe of the package, by its name; `RecipeError` lists them if there is none."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    require(name in names, f"`--recipe` must be one of {', '.join(names)}, got {name!r}")
    return RECIPES / f"{name}.yaml"


def read_recipe(path: Path) -> dict[str, Any]:
    """The flat mapping in a YAML file."""
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    require(isinstance(recipe, dict), f"{path} must hold `key: value` lines, got {type(recipe).__name__}")
    return recipe


def as_flags(key: str, value: Any) -> list[str]:
    """A recipe's entry as the command-line flags that mean the same, so that both are checked alike."""
    if value is None:  # as if the key were absent
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]
