"""One stage of a run: load, train, and leave a checkpoint folder that is either whole or not there."""

import contextlib
import fnmatch
import gc
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.fingerprint import Hasher
from transformers import EarlyStoppingCallback, set_seed
from transformers.integrations import deepspeed as deepspeed_integration

from ..app.quantization import quantization_config
from ..configuration_bard_vl import BardVLConfig
from ..convert_qwen3vl_to_bard import (
    Conversion,
    ConversionError,
    check_architecture,
    convert,
    locate,
    prepare,
)
from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..processing_bard_vl import BardVLProcessor
from .arguments import (
    BlockDiffusionArguments,
    DataArguments,
    DistillArguments,
    ModelArguments,
    RecipeError,
    SelfDistillArguments,
    decides,
    decisive,
    parse_recipe,
    require,
)
from .chats import ChatEncoder, ChatLimits
from .checkpoints import GOES_ON, complete_checkpoints, damage, read_json, reading, sync, writing
from .cost import Cost
from .data import ChatSamples, Mixture, PackingCollator, limit_pixels, media_folder_of, open_chats, stream_chats
from .own_answers import AnswerFiles, OwnAnswers, Writer
from .packing import TILE
from .trainer import BlockDiffusionTrainer, Teacher, group_of

CODE_FOLDER = Path(__file__).resolve().parents[1]
ADAPTER = "adapter"  # in a finished stage, the adapters alone; the stage's own weights have them merged in
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """The settings that all stages of a run share."""

    model: ModelArguments
    data: DataArguments
    args: BlockDiffusionArguments

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(str(self.args.output_dir))


@dataclass(frozen=True)
class Stage:
    """One model to train.

    Attributes:
        source: Bard-VL folder that it starts from.
        block_size: tokens per block.
        output: folder of the finished checkpoint.
        steps: optimizer steps, None for what the recipe says.
        number: counts the stages of a run; each has its own noise and order of samples.
        teacher: folder and kind of the model to distil from.
        own_answers: learn from the model's own answers, not from the data's.
    """

    source: Path
    block_size: int
    output: Path
    steps: int | None = None
    number: int = 0
    teacher: Path | None = None
    distillation: DistillArguments | None = None
    own_answers: SelfDistillArguments | None = None

    @property
    def run_folder(self) -> Path:
        """The folder of checkpoints on the way and of logs."""
        return self.output.parent / "runs" / self.output.name


def run_recipe(kinds: Sequence[type], run: Callable[..., Any], arguments: Sequence[str] | None) -> int:
    """Parse a recipe and run it; returns 0, or 1 after printing one line that says what is wrong."""
    return in_one_line(lambda: run(*parse_recipe(kinds, sys.argv[1:] if arguments is None else arguments)))


