"""Worker processes of loaders end with the process that they work for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs import ROOT

CODE = """
import sys, time, torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchtitan_mixtures.data.workers import end_with_parent

class Large(IterableDataset):
    def __iter__(self):
        while True:
            yield b"x" * 1_000_000  # does not fit a pipe: a worker waits until it is taken

if __name__ == "__main__":
    loader = DataLoader(Large(), batch_size=None, num_workers=2, prefetch_factor=8,
                        collate_fn=lambda item: item, worker_init_fn=end_with_parent)
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    time.sleep(60)
"""


# What ends them is a signal that Linux alone sends when a parent dies; see `data/workers.py`.
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tell a child")
def test_workers_end_when_their_process_is_killed() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    workers = [int(number) for number in run.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.5)  # until their pipes are full
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=10)
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that nobody has asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
