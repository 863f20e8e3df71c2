"""The limits of our server: requests are checked before `transformers serve` reads them, faults told as 4xx.

`transformers serve` opens any path and any address that a request names, loads any model, runs any chat template, and
answers most of a client's faults with 500.
"""

import base64
import binascii
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from PIL import Image
from transformers.cli.serving.utils import BaseGenerateManager, BaseHandler
from transformers.utils import logging

from ..app.chats import check_chat, is_text
from ..app.devices import free_memory
from ..app.errors import one_line
from ..app.memory import check_fits, read_prompt
from ..forms_bard_vl import Form
from ..generation_config_bard_vl import SETTINGS, check_seed
from ..hooks_bard_vl import build_form, check_alone, check_banned_tokens
from ..processors_bard_vl import build_processors
from .forms import WANTED, Wanted

logger = logging.get_logger(__name__)

OPEN = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
MAX_BODY = 64 * 2**20  # bytes
TIMEOUT = 10.0  # seconds without a byte from an address
MAX_PICTURES = 256  # of a request: the smallest, too, are made as large as the processor's least
# Settings that can make every step, or the preparation of a response, arbitrarily expensive.
MAX_BLOCK = 128  # tokens; where the checkpoint states more, that
MAX_NGRAM = 64
MAX_SEQUENCES, MAX_SEQUENCE = 1024, 32  # of several tokens, that are banned or biased; tokens of one
MAX_STOPS, MAX_STOP = 8, 256  # texts that end a response; characters of one
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
TEXTS = ("text", "input_text", "output_text")
PICTURES = ("image_url", "input_image")
TEMPLATE_SETTINGS = ("add_vision_id", "enable_thinking")
# Errors of reading a wrong request: of our checks, of those of `generate`, of a template, and of code that expects a
# right one.
FAULTS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    TemplateError,
)


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    Attributes:
        max_pixels: of all its pictures together, before they are made smaller.
        allow_addresses: whether they may be at an http(s) address, which the server then opens.
        max_new_tokens: most tokens of a response, also if a request asks for more.
    """

    max_pixels: int
    allow_addresses: bool
    max_new_tokens: int


def guarded(build_server: Callable[..., FastAPI], limits: Limits) -> Callable[..., FastAPI]:
    """The factory of `transformers serve`'s application, with `limits` on what it is asked."""

    def build(model_manager: Any, chat_handler: Any, *others: Any, **named: Any) -> FastAPI:
        if model_manager.force_model is None:
            raise ValueError("no model: give a folder or Hub id; without one any client could load any model")
        state = chat_handler.generation_state
        get_manager = state.get_manager
        state.get_manager = lambda *args, **kwargs: CheckedGeneration(get_manager(*args, **kwargs), limits)
        parts = [model_manager, *(checked(part, limits) for part in (chat_handler, *others))]
        app = build_server(*parts, **{name: checked(part, limits) for name, part in named.items()})
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in OPEN]
        app.middleware("http")(limit_body)

        @app.post("/load_model")  # by which `transformers chat` begins
        async def load_model(body: dict[str, Any]) -> Any:
            if body.get("model") != model_manager.force_model:
                return fault(f"this server has the model {model_manager.force_model!r}, got {body.get('model')!r:.80}")
            name = model_manager.process_model_name(model_manager.force_model)
            return StreamingResponse(model_manager.load_model_streaming(name), media_type="text/event-stream")

        return app

    return build


def checked(part: Any, limits: Limits) -> Any:
    """A handler of requests within `limits`; anything else as it is."""
    return CheckedHandler(part, limits) if isinstance(part, BaseHandler) else part


async def limit_body(request: Request, call_next: Callable[..., Any]) -> Any:
    """Refuse a body that is too large, or does not say how large it is, before it is read."""
    stated = request.headers.get("content-length", "" if "transfer-encoding" in request.headers else "0")
    if not stated.isdecimal():
        return fault("the request must state its `content-length`", 411)
    if int(stated) > MAX_BODY:
        return fault(f"the request has {stated} bytes, this server takes {MAX_BODY}", 413)
    return await call_next(request)


def fault(message: str, status: int = 400) -> JSONResponse:
    """A client's fault in the form of OpenAI's protocol."""
    told = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": told}, status_code=status)


