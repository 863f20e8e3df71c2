"""Other Python processes for tests of remote code, which must see neither the installed package nor its caches.

`python` starts one. `call` forks one from a `Server`, which has imported torch and transformers: that takes longer than
most of what is called.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# The installed transformers, then every folder that BARD_VL_TRANSFORMERS_DIRS names, as PATH does.
LINES = ["", *filter(None, os.environ.get("BARD_VL_TRANSFORMERS_DIRS", "").split(os.pathsep))]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def line_name(line: str) -> str:
    return Path(line).name or "installed"


def call(function: str, *arguments: Any, home: Path, line: str = "", package: bool = False, **variables: str) -> Any:
    """Call `module.function` of this folder in another process, offline, and return its result by way of JSON.

    `home` is its Hugging Face home and working directory, `line` the folder of another transformers. Without `package`
    an import of `bard_vl` fails there.
    """
    home.mkdir(parents=True, exist_ok=True)
    request = {"function": function, "arguments": arguments, "home": home, "package": package}
    return server(line, **variables).call(request)


@cache
def server(line: str, **variables: str) -> "Server":
    return Server(line, **variables)


class Server:
    """A process on one line of transformers that forks a child for every call, as a new process but for its imports.

    Libraries read the environment when they are imported, so servers with different variables are different ones. The
    Hugging Face home is the exception: it is the folder `.`, where each child works. A server imports nothing of
    this repository but this file, and ends when its standard input does.
    """

    def __init__(self, line: str, **variables: str):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", "import fresh; fresh.serve()"]
        self.process = subprocess.Popen(command, env=environment(".", line, **variables), **pipes)
        atexit.register(self.process.communicate)

    def call(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
        code, output, errors = json.loads(self.process.stdout.readline())
        assert code == 0, output + errors
        return json.loads(output.splitlines()[-1])


def serve() -> None:
    """The loop of a server: one request per line, one reply per line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    for name in ("modeling_qwen3_vl", "processing_qwen3_vl", "video_processing_qwen3_vl"):
        importlib.import_module(f"transformers.models.qwen3_vl.{name}")
    importlib.import_module("transformers.pipelines")
    gc.collect()
    gc.freeze()  # or a child's first round would copy the pages of all that was imported
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                answer(json.loads(line))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [file.seek(0) or file.read().decode("utf-8", "replace") for file in (output, errors)]
        print(json.dumps([code, *texts]), file=replies, flush=True)


def answer(request: dict[str, Any]) -> None:
    """Call the function, print its result and end this process."""
    code = 1
    try:
        os.chdir(request["home"])
        if not request["package"]:
            sys.modules["bard_vl"] = None  # type: ignore[assignment]
        module, _, name = request["function"].rpartition(".")
        result = getattr(importlib.import_module(module), name)(*request["arguments"])
        print(json.dumps(result), flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def command_line(*arguments: str) -> str:
    """What `bard-vl` prints with these arguments; for `call`, with the package."""
    from bard_vl_cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main([*arguments])
    assert code == 0, code
    return output.getvalue()


def python(*command: Any, home: Path, line: str = "", cwd: Path | None = None, **variables: str) -> str:
    """Run the interpreter with its own Hugging Face home, offline; its standard output."""
    home.mkdir(parents=True, exist_ok=True)
    arguments, variables = [sys.executable, *map(str, command)], environment(home, line, **variables)
    done = subprocess.run(arguments, env=variables, cwd=cwd or home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(home: Path | str, line: str, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    path = os.pathsep.join(filter(None, [line, str(TESTS), os.environ.get("PYTHONPATH", "")]))
    return {**inherited, "PYTHONPATH": path, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **variables}


def convert(source: Path, output: Path, *options: Any) -> Path:
    """Convert a folder by the script's own `main`."""
    from bard_vl import convert_qwen3vl_to_bard  # not in the processes that must not see the package

    arguments = ["--source", source, "--output", output, "--quiet", *options]
    assert convert_qwen3vl_to_bard.main([*map(str, arguments)]) == 0
    return output


def mark_trained(folder: Path) -> Path:
    """Drop the mark of a seed from a converted folder, as training does."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config.pop("trained", None)
    path.write_text(json.dumps(config, indent=2), "utf-8")
    return folder


def add_to_hub_cache(home: Path, repo_id: str, folder: Path, commit: str = COMMIT) -> None:
    """Lay a folder into the Hub cache of `home` as a download would have."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
