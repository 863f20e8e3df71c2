"""`bard-vl chat`: a conversation about pictures, each turn encoding only what is new."""

import contextlib
import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .ending import report
from .options import (
    asks_for_form,
    open_session,
    opens_session,
    print_notices,
    read_form_line,
    shows_values,
)

if TYPE_CHECKING:
    from bard_vl.app.conversation import Conversation

COMMANDS = {
    "/image PATH": "show a picture with the next message; also /video",
    "/form OPTIONS": "answers have a form from here on, such as /form --choices yes|no; /form alone: none",
    "/reset": "forget the conversation",
    "/help": "list these",
    "/quit": "leave; so does the end of input",
}


@opens_session
@asks_for_form
def chat(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Pictures, PDFs and videos of the first message.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    *,
    options: dict[str, Any],
    structured: dict[str, Any] | None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No counts on standard error.")] = False,
) -> None:
    """Talk about pictures: every turn encodes only what is new, pictures once.

    A line is a message. Ctrl-C stops an answer, and the program where nothing is being written. Where standard input
    is no terminal, the first failure ends the program.
    """
    session = open_session(options)
    from bard_vl.app.conversation import Conversation

    conversation = Conversation(session, system, session.read_form(structured))
    if not quiet:
        print_notices(session)
    attach(conversation, files or [])
    is_live = sys.stdin.isatty()
    if is_live:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited and recalled
        print("  ".join(f"{command}: {text}" for command, text in COMMANDS.items()), file=sys.stderr)
    while (line := read_line(is_live)) is not None:
        try:
            if obey(conversation, line.strip(), quiet):
                return
        except KeyboardInterrupt:
            if not is_live:
                raise
            print("\nstopped", file=sys.stderr)
        except Exception as error:
            if not is_live:
                raise
            report(error)


EXAMPLES = """\
[bold]In the conversation[/bold]

/image PATH, /video PATH: show it with the next message. /reset: forget the conversation. /quit: leave.

/form --choices "yes|no", or another option of the form: answers have it from here on; /form alone: none.

[bold]Examples[/bold]

bard-vl chat photo.jpg

bard-vl chat photo.jpg --json-schema boxes

printf '/image photo.jpg\\nWhat is it?\\nWhat colour is it?\\n' | bard-vl chat --quiet
"""


def read_line(is_live: bool) -> str | None:
    """The next line of standard input, None behind the last."""
    try:
        return input("> " if is_live else "")
    except EOFError:
        return None


def attach(conversation: "Conversation", places: list[str]) -> None:
    """Show pictures and videos with the next message; `ValueError` if one cannot be read."""
    from .media import expand, read

    for place in expand(places):
        conversation.attach(read(place, conversation.session.processor))


def say(conversation: "Conversation", text: str) -> str:
    """Print the answer to a message as it is written, or the values of its form; what it took, in a line."""
    from bard_vl.app.terminal import DraftStreamer

    form, processor = conversation.form, conversation.session.processor
    streamer = None if shows_values(form) else DraftStreamer(processor)
    try:
        answer = conversation.ask(text, streamer=streamer)
    except BaseException:
        if streamer is not None:
            streamer.clear_draft()
        raise
    value = None if form is None else form.parse(answer.text)
    if streamer is None:
        print(json.dumps(value, ensure_ascii=False))
    return answer.summary()


def obey(conversation: "Conversation", line: str, quiet: bool) -> bool:
    """Do what a line says; whether it ends the program."""
    word, _, rest = line.partition(" ")
    if word in ("/image", "/video"):
        attach(conversation, shlex.split(rest))
    elif word == "/form":
        conversation.form = conversation.session.read_form(read_form_line(rest))
    elif word == "/reset":
        conversation.reset()
    elif word == "/help":
        print("\n".join(f"{command:12} {text}" for command, text in COMMANDS.items()), file=sys.stderr)
    elif word == "/quit":
        return True
    elif word.startswith("/"):
        raise ValueError(f"unknown command {word}; /help lists them")
    elif line:
        took = say(conversation, line)
        if not quiet:
            print(took, file=sys.stderr)
    return False
