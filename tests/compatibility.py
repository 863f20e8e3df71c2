"""Try every feature on every line of transformers, and write docs/compatibility.md.

    BARD_VL_TRANSFORMERS_DIRS=4.57.6:5.0.0 python tests/compatibility.py docs/compatibility.md --older datasets4

It is among the tests because it needs what they need: tiny checkpoints, extras, and the folders of
other lines that they take. A feature works where its function returns; on each line it runs in a process of its own,
forked from one that has imported transformers and nothing of this package.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import fresh
import tiny

MASK = tiny.IDS["small"].mask_token_id
SETTINGS = {"max_new_tokens": 12, "confidence_threshold": 0.02}
TOKENIZED = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
OWN = ("transformers", "huggingface-hub", "tokenizers")  # packages that each line has in a version of its own
MEDIA = ("torchvision", "av", "torchcodec", "qwen-vl-utils")
SHARED = ("torch", *MEDIA, "accelerate", "peft", "torchao", "datasets", "lmms-eval")

Check = Callable[[Path], None]
FEATURES: dict[str, tuple[str, Check]] = {}  # by the function's name: what the table calls it, and the function
NOT_TRIED = "not tried: "  # begins the reason where something to try it with is missing
LONGEST_REASON = 200  # characters
LAST = "load_what_lines_saved"  # wants all lines to have saved


def feature(title: str) -> Callable[[Check], Check]:
    """Enter a function into the table; it takes the folder of `prepare` and raises if the feature does not work."""

    def enter(check: Check) -> Check:
        FEATURES[check.__name__] = title, check
        return check

    return enter


# --- features ---------------------------------------------------------------------------------------------------------


@feature(
    "a published folder, after `import bard_vl`, by `AutoModel`, `AutoModelForCausalLM`, `AutoModelForImageTextToText`"
)
def load_published(room: Path) -> None:
    import bard_vl
    import transformers

    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"):
        model = getattr(transformers, name).from_pretrained(room / "published")
        assert type(model) is bard_vl.BardVLForConditionalGeneration, f"{name} gives {type(model).__name__}"


@feature("a folder with code, `trust_remote_code=True`, this package not installed: model and `AutoProcessor`")
def load_remote_code(room: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    sys.modules["bard_vl"] = None  # type: ignore[assignment]
    model = AutoModelForImageTextToText.from_pretrained(room / "bard", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(room / "bard", trust_remote_code=True)
    answer(model, processor)


@feature("`bard_vl.BardVLProcessor` of a published folder")
def load_own_processor(room: Path) -> None:
    import bard_vl

    assert bard_vl.BardVLProcessor.from_pretrained(room / "published").tokenizer.padding_side == "left"


@feature("`AutoProcessor` of a published folder, after `import bard_vl`, pads on the left")
def load_published_processor(room: Path) -> None:
    import bard_vl  # noqa: F401
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(room / "published")
    side = processor.tokenizer.padding_side
    assert side == "left", f"transformers' own `{type(processor).__name__}`, by its file; it pads on the {side}"


@feature("convert a Qwen3-VL folder")
def convert(room: Path) -> None:
    from bard_vl import convert_qwen3vl_to_bard as converter

    output = converter.convert(room / "qwen", work(room) / "bard", 4, MASK, progress=False)
    assert json.loads((output / "config.json").read_text())["block_size"] == 4


@feature("`save_pretrained` of model and processor")
def save(room: Path) -> None:
    model, processor = load(room)
    for part in (model, processor):
        part.save_pretrained(room / "saved" / importlib.metadata.version("transformers"))


@feature("what any of these lines saved, with the tokens that it gives there")
def load_what_lines_saved(room: Path) -> None:
    expected = answer(*load(room))
    for folder in sorted((room / "saved").iterdir()):
        assert answer(*load(room, folder)) == expected, f"other tokens from what {folder.name} saved"


@feature("`generate` a batch of prompts of any lengths, with and without images: each as alone")
def generate_batch(room: Path) -> None:
    model, processor = load(room)
    content = [[picture(96, 64), text("What?")], [text("Why is the circle red?")], [picture(64, 64), text("Where?")]]
    chats = [user(*items) for items in content]
    together = responses(model, processor, chats)
    assert together == [responses(model, processor, [chat])[0] for chat in chats], "a row differs from itself alone"


@feature("videos as frames")
def generate_frames(room: Path) -> None:
    metadata = {"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4}
    clip = {"type": "video", "video": tiny.draw_frames(4)}
    responses(*load(room), [user(clip, text("What moves?"))], video_metadata=[metadata], do_sample_frames=False)


@feature("video files by their paths in a chat, which transformers reads by torchcodec")
def generate_video_file(room: Path) -> None:
    assert importlib.util.find_spec("torchcodec"), f"{NOT_TRIED}torchcodec, which needs FFmpeg, was not installed"
    clip = {"type": "video", "video": str(room / "clip.mp4")}
    responses(*load(room), [user(clip, text("What moves?"))])


@feature("a second turn on the cache, `num_return_sequences`, `score`")
def reuse(room: Path) -> None:
    import torch

    model, processor = load(room)
    inputs = encode(processor, [user(picture(96, 64), text("Describe the image."))])
    first = model.generate(**inputs, **SETTINGS, num_return_sequences=2, return_dict_in_generate=True)
    assert first.sequences.shape[0] == 2
    cached = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
    again = encode(processor, [user(picture(96, 64), text("Describe the circle."))])
    second = model.generate(**again, **SETTINGS, past_key_values=cached.past_key_values, return_dict_in_generate=True)
    assert second.num_encoded_tokens[0] < again["input_ids"].shape[1], "nothing was reused"
    assert torch.equal(second.sequences, model.generate(**again, **SETTINGS)), "other tokens than without the cache"
    assert model.score(again, torch.tensor([[20, 21], [22, -100]])).isfinite().all()


@feature("streamers, stop strings, logits processors, stopping criteria")
def hooks(room: Path) -> None:
    from transformers import (
        LogitsProcessorList,
        MaxLengthCriteria,
        MinLengthLogitsProcessor,
        StoppingCriteriaList,
        TextIteratorStreamer,
    )

    model, processor = load(room)
    inputs = encode(processor, [user(text("What is the colour of the circle?"))])
    length = inputs["input_ids"].shape[1]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    processors = LogitsProcessorList([MinLengthLogitsProcessor(length + 2, tiny.IDS["small"].eos_token_id)])
    criteria = StoppingCriteriaList([MaxLengthCriteria(length + 7)])
    sequences = model.generate(
        **inputs, **SETTINGS, streamer=streamer, logits_processor=processors, stopping_criteria=criteria
    )
    assert sequences.shape[1] <= length + 7
    assert "".join(streamer) == processor.tokenizer.decode(sequences[0, length:])
    stop = next(letter for letter in processor.tokenizer.decode(sequences[0, length:]) if letter.isascii())
    stopped = model.generate(**inputs, **SETTINGS, stop_strings=[stop], tokenizer=processor)
    assert processor.tokenizer.decode(stopped[0, length:]).count(stop) == 1, "the stop string was not seen"


@feature('`pipeline("image-text-to-text")`')
def pipe(room: Path) -> None:
    from transformers import pipeline

    ask = pipeline("image-text-to-text", model=str(room / "bard"), trust_remote_code=True)
    found = ask(text=user(picture(96, 64), text("What?")), return_full_text=False, generate_kwargs=SETTINGS)
    assert found[0]["generated_text"] == answer(*load(room))


@feature('compiled steps, `cache_implementation="static"` (CPU)')
def compiled(room: Path) -> None:
    from torch._dynamo.utils import counters

    model, processor = load(room)
    chats = [user(text("What?"))]
    expected = responses(model, processor, chats)
    assert responses(model, processor, chats, cache_implementation="static") == expected, "other tokens than eagerly"
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@feature("attention `sdpa` and `eager` as `bard_vl`")
def attention(room: Path) -> None:
    expected = answer(*load(room))
    for name in ("sdpa", "eager"):
        assert answer(*load(room, attn_implementation=name)) == expected, f"other tokens by {name}"


@feature("bfloat16 weights")
def bfloat16(room: Path) -> None:
    answer(*load(room, dtype="bfloat16"))


@feature("int8 weights by torchao (CPU)")
def int8(room: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantized = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": "cpu"}
    answer(*load(room, dtype="bfloat16", **quantized))


@feature('`device_map="auto"`, layers on the CPU and on disk, by accelerate')
def offload(room: Path) -> None:
    offloaded(room, 900_000)


@feature("the same with tied embeddings on disk too")
def offload_tied(room: Path) -> None:
    assert "disk" in offloaded(room, 600_000)["lm_head"]


@feature("`forward` with labels, `backward`")
def backward(room: Path) -> None:
    model, processor = load(room)
    inputs = encode(processor, [user(picture(96, 64), text("What?"))])
    model.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.visual.parameters())


@feature("training by recipe (`bard_vl.training`): a step, the saved stage")
def train(room: Path) -> None:
    run_recipe(room)


@feature("training low-rank adapters, merged at the end (PEFT)")
def train_lora(room: Path) -> None:
    run_recipe(room, use_lora=True, lora_rank=4)


@feature("`bard-vl run`: a picture, `--html`, `--dry-run`")
def command_line(room: Path) -> None:
    folder = work(room)
    bard_vl_run(room, "photo.jpg", "--dry-run")
    bard_vl_run(room, "photo.jpg", "--html", folder / "page.html")
    assert "<html" in (folder / "page.html").read_text(encoding="utf-8")


@feature("`bard-vl run` of a video file, by PyAV")
def command_line_video(room: Path) -> None:
    bard_vl_run(room, "clip.mp4")


@feature("`bard-vl batch`, on Ray Data")
def batches(room: Path) -> None:
    folder = work(room)
    (folder / "in.jsonl").write_text(json.dumps({"prompt": "What?", "images": [str(room / "photo.jpg")]}) + "\n")
    options = ["--model", room / "bard", "--max-new-tokens", "8"]
    execute("-m", "bard_vl_cli", "batch", folder / "in.jsonl", folder / "out.jsonl", *options)
    assert json.loads((folder / "out.jsonl").read_text())["tokens"] <= 8


@feature("`transformers serve`, by the OpenAI protocol")
def serve(room: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (entry,) = importlib.metadata.distribution("transformers").entry_points.select(
        group="console_scripts", name="transformers"
    )
    start = f"import sys, {entry.module}; sys.argv[0] = 'transformers'; {entry.module}.{entry.attr}()"
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code"]
    log, said = work(room) / "log", None
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "-c", start, *options], stdout=output, stderr=output)
        while server.poll() is None and not listens(port):
            time.sleep(0.2)
        with contextlib.suppress(urllib.error.URLError):
            said = request(port, str(room / "bard"), "What?")
        server.terminate()
        server.wait()
    if said is None:
        raise RuntimeError(last_line(log.read_text(), "Error: "))
    expected = answer(*load(room), text("What?"))
    assert said == expected.rstrip("\N{REPLACEMENT CHARACTER}"), f"the server says {said!r}, generate {expected!r}"


@feature("lmms-eval, a task of generated pictures")
def evaluate(room: Path) -> None:
    import lmms_tasks
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    row = {"question": "What?", "pictures": [str(room / "photo.jpg")], "answer": "red"}
    lmms_tasks.write_task(work(room), "shapes", [row], lmms_tasks.PICTURES + lmms_tasks.GENERATION, max_new_tokens=8)
    tasks = TaskManager("ERROR", include_path=str(work(room)), model_name="bard_vl")
    options = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0}
    arguments = f"pretrained={room / 'bard'},dtype=float32"
    found = simple_evaluate("bard_vl", arguments, tasks=["shapes"], task_manager=tasks, **options)
    assert 0 < found["throughput"]["total_gen_tokens"] <= 8


# --- what they share --------------------------------------------------------------------------------------------------


def load(room: Path, folder: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """Model, in float32 unless said, and processor by the package."""
    import bard_vl

    folder = folder or room / "bard"
    options = {"dtype": "float32", **options}
    model = bard_vl.BardVLForConditionalGeneration.from_pretrained(folder, **options)
    return model, bard_vl.BardVLProcessor.from_pretrained(folder)


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def picture(width: int, height: int) -> dict[str, Any]:
    return {"type": "image", "image": tiny.draw((width, height))}


def encode(processor: Any, chats: list[Any], **options: Any) -> Any:
    return processor.apply_chat_template(chats, **TOKENIZED, processor_kwargs={"padding": True, **options})


def responses(model: Any, processor: Any, chats: list[Any], **options: Any) -> list[str]:
    """The decoded answers; options of `generate` or of the processor."""
    settings = {name: options.pop(name) for name in ("cache_implementation",) if name in options}
    inputs = encode(processor, chats, **options)
    sequences = model.generate(**inputs, **SETTINGS, **settings)
    return processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer(model: Any, processor: Any, *content: dict[str, Any]) -> str:
    (found,) = responses(model, processor, [user(*(content or (picture(96, 64), text("What?"))))])
    assert found, "an empty answer"
    return found


def work(room: Path) -> Path:
    """A folder of the feature's own: its process has one for its Hugging Face home."""
    folder = Path(os.environ["HF_HOME"]) / f"work-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    return folder


