"""The networks that are measured, of this library and of others, each as a method of the training loop.

Letters: volume `B C D H W`, L tokens `B L E`, M attention heads of d = E / M.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from monai.networks.nets import UNETR, SwinUNETR
from torch import Tensor, nn
from torch.nn import functional as F

from asa.config import build
from asa.losses.segmentation import DeeplySupervisedDiceCE
from asa.methods.pretrain import MaskedPretraining
from asa.methods.segment import Segmentation
from asa.models import masked_autoencoder as asa
from asa.models import unet, vit_seg
from asa.models.sw_vit import LinearWindowAttention
from asa.ops.patches import TokenSequence
from asa.tasks.run import configure
from scripts.benchmark.plan import CHANNELS, SWIN_FEATURES, UNETR_SIZE

CLASSES = 4


class DenseAttention(nn.Module):
    """Full self-attention on the layers of a window attention, without a bias.

    Args:
        windows: the window attention whose linear layers are used.
        written: explicit softmax(q k^T) v, as in MAE and most ViT code; else PyTorch's fused kernels.
    """

    def __init__(self, windows: LinearWindowAttention, written: bool) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = windows.num_heads, windows.qkv, windows.proj
        self.written = written

    def forward(self, tokens: Tensor, sequence: TokenSequence | None = None) -> Tensor:
        """`(B, L, E)` -> `(B, L, E)`; padding is not supported."""
        assert sequence is None or sequence.valid is None
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # B L 3 M d
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # B M L d
        if self.written:
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Peer(nn.Module):
    """A segmentation network of MONAI, trained like ours in `Segmentation`, but on its single output."""

    def __init__(self, network: nn.Module, edge: int) -> None:
        super().__init__()
        self.network, self.loss = network, DeeplySupervisedDiceCE()
        self.encoder = SimpleNamespace(
            img_size=(edge,) * 3
        )  # the window, where asa.inference.segmentation looks for it

    @property
    def model(self) -> nn.Module:
        """The network itself, under the name that methods use."""
        return self

    def forward(self, batch: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor] | Tensor:
        """The loss of a batch, or the logits of volumes `(B, C, D, H, W)`."""
        if isinstance(batch, Tensor):
            return self.network(batch)
        return {"loss": self.loss([self.network(batch["image"])], batch["label"])}


def dense_twin(size: str, edge: int, written: bool) -> MaskedPretraining:
    """A ViT-MAE of the size of `asa_*` and as many visible patches: dense attention, sine-cosine encoding, MSE."""
    model = getattr(asa, f"asa_{size}")(img_size=edge, position="sincos")
    for block in [*model.encoder.blocks, *model.decoder]:
        block.attention = DenseAttention(block.attention, written)
    return MaskedPretraining(model=model, importance=None)


def make_method(network: str, size: str, edge: int) -> Any:
    """The method that trains a network on volumes of edge^3 voxels.

    Args:
        network: one of those in `CHANNELS`.
        size: `"base"`, `"small"` or `"tiny"`.
        edge: of the volume, in voxels.
    """
    channels = CHANNELS[network]
    if network == "asa":
        return MaskedPretraining(model=getattr(asa, f"asa_{size}")(img_size=edge))
    if network == "fast":
        own = {"model": f"asa_{size}", "crop": edge, "model.in_channels": channels}
        needed = {"data.store": "none", "out": "none"}
        return build(configure("pretrain", {"experiment": "asa_fast", **needed, **own})["method"])
    if network in ("dense", "written"):
        return dense_twin(size, edge, network == "written")
    if network == "unet":
        return Segmentation(model=getattr(unet, f"unet_{size}")(CLASSES, img_size=edge, in_channels=channels))
    if network in ("conv", "light"):
        make = getattr(vit_seg, f"{'vit_conv' if network == 'conv' else 'vit_seg'}_{size}")
        return Segmentation(model=make(CLASSES, img_size=edge, in_channels=channels))
    if network == "unetr":
        width, heads, features = UNETR_SIZE[size]
        unetr = UNETR(channels, CLASSES, (edge,) * 3, features, hidden_size=width, mlp_dim=4 * width, num_heads=heads)
        return Peer(unetr, edge)
    swin = SwinUNETR(channels, CLASSES, feature_size=SWIN_FEATURES[size], use_checkpoint=False)
    return Peer(swin, edge)
