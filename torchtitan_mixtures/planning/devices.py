"""Published figures of devices, and of the links between them.

Each row names its documents. FLOPs are without sparsity, with which data sheets print twice as
many; links are in one direction, where data sheets print the sum of both; a network has one adapter
for each GPU, as in the systems that are named.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Attributes:
        name: As the command line takes it.
        memory: Bytes. Data sheets say GB of what is GiB, but for a few per mille.
        bfloat16_flops: Products in bfloat16 with sums in float32, FLOPs per second.
        float32_flops: Products in float32, FLOPs per second.
        bandwidth: Of its memory, bytes per second.
        link: To other devices of its node, bytes per second in one direction.
        network: To devices of other nodes, bytes per second in one direction.
        of_a_node: Devices of a node.
        sources: Documents the figures are from.
    """

    name: str
    memory: int
    bfloat16_flops: float
    float32_flops: float
    bandwidth: float
    link: float
    network: float
    of_a_node: int = 8
    sources: str = ""


_A100 = (
    "data sheet NVIDIA A100 (SXM), 2021; network: 200 Gbit/s, "
    "docs.nvidia.com/dgx/dgxa100-user-guide"
)
_H100 = (
    "data sheet NVIDIA H100 (SXM5), 2023; network: 400 Gbit/s, "
    "docs.nvidia.com/dgx/dgxh100-user-guide"
)
_H200 = "data sheet NVIDIA H200 (SXM), 2024; network as DGX H100, which DGX H200 is but for memory"
_B200 = (
    "data sheet NVIDIA DGX B200, 2024, an eighth of the system; network: 400 Gbit/s, "
    "docs.nvidia.com/dgx/dgxb200-user-guide"
)
_MI300X = (
    "data sheet AMD Instinct MI300X, 2023, whose 7 links to the other devices of a node have 64 "
    "GB/s each; it prints no network: 400 Gbit/s an adapter, as beside H100, is assumed"
)


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40g", 40 * GIB, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, sources=_A100),
        Device("a100-80g", 80 * GIB, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, sources=_A100),
        Device("h100-80g", 80 * GIB, 989.4e12, 66.9e12, 3.35e12, 450e9, 50e9, sources=_H100),
        Device("h200-141g", 141 * GIB, 989.4e12, 66.9e12, 4.8e12, 450e9, 50e9, sources=_H200),
        Device("b200-180g", 180 * GIB, 2250e12, 75e12, 8e12, 900e9, 50e9, sources=_B200),
        Device("mi300x-192g", 192 * GIB, 1307.4e12, 163.4e12, 5.3e12, 448e9, 50e9, sources=_MI300X),
    )
}


def find_device(name: str) -> Device:
    """Look up a device.

    Raises:
        ValueError: It is not in the table; lists those that are.
    """
    if name not in DEVICES:
        raise ValueError(f"--device {name}: must be one of {', '.join(DEVICES)}.")
    return DEVICES[name]
