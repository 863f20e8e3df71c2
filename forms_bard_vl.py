"""Forms that an answer may be asked to have: read, checked, and written as regular expressions.

A form is a list of choices, a regular expression, a JSON schema, or a template with slots.
"""

import contextlib
import json
import string
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex

from .generation_config_bard_vl import check_texts

try:
    import outlines_core
except ImportError:
    outlines_core = None  # type: ignore[assignment]

KINDS = ("choices", "regex", "json_schema", "template")
OTHER_NAMES = {"choice": "choices", "json": "json_schema"}  # vLLM's
GAP = "\ue000"  # stands for white space in an expression of outlines-core's

# The keywords of a schema that outlines-core heeds, and those that say nothing about an instance.
HEEDED = {
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format", "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "definitions"),
    *("minProperties", "maxProperties", "minimum", "maximum"),
}
SILENT = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "strict"}

_STRING = r'"([^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])*"'
_SCALAR = rf"({_STRING}|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-][0-9]+)?|true|false|null)"
_FLAT = rf"({_SCALAR}|\[({_SCALAR}(, {_SCALAR})*)?\]|\{{({_STRING}: {_SCALAR}(, {_STRING}: {_SCALAR})*)?\}})"
ANY_OBJECT = rf"\{{({_STRING}: {_FLAT}(, {_STRING}: {_FLAT})*)?\}}"
"""Any JSON object whose values are scalars, or lists or objects of scalars."""


@dataclass(frozen=True)
class Form:
    """A form, checked.

    Attributes:
        kind: one of `KINDS`.
        value: texts; an expression; a schema; or the parts of a template, texts and pairs (slot's name, its form).
    """

    kind: str
    value: Any

    @classmethod
    def read(cls, given: Any) -> "Form":
        """A form of what a caller says: a mapping with one of `KINDS`, and `slots` beside a template.

        Raises:
            ValueError: it is none, or asks for something that cannot be kept to; the message names it.
        """
        if isinstance(given, Form):
            return given
        if not isinstance(given, dict):
            raise ValueError(f"`structured` must be a mapping with one of {', '.join(KINDS)}, got {given!r:.80}")
        stated: dict[Any, Any] = {name: value for name, value in given.items() if value is not None}
        named = {str(OTHER_NAMES.get(name, name)): value for name, value in stated.items()}
        slots = named.pop("slots", None)
        if len(named) != 1 or not named.keys() <= {*KINDS}:
            raise ValueError(f"`structured` must have one of {', '.join(KINDS)}, got {', '.join(map(repr, given))}")
        [(kind, value)] = named.items()
        if slots is not None and kind != "template":
            raise ValueError(f"`structured` has `slots` beside `{kind}`: they belong to `template`")
        return cls(kind, _READERS[kind](value, slots) if kind == "template" else _READERS[kind](value))

    @property
    def key(self) -> str:
        """The form as a text: equal for equal forms."""
        parts = [[name, None if form is None else form.key] for name, form in self.value] if self.is_template else None
        return json.dumps([self.kind, parts or self.value])

    @property
    def is_template(self) -> bool:
        """Whether it has slots."""
        return self.kind == "template"

    @cached_property
    def expression(self) -> str:
        """The regular expression of the answers that have the form."""
        if self.kind == "choices":
            return "|".join(map(escape, self.value))
        if self.kind == "regex":
            return self.value
        if self.kind == "json_schema":
            return schema_expression(self.value)
        return "".join(escape(name) if form is None else f"(?P<{name}>{form.expression})" for name, form in self.value)

    def parse(self, text: str) -> Any:
        """The value of a complete answer: the text, the JSON value, or the values of the slots by name.

        Raises:
            ValueError: the answer does not have the form, as where a stop string or a time limit cut it.
        """
        if self.kind == "choices":
            if text in self.value:
                return text
        elif (found := regex.fullmatch(self.expression, text)) is not None:
            if self.is_template:
                return {name: form.parse(found[name]) for name, form in self.value if form is not None}
            return json.loads(text) if self.kind == "json_schema" else text
        raise ValueError(f"the answer does not have the form that was asked for: {text!r:.200}")


def _read_choices(value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"`choices` must be a non-empty list of texts, got {value!r:.80}")
    check_texts("choices", list(value))
    return list(dict.fromkeys(value))


def _read_regex(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"`regex` must be a non-empty text, got {value!r:.80}")
    return value


def _read_schema(value: Any) -> dict[str, Any]:
    """The schema of a dictionary, a JSON text, or a pydantic model."""
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError(f"`json_schema` must be a schema, its JSON text or a pydantic model, got {value!r:.80}")
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`json_schema` must be JSON: {error}") from error
    return value