def offloaded(room: Path, limit: int) -> dict[str, str]:
    """Compare the answers of a model within a limit of memory in bytes; where its parts are."""
    limits = {"max_memory": {"cpu": limit}, "offload_folder": work(room) / "offload"}
    model, processor = load(room, device_map="auto", **limits)
    assert {*model.hf_device_map.values()} == {"cpu", "disk"}, f"the map is {model.hf_device_map}"
    assert answer(model, processor) == answer(*load(room)), "other tokens than in memory"
    return model.hf_device_map


def run_recipe(room: Path, **changes: Any) -> None:
    """Train a stage for a step, and load it."""
    from bard_vl.training import merge_blocks
    from training_cases import chats_file, write_recipe

    output = work(room) / "run"
    recipe = {"model_name_or_path": str(room / "bard"), "train_data": str(chats_file()), "output_dir": str(output)}
    recipe |= {"max_steps": 1, "save_steps": 1, "learning_rate": 0.003, "max_length": 256, "report_to": "none"}
    recipe |= {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, **changes}
    if merge_blocks.main([str(write_recipe(work(room) / "recipe.yaml", recipe))]):
        raise RuntimeError("the recipe was refused")
    answer(*load(room, output / "block-4"))


def bard_vl_run(room: Path, file: str, *options: Any) -> None:
    execute("-m", "bard_vl_cli", "run", room / file, "--model", room / "bard", "--max-new-tokens", "8", *options)


