"""A conversation about pictures and videos: every turn encodes only what is new."""

from typing import Any

from ..forms_bard_vl import Form
from .session import Answer, Session


class Conversation:
    """The turns so far, the cache that has encoded them, and the form of the answers to come.

    Args:
        session: the checkpoint that answers.
        system: a system prompt.
        form: of the answers; None for any text.
    """

    def __init__(self, session: Session, system: str | None = None, form: Form | None = None):
        self.session, self.form = session, form
        self.head = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[dict[str, Any]] = [*self.head]
        self.attached: list[dict[str, Any]] = []
        self.cache: Any = None

    def attach(self, item: dict[str, Any]) -> None:
        """Show a picture or a video, an item of a message's content, with the next message."""
        self.attached.append(item)

    def ask(self, text: str, **arguments: Any) -> Answer:
        """The answer to `text` and what is attached; other arguments are those of `generate`.

        If that fails, the conversation is as before.

        Raises:
            ValueError: the first turn does not fit into the memory, or `generate` refuses something.
        """
        messages = [*self.messages, {"role": "user", "content": [*self.attached, {"type": "text", "text": text}]}]
        inputs = self.session.encode(messages)
        if self.cache is None:  # a later turn encodes only what is new
            self.session.check_memory(inputs)
        answer = self.session.ask(messages, inputs, past_key_values=self.cache, structured=self.form, **arguments)
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}
        self.messages, self.attached, self.cache = [*messages, reply], [], answer.output.past_key_values
        return answer
