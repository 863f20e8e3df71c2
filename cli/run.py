"""`bard-vl run`: one question about pictures or a video, or a question of text alone."""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .ending import Misuse, report
from .options import (
    asks_for_form,
    open_session,
    opens_session,
    print_notices,
    shows_values,
)

if TYPE_CHECKING:
    from bard_vl import MemoryEstimate
    from bard_vl.app.comparison import Compared
    from bard_vl.app.session import Answer, Session
    from bard_vl.forms_bard_vl import Form

OUTPUT = "Output"
QUESTIONS = {"image": "Describe the picture.", "video": "Describe the video."}
"""Questions for a command line without one."""


@opens_session
@asks_for_form
def run(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="Pictures, PDFs and videos, as paths or URLs; a folder is a video of one frame per picture; "
            "report.pdf#2-4 is pages 2 to 4. None: text alone.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to ask; - reads standard input. Default: a description.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Ask about each file alone, one after the other; a PDF page by page.")
    ] = False,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Sampled answers to the question; needs --temperature above 0.")
    ] = None,
    *,
    options: dict[str, Any],
    structured: dict[str, Any] | None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print answer, counts and times as JSON.", rich_help_panel=OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what it would take, without reading weights.", rich_help_panel=OUTPUT),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: whether it fits another machine, with this much free memory, such as 24GB.",
            metavar="SIZE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Ask a decoder of one token per forward too: a Qwen3-VL, or a Bard-VL checkpoint at blocks of 1. "
            "With --gif both race.",
            metavar="PARENT",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that plays the denoising.", rich_help_panel=OUTPUT)
    ] = None,
    gif: Annotated[Path | None, typer.Option(help="Write it as an animation.", rich_help_panel=OUTPUT)] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the answer as a picture, shaded by step.", rich_help_panel=OUTPUT)
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Write the first picture with the boxes or points of the answer.", rich_help_panel=OUTPUT),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No counts on standard error.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Ask about pictures or a video, and watch the answer being written.

    On a terminal the block in progress is grey. Elsewhere the answer alone goes to standard output, what it took to
    standard error.
    """
    check_outputs(html, gif, png, draw)
    one_only = {"html": html, "gif": gif, "png": png, "draw": draw, "compare": compare, "dry-run": dry_run or None}
    check_alone(each, num_samples, [f"--{name}" for name, value in one_only.items() if value is not None])
    prompt = sys.stdin.read().strip() if prompt == "-" else prompt
    if prompt == "" or (prompt is None and not files) or (each and not files):
        raise Misuse("nothing to answer: give a picture, a video or --prompt")
    session = open_session(options, read_memory(memory, dry_run))
    from .media import expand, read

    check_sampling(session, num_samples or 1)
    places, form = expand(files or []), session.read_form(structured)
    asker = Asker(session, prompt, system, form, num_samples or 1, as_json, quiet)
    if each:
        raise typer.Exit(ask_each(asker, places))
    content = [read(place, session.processor) for place in places]
    if draw is not None and not any(item["type"] == "image" for item in content):
        raise Misuse("--draw needs a picture to draw on")
    inputs = session.encode(asker.messages(content))
    if dry_run:
        if not (as_json or quiet):
            print_notices(session)
        estimate = session.estimate(inputs, **asker.rows)
        print_estimate(estimate, session, refusal(asker, inputs), as_json)
        return
    asker.check_memory(inputs)
    if not (as_json or quiet):
        print_notices(session)
    shown = any((html, gif, png))
    answers = asker.ask(content, inputs, output_history=shown)
    compared = ask_other(compare, session, asker.messages(content))
    told: dict[str, Any] = {} if compared is None else {"compared": compared.as_dict()}
    asker.tell(answers, asker.question(content), **told)
    if compared is not None and not (as_json or quiet):
        print(f"{compared.text}\n{compared.summary()}", file=sys.stderr)
    if draw is not None:
        draw_answer(answers[0].text, content, draw)
    if shown:
        write_pictures(session, answers[0], compared, asker.question(content), content, html, gif, png)


EXAMPLES = """\
[bold]Examples[/bold]

bard-vl run photo.jpg

bard-vl run a.jpg b.jpg --prompt "What differs?" --model Bard-VL-4B

bard-vl run clip.mp4 --prompt "What happens?" --max-pixels 4000000

bard-vl run report.pdf#2-4 --prompt "What is the total?" --model Bard-VL-4B

bard-vl run *.jpg --each --prompt "Is there a person?" --choices "yes|no"

bard-vl run photo.jpg --num-samples 3 --temperature 0.8

bard-vl run photo.jpg --json --max-new-tokens 64 > answer.json

