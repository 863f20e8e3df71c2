"""A web page to try a checkpoint: a picture, a question, settings, drafts as they come, and the player of the steps."""

import html
import queue
import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch

from ..app.session import Session
from ..generation_config_bard_vl import DEFAULTS
from ..remasking_bard_vl import REMASKING_RULES
from .page import frame_of
from .recording import Recording

CSS = """
.answer { font-size: 1.15rem; line-height: 1.7; min-height: 9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer .draft { color: var(--body-text-color-subdued); }
.answer .took { display: block; margin-top: 0.8rem; font-size: 0.9rem; opacity: 0.7; }
.answer .error { color: var(--error-text-color); }
.player iframe { border-radius: 12px; }
"""


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


def build_page(session: Session) -> gr.Blocks:
    """The page for a checkpoint."""
    loaded = session.model.generation_config
    stored = {**(loaded.explicit() if loaded else {}), **session.settings.explicit()}
    block_size = stored.get("block_size") or session.config.block_size
    heat = temperature_of(stored)
    longest_answer = stored.get("max_new_tokens", DEFAULTS["max_new_tokens"])
    with gr.Blocks(title=f"Bard-VL: {session.title}", analytics_enabled=False) as page:
        gr.Markdown(f"## {session.title}\nBlocks of {block_size} tokens are written at a time: grey is still a draft.")
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(type="pil", label="Picture", height=340, elem_id="picture")
                prompt = gr.Textbox("Describe the picture.", label="Question", lines=2, elem_id="prompt")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("Settings", open=False):
                    rule = gr.Dropdown(
                        list(REMASKING_RULES),
                        value=stored.get("remasking_strategy", DEFAULTS["remasking_strategy"]),
                        label="Which tokens a step commits (remasking_strategy)",
                    )
                    threshold = gr.Slider(
                        0,
                        1,
                        value=stored.get("confidence_threshold", DEFAULTS["confidence_threshold"]),
                        step=0.01,
                        label="Commit what is more probable than (confidence_threshold)",
                    )
                    steps = gr.Slider(
                        1,
                        max(block_size, 2),
                        value=stored.get("denoising_steps", block_size),
                        step=1,
                        interactive=block_size > 1,
                        label="Steps a block at most (denoising_steps)",
                    )
                    longest = gr.Slider(
                        1,
                        max(1024, longest_answer),
                        value=longest_answer,
                        step=1,
                        label="Longest answer in tokens (max_new_tokens)",
                    )
                    temperature = gr.Slider(0, max(2, heat), value=heat, step=0.05, label="Temperature, 0 is greedy")
            with gr.Column(scale=3):
                answer = gr.HTML(framed(""), label="Answer", elem_id="answer")
        player = gr.HTML("", elem_id="player", elem_classes="player")

        def respond(*given: Any) -> Iterator[tuple[str, Any]]:
            yield from answer_in_steps(session, *given)

        inputs = [picture, prompt, rule, threshold, steps, longest, temperature]
        outputs = [answer, player]
        running = [
            ask.click(respond, inputs, outputs, show_progress="hidden"),
            prompt.submit(respond, inputs, outputs, show_progress="hidden"),
        ]
        stop.click(None, cancels=running)
    return page


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
    picture: Any,
    prompt: str,
    rule: str,
    threshold: float,
    steps: int,
    longest: int,
    temperature: float,
) -> Iterator[tuple[str, Any]]:
    """Answers and players as HTML, as the answer grows; what goes wrong is said in the answer's place."""
    images = [] if picture is None else [picture.convert("RGB")]
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
    settings = {
        "remasking_strategy": rule,
        "confidence_threshold": threshold,
        "denoising_steps": int(steps),
        "max_new_tokens": int(longest),
        "temperature": temperature,
        "do_sample": temperature > 0,
    }
    if not prompt.strip():
        yield framed("", error="Ask something."), ""
        return
    streamer = QueueStreamer()
    outcome: list[Any] = []

    def work() -> None:
        try:
            messages = [{"role": "user", "content": content}]
            outcome.append(session.ask(messages, streamer=streamer, output_history=True, **settings))
        except Exception as error:  # shown on the page
            outcome.append(error)
        streamer.close()

    worker = threading.Thread(target=work, name="bard-vl answer", daemon=True)
    worker.start()
    yield framed(""), ""
    try:
        while (state := streamer.latest()) is not None:
            finished, draft = state
            text = session.processor.decode(finished, skip_special_tokens=True)
            yield framed(text, session.processor.decode_draft(draft)), gr.skip()
    finally:
        streamer.stopped.set()
        worker.join()
    (result,) = outcome
    if isinstance(result, Exception):
        yield framed("", error=" ".join(str(result).split())), ""
        return
    recording = Recording.of(result.output, session.processor, images=images, prompt=prompt, title=session.title)
    yield framed(result.text, took=result.summary()), frame_of(recording)


def framed(text: str, draft: str = "", took: str = "", error: str = "") -> str:
    """The answer as HTML."""
    parts = [("draft", draft), ("took", took), ("error", error)]
    spans = [f'<span class="{name}">{html.escape(part)}</span>' for name, part in parts if part]
    return f'<div class="answer" aria-live="polite"><span class="text">{html.escape(text)}</span>{"".join(spans)}</div>'


__all__ = ["build_page", "serve"]
