"""The real server as a process of its own, and a plain client that sends exactly what a test says."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


class Server:
    """`megatron-cpt web ROOT` on a free port."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0, root: str = "runs") -> None:
        self.folder = folder
        command = [sys.executable, "-m", "megatron_cpt", "web", root, "--port", str(port), *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)$", self.address)
        assert found, self.address + self.process.stdout.read()
        self.port, self.token = int(found.group(1)), found.group(2)
        self.cookie = f"megatron_cpt_{self.port}={self.token}"

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.communicate()

    def request(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request. Headers that are not given are those of our own page; None leaves one out."""
        plain: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}", "Cookie": self.cookie}
        if method == "POST":
            plain |= {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        plain |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in plain.items():
                if value is not None:
                    connection.putheader(name, value)
            if body is not None and "Content-Length" not in plain:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask the API as the page does; the answer must be a good one."""
        if body is None:
            status, _, text = self.request(path)
        else:
            status, _, text = self.request(path, "POST", json.dumps(body).encode())
        assert status == 200, (status, text)
        return json.loads(text)
