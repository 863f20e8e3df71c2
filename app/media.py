"""Pictures and videos from paths and addresses."""

import importlib.util
import io
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from PIL import Image
from transformers.image_utils import load_image
from transformers.video_utils import load_video

from .errors import one_line

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FRAMES_PER_SECOND = 2.0  # that the frames of a folder stand for: what Qwen3-VL samples videos at
READERS = {"torchcodec": "torchcodec", "pyav": "av", "opencv": "cv2"}  # of transformers, with the modules they need


def is_video(place: str) -> bool:
    """Whether a path or address is meant as a video: by its suffix, or a folder of frames."""
    return without_query(place).endswith(VIDEO_SUFFIXES) or is_folder(place)


def is_address(place: str) -> bool:
    """Whether it is an address, not a path."""
    return place.startswith(("http://", "https://", "data:"))


def is_folder(place: str) -> bool:
    """Whether it is the path of a folder."""
    return not is_address(place) and Path(place).is_dir()


def without_query(place: str) -> str:
    """A path, or an address without what follows the name of a file, in lower case."""
    return place.partition("?")[0].lower()


def read(place: str, processor: Any) -> dict[str, Any]:
    """A picture or video as an item of a message's content; `ValueError` if it cannot be read."""
    if is_video(place):
        return {"type": "video", "video": read_video(place, processor.video_processor)}
    return {"type": "image", "image": read_picture(place)}


def read_picture(place: str) -> Image.Image:
    """Open a picture at a path or URL, upright and in RGB; `ValueError` if there is none."""
    check_place(place, "picture")
    try:
        return load_image(place)
    except Exception as error:  # what an HTTP client raises depends on the version of transformers
        raise ValueError(f"{place} cannot be read as a picture: {one_line(error)}") from error


def read_video(place: str, video_processor: Any) -> tuple[Any, dict[str, Any]]:
    """Frames of a video, sampled as the processor's settings say, and their metadata.

    A folder holds one frame a file, in the order of their names, taken to be `FRAMES_PER_SECOND`.

    Raises:
        ValueError: nothing that can be read, or nothing here can read it.
    """
    check_place(place, "video")
    try:
        if is_folder(place) or without_query(place).endswith(".gif"):
            frames, rate = frames_of_folder(Path(place)) if is_folder(place) else frames_of_gif(place)
            count = len(frames)
            return frames, {"fps": rate, "frames_indices": list(range(count)), "total_num_frames": count}
        reader = next((name for name, module in READERS.items() if importlib.util.find_spec(module)), None)
        if reader is None:
            raise ImportError("video files need PyAV: pip install av")
        frames, metadata = load_video(
            place, backend=reader, sample_indices_fn=lambda metadata, **_: video_processor.sample_frames(metadata)
        )
        return frames, {name: metadata[name] for name in ("fps", "frames_indices", "total_num_frames")}
    except Exception as error:  # every reader has its own
        raise ValueError(f"{place} cannot be read as a video: {one_line(error)}") from error


def check_place(place: str, kind: str) -> None:
    """Raise `ValueError` if neither an address nor anything that exists is meant."""
    if not is_address(place) and not Path(place).exists():
        raise ValueError(f"{place} cannot be read as a {kind}: no such file")


def frames_of_folder(folder: Path) -> tuple[list[Image.Image], float]:
    """The pictures of a folder by name, and the rate that they stand for."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise ValueError("the folder holds no pictures")
    return [read_picture(str(path)) for path in paths], FRAMES_PER_SECOND


def frames_of_gif(place: str) -> tuple[list[Image.Image], float]:
    """Every frame of a GIF and their rate, at most what the processor would sample of a video."""
    with Image.open(io.BytesIO(urlopen(place, timeout=60).read()) if is_address(place) else place) as gif:
        count = getattr(gif, "n_frames", 1)
        seconds = 0.0
        frames = []
        for number in range(count):
            gif.seek(number)
            frames.append(gif.convert("RGB"))
            seconds += gif.info.get("duration", 100) / 1000
    step = max(round(count / seconds / FRAMES_PER_SECOND), 1) if seconds else 1
    return frames[::step], count / seconds / step if seconds else FRAMES_PER_SECOND
