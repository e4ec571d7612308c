"""Volumes to patch tokens and back.

Letters: volume `B C D H W` (W left to right), patch size s, grid T x H x W = the volume's sizes over s,
L = T*H*W tokens in raster order (W fastest), a token holds C*s^3 values in the order (C, depth, height, width).
"""

from collections.abc import Sequence

from torch import Tensor


def triple(size: int | Sequence[int]) -> tuple[int, int, int]:
    """A size along three axes from one number for all axes, or from three.

    Raises:
        ValueError: not one or three positive integers.
    """
    sizes = (size,) * 3 if isinstance(size, int) else tuple(int(n) for n in size)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"a size must be one or three positive integers (D, H, W), got {size}")
    return sizes


def grid_size(spatial: Sequence[int], patch_size: int) -> tuple[int, int, int]:
    """Patches along each axis of a volume.

    Args:
        spatial: the volume's sizes (D, H, W) in voxels.
        patch_size: edge of a patch in voxels.

    Raises:
        ValueError: a size that is not divisible by the patch size.
    """
    sizes = triple(spatial)
    if any(n % patch_size for n in sizes):
        raise ValueError(
            f"a volume of {tuple(sizes)} voxels is not a whole number of patches of {patch_size}: crop or pad it"
        )
    return sizes[0] // patch_size, sizes[1] // patch_size, sizes[2] // patch_size


def patchify(volume: Tensor, patch_size: int) -> Tensor:
    """Split volumes into patch tokens.

    Args:
        volume: `(B, C, D, H, W)`.
        patch_size: edge s of a patch in voxels.

    Returns:
        `(B, L, C*s^3)`, L in raster order.

    Raises:
        ValueError: sizes that are not divisible by s.
    """
    t, h, w = grid_size(volume.shape[2:], patch_size)
    b, c = volume.shape[:2]
    s = patch_size
    tokens = volume.reshape(b, c, t, s, h, s, w, s)
    tokens = tokens.permute(0, 2, 4, 6, 1, 3, 5, 7)  # B T H W C s s s
    return tokens.reshape(b, t * h * w, c * s**3)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch_size: int) -> Tensor:
    """Join patch tokens to volumes: the inverse of `patchify`.

    Args:
        tokens: `(B, L, C*s^3)`, L in raster order.
        grid: patches along each axis (T, H, W).
        patch_size: edge s of a patch in voxels.

    Returns:
        `(B, C, T*s, H*s, W*s)`.

    Raises:
        ValueError: a number or width of tokens that does not fit the grid.
    """
    t, h, w = triple(grid)
    b, length, width = tokens.shape
    s = patch_size
    if length != t * h * w or width % s**3:
        raise ValueError(f"{length} tokens of {width} values do not fill a grid of {(t, h, w)} patches of {s}^3 voxels")
    c = width // s**3
    volume = tokens.reshape(b, t, h, w, c, s, s, s)
    volume = volume.permute(0, 4, 1, 5, 2, 6, 3, 7)  # B C T s H s W s
    return volume.reshape(b, c, t * s, h * s, w * s)