def _read_template(value: Any, slots: Any) -> tuple[tuple[str, Form | None], ...]:
    """The parts of a template, in which `{name}` is a slot, and `{{` and `}}` are braces."""
    if not isinstance(value, str) or not isinstance(slots, dict):
        raise ValueError(f"`template` must be a text with its `slots` beside it, got {value!r:.80} with {slots!r:.80}")
    try:
        pieces = list(string.Formatter().parse(value))
    except ValueError as error:
        raise ValueError(f"`template` {value!r:.80}: {error}") from error
    parts: list[tuple[str, Form | None]] = []
    for text, name, layout, conversion in pieces:
        parts += [(text, None)] if text else []
        if name is None:
            continue
        if not name.isidentifier() or layout or conversion:
            raise ValueError(f"`template` has a slot {name!r}: its name must be an identifier, and nothing else")
        if name not in slots or name in dict(parts):
            raise ValueError(f"`template` names the slot {name!r} {'twice' if name in slots else 'without a form'}")
        parts.append((name, _read_slot(name, slots[name])))
    unused = sorted(slots.keys() - {name for name, form in parts if form is not None})
    if unused:
        raise ValueError(f"`slots` has {unused[0]!r}, which `template` does not name")
    if not parts:
        raise ValueError("`template` is empty")
    return tuple(parts)


def _read_slot(name: str, given: Any) -> Form:
    """The form of a slot; `max_length` and `min_length`, in characters, ask for text without a line break."""
    if isinstance(given, dict) and {"max_length"} <= given.keys() <= {"max_length", "min_length"}:
        low, high = given.get("min_length", 1), given["max_length"]
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in (low, high)) or not 0 <= low <= high > 0:
            raise ValueError(f"the slot {name!r} must have lengths 0 <= min_length <= max_length, got {given}")
        return Form("regex", rf"[^\n\r]{{{low},{high}}}")
    form = Form.read(given)
    if form.is_template:
        raise ValueError(f"the slot {name!r} holds a template: only the outermost form may be one")
    return form


_READERS: dict[str, Any] = {
    "choices": _read_choices,
    "regex": _read_regex,
    "json_schema": _read_schema,
    "template": _read_template,
}


def escape(text: str) -> str:
    """The expression of a text, as Python and Rust read it alike."""
    return "".join(f"\\{letter}" if letter in r"\.+*?()|[]{}^$#&-~" else letter for letter in text)


# --- JSON schemas --------------------------------------------------------------------------------------------------


def schema_expression(schema: dict[str, Any]) -> str:
    """The expression of the JSON texts of a schema, laid out as `json.dumps` does; `{"type": "object"}`: any object."""
    if schema.keys() - SILENT == {"type"} and schema["type"] == "object":
        return ANY_OBJECT
    ranges: list[str] = []
    text = json.dumps(_prepared(schema, ranges), ensure_ascii=False)
    try:
        expression = library().json_schema.build_regex_from_schema(text, GAP)
    except ValueError as error:
        raise ValueError(f"`json_schema`: {str(error).splitlines()[0]}") from error
    for number, between in enumerate(ranges):
        expression = expression.replace(_stand_in(number), between)
    return expression.replace(f":{GAP}", ": ").replace(f",{GAP}", ", ").replace(GAP, "")


def _stand_in(number: int) -> str:
    return str(987_654_321_000 + number)


def _prepared(schema: Any, ranges: list[str]) -> Any:
    """A schema with a number in place of each integer with bounds, whose expression joins `ranges`."""
    if not isinstance(schema, dict):
        return schema
    unknown = sorted(schema.keys() - HEEDED - SILENT)
    if unknown:
        raise ValueError(f"`json_schema`: `{unknown[0]}` cannot be kept to")
    if schema.keys() & {"minimum", "maximum"}:
        bounds: list[Any] = [schema.get("minimum"), schema.get("maximum")]
        if schema.get("type") != "integer" or not all(type(bound) is int for bound in bounds) or bounds[0] > bounds[1]:
            raise ValueError(f"`json_schema`: bounds need `type` integer, and integers on both sides, got {schema}")
        ranges.append(range_expression(*bounds))
        return {"const": int(_stand_in(len(ranges) - 1))}
    found = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(found.get(name), dict):
            found[name] = {key: _prepared(value, ranges) for key, value in found[name].items()}
    for name in ("items", "additionalProperties"):
        found |= {name: _prepared(found[name], ranges)} if name in found else {}
    for name in ("prefixItems", "anyOf", "oneOf"):
        if isinstance(found.get(name), list):
            found[name] = [_prepared(value, ranges) for value in found[name]]
    return found


def range_expression(low: int, high: int) -> str:
    """The expression of the integers from `low` to `high`, without leading zeros."""
    parts = []
    if low < 0:
        parts.append(f"-{range_expression(max(1, -high), -low)}")
    first, last = max(low, 0), high
    for digits in range(len(str(first)), len(str(last)) + 1) if last >= 0 else ():
        smallest = 0 if digits == 1 else 10 ** (digits - 1)
        parts.append(_same_length(str(max(first, smallest)), str(min(last, 10**digits - 1))))
    return f"({'|'.join(parts)})"


def _same_length(low: str, high: str) -> str:
    if not low:
        return ""
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    rest = len(low) - 1
    parts = []
    begin, end = int(low[0]), int(high[0])
    if low[1:] != "0" * rest:
        parts.append(low[0] + _same_length(low[1:], "9" * rest))
        begin += 1
    if high[1:] != "9" * rest:
        parts.append(high[0] + _same_length("0" * rest, high[1:]))
        end -= 1
    if begin <= end:
        parts.append(f"[{begin}-{end}]" + "[0-9]" * rest)
    return f"({'|'.join(parts)})"


def library() -> Any:
    """outlines-core; `ValueError` where it is missing."""
    if outlines_core is None:
        raise ValueError("`structured` needs outlines-core for this form: pip install 'bard-vl[structured]'")
    return outlines_core