class CheckedHandler:
    """A handler of `transformers serve` that is asked no more than `limits` allow, and tells faults as 4xx."""

    def __init__(self, handler: Any, limits: Limits):
        self.handler = handler
        read = handler.get_processor_inputs_from_messages

        def read_checked(messages: Any, modality: Any) -> Any:
            check_chat(messages)
            check_items(messages)
            return with_pictures(read(messages, modality), limits)

        handler.get_processor_inputs_from_messages = read_checked

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The handler's answer, or what is wrong with the request."""
        try:
            check_fields(body)
            wanted = Wanted.of(body)
            token = WANTED.set(wanted)
            try:
                return wanted.with_calls(await self.handler.handle_request(body, request_id))
            finally:
                WANTED.reset(token)
        except FAULTS as error:
            logger.info("refused request %s", request_id, exc_info=error)
            is_named = isinstance(error, ValueError | TemplateError) or not isinstance(error, FAULTS[1:4])
            return fault(one_line(error) if is_named else f"malformed request: {type(error).__name__}: {error}")


class CheckedGeneration:
    """A generation manager within `limits`, which refuses what `generate` would before a stream begins."""

    def __init__(self, manager: BaseGenerateManager, limits: Limits):
        self.manager, self.limits = manager, limits

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any) -> Any:
        """Start a stream; `ValueError` if the request is wrong."""
        check_call(model, inputs, gen_config, self.limits)
        wanted = WANTED.get()
        check_form(wanted.form, model, processor, inputs, gen_config)
        if (parser := wanted.stream_parser(processor, inputs)) is not None:
            others["response_parser"] = parser
        return self.manager.generate_streaming(model, processor, formed(inputs, wanted), gen_config, **others)

    def __getattr__(self, name: str) -> Any:
        """The other attributes are the manager's."""
        return getattr(self.manager, name)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any
    ) -> Any:
        """Generate to the end; `ValueError` if the request is wrong, `RuntimeError` if anything else is."""
        bound(model, inputs, gen_config, self.limits)
        try:
            inputs = formed(inputs, WANTED.get())
            return await self.manager.generate_non_streaming(model, processor, inputs, gen_config, **others)
        except ValueError:
            raise
        except FAULTS as error:  # ours, not the client's
            raise RuntimeError(f"generation failed: {type(error).__name__}: {error}") from error


def bound(model: Any, inputs: Any, config: Any, limits: Limits) -> tuple[Any, Any]:
    """End a response at the server's limit, and return `read_prompt`'s; `ValueError` if a setting costs too much."""
    check_cost(model.merge_settings(config, {}), model.config.block_size)
    size, settings = read_prompt(model, inputs, config)
    if settings.max_new_tokens <= limits.max_new_tokens:
        return size, settings
    config.max_new_tokens = limits.max_new_tokens
    return read_prompt(model, inputs, config)


def check_call(model: Any, inputs: Any, config: Any, limits: Limits) -> None:
    """Raise `ValueError` if `generate` would refuse a prompt and settings."""
    size, settings = bound(model, inputs, config, limits)
    check_banned_tokens(model.merge_settings(config, {}), settings, model.config.get_text_config().vocab_size)
    device = inputs["input_ids"].device
    check_fits(model, size, settings, device, free_memory(device))


def check_cost(settings: Any, block_size: int | None) -> None:
    """Raise `ValueError` if a setting makes steps dear for everyone; `block_size` is the checkpoint's."""
    largest = max(MAX_BLOCK, block_size or 0)
    if (settings.block_size or 0) > largest:
        raise ValueError(f"`block_size` may be {largest} at this server, got {settings.block_size}")
    if (settings.no_repeat_ngram_size or 0) > MAX_NGRAM:
        raise ValueError(
            f"`no_repeat_ngram_size` may be {MAX_NGRAM} at this server, got {settings.no_repeat_ngram_size}"
        )
    biased = [ids for ids, _ in settings.sequence_bias or []]
    for name, sequences in (("bad_words_ids", settings.bad_words_ids or []), ("sequence_bias", biased)):
        lengths = [len(ids) for ids in sequences if len(ids) > 1]
        if len(lengths) > MAX_SEQUENCES or max(lengths, default=0) > MAX_SEQUENCE:
            raise ValueError(
                f"`{name}` may hold {MAX_SEQUENCES} sequences of {MAX_SEQUENCE} tokens at this server, got "
                f"{len(lengths)} of {max(lengths)} at most"
            )
    stops = settings.stop_strings or []
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP:
        raise ValueError(
            f"`stop` may hold {MAX_STOPS} texts of {MAX_STOP} characters at this server, got {len(stops)} of "
            f"{max(map(len, stops))} at most"
        )