def execute(*arguments: Any) -> None:
    """Run the interpreter; `RuntimeError` has the last line of what it said if it failed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(last_line(done.stderr or done.stdout))


def last_line(output: str, part: str = "") -> str:
    """The last line that is not empty and has this part."""
    return next((line for line in map(str.strip, reversed(output.splitlines())) if line and part in line), "no message")


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def request(port: int, model: str, question: str) -> str:
    """The streamed answer of a server; `RuntimeError` with the message of an event that is an error."""
    body = {"model": model, "messages": user(text(question)), "stream": True, "generation_config": json.dumps(SETTINGS)}
    address, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as reply:
        events = [line[6:] for line in reply.read().decode().splitlines() if line.startswith("data: ")]
    parts = [json.loads(event) for event in events if event.strip() != "[DONE]"]
    refused = [part["error"] for part in parts if "error" in part]
    if refused:
        raise RuntimeError(str(refused[0]))
    return "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])


# --- running them -----------------------------------------------------------------------------------------------------


def prepare(room: Path) -> Path:
    """A folder with a tiny Qwen3-VL, the same as published and as converted, a picture and a video file."""
    from test_cli import write_video
    from test_readme import make_published

    tiny.write_qwen3vl(room / "qwen")
    make_published(room / "qwen", room / "published")
    fresh.convert(room / "qwen", room / "bard", "--block-size", 4, "--mask-token-id", MASK)
    tiny.draw_scene(room / "photo.jpg")
    write_video(room / "clip.mp4", tiny.draw_frames(12))
    return room


def attempt_all(names: list[str], room: str) -> dict[str, Any]:
    """In the process of a line: its versions, and by feature None or the reason why it does not work."""
    import transformers.models.qwen3_vl.modeling_qwen3_vl
    import transformers.models.qwen3_vl.processing_qwen3_vl  # noqa: F401

    found = {name: attempt(name, Path(room)) for name in names}
    return {"versions": {name: version(name) for name in (*OWN, *SHARED)}, "features": found}


def attempt(name: str, room: Path) -> str | None:
    """Run a feature in a forked process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(reason_against, name, room).result()
        except BrokenProcessPool:
            return "its process died"


