"""A command that ends with the process that wants it: `python leash.py PID COMMAND ...`.

A study that is killed with SIGKILL cannot end what it runs, which would go on for nobody and stand
in the way of the same study started again. This waits beside the command and looks whether the
process PID is still its parent. It is run by its path, not with `-m`: the package takes seconds to
import.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SECONDS = 0.5
"""Between two looks."""


def leashed(command: Sequence[str]) -> list[str]:
    """Say how to run a command that is to end with this process."""
    return [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code, or 128 and the number of the signal that ended it."""
    owner, *command = arguments
    # What this one inherits besides standard streams is the lock of the study's folder.
    process = subprocess.Popen(command, close_fds=False)
    signal.signal(signal.SIGTERM, lambda *unused: process.terminate())
    # Ctrl-C reaches the command too, which knows better what to do. Not SIG_IGN: it would inherit.
    signal.signal(signal.SIGINT, lambda *unused: None)
    while True:
        try:
            code = process.wait(SECONDS)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if os.getppid() != int(owner):
                process.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
