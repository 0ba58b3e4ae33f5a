"""Processes of a function on several ranks: results, errors, and none left behind."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist

from tests.gang import run_ranks

pytestmark = pytest.mark.distributed


def add_ranks(rank_to_fail: int | None, seconds: float) -> tuple[float, int]:
    """The sum of all ranks, late or not at all, and the number of threads."""
    if dist.get_rank() == rank_to_fail:
        raise ValueError("no sum")
    time.sleep(seconds)
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return float(total), torch.get_num_threads()


def test_ranks_leave_no_process_behind_whatever_happens():
    assert run_ranks(add_ranks, 3, None, 0.0) == [(3.0, 1)] * 3
    with pytest.raises(RuntimeError, match=r"rank 1 failed:\n(.*\n)*ValueError: no sum"):
        run_ranks(add_ranks, 2, 1, 60.0)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] timed out after 2 s"):
        run_ranks(add_ranks, 2, None, 60.0, timeout=2)
    assert not multiprocessing.active_children()
