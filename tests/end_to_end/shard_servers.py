"""Servers for shards on loopback: one with range requests and faults on demand, and nginx."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import s3fs


class ShardServer(ThreadingHTTPServer):
    """Serves a folder; of the requests after the first `faults_after`, a share is answered with 503 or cut short."""

    daemon_threads = True

    def __init__(self, folder: Path, *, fault_share: float = 0.0, seed: int = 0, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault_share, self.ranges = folder, fault_share, ranges
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.requests = self.refused = self.cut = self.spoiled = 0
        self.spoil_next = 0  # so many answers come with a flipped bit
        self.status_for_all: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fate(self) -> str:
        """What happens to a request."""
        with self.lock:
            self.requests += 1
            if self.random.random() >= self.fault_share:
                return "answer"
            if self.random.random() < 0.5:
                self.refused += 1
                return "refuse"
            self.cut += 1
            return "cut"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: ShardServer = self.server
        fate = server.fate()
        if server.status_for_all is not None or fate == "refuse":
            self.send_error(server.status_for_all or 503)
            return
        path = server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, wanted = path.read_bytes(), self.headers.get("Range")
        status = 200
        if wanted and server.ranges:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            total, status = len(content), 206
            content = content[int(begin) : int(end) + 1]
        if server.spoil_next and status == 206 and path.suffix == ".tar":
            server.spoil_next -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(content) - 1}/{total}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fate == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextlib.contextmanager
def serving(folder: Path, **options: object) -> Iterator[ShardServer]:
    server = ShardServer(folder, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def nginx(folder: Path, scratch: Path) -> Iterator[str]:
    """The real server, as it comes from Debian, without privileges; skips where it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    port = _free_port()
    scratch.mkdir(parents=True)
    temporary = " ".join(
        f"{kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # root started it: let it read root's temporary folders
    (scratch / "nginx.conf").write_text(
        f"{user} daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/error.log;\n"
        f"events {{ }}\n"
        f"http {{ access_log {scratch}/access.log; {temporary}\n"
        f"  server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    process = subprocess.Popen([program, "-e", f"{scratch}/error.log", "-c", str(scratch / "nginx.conf")])
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


@contextlib.contextmanager
def s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the S3 protocol (moto) with the folder's files in a bucket; skips where it is not installed.

    Its address and credentials for it are in the environment, as for any S3 client.
    """
    program = shutil.which("moto_server")
    if program is None or subprocess.run([program, "--help"], capture_output=True, check=False).returncode != 0:
        pytest.skip("moto_server is not on the PATH (in an environment of its own: pip install 'moto[server,s3]')")
    port = _free_port()
    for name, value in (
        ("ENDPOINT_URL", f"http://127.0.0.1:{port}"),
        ("ACCESS_KEY_ID", "nobody"),
        ("SECRET_ACCESS_KEY", "nothing"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.mkdir("bucket")
        for path in folder.iterdir():
            if path.is_file():
                system.put(str(path), f"bucket/shards/{path.name}")
        yield "s3://bucket/shards"
    finally:
        process.kill()
        process.wait(timeout=20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen) -> None:
    """Until somebody listens there; an AssertionError if the process ends before, or takes 20 seconds."""
    deadline = time.monotonic() + 20
    while True:
        assert process.poll() is None, f"{process.args[0]} ended with {process.returncode}"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        assert time.monotonic() < deadline, f"{process.args[0]} does not listen"
        time.sleep(0.05)
