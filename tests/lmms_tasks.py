"""Tasks of generated pictures for lmms-eval, and the functions that their files name."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from datasets.naming import camelcase_to_snakecase
from PIL import Image

HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
task: {name}
doc_to_text: !function lmms_tasks.question
doc_to_target: answer
"""
GENERATION = """
output_type: generate_until
generation_kwargs: {settings}
process_results: !function lmms_tasks.compare
metric_list:
  - {{metric: same, aggregation: mean, higher_is_better: true}}
"""
PICTURES = "doc_to_visual: !function lmms_tasks.pictures\n"
CLIPS = "doc_to_messages: !function lmms_tasks.clip\n"
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], body: str, **settings: Any) -> None:
    """Write a task of `rows` into a folder for `--include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = body.format(settings=json.dumps(settings)) if settings else body
    (folder / f"{name}.yaml").write_text(HEAD.format(data=data, name=name) + body)


def question(doc: dict[str, Any]) -> str:
    return doc["question"]


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(path) for path in doc["pictures"]]


def clip(doc: dict[str, Any]) -> list[dict[str, Any]]:
    frames = {"type": "video", "url": [Image.open(path) for path in doc["pictures"]]}
    return [{"role": "user", "content": [frames, {"type": "text", "text": doc["question"]}]}]


def compare(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"same": float(results[0] == doc["answer"])}


# --- the data sets of the manual's commands, two rows of each, as a cache that has them ------------------------------

PICTURE = {"image": "picture"}
LETTERS = {"options": "['one', 'two', 'three']", "answer": "A", "question": "How many? <image 1>", "id": "test_Art_1"}
DATA_SETS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("lmms-lab-encoder/MMMU", "default", "validation"): {
        **{**LETTERS, "id": "validation_Art_1", "question_type": "multiple-choice", "subfield": "Art"},
        "image_1": "picture",
    },
    ("MMMU/MMMU_Pro", "standard (10 options)", "test"): {**LETTERS, "subject": "Art", "image_1": "picture"},
    ("lmms-lab-encoder/MME", "default", "test"): {
        **{"question_id": "code/1.png", "question": "Is it red?", "answer": "Yes", "category": "color"},
        **PICTURE,
    },
    ("lmms-lab-encoder/RealWorldQA", "default", "test"): {"question": "How many?", "answer": "2", **PICTURE},
    ("Lin-Chen/MMStar", "default", "val"): {
        **{"index": 0, "question": "Which? A: one, B: two", "answer": "A", "category": "math", "l2_category": "sums"},
        **PICTURE,
    },
    ("lmms-lab-encoder/ai2d", "default", "test"): {
        **{"question": "Which?", "options": ["one", "two"], "answer": "0"},
        **PICTURE,
    },
    ("lmms-lab-encoder/ChartQA", "default", "test"): {
        **{"question": "How many?", "answer": "2", "type": "human_test"},
        **PICTURE,
    },
}


def write_data_sets(cache: Path, picture: Image.Image) -> None:
    """Lay the data sets into the cache of `datasets`, as if they had been downloaded."""
    for (name, config, split), row in DATA_SETS.items():
        row = {key: picture if value == "picture" else value for key, value in row.items()}
        data = datasets.Dataset.from_list([row, row])
        owner, _, short = name.partition("/")
        snake, config_id = camelcase_to_snakecase(short), datasets.BuilderConfig(config).create_config_id({})
        folder = cache / f"{owner}___{snake}" / config_id / "0.0.0" / ("0" * 40)
        folder.mkdir(parents=True)
        with ArrowWriter(features=data.features, path=str(folder / f"{snake}-{split}.arrow")) as writer:
            writer.write_table(data.with_format("arrow")[:])
            writer.finalize()
        splits = datasets.SplitDict(dataset_name=snake)
        splits.add(datasets.SplitInfo(split, num_examples=2))
        kind = {"builder_name": "parquet", "dataset_name": snake, "config_name": config, "version": "0.0.0"}
        datasets.DatasetInfo(features=data.features, splits=splits, **kind).write_to_directory(str(folder))
