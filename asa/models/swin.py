"""The Swin backbone: MONAI's 3-D Swin transformer (Liu et al., ICCV 2021; Tang et al., CVPR 2022).

Letters: volume `B C D H W`, embedding width e; level k = 0..4 has 1 / 2^(k+1) of the volume's resolution and e * 2^k
channels; tokens `B L E` are those of the last level, E = 16 e, in raster order.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asa.errors import require
from asa.ops.patches import grid_size, triple

STRIDE = 32  # edge in voxels of a token of the last level


class Swin(nn.Module):
    """Swin transformer of four stages, each of two blocks and a patch merging as published.

    It takes volumes of any size that is divisible by 32; `img_size` is the size of training crops and of windows.

    Args:
        img_size, in_channels: volume size in voxels, one number or (D, H, W); channels C.
        embed_dim: width e after the patch embedding of 2^3 voxels.
        depths, num_heads, window: blocks and attention heads of each stage, edge of an attention window in tokens.
        checkpointing: recompute what is inside the blocks in the backward pass: less memory, one more forward pass.

    Raises:
        ImportError: einops, which MONAI's Swin needs, is not installed.
        ValueError: a size that is not divisible by 32.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 96,
        in_channels: int = 1,
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        checkpointing: bool = False,
    ) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer  # takes longer than PyTorch to import

        super().__init__()
        require("einops", "swin", "MONAI's Swin")
        self.img_size, self.in_channels, self.embed_dim = triple(img_size), in_channels, 16 * embed_dim
        self.grid = grid_size(self.img_size, STRIDE)
        self.widths = [embed_dim * 2**level for level in range(5)]
        with torch.device("cpu"):  # MONAI reads values of a tensor that it makes, which a meta tensor does not have
            swin = SwinTransformer(
                in_chans=in_channels,
                embed_dim=embed_dim,
                window_size=(window,) * 3,
                patch_size=(2, 2, 2),
                depths=depths,
                num_heads=num_heads,
                use_checkpoint=checkpointing,
                # "merging" reads two of the eight neighbours twice and two never in older versions of MONAI.
                downsample="mergingv2",
            )
        self.swin = swin.to(torch.get_default_device())

    def levels(self, volume: Tensor) -> list[Tensor]:
        """Features of the five levels, finest first, each normalised over its channels: `(B, e * 2^k, ...)`.

        A ValueError for other channels, or a size that is not divisible by 32.
        """
        if volume.ndim != 5 or volume.shape[1] != self.in_channels:
            raise ValueError(
                f"this network takes volumes of shape (batch, {self.in_channels}, D, H, W), got {tuple(volume.shape)}"
            )
        self.token_grid(volume)  # checks the size
        return self.swin(volume)

    def token_grid(self, volume: Tensor) -> tuple[int, int, int]:
        """Tokens of the last level along each axis of volumes `(B, C, D, H, W)`."""
        return grid_size(volume.shape[2:], STRIDE)

    def no_weight_decay(self) -> set[str]:
        """The parameters that weight decay is not applied to, beside biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def layers_above(self, name: str) -> int:
        """Layers between a parameter and the output, 1 for the last block, as of `SWViT`."""
        depths = [len(getattr(self.swin, f"layers{stage}")[0].blocks) for stage in range(1, 5)]
        found = re.match(r"swin\.layers(\d)\.0\.(?:blocks\.(\d+))?", name)
        if found is None:
            return sum(depths) + 1
        stage = int(found[1])
        block = depths[stage - 1] - 1 if found[2] is None else int(found[2])  # the merging comes after the last one
        return sum(depths[stage - 1 :]) - block

    def forward(self, volume: Tensor) -> Tensor:
        """The tokens of the last level: `(B, C, D, H, W)` -> `(B, L, E)`."""
        return self.levels(volume)[-1].flatten(2).transpose(1, 2)


class SwinPatches(nn.Module):
    """The features of a Swin at 1/8 of the resolution as tokens of patches of 8^3 voxels, for a linear probe."""

    patch_size = 8

    def __init__(self, encoder: Swin) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> tokens `(B, L, 4 e)` in raster order."""
        return self.encoder.levels(volume)[2].flatten(2).transpose(1, 2)
