"""Restormer (Zamir et al., CVPR 2022), a published restoration network to compare RAT with.

Letters: image `B C H W`, label map `B H W`, upscaling factor s.
"""

from typing import Any

from monai.networks.nets.restormer import MDTATransformerBlock
from monai.networks.nets.restormer import Restormer as MONAIRestormer
from torch import Tensor

from asa.models.kernels import ChannelNorm
from asa.restoration.rat import RestorationNetwork


class Restormer(RestorationNetwork):
    """MONAI's Restormer, with the published layer norm over channels in place of MONAI's instance norm.

    U-shaped, with attention between channels. Label maps are only checked. The widths are `dim` at full resolution,
    doubled at each lower one, `expansion` times that in the feed-forward networks; `refinement` blocks are at the end.
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
        multiple = 2 ** (len(num_blocks) - 1)
        # MONAI's network asserts two features or more along each axis at the lowest resolution.
        super().__init__(in_channels, upscale, multiple, smallest=2 * multiple)
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

    def residual(self, image: Tensor, regions: Tensor) -> Tensor:
        """See `RestorationNetwork.residual`."""
        return self.network(image)


def restormer_base(**overrides: Any) -> Restormer:
    """The published network: 26.1 M parameters."""
    return Restormer(**overrides)


def restormer_small(**overrides: Any) -> Restormer:
    """1.6 M parameters: for a single workstation GPU."""
    return Restormer(**{**dict(dim=16, num_blocks=(2, 2, 2, 4), refinement=2), **overrides})


def restormer_tiny(**overrides: Any) -> Restormer:
    """0.2 M parameters: for tests and demonstrations on a CPU."""
    return Restormer(**{**dict(dim=8, num_blocks=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), refinement=1), **overrides})
