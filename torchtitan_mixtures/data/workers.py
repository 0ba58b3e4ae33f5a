"""Worker processes of data loaders."""

import multiprocessing
import signal
import sys

from torch.multiprocessing import (
    _prctl_pr_set_pdeathsig,  # pyrefly: ignore [missing-module-attribute]
)


def end_with_parent(worker_id: int) -> None:
    """Let a worker be killed with the process that it works for; `worker_init_fn` of `DataLoader`.

    PyTorch's own workers look whether it is alive while they wait for work, but not while they hand
    over a result that does not fit a pipe. They would stay for ever then, and keep the connections
    of a killed rank open: the others would wait for it.

    Args:
        worker_id: Number of the worker.
    """
    if sys.platform == "linux":
        _prctl_pr_set_pdeathsig(signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it was killed before this
            sys.exit(1)