def in_one_line(work: Callable[[], Any]) -> int:
    """Do a command's work; returns 0, or 1 after printing one line that says what is wrong."""
    try:
        work()
    except (RecipeError, ConversionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, most of all
        print(f"error: {' '.join(str(error).split())}; {GOES_ON}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: interrupted; {GOES_ON}", file=sys.stderr)
        return 130
    return 0


def find(name: str, revision: str | None = None) -> Conversion:
    """A Qwen3-VL or Bard-VL checkpoint by folder or Hub id, with its config; its weights are there."""
    job = locate(name, revision)
    check_architecture(job.config)
    return job


def start_folder(run: Run, job: Conversion, block_size: int) -> Path:
    """A Bard-VL folder of the source: its own, or where it has been converted to."""
    if job.is_bard:
        return job.folder
    folder = run.output / "start"
    with run.args.main_process_first(local=False, desc="conversion"):
        if not folder.is_dir():
            settings = run.model.mask_token_id, run.model.mask_row
            convert(job.folder, folder, block_size, *settings, progress=False)
    return folder


def check_inputs(run: Run, job: Conversion, block_size: int) -> None:
    """Refuse chats that cannot be opened and a source that cannot be converted, before anything is written."""
    data = run.data
    sharded = run.model.use_lora and shards_weights(run.args)
    require(not sharded, "`use_lora` merges whole weights: start it with accelerate/ddp.yaml, not FSDP or ZeRO-3")
    require(not (run.args.fill_rows and data.streaming), "`fill_rows` needs measured chats: leave `streaming` out")
    with one_line():
        limits(run, block_size)
        for source in data.train_data or ():
            open_chats(source, data.train_split, data.streaming, data.data_name)
        if data.eval_data is not None:
            open_chats(data.eval_data, data.eval_split, False, data.data_name)
    if not job.is_bard:
        prepare(job.folder, None, block_size, run.model.mask_token_id, run.model.mask_row)


def shards_weights(args: BlockDiffusionArguments) -> bool:
    """Whether weights are split over processes, as accelerate was started or as the settings say."""
    zero3 = is_set("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    zero3 = zero3 or deepspeed_integration.is_deepspeed_zero3_enabled()
    return zero3 or is_set("ACCELERATE_USE_FSDP") or bool(args.fsdp)


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn errors about values and files into a `RecipeError` of one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RecipeError(" ".join(str(error).split())) from error


def limits(run: Run, block_size: int) -> ChatLimits:
    """The limits on chats at a block size."""
    data = run.data
    return ChatLimits(
        block_size,
        data.max_length,
        data.overlong,
        data.max_total_length,
        data.min_short_side,
        data.max_aspect_ratio,
        noisy_copies=2 if run.args.complementary_masks else 1,
        coordinates=data.coordinates,
    )


def is_finished(stage: Stage) -> bool:
    """Whether a stage's checkpoint is there.

    Raises:
        RecipeError: something else is.
    """
    if not stage.output.exists():
        return False
    config = stage.output / "config.json"
    require(config.is_file(), f"{stage.output} exists and is no checkpoint: remove it or choose another `output_dir`")
    fault = damage(stage.output)
    require(fault is None, f"{stage.output} is damaged: {fault}; remove it to train it again")
    stated = read_json(config).get("block_size")
    require(stated == stage.block_size, f"{stage.output} holds a checkpoint of block size {stated}")
    return True


def run_stage(run: Run, stage: Stage) -> Path:
    """Train a stage, or go on where it was interrupted; does nothing where it is finished.

    Returns:
        The folder of the finished checkpoint.
    """
    settings = decisive_settings(run, stage)
    if is_finished(stage):
        settings.pop("source")  # of a first stage that was converted, it has been removed since
        check_settings(stage, settings)
        return stage.output
    check_settings(stage, settings)
    args = run.args.changed(output_dir=str(stage.run_folder), seed=run.args.seed + stage.number)
    trainer = build_trainer(run, stage, args)
    run.args.deepspeed_plugin = None  # accelerate keeps it for the stages to come, and refuses to be given it again
    settings |= decisive_data(trainer)
    check_settings(stage, settings)
    trainer.show_answers(run.args.show_answers)
    if run.args.should_save:
        print(Cost.of(trainer).table(f"{stage.output.name}: from {stage.source}"), flush=True)
        prepare_folder(stage, settings)
    trainer.accelerator.wait_for_everyone()
    checkpoints = complete_checkpoints(stage.run_folder)
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    finish(trainer, run, stage)
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return stage.output


def build_trainer(run: Run, stage: Stage, args: BlockDiffusionArguments) -> BlockDiffusionTrainer:
    """The trainer of a stage, with `max_steps` set."""
    with reading(stage.source):
        processor = BardVLProcessor.from_pretrained(stage.source)
        config = student_config(run, stage)
    with one_line():
        train, held_out, encoder = load_data(run, stage, processor, config, args)
    if stage.own_answers is not None:
        train = answered(run, stage, train)
    args.max_steps = args.steps(None if run.data.streaming else len(train)) if stage.steps is None else stage.steps
    args.check_warmup()  # before minutes are spent on the weights
    set_seed(args.seed)  # new adapters are random
    model = load_student(run, stage)
    trains_vision = any(p.requires_grad for name, p in model.named_parameters() if group_of(name) != "language")
    return BlockDiffusionTrainer(
        model=model,
        args=args,
        block_size=stage.block_size,
        processing_class=processor,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=PackingCollator(
            encoder,
            trains_vision or shards_weights(args),
            math.lcm(run.data.pad_to_multiple_of, TILE if args.mask_form == "flex" else 1),
            torch.bfloat16 if args.bf16 else DTYPES[run.model.dtype],
        ),
        teacher=load_teacher(run, stage) if stage.distillation else None,
        callbacks=[] if args.early_stopping_patience is None else [EarlyStoppingCallback(args.early_stopping_patience)],
    )


def load_data(
    run: Run, stage: Stage, processor: BardVLProcessor, config: BardVLConfig, args: BlockDiffusionArguments
) -> tuple[Any, ChatSamples | None, ChatEncoder]:
    """Training chats, held-out chats, and what encodes the former."""
    data = run.data
    resized = limit_pixels(processor, data.min_pixels, data.max_pixels)

    def encoder(source: str) -> ChatEncoder:
        return ChatEncoder(resized, config, limits(run, stage.block_size), data.media_folder or media_folder_of(source))

    held_out = None
    sources = data.train_data or []
    with args.main_process_first(desc="measuring chats"):
        chats = [open_chats(source, data.train_split, data.streaming, data.data_name) for source in sources]
        if data.streaming:
            train = stream_chats(chats[0], encoder(sources[0]), args.seed, data.shuffle_buffer)
        else:
            measured = [
                ChatSamples(each, encoder(source), data.measuring_processes)
                for each, source in zip(chats, sources, strict=True)
            ]
            train = mixed(measured, data.train_weights, run.args.seed)
        if data.eval_data is not None:
            chats = open_chats(data.eval_data, data.eval_split, False, data.data_name)
            chats = chats.select(range(min(data.max_eval_samples, len(chats))))
            held_out = ChatSamples(chats, encoder(data.eval_data), data.measuring_processes)
    return train, held_out, encoder(sources[0])


def answered(run: Run, stage: Stage, chats: ChatSamples | Mixture) -> OwnAnswers:
    """Those of the model's own answers to chats that are learnt; they are written first, or what is left of them."""
    settings, args = stage.own_answers, run.args
    assert settings is not None
    files = AnswerFiles(Path(settings.answers or run.output / "answers"), args.process_index)
    known = {"source": str(stage.source), "block_size": stage.block_size}
    known |= {name: value for name, value in decisive(settings).items() if name.startswith("answer_")}
    files.begin(known | {"usable chats": f"{len(chats)}, {Hasher.hash([chats.indices, chats.lengths])}"})
    wait = args.distributed_state.wait_for_everyone
    wait()
    done = files.read()
    # A chat that comes several times in an epoch is asked once.
    left = {sample_id: number for number, sample_id in enumerate(chats.sample_ids) if sample_id not in done}
    share = list(left.values())[args.process_index :: args.world_size]
    wait()
    if share:
        with whole_models():
            model = load(stage.source, "auto", run.model.attn_implementation, config=student_config(run, stage))
        model = model.to(args.device).eval()
        writer = Writer(model, chats.encoder.tokenizer, stage.block_size, settings)
        writer.write(chats, share, files, args.disable_tqdm or not args.should_save)
    wait()
    found = OwnAnswers(chats, files.read(), settings.judge(), settings.states == "recorded")
    if args.should_save:
        print(found, flush=True)
    return found


def mixed(sources: list[ChatSamples], weights: list[float] | None, seed: int) -> ChatSamples | Mixture:
    """One data set of them: the only one itself if it has no weight."""
    if weights is None and len(sources) == 1:
        return sources[0]
    return Mixture(sources, weights or [1.0] * len(sources), seed)


def student_config(run: Run, stage: Stage) -> BardVLConfig:
    """The config of the model to train: its source's, at the stage's block size."""
    config = BardVLConfig.from_pretrained(stage.source)
    config.block_size = stage.block_size
    if run.model.mask_token_id is not None:
        config.mask_token_id = run.model.mask_token_id
    return config


def load_student(run: Run, stage: Stage) -> Any:
    """The model to train: at the stage's block size, frozen and adapted as the recipe says."""
    settings: dict[str, Any] = {"config": student_config(run, stage)}
    if run.model.quantize:
        settings["quantization_config"] = quantization_config(run.model.quantize, DTYPES[run.model.dtype])
    model = load(stage.source, DTYPES[run.model.dtype], run.model.attn_implementation, **settings)
    if run.model.use_lora:
        model = with_adapters(model, run.model)
    freeze(model, run.model.freeze)
    return model


def freeze(model: Any, names: Sequence[str]) -> None:
    """Leave parameters of a model untrained, by their group or a pattern of their names.

    Raises:
        RecipeError: no parameter has such a name, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for each in names:
        found = [name for name in parameters if group_of(name) == each or fnmatch.fnmatchcase(name, each)]
        require(bool(found), f"`freeze` names {each!r}, and no parameter of the model has such a name")
        for name in found:
            parameters[name].requires_grad_(False)
    require(any(each.requires_grad for each in parameters.values()), "`freeze` leaves nothing to train")


def load(folder: Path, dtype: Any, attention: str | None, **settings: Any) -> Any:
    """Weights of a folder."""
    if attention is not None:
        settings["attn_implementation"] = attention
    with reading(folder):
        return BardVLForConditionalGeneration.from_pretrained(folder, dtype=dtype, **settings)


def with_adapters(model: Any, settings: ModelArguments) -> Any:
    """PEFT's wrapper with low-rank adapters; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.lora_target_modules,
        ),
    )


