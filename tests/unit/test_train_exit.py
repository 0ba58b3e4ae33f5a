"""How `python -m torchtitan_mixtures.train` ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gang import free_port
from tests.jobs import ROOT, TRAIN_CONFIGS

LEAVING = """
import atexit

from torchtitan_mixtures import train


class Global:
    def __del__(self):
        print("torn down")


something = Global()
atexit.register(print, "registered")
print("said", end=" ")
train.leave()
"""


def test_a_run_ends_without_tearing_the_interpreter_down():
    """What is registered for the end runs, what was printed arrives, and no global is destroyed."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "said registered\n"


INTERRUPTED = """
import multiprocessing
import time

from torchtitan_mixtures import train


def interrupt(job):
    worker = multiprocessing.Process(target=time.sleep, args=(1000,))
    worker.start()
    print(worker.pid, flush=True)
    raise KeyboardInterrupt


if __name__ == "__main__":
    train.parse_job = lambda arguments: None
    train.train = interrupt
    train.main([])
    print("not reached")
"""
LINE = "interrupted; finished checkpoints are kept"


def test_an_interrupted_run_ends_with_one_line_and_without_workers():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, f"{LINE}\n")
    wait_for(lambda: not is_running(int(done.stdout)), 5)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("is_stuck", [False, True])
def test_ctrl_c_ends_training_with_one_line_of_each_rank(tmp_path: Path, is_stuck: bool):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torchtitan_mixtures.train",
        f"--config={TRAIN_CONFIGS / 'mot' / 'debugmodel.toml'}", "--validation.no-enable",
        "--training.seq_len=128", "--training.local_batch_size=1", "--training.steps=100000",
        "--metrics.log_freq=1", "--checkpoint.enable", "--checkpoint.interval=2",
        "--training.dataloader.num_workers=1", f"--job.dump_folder={tmp_path}",
    ]  # fmt: skip
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                processes.append(subprocess.Popen(
                    command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                ))  # fmt: skip
        wait_for(lambda: "step:  3" in logs[0].read_text(), 120)
        if is_stuck:
            processes[1].send_signal(signal.SIGSTOP)  # takes part in nothing any more
        interrupted = processes[:1] if is_stuck else processes
        workers = [pid for process in interrupted for pid in children(process.pid)]
        assert len(workers) >= len(interrupted)
        for process in interrupted:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its workers get it too
        for process, log in zip(interrupted, logs, strict=False):
            assert process.wait(20) == 130
            text = log.read_text()
            assert text.endswith(f"{LINE}\n") and text.count(LINE) == 1
            assert "Traceback" not in text
        wait_for(lambda: not any(map(is_running, workers)), 5)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
