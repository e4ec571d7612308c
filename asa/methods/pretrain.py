"""Masked pretraining: ASA, and a plain MAE as the same class without ASA's encoding and loss.

Letters: image `B C D H W`, L tokens of which M are masked, patch size s.
"""

import math

import torch
from torch import Tensor, nn

from asa.losses.reconstruction import (
    AttentiveReconstructionLoss,
    draw_patches,
    gradient_importance,
    patch_errors,
    weighted_mean,
)
from asa.methods.base import MODALITY, Batch, sums_by_modality
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.ops.patches import Selection, patchify, random_mask, select_tokens, tokens_at, unpatchify

FEWEST = 2  # patches of a sample that are not air: one to encode, one to predict
FLAT = 1e-6  # variance below which a patch is constant


class MaskedPretraining(nn.Module):
    """Mask most patches, predict them, and weight their errors by importance.

    Args:
        model: the autoencoder; its `position` is the symmetric or the plain position encoding.
        mask_ratio: fraction of the patches that are masked.
        importance: `"orientation"` (the attentive loss), `"magnitude"`, or None for equal weights.
        bins: histogram bins per angle.
        decode: fraction of the masked patches that are decoded. They are drawn so that their errors estimate the loss
            over all masked patches without bias, see `asa.losses.reconstruction.draw_patches`. 1: all of them.
        air: `"keep"`, or `"drop"`: patches of constant intensity are neither encoded nor decoded.
        masks: masks of each volume, which are encoded and decoded one by one; loading, patches and importance are
            shared.
        normalise: the targets are normalised patch by patch to mean 0 and variance 1, as in MAE (He et al., CVPR 2022).
            Patches of constant intensity then have no weight in the loss.

    Raises:
        ValueError: a model that is not a masked autoencoder, or a setting outside its range.
    """

    task = "pretraining"
    mirrored = False
    excludes = True
    error = ("loss", "mean_predictor_loss")

    def __init__(
        self,
        model: MaskedAutoencoder,
        *,
        mask_ratio: float = 0.75,
        importance: str | None = "orientation",
        bins: int = 9,
        decode: float = 1.0,
        air: str = "keep",
        masks: int = 1,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, MaskedAutoencoder):
            raise ValueError(f"masked pretraining needs an autoencoder (model=asa_...), got {type(model).__name__}")
        if not isinstance(mask_ratio, float) or not 0 < mask_ratio < 1:
            raise ValueError(f"method.mask_ratio={mask_ratio}: must be in (0, 1)")
        if isinstance(decode, bool) or not isinstance(decode, int | float) or not 0 < decode <= 1:
            raise ValueError(f"method.decode={decode}: must be in (0, 1]")
        if air not in ("keep", "drop"):
            raise ValueError(f"method.air={air}: choose keep or drop")
        if isinstance(masks, bool) or not isinstance(masks, int) or masks < 1:
            raise ValueError(f"method.masks={masks}: must be a whole number from 1")
        if not isinstance(normalise, bool):
            raise ValueError(f"method.normalise={normalise}: choose true or false")
        self.model = model
        self.mask_ratio, self.decode, self.masks = mask_ratio, decode, masks
        self.drops_air, self.normalise = air == "drop", normalise
        self.loss = AttentiveReconstructionLoss(model.encoder.patch_size, bins, importance)

    def mask(self, seeds: Tensor, air: Tensor | None = None) -> Tensor:
        """R masks of each sample from its seed `(B,)`, without `air` `(B, L)`: `(B*R, L)` on the CPU, True = masked."""
        return self._draw(seeds, air)[0]

    def _draw(self, seeds: Tensor, air: Tensor | None) -> tuple[Tensor, Tensor]:
        """The masks `(B*R, L)`, and a number in [0, 1) for each, `(B*R,)` float64."""
        length = math.prod(self.model.encoder.grid)
        masks, offsets = [], []
        for k, seed in enumerate(seeds.tolist()):
            generator = torch.Generator().manual_seed(seed)
            own = None if air is None else air[k : k + 1]
            masks += [random_mask(1, length, self.mask_ratio, generator, own) for _ in range(self.masks)]
            offsets.append(torch.rand(self.masks, generator=generator, dtype=torch.float64))
        return torch.cat(masks), torch.cat(offsets)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image" and "seed", and for `air="drop"` "air", bool `(B, L)` on the CPU.

        Patches that are True in an optional "excluded", bool `(B, L)`, have no weight, as those with voxels that a
        defacing removed: they are masked and shown like others.

        Returns:
            "loss"; and for the log "mean_predictor_loss", the loss of predicting the mean of the visible voxels
            everywhere (0 where targets are normalised); "masked_mse" and "mean_predictor_mse", the same two with equal
            weights. All are over the decoded patches, the latter two over excluded ones too. Of several modalities
            also "loss" and "mean_predictor_loss" of each, see `sums_by_modality`.
        """
        image, air = batch["image"], self._air(batch)
        mask, offsets = self._draw(batch["seed"], air)
        visible, masked = self._select(mask, air)
        counts = masked.counts()
        visible, masked = visible.to(image.device), masked.to(image.device)
        patches = patchify(image.float(), self.loss.patch_size)
        weights = self.loss.weights(image, masked.indices, self._counted(patches, masked, batch.get("excluded")))
        if self.decode < 1:
            counts = (self.decode * counts).round().long().clamp(min=1)
            masked, weights = draw_patches(masked, weights, counts, offsets)
        prediction = self.model(image, visible=visible, decoded=masked)
        target, mean = tokens_at(patches, masked.indices), _mean_voxel(patches, visible)
        if self.normalise:
            target, mean = normalised(target), torch.zeros_like(mean)
        errors = patch_errors(prediction, target)
        mean_errors = patch_errors(mean.expand_as(target), target)
        result = {
            "loss": weighted_mean(errors, weights),
            "mean_predictor_loss": weighted_mean(mean_errors, weights),
            "masked_mse": _mean(errors.detach(), masked.valid),
            "mean_predictor_mse": _mean(mean_errors, masked.valid),
        }
        if any(key.startswith(MODALITY) for key in batch):
            each = ((weights * error.detach()).sum(dim=1) for error in (errors, mean_errors))
            loss, trivial = (value.view(len(image), self.masks).mean(dim=1) for value in each)
            result |= sums_by_modality(batch, loss=loss, mean_predictor_loss=trivial)
        return result

    def _air(self, batch: Batch) -> Tensor | None:
        """The patches to drop, bool `(B, L)` on the CPU; None without any."""
        if not self.drops_air:
            return None
        if "air" not in batch:
            raise ValueError('method.air=drop needs "air" in the batch: give CropDataset(air=PATCH_SIZE)')
        air = batch["air"]
        # A sample with nothing but air keeps it.
        air = air & ((~air).sum(dim=1, keepdim=True) >= FEWEST)
        return air if air.any() else None

    def _select(self, mask: Tensor, air: Tensor | None) -> tuple[Selection, Selection]:
        """The visible and the masked patches of each mask."""
        if air is None:
            return select_tokens(~mask), select_tokens(mask)
        kept = ~air.repeat_interleave(len(mask) // len(air), dim=0)
        return select_tokens(~mask & kept), select_tokens(mask & kept)

    def _counted(self, patches: Tensor, masked: Selection, excluded: Tensor | None) -> Tensor | None:
        """The masked patches that count in the loss, `(N, M)`; None: all."""
        counted = masked.valid
        chosen = [patches.var(dim=2, correction=0) > FLAT] if self.normalise else []
        for kept in chosen if excluded is None else [*chosen, ~excluded]:
            own = tokens_at(kept[:, :, None], masked.indices)[:, :, 0]
            counted = own if counted is None else own & counted
        return counted

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """The figure "reconstruction" of a batch, see `reconstruct`. Of several masks the first one is drawn."""
        air = self._air(batch)
        mask = self.mask(batch["seed"], air)[:: self.masks]
        return {"reconstruction": self.reconstruct(batch["image"], mask, air)}

    @torch.no_grad()
    def reconstruct(self, image: Tensor, mask: Tensor, air: Tensor | None = None) -> dict[str, Tensor]:
        """A reconstruction of images `(B, C, D, H, W)` as volumes to draw.

        `mask`, bool `(B, L)`, is True where masked; `air`, of the same shape, where dropped, which no masked patch is.
        With `decode` below 1 the masked patches are decoded in parts, as in training. Predictions of normalised patches
        get the true mean and variance.

        Returns:
            "input", "masked" (masked patches NaN), "prediction" (visible patches unchanged, masked ones predicted)
            of the image's shape, and "importance" `(B, 1, D, H, W)`, the score of each patch.
        """
        s, grid = self.loss.patch_size, self.model.encoder.grid
        patches = patchify(image.float(), s)
        hidden = mask.to(image.device)[:, :, None]
        filled = patches.clone()
        visible, masked = (chosen.to(image.device) for chosen in self._select(mask, air))
        parts = round(1 / self.decode)
        for part in range(min(parts, masked.indices.shape[1])):
            valid = None if masked.valid is None else masked.valid[:, part::parts]
            some = Selection(masked.indices[:, part::parts], valid)
            prediction = self.model(image, visible=visible, decoded=some).float()
            if self.normalise:
                prediction = denormalised(prediction, tokens_at(patches, some.indices))
            filled.scatter_(1, some.indices[:, :, None].expand_as(prediction), prediction)
        scores = gradient_importance(image, s, self.loss.bins, self.loss.importance or "orientation")
        return {
            "input": image,
            "masked": unpatchify(patches.masked_fill(hidden, float("nan")), grid, s),
            # Padding may have been written to visible patches.
            "prediction": unpatchify(filled.where(hidden, patches), grid, s),
            "importance": unpatchify(scores[:, :, None].expand(-1, -1, s**3), grid, s),
        }


def normalised(patches: Tensor) -> Tensor:
    """Patches `(..., P)` with mean 0 and variance 1 each."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
    return (patches - mean) / (variance + FLAT).sqrt()


def denormalised(patches: Tensor, like: Tensor) -> Tensor:
    """The inverse of `normalised`, with the means and variances of the patches `like`."""
    variance, mean = torch.var_mean(like, dim=-1, keepdim=True, correction=0)
    return patches * (variance + FLAT).sqrt() + mean


def _mean_voxel(patches: Tensor, visible: Selection) -> Tensor:
    """Mean of the voxels that the encoder takes: `(B, L, P)` and R selections of each -> `(B*R, 1, 1)`."""
    voxels = tokens_at(patches, visible.indices)
    if visible.valid is not None:
        voxels = voxels * (visible.valid / visible.valid.float().mean(dim=1, keepdim=True))[:, :, None]
    return voxels.mean(dim=(1, 2), keepdim=True)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the rows of `(N, K)` of their means without padding."""
    return values.mean() if valid is None else ((values * valid).sum(dim=1) / valid.sum(dim=1)).mean()
