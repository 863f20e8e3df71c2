"""The answers on disk: the parts of an output, whatever ended the run that wrote them."""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from ..app.chats import is_text
from . import files
from .requests import Inventory, fingerprint

Record = dict[str, Any]
ROWS_PER_PART = 10_000
FILES_OPEN = 200  # at once; processes may have 1024 or fewer
SECONDS_PER_OBJECT = 15.0  # between two writes to an object store, where nothing can be appended
SINGLE = ".jsonl"  # of outputs that are one file


class Answers:
    """The answers of an input; one process at a time writes them.

    An output that ends in .jsonl is one file in the order of the input, written at the end; until then its
    parts are in the folder OUTPUT.parts. Any other output is the folder of the parts, which has a file _SUCCESS in the
    end. A line of a part has the number of its row.
    """

    def __init__(self, output: str, inventory: Inventory):
        self.output, self.inventory = output.rstrip("/"), inventory
        self.is_single = self.output.endswith(SINGLE)
        self.folder = f"{self.output}.parts" if self.is_single else self.output
        self.complete = self.output if self.is_single else f"{self.folder}/_SUCCESS"
        self.begun = f"{self.folder}/_run.json"
        self.owned = filelock.FileLock(f"{self.folder}/_lock")
        self.part, self.rows_in_part = 0, 0
        self.waiting: list[bytes] = []
        self.written = time.monotonic()

    def check(self, retry_errors: bool) -> None:
        """Raise `ValueError` if there is nothing left to do, or the output answers something else."""
        is_complete = files.kind_of(self.complete) == "file"
        is_begun = files.kind_of(self.begun) is not None
        if is_complete and not retry_errors and not (self.is_single and is_begun):
            raise ValueError(
                f"{self.output} exists: a run that ended has written it; --retry-errors asks its errors again"
            )
        if self.is_single and files.kind_of(self.output) == "folder":
            raise ValueError(f"{self.output} is a folder; an output that ends in {SINGLE} is a file")
        if not self.is_single and not is_begun and any(name[0] != "_" for name, _ in files.list_files(self.folder)):
            raise ValueError(f"{self.output} is a folder of something else")

    def begin(self, run: Record, says: Callable[[str], None], retry_errors: bool = False) -> np.ndarray:
        """Take up what earlier runs have finished: the rows that have an answer, in order.

        With `retry_errors` errors do not count, and a complete output is such a run.

        Raises:
            ValueError: another run is writing, or the parts belong to other settings or requests.
        """
        self.check(retry_errors)
        self.lock()
        if files.kind_of(self.begun) and read_run(self.begun) != run:
            said = b"".join(files.read_lines(self.begun)).decode(errors="replace")
            raise ValueError(f"{self.folder} was begun with other settings or requests: {said}")
        done = self.heal(says, retry_errors)
        if self.is_single and files.kind_of(self.output):
            rows = {*done.tolist()}
            kept = [record for record in self.read_output() if record["row"] not in rows and "error" not in record]
            self.write([as_line(record) for record in kept])
            done = np.union1d(done, [record["row"] for record in kept]).astype(np.int64)
        elif not self.is_single:
            files.delete(self.complete)
        files.write_whole(self.begun, [json.dumps(run).encode() + b"\n"])
        return done

    def lock(self) -> None:
        """Own the folder until the process ends; a store has no locks."""
        if files.is_remote(self.folder):
            return
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        try:
            self.owned.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"another run is writing {self.output}") from None

    def close(self) -> None:
        """Write what waits, and let others write."""
        self.flush()
        self.owned.release()

    def parts(self) -> list[str]:
        """The files with answers."""
        names = [name for name, _ in files.list_files(self.folder)]
        return [f"{self.folder}/{name}" for name in names if name.startswith("part-") and name.endswith(".jsonl")]

    def heal(self, says: Callable[[str], None], retry_errors: bool) -> np.ndarray:
        """Read every part, and rewrite those with lines that do not count; the rows that have an answer."""
        done: set[int] = set()
        for place in self.parts():
            self.part = max(self.part, int(place.rpartition("-")[2].removesuffix(".jsonl")) + 1)
            kept: list[bytes] = []
            size = 0
            for number, (line, record) in enumerate(whole_lines(place), 1):
                size = number
                if record is None:
                    says(f"{place}, line {number} is damaged: what it answered is asked again")
                elif record["row"] not in done and not (retry_errors and "error" in record):
                    done.add(record["row"])
                    kept.append(line)
            if len(kept) < size or not ends_whole(place):
                files.write_whole(place, [line + b"\n" for line in kept])
        return np.array(sorted(done), dtype=np.int64)

    def read_output(self) -> Iterator[Record]:
        """The answers of a complete file with the rows of the input; `ValueError` if it answers other requests."""
        records = list(read_complete(self.output))
        prints = [fingerprint(record["id"]) if "id" in record else 0 for record in records]
        known = self.inventory.ids.tolist()
        if len(prints) != len(known) or any(one not in (0, other) for one, other in zip(known, prints, strict=True)):
            raise ValueError(f"{self.output} answers other requests")
        rows = self.inventory.rows.tolist()
        return ({"row": row, **record} for row, record in zip(rows, records, strict=True))

    def append(self, lines: Iterable[bytes]) -> None:
        """Write answers: on a disk at once, in a store with those of the next seconds."""
        self.waiting += lines
        if not files.is_remote(self.folder) or time.monotonic() - self.written > SECONDS_PER_OBJECT:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        lines, self.waiting = self.waiting, []
        self.written = time.monotonic()
        if lines:
            self.write(lines)

    def write(self, lines: list[bytes]) -> None:
        """Lines behind those of the present part, or as an object of their own."""
        place = f"{self.folder}/part-{self.part:05}.jsonl"
        ended = [line + b"\n" for line in lines]
        if files.is_remote(place):
            files.write_whole(place, ended)
            self.part += 1
            return
        files.append(place, ended)
        self.rows_in_part += len(lines)
        if self.rows_in_part >= ROWS_PER_PART:
            self.part, self.rows_in_part = self.part + 1, 0

    def finish(self) -> tuple[int, int]:
        """Complete the output; how many answers it has, and how many of them are errors.

        Raises:
            ValueError: answers have got lost meanwhile.
        """
        self.flush()
        places = self.parts()
        found: dict[int, tuple[int, int, int, bool]] = {}
        for number, place in enumerate(places):
            start = 0
            for line, record in whole_lines(place):
                if record is not None:
                    found.setdefault(record["row"], (number, start, len(line), "error" in record))
                start += len(line) + 1
        rows = self.inventory.rows.tolist()
        gone = [row for row in rows if row not in found]
        if gone:
            raise ValueError(f"{self.folder} has lost the answers of rows {gone}: the same command asks them again")
        if self.is_single:
            self.write_output(places, [found[row] for row in rows])
        else:
            files.write_whole(self.complete, [])
        return len(rows), sum(found[row][3] for row in rows)

    def write_output(self, places: list[str], order: list[tuple[int, int, int, bool]]) -> None:
        """Write the single file in the order of the input, and drop the parts."""
        opened = functools.lru_cache(FILES_OPEN)(files.open_file)

        def lines() -> Iterator[bytes]:
            for number, start, length, _ in order:
                part = opened(places[number])
                part.seek(start)
                record = json.loads(part.read(length))
                yield as_line({name: member for name, member in record.items() if name != "row"}) + b"\n"

        files.write_whole(self.output, lines())
        files.delete(self.begun)  # first: without it the parts are no unfinished run
        files.delete(self.folder)


