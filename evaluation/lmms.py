"""Bard-VL as a model of lmms-eval (0.7.3 or newer): `lmms-eval --model bard_vl --model_args pretrained=FOLDER,...`.

lmms-eval finds it by the entry point of group `lmms_eval.models` in pyproject.toml. Requests are decoded in ragged
batches; with several processes (`accelerate launch`) each takes its share of a task. docs/evaluating.md has commands.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from PIL import Image
from qwen_vl_utils.vision_process import MODEL_SEQ_LEN
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from .. import BardVLConfig, BardVLForConditionalGeneration, BardVLGenerationConfig, BardVLProcessor
from ..forms_bard_vl import Form
from ..generation_config_bard_vl import FIELDS, SAMPLING_FIELDS, resolve_block_size
from ..media_bard_vl import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

PADDING_MARK = "__padding_only__"  # of lmms-eval, in the metadata of a request whose answer nobody reads
# The errors of a bad picture, video or prompt, also where a task's data set decodes it.
FAULTS = (ValueError, OSError, SyntaxError, Image.DecompressionBombError)


class BardVL(lmms):
    """Answers tasks in lmms-eval's message format, which it derives for tasks that state none.

    A request that cannot be read or answered, for instance for its picture, counts as answered with nothing; a warning
    names its task and document.

    After a run, `throughput` in its results has, over all processes: `total_gen_tokens`, each response's up to and with
    its first EOS; `avg_speed`, those per second of decoding; `avg_tokens_per_forward`, those per forward that a
    response took part in, its prompt's included. Requests that lmms-eval adds to give every process as many are
    answered, and not counted.

    Args:
        pretrained: folder or Hub id of a Bard-VL checkpoint.
        revision, dtype, attn_implementation: as in `from_pretrained`.
        device: of a single process; with several, each has its own.
        batch_size: responses decoded together.
        max_batch_size: takes no part; lmms-eval hands it to every model.
        min_pixels, max_pixels: bounds of an image, which is resized within them; the checkpoints' authors' by default.
        max_num_frames, fps: frames of a video at most, and a second.
        system_prompt: text, or a file with it; none by default.
        settings: any setting of `generate`: `block_size`, `denoising_steps`, `confidence_threshold`, ... A task's own
            (`max_new_tokens`, `temperature`, ...) and those of `--gen_kwargs` come on top. There `choices=A|B|C|D`
            makes one of these texts the answer.

    Raises:
        ValueError: an argument is unknown or out of range, the checkpoint is no Bard-VL, or no block size is stated.
    """

    is_simple = False
    # The attribute of an instance that holds the settings of its task.
    settings_place = 2

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        revision: str = "main",
        dtype: str = "bfloat16",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        min_pixels: int = 256 * 256,
        max_pixels: int = 2048 * 2048,
        max_num_frames: int = 32,
        fps: float = 2.0,
        system_prompt: str = "",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = {"max_new_tokens": 128, **BardVLGenerationConfig(**settings).explicit()}
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be a number of at least 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.image_options = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.video_options = {"max_frames": max_num_frames, "fps": fps}
        # The bounds of qwen-vl-utils for a video, as in the checkpoints' evaluation, instead of the processor's.
        self.video_options["total_pixels"] = MODEL_SEQ_LEN * 32**2 * 0.9
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        config = BardVLConfig.from_pretrained(pretrained, revision=revision)
        if config.architectures != [BardVLForConditionalGeneration.__name__]:
            raise ValueError(f"{pretrained} is no Bard-VL checkpoint: its architecture is {config.architectures}")
        resolve_block_size(self.settings.get("block_size"), config)

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.device = self.accelerator.device if self.world_size > 1 else alone
        self.processor = BardVLProcessor.from_pretrained(pretrained, revision=revision)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model.to(self.device).eval()
        self.totals = torch.zeros(4, dtype=torch.float64)  # responses, tokens, forwards, seconds

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in their order."""
        results: list[Any] = [None] * len(requests)
        settings = [self._settings(request.args[self.settings_place]) for request in requests]
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Bard-VL")
        for batch in self._batches(requests, settings):
            answers = self._answers([requests[index] for index in batch], settings[batch[0]])
            for index, answer in zip(batch, answers, strict=True):
                results[index] = answer
                context, task_settings = requests[index].args[0], requests[index].args[self.settings_place]
                self.cache_hook.add_partial("generate_until", (context, task_settings), answer.text)
            progress.update(len(batch))
        progress.close()
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """Loss of each request's continuation, a token's mean, and whether greedy decoding would give it.

        lmms-eval asks this of models in its simple format only (`--force_simple`), and as of its own models it expects
        losses: its tasks take the lowest. The log-likelihoods are `score`'s; continuations of one prompt are scored
        together. The pairs are wrapped: lmms-eval 0.7.3 turns what is neither wrapped nor text into text.
        """
        results: list[Any] = [None] * len(requests)
        prompts = [repr((request.args[0], *request.args[3:])) for request in requests]
        for group in group_by(range(len(requests)), prompts.__getitem__):
            for index, found in zip(group, self._losses([requests[index] for index in group]), strict=True):
                results[index] = found
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: no task of the paper's evaluation asks for it."""
        raise NotImplementedError("bard_vl answers one turn: tasks with `generate_until_multi_round` are not supported")

    def clean(self) -> None:
        """Report what was measured, summed over the processes, and drop the model; lmms-eval calls it once a run."""
        totals = self.accelerator.gather(self.totals.float().to(self.device)[None]).cpu().double()
        (responses, tokens, forwards), seconds = totals[:, :3].sum(0).tolist(), totals[:, 3].max().item()
        if responses:
            measured = {"tokens_per_forward": tokens / forwards, "total_requests": int(responses)}
            log_metrics(seconds, int(tokens), tokens / seconds, {**measured, "num_processes": self.world_size})
        self.totals.zero_()
        super().clean()

    def _batches(self, requests: list[Instance], settings: list[dict[str, Any]]) -> Iterator[list[int]]:
        """Indices of requests with the same settings, those of similar length of text together."""
        for group in group_by(range(len(requests)), lambda index: repr(sorted(settings[index].items()))):
            group.sort(key=lambda index: -len(requests[index].args[0]))
            yield from (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))

    def _settings(self, task_settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of `generate`: the model's, then the task's; `ValueError` if they ask for what it does not do."""
        beams = task_settings.get("num_beams")
        if beams not in (None, 1):
            raise ValueError(f"`num_beams` = {beams}: block diffusion has no beams")
        known = {name: value for name, value in task_settings.items() if name in FIELDS and value is not None}
        settings = {**self.settings, **known}
        # Tasks that are meant greedily say something of sampling as well, often `top_p` = 0.
        if settings.get("do_sample") is False or 0 in (settings.get("temperature"), settings.get("top_p")):
            settings = {name: value for name, value in settings.items() if name not in SAMPLING_FIELDS}
            settings["do_sample"] = False
        until = task_settings.get("until") or []
        # An empty line is lmms-eval's default, made for models without an end token.
        stops = [text for text in ([until] if isinstance(until, str) else until) if text and text != "\n\n"]
        if stops:
            settings["stop_strings"] = stops
        BardVLGenerationConfig(**settings)
        if (choices := task_settings.get("choices")) is not None:
            texts = choices.split("|") if isinstance(choices, str) else choices
            settings["structured"] = {"choices": [str(text) for text in texts]}
            Form.read(settings["structured"])
        return settings

    def _answers(self, requests: list[Instance], settings: dict[str, Any]) -> list[GenerationResult]:
        """Answers of a batch, empty ones for requests with a fault; where one has, each is answered alone."""
        try:
            return self._answer(requests, settings)
        except FAULTS as error:
            if len(requests) > 1:
                return [answer for request in requests for answer in self._answers([request], settings)]
            warn(requests[0], error)
            return [GenerationResult("", TokenCounts(output_tokens=0))]

    def _losses(self, requests: list[Instance]) -> list[GenerationResult]:
        """Losses of continuations of one prompt, infinite for those with a fault; where one has, each is read alone."""
        try:
            return self._scored(requests)
        except FAULTS as error:
            if len(requests) > 1:
                return [found for request in requests for found in self._losses([request])]
            warn(requests[0], error)
            return [GenerationResult((float("inf"), False))]

    def _scored(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score continuations of one prompt together."""
        inputs = self._inputs([self._messages(requests[0])])
        texts = [self._continuation(request) for request in requests]
        options = {"add_special_tokens": False, "padding": True, "padding_side": "right", "return_tensors": "pt"}
        answers = self.processor.tokenizer(texts, **options)
        ids = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        scoring = {name: self.settings[name] for name in ("block_size", "mask_token_id") if name in self.settings}
        losses = -self.model.score(inputs, ids, **scoring).sum(-1).cpu() / answers["attention_mask"].sum(-1)
        greedy = {**self.settings, "do_sample": False, "max_new_tokens": ids.shape[1]}
        response = self.model.generate(inputs, **greedy)[0].tolist()
        results = []
        for loss, row in zip(losses.tolist(), ids.tolist(), strict=True):
            row = [token for token in row if token != -100]
            results.append(GenerationResult((loss, response[: len(row)] == row)))
        return results

    @torch.inference_mode()
    def _answer(self, requests: list[Instance], settings: dict[str, Any]) -> list[GenerationResult]:
        """Decode a batch of requests together, and add to the totals."""
        inputs = self._inputs([self._messages(request) for request in requests])
        start = time.perf_counter()
        output = self.model.generate(**inputs, **settings, tokenizer=self.processor, return_dict_in_generate=True)
        seconds = time.perf_counter() - start
        lengths = output.num_tokens
        forwards = lengths / output.tokens_per_forward.cpu()
        counts = torch.stack([torch.ones_like(lengths), lengths, forwards], dim=1).double()
        is_counted = torch.tensor([PADDING_MARK not in (request.metadata or {}) for request in requests])
        self.totals += torch.cat([counts[is_counted].sum(0), torch.tensor([seconds])])
        responses = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(responses, skip_special_tokens=True)
        return [
            GenerationResult(cut(text, settings.get("stop_strings", [])), TokenCounts(output_tokens=length))
            for text, length in zip(texts, lengths.tolist(), strict=True)
        ]

    def _inputs(self, conversations: list[list[dict[str, Any]]]) -> Any:
        """The processor's output for conversations, whose items state sizes: resized as by qwen-vl-utils."""
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        options["processor_kwargs"] = {"padding": True}
        return self.processor.apply_chat_template(conversations, **options).to(self.device)

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        """A request as a conversation whose items state sizes and frames."""
        chat = ChatMessages(messages=self._turns(request))
        messages = chat.to_hf_messages(video_kwargs=self.video_options, image_kwargs=self.image_options)
        return self._apply_system_prompt(messages, self.system_prompt)

    def _turns(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][doc_id])

    def _continuation(self, request: Instance) -> str:
        """The answer to be scored. It follows a template, which brings its own delimiter."""
        _, continuation, _, doc_id, task, split = request.args
        return str(
            continuation(self.task_dict[task][split][doc_id]) if callable(continuation) else continuation
        ).strip()


