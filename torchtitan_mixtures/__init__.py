"""TorchTitan plugin that pretrains sparse and multimodal mixtures.

Importing this package does two things, in this order: it points TorchTitan at the CPU where there
is no accelerator, and it registers the train spec of every family in `models.FAMILIES`.
"""

from importlib import import_module

from torchtitan_mixtures import device

device.prepare()

from torchtitan.protocols.train_spec import register_train_spec  # noqa: E402

from torchtitan_mixtures.models import FAMILIES  # noqa: E402

for _family in FAMILIES:
    register_train_spec(
        _family, import_module(f"torchtitan_mixtures.models.{_family}").get_train_spec()
    )
