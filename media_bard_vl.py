"""Pictures and videos as pixels, from files, addresses, bytes or objects: only here media is opened and decoded.

A picture is upright (EXIF), in RGB with 8 bits a channel, and white where it is transparent. A video is its frames and
the times that they stand for. What an item of a message says of its frames is obeyed as in qwen_vl_utils.
"""

import base64
import importlib.util
import io
import os
import re
import string
import tempfile
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.video_utils import VideoMetadata, load_video

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
PICTURE_FORMATS = ("GIF", "WEBP", "PNG", "AVIF", "JPEG", "BMP", "TIFF")  # of Pillow; one may hold several frames
READERS = {"torchcodec": "torchcodec", "pyav": "av", "opencv": "cv2"}  # of transformers, with the modules they need
FRAMES_PER_SECOND = 2.0  # of frames that come without their times, as in qwen_vl_utils, and of animations
TIMEOUT_S = 60.0
MAX_ASPECT_RATIO = 200  # of Qwen3-VL's image processor

SIZES = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
SAMPLING = ("nframes", "min_frames", "max_frames", "video_start", "video_end")
RATES = ("fps", "sample_fps", "raw_fps")
OPTIONS = (*SIZES, *SAMPLING, *RATES)


class Media:
    """A picture or video of a message, and what its item says beside it.

    Attributes:
        source: what `read_picture` or `read_video` takes.
        options: the members of `OPTIONS` that the item has, numbers all of them.
    """

    __slots__ = ("options", "source")

    def __init__(self, source: Any, options: Mapping[str, Any] | None = None):
        """Raise `ValueError` unless every option is a number above 0, and sizes come in pairs."""
        self.source, self.options = source, dict(options or {})
        for name, value in self.options.items():
            least = 0 if name.startswith("video_") else np.nextafter(0, 1)
            if not isinstance(value, Real) or isinstance(value, bool) or not least <= float(value) < np.inf:
                raise ValueError(f"`{name}` of {describe(source)} must be a number above 0, got {value!r}")
        for one, other in (("resized_height", "resized_width"), ("resized_width", "resized_height")):
            if one in self.options and other not in self.options:
                raise ValueError(f"`{one}` of {describe(source)} needs `{other}` beside it")
        if self.options.get("min_pixels", 0) > self.options.get("max_pixels", np.inf):
            raise ValueError(f"`min_pixels` of {describe(source)} is above its `max_pixels`: {self.options}")

    @property
    def sizes(self) -> dict[str, Any]:
        """The options that bound its size."""
        return {name: value for name, value in self.options.items() if name in SIZES}


def describe(source: Any) -> str:
    """The name of a picture or video in an error: its place, or its kind."""
    if isinstance(source, Media):
        return describe(source.source)
    if isinstance(source, Mapping):
        return describe(source.get("path") or source.get("bytes") or repr(source))
    if isinstance(source, (str, os.PathLike)):
        place = os.fspath(source)
        return f"{place[:40]}..." if place.startswith("data:") or len(place) > 4096 else place
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"a picture of {source.width} x {source.height} pixels"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes {bytes(source[:8])!r}..."
    return f"{source!r:.80}"


# Pictures ------------------------------------------------------------------------------------------------------------


def read_picture(source: Any, folder: str | os.PathLike[str] = "") -> Image.Image:
    """A picture upright, in RGB and on white.

    Args:
        source: a path, a `file://`, `http(s)://` or `data:` address, base64 text, bytes, a file object, the mapping of
            `datasets.Image`, or a Pillow image. The first frame of an animation; of a Pillow image the current one.
        folder: where relative paths start.

    Raises:
        ValueError: there is no such picture, it cannot be decoded, or it has too many pixels; names it.
    """
    picture = open_picture(source, folder)
    try:
        return upright_rgb(picture)
    except Exception as error:  # Pillow's decoders have no common class
        raise unreadable(source, "picture", error) from error


def open_picture(source: Any, folder: str | os.PathLike[str] = "") -> Image.Image:
    """The same as it is stored: its size is known, its pixels are not decoded yet."""
    if isinstance(source, Media):
        source = source.source
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(file_of(source, folder))
        if picture.format == "EPS":
            raise ValueError("Pillow would run Ghostscript on it")
        if 0 in picture.size:
            raise ValueError(f"it has {picture.width} x {picture.height} pixels")
    except Exception as error:  # as above
        raise unreadable(source, "picture", error, folder) from error
    return picture


