"""Run a function on several gloo processes of this machine, quickly and without leaving any behind.

Processes are forked from a server that has already imported TorchTitan and this package, so
starting eight of them takes about a second instead of half a minute.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torchtitan_mixtures.train"])


def preload(*modules: str) -> None:
    """Name further modules that processes have imported at their start; before the first run."""
    _context.set_forkserver_preload(["torchtitan_mixtures.train", *modules])


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _run_rank(
    pipe: Connection,
    rank: int,
    world: int,
    environment: dict[str, str],
    init: bool,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        if init:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world
            )
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not a clean exit: gloo threads of a group that failed can block one.
        os._exit(0)


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 120,
    init: bool = True,
) -> list[Any]:
    """Run `function(*arguments)` on `world` ranks and return what each returned, by rank.

    Args:
        function: Defined at a module's top level; runs with one thread.
        world: Number of processes.
        arguments: Picklable.
        timeout: Seconds after which all are killed.
        init: Initialise a gloo process group first. False: only set torchrun's environment.

    Raises:
        RuntimeError: A rank raised (its traceback is the message), died, or time ran out.
    """
    environment = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test",
    }
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes: list[Connection] = []
        processes = []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run_rank,
                args=(theirs, rank, world, environment, init, store, function, arguments),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(pipes))) - set(results))
            raise RuntimeError(f"ranks {missing} timed out after {timeout:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