def reason_against(name: str, room: Path) -> str | None:
    """None, or in a line why the feature does not work."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the parent's last line of output is the result
            FEATURES[name][1](room)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split()).replace(f"{room}/", "")
        said = said if isinstance(error, AssertionError | RuntimeError) else f"{type(error).__name__}: {said}"
        return said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]} ..."
    return None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def run_line(line: str, names: list[str], room: Path) -> dict[str, Any]:
    """Results of features on a line: its folder, with folders behind it, or "" for the installed one."""
    home = room / "homes" / (fresh.line_name(line.partition(os.pathsep)[0]) or "installed")
    return fresh.call("compatibility.attempt_all", names, room, home=home, line=line, package=True, OMP_NUM_THREADS="1")


def run_lines(lines: list[str], names: list[str], room: Path) -> list[dict[str, Any]]:
    """Results of every line; what loads other lines' folders comes last."""
    results = []
    for line in lines:
        results.append(run_line(line, [name for name in names if name != LAST], room))
        print(json.dumps(results[-1], indent=2), file=sys.stderr)
    for line, result in zip(lines, results, strict=True):
        if LAST in names:
            result["features"] |= run_line(line, [LAST], room)["features"]
    return results


# --- the page ---------------------------------------------------------------------------------------------------------

HEAD = """\
# What works with what

Made by `tests/compatibility.py`, which tries every feature below on each line of transformers, in a process of its own,
on tiny checkpoints. *yes* means that it ran and gave what it should; a number leads to the reason why it did not.

On {system}, Python {python}, CPU alone, with torch {torch}{others}.
"""
TAIL = """
## Folders with the code of 0.1.0

The code that 0.1.0 wrote beside a checkpoint runs on all of these lines: `generate`, the model card's call, `forward`
and its loss, `score`, saving, with the same tokens. Since transformers 5.24 two uses end in `TypeError:
BardVLGenerationOutput.__init__() got an unexpected keyword argument 'cache'`: `return_dict_in_generate=True`, and so
a second turn on the cache. Either `import bard_vl` first (the installed package then runs in the place of the
folder's code), or give the folder new code: `python convert_qwen3vl_to_bard.py --source OLD --output NEW`.

## Made again

```bash
pip install --editable ".[test]"
pip install --no-deps --target 4.57.6 "transformers==4.57.6" "huggingface-hub==0.36.2" "tokenizers==0.22.2"
pip install --no-deps --target 5.0.0 "transformers==5.0.0" "huggingface-hub==1.3.0" "tokenizers==0.22.2"
pip install --no-deps --target datasets4 "datasets<5"
BARD_VL_TRANSFORMERS_DIRS=4.57.6:5.0.0 python tests/compatibility.py docs/compatibility.md --older datasets4
```

`datasets` 5 asks for a newer huggingface_hub than the older lines have: there `datasets4` stands behind the line's
folder on the path. pip takes the right one by itself where such a line is the installed one. Video files in a chat are
tried where torchcodec and FFmpeg are installed.
"""


