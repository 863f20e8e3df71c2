"""Checkpoints by their names: the settings that a name implies, and those that a config lacks."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..configuration_bard_vl import BardVLConfig
from ..convert_qwen3vl_to_bard import PUBLISHED_THRESHOLDS, PUBLISHER, RELEASES, named_block_size
from ..generation_config_bard_vl import BardVLGenerationConfig
from .errors import UsageError, one_line

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EMBEDDED = EXAMPLES / "checkpoint"  # the small trained one of the repository
PICTURES = EXAMPLES / "images"  # which it knows, and what it may be asked about them, one question per conversation
QUESTIONS = ("Describe the picture.", "What is at b4?", "What is in row 4?", "Which word is written?")
CONVERT = "bard-vl convert --source {name} --output FOLDER"


def find_checkpoint(name: str | None) -> str:
    """The checkpoint's folder or Hub id; by default the one in the repository, `UsageError` if there is none."""
    if name is not None:
        return name
    if not (EMBEDDED / "config.json").is_file():
        raise UsageError("no model: give --model, a folder or Hub id of a Bard-VL checkpoint (see `bard-vl models`)")
    return str(EMBEDDED)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Name the checkpoint, and a file of its weights that is cut short, in errors of readers that name neither."""
    try:
        yield
    except (OSError, ImportError, RuntimeError):  # which say what is wrong, or are no fault of the files
        raise
    except Exception as error:  # of the weights' reader, and of the tokenizer's, which has no class of its own
        if name in str(error):
            raise
        damaged = next((str(path) for path in sorted(Path(name).glob("*.safetensors")) if not is_whole(path)), name)
        raise OSError(f"{damaged} cannot be read: {one_line(error)}") from error


def is_whole(path: Path) -> bool:
    """Whether a file of weights is as long as its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def read_config(name: str, **where: Any) -> Any:
    """The config of a Bard-VL folder or Hub id.

    Raises:
        UsageError: the folder is no checkpoint, or one of another kind.
        OSError: there is none, or it cannot be read.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name} is no checkpoint: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(f"{name} is no folder here, and cannot be had from the Hub: {one_line(error)}") from error
    if not isinstance(config, BardVLConfig):
        advice = f"; convert it first: {CONVERT.format(name=name)}" if config.model_type == "qwen3_vl" else ""
        raise UsageError(f"{name} is no Bard-VL checkpoint: its model type is {config.model_type}{advice}")
    return config


def stored_settings(name: str, **where: Any) -> BardVLGenerationConfig | None:
    """The settings of generation that come with a checkpoint; None if it has no file of them."""
    try:
        return BardVLGenerationConfig.from_pretrained(name, **where)
    except OSError:
        return None


def complete_settings(
    name: str, config: BardVLConfig, settings: BardVLGenerationConfig, **where: Any
) -> tuple[BardVLGenerationConfig, list[str]]:
    """Settings with what the checkpoint's name says and neither they nor its files do; and what to tell the user.

    Args:
        name: folder or Hub id.
        config: as of `read_config`.
        settings: of the user.
        where: `revision`, for instance.

    Raises:
        UsageError: nothing states a block size.
    """
    by_name = named_block_size(last_part(name))
    trained = by_name if config.block_size is None else config.block_size
    if trained is None and settings.block_size is None:
        raise UsageError(f"{name} states no block size: give --block-size, the number after B in its name")
    implied: dict[str, Any] = {}
    if config.block_size is None and settings.block_size is None:
        implied["block_size"] = by_name
    size = settings.block_size or trained
    recommended = (
        PUBLISHED_THRESHOLDS.get(size) if size is not None and is_published(name) and size == trained else None
    )
    if recommended is not None and settings.confidence_threshold is None:
        stored = stored_settings(name, **where)
        if stored is None or stored.confidence_threshold is None:
            implied["confidence_threshold"] = recommended
    notices = [f"by the checkpoint's name: {words(implied)}"] if implied else []
    if settings.block_size and trained and settings.block_size != trained:
        notices.append(f"block size {settings.block_size} as asked, but {name} was trained with {trained}")
    if getattr(config, "trained", None) is False:
        notices.append(f"{name} is a seed: until it is trained for block diffusion it writes nonsense")
    if name == str(EMBEDDED):
        notices.append("the small example answers: it knows pictures like examples/images alone; --model names another")
    return BardVLGenerationConfig(**{**implied, **settings.explicit()}), notices


def words(settings: dict[str, Any]) -> str:
    """Settings as a user reads them."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def last_part(name: str) -> str:
    """The repository's name of a Hub id, of a folder of the Hub's cache, or of a folder."""
    path = Path(name).resolve() if Path(name).is_dir() else Path(name)
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rpartition("--")[2]
    return path.name


def is_published(name: str) -> bool:
    """Whether a folder or Hub id is named like a checkpoint of the paper's authors."""
    if not Path(name).is_dir() and not name.startswith(f"{PUBLISHER}/"):
        return False
    patterns = (pattern for pattern, owner in RELEASES.items() if owner == PUBLISHER)
    return any(re.fullmatch(pattern, last_part(name)) for pattern in patterns)
