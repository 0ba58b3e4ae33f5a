"""Let TorchTitan run where there is no accelerator (CPU and gloo).

TorchTitan 0.2.2 asks PyTorch for the accelerator once, in `torchtitan.tools.utils`, falls back to
CUDA, and other modules copy the answer. Where there is no accelerator `prepare()` changes exactly
this, in every module of TorchTitan that is loaded by then (those loaded later copy it):

1. `device_type` becomes "cpu".
2. `device_module` becomes `CpuModule`, which forwards to `torch.cpu` and adds what TorchTitan asks
   of a CUDA module: name, capacity and peak memory of the device (the peak is that of the process,
   as the operating system counts it).
3. `torchtitan.tools.utils.get_device_info` returns these two, for modules that ask it when they are
   loaded.
4. `torchtitan.tools.utils.get_peak_flops` returns NaN. TorchTitan would assume an A100 and report
   a utilisation of 0.00 %; `metrics.py` leaves utilisation out where the peak is NaN.

With an accelerator it changes nothing. What gloo needs of FSDP is set on the modules that need it,
in `parallelize.py`.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
import types
from typing import Any

import torch
from torch import _utils

DEVICE = "TORCHTITAN_MIXTURES_DEVICE"
"""Environment variable that leaves accelerators alone if it is "cpu", set before the package is
imported: plans are made on the CPU of whatever machine there is."""


class CpuModule(types.ModuleType):
    """The part of `torch.cuda`'s interface that TorchTitan uses, for the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def set_device(self, device: torch.device | str | int) -> None:
        """Do nothing: there is one CPU device."""

    def current_device(self) -> int:
        """Return the index of the only CPU device."""
        return 0

    def get_device_name(self, device: torch.device | None = None) -> str:
        """Return the processor's architecture, as "CPU x86_64"."""
        return f"CPU {platform.machine()}"

    def get_device_properties(self, device: torch.device | None = None) -> types.SimpleNamespace:
        """Return the machine's memory in bytes as `total_memory`."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(total_memory=memory)

    def memory_stats(self, device: torch.device | None = None) -> dict[str, int]:
        """Return the peak resident memory of this process, in bytes, under CUDA's keys."""
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB except on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: torch.device | None = None) -> None:
        """Do nothing: the operating system's peak cannot be reset."""

    def empty_cache(self) -> None:
        """Do nothing: the CPU allocator keeps no cache."""


def has_accelerator() -> bool:
    """Say whether there is an accelerator to run on: PyTorch sees one, and it may be used."""
    if os.environ.get(DEVICE) == "cpu":
        return False
    return _utils._get_available_device_type() is not None


def prepare() -> None:
    """Point TorchTitan at the CPU if there is no accelerator."""
    if has_accelerator():
        return
    from torchtitan.tools import utils

    utils.get_peak_flops = lambda device_name: math.nan
    device_module = CpuModule("torchtitan_mixtures.device.CpuModule")
    utils.get_device_info = lambda: ("cpu", device_module)
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            if hasattr(module, "device_type"):
                setattr(module, "device_type", "cpu")  # noqa: B010  (a module of any kind)
            if hasattr(module, "device_module"):
                setattr(module, "device_module", device_module)  # noqa: B010
