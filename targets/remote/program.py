"""Our side of a native program on a device; ``native.py`` says what the two say to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError
from deploykit.targets.host import Guest
from deploykit.targets.registry import FloatArray
from deploykit.targets.remote.session import Session
from deploykit.targets.remote.wording import plain

__all__ = ["Program"]

_MEMORY_RUNS = 3  # the first allocates; later ones may grow the arena once more


class Program:
    """The program while it runs on the device; errors name the files as this machine does.

    An answer may take ``seconds``.
    """

    def __init__(
        self, session: Session, words: Sequence[str], threads: int, who: str, seconds: float
    ) -> None:
        self._session, self._names, self._seconds = session, dict[str, str](), seconds
        command, self._started = session.start(words)
        self._guest = Guest(f"the runner ({who})", command, threads)

    def close(self) -> None:
        """End it, here and there."""
        self._guest.close()
        self._session.stop(self._started)

    def say(self, line: str, data: bytes = b"") -> dict[str, Any]:
        """The header of its answer to a request.

        Raises:
            DeploykitError: as it says; MeasurementError if it is dead.
        """
        return self._exchange(line, data)[0]

    def _exchange(self, line: str, data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        try:
            message = f"{line}\n".encode("ascii") + data
            return self._guest.exchange(message, timeout=self._seconds)
        except DeploykitError as error:
            raise plain(error, self._session, self._names) from error

    def load(self, path: Path, threads: int) -> int:
        """The number of a file that it has loaded."""
        return int(self._loaded(path, threads)["model"])

    def _loaded(self, path: Path, threads: int) -> dict[str, Any]:
        there = self._session.send(path)
        self._names[there] = str(path)
        return self.say(f"load {threads} {there}")

    def give(self, images: FloatArray) -> None:
        """The images that it computes on from now on."""
        data = np.ascontiguousarray(images, dtype="<f4")
        self.say(" ".join(["input", *map(str, data.shape)]), data.tobytes())

    def run(self, model: int) -> FloatArray:
        """Logits float32 (N, classes) of the images."""
        header, body = self._exchange(f"run {model}")
        logits = np.frombuffer(body, dtype="<f4").astype(np.float32)
        return logits.reshape([int(size) for size in header["shape"]])

    def kernels(self, model: int) -> dict[str, int]:
        """As ``Target.kernels``."""
        found = self.say(f"kernels {model}").get("kernels", {})
        return {str(name): int(count) for name, count in found.items()}

    def memory(self, path: Path, threads: int, images: FloatArray) -> dict[str, Any]:
        """Peak memory and load time of one file in this otherwise empty process."""
        loaded = self._loaded(path, threads)
        model = int(loaded["model"])
        self.give(images)
        for _ in range(_MEMORY_RUNS):
            self.run(model)
        return {
            "peak_rss_bytes": int(self.say("memory")["peak_rss_bytes"]),
            "load_ms": int(loaded["load_ns"]) / 1e6,
            "kernels": self.kernels(model),
        }

    def timed(
        self,
        models: Sequence[int],
        request: Mapping[str, Any],
        progress: Callable[[float, str], None] | None,
    ) -> list[dict[str, Any]]:
        """The models by the common protocol, whose clock only runs inside the timed calls."""
        from deploykit.targets.protocol import Timing, run_protocol
        from deploykit.targets.worker import plain_series

        now = 0

        def call(model: int) -> None:
            nonlocal now
            now += int(self.say(f"time {model}")["ns"])

        timing = Timing(
            **{key: request[key] for key in ("min_samples", "min_seconds", "max_seconds",
                                             "warmup_seconds", "seed")}
        )  # fmt: skip
        series = run_protocol(
            [partial(call, model) for model in models],
            timing,
            clock=lambda: now,
            progress=progress,
        )
        return [plain_series(one) for one in series]
