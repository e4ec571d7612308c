"""Masked pretraining: ASA, and a plain MAE as the same class without ASA's encoding and loss.

Letters: image `B C D H W`, L tokens of which M are masked, patch size s.
"""

import torch
from torch import Tensor, nn

from asa.losses.reconstruction import AttentiveReconstructionLoss, gradient_importance, patch_errors, weighted_mean
from asa.methods.base import Batch
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.ops.patches import patchify, random_mask, split_indices, tokens_at, unpatchify


class MaskedPretraining(nn.Module):
    """Mask most patches, predict them, and weight their errors by importance.

    Args:
        model: the autoencoder; its `position` is the symmetric or the plain position encoding.
        mask_ratio: fraction of the patches that are masked.
        importance: `"orientation"` (the attentive loss), `"magnitude"`, or None for equal weights.
        bins: histogram bins per angle.

    Raises:
        ValueError: a model that is not a masked autoencoder, or a ratio outside (0, 1).
    """

    task = "pretraining"
    mirrored = False
    error = ("loss", "mean_predictor_loss")

    def __init__(
        self,
        *,
        model: MaskedAutoencoder,
        mask_ratio: float = 0.75,
        importance: str | None = "orientation",
        bins: int = 9,
    ) -> None:
        super().__init__()
        if not isinstance(model, MaskedAutoencoder):
            raise ValueError(f"masked pretraining needs an autoencoder (model=asa_...), got {type(model).__name__}")
        if not isinstance(mask_ratio, float) or not 0 < mask_ratio < 1:
            raise ValueError(f"method.mask_ratio={mask_ratio}: must be in (0, 1)")
        self.model = model
        self.mask_ratio = mask_ratio
        self.loss = AttentiveReconstructionLoss(model.encoder.patch_size, bins, importance)

    def mask(self, seeds: Tensor) -> Tensor:
        """One mask per sample from its own seed: `(B,)` -> bool `(B, L)` on the CPU, True = masked."""
        t, h, w = self.model.encoder.grid
        return torch.cat(
            [random_mask(1, t * h * w, self.mask_ratio, torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image" and "seed".

        Returns:
            "loss"; and for the log "mean_predictor_loss", the loss of predicting the mean of the visible voxels
            everywhere; "masked_mse" and "mean_predictor_mse", the same two with equal weights.
        """
        image, mask = batch["image"], self.mask(batch["seed"])
        prediction = self.model(image, mask)
        visible, masked = (index.to(image.device, non_blocking=True) for index in split_indices(mask))
        patches = patchify(image.float(), self.loss.patch_size)
        target = tokens_at(patches, masked)
        errors = patch_errors(prediction, target)
        mean_errors = patch_errors(tokens_at(patches, visible).mean(dim=(1, 2), keepdim=True).expand_as(target), target)
        weights = self.loss.weights(image, masked)
        return {
            "loss": weighted_mean(errors, weights),
            "mean_predictor_loss": weighted_mean(mean_errors, weights),
            "masked_mse": errors.detach().mean(),
            "mean_predictor_mse": mean_errors.mean(),
        }

    def run_untiled(self, batch: Batch) -> None:
        """Compute what a GPU computes for the whole batch and a CPU in slabs, for the memory plan of a step."""
        if self.loss.importance:
            gradient_importance(batch["image"], self.loss.patch_size, self.loss.bins, self.loss.importance)

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """The figure "reconstruction" of a batch, see `reconstruct`."""
        return {"reconstruction": self.reconstruct(batch["image"], self.mask(batch["seed"]))}

    @torch.no_grad()
    def reconstruct(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """A reconstruction as volumes to draw.

        Args:
            image: `(B, C, D, H, W)`.
            mask: bool `(B, L)`, True = masked.

        Returns:
            "input", "masked" (masked patches NaN), "prediction" (visible patches unchanged, masked ones predicted)
            of the image's shape, and "importance" `(B, 1, D, H, W)`, the score of each patch.
        """
        s, grid = self.loss.patch_size, self.model.encoder.grid
        masked = split_indices(mask)[1].to(image.device)
        patches = patchify(image.float(), s)
        index = masked[:, :, None].expand(-1, -1, patches.shape[2])
        prediction = self.model(image, mask).float()
        scores = gradient_importance(image, s, self.loss.bins, self.loss.importance or "orientation")
        return {
            "input": image,
            "masked": unpatchify(patches.scatter(1, index, float("nan")), grid, s),
            "prediction": unpatchify(patches.scatter(1, index, prediction), grid, s),
            "importance": unpatchify(scores[:, :, None].expand(-1, -1, s**3), grid, s),
        }
