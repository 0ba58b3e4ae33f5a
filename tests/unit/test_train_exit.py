"""How `python -m torchtitan_mixtures.train` ends."""

from __future__ import annotations

import subprocess
import sys

from tests.jobs import ROOT

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
