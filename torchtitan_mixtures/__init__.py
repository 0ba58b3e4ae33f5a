"""TorchTitan plugin that pretrains sparse and multimodal mixtures.

Importing this package does two things, in this order: it points TorchTitan at the CPU where there
is no accelerator, and it registers the train spec of every family in `models.FAMILIES`.
"""

import os
from importlib import import_module

# Before numpy is first imported. Only tokenising an image uses its BLAS, for one small product
# after the other: waking a second thread costs more than it brings, and up to a hundred times
# more where the cores are busy training.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from torchtitan_mixtures import device

device.prepare()

from torchtitan.protocols.train_spec import register_train_spec  # noqa: E402

from torchtitan_mixtures.models import FAMILIES  # noqa: E402

for _family in FAMILIES:
    register_train_spec(
        _family, import_module(f"torchtitan_mixtures.models.{_family}").get_train_spec()
    )
