"""A headless Chromium, driven through its debugging pipe (Chrome DevTools Protocol).

Its clock is the real one: with ``--virtual-time-budget`` the page is captured before MLflow has drawn.
"""

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from clock import slowness

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --remote-debugging-pipe --window-size=1400,1000"""


class Browser:
    """A fresh profile with one page. A context manager."""

    def __init__(self, profile: Path) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()

        def as_3_and_4() -> None:  # where the protocol has its pipes
            inbound, outbound = os.dup(read), os.dup(write)
            os.dup2(inbound, 3)
            os.dup2(outbound, 4)

        command = ["chromium", *FLAGS.split(), f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(  # the function only calls dup: safe beside threads
            command,
            preexec_fn=as_3_and_4,  # noqa: PLW1509
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._buffer, self._calls, self._session = b"", 0, ""

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20 * slowness())
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **params: Any) -> dict:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                chunk = os.read(self._read, 1 << 16)
                assert chunk, "the browser has gone"
                self._buffer += chunk
            raw, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("id") == self._calls:
                return answer.get("result", {})

    def open(self, url: str) -> None:
        self._session = ""
        target = self.call("Target.createTarget", url=url)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; None where it throws, or the page is just changing."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer.get("result", {}).get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
