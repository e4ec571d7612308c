"""What the published networks to compare with have in common, as `asa-finetune` takes them.

Letters: volume `B C D H W`, K output channels.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from asa.models.kernels import in_float32


@dataclass(frozen=True)
class Window:
    """In the place of an encoder, where there is none to load: the volume size in voxels and the channels."""

    img_size: tuple[int, int, int]
    in_channels: int

    def __call__(self, volume: Tensor) -> Tensor:
        return volume


class Comparator(nn.Module):
    """A published network for windows of one size; on a CPU it computes in float32 (see `asa.models.kernels`).

    Args:
        network: maps what the encoder returns to logits `(B, K, D, H, W)`, or to a list of them from the finest
            resolution to the coarsest.
        encoder: a module with `img_size` and `in_channels`, whose weights can be loaded, or a `Window`.
        out_channels: classes K, background included, or regions.
    """

    mirrored = False

    def __init__(self, network: nn.Module, encoder: Any, out_channels: int) -> None:
        super().__init__()
        self.network, self.encoder, self.out_channels = network, encoder, out_channels

    def forward(self, volume: Tensor, deep_supervision: bool = False) -> Tensor | list[Tensor]:
        """Volume `(B, C, D, H, W)` -> logits `(B, K, D, H, W)`; with `deep_supervision` of all resolutions."""
        expected = (self.encoder.in_channels, *self.encoder.img_size)
        if tuple(volume.shape[1:]) != expected:
            raise ValueError(f"this network takes volumes of shape (batch, *{expected}), got {tuple(volume.shape)}")
        logits: Any = in_float32(lambda volume: self.network(self.encoder(volume)), volume)
        scales = logits if isinstance(logits, list) else [logits]
        return scales if deep_supervision else scales[0]


def conv3(before: int, after: int, stride: int = 1) -> nn.Conv3d:
    """A 3x3x3 convolution, which with stride 1 keeps the size."""
    return nn.Conv3d(before, after, 3, stride, padding=1)
