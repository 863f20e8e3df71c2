"""The form that a request asks its answer to have, and the calls of functions that come back.

`response_format` and `tool_choice` of OpenAI's protocol, which `transformers serve` leaves out. A call is written as
Qwen's chat template teaches it: `<tool_call>`, an object with `name` and `arguments`, `</tool_call>`.
"""

import contextlib
import json
import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from ..forms_bard_vl import Form, escape, schema_expression

MAX_SCHEMA = 20_000  # characters
BOUNDS, MAX_BOUND = ("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"), 200
OPENING, CLOSING = "<tool_call>\n", "\n</tool_call>"
CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
STREAMED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}
"""The pattern by which transformers' parser of responses finds calls in a stream."""


@dataclass(frozen=True)
class Wanted:
    """The form that a request asks for.

    Attributes:
        form: that it must have, None for any.
        tools: functions that it may call, None for none.
    """

    form: Form | None = None
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Wanted":
        """The form that a request's body asks for; `ValueError` names a part that cannot be met."""
        tools, choice = body.get("tools") or None, body.get("tool_choice") or "auto"
        if tools is not None and choice == "none":
            tools = None
        if tools is None:
            if isinstance(choice, dict) or choice == "required":
                raise ValueError(f"`tool_choice` is {choice!r:.80}, and there are no `tools`")
            return cls(read_format(body.get("response_format")))
        functions = dict(map(read_tool, tools))
        if choice == "auto":
            return cls(read_format(body.get("response_format")), tools)
        if choice != "required":
            name = (choice.get("function") or choice).get("name") if isinstance(choice, dict) else choice
            if name not in functions:
                raise ValueError(f"`tool_choice` names {name!r:.80}, which is none of `tools`: {', '.join(functions)}")
            functions = {name: functions[name]}
        calls = (call_expression(name, parameters) for name, parameters in functions.items())
        return cls(Form("regex", "|".join(f"({call})" for call in calls)), tools)

    def stream_parser(self, processor: Any, inputs: Any) -> Any:
        """transformers' parser of a stream with calls in it; None where none may come, or it has no such parser."""
        if self.tools is not None:
            with contextlib.suppress(ImportError):
                from transformers.utils.chat_parsing import ResponseParser

                prompt = processor.decode(inputs["input_ids"][0].tolist())
                return ResponseParser(STREAMED, prefix=prompt, tools=self.tools)
        return None

    def with_calls(self, answer: Any) -> Any:
        """An answer of the chat completions with its calls as such."""
        if self.tools is None or not isinstance(answer, JSONResponse):
            return answer
        told = json.loads(bytes(answer.body))
        for choice in told.get("choices", []):
            message = choice.get("message") or {}
            content = message.get("content") or ""
            try:
                calls = [json.loads(text) for text in CALL.findall(content)]
                functions = [
                    {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
                    for call in calls
                ]
            except (ValueError, TypeError, KeyError):  # no call that can be made: text
                continue
            if functions:
                named = enumerate(functions)
                message["tool_calls"] = [
                    {"id": f"{told['id']}_tool_call_{n}", "type": "function", "function": each} for n, each in named
                ]
                message["content"] = CALL.sub("", content).strip() or None
                choice["finish_reason"] = "tool_calls"
        return JSONResponse(told)


WANTED: ContextVar[Wanted] = ContextVar("wanted", default=Wanted())  # noqa: B039  # it cannot be changed
"""The form of the request that is being handled."""


def check_size(schema: Any) -> None:
    """Raise `ValueError` if the automaton of a schema could be so large that others would wait for it."""
    if (length := len(json.dumps(schema))) > MAX_SCHEMA:
        raise ValueError(f"a schema may have {MAX_SCHEMA} characters at this server, got {length}")
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts.extend(part)
        elif isinstance(part, dict):
            parts.extend(part.values())
            for name in BOUNDS:
                if isinstance(part.get(name), int) and part[name] > MAX_BOUND:
                    raise ValueError(f"`{name}` may be {MAX_BOUND} at this server, got {part[name]}")


def read_format(given: Any) -> Form | None:
    """The form of a `response_format`; None for text."""
    kind = given.get("type") if isinstance(given, dict) else given
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return Form.read({"json_schema": {"type": "object"}})
    if kind == "json_schema":
        named = given.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise ValueError(f"`response_format` must have a `json_schema` with a `schema`, got {given!r:.80}")
        check_size(schema)
        return Form.read({"json_schema": schema})
    raise ValueError(f"`response_format` must be text, json_object or json_schema, got {kind!r:.80}")


def read_tool(tool: Any) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a function."""
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    name, parameters = function.get("name"), function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(name, str) or not isinstance(parameters, dict):
        raise ValueError(f"`tools` must be functions with a `name` and `parameters`, got {tool!r:.80}")
    check_size(parameters)
    return name, parameters


def call_expression(name: str, parameters: dict[str, Any]) -> str:
    """The expression of a call of a function."""
    begin = f'{OPENING}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
    given = parameters if parameters.get("properties") else None
    arguments = r"\{\}" if given is None else f"({schema_expression(given)})"
    return f"{escape(begin)}{arguments}{escape('}' + CLOSING)}"
