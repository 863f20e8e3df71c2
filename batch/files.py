"""Files by their paths or addresses: local ones, and those of the object stores that pyarrow knows."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

REMOTE = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "hf")  # schemes of pyarrow's file systems


def is_remote(place: str) -> bool:
    """Whether it is the address of an object, not a path."""
    return place.partition("://")[0] in REMOTE and "://" in place


def resolve(place: str) -> tuple[Any, str]:
    """The file system of a place, and the path in it; `ValueError` if there is no such file system."""
    try:
        return pyarrow.fs.FileSystem.from_uri(place if is_remote(place) else os.path.abspath(place))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{place}: {error}") from error


def anywhere(place: str) -> str:
    """A place as another process finds it, whatever its working directory."""
    return os.path.abspath(place) if os.path.exists(place) else place


def beside(place: str, folder: str) -> str:
    """A place that may be relative to a folder, which may be the address of one."""
    if "://" in place or place.startswith("data:") or os.path.isabs(place):
        return place
    return f"{folder.rstrip('/')}/{place}" if is_remote(folder) else os.path.join(folder, place)


def list_files(folder: str, recursive: bool = False) -> list[tuple[str, int]]:
    """Paths in a folder, relative to it and in order, with their sizes; nothing if there is no such folder."""
    filesystem, root = resolve(folder)
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=recursive, allow_not_found=True))
    files = [info for info in found if info.type == pyarrow.fs.FileType.File]
    return sorted((os.path.relpath(info.path, root).replace(os.sep, "/"), info.size) for info in files)


def kind_of(place: str) -> str | None:
    """`file` or `folder`, None if there is neither."""
    filesystem, path = resolve(place)
    kind = filesystem.get_file_info(path).type
    return {pyarrow.fs.FileType.File: "file", pyarrow.fs.FileType.Directory: "folder"}.get(kind)


def open_file(place: str) -> Any:
    """A file opened for reading at any place in it."""
    filesystem, path = resolve(place)
    return filesystem.open_input_file(path)


def read_lines(place: str) -> Iterator[bytes]:
    """Lines without their ends, of a file that may be compressed."""
    filesystem, path = resolve(place)
    with filesystem.open_input_stream(path) as stream, io.BufferedReader(stream, 1 << 20) as lines:
        for line in lines:
            yield line.removesuffix(b"\n")


def write_whole(place: str, data: Iterable[bytes]) -> None:
    """Write a file; it has all of the data or is as before."""
    filesystem, path = resolve(place)
    if is_remote(place):  # an object appears when it is complete
        with filesystem.open_output_stream(path) as stream:
            for chunk in data:
                stream.write(chunk)
        return
    draft = Path(f"{path}.draft")
    draft.unlink(missing_ok=True)
    append(str(draft), data)
    draft.replace(path)


def append(path: str, data: Iterable[bytes]) -> None:
    """Write behind what a local file has; it survives whatever ends the process from here on."""
    with open(path, "ab") as file:
        file.writelines(data)
        file.flush()
        os.fsync(file.fileno())


def delete(place: str) -> None:
    """Delete a file or a folder, if there is one."""
    filesystem, path = resolve(place)
    kind = kind_of(place)
    if kind is not None:
        (filesystem.delete_dir if kind == "folder" else filesystem.delete_file)(path)