def check_form(form: Form | None, model: Any, processor: Any, inputs: Any, config: Any) -> None:
    """Raise `ValueError` if `generate` would refuse a form."""
    call = model.read_call(inputs, config, {}, warn=False)
    vocab_size, device = model.config.get_text_config().vocab_size, inputs["input_ids"].device
    check_alone(
        build_form(form, processor, call.settings, call.limits, vocab_size, device),
        build_processors(call.config, call.settings, vocab_size, device),
    )


def formed(inputs: Any, wanted: Wanted) -> Any:
    """The inputs of `generate` with the form beside them."""
    return inputs if wanted.form is None else {**inputs, "structured": wanted.form}


def check_fields(body: dict[str, Any]) -> None:
    """Raise `ValueError` if a request sets what is the server's, or holds what is no text."""
    if not is_text(json.dumps(body, ensure_ascii=False)):
        raise ValueError("the request holds half a character (U+D800 to U+DFFF), which is no text")
    if body.get("seed") is not None:
        check_seed("seed", body["seed"])
    template = body.get("chat_template_kwargs") or {}
    for name in template if isinstance(template, dict) else [template]:
        if name not in TEMPLATE_SETTINGS:
            raise ValueError(f"`chat_template_kwargs` may set {', '.join(TEMPLATE_SETTINGS)}, got {name!r:.80}")
    if body.get("generation_config") is not None:
        settings = json.loads(body["generation_config"])
        if not isinstance(settings, dict):
            raise ValueError(f"`generation_config` must be a JSON object of settings, got {settings!r:.80}")
        for name in (row.name for row in SETTINGS.values() if row.owner != "user"):
            if settings.get(name) is True or settings.get(name) not in (None, False, 1):
                raise ValueError(f"`{name}` is the server's to set, got {settings[name]!r:.80}")


def check_items(messages: list[dict[str, Any]]) -> None:
    """Raise `ValueError` if a chat holds what is no text or picture: `transformers serve` drops it, or opens it."""
    for message in messages:
        for item in message["content"] if isinstance(message.get("content"), list) else []:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in PICTURES and not (kind in TEXTS and isinstance(item.get("text"), str)):
                raise ValueError(f"a content item must be a text or a picture, got {item!r:.80}")


def with_pictures(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """Messages for the processor with their pictures opened, for which they have addresses.

    By Pillow: torchvision, which transformers would decode them by, brings the process down at some that are broken.

    Raises:
        ValueError: a picture cannot be read, or `limits` do not allow it.
    """
    left = limits.max_pixels
    pictures = sum(item["type"] == "image" for message in messages for item in message["content"])
    if pictures > MAX_PICTURES:
        raise ValueError(f"a request may hold {MAX_PICTURES} pictures at this server, got {pictures}")
    for message in messages:
        for item in message["content"]:
            if item["type"] == "image":
                item["image"] = open_picture(read_address(item.pop("url"), limits), left)
                left -= item["image"].width * item["image"].height
    return messages


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A picture of at most `max_pixels`, which its header is asked for first; `ValueError` if it is none."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = picture.width * picture.height
        if pixels <= max_pixels:
            picture.load()
    except Exception as error:  # every format has its own
        raise ValueError(f"a picture cannot be read: {one_line(error).partition(' <')[0]}") from error
    if pixels > max_pixels:
        raise ValueError(f"a picture of {pixels} pixels is too large: this server takes {max_pixels} more of a request")
    return picture


def read_address(address: Any, limits: Limits) -> bytes:
    """The bytes at a picture's address; `ValueError` if it may not be there."""
    if not isinstance(address, str):
        raise ValueError(f"`image_url` must be an address, got {address!r:.80}")
    if limits.allow_addresses and address.startswith(("http://", "https://")):
        return download(address)
    kind, _, data = address.partition(",")
    if not (kind.startswith("data:image/") and kind.endswith(";base64")):
        also = " or an http(s) address" if limits.allow_addresses else ""
        raise ValueError(f"a picture must be `data:image/...;base64,...`{also}, got {address!r:.80}")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a picture cannot be read: {error}") from error


def download(address: str) -> bytes:
    """The bytes at an http(s) address; `ValueError` if there are none, or too many."""
    data = b""
    try:
        with httpx.stream("GET", address, timeout=TIMEOUT, follow_redirects=True) as answer:
            answer.raise_for_status()
            for part in answer.iter_bytes():
                data += part
                if len(data) > MAX_BODY:
                    raise ValueError(f"{address} has more than {MAX_BODY} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{address} cannot be opened: {one_line(error)}") from error
    return data
