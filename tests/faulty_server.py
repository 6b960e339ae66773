"""An MLflow server to kill and start again, and a proxy before it that is slow or fails."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from free_ports import free_ports

PATIENCE_S = 120


class Server:
    """`mlflow server` over an SQLite file in a folder, always at the same port."""

    def __init__(self, folder: Path):
        self._folder, self._port = folder, free_ports(1)[0]
        self.address = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        store = f"sqlite:///{self._folder}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = subprocess.DEVNULL
        self._process = process = subprocess.Popen(
            command,
            cwd=self._folder,
            env=settings,
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
        )
        until = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < until, f"{self.address} does not answer"
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.3)

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)  # Its workers too.
            self._process.wait()
            self._process = None


class Proxy:
    """Passes requests on to a server, each after `delay` seconds, and counts them by path.

    While it is `dead` it answers nothing and counts them as `refused`.

    A share of them, chosen with a seed, is answered 500: every other one before it was passed on,
    the others after, so that the answer alone is lost.
    """

    def __init__(self, target: str, delay: float = 0.0, failing: float = 0.0, seed: int = 0):
        self.delay, self.failing, self.dead = delay, failing, False
        self.calls: Counter[str] = Counter()
        self.failed = self.refused = 0
        chance, turn = random.Random(seed), threading.Lock()
        host = urlsplit(target).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if proxy.dead:
                    proxy.refused += 1
                    self.close_connection = True
                    return
                with turn:
                    path = urlsplit(self.path).path
                    kind = path if "/artifacts/" not in path else "artifacts"
                    proxy.calls[f"{self.command} {kind}"] += 1
                    fails = chance.random() < proxy.failing
                    proxy.failed += fails
                    lost = fails and proxy.failed % 2
                time.sleep(proxy.delay)
                if fails and not lost:
                    self.give(500, "text/plain", b"a seeded failure")
                    return
                connection = HTTPConnection(host, timeout=60)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    content = response.read()
                    kind = response.getheader("Content-Type") or "text/plain"
                    status = response.status
                except OSError:
                    status, kind, content = 502, "text/plain", b"no server"
                finally:
                    connection.close()
                if lost:
                    status, kind, content = 500, "text/plain", b"a seeded failure"
                self.give(status, kind, content)

            def give(self, status: int, kind: str, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
