"""A web page to try a checkpoint: a picture, a conversation, settings, drafts as they come, the player, downloads."""

import html
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..app.checkpoints import PICTURES, QUESTIONS
from ..app.conversation import Conversation
from ..app.errors import UsageError
from ..app.session import Session, build_settings
from ..generation_config_bard_vl import DEFAULTS, SETTINGS
from .page import frame_of, write_html
from .picture import write_gif
from .recording import Recording

CSS = """
.answer, .asked { white-space: pre-wrap; overflow-wrap: anywhere; }
.answer .draft, .answer .took { color: color-mix(in srgb, var(--body-text-color) 70%, transparent); }
.answer .took { display: block; margin-top: 0.5rem; font-size: 0.85rem; }
.answer .error { color: var(--error-text-color); }
.player iframe { border-radius: 12px; }
.buttons { flex-wrap: wrap; }
.buttons > button { flex-basis: auto; min-width: max-content !important; padding-inline: var(--size-2); }
"""
# The player tells how high it is. One that is higher than the window scrolls, so that its buttons stay in view.
SCRIPT = """() => addEventListener("message", ({ data, source }) => {
  const frame = document.querySelector(".player iframe");
  if (frame?.contentWindow === source && data.playerHeight > 0)
    frame.style.height = `${Math.min(data.playerHeight, Math.max(innerHeight, LEAST))}px`;
})"""
KNOWN = (
    "This is the small example. It knows pictures like those to try, and the four questions below, word for word. It "
    "answers each alone, and to anything else it says anything. `bard-vl demo --model` names another checkpoint."
)
PLAYER_HEIGHT = 640  # pixels, until the player has told its own
# The settings that have a control of their own, with its label; the text below them takes every other.
CONTROLS = {
    "remasking_strategy": "Which tokens a step commits",
    "confidence_threshold": "Commit what is more probable than",
    "denoising_steps": "Steps per block at most",
    "max_new_tokens": "Longest answer in tokens",
    "temperature": "Temperature, 0 is greedy",
}
KEPT_S = 3600  # of a conversation with nobody at the page; and of files that were downloaded
Turn = dict[str, Any]  # a message of the chat


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class QueueStreamer:
    """Queues (finished ids, draft ids) as they come; told to stop, it raises `Stopped` inside `generate`."""

    def __init__(self) -> None:
        self.states: queue.Queue[Any] = queue.Queue()
        self.stopped = threading.Event()
        self.finished: list[int] | None = None  # None until the prompt has come

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each finished block."""
        if self.finished is None:
            self.finished = []
            return
        self.finished += value.flatten().tolist()
        self.tell([])

    def put_draft(self, value: torch.Tensor) -> None:
        """Take the block in progress."""
        self.tell(value.flatten().tolist())

    def end(self) -> None:
        """The caller of `generate` says when it has ended."""

    def tell(self, draft: list[int]) -> None:
        """Hand the present state on."""
        if self.stopped.is_set():
            raise Stopped
        self.states.put((list(self.finished or []), draft))

    def close(self) -> None:
        """Say that no state will follow."""
        self.states.put(None)

    def latest(self) -> tuple[list[int], list[int]] | None:
        """Wait for a state; the latest that is there, since a page is slower than a small model. None at the end."""
        state = self.states.get()
        while state is not None and not self.states.empty():
            state = self.states.get()
        return state


@dataclass
class Talk:
    """The conversation of one visitor.

    Attributes:
        conversation: that the model has seen.
        picture: that it is about.
        turns: as the chat shows them, those that failed or were stopped included.
        recording: of the last answer; None if there is none.
    """

    conversation: Conversation
    picture: Any = None
    turns: list[Turn] = field(default_factory=list)
    recording: Recording | None = None

    def begin(self) -> None:
        """Forget what was said, and show the model the picture with the next question."""
        self.conversation.reset()
        if self.picture is not None:
            self.conversation.attach({"type": "image", "image": self.picture})


def build_page(session: Session, pictures: Sequence[str | Path] = ()) -> gr.Blocks:
    """The page for a checkpoint, with pictures to try it on; by default those of the repository."""
    loaded = session.model.generation_config
    stored = {**(loaded.explicit() if loaded else {}), **session.settings.explicit()}
    block_size = stored.get("block_size") or session.config.block_size
    gallery = [[str(path)] for path in pictures or sorted(PICTURES.glob("*.png"))]
    with gr.Blocks(
        title=f"Bard-VL: {session.title}", analytics_enabled=False, fill_width=True, delete_cache=(KEPT_S, KEPT_S)
    ) as page:
        gr.Markdown(f"## {session.title}\nBlocks of {block_size} tokens are written at a time: grey is still a draft.")
        if session.is_example:
            gr.Markdown(KNOWN, elem_id="known")
        talk = gr.State(None, time_to_live=KEPT_S)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                first = gallery[0][0] if session.is_example and gallery else None
                picture = gr.Image(first, type="pil", label="Picture", height=340, elem_id="picture")
                if gallery:
                    gr.Examples(gallery, picture, label="Pictures to try", elem_id="gallery")
                settings = add_settings(stored, block_size)
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    height=400, elem_id="chat", label="Conversation", buttons=[], group_consecutive_messages=False
                )
                prompt = gr.Textbox(QUESTIONS[0], label="Question", max_lines=6, elem_id="prompt", autofocus=True)
                if session.is_example:
                    gr.Examples([[question] for question in QUESTIONS], prompt, label="Questions", elem_id="questions")
                with gr.Row(elem_classes="buttons"):
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                    restart = gr.Button("Start over", elem_id="restart")
                player = gr.HTML("", elem_id="player", elem_classes="player")
                with gr.Row(elem_classes="buttons"):
                    files = [
                        gr.DownloadButton(f"Download {kind}", visible=False, elem_id=name)
                        for kind, name in (("page", "download-page"), ("GIF", "download-gif"))
                    ]

        def respond(*given: Any) -> Iterator[tuple[Any, ...]]:
            yield from answer_in_steps(session, *given)

        shown = [talk, chat, prompt, player]
        running = [
            begin(respond, [talk, picture, prompt, *settings], shown, show_progress="hidden")
            for begin in (ask.click, prompt.submit)
        ]
        for answered in running:
            answered.success(files_of, talk, files, show_progress="hidden")
        stop.click(None, cancels=running)
        for begin in (restart.click, chat.clear):
            begin(restarted, None, [*shown, *files], cancels=running, show_progress="hidden")
    return page


def add_settings(stored: dict[str, Any], block_size: int) -> list[Any]:
    """The controls of generation, from what is stated: those of `CONTROLS`, then a text for other settings."""
    shown = {**DEFAULTS, "denoising_steps": block_size, **stored, "temperature": temperature_of(stored)}
    longest = {"denoising_steps": max(block_size, 2), "max_new_tokens": 1024, "temperature": 2}  # of the sliders
    with gr.Accordion("Settings", open=False):
        controls = [add_control(name, shown[name], longest.get(name, 1)) for name in CONTROLS]
        others = gr.Textbox("", label="Other settings, NAME=VALUE, one per line", lines=2, elem_id="others")
    return [*controls, others]


def add_control(name: str, value: Any, longest: float) -> Any:
    """The control of a setting, within what the table allows; a slider goes up to `longest`, or to a larger `value`."""
    allowed, label = SETTINGS[name].allowed, f"{CONTROLS[name]} ({name})"
    if "choices" in allowed:
        return gr.Dropdown(allowed["choices"], value=value, label=label)
    step, least = (1, allowed["minimum"]) if "minimum" in allowed else (0.01, allowed["low"])
    return gr.Slider(least, max(longest, value), value=value, step=step, label=label)


def read_controls(values: Sequence[Any]) -> dict[str, Any]:
    """The settings that the values of `add_settings` state; `UsageError` if one is wrong. The text may be missing."""
    named = dict(zip(CONTROLS, values, strict=False))
    named = {name: int(value) if "minimum" in SETTINGS[name].allowed else value for name, value in named.items()}
    others = [line.strip() for text in values[len(CONTROLS) :] for line in (text or "").splitlines() if line.strip()]
    for name in (line.partition("=")[0] for line in others):
        if name in SETTINGS and SETTINGS[name].owner != "user":
            raise UsageError(f"`{name}` is the server's to set")
    return {"do_sample": named["temperature"] > 0, **build_settings(named, others).explicit()}


def temperature_of(settings: dict[str, Any]) -> float:
    """The temperature that settings amount to, as in `generate`."""
    if settings.get("do_sample") is False:
        return 0.0
    return settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0)


def serve(page: gr.Blocks, host: str, port: int, wait: bool = True) -> str:
    """Serve the page at an address, port 0 being any that is free, until interrupted or at once; return its URL."""
    _, url, _ = page.queue().launch(
        server_name=host,
        server_port=port or None,
        prevent_thread_lock=True,
        quiet=True,
        css=CSS,
        js=SCRIPT.replace("LEAST", str(PLAYER_HEIGHT)),
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
        footer_links=[],
    )
    print(f"serving on {url}", flush=True)
    if wait:
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return url


def answer_in_steps(
    session: Session,
    talk: Talk | None,
    picture: Any,
    prompt: str,
    *values: Any,
) -> Iterator[tuple[Any, ...]]:
    """The talk, its chat, the question's box and the player as HTML, as the answer grows; `values` are the settings'.

    A new picture begins a new talk. Errors are shown in the answer's place.
    """
    shown = None if picture is None else picture.convert("RGB")
    if talk is None or talk.picture != shown:
        talk = Talk(Conversation(session), shown)
        talk.begin()
    elif session.is_example:  # which knows no second question
        talk.begin()
    talk.recording = None
    if not prompt.strip():
        yield talk, [*talk.turns, said("assistant", framed("", error="Ask something."))], gr.skip(), ""
        return
    reply = said("assistant", framed(""))
    talk.turns += [said("user", f'<div class="asked">{html.escape(prompt)}</div>'), reply]
    yield talk, list(talk.turns), "", ""
    streamer = QueueStreamer()
    outcome: list[Any] = []

    def work() -> None:
        try:
            settings = read_controls(values)
            outcome.append(talk.conversation.ask(prompt, streamer=streamer, output_history=True, **settings))
        except Exception as error:  # shown on the page
            outcome.append(error)
        streamer.close()

    worker = threading.Thread(target=work, name="bard-vl answer", daemon=True)
    worker.start()
    try:
        while (state := streamer.latest()) is not None:
            finished, draft = state
            text = session.processor.decode(finished, skip_special_tokens=True)
            reply["content"] = gr.HTML(framed(text, session.processor.decode_draft(draft)))
            yield gr.skip(), list(talk.turns), gr.skip(), gr.skip()
    finally:
        streamer.stopped.set()
        worker.join()
    (result,) = outcome
    if isinstance(result, Exception):
        reply["content"] = gr.HTML(framed("", error=" ".join(str(result).split())))
        yield gr.skip(), list(talk.turns), gr.skip(), gr.skip()
        return
    images = [] if talk.picture is None else [talk.picture]
    talk.recording = Recording.of(result.output, session.processor, images=images, prompt=prompt, title=session.title)
    reply["content"] = gr.HTML(framed(result.text, took=result.summary()))
    beside = replace(talk.recording, images=[])  # the page shows the picture already
    yield gr.skip(), list(talk.turns), gr.skip(), frame_of(beside, PLAYER_HEIGHT)


def files_of(talk: Talk | None) -> Iterator[tuple[Any, Any]]:
    """The downloads of the last answer, a page and an animation; hidden if there is none."""
    if talk is None or talk.recording is None:
        yield hidden()
        return
    with tempfile.TemporaryDirectory() as folder:  # until gradio has copied the files
        page, animation = Path(folder, "answer.html"), Path(folder, "answer.gif")
        write_html(talk.recording, page)
        write_gif(talk.recording, animation)
        yield gr.DownloadButton(value=page, visible=True), gr.DownloadButton(value=animation, visible=True)


def restarted() -> tuple[Any, ...]:
    """The page of a new conversation."""
    return (None, [], gr.skip(), "", *hidden())


def hidden() -> tuple[Any, Any]:
    """Both downloads while there is nothing to download."""
    return gr.DownloadButton(visible=False), gr.DownloadButton(visible=False)


def said(role: str, content: str) -> Turn:
    """A message of the chat, as HTML."""
    return {"role": role, "content": gr.HTML(content)}


def framed(text: str, draft: str = "", took: str = "", error: str = "") -> str:
    """The answer as HTML."""
    parts = [("draft", draft), ("took", took), ("error", error)]
    spans = [f'<span class="{name}">{html.escape(part)}</span>' for name, part in parts if part]
    return f'<div class="answer" aria-live="polite"><span class="text">{html.escape(text)}</span>{"".join(spans)}</div>'
