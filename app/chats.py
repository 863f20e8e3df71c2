"""The checks of a chat before it is answered, from any source."""

from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_chat(messages: Any) -> None:
    """Raise `ValueError` unless it is a list of turns that say who speaks, the last of which asks for an answer.

    The processor reads the content of the turns.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` must be a list of turns with something in it, got {messages!r:.80}")
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise ValueError(f"a turn of `messages` must have a `role` of {', '.join(ROLES)}, got {turn!r:.80}")
        if not isinstance(turn.get("content"), str | list) and not turn.get("tool_calls"):
            raise ValueError(f"the `content` of a turn must be a text or a list of items, got {turn!r:.80}")
    if messages[-1]["role"] == "assistant":
        raise ValueError("`messages` ends with the assistant's turn: nothing asks for an answer")


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: half a character of UTF-16, as JSON may name it, is none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
