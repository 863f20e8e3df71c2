"""Cost and use of a form: valid answers, exact answers, tokens and forwards, time of a step.

    python benchmarks/structured.py --json benchmarks/results/structured.json [--part validity exactness cost]

`validity` asks for answers in each form, of the small example and of the same model untrained, at temperature 1.5.
`exactness` asks the small example for captions with and without their grammar as a form, by block size. `cost` times
the search of a step at Qwen's vocabulary beside a forward of a block through 100M parameters, in processor seconds.
Parts that are not run again stay in the file.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bard_vl import BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.evaluation import scenes
from bard_vl.evaluation.cells import Decoding
from bard_vl.evaluation.experiment import decode, encode
from bard_vl.evaluation.score_checkpoint import CHECKPOINT, SCENES_SEED
from bard_vl.forms_bard_vl import Form
from bard_vl.remasking_bard_vl import REMASKING_RULES, Chooser, Sampling
from bard_vl.spelling_bard_vl import Spelling
from bard_vl.structured_bard_vl import BlockForm, Place
from measuring import environment

BATCH = 250
COLOURS, SHAPES = ("|".join(each) for each in (scenes.COLOURS, scenes.SHAPES))
THING = f"at [a-d][1-4] a (large|small) ({COLOURS}) ({SHAPES})"
CAPTION = (
    f"There are (three|four|five) shapes: {THING}(, {THING}){{1,3}} and {THING}\\."
    f"( The word ({'|'.join(scenes.WORDS)}) is written in row [1-4], in ({COLOURS})\\.)?"
)
BOXES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "bbox_2d": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 1000},
                "minItems": 4,
                "maxItems": 4,
            },
            "label": {"enum": list(scenes.SHAPES)},
        },
        "required": ["bbox_2d", "label"],
    },
    "maxItems": 2,
}
FORMS: dict[str, dict[str, Any]] = {
    "choices": {"choices": list(scenes.SHAPES)},
    "regex": {"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"},
    "json_schema": {"json_schema": BOXES},
    "template": {
        "template": "The shape is a {shape} in {cell}: {remark}.",
        "slots": {
            "shape": {"choices": list(scenes.SHAPES)},
            "cell": {"regex": "[a-d][1-4]"},
            "remark": {"max_length": 6},
        },
    },
}


def validity(number: int) -> list[dict[str, Any]]:
    """Answers of each form that have it, of `number`: half by the small example, half by it untrained."""
    processor = BardVLProcessor.from_pretrained(CHECKPOINT)
    trained = BardVLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    torch.manual_seed(0)
    untrained = BardVLForConditionalGeneration._from_config(trained.config, dtype=torch.float32).eval()
    found = []
    for name, structured in FORMS.items():
        form, counts = Form.read(structured), {"valid": 0, "answers": 0, "tokens": 0, "forwards": 0, "dictated": 0}
        for turn in range(number // BATCH):
            model, size = (trained, untrained)[turn % 2], (4, 16, 32)[turn % 3]
            prompt = torch.randint(20, 380, (BATCH, 12), generator=torch.Generator().manual_seed(turn))
            output = model.generate(
                prompt, structured=form, tokenizer=processor, block_size=size, temperature=1.5, seed=turn,
                max_new_tokens=80, confidence_threshold=0.5, return_dict_in_generate=True,
            )  # fmt: skip
            for row in output.sequences[:, prompt.shape[1] :].tolist():
                counts["valid"] += is_valid(form, processor.decode(row, skip_special_tokens=True))
                counts["answers"] += 1
            counts["tokens"] += int(output.num_tokens.sum())
            counts["dictated"] += int(output.dictated.sum())
            counts["forwards"] += int(output.block_step_counts.sum())
        found.append({"form": name, **counts})
        print(found[-1], flush=True)
    return found


def is_valid(form: Form, text: str) -> bool:
    """Whether a text has a form."""
    try:
        form.parse(text)
    except ValueError:
        return False
    return True


def exactness(number: int) -> list[dict[str, Any]]:
    """Exact captions and tokens per forward of `number` scenes, with and without a form, by block size and steps."""
    processor = BardVLProcessor.from_pretrained(CHECKPOINT)
    model = BardVLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    chats = scenes.conversations(True, SCENES_SEED, number)[::2]
    samples = [encode(processor, model.config, [chat])[0] for chat in chats]
    form, found = Form.read({"regex": CAPTION}), []
    for size in (4, 8, 16, 32):
        for threshold in (0.9, 0.3):
            for structured in (None, form):
                how = {"structured": structured, "tokenizer": processor, "block_size": size}
                responses, speed = decode(model, samples, Decoding(threshold), **how)
                texts = [processor.decode(row, skip_special_tokens=True) for row in responses.tolist()]
                found.append({
                    "block_size": size,
                    "threshold": threshold,
                    "form": structured is not None,
                    "valid": sum(is_valid(form, text) for text in texts),
                    "exact": sum(text == told for text, (_, _, told) in zip(texts, chats, strict=True)),
                    "answers": len(texts),
                    "tokens_per_forward": round(float(speed.mean()), 2),
                })  # fmt: skip
                print(found[-1], flush=True)
    return found


def cost(repetitions: int) -> list[dict[str, Any]]:
    """Processor milliseconds of the search of a step, of a forward of the block, and of building the automaton."""
    from shapes import SHAPES as MODELS
    from shapes import build_model
    from transformers import AutoTokenizer

    folder = qwen_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab_size, eos, mask = 151_936, 151_645, 151_671
    spelling, found = Spelling(tokenizer, vocab_size, eos), []
    forms = {
        "choices": FORMS["choices"],
        "a quoted text": {"regex": '"[^"\\n]*"'},
        "two open strings": object_of({name: {"type": "string"} for name in "ab"}),
        "ten open strings": object_of({name: {"type": "string"} for name in "abcdefghij"}),
        "boxes": FORMS["json_schema"],
        "a string of 20": object_of({"a": {"type": "string", "maxLength": 20}}),
    }
    spelling.automaton(Form.read({"regex": "a"}))  # reads the tokens: once per tokenizer, not of a form
    model = build_model(MODELS["100m"], torch.device("cpu"), torch.float32, 0).eval()
    text_model = model.model.language_model
    measure = REMASKING_RULES["low_confidence_dynamic"].measure
    greedy, sampling = (Chooser(mask, Sampling(temperature), measure, False) for temperature in (0.0, 1.0))
    for name, structured in forms.items():
        built = cpu_seconds(functools.partial(spelling.automaton, Form.read(structured)), 1)
        automaton = spelling.automaton(Form.read(structured))
        form = BlockForm([automaton], torch.device("cpu"))
        for size in (4, 8, 16, 32):
            logits = torch.randn(1, size, vocab_size)
            held = torch.full((1, size), mask)
            place = Place(*(torch.tensor([n]) for n in (0, size, 200)))
            embeds = torch.randn(1, size, MODELS["100m"].hidden_size)
            seen = torch.ones(1, 1, size, size, dtype=torch.bool)

            def search(
                chooser: Chooser, form: Any = form, logits: Any = logits, held: Any = held, place: Any = place
            ) -> None:
                form.choose(logits, held, place, chooser)
                form.dictates(held, place, mask)

            def plain(chooser: Chooser, logits: Any = logits, held: Any = held) -> None:
                chooser.choose(logits, held)

            def forward(embeds: Any = embeds, seen: Any = seen) -> None:
                model.lm_head(text_model(inputs_embeds=embeds, attention_mask=seen).last_hidden_state)

            found.append({
                "form": name,
                "states": automaton.num_states,
                "classes": automaton.table.shape[1],
                "block_size": size,
                "search_ms": milliseconds(functools.partial(search, greedy), repetitions),
                "plain_choice_ms": milliseconds(functools.partial(plain, greedy), repetitions),
                "sampled_search_ms": milliseconds(functools.partial(search, sampling), repetitions),
                "sampled_choice_ms": milliseconds(functools.partial(plain, sampling), repetitions),
                "forward_ms": milliseconds(forward, repetitions),
                "build_s": round(built, 2),
            })  # fmt: skip
            print(found[-1], flush=True)
    return found


def object_of(properties: dict[str, Any]) -> dict[str, Any]:
    """The form of an object with these properties."""
    return {"json_schema": {"type": "object", "properties": properties, "required": list(properties)}}


def qwen_tokenizer() -> Path:
    """A folder with Qwen's own vocabulary, which the tests make from a package that carries it."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny import tokenizer_files

    return tokenizer_files("qwen")


def milliseconds(call: Callable[[], Any], repetitions: int) -> float:
    """Processor milliseconds of a call, to a tenth."""
    return round(1000 * cpu_seconds(call, repetitions), 1)


@torch.no_grad()
def cpu_seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Processor seconds of a call, the least of some."""
    best = float("inf")
    for _ in range(repetitions):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "validity": validity,
    "exactness": exactness,
    "cost": cost,
}


def main() -> None:
    """Run the parts, and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--answers", type=int, default=2000, help="of each form, default: %(default)s")
    parser.add_argument("--scenes", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="of what is timed, default: %(default)s")
    parser.add_argument("--json", type=Path, required=True, help="file of the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {}
    numbers = {"validity": given.answers, "exactness": given.scenes, "cost": given.repetitions}
    for name in given.part:
        found[name] = PARTS[name](numbers[name])
        found.setdefault("environment", {})[name] = environment(torch.device("cpu"))
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
