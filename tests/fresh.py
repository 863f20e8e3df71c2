"""Fresh Python processes for tests of remote code, which must see neither the installed package nor its caches."""

import json
import os
import shutil
import subprocess
import sys
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
    """Call `module.function` of this folder in a new process, offline, and return its result by way of JSON.

    `home` is its Hugging Face home and working directory, `line` the folder of another transformers. Without `package`
    an import of `bard_vl` fails there.
    """
    module = function.rpartition(".")[0]
    block = "" if package else "sys.modules['bard_vl'] = None; "
    code = f"import json, sys; {block}import {module}; print(json.dumps({function}(*json.loads(sys.argv[1]))))"
    return json.loads(
        python("-c", code, json.dumps(arguments, default=str), home=home, line=line, **variables).splitlines()[-1]
    )


def python(*command: Any, home: Path, line: str = "", cwd: Path | None = None, **variables: str) -> str:
    """Run the interpreter with its own Hugging Face home, offline; its standard output."""
    home.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    path = os.pathsep.join(filter(None, [line, str(TESTS), os.environ.get("PYTHONPATH", "")]))
    environment = {**inherited, "PYTHONPATH": path, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **variables}
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, env=environment, cwd=cwd or home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
