"""How ranks share the streams of an MMDiT.

Streams are made of parts: a prompt, the image, registers. Each part is cut by itself, so that every
rank has the same share of every stream. Attention does not mind in which order tokens come: they
have their positions from before.

Tensor parallelism cuts parts of any length. What is missing for equal shares is filled up with
rows of zeros that flow along, but that attention never sees: they are taken out behind the
all-gather. For this the number of rows is noted where the streams are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.parallel.style import ParallelStyle

from torchtitan_mixtures.models.mmdit.args import IMAGE, MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.model import REGISTERS
from torchtitan_mixtures.tensor_parallel import gather, scatter

STREAM = 1
"""The dimension of a residual stream, `(batch, seq, dim)`, that ranks share."""


class Shares:
    """How the streams of one model lie on ranks, in the forward pass that runs or ran last.

    A rank's share of a stream is one piece of each of its parts, in the stream's order, each filled
    up to a multiple of the ranks. Recomputed blocks read it again, so the backward pass of a batch
    must come before the next batch of other lengths.

    Args:
        args: The model's arguments.
    """

    def __init__(self, args: MMDiTModelArgs) -> None:
        if args.single_stream:
            self.parts = {IMAGE: (REGISTERS + IMAGE, *args.prompt_names, IMAGE)}
        else:
            self.parts = {name: (REGISTERS + name, name) for name in args.stream_dims}
        self.lengths: dict[str, int] = {}

    def lengths_of(self, stream: str) -> list[int]:
        """Rows of each part of a stream."""
        return [self.lengths[part] for part in self.parts[stream] if part in self.lengths]

    def join(self, stream: str, x: Tensor, ranks: int) -> Tensor:
        """Take the shares of all ranks, `(batch, ranks * share, dim)`, for a stream.

        Returns:
            `(batch, seq, dim)`.
        """
        lengths = self.lengths_of(stream)
        if not any(length % ranks for length in lengths):
            return x  # in the order of the ranks
        if len(lengths) == 1:
            return x[:, : lengths[0]]
        shares = x.unflatten(1, (ranks, -1)).split([-(-n // ranks) for n in lengths], dim=2)
        rows = zip(shares, lengths, strict=True)
        return torch.cat([share.flatten(1, 2)[:, :length] for share, length in rows], dim=1)

    def lay_out(self, stream: str, x: Tensor, ranks: int) -> Tensor:
        """Undo `join`, with zeros where there was nothing."""
        lengths = self.lengths_of(stream)
        if not any(length % ranks for length in lengths):
            return x
        if len(lengths) == 1:
            return fill_up(x, ranks)
        parts = x.split(lengths, dim=1)
        shares = [fill_up(part, ranks).unflatten(1, (ranks, -1)) for part in parts]
        return torch.cat(shares, dim=2).flatten(1, 2)


def fill_up(x: Tensor, ranks: int) -> Tensor:
    """Add rows of zeros, `(batch, seq, dim)`, until each rank has as many."""
    missing = -x.shape[1] % ranks
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class CutParts(ParallelStyle):
    """Where streams that reach every rank whole are cut, part by part.

    As `PartOfInput`: modules before this one get one term of the gradient's sum, and what is
    applied later cuts first.
    """

    def __init__(self, shares: Shares | None = None) -> None:
        """Take where lengths are noted; None: they must be multiples of the ranks."""
        self.shares = shares

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            parts = cast(dict[str, Tensor], inputs[0])
            lengths = {name: part.shape[1] for name, part in parts.items()}
            if self.shares is not None:
                self.shares.lengths = lengths
            else:
                check_lengths(lengths, ranks)
            # In the memory layout that later blocks get, too, so that one compiled graph does.
            cut = {name: fill_up(part, ranks).chunk(ranks, 1)[rank].contiguous()
                   for name, part in parts.items()}  # fmt: skip
            return (cut,)

        module.register_forward_pre_hook(before, prepend=True)
        return module


class JointSubLayer(ParallelStyle):
    """`SubLayer` for several streams at once, which takes out the rows that fill them up."""

    def __init__(self, shares: Shares) -> None:
        """Take where the streams' lengths are noted."""
        self.shares = shares

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        shares, ranks = self.shares, device_mesh.size()

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            whole = {
                name: shares.join(name, gather(x, device_mesh, STREAM, Partial()), ranks)
                for name, x in inputs[0].items()
            }
            return (whole, *inputs[1:])

        def after(_: nn.Module, inputs: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: scatter(shares.lay_out(name, x, ranks), device_mesh, STREAM, Partial())
                for name, x in output.items()
            }

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        return module


class GatheredImage(ParallelStyle):
    """A module that works on shares of the image's tokens, of which every rank needs all."""

    def __init__(self, shares: Shares) -> None:
        """Take where the streams' lengths are noted."""
        self.shares = shares

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def after(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            whole = gather(output, device_mesh, STREAM, Replicate())
            return whole[:, : self.shares.lengths[IMAGE]]

        module.register_forward_hook(after)
        return module


def check_lengths(lengths: Mapping[str, int], ranks: int) -> None:
    """Check that ranks can share each part of a sequence (description -> tokens).

    Raises:
        ValueError: Names those that they cannot.
    """
    wrong = [f"{length} of {name}" for name, length in lengths.items() if length % ranks]
    if wrong:
        raise ValueError(
            f"parallelism.context_parallel_degree = {ranks}: does not divide the numbers of tokens "
            f"{', '.join(wrong)}; each must be a multiple of it."
        )
