"""A judge on 127.0.0.1 that speaks the chat API and says what a function makes of the last message."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[str], str]


@dataclass
class Server:
    """Where it listens, and the requests that it has got."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def scripted_judge(says: Script) -> Iterator[Server]:
    """Serve until the block ends. Each reply costs 10 tokens to read and 3 to write."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            content = request["messages"][-1]["content"]
            text = content if isinstance(content, str) else next(p["text"] for p in content if p["type"] == "text")
            choice = {"message": {"role": "assistant", "content": says(text)}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 10, "completion_tokens": 3}
            body = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the tests look at what was asked."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
