"""`--push` to a hub on this machine, with huggingface_hub's own client: what is sent, and how an upload is resumed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest


class Hub(ThreadingHTTPServer):
    """The routes of the hub that an upload needs. It refuses every large file from number `refuses_from` on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.refuses_from: int | None = None
        self.repositories: dict[str, str] = {}  # name -> visibility
        self.blobs: dict[str, bytes] = {}  # sha256 -> large file
        self.files: dict[str, bytes | str] = {}  # of the last commit: path -> content, or sha256 of a large file
        self.received: list[str] = []  # sha256 of each large file that was sent, also of refused ones
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Routes(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *values: object) -> None:
        pass

    def answer(self, values: object, code: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self.answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        content, hub = self.body(), self.server
        digest = hashlib.sha256(content).hexdigest()
        assert self.path == f"/blobs/{digest}"
        hub.received.append(digest)
        if hub.refuses_from is not None and len(hub.received) >= hub.refuses_from:
            self.answer({"error": "the storage is full"}, 400)
        else:
            hub.blobs[digest] = content
            self.answer({})

    def do_POST(self) -> None:
        hub, content, path = self.server, self.body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"ada/{asked['name']}"
            code = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, asked.get("visibility", "public"))
            self.answer({"url": f"{hub.address}/{name}", "name": name}, code)
        elif path == "/api/validate-yaml":  # of the card
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/objects/batch"):
            self.answer({"transfer": "basic", "objects": [*map(self.action, json.loads(content)["objects"])]})
        elif "/preupload/" in path:
            files = json.loads(content)["files"]
            modes = {True: "lfs", False: "regular"}
            large = {file["path"]: modes[file["path"].endswith((".safetensors", "tokenizer.json"))] for file in files}
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in large.items()]})
        elif "/commit/" in path:
            self.commit([json.loads(line) for line in content.splitlines()])
        else:
            self.answer({"error": "unknown"}, 404)

    def action(self, file: dict[str, Any]) -> dict[str, Any]:
        """What the client must do for a large file: nothing if the hub has it."""
        if file["oid"] in self.server.blobs:
            return file
        return {**file, "actions": {"upload": {"href": f"{self.server.address}/blobs/{file['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = value["oid"]
        address = f"{self.server.address}/{next(iter(self.server.repositories))}/commit/{'0' * 40}"
        self.answer({"commitUrl": address, "commitOid": "0" * 40})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub: Hub, *words: str) -> subprocess.CompletedProcess[str]:
    """A command with this hub, which has the older protocol for large files (LFS), and not Xet."""
    chosen = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | chosen
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.drawn
def test_an_interrupted_push_is_resumed_by_the_command_of_its_error(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    """The first attempt sends one of two large files; the second one sends only the other."""
    folder = tmp_path / "orders"
    export = ("export", str(tiny_llama), "--to", "hub", "--output", str(folder), "--push")
    hub.refuses_from = 2
    ended = run(hub, sys.executable, "-m", "tunekit", *export)
    error = " ".join(ended.stderr.split())
    assert ended.returncode == 4, error
    assert "the upload did not finish: Bad request: the storage is full" in error
    assert hub.repositories == {"ada/orders": "private"}
    assert (len(hub.blobs), hub.files) == (1, {})
    command = error[error.index("hf upload --private orders") :].split()[:5]
    hub.refuses_from = None
    ended = run(hub, str(Path(sys.executable).parent / "hf"), *shlex.split(" ".join(command))[1:])
    assert ended.returncode == 0, ended.stderr
    assert len(hub.received) == 3
    assert len(set(hub.received)) == 2
    sent = {path.name for path in folder.iterdir()}
    assert set(hub.files) == sent
    for name, content in hub.files.items():
        assert (content if isinstance(content, bytes) else hub.blobs[content]) == (folder / name).read_bytes()
    assert "private" in hub.repositories.values()


@pytest.mark.drawn
def test_a_push_in_one_go(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    export = ("export", str(tiny_llama), "--to", "hub", "--output", str(tmp_path / "orders"), "--push")
    ended = run(hub, sys.executable, "-m", "tunekit", *export)
    assert ended.returncode == 0, ended.stderr
    assert f"uploaded to {hub.address}/ada/orders" in " ".join(ended.stdout.split())
    assert set(hub.files) == {path.name for path in (tmp_path / "orders").iterdir()}
    assert len(hub.received) == 2