# --- Teacher ----------------------------------------------------------------------------------------------------------


def check_teacher(teacher: Conversion, student: Conversion, block_size: int, settings: DistillArguments) -> None:
    """Refuse a teacher that a student of `block_size` cannot learn from."""
    if settings.teacher_kind == "ar":
        require(not teacher.is_bard, f"`teacher_kind: ar` needs a Qwen3-VL, {teacher.name} is a Bard-VL")
    else:
        require(teacher.is_bard, f"{teacher.name} is autoregressive: as a teacher it needs `teacher_kind: ar`")
        size = settings.teacher_block_size or teacher.trained_block_size
        require(size is not None, f"{teacher.name} states no block size: set `teacher_block_size`")
        assert size is not None
        require(
            block_size % size == 0,
            f"a teacher at block size {size} cannot teach a student at {block_size}: no multiple",
        )
    sizes = [job.config["text_config"]["vocab_size"] for job in (student, teacher)]
    require(sizes[0] == sizes[1], f"the student has a vocabulary of {sizes[0]} tokens, the teacher of {sizes[1]}")
    require(
        settings.kd_top_k is None or settings.kd_top_k <= sizes[0],
        f"`kd_top_k` {settings.kd_top_k} is more than the vocabulary of {sizes[0]}",
    )