def write_page(results: list[dict[str, Any]]) -> str:
    """The page, with lines in the order of `results`."""
    versions = [result["versions"] for result in results]
    newest = versions[-1]
    others = "".join(f", {name} {newest[name]}" for name in SHARED if name not in ("torch", "datasets"))
    system, python = platform.system(), platform.python_version()
    where = HEAD.format(system=system, python=python, torch=newest["torch"], others=others)
    page = [where, row("", *(line["transformers"] for line in versions)), row("---", *["---"] * len(results))]
    cells = {name: [result["features"][name] for result in results] for name in FEATURES}
    reasons = [*dict.fromkeys(reason for found in cells.values() for reason in found if reason)]
    for name, (title, _) in FEATURES.items():
        words = (verdict(reason, reasons) for reason in cells[name])
        page.append(row(title, *words))
    for name in ("huggingface-hub", "tokenizers", "datasets"):
        page.append(row(f"tried with {name}", *(line[name] for line in versions)))
    if reasons:
        page += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(page) + "\n" + TAIL


def verdict(reason: str | None, reasons: list[str]) -> str:
    """The text of a cell, with the number of its reason among all."""
    if reason is None:
        return "yes"
    return f"{'not tried' if reason.startswith(NOT_TRIED) else 'no'} ({reasons.index(reason) + 1})"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="file to write")
    parser.add_argument("--older", type=Path, help="folder of packages that the older lines need in older versions")
    return parser.parse_args()


def main() -> None:
    """Run all and write the page."""
    arguments = parse_arguments()
    installed, *older = fresh.LINES
    behind = [str(arguments.older.resolve())] if arguments.older else []
    lines = [os.pathsep.join([str(Path(line).resolve()), *behind]) for line in older]
    with tempfile.TemporaryDirectory(prefix="bard-vl-compatibility-") as room:
        results = run_lines([*lines, installed], list(FEATURES), prepare(Path(room)))
    arguments.page.write_text(write_page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
