"""Kill `bard-vl batch` at random, again and again, and count what is lost and what is answered twice.

    python benchmarks/batch_kills.py --pictures 200 --kills 10

Every kill is SIGKILL: of the command with all that it started, or of its worker alone, after a random number of further
answers and a random pause. The command is started again until it ends. Its file must be, byte for byte, that of a run
that was let alone.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from bard_vl.evaluation.scenes import scene

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
DEADLINE_S = 900.0


def main() -> int:
    """Run the experiment and print what it found, as JSON; 1 if anything was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        (room / "pictures").mkdir()
        for number in range(arguments.pictures):
            scene(False, 0, number).draw().save(room / "pictures" / f"{number:04}.png")
        line = [sys.executable, "-m", "bard_vl_cli", "batch", str(room / "pictures"), "--model", str(arguments.model)]
        line += ["--max-new-tokens", "24", "--batch-size", "4", "--quiet"]
        start = time.monotonic()
        subprocess.run([*line, str(room / "alone.jsonl")], check=True, stdout=subprocess.DEVNULL)
        alone_s = time.monotonic() - start
        output, start = room / "killed.jsonl", time.monotonic()
        kills: list[dict[str, Any]] = []
        process = begin([*line, str(output)])
        while len(kills) < arguments.kills:
            target, earlier = generator.choice(["command", "worker"]), parts_of(output)
            left = (arguments.pictures - sum(earlier.values())) // (2 * (arguments.kills - len(kills)))
            if not wait_for(process, output, earlier, generator.randint(1, max(left, 1))):
                break
            time.sleep(generator.uniform(0, 1))
            kills.append({"killed": kill(process, target), "on disk": sum(parts_of(output).values())})
            print(f"kill {len(kills)}: {kills[-1]}", file=sys.stderr, flush=True)
            if process.poll() is not None and not output.exists():
                process = begin([*line, str(output)])
        code = process.wait()
        report = compare(output, room / "alone.jsonl", arguments.pictures)
        report |= {"exit code": code, "kills": kills, "seconds": round(time.monotonic() - start)}
        print(json.dumps(report | {"seconds alone": round(alone_s)}, indent=2))
        is_whole = not report["lost"] and not report["doubled"] and report["same bytes"]
        return 0 if is_whole and len(kills) == arguments.kills else 1


def begin(line: list[str]) -> subprocess.Popen[bytes]:
    """Start the command, as the head of a group of its own."""
    return subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL)


def parts_of(output: Path) -> Counter[str]:
    """The number of whole answers on disk for each id."""
    folder = output.with_name(f"{output.name}.parts")
    lines: list[bytes] = []
    with contextlib.suppress(FileNotFoundError):  # the command ends
        lines = [line for part in folder.glob("part-*.jsonl") for line in part.read_bytes().split(b"\n")[:-1]]
    return Counter(json.loads(line)["id"] for line in lines)


def wait_for(process: subprocess.Popen[bytes], output: Path, earlier: Counter[str], further: int) -> bool:
    """Wait for a number of further answers on disk; False if the command ends first."""
    deadline = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        if sum(parts_of(output).values()) >= sum(earlier.values()) + further:
            return True
        time.sleep(0.05)
    return False


def kill(process: subprocess.Popen[bytes], target: str) -> str:
    """Kill the command and all that it started, or its workers; what was killed."""
    started = psutil.Process(process.pid).children(recursive=True)
    if target == "worker":
        workers = [child for child in started if "MapBatches(Worker)" in " ".join(child.cmdline())]
        for worker in workers:
            worker.kill()
        return f"{len(workers)} worker"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "command"


def compare(output: Path, alone: Path, total: int) -> dict[str, object]:
    """The answers that are lost, doubled or different from those of the undisturbed run, counted."""
    counts = Counter(json.loads(line)["id"] for line in output.read_bytes().splitlines())
    return {
        "answers": sum(counts.values()),
        "lost": total - len(counts),
        "doubled": sum(count - 1 for count in counts.values()),
        "same bytes": output.read_bytes() == alone.read_bytes(),
    }


if __name__ == "__main__":
    sys.exit(main())