def load_teacher(run: Run, stage: Stage) -> Teacher:
    """The stage's teacher, frozen."""
    settings = stage.distillation
    assert settings is not None
    assert stage.teacher is not None
    job = find(str(stage.teacher))
    dtype = DTYPES[settings.teacher_dtype] if settings.teacher_dtype else "auto"
    config = BardVLConfig(**{key: value for key, value in job.config.items() if key != "model_type"})
    with whole_models():
        model = load(job.folder, dtype, run.model.attn_implementation, config=config)
    model.eval().requires_grad_(False)
    size = 1 if settings.teacher_kind == "ar" else settings.teacher_block_size or job.trained_block_size
    assert size is not None
    return Teacher(model, size, settings.teacher_kind, settings)


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Load models whole on every process, where ZeRO-3 would split them and FSDP would load them on one process only.

    They are no part of what accelerate prepares, so nothing would gather them again; and a process that builds a model
    alone would wait for the others.
    """
    config = deepspeed_integration._hf_deepspeed_config_weak_ref
    loading = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = config
        if loading is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = loading


# --- Interruption and completion --------------------------------------------------------------------------------------


def decisive_settings(run: Run, stage: Stage) -> dict[str, Any]:
    """The settings on which a stage's result depends, in JSON's types."""
    settings = decisive(run.args) | decisive(run.model) | decisive(run.data)
    settings |= {"global_batch_size": run.args.global_batch_size, "steps": stage.steps}
    if run.data.streaming:  # the workers share a stream, and so have a part in its order
        settings["dataloader_num_workers"] = run.args.dataloader_num_workers
    if stage.distillation is not None:
        settings |= decisive(stage.distillation) | {"teacher": str(stage.teacher)}
    if stage.own_answers is not None:
        settings |= decisive(stage.own_answers)
    settings |= {"source": str(stage.source), "block_size": stage.block_size}
    return json.loads(json.dumps(settings, default=str))


def decisive_data(trainer: BlockDiffusionTrainer) -> dict[str, Any]:
    """The facts about a stage's data on which its result depends: steps, and the chats with their lengths."""
    chats = trainer.train_dataset
    found = {"optimizer steps": trainer.args.max_steps}
    if not isinstance(chats, torch.utils.data.IterableDataset):
        found["usable chats"] = f"{len(chats)}, {Hasher.hash([chats.indices, chats.lengths])}"
    return found


