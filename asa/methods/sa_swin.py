"""SA-Swin pretraining (MICCAI 2024): four proxy tasks on a volume and its mirror image.

Letters: image and mirror `B C D H W`, voxel i of the mirror being the counterpart of voxel i of the image; V = 2 B
views, the first views of all samples before the second ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.losses.contrastive import NTXent, SymmetryLoss
from asa.methods.base import MODALITY, Batch, sums_by_modality
from asa.models.sa_swin import SASwin, SASwinOutput
from asa.ops.patches import random_boxes
from asa.ops.symmetry import rotate_about_left_right


@dataclass(frozen=True)
class Views:
    """Two views of each sample."""

    cut: Tensor  # the images rotated, with boxes filled by noise and by another scan, (V, C, D, H, W)
    whole: Tensor  # the images rotated only
    mirror: Tensor  # the mirror images, with the same rotation and without boxes
    hidden: Tensor  # bool (V, 1, D, H, W), True inside a box
    quarters: Tensor  # quarter turns, int64 (V,)


class SASwinPretraining(nn.Module):
    """Rotation, contrastive, inpainting and symmetry tasks together. A sample's random draws come from its own seed.

    Args:
        model: the network.
        rotation, contrastive, inpainting, symmetry: weights of the tasks' losses.
        form: of the symmetry loss, `"cosine"` or `"bce"`.
        temperature: initial temperature of the contrastive loss.
        learn_temperature: False keeps it, as released.
        cutout: largest fraction of a view's voxels that boxes of noise hide, and again boxes of another scan.

    Raises:
        ValueError: a model that is not an SA-Swin, a size with D other than H (quarter turns exchange them), or a
            cutout outside [0, 1).
    """

    task = "pretraining"
    mirrored = True
    error = ("hidden_l1", "mean_predictor_l1")

    def __init__(
        self,
        model: SASwin,
        *,
        rotation: float = 1.0,
        contrastive: float = 1.0,
        inpainting: float = 1.0,
        symmetry: float = 0.5,
        form: str = "cosine",
        temperature: float = 0.5,
        learn_temperature: bool = True,
        cutout: float = 0.3,
    ) -> None:
        super().__init__()
        if not isinstance(model, SASwin):
            raise ValueError(f"method=sa_swin needs model=sa_swin_..., got {type(model).__name__}")
        size = model.encoder.img_size
        if size[0] != size[1]:
            raise ValueError(
                f"crop={list(size)}: D and H must be equal, as quarter turns about left-right exchange them"
            )
        if not 0 <= cutout < 1:
            raise ValueError(f"method.cutout={cutout}: must be in [0, 1)")
        self.model, self.cutout = model, cutout
        self.weights = dict(rotation=rotation, contrastive=contrastive, inpainting=inpainting, symmetry=symmetry)
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"method.{name}={weight}: a task's weight must be 0 or more")
        self.contrast, self.symmetry = NTXent(temperature, learn_temperature), SymmetryLoss(form)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image", "mirror", "seed", and optionally "id" and "health" `(B,)` (see `SymmetryLoss`).

        Returns:
            "loss"; and for the log each task's loss, "rotation_accuracy", "hidden_l1", the error inside the boxes, and
            "mean_predictor_l1", the error there of predicting the mean of the visible voxels. Of several modalities
            also the losses of each, see `sums_by_modality`.
        """
        views = self.views(batch)
        output = self.model(views.cut, views.mirror)
        health = batch.get("health", torch.full((len(batch["image"]),), float("nan"))).to(views.cut.device)
        losses = self._losses(output, views, health)
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        detached = {name: value.detach() for name, value in losses.items()}
        several = any(key.startswith(MODALITY) for key in batch)
        parts = self.losses_by_modality(batch, output, views, health) if several else {}
        return {"loss": loss, **detached, **proxy_metrics(output, views), **parts}

    def _losses(self, output: SASwinOutput, views: Views, health: Tensor, reduction: str = "mean") -> dict[str, Tensor]:
        """The loss of each task; with `reduction="none"` of each view, in the contrastive one sample by sample."""
        errors = (output.volume.float() - views.whole.float()).abs()
        return {
            "rotation": F.cross_entropy(output.rotation.float(), views.quarters, reduction=reduction),
            "contrastive": self.contrast(*output.contrast.chunk(2), reduction),
            "inpainting": errors.mean() if reduction == "mean" else errors.flatten(1).mean(dim=1),
            "symmetry": self.symmetry(output.side, output.mirrored, health.repeat(2), reduction),
        }

    @torch.no_grad()
    def losses_by_modality(self, batch: Batch, output: SASwinOutput, views: Views, health: Tensor) -> dict[str, Tensor]:
        """The losses of the samples of each modality, see `sums_by_modality`."""
        each = self._losses(output, views, health, "none")
        each["contrastive"] = each["contrastive"].view(-1, 2).T.flatten()
        each = {name: value.view(2, -1).mean(dim=0) for name, value in each.items()}
        total = torch.stack([self.weights[name] * value for name, value in each.items()]).sum(dim=0)
        return sums_by_modality(batch, loss=total, **each)

    def views(self, batch: Batch) -> Views:
        """Draw and apply the rotations and the boxes of the cutout, from "image", "mirror" and "seed" of a batch.

        "id" are the scans of the samples; without it each is of another scan.
        """
        image = batch["image"]
        others = partners(batch.get("id", range(len(image))))
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"].tolist()]
        draws = [draw_view(image.shape[1:], self.cutout, generator) for _ in range(2) for generator in generators]
        quarters, *maps = zip(*draws, strict=True)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(image.device, non_blocking=True)

        def stacked(parts: Iterable[Tensor]) -> Tensor:
            return moved(torch.stack(list(parts)))

        def rotated(volumes: Tensor) -> Tensor:
            twice = torch.cat([volumes, volumes])
            return stacked(rotate_about_left_right(volume, n) for volume, n in zip(twice, quarters, strict=True))

        whole, (noise, noisy, other) = rotated(image), (stacked(parts) for parts in maps)
        noise = noise.to(whole.dtype)
        alone = moved(others == torch.arange(len(image))).repeat(2)[:, None, None, None, None]
        filling = torch.where(alone, noise, whole[moved(torch.cat([others, others + len(image)]))])
        cut = whole.where(~noisy, noise).where(~other, filling)
        return Views(cut, whole, rotated(batch["mirror"]), noisy | other, moved(torch.tensor(quarters)))

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Figures of a batch, of four volumes `(B, C, D, H, W)` each, the last of them of one channel.

        "reconstruction": a rotated view, the same with boxes, inpainted, and the error. "symmetry": the image, its
        mirror image, the difference and the asymmetry map.
        """
        image, mirror = batch["image"], batch["mirror"]
        views = self.views(batch)
        whole, cut, mirrored = (part[: len(image)] for part in (views.whole, views.cut, views.mirror))
        inpainted = self.model(cut, mirrored).volume
        difference, asymmetry = (image - mirror).abs(), self.model.asymmetry(image, mirror)[1]
        return {
            "reconstruction": {
                "input": whole,
                "cut": cut,
                "prediction": inpainted,
                "error": (inpainted - whole).abs().mean(dim=1, keepdim=True),
            },
            "symmetry": {"image": image, "mirror": mirror, "difference": difference, "asymmetry": asymmetry[:, None]},
        }


def draw_view(shape: Sequence[int], cutout: float, generator: torch.Generator) -> tuple[int, Tensor, Tensor, Tensor]:
    """Draw the random parameters of a view of an image of shape (C, D, H, W).

    Quarter turns, noise in [0, 1], `(C, D, H, W)`, and two bool `(1, D, H, W)`, True in the boxes of noise and of
    another scan.
    """
    quarters = int(torch.randint(4, (), generator=generator))
    noise = unit_noise(shape, generator)
    noisy, other = (random_boxes(shape[1:], cutout, generator)[None] for _ in range(2))
    return quarters, noise, noisy, other


def unit_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian noise between 0 and 1, with which boxes are filled."""
    noise = torch.randn(tuple(shape), generator=generator)
    return (noise - noise.min()) / (noise.max() - noise.min())


