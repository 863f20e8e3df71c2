"""A Hugging Face Hub on this machine: the real client creates repositories, commits and downloads without network.

It knows one branch per repository, keeps every file in memory, and takes every upload in the commit itself. As the real
one, it drops what the `.gitignore` among the uploaded files names.
"""

import base64
import hashlib
import json
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Files = dict[str, bytes]


class FakeHub:
    """A running server; use it as a context manager."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}  # repository -> commit -> its files; the last one is main
        hub = self
        handler = type("Handler", (HubHandler,), {"hub": hub})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment that makes a process use this Hub."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_fake", "NO_PROXY": "127.0.0.1"}

    def head(self, repo_id: str) -> str:
        return list(self.commits[repo_id])[-1]

    def resolve(self, repo_id: str, revision: str) -> str:
        return self.head(repo_id) if revision == "main" else revision

    def files(self, repo_id: str) -> Files:
        return self.commits[repo_id][self.head(repo_id)]

    def commit(self, repo_id: str, operations: list[dict[str, Any]]) -> str:
        files = dict(self.files(repo_id))
        for operation in operations:
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] != "header":
                raise NotImplementedError(operation)
        content = repr([(path, hashlib.sha256(content).hexdigest()) for path, content in sorted(files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[repo_id][sha] = files
        return sha


class HubHandler(BaseHTTPRequestHandler):
    """The part of the Hub's API that uploads and downloads use."""

    hub: FakeHub

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers["Content-Length"]))
        match self.path.partition("?")[0].split("/")[1:]:
            case ["api", "repos", "create"]:
                fields = json.loads(request)
                repo_id = "/".join(filter(None, [fields.get("organization"), fields["name"]]))
                self.hub.commits.setdefault(repo_id, {"0" * 40: {}})
                self.reply({"id": repo_id, "url": f"{self.hub.endpoint}/{repo_id}"})
            case ["api", "validate-yaml"]:
                self.reply({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", "main"] if f"{owner}/{name}" in self.hub.commits:
                fields = json.loads(request)
                paths = [file["path"] for file in fields["files"]]
                ignored = ignored_paths(paths, fields.get("gitIgnore", ""))
                regular = {"uploadMode": "regular"}
                modes = [{**regular, "path": path, "shouldIgnore": path in ignored} for path in paths]
                self.reply({"files": modes})
            case ["api", "models", owner, name, "commit", "main"]:
                sha = self.hub.commit(f"{owner}/{name}", [json.loads(line) for line in request.splitlines()])
                self.reply({"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{owner}/{name}/commit/{sha}"})
            case _:
                self.fail()

    def do_GET(self) -> None:
        match self.path.partition("?")[0].split("/")[1:]:
            case ["api", "models", owner, name, "tree", revision, *folder] if f"{owner}/{name}" in self.hub.commits:
                self.send_tree(f"{owner}/{name}", revision, "".join(f"{part}/" for part in folder))
            case ["api", "models", owner, name, *rest] if f"{owner}/{name}" in self.hub.commits:
                repo_id = f"{owner}/{name}"
                sha = self.hub.resolve(repo_id, rest[1] if rest[:1] == ["revision"] else "main")
                files = [{"rfilename": path} for path in self.hub.commits[repo_id][sha]]
                self.reply({"id": repo_id, "sha": sha, "siblings": files})
            case [owner, name, "resolve", revision, *parts] if f"{owner}/{name}" in self.hub.commits:
                self.send_file(f"{owner}/{name}", revision, "/".join(parts))
            case _:
                self.fail()

    do_HEAD = do_GET

    def send_tree(self, repo_id: str, revision: str, folder: str) -> None:
        files = self.hub.commits[repo_id][self.hub.resolve(repo_id, revision)]
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
            if path.startswith(folder)
        ]
        if entries:
            self.reply(entries)
        else:
            self.fail("EntryNotFound")

    def send_file(self, repo_id: str, revision: str, path: str) -> None:
        commits = self.hub.commits[repo_id]
        sha = self.hub.resolve(repo_id, revision)
        if sha not in commits:
            self.fail("RevisionNotFound")
        elif path not in commits[sha]:
            self.fail("EntryNotFound", **{"X-Repo-Commit": sha})
        else:
            content = commits[sha][path]
            etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha}
            self.reply(content, **etag)

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, code: str = "RepoNotFound", **headers: str) -> None:
        self.reply({"error": f"{self.command} {self.path}"}, 404, **{"X-Error-Code": code, **headers})

    def log_message(self, *_: Any) -> None:
        pass


def ignored_paths(paths: list[str], gitignore: str) -> set[str]:
    """Those of the `paths` that git leaves out under a root `.gitignore` of this content."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "init", "--quiet", folder], check=True)
        (Path(folder) / ".gitignore").write_text(gitignore)
        command = ["git", "-C", folder, "check-ignore", "--no-index", "--stdin"]
        done = subprocess.run(command, input="\n".join(paths), capture_output=True, text=True)
    return set(done.stdout.splitlines())
