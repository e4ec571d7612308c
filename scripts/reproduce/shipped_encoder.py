"""The encoder that the package brings, asa://tiny-t1: python -m scripts.reproduce.shipped_encoder DATA OUT

DATA: the BIDS folder of OpenNeuro's ds002748, version 1.0.5: 30 heads with T1-weighted images, CC0. They are prepared
(stripped by deepbet, their mid-sagittal plane in the middle, 1 mm), and an encoder is pretrained on all of them by
experiment=structures_pretrain. OUT/tiny-t1 is then what asa/encoders/tiny-t1 holds. Half an hour on one CPU core; what
is done is not done again.
"""

import torch

from asa.export.hub import export_hub
from scripts.reproduce.commands import asa, parser_of

NAME = "tiny-t1"
PREPARED = ("data=bids", "prepare.strip=deepbet", "prepare.midway=true", "prepare.spacing=1", "check=also")
PRETRAINED = ("experiment=structures_pretrain", "train.device=cpu", "train.precision=fp32", "loader.workers=0")
TRAINED_ON = """The T1-weighted images of the 30 people of OpenNeuro's ds002748, version 1.0.5
(doi:10.18112/openneuro.ds002748.v1.0.5; one site, 3 T, 0.87 x 0.87 x 1 mm; 22 people with mild depression, 8
controls), which their authors have put under CC0 (Bezmaternykh, Melnikov, Savelov, Petrovskii; cite Bezmaternykh et
al., Neural Plasticity 2021, 8846097).

Skull-stripped by deepbet, rotated so that the mid-sagittal plane is the middle of the volume, resampled to 1 mm.
Pretrained by `experiment=structures_pretrain` with seed 0: crops of 64 x 64 x 160 voxels, four in a step, no labels.
Made by `python -m scripts.reproduce.shipped_encoder`; what it is worth on brains of another scanner is in
docs/evidence.md. Other contrasts, ages and voxel sizes than those of its scans were not tried."""


def main() -> None:
    """Prepare, pretrain, and write the folder."""
    options = parser_of(__doc__, "data", "out").parse_args()
    out = options.out.resolve()
    store, run, log = out / "store", out / "pretrained", out / "log.txt"
    asa("prepare", *PREPARED, log=log, **{"data.root": options.data.resolve(), "out": store})
    asa("pretrain", *PRETRAINED, log=log, threads=1, **{"data.store": store, "out": run})
    export_hub(
        run,
        out / NAME,
        licence="cc0-1.0",
        trained_on=TRAINED_ON,
        reference=f"asa://{NAME}",
        dtype=torch.float16,
    )
    print(f"wrote {out / NAME}")


if __name__ == "__main__":
    main()
