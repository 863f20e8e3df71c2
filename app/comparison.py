"""A token per forward: the answer of an autoregressive model, or of a checkpoint at blocks of 1, to compare with."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..generation_config_bard_vl import BardVLGenerationConfig
from .errors import UsageError, one_line
from .session import Session
from .terminal import counted


@dataclass(frozen=True)
class Compared:
    """The answer of a decoder of one token per forward.

    Attributes:
        name: of the checkpoint.
        text: the response without special tokens.
        tokens: the text of each token.
        num_forwards: of the language model, counted as they ran.
        seconds: of the whole call.
    """

    name: str
    text: str
    tokens: list[str]
    num_forwards: int
    seconds: float

    def summary(self) -> str:
        """Tokens, forwards and time, in a line."""
        number = len(self.tokens)
        took = f"{counted(number, 'token')} in {counted(self.num_forwards, 'forward')}, {self.seconds:.1f} s"
        return f"{self.name}: {took}, {number / self.seconds:.0f} tokens/s"

    def as_dict(self) -> dict[str, Any]:
        """The facts that `--json` prints."""
        number = len(self.tokens)
        numbers = {"num_tokens": number, "num_forwards": self.num_forwards, "seconds": self.seconds}
        return {"model": self.name, "response": self.text, **numbers, "tokens_per_second": number / self.seconds}


def ask_parent(name: str, session: Session, messages: list[dict[str, Any]]) -> Compared:
    """Answer a conversation one token per forward, greedily.

    Args:
        name: folder or Hub id of a Qwen3-VL, which answers by transformers' own `generate`; or of a Bard-VL checkpoint,
            which answers in blocks of 1.
        session: whose device, dtype and longest response are taken.
        messages: as of `Session.ask`.

    Raises:
        UsageError: it is neither.
    """
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise UsageError(f"--compare {name} cannot be read: {one_line(error)[:200]}") from error
    if kind not in ("qwen3_vl", "bard_vl"):
        raise UsageError(f"--compare takes a Qwen3-VL or Bard-VL checkpoint, {name} is {kind}")
    longest = session.longest(session.encode(messages))
    dtype = str(session.dtype).removeprefix("torch.")
    if kind == "bard_vl":
        settings = BardVLGenerationConfig(block_size=1, max_new_tokens=longest)
        other = Session(name, settings, device=str(session.device), dtype=dtype)
        answer = other.ask(messages)
        ids = answer.output.sequences[0, answer.prompt_length :].tolist()
        tokens = [other.processor.tokenizer.decode([token_id]) for token_id in ids]
        return Compared(f"{other.title}, blocks of 1", answer.text, tokens, answer.num_forwards, answer.seconds)
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=session.dtype).to(session.device).eval()
    inputs = session.encode(messages, processor).to(session.device)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    start = time.perf_counter()
    with torch.no_grad():
        sequences = model.generate(**inputs, do_sample=False, max_new_tokens=longest)
    seconds = time.perf_counter() - start
    ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    tokens = [processor.tokenizer.decode([token_id]) for token_id in ids]
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return Compared(name.rstrip("/").rpartition("/")[2], text, tokens, len(forwards), seconds)