bard-vl run photo.jpg --prompt "Which shape?" --choices "circle|square|star"

bard-vl run photo.jpg --html answer.html --gif answer.gif --png answer.png

bard-vl run photo.jpg --dry-run
"""


def draw_answer(text: str, content: list[dict[str, Any]], path: Path) -> None:
    """Write the first picture with the things of an answer drawn on it."""
    from bard_vl.app.boxes import draw_things, find_things, read_things

    picture = next(item["image"] for item in content if item["type"] == "image")
    draw_things(picture, find_things(text, *picture.size) or read_things(text, *picture.size)).save(path)


def check_outputs(*paths: Path | None) -> None:
    """Raise `Misuse` unless every path can be written, before minutes are spent on what goes there."""
    for path in filter(None, paths):
        if not path.parent.is_dir() or path.is_dir():
            raise Misuse(f"{path} cannot be written: {'a folder' if path.is_dir() else 'no such folder'}")


def read_memory(size: str | None, dry_run: bool) -> int | None:
    """Bytes of a size such as `24GB`; `Misuse` if it is none, or states the memory of a real run."""
    if size is None:
        return None
    if not dry_run:
        raise Misuse("--memory goes with --dry-run: a real run takes the memory that is there")
    match = re.fullmatch(r"(\d{1,18})\s*(?:([KMGT])(I?)B)?", size.strip().upper())
    if match is None or int(match[1]) == 0:
        raise Misuse(f"--memory must be bytes or a size such as 24GB, got {size!r}")
    return int(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2]) if match[2] else 0)


def check_alone(each: bool, num_samples: int | None, stated: list[str]) -> None:
    """Raise `Misuse` if options that show one answer meet one that asks for several."""
    several = "--each" if each else f"--num-samples {num_samples}" if (num_samples or 1) > 1 else None
    stated = [name for name in stated if each or name != "--dry-run"]
    if several and stated:
        raise Misuse(f"{several} gives several answers, {stated[0]} is about one: leave one of them out")


def check_sampling(session: "Session", num_samples: int) -> None:
    """Raise `Misuse` if several answers are asked for that would all be the same."""
    if num_samples > 1 and not session.decoding.samples:
        raise Misuse(f"--num-samples {num_samples} would all be the same: give --temperature above 0, such as 0.8")


@dataclass
class Asker:
    """Puts questions, and prints answers.

    Attributes:
        session: that answers.
        prompt: the question; None for one that goes with the pictures.
        system: a system prompt.
        form: of the answer.
        num_samples: answers to each question.
        as_json: print answers with what they took.
        quiet: no counts on standard error.
    """

    session: "Session"
    prompt: str | None
    system: str | None
    form: "Form | None"
    num_samples: int
    as_json: bool
    quiet: bool

    @property
    def rows(self) -> dict[str, int]:
        """The setting that asks for all answers to a question."""
        return {"num_return_sequences": self.num_samples}

    def question(self, content: list[dict[str, Any]]) -> str:
        """The question about pictures and videos."""
        return self.prompt or QUESTIONS[content[0]["type"]]

    def messages(self, content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation that asks it."""
        text = {"type": "text", "text": self.question(content)}
        head = [] if self.system is None else [("system", [{"type": "text", "text": self.system}])]
        return [{"role": role, "content": parts} for role, parts in (*head, ("user", [*content, text]))]

    def check_memory(self, inputs: Any) -> None:
        """Raise `ValueError` if the answers exceed what is free."""
        self.session.check_memory(inputs, **self.rows)

    def ask(self, content: list[dict[str, Any]], inputs: Any, **arguments: Any) -> "list[Answer]":
        """The answers; a single one is printed as it is written, unless something else is printed of it."""
        from bard_vl.app.terminal import DraftStreamer

        silent = self.as_json or shows_values(self.form) or self.num_samples > 1
        streamer = None if silent else DraftStreamer(self.session.processor)
        arguments |= {"streamer": streamer, "structured": self.form, **self.rows}
        return self.session.ask_for_all(self.messages(content), inputs, **arguments)

    def tell(self, answers: "list[Answer]", question: str, indent: int | None = 2, **told: Any) -> None:
        """Print of the answers what was not printed as they were written, and what they took."""
        values = [{} if self.form is None else {"value": self.form.parse(answer.text)} for answer in answers]
        if self.as_json:
            found = [{**answer.as_dict(), **value} for answer, value in zip(answers, values, strict=True)]
            facts: dict[str, Any] = {"model": self.session.name, "prompt": question}
            facts |= found[0] if len(found) == 1 else {"samples": found}
            print(json.dumps({**facts, **told}, ensure_ascii=False, indent=indent), flush=True)
            return
        for number, (answer, value) in enumerate(zip(answers, values, strict=True), start=1):
            if len(answers) > 1:
                print(f"answer {number}:")
            if shows_values(self.form):
                print(json.dumps(value["value"], ensure_ascii=False), flush=True)
            elif len(answers) > 1:
                print(answer.text, flush=True)
            if not self.quiet:
                print(answer.summary(), file=sys.stderr)


