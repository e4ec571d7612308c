"""Restormer (Zamir et al., CVPR 2022), a published restoration network to compare RAT with.

Letters: image `B C H W`, label map `B H W`, upscaling factor s.
"""

from typing import Any

from monai.networks.nets.restormer import MDTATransformerBlock
from monai.networks.nets.restormer import Restormer as MONAIRestormer
from torch import Tensor, nn
from torch.nn import functional as F

from asa.models.cpu_kernels import ChannelNorm
from asa.restoration.regions import check_images


class Restormer(nn.Module):
    """MONAI's Restormer, with the published layer norm over channels in place of MONAI's instance norm.

    U-shaped, with attention between channels. It predicts the residual that is added to the image; for super-resolution
    the image is upscaled bilinearly first, as for the region attention transformer. It does not use regions.

    Args:
        in_channels: channels C of the image and of the result.
        upscale: factor s of super-resolution, 1 (none), 2 or 4.
        dim: features at full resolution, doubled at each of the lower ones.
        num_blocks, num_heads: blocks, and their attention heads, at each resolution.
        refinement: blocks at full resolution at the end.
        expansion: hidden width of the feed-forward networks over that of the features.

    Raises:
        ValueError: another upscaling factor.
    """

    regional = False

    def __init__(
        self,
        in_channels: int = 1,
        upscale: int = 1,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        refinement: int = 4,
        expansion: float = 2.66,
    ) -> None:
        super().__init__()
        if upscale not in (1, 2, 4):
            raise ValueError(f"upscale must be 1, 2 or 4, got {upscale}")
        self.in_channels, self.upscale = in_channels, upscale
        self.multiple = 2 ** (len(num_blocks) - 1)
        self.network = MONAIRestormer(
            2, in_channels, in_channels, dim, tuple(num_blocks), tuple(num_heads), refinement, expansion
        )
        for block in self.network.modules():
            if isinstance(block, MDTATransformerBlock):
                width = block.norm1.num_features
                block.norm1, block.norm2 = ChannelNorm(width), ChannelNorm(width)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith("temperature")}

    def check(self, image: Tensor, regions: Tensor) -> None:
        """Raise a ValueError for images of other channels, or label maps of another shape than the images."""
        check_images(image, regions, self.in_channels)

    def forward(self, image: Tensor, regions: Tensor) -> Tensor:
        """Restore images of any height and width.

        Args:
            image: `(B, C, H, W)`.
            regions: label map `(B, H, W)`, which is checked and not used.

        Returns:
            `(B, C, s*H, s*W)`.

        Raises:
            ValueError: other channels, or a label map of another size than the image.
        """
        self.check(image, regions)
        if self.upscale > 1:
            image = F.interpolate(image, scale_factor=self.upscale, mode="bilinear")
        h, w = image.shape[2:]
        # MONAI's asserts two features or more along each axis at the lowest resolution.
        bottom, right = (max(-n % self.multiple, 2 * self.multiple - n) for n in (h, w))
        padded = F.pad(image, (0, right, 0, bottom), mode="replicate")
        return image + self.network(padded)[:, :, :h, :w]


def restormer_base(**overrides: Any) -> Restormer:
    """The published network: 26.1 M parameters."""
    return Restormer(**overrides)


def restormer_small(**overrides: Any) -> Restormer:
    """1.6 M parameters: for a single workstation GPU."""
    return Restormer(**{**dict(dim=16, num_blocks=(2, 2, 2, 4), refinement=2), **overrides})


def restormer_tiny(**overrides: Any) -> Restormer:
    """0.2 M parameters: for tests and demonstrations on a CPU."""
    return Restormer(**{**dict(dim=8, num_blocks=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), refinement=1), **overrides})
