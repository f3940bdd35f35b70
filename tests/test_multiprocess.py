"""The same training script in one process and in two."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import multiprocess_worker
import numpy as np
import pytest

COMPILE_QUICKLY = True

WORKER = pathlib.Path(multiprocess_worker.__file__)
ROOT = WORKER.parent.parent
TIMEOUT = 300  # seconds; the run itself takes a few


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(process, count, port):
    # The workers have devices of their own: nothing of this process's JAX settings may leak in.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    arguments = [sys.executable, str(WORKER), str(process), str(count), str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, **pipes)


@pytest.fixture(scope="module")
def two_processes():
    """The losses that each of two processes reports."""
    port, count = free_port(), 2
    workers = [start(process, count, port) for process in range(count)]
    try:
        outputs = [worker.communicate(timeout=TIMEOUT) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    return [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]


def test_two_processes_train_as_one(two_processes):
    one = multiprocess_worker.losses(jax.devices("cpu")[:1])
    for losses in two_processes:
        assert losses.keys() == one.keys()
        for layout, expected in one.items():
            assert len(expected) == multiprocess_worker.STEPS
            assert expected[-1] < 0.5 * expected[0]
            np.testing.assert_allclose(losses[layout], expected, rtol=1e-5)
