"""Transforms and the evaluator that the configuration of an exported MONAI bundle names.

Class names and keywords are part of the bundle format: bundles that were exported before refer to them. Scans are
prepared, and results brought back to each scan's grid, as in `asa-predict`: MONAI's own transforms have neither
percentiles of the foreground nor smoothing before resampling. Letters: image `C D H W`, K classes or R regions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform
from torch import Tensor, nn

from asa.data.io.files import read_json
from asa.data.io.nifti import write_label
from asa.inference.label_maps import Outputs
from asa.inference.preprocessing import ScanPreprocessor, check_finite


class PrepareScan(Transform):
    """Read a scan and bring it to the grid and the intensities of the training scans.

    `facts` is a JSON file with the checkpoint's metadata of these, `strip` the skull stripping of raw scans, as in
    `PrepareSettings`; None: that of the training scans, which a ValueError refuses if it was a command.
    """

    def __init__(self, facts: str | Path, strip: str | None = None) -> None:
        self.preprocessor = ScanPreprocessor(str(facts), read_json(facts), strip)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Add "image" `(C, D, H, W)` float32, "chain" and "like" to an item with "images": channel -> file."""
        case, like = self.preprocessor.prepare(data["images"])
        check_finite(case.image, "the prepared scan")
        return {**data, "image": torch.from_numpy(case.image), "chain": case.chain, "like": like}


class WriteLabelMap(Transform):
    """Bring logits back to the scan's own grid, and write the label map with its header to `output_dir/ID.nii.gz`.

    With `probabilities` also write the probability of each class or region, to `output_dir/probabilities/ID`.
    """

    def __init__(self, facts: str | Path, output_dir: str | Path, probabilities: bool = False) -> None:
        self.outputs = Outputs.of(read_json(facts))
        self.out, self.probabilities = Path(output_dir), probabilities

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Add "label" (x, y, z), in the axes of the scan's file, to an item with "pred" `(K or R, D, H, W)`."""
        check_finite(data["pred"], "the network's output")
        id, like = data["id"], data["like"]
        files = None
        if self.probabilities:
            (folder := self.out / "probabilities" / id).mkdir(parents=True, exist_ok=True)
            files = self.outputs.files(folder)
        probabilities = self.outputs.probabilities(data["pred"].cpu().float())
        label = self.outputs.native_label_map(probabilities, data["chain"], like, files)
        write_label(self.out / f"{id}.nii.gz", label, like)
        return {**data, "label": label}


@dataclass(kw_only=True)
class Evaluator:
    """Segments the scans of a dataset one by one, since their sizes differ."""

    dataset: Iterable[Mapping[str, Any]]  # items of `PrepareScan`
    network: nn.Module  # on the device, in evaluation mode
    inferer: Callable[[Tensor, nn.Module], Tensor]  # batch (1, C, D, H, W), network -> logits (1, K or R, D, H, W)
    postprocessing: Callable[[dict[str, Any]], Any]  # of an item with "pred", the logits of "image"
    device: torch.device

    def run(self) -> None:
        """Segment all scans."""
        for item in self.dataset:
            with torch.inference_mode():
                logits = self.inferer(item["image"][None].to(self.device), self.network)[0]
            self.postprocessing({**item, "pred": logits})


def load_network(network: nn.Module, weights: str | Path, device: torch.device) -> nn.Module:
    """The network with weights from a state dict (pickled code is not run), on a device, in evaluation mode."""
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.to(device).eval()