class SimpleBardVL(BardVL):
    """The same for tasks in lmms-eval's simple format, `--force_simple`: a text with pictures before it, or choices."""

    is_simple = True
    settings_place = 1

    def _turns(self, request: Instance) -> list[dict[str, Any]]:
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        content = [{"type": "image" if is_image(visual) else "video", "url": visual} for visual in visuals or []]
        return [{"role": "user", "content": [*content, {"type": "text", "text": context.replace("<image>", "")}]}]


def is_image(visual: Any) -> bool:
    """Whether a task's visual is a picture, or the path of one."""
    return isinstance(visual, Image.Image) or (isinstance(visual, str) and visual.lower().endswith(PICTURE_SUFFIXES))


def warn(request: Instance, error: Exception) -> None:
    """Say which request counts as wrong, and why."""
    *_, doc_id, task, _ = request.args
    reason = " ".join(str(error).split())
    logger.warning("task %s, document %s counts as wrong: %s: %s", task, doc_id, type(error).__name__, reason)


def cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]


def group_by(items: Any, key: Any) -> list[list[Any]]:
    """Items with equal keys together, in the order of their first."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def manifest() -> Any:
    """The entry that lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    chat, simple = (f"{__name__}.{cls.__name__}" for cls in (BardVL, SimpleBardVL))
    return ModelManifest("bard_vl", simple_class_path=simple, chat_class_path=chat)
