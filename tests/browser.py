"""A real Chromium, driven over a pipe by the DevTools protocol: the standard library is enough."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

__all__ = ["Browser", "Page", "chromium"]

_LIMIT = 60.0  # seconds a command may take; the machine may be busy
_MAX_FRAME = 1 << 16


def chromium() -> str | None:
    """Path of a Chromium on this machine, or None."""
    return next((p for name in ("chromium", "chromium-browser") if (p := shutil.which(name))), None)


class Browser:
    """One headless browser; messages are JSON, each ended by a nought byte, on files 3 and 4."""

    def __init__(self, profile: Path) -> None:
        path = chromium()
        assert path is not None
        their_in, self._out = _pipe()
        self._in, their_out = _pipe()
        arguments = [
            path, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-dev-shm-usage",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        nowhere = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
        actions: list[Any] = [
            nowhere,
            (os.POSIX_SPAWN_DUP2, 1, 2),
            (os.POSIX_SPAWN_DUP2, their_in, 3),
            (os.POSIX_SPAWN_DUP2, their_out, 4),
        ]
        self._process = os.posix_spawn(
            path, arguments, os.environ, file_actions=actions, setpgroup=0
        )
        os.close(their_in)
        os.close(their_out)
        self._count = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events that come before it are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait(self, method: str, session: str) -> None:
        """Until an event of that name has come."""
        while not any((e["method"], e.get("sessionId")) == (method, session) for e in self.events):
            self.events.append(self._receive())

    def open(self, path: Path, width: int, *, dark: bool = False, media: str = "screen") -> Page:
        """A page in a window ``width`` CSS pixels wide, when everything in it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        self.call("Emulation.setDeviceMetricsOverride", session, width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, media=media, features=[scheme])
        self.events.clear()
        self.call("Page.navigate", session, url=path.resolve().as_uri())
        self.wait("Page.loadEventFired", session)
        return Page(self, session, path.resolve().as_uri())

    def close(self) -> None:
        """End the browser and all its processes."""
        os.close(self._out)  # it ends with its pipe
        for _ in range(100):
            if os.waitpid(self._process, os.WNOHANG)[0]:
                break
            time.sleep(0.05)
        else:
            os.killpg(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        os.close(self._in)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], _LIMIT)
            assert ready, f"the browser said nothing for {_LIMIT:g} s"
            piece = os.read(self._in, _MAX_FRAME)
            assert piece, "the browser has gone"
            self._rest += piece
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message


class Page:
    """A loaded page."""

    def __init__(self, browser: Browser, session: str, url: str) -> None:
        self._browser, self._session, self._url = browser, session, url

    def evaluate(self, script: str) -> Any:
        """What a JavaScript expression comes to, as plain data."""
        answer = self._browser.call(
            "Runtime.evaluate", self._session, expression=script, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, scripts and the page's own security policy."""
        found = []
        for event in self._browser.events:
            if event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                found.append(f"{entry['level']}: {entry['text']}")
            elif event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                found.append(str(event["params"]))
        return found

    def requests(self) -> list[str]:
        """Addresses asked for, but the page's own."""
        sent = [e for e in self._browser.events if e["method"] == "Network.requestWillBeSent"]
        return [u for e in sent if (u := e["params"]["request"]["url"]) != self._url]

    def picture(self, path: Path) -> None:
        """The whole page, as a PNG."""
        data = self._browser.call(
            "Page.captureScreenshot", self._session, captureBeyondViewport=True
        )
        path.write_bytes(base64.b64decode(data["data"]))

    def paper(self, path: Path) -> None:
        """The page as a printer gets it, A4."""
        data = self._browser.call(
            "Page.printToPDF", self._session, paperWidth=8.27, paperHeight=11.69
        )
        path.write_bytes(base64.b64decode(data["data"]))


def _pipe() -> tuple[int, int]:
    """A pipe whose two files have numbers above those that a new process is given."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
