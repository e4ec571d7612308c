"""SA-Swin pretraining (MICCAI 2024): four proxy tasks on a volume and its mirror image.

Letters: image and mirror `B C D H W`, where voxel i of the mirror is the counterpart of voxel i of the image; V = 2 B
rows of views, the first views of all samples before the second ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.losses.contrastive import NTXent, SymmetryLoss
from asa.methods.base import Batch
from asa.models.sa_swin import SASwin, Seen
from asa.ops.masking import random_boxes
from asa.ops.symmetry import rotate_about_left_right


@dataclass(frozen=True)
class Views:
    """Two views of each sample.

    Args:
        cut: rotated, with boxes filled by noise and by another sample, `(V, C, D, H, W)`.
        whole: rotated only.
        mirror: the mirror images, rotated alike and not cut.
        hidden: bool `(V, 1, D, H, W)`, True in a box.
        quarters: turns, int64 `(V,)`.
    """

    cut: Tensor
    whole: Tensor
    mirror: Tensor
    hidden: Tensor
    quarters: Tensor


class SASwinPretraining(nn.Module):
    """Rotation, contrast, inpainting and symmetry at once. Every draw of a sample comes from its own seed.

    Args:
        model: the network.
        rotation, contrastive, inpainting, symmetry: weights of the tasks' losses.
        form: of the symmetry loss, `"cosine"` or `"bce"`.
        temperature: that the contrastive one starts from.
        cutout: largest share of a view's voxels that boxes hide; twice, by noise and by another sample.

    Raises:
        ValueError: a model that is no SA-Swin, a size whose D and H differ (quarter turns exchange them), or a share
            outside [0, 1).
    """

    task = "pretraining"
    mirrored = True
    error = ("hidden_l1", "mean_predictor_l1")

    def __init__(
        self,
        *,
        model: SASwin,
        rotation: float = 1.0,
        contrastive: float = 1.0,
        inpainting: float = 1.0,
        symmetry: float = 0.5,
        form: str = "cosine",
        temperature: float = 0.5,
        cutout: float = 0.3,
    ) -> None:
        super().__init__()
        if not isinstance(model, SASwin):
            raise ValueError(f"method=sa_swin takes model=sa_swin_..., not {type(model).__name__}")
        size = model.encoder.img_size
        if size[0] != size[1]:
            raise ValueError(f"crop={list(size)}: quarter turns about left-right exchange D and H: give them one size")
        if not 0 <= cutout < 1:
            raise ValueError(f"method.cutout={cutout}: a share lies from 0 to below 1")
        self.model, self.cutout = model, cutout
        self.weights = dict(rotation=rotation, contrastive=contrastive, inpainting=inpainting, symmetry=symmetry)
        self.contrast, self.symmetry = NTXent(temperature), SymmetryLoss(form)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image", "mirror", "seed", and "health" `(B,)` where it is known (see `SymmetryLoss`).

        Returns:
            "loss"; and for the log each task's loss, "rotation_accuracy", "hidden_l1", the error inside the boxes, and
            "mean_predictor_l1", the error there of predicting the mean of what is visible.
        """
        views = self.views(batch["image"], batch["mirror"], batch["seed"])
        seen = self.model(views.cut, views.mirror)
        health = batch.get("health", torch.full((len(batch["image"]),), float("nan"))).to(views.cut.device)
        losses = {
            "rotation": rotation_loss(seen, views),
            "contrastive": self.contrast(*seen.contrast.chunk(2)),
            "inpainting": inpainting_loss(seen, views),
            "symmetry": self.symmetry(seen.side, seen.mirrored, health.repeat(2)),
        }
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        numbers = {name: value.detach() for name, value in losses.items()}
        return {"loss": loss, **numbers, **watched(seen, views)}

    def views(self, image: Tensor, mirror: Tensor, seeds: Tensor) -> Views:
        """Draw and apply what makes the views: rotations, and the boxes of the cutout.

        Args:
            image, mirror: `(B, C, D, H, W)`.
            seeds: `(B,)` on the CPU.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        drawn = [draw_view(image.shape[1:], self.cutout, generator) for _ in range(2) for generator in generators]

        def stacked(parts: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(parts)).to(image.device, non_blocking=True)

        def turned(volumes: Tensor) -> Tensor:
            return stacked(
                rotate_about_left_right(v, d.quarters) for v, d in zip(torch.cat([volumes] * 2), drawn, strict=True)
            )

        whole = turned(image)
        noise, noisy, other = (stacked(getattr(one, name) for one in drawn) for name in ("noise", "noisy", "other"))
        cut = whole.where(~noisy, noise.to(whole.dtype)).where(~other, whole[partners(len(image)).to(image.device)])
        quarters = torch.tensor([one.quarters for one in drawn], device=image.device)
        return Views(cut, whole, turned(mirror), noisy | other, quarters)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """What a reader wants to see: four volumes `(B, C, D, H, W)` a picture, the last of each `(B, 1, D, H, W)`.

        "reconstruction" shows a rotated view, cut, restored, and the error; "symmetry" the image, its mirror image,
        the difference and the asymmetry map.
        """
        image, mirror = batch["image"], batch["mirror"]
        views = self.views(image, mirror, batch["seed"])
        whole, cut, sides = (part[: len(image)] for part in (views.whole, views.cut, views.mirror))
        restored = self.model(cut, sides).volume
        difference, found = (image - mirror).abs(), self.model.asymmetry(image, mirror)[1]
        return {
            "reconstruction": {
                "input": whole,
                "cut": cut,
                "prediction": restored,
                "error": (restored - whole).abs().mean(dim=1, keepdim=True),
            },
            "symmetry": {"image": image, "mirror": mirror, "difference": difference, "asymmetry": found[:, None]},
        }


@dataclass(frozen=True)
class ViewDraw:
    """What was drawn for a view.

    Args:
        quarters: turns.
        noise: in [0, 1], `(C, D, H, W)`.
        noisy, other: bool `(1, D, H, W)`, True in a box of noise and of another sample.
    """

    quarters: int
    noise: Tensor
    noisy: Tensor
    other: Tensor


def draw_view(shape: Sequence[int], cutout: float, generator: torch.Generator) -> ViewDraw:
    """Draw a view of an image of shape (C, D, H, W); the same state of the generator draws the same."""
    quarters = int(torch.randint(4, (), generator=generator))
    noise = torch.randn(tuple(shape), generator=generator)
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return ViewDraw(quarters, noise, *(random_boxes(shape[1:], cutout, generator)[None] for _ in range(2)))


def rotation_loss(seen: Seen, views: Views) -> Tensor:
    """Cross-entropy of the quarter turns about the left-right axis."""
    return F.cross_entropy(seen.rotation.float(), views.quarters)


def inpainting_loss(seen: Seen, views: Views) -> Tensor:
    """Mean absolute error of the restored views, to the rotated ones that were not cut."""
    return (seen.volume.float() - views.whole.float()).abs().mean()


@torch.no_grad()
def watched(seen: Seen, views: Views) -> dict[str, Tensor]:
    """Numbers that say whether anything is learnt; see `SASwinPretraining.forward`."""
    whole, hidden = views.whole.float(), views.hidden.expand_as(views.whole)
    visible = (~hidden).flatten(1)
    mean = (whole.flatten(1) * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)

    def inside(error: Tensor) -> Tensor:
        return (error.abs() * hidden).sum() / hidden.sum().clamp(min=1)

    return {
        "rotation_accuracy": (seen.rotation.argmax(dim=1) == views.quarters).float().mean(),
        "hidden_l1": inside(seen.volume.float() - whole),
        "mean_predictor_l1": inside(mean[:, None, None, None, None] - whole),
    }


def partners(samples: int) -> Tensor:
    """For each of the 2 B views, the row of the other sample that boxes are filled from.

    Samples pair up as 0 and 1, 2 and 3, and so on, which ranks that share a batch in even parts do not tear apart. The
    last of an odd number takes from the one before; a single sample from itself.
    """
    rows = torch.arange(samples)
    other = (rows ^ 1).where((rows ^ 1) < samples, (rows - 1).clamp(min=0))
    return torch.cat([other, other + samples])
