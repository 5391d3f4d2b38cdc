"""An endpoint of OpenAI's shape on this machine: real sockets, and whatever a real one might do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """One response.

    body:    a chat completion, or bytes as they are. seconds: before it comes. promised: Content-Length, if not true.
    drip:    seconds between its bytes. hang_up: end the connection without a word.
    """

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0
    promised: int | None = None
    drip: float = 0.0
    hang_up: bool = False


def say(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion; eight tokens asked, four answered."""
    return {
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 4},
    }


def fail(status: int, message: str = "", **headers: str) -> Said:
    body = json.dumps({"error": {"message": message}}).encode() if message else b""
    return Said(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


class Loopback:
    """answer: (number of the request from 0, its body) -> what is said. Change it at any time."""

    def __init__(self) -> None:
        self.answer: Callable[[int, dict[str, Any]], Any] = lambda number, body: say(
            f"To {body['messages'][-1]['content']}"
        )
        self.asked: list[Asked] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def script(self, *said: Any) -> None:
        """Say these in turn, the last one ever after."""
        self.answer = lambda number, _: said[min(number, len(said) - 1)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Said:
        with self._lock:
            number = len(self.asked)
            self.asked.append(Asked(path, headers, body, time.monotonic()))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        said = self.answer(number, body)
        said = said if isinstance(said, Said) else Said(said)
        time.sleep(said.seconds)
        with self._lock:
            self._now -= 1
        return said


def _make_handler(loopback: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = loopback.handle(self.path, dict(self.headers), body)
            if said.hang_up:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            raw = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            try:
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(said.promised or len(raw)))
                self.end_headers()
                for part in [raw[n : n + 1] for n in range(len(raw))] if said.drip else [raw]:
                    self.wfile.write(part)
                    time.sleep(said.drip)
            except OSError:  # whoever asked has gone
                self.close_connection = True

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    return Handler