def check_settings(stage: Stage, settings: dict[str, Any]) -> None:
    """Refuse to go on with a stage, or to take a finished one, that was begun with other settings."""
    path = stage.run_folder / "settings.json"
    with reading(stage.run_folder):
        before = read_json(path) if path.is_file() else settings
    require(isinstance(before, dict), f"{path} is damaged: {before!r:.80} are no settings")
    # A setting that an earlier version, or another line of transformers, did not note was at its default.
    before = {each.name: each.default for each in fields(BlockDiffusionArguments)} | before
    for name, value in settings.items():
        require(
            before.get(name) == value,
            f"{stage.run_folder} was begun with `{name}` {before.get(name)!r}, now it is {value!r}: "
            "choose another `output_dir`, or remove that folder to begin again",
        )


def prepare_folder(stage: Stage, settings: dict[str, Any]) -> None:
    """Note the settings that a stage is begun with, and remove checkpoints that are not whole.

    Those that an interruption left half-written go in silence, damaged ones are named.
    """
    stage.run_folder.mkdir(parents=True, exist_ok=True)
    partial = stage.run_folder / "settings.partial"
    partial.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    partial.rename(stage.run_folder / "settings.json")
    complete = complete_checkpoints(stage.run_folder, says=lambda fault: print(fault, file=sys.stderr, flush=True))
    for folder in stage.run_folder.glob("checkpoint-*"):
        if folder not in complete:
            shutil.rmtree(folder)


def finish(trainer: BlockDiffusionTrainer, run: Run, stage: Stage) -> None:
    """Write the trained weights as a checkpoint folder, under another name until it is whole."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if run.args.should_save:
        partial = stage.output.with_name(f".{stage.output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        trainer.state.best_model_checkpoint = None  # a folder that goes now
        with writing(partial):
            if run.model.use_lora:
                adapted = trainer.accelerator.unwrap_model(trainer.model_wrapped)
                adapted.save_pretrained(partial / ADAPTER)
                state = merged(adapted, run, stage, partial / ADAPTER)
            write_checkpoint(trainer.mask_token_id, state, trainer.processing_class, run, stage, partial)
            trainer.state.save_to_json(str(partial / "trainer_state.json"))
            sync()
            partial.rename(stage.output)
        for checkpoint in stage.run_folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        print(farewell(trainer.state.log_history, stage), flush=True)
    trainer.accelerator.wait_for_everyone()


def merged(adapted: Any, run: Run, stage: Stage, adapter: Path) -> dict[str, torch.Tensor]:
    """Whole weights with the adapters merged in; into the source's where those that were trained on are quantised."""
    if run.model.quantize:
        from peft import PeftModel

        whole = load(stage.source, DTYPES[run.model.dtype], None, config=student_config(run, stage))
        adapted = PeftModel.from_pretrained(whole, adapter)
    return adapted.merge_and_unload().state_dict()


