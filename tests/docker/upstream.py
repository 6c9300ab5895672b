"""A server behind the proxy; its answers describe the requests."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Upstream:
    """State of a running upstream server.

    Attributes:
        port: Port on which it listens.
        paths: Paths of the requests, in order.
        unavailable: Whether it answers 503, like a draining server.
        continue_stream: Once set, ``/v1/stream`` sends its second event.
    """

    port: int
    paths: list[str] = field(default_factory=list)
    unavailable: bool = False
    continue_stream: threading.Event = field(default_factory=threading.Event)


@contextmanager
def upstream() -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            state.paths.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if state.unavailable:
                self._send(503, {"error": "draining"}, {"Retry-After": "5"})
            elif self.path == "/v1/stream":
                self._stream()
            else:
                ratios = self.headers.get_all("X-Pruning-Ratio", [])
                answer = {"port": state.port, "ratios": ratios, "body_bytes": len(body)}
                self._send(200, answer, {"X-Pruning-Ratio": ratios[0]} if ratios else {})

        def do_POST(self) -> None:
            self.do_GET()

        def _send(self, status: int, answer: object, headers: dict[str, str]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"d\r\ndata: first\n\n\r\n")
            state.continue_stream.wait(30)
            self.wfile.write(b"e\r\ndata: second\n\n\r\n0\r\n\r\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Upstream(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        state.continue_stream.set()
        server.shutdown()
        server.server_close()
        thread.join()