def whole_lines(place: str) -> Iterator[tuple[bytes, Record | None]]:
    """Lines of a part and their records but the last one, if a kill cut it short; None for a line that has none."""
    with files.open_file(place) as file:
        *lines, _ = file.read().split(b"\n")
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a machine that went down may have left NULs
            record = None
        is_answer = isinstance(record, dict) and isinstance(record.get("row"), int) and "id" in record
        yield line, record if is_answer else None


def ends_whole(place: str) -> bool:
    """Whether the last line of a file has its end."""
    with files.open_file(place) as file:
        size = file.size()
        file.seek(max(size - 1, 0))
        return file.read(1) in (b"", b"\n")


def read_run(place: str) -> Record:
    """The settings with which the parts were begun; `ValueError` if the file is damaged."""
    try:
        with files.open_file(place) as file:
            return json.loads(file.read())
    except ValueError as error:
        raise ValueError(
            f"{place} is damaged: nothing says which settings the answers beside it belong to; remove the folder"
        ) from error


def read_complete(place: str) -> Iterator[Record]:
    """The answers of a complete JSONL file; `ValueError` if a line is damaged."""
    for number, line in enumerate(files.read_lines(place), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{place}, line {number} is damaged: remove the file to ask everything again")
        yield record


def as_line(record: Record) -> bytes:
    """A record as a line of JSON; half a character of UTF-16, which UTF-8 cannot hold, by its number."""
    text = json.dumps(record, ensure_ascii=False)
    return (text if is_text(text) else json.dumps(record)).encode()
