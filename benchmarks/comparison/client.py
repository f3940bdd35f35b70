"""The other end of worker.py: a process of an environment, and what it answered."""

from __future__ import annotations

import json
import os
import pathlib
import select
import subprocess
from collections.abc import Sequence
from typing import Any, TextIO

FOLDER = pathlib.Path(__file__).parents[1]


class WorkerDied(RuntimeError):
    """The process ended, or was ended because an answer took too long."""


class Client:
    """A worker process, pinned to CPUs, with as many threads."""

    def __init__(
        self, python: str, workload: str, preset: str, cpus: Sequence[int], log: TextIO
    ) -> None:
        command = [python, "-W", "ignore", "-m", "comparison.worker", workload, preset]
        threads = {f"{name}_NUM_THREADS": str(len(cpus)) for name in ("OMP", "MKL")}
        # SciPy's LAPACK, which JAX calls: where cores are shared, two threads are slower than one.
        threads["OPENBLAS_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            command,
            cwd=FOLDER,
            env={**os.environ, **threads, "PYTHONPATH": str(FOLDER)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )

    def read(self, timeout: float) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.close()
            raise WorkerDied(f"not finished after {timeout:.0f} s")
        if not (line := self.process.stdout.readline()):
            raise WorkerDied(f"exit status {self.process.wait()}")
        return json.loads(line)

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerDied(f"exit status {self.process.wait()}") from None
        return self.read(timeout)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
