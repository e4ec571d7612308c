"""Segmentation of whole volumes by sliding windows, ensembles and mirroring.

Letters: prepared volume `C D H W`; K classes (one softmax) or R regions (a sigmoid each).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from asa.data.io.nifti import Volume
from asa.inference.label_maps import Outputs, RunningSpread, entropy_map, write_map
from asa.inference.preprocessing import ScanPreprocessor, check_finite, check_metadata, other_voxel_sizes
from asa.ops.symmetry import flip
from asa.settings import UNCERTAINTIES, PredictSettings, check_axes, check_choice
from asa.training.checkpoint import read_model
from asa.training.device import autocast, pick_device, pick_precision

OVERLAP = 0.5  # of windows, where the settings give none


def window_size(model: nn.Module) -> tuple[int, int, int]:
    """Window (D, H, W) of a network in voxels: the volume size of its encoder, or a ValueError if it names none."""
    size = getattr(getattr(model, "encoder", None), "img_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no encoder.img_size, the size of the windows to predict")
    d, h, w = size
    return d, h, w


def sliding_window(
    model: nn.Module, image: Tensor, settings: PredictSettings, *, tick: Callable[[int], Any] | None = None
) -> Tensor:
    """Logits of a volume of any size, from overlapping windows with Gaussian weights.

    If the whole volume does not fit into GPU memory, windows are computed on the GPU and stitched on the CPU. A
    ValueError if not even one batch of windows fits.

    Args:
        model: the segmentation network; its window is `encoder.img_size`.
        image: `(C, D, H, W)`.
        settings: overlap, batch size and precision.
        tick: called with the number of windows that were computed.

    Returns:
        `(K or R, D, H, W)` float32, on the model's device or on the CPU.
    """
    from monai.inferers import sliding_window_inference  # takes longer than PyTorch to import

    device = next(model.parameters()).device
    # For a network that cross-attends to the mirror image, the flipped volume is appended as further channels: a window
    # then holds the flipped box at the mirrored position too.
    mirrored = getattr(model, "mirrored", False)

    def predict(windows: Tensor) -> Tensor:
        volume, *mirror = windows.chunk(2, dim=1) if mirrored else (windows,)
        logits: Tensor = model(volume, mirrored=mirror[0]) if mirrored else model(volume)
        if tick is not None:
            tick(len(windows))
        return logits

    def stitched(on: torch.device) -> Tensor:
        both = torch.cat([image, flip(image)]) if mirrored else image  # C or 2C, D H W
        with torch.inference_mode(), autocast(device, pick_precision(settings.precision, device)):
            logits = sliding_window_inference(
                both[None].to(on, torch.float32),
                roi_size=window_size(model),
                sw_batch_size=settings.batch_size,
                predictor=predict,
                overlap=OVERLAP if settings.overlap is None else settings.overlap,
                mode="gaussian",
                sw_device=device,
                device=on,
            )
        assert isinstance(logits, Tensor)
        return logits[0].float()

    try:
        return stitched(device)
    except torch.OutOfMemoryError:
        pass  # leave this block first: its traceback keeps the memory allocated
    warnings.warn("out of GPU memory: windows are stitched on the CPU, which is slower", stacklevel=2)
    try:
        return stitched(torch.device("cpu"))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{settings.batch_size} windows of {window_size(model)} voxels do not fit into GPU memory: "
            "lower predict.batch_size, or give predict.device=cpu"
        ) from error


def overlap_of(metadata: Sequence[Mapping[str, Any]]) -> float:
    """Overlap of windows for networks of these metadata: that of their validation, and at least `OVERLAP`."""
    return max(OVERLAP, *(data.get("overlap", OVERLAP) for data in metadata))


def count_windows(size: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """Number of windows of `sliding_window` on a volume of `size` voxels (D, H, W)."""
    steps = [max(int(edge * (1 - overlap)), 1) for edge in window]
    sides = zip(size, window, steps, strict=True)
    return math.prod(math.ceil(max(length - edge, 0) / step) + 1 for length, edge, step in sides)


class Segmenter:
    """A trained segmentation network, or an ensemble of several.

    Probabilities are averaged over the networks and, with `mirror`, over the scan and its mirror images, whose results
    are flipped back, with left and right labels exchanged where W was flipped.

    Args:
        checkpoints: run folder, checkpoint folder or file of `asa-finetune`, or several that agree in channels,
            labels, regions, preprocessing and lateral pairs.
        settings: windows, device and precision.
        mirror: average with the prediction of the left-right mirror image; or axes, like "DHW", of whose flips all
            combinations are averaged.
        uncertainty: kind of the maps that are written on request: "entropy" of the probabilities, or their "spread"
            over the networks and mirror images.
        strip: skull stripping of raw scans, as in `PrepareSettings`; None: that of the training scans.
        progress: show a progress bar of windows.
        plugins: packages of your own that the checkpoint's network may come from.

    Raises:
        FileNotFoundError, ValueError: no segmentation network, or several that do not agree; a skull stripping command,
            and no `strip`; `mirror` with a label or region on one side without a partner; an unknown uncertainty, or a
            spread over a single prediction.
    """

    def __init__(
        self,
        checkpoints: str | Path | Sequence[str | Path],
        settings: PredictSettings | None = None,
        *,
        mirror: bool | str = False,
        uncertainty: str = "entropy",
        strip: str | None = None,
        progress: bool = False,
        plugins: Sequence[str] = (),
    ) -> None:
        settings = settings or PredictSettings()
        paths = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
        if not paths:
            raise ValueError("checkpoint=[]: give at least one")
        axes = ("W" if mirror else "") if isinstance(mirror, bool) else mirror
        if mirror is not False:
            check_axes(axes, "mirror")
        self.views = ["".join(view) for n in range(len(axes) + 1) for view in combinations(axes, n)]  # "", "W", ...
        check_choice("uncertainty", uncertainty, UNCERTAINTIES, "null for none")
        if uncertainty == "spread" and len(paths) == 1 and not axes:
            raise ValueError("uncertainty=spread is over an ensemble: give several checkpoints or mirror=true")
        self.uncertainty, self.progress, self.paths = uncertainty, progress, paths
        self.models: list[nn.Module] = []
        self.digests: list[str] = []  # SHA-256 of the weights
        metadata: list[dict[str, Any]] = []
        for path in paths:
            model, description = read_model(path, plugins=plugins)
            if "labels" not in description["data"]:
                raise ValueError(f"{path}: not a segmentation model: give a run of asa-finetune")
            check_metadata(str(path), description["data"])
            window_size(model)  # fails here and not at the first scan
            self.models.append(model.to(pick_device(settings.device)))
            metadata.append(description["data"])
            self.digests.append(description["sha256"])
        self.overlap = overlap_of(metadata) if settings.overlap is None else settings.overlap
        self.settings = replace(settings, overlap=self.overlap)
        self.data = metadata[0]
        for path, other in zip(paths[1:], metadata[1:], strict=True):
            _check_agreement(str(paths[0]), self.data, str(path), other)
        self.outputs = Outputs.of(self.data)
        self.outputs.files(Path())  # refuses names of one file here and not at the first scan
        self.mirrored_channels = self.outputs.mirrored() if "W" in axes else []
        self.preprocessor = ScanPreprocessor(str(paths[0]), self.data, strip, networks=metadata)

    def __repr__(self) -> str:
        channels, labels = ", ".join(self.data["channels"]), ", ".join(self.outputs.names)
        return f"Segmenter({', '.join(map(str, self.paths))}: channels {channels} -> {labels})"

    def segment_file(
        self,
        images: Mapping[str, str | Path | None],
        out: Path,
        *,
        probabilities: Path | Sequence[Path] | None = None,
        uncertainty: Path | None = None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Segment a raw scan, a file per channel, and write the label map on the scan's own grid.

        Folders are made, and `probabilities` may be one; otherwise as `segment_prepared`. Raises as
        `ScanPreprocessor.prepare`.
        """
        case, like = self.preprocessor.prepare(images)
        files = self.outputs.files(probabilities) if isinstance(probabilities, Path) else probabilities
        for file in (out, *(files or ()), *([uncertainty] if uncertainty else ())):
            file.parent.mkdir(parents=True, exist_ok=True)
        return self.segment_prepared(case.image, case.chain, like, out, probabilities=files, uncertainty=uncertainty)

    def segment_prepared(
        self,
        image: np.ndarray,
        chain: dict[str, Any],
        like: Volume,
        out: Path,
        *,
        probabilities: Sequence[Path] | None = None,
        uncertainty: Path | None = None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Segment a prepared volume `(C, D, H, W)`, and write the label map on the scan's own grid.

        A ValueError if the voxel size differs from that of the training scans.

        Args:
            chain, like: the volume's preprocessing steps; and the source scan, for its grid and header.
            out: the `.nii.gz` to write; its folder and those of the other files exist.
            probabilities: a `.nii.gz` for each of `outputs.names`; None writes none.
            uncertainty: the `.nii.gz` for the map of uncertainty; None writes none.

        Returns:
            Label or region -> volume of its voxels on the scan's own grid, in ml; and label, or region of a network
            that predicts regions -> see `expected_dice`, on the prepared grid.
        """
        self.preprocessor.check_stored(chain)
        spread = RunningSpread() if uncertainty is not None and self.uncertainty == "spread" else None
        found = self.probabilities(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)), spread)
        ml = self.outputs.write(out, found, chain, like, probabilities)
        if uncertainty is not None:
            made = spread.map() if spread else entropy_map(found, regions=bool(self.outputs.regions))
            write_map(uncertainty, made, chain, like)
        return ml, self.outputs.expected_dice(found, chain)

    def described(self) -> dict[str, Any]:
        """The networks and the flips, for sidecars in BIDS."""
        named = zip(self.paths, self.digests, strict=True)
        networks = [{"Name": Path(path).name, "SHA256": digest} for path, digest in named]
        return {"Networks": networks, "TestTimeFlips": self.views[1:]}

    def probabilities(self, image: Tensor, spread: RunningSpread | None = None) -> Tensor:
        """Probabilities of a prepared volume: `(C, D, H, W)` -> `(K or R, D, H, W)` float32 on the CPU.

        `spread` gets those of each network and view. A ValueError if a network's output is not finite.
        """
        windows = sum(count_windows(image.shape[1:], window_size(m), self.overlap) for m in self.models)
        total = torch.zeros(())
        with tqdm(total=windows * len(self.views), unit="window", leave=False, disable=not self.progress) as bar:
            for model in self.models:
                for axes in self.views:
                    logits = sliding_window(model, flip(image, axes), self.settings, tick=bar.update).cpu()
                    check_finite(logits, "the network's output")
                    found = flip(self.outputs.probabilities(logits), axes)
                    found = found[self.mirrored_channels] if "W" in axes else found
                    total = total + found
                    if spread is not None:
                        spread.add(found)
        return total / (len(self.models) * len(self.views))


def _check_agreement(first: str, data: Mapping[str, Any], path: str, other: Mapping[str, Any]) -> None:
    """Raise a ValueError if two networks of an ensemble were trained on different kinds of data."""
    for key in ("channels", "labels", "regions", "prepare", "lateral_pairs", "join_sides"):
        expected, actual = data.get(key, []), other.get(key, [])  # the last may be absent
        if expected != actual:
            raise ValueError(
                f"{path}: the networks of an ensemble must agree in {key}: {actual} here, {expected} in {first}"
            )
    if sizes := other_voxel_sizes(other, data):
        raise ValueError(
            f"{path}: its training scans have voxels of {sizes[0]} mm, those of {first} of {sizes[1]} mm: predict with "
            "one of them"
        )