def file_of(source: Any, folder: str | os.PathLike[str] = "") -> Any:
    """A path, or an open file with the bytes, of any source; `FileNotFoundError` if there is none."""
    if isinstance(source, Mapping):  # of `datasets`
        source = next((source[key] for key in ("bytes", "path", "url") if source.get(key)), source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a path, an address, bytes or a Pillow image is needed, got {source!r:.80}")
    place = os.fspath(source)
    if place.startswith("data:"):
        return io.BytesIO(bytes_of_data_uri(place))
    if place.startswith(("http://", "https://")):
        address = quote(place, safe=string.punctuation)  # of letters and spaces that no address may hold
        with urlopen(Request(address, headers={"User-Agent": "bard-vl"}), timeout=TIMEOUT_S) as response:
            return io.BytesIO(response.read())
    path = local_path(place, folder)
    if exists(path):
        return path
    if len(place) > 64 and re.fullmatch(r"[A-Za-z0-9+/_\s-]+={0,2}\s*", place):
        return io.BytesIO(from_base64(place.encode()))
    raise FileNotFoundError("no such file")


def local_path(place: str, folder: str | os.PathLike[str] = "") -> Path:
    """The path that a text or a `file://` address means."""
    if not place.startswith("file://"):
        if "://" in place:
            raise ValueError("addresses begin with file://, http://, https:// or data:")
        return Path(folder, place)
    plain = Path(folder, place.removeprefix("file://"))
    return plain if exists(plain) else Path(url2pathname(urlsplit(place).path))


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; never an error, as for a name that is too long."""
    return os.path.exists(path)


def bytes_of_data_uri(uri: str) -> bytes:
    """The content of a `data:` address, with a media type or without."""
    head, comma, data = uri.partition(",")
    if not comma:
        raise ValueError("a data: address needs a comma before its data")
    content = unquote_to_bytes(data)
    return from_base64(content) if head.endswith(";base64") else content


def from_base64(text: bytes) -> bytes:
    """Decode base64 in either alphabet, with or without its padding."""
    return base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")) + b"==")


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Decode a picture: turned as its EXIF says, 8 bits a channel, on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = eight_bits(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("LA") if picture.mode == "La" else picture
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def eight_bits(gray: Image.Image) -> Image.Image:
    """The high bytes of a picture with 16 bits, as Pillow reads colours of 16 bits; 0 to 1 becomes 0 to 255."""
    values = np.asarray(gray)
    most = 1 if gray.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= most):
        raise ValueError(f"its values go from {values.min()} to {values.max()}, where 0 to {most} is known to be gray")
    scaled = np.rint(values * 255) if gray.mode == "F" else values >> 8
    result = Image.fromarray(scaled.astype(np.uint8))
    clear = gray.info.get("transparency")
    if isinstance(clear, int):
        result.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return result


def unreadable(source: Any, kind: str, error: Exception, folder: str | os.PathLike[str] = "") -> ValueError:
    """The error of a picture or video that cannot be read; its cause is a `FileNotFoundError` if it is missing."""
    place = os.path.join(folder, describe(source)) if isinstance(source, (str, os.PathLike)) else describe(source)
    reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    reason = reason.partition(" <_io.")[0]  # what Pillow calls bytes
    return ValueError(f"{place} cannot be read as a {kind}: {reason or type(error).__name__}")


# Videos --------------------------------------------------------------------------------------------------------------


def read_video(
    source: Any, sample: Callable[..., Any], folder: str | os.PathLike[str] = "", is_sampled: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Frames of a video, at least two, and the times that they stand for.

    Args:
        source: the path or address of a video file or an animation, a folder with one picture per frame in the order of
            their names, bytes, a list of pictures, or an array (frames, ...). The options of `Media` say which frames
            of a file or an animation are taken (`fps` or `nframes`, `min_frames`, `max_frames`, `video_start`,
            `video_end`), and how many single frames stand for a second (`sample_fps`).
        sample: indices of the frames that are taken where no option says it, from a `VideoMetadata`.
        folder: where relative paths start.
        is_sampled: `sample` is also for animations, of which two frames per second are taken otherwise, and for single
            frames, which are all taken otherwise.

    Returns:
        The frames, a list of pictures or an array, and `fps`, `frames_indices` and `total_num_frames`.

    Raises:
        ValueError: nothing that can be read, or nothing here can read it; names it.
    """
    options = source.options if isinstance(source, Media) else {}
    source = source.source if isinstance(source, Media) else source
    is_chosen = any(name in options for name in ("fps", *SAMPLING))

    def choose(metadata: Any, **_: Any) -> list[int]:
        indices = chosen_frames(metadata, options) if is_chosen else sample(metadata=metadata)
        return [int(index) for index in indices]

    try:
        if isinstance(source, (list, tuple)) or getattr(source, "ndim", 0) == 4:
            frames, times = timed(read_frames(source, folder) if isinstance(source, (list, tuple)) else source, options)
        else:
            file = file_of(source, folder)
            if not (isinstance(file, Path) and file.is_dir()):
                if is_picture(file):
                    return read_animation(file, choose if is_chosen or is_sampled else thinned)
                return read_file(file, choose)
            frames, times = timed(pictures_of_folder(file), options)
        if is_sampled:
            indices = [int(index) for index in sample(metadata=VideoMetadata(**times))]
            return at_least_two([frames[index] for index in indices]), {**times, "frames_indices": indices}
        return frames, times
    except Exception as error:  # every reader has its own
        raise unreadable(source, "video", error, folder) from error


def read_frames(frames: Any, folder: str | os.PathLike[str] = "") -> list[Any]:
    """Single frames as pictures; arrays stay as they are."""
    return [frame if getattr(frame, "ndim", 0) == 3 else read_picture(frame, folder) for frame in frames]


def is_picture(file: Any) -> bool:
    """Whether a file, by what it holds, is a picture or an animation, which Pillow decodes frame by frame."""
    try:
        with Image.open(file, formats=PICTURE_FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    finally:
        if not isinstance(file, Path):
            file.seek(0)


def pictures_of_folder(folder: Path) -> list[Image.Image]:
    """The pictures of a folder by name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise ValueError("the folder holds no pictures")
    return [read_picture(path) for path in paths]


def timed(frames: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Frames, an even number by repeating the last, with the times of `sample_fps` or else `fps`, 2 by default."""
    if not len(frames):
        raise ValueError("it has no frames")
    rate = options.get("sample_fps", options.get("fps", FRAMES_PER_SECOND))
    if len(frames) % 2:
        frames = [*frames, frames[-1]] if isinstance(frames, list) else repeat_last(frames)
    count = len(frames)
    fps = options.get("raw_fps", rate)
    return frames, {"fps": fps, "frames_indices": list(range(count)), "total_num_frames": count}


def repeat_last(frames: Any) -> Any:
    """An array of frames with its last once more."""
    return (
        torch.cat([frames, frames[-1:]]) if isinstance(frames, torch.Tensor) else np.concatenate([frames, frames[-1:]])
    )


def read_animation(file: Any, choose: Callable[..., Any]) -> tuple[list[Image.Image], dict[str, Any]]:
    """The chosen frames of an animation; a still one gives its only frame twice."""
    with Image.open(file) as animation:
        count = getattr(animation, "n_frames", 1)
        if count == 1:
            return timed([upright_rgb(animation)], {})
        seconds = 0.0
        for number in range(count):
            animation.seek(number)
            seconds += (animation.info.get("duration") or 100) / 1000
        metadata = VideoMetadata(total_num_frames=count, fps=count / seconds, duration=seconds)
        indices = choose(metadata=metadata)
        frames = {}
        for number in sorted(set(indices)):
            animation.seek(number)
            frames[number] = upright_rgb(animation)
    times = {"fps": metadata.fps, "frames_indices": indices, "total_num_frames": count}
    return at_least_two([frames[index] for index in indices]), times


def thinned(metadata: Any, **_: Any) -> list[int]:
    """Frames of an animation at equal steps, about `FRAMES_PER_SECOND` and at least two."""
    count = metadata.total_num_frames
    step = min(max(round(metadata.fps / FRAMES_PER_SECOND), 1), count // 2)
    return list(range(0, count, step))


def read_file(file: Any, choose: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """The chosen frames of a video file, by the first reader that is installed."""
    reader = next((name for name, module in READERS.items() if importlib.util.find_spec(module)), None)
    if reader is None:
        raise ImportError("video files need PyAV: pip install av")
    if isinstance(file, Path):
        frames, metadata = load_video(str(file), backend=reader, sample_indices_fn=choose)
    else:  # the readers of transformers take paths
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "video")
            path.write_bytes(file.read())
            frames, metadata = load_video(str(path), backend=reader, sample_indices_fn=choose)
    times = {name: metadata[name] for name in ("fps", "frames_indices", "total_num_frames")}
    return at_least_two(frames), times


def at_least_two(frames: Any) -> Any:
    """Frames for one temporal patch: a single one twice, which transformers refuses."""
    if isinstance(frames, str) or len(frames) != 1:
        return frames
    return [*frames, *frames] if isinstance(frames, list) else repeat_last(frames)


def chosen_frames(metadata: Any, options: Mapping[str, Any]) -> list[int]:
    """Indices of the frames that qwen_vl_utils would take."""
    qwen = qwen_vl_utils()
    count, fps = metadata.total_num_frames, metadata.fps
    start, end, count = qwen.calculate_video_frame_range(options, count, fps)
    if count == 1:
        return [start]
    number = qwen.smart_nframes(options, total_frames=count, video_fps=fps)
    return [int(index) for index in np.linspace(start, end, number).round()]


def qwen_vl_utils() -> Any:
    """Its module of pictures and videos; `ImportError` that says how to get it."""
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise ImportError(f"options of a video need qwen-vl-utils and torchvision: {error}") from error
    return vision_process
