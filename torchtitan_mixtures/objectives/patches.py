"""From pictures to patches and back: losses of denoising models are computed in patch space.

A patch is a token; its vector is laid out `(patch_row, patch_col, channel)`, channels last, which
is what DiT's final layer puts out (Peebles and Xie 2022, arXiv 2212.09748, 3.2).
"""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut pictures into square patches, row by row.

    Args:
        images: `(batch, channels, height, width)`.
        patch_size: Height and width of a patch.

    Returns:
        `(batch, tokens, patch_size**2 * channels)`.

    Raises:
        ValueError: Height or width is not a multiple of the patch.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size = {patch_size}: must divide height and width of the input, here {height} "
            f"and {width}."
        )
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 3, 5, 1)  # (batch, rows, columns, patch, patch, channels)
    return patches.reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(
    patches: Tensor, patch_size: int, channels: int, height: int, width: int | None = None
) -> Tensor:
    """Put patches together again, the inverse of `patchify`.

    Args:
        patches: `(batch, tokens, patch_size**2 * channels)`.
        patch_size: Height and width of a patch.
        channels: Channels of a pixel.
        height: Height of the pictures.
        width: Their width; None: as their height.

    Returns:
        `(batch, channels, height, width)`.
    """
    width = height if width is None else width
    rows, columns = height // patch_size, width // patch_size
    images = patches.reshape(-1, rows, columns, patch_size, patch_size, channels)
    images = images.permute(0, 5, 1, 3, 2, 4)  # (batch, channels, rows, patch, columns, patch)
    return images.reshape(-1, channels, height, width)
