"""yaml-language-server, asked over a pipe: what an editor underlines in a file, offers, and shows on hovering."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NAME = "yaml-language-server"
INSTALL = f"npm install --prefix .cache/node {NAME}"


class LanguageServer:
    """One process of the server, asked one thing at a time."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen(
            [program, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.asked = 0
        self.ask("initialize", {"processId": os.getpid(), "rootUri": None, "capabilities": {}})
        self.tell("initialized", {})
        settings = {"yaml": {"validate": True, "hover": True, "completion": True, "schemaStore": {"enable": False}}}
        self.tell("workspace/didChangeConfiguration", {"settings": settings})

    def tell(self, method: str, params: dict[str, Any]) -> None:
        self._write({"jsonrpc": "2.0", "method": method, "params": params})

    def ask(self, method: str, params: dict[str, Any]) -> Any:
        self.asked += 1
        self._write({"jsonrpc": "2.0", "id": self.asked, "method": method, "params": params})
        return self._read(lambda message: message.get("id") == self.asked and "method" not in message)["result"]

    def open(self, file: Path) -> list[str]:
        """Open a file; what is underlined, as "line: message"."""
        document = {"uri": file.as_uri(), "languageId": "yaml", "version": 1, "text": file.read_text("utf-8")}
        self.tell("textDocument/didOpen", {"textDocument": document})
        name = "textDocument/publishDiagnostics"
        found = self._read(lambda m: m.get("method") == name and m["params"]["uri"] == file.as_uri())
        underlined = found["params"]["diagnostics"]
        return [f"{each['range']['start']['line'] + 1}: {each['message']}" for each in underlined]

    def at(self, method: str, file: Path, line: int, character: int) -> Any:
        """textDocument/hover or textDocument/completion at a place, counted from 0."""
        place = {"line": line, "character": character}
        return self.ask(f"textDocument/{method}", {"textDocument": {"uri": file.as_uri()}, "position": place})

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _write(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        self.process.stdin.flush()

    def _read(self, wanted: Any) -> dict[str, Any]:
        """The next message that is wanted; the server's own questions are answered with nothing."""
        out = self.process.stdout
        assert out is not None
        while True:
            size = 0
            while line := out.readline().strip():
                name, _, value = line.partition(b": ")
                size = int(value) if name.lower() == b"content-length" else size
            assert size, "the language server has ended"
            message: dict[str, Any] = json.loads(out.read(size))
            if wanted(message):
                return message
            if "id" in message and "method" in message:
                several = [None] * len(message.get("params", {}).get("items", []))
                self._write({"jsonrpc": "2.0", "id": message["id"], "result": several or None})


@pytest.fixture(scope="session")
def language_server() -> Any:
    """A running server; skipped where it is not installed."""
    found = shutil.which(NAME) or shutil.which(NAME, path=REPOSITORY / ".cache" / "node" / "node_modules" / ".bin")
    if found is None:
        pytest.skip(f"{NAME} is absent: {INSTALL}")
    server = LanguageServer(found)
    yield server
    server.close()
