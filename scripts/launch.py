"""torchrun for scripts/train.sh: an error in what the user asked for ends with its one message.

torchrun follows every failure with a traceback of its own. `torchtitan_mixtures.train` exits with
code 2 once it has printed what is wrong with the input; there is nothing to add to that.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

USER_ERROR = 2


def launch(arguments: list[str]) -> int:
    """Run torchrun with these arguments; return the exit code for the shell."""
    # What they would log about a failed process is in the exception below.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    try:
        main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR:
            raise
        if rank != 0:
            print(f"error: rank {rank} stopped; its message is shown with LOG_RANK={rank}.")
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
