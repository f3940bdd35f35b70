"""All libraries on one workload: a process of each environment, and interleaved rounds."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from comparison.client import Client, WorkerDied
from comparison.libraries import libraries
from comparison.workloads import workload

PREPARE_SECONDS = 60.0  # compilation and first run of a measure
SLOW_SECONDS = 0.5  # programs slower than this run in the first rounds only,
MOST_SECONDS = 10.0  # or in fewer where they last so long in all
FEWEST_ROUNDS = 5
Record = dict[str, Any]


def rested(row: Record) -> bool:
    """Whether a slow program has had its rounds."""
    count, spent = len(row["seconds"]), row["spent"]
    slow = count >= FEWEST_ROUNDS and spent > SLOW_SECONDS * count
    return slow or (count > 0 and spent >= MOST_SECONDS)


class Contest:
    """The processes of a workload. What they answered is in ``record``."""

    def __init__(
        self, name: str, preset: str, measures: Sequence[str], cpus: Sequence[int], log: TextIO
    ) -> None:
        work = workload(name, preset)
        self.measures = measures
        self.known = libraries()
        self.process = lambda python: Client(python, name, preset, cpus, log)
        self.clients: dict[str, Client] = {}  # by interpreter
        self.pythons: dict[str, str] = {}  # of the libraries
        self.references: dict[str, np.ndarray] = {}
        about = {"description": work.description, "rows": work.rows, "parameters": work.size}
        self.record: Record = {**about, "libraries": {}}

    def ask(self, name: str, **request: Any) -> Record:
        """A library's answer; where its process dies of it, an error and a new process."""
        python = self.pythons[name]
        if python not in self.clients:
            self.clients[python] = self.process(python)
        try:
            return self.clients[python].ask(PREPARE_SECONDS, library=name, **request)
        except WorkerDied as error:
            self.clients.pop(python).close()
            self.again(python)
            return {"error": str(error)}

    def again(self, python: str) -> None:
        """What a process had ready, in a new one."""
        for name in (name for name, other in self.pythons.items() if other == python):
            record = self.record["libraries"][name]
            if "versions" in record:
                self.load(name)
            for measure, row in record["measures"].items():
                if "seconds" in row and not rested(row):
                    self.prepared(name, measure)

    def load(self, name: str) -> Record:
        """A library's measures and versions."""
        library = self.known[name]
        about: Any = {"module": library.module, "function": library.function}
        return self.ask(name, do="load", packages=library.packages, **about)

    def prepare(self, name: str, python: pathlib.Path | str) -> None:
        """Compiles all measures of a library; ``python`` is a path, or why there is none."""
        record: Record = {"measures": {}}
        self.record["libraries"][name] = record
        if isinstance(python, str):
            record["error"] = python
            return
        self.pythons[name] = str(python)
        answer = self.load(name)
        if "error" in answer:
            record["error"] = answer["error"]
            return
        record["versions"], rows = answer["versions"], record["measures"]
        record["device"] = answer["device"]
        for measure in (measure for measure in self.measures if measure in answer["measures"]):
            reason = answer["measures"][measure]
            rows[measure] = {"skipped": reason} if reason else {}
            if not reason:
                rows[measure] = self.prepared(name, measure)

    def prepared(self, name: str, measure: str) -> Record:
        """The row of a measure that is ready to run, with its distance from fvp's result."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "values.npy")
            row = self.ask(name, do="prepare", measure=measure, path=str(path))
            if "error" in row:
                return row
            row = {"seconds": [], "cpu_seconds": [], "spent": 0.0, **row}
            row["spent"] += MOST_SECONDS * len(row["seconds"])
            if path.exists():
                values = np.load(path).astype(np.float64)
                reference = self.references.setdefault(measure, values)
                if values.shape == reference.shape:
                    distance = np.linalg.norm(values - reference) / np.linalg.norm(reference)
                    row["difference"] = float(distance)
            return row

    def round(self, count: int) -> None:
        """Every measure once with each library that has it, side by side."""
        names = list(self.pythons)
        first = count % len(names)
        for measure in self.measures:
            for name in names[first:] + names[:first]:
                row = self.record["libraries"][name]["measures"].get(measure, {})
                if "seconds" not in row or rested(row):
                    continue
                start = time.perf_counter()
                answer = self.ask(name, do="run", measure=measure)
                if "error" in answer:
                    row["error"] = answer["error"]
                    del row["seconds"]
                    continue
                row["spent"] += time.perf_counter() - start
                row["seconds"].append(answer["seconds"])
                row["cpu_seconds"].append(answer["cpu_seconds"])


@contextlib.contextmanager
def contest(
    name: str, preset: str, measures: Sequence[str], cpus: Sequence[int], logs: pathlib.Path
) -> Iterator[Contest]:
    """A contest whose processes are ended on the way out."""
    with (logs / f"{name}.txt").open("w") as log:
        this = Contest(name, preset, measures, cpus, log)
        try:
            yield this
        finally:
            for client in this.clients.values():
                client.close()
