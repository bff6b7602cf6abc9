"""A headless Chromium for tests, driven over its debugging pipe: no driver and no further package.

Protocol: https://chromedevtools.github.io/devtools-protocol/, messages in JSON, ended by a zero byte, on the file
descriptors 3 and 4 of the browser.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "find_chromium"]

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
    "--window-size=1200,900",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 60.0  # seconds for any one answer: a busy machine starts slowly


def find_chromium() -> str:
    """The browser's program. Without one a test fails in CI, and is skipped elsewhere."""
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    message = f"none of {', '.join(NAMES)} was found; install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Browser:
    """One page of a browser of its own, closed on leaving the context.

    Args:
        dark: whether pages are told that the reader prefers dark colours.

    Attributes:
        errors: what went wrong on the page so far: console errors and warnings, exceptions, failed loads.
        requests: every address that the page asked for.
    """

    def __init__(self, dark: bool = False) -> None:
        self.dark = dark
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._next_id = 0
        self._session: str | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._buffer = b""

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        (their_read, self._write), (self._read, their_write) = os.pipe(), os.pipe()
        # bash puts the browser's ends onto 3 and 4 (a `preexec_fn` would fork a process of many threads).
        place = f'exec "$@" 3<&{their_read} 4>&{their_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", place, "bash", find_chromium(), *FLAGS, f"--user-data-dir={self._profile.name}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(their_read, their_write),
        )
        os.close(their_read)
        os.close(their_write)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        scheme = "dark" if self.dark else "light"
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def open(self, address: str | Path) -> None:
        """Load a page, or a file, to its end."""
        url = address.resolve().as_uri() if isinstance(address, Path) else address
        result = self._call("Page.navigate", url=url)
        assert "errorText" not in result, f"{url}: {result['errorText']}"
        self.wait_for(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in pixels."""
        size = {"width": width, "height": height}
        self._call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page; a promise is waited for.

        Raises:
            AssertionError: where the expression throws.
        """
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout: float = TIMEOUT) -> None:
        """Wait until an expression holds."""
        deadline = time.monotonic() + timeout
        while not self.evaluate(script):
            assert time.monotonic() < deadline, f"still not so after {timeout} s: {script}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._next_id += 1
        message: dict[str, Any] = {"id": self._next_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + TIMEOUT
        while self._next_id not in self._answers:
            self._receive(deadline, method)
        answer = self._answers.pop(self._next_id)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self, deadline: float, method: str) -> None:
        """Take in what has come, at least something."""
        ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{method}: no answer from the browser within {TIMEOUT} s"
        data = os.read(self._read, 1 << 20)
        assert data, f"{method}: the browser has ended with code {self._process.poll()}"
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in details["args"]))
        elif event == "Runtime.exceptionThrown":
            thrown = details["exceptionDetails"]
            self.errors.append(thrown.get("exception", {}).get("description", thrown["text"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.errors.append(details["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
