"""The proxy's nginx loses no retry when the addresses of a name change meanwhile."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.deploy.deployment import docker, wait_until
from tests.docker.files import DOCKER, compose
from tests.docker.test_proxy import free_port

SLOW, QUICK, CLOSED = "127.0.0.2", "127.0.0.3", "127.0.0.4"


@contextmanager
def dns(addresses: dict[str, str]) -> Iterator[int]:
    """Port of a DNS server that knows these names now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def answer_all() -> None:
            while True:
                question, client = server.recvfrom(512)
                if not question:
                    return
                end = question.index(0, 12)
                labels, at = [], 12
                while at < end:
                    labels.append(question[at + 1 : at + 1 + question[at]].decode())
                    at += 1 + question[at]
                address = addresses.get(".".join(labels))
                # RFC 1035: flags (a name that does not exist: code 3), one question, one answer.
                head = struct.pack(">5H", 0x8180 if address else 0x8183, 1, bool(address), 0, 0)
                found = struct.pack(">3HIH", 0xC00C, 1, 1, 1, 4) if address else b""
                found += socket.inet_aton(address) if address else b""
                server.sendto(question[:2] + head + question[12 : end + 5] + found, client)

        thread = threading.Thread(target=answer_all)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.sendto(b"", server.getsockname())
            thread.join()


class Replica(BaseHTTPRequestHandler):
    """Answers with its address and path; the slow one is draining, and says so late."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        address = self.connection.getsockname()[0]
        if address == SLOW:
            time.sleep(3)
        body = f"{address} {self.path}".encode()
        self.send_response(503 if address == SLOW else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("after", [{"replica-0": CLOSED}, {}], ids=["moved", "gone"])
def test_a_retry_after_a_change_of_addresses(
    images: dict[str, float], tmp_path: Path, after: dict[str, str]
) -> None:
    port, public, health = free_port(), free_port(), free_port()
    addresses = {"replica-0": SLOW, "replica-1": QUICK}
    servers = [ThreadingHTTPServer((address, port), Replica) for address in addresses.values()]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    main = (DOCKER / "nginx/nginx.conf").read_text()
    main = main.replace("listen 8080", f"listen 127.0.0.1:{public}").replace(":8081", f":{health}")
    (tmp_path / "nginx.conf").write_text(main)
    files = ("nginx.conf", "upstream.conf")
    mounts = [f"--volume={tmp_path / name}:/etc/nginx/{name}:ro" for name in files]
    with dns(addresses) as dns_port:
        replicas = (DOCKER / "nginx/replicas.conf").read_text().replace(":8000", f":{port}")
        replicas = replicas.replace("127.0.0.11 valid=5s", f"127.0.0.1:{dns_port} valid=1s")
        (tmp_path / "upstream.conf").write_text(replicas)
        image = compose()["services"]["balancer"]["image"]
        proxy = docker(
            *("run", "--detach", "--rm", "--network=host", "--tmpfs=/tmp:mode=1777"), *mounts, image
        ).strip()
        try:
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", health)) == 0, "listening")
            answers = asyncio.run(ask(f"http://127.0.0.1:{public}", addresses, after))
        finally:
            docker("stop", proxy)
            for server in servers:
                server.shutdown()
                server.server_close()
    assert {(answer.status_code, answer.text) for answer in answers} == {
        (200, f"{QUICK} /v1/chat/completions?a=%20b")
    }


async def ask(url: str, addresses: dict[str, str], after: dict[str, str]) -> list[httpx.Response]:
    """Send requests of many sessions; addresses change while the slow replica has some."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        requests = [
            asyncio.create_task(
                client.post(
                    "/v1/./chat/completions?a=%20b", json={}, headers={"X-Session-ID": str(n)}
                )
            )
            for n in range(12)
        ]
        await asyncio.sleep(0.5)
        addresses.pop("replica-0")
        addresses.update(after)
        return await asyncio.gather(*requests)