def farewell(history: list[dict[str, float]], stage: Stage) -> str:
    """The report of a finished stage: its first and last logged loss, and the next command."""
    logged = [entry for entry in history if "loss" in entry]
    losses = f": loss {logged[0]['loss']:.4f} at step {logged[0]['step']}" if logged else ""
    if len(logged) > 1:
        losses += f", {logged[-1]['loss']:.4f} at step {logged[-1]['step']}"
    return f"{stage.output}{losses}\n  try it: bard-vl run photo.jpg --model {stage.output}"


def write_checkpoint(
    mask_token_id: int, state: dict[str, torch.Tensor], processor: Any, run: Run, stage: Stage, folder: Path
) -> None:
    """Weights, config with the block size, processor, code, licence and card."""
    source = json.loads((stage.source / "config.json").read_text("utf-8"))
    name = run.model.save_dtype or source.get("dtype") or source["text_config"].get("dtype") or "bfloat16"
    # The source's settings: transformers' trainer aligns the model's with the tokenizer's, and switches its cache off.
    config = BardVLConfig.from_pretrained(stage.source)
    config.block_size, config.mask_token_id = stage.block_size, mask_token_id
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    dtype = DTYPES.get(name, torch.bfloat16)
    state = {key: value.to(dtype).contiguous() for key, value in state.items()}
    # FSDP gives a trained model another class, of another file: transformers would publish that one's name and code.
    with whole_models(), torch.device("meta"):
        shell = BardVLForConditionalGeneration(config)
    names = shell.state_dict().keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if differing := sorted(names ^ state.keys()):
        raise RuntimeError(f"the trained weights are not those of the model: {', '.join(differing[:5])}")
    shell.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text("utf-8"))
    stated = {**source, "block_size": stage.block_size, "mask_token_id": mask_token_id}
    stated |= {key: saved[key] for key in ("auto_map", "architectures")}
    for name in ("torch_dtype", "trained"):
        stated.pop(name, None)
    for part in (stated, stated["text_config"]):
        part["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n", "utf-8")
    if (stage.source / "generation_config.json").is_file():
        shutil.copy(stage.source / "generation_config.json", folder)
    for each in ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", ".gitignore"):
        if (stage.source / each).is_file():
            shutil.copy(stage.source / each, folder / each)
    shutil.copy(CODE_FOLDER / "LICENSE", folder / "LICENSE-CODE")
    (folder / "README.md").write_text(card(run, stage), "utf-8")
    recipe = {**asdict(run.model), **asdict(run.data)}
    beside: tuple[Any, ...] = (stage.distillation, stage.own_answers)
    for more in beside:
        recipe |= {} if more is None else asdict(more)
    settings = run.args.to_dict()
    # Of transformers' own only what is not at its default: other lines have other ones.
    said = [each for each in fields(run.args) if "decides" in each.metadata or settings.get(each.name) != each.default]
    recipe |= {each.name: settings[each.name] for each in said if decides(each) and each.name in settings}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}), "utf-8")


CARD = """
# {title}

A Bard-VL model: Qwen3-VL's architecture with block-causal attention, which fills blocks of masked tokens in parallel.
Trained at block size {block_size} from {source}{teacher} with `bard_vl.training`; `recipe.yaml` has the settings,
`trainer_state.json` the losses.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{title}", trust_remote_code=True)
```

The weights are under the licence of those they come from; the code (`*_bard_vl.py`) is under the MIT licence.
"""


def card(run: Run, stage: Stage) -> str:
    """The README.md of a finished stage, under the metadata of its source."""
    readme = stage.source / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    metadata = text.split("---\n")[1] if text.startswith("---\n") and text.count("---\n") > 1 else ""
    metadata = metadata or "library_name: transformers\npipeline_tag: image-text-to-text\n"
    teacher = f", taught by {stage.teacher.name}" if stage.teacher else ""
    source = Path(str(run.model.model_name_or_path)).name
    body = CARD.format(title=stage.output.name, block_size=stage.block_size, source=source, teacher=teacher)
    return f"---\n{metadata}---\n{body}"