@torch.no_grad()
def proxy_metrics(output: SASwinOutput, views: Views) -> dict[str, Tensor]:
    """How well the proxy tasks are solved; see `SASwinPretraining.forward`."""
    whole, hidden = views.whole.float(), views.hidden.expand_as(views.whole)
    visible = (~hidden).flatten(1)
    mean = (whole.flatten(1) * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)

    def inside(error: Tensor) -> Tensor:
        return (error.abs() * hidden).sum() / hidden.sum().clamp(min=1)

    return {
        "rotation_accuracy": (output.rotation.argmax(dim=1) == views.quarters).float().mean(),
        "hidden_l1": inside(output.volume.float() - whole),
        "mean_predictor_l1": inside(mean[:, None, None, None, None] - whole),
    }


def partners(scans: Sequence[Any]) -> Tensor:
    """For each of B samples, the index of the sample of another scan that boxes are filled from; its own without one.

    Pairs are 0 and 1, 2 and 3, ...: ranks with an even number of samples keep them. The last of an odd number takes the
    one before it. A sample has none in a batch of one, or if both are of one scan.
    """
    paired = [k ^ 1 if k ^ 1 < len(scans) else max(k - 1, 0) for k in range(len(scans))]
    return torch.tensor([k if scans[k] == scans[other] else other for k, other in enumerate(paired)])