def ask_each(asker: Asker, places: list[str]) -> int:
    """Ask about each place alone; the exit code. An error is printed, and the next place asked about."""
    from .media import read

    code = 0
    if not (asker.as_json or asker.quiet):
        print_notices(asker.session)
    for place in places:
        try:
            content = [read(place, asker.session.processor)]
            inputs = asker.session.encode(asker.messages(content))
            asker.check_memory(inputs)
            if not asker.as_json:
                print(f"{place}:", flush=True)
            answers = asker.ask(content, inputs)
        except (OSError, ValueError) as error:
            code = report(error)
            continue
        asker.tell(answers, asker.question(content), indent=None, file=place)
    return code


def refusal(asker: Asker, inputs: Any) -> str | None:
    """Why an answer would be refused for its memory, and what would fit; None if it would not be."""
    from bard_vl.app.errors import one_line

    try:
        asker.check_memory(inputs)
    except ValueError as error:
        return one_line(error)
    return None


def print_estimate(estimate: "MemoryEstimate", session: "Session", refused: str | None, as_json: bool) -> None:
    """Print the memory that an answer takes, and whether it fits."""
    from bard_vl.app.memory import TOLERANCE, readable

    free = session.free_memory()
    fits = None if free is None else "no" if refused else "yes" if estimate.total * TOLERANCE <= free else "perhaps"
    if as_json:
        facts = {
            "model": session.name,
            "device": str(session.device),
            "quantize": session.quantize,
            "free": free,
            "fits": fits,
            "refused": refused,
        }
        print(json.dumps({**facts, **estimate.as_dict()}, indent=2))
        return
    kind = session.quantize or ("its quantisation" if session.is_quantized else None)
    dtype = " and ".join(filter(None, (kind, str(session.dtype).removeprefix("torch."))))
    table = Table(title=f"{session.name} in {dtype}", title_justify="left", box=None, show_header=False, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    most = f"response of {estimate.new_tokens} tokens at most"
    table.add_row("weights", readable(estimate.weights))
    table.add_row("cache", readable(estimate.cache), f"prompt of {estimate.prompt_tokens} tokens, {most}")
    table.add_row("encoding images", readable(estimate.vision), f"{estimate.visual_tokens} visual tokens")
    table.add_row("encoding the prompt", readable(estimate.prefill), "its cache included")
    table.add_row("writing", readable(estimate.decode), "the cache included")
    table.add_row("[bold]in all, at most[/bold]", f"[bold]{readable(estimate.total)}[/bold]", "weights and the largest")
    title = f"free on {session.device}" if session.memory is None else "free, as stated"
    table.add_row(title, "unknown" if free is None else readable(free))
    if fits is not None:
        table.add_row("does it fit", fits, "not at full length, or by a hair" if fits == "perhaps" else "")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if refused:
        print(refused)


def ask_other(name: str | None, session: "Session", messages: list[dict[str, Any]]) -> "Compared | None":
    """The answer of the decoder to compare with; None if none is asked for."""
    if name is None:
        return None
    from bard_vl.app.comparison import ask_parent

    return ask_parent(name, session, messages)


def write_pictures(
    session: "Session",
    answer: "Answer",
    compared: "Compared | None",
    question: str,
    content: list[dict[str, Any]],
    html: Path | None,
    gif: Path | None,
    png: Path | None,
) -> None:
    """Write what shows the denoising of an answer."""
    from bard_vl.viewer import Recording, write_gif, write_html, write_png
    from transformers.image_transforms import to_pil_image

    images = [item["image"] for item in content if item["type"] == "image"]
    images += [to_pil_image(item["video"][0][0]) for item in content if item["type"] == "video"]
    recording = Recording.of(answer.output, session.processor, images=images, prompt=question, title=session.title)
    if gif is not None and compared is not None:
        from bard_vl.viewer.race import token_by_token, write_race

        beside = replace(recording, title=f"{recording.title}, blocks of {recording.block_size}")
        write_race(token_by_token(compared.tokens, compared.name), beside, gif)
        gif = None
    for path, write in ((html, write_html), (gif, write_gif), (png, write_png)):
        if path is not None:
            write(recording, path)
