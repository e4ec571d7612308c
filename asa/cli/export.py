"""Write a trained network as ONNX, a MONAI bundle or a folder for the Hub, or a store as a dataset of nnU-Net."""

import sys
from functools import partial
from pathlib import Path

from asa.cli.front import Config, run_command


def export(config: Config) -> None:
    """Write the file or the folder."""
    from asa.export.hub import export_hub
    from asa.export.monai_bundle import export_bundle
    from asa.export.nnunet import export_nnunet
    from asa.export.onnx import export_onnx

    out, source = Path(str(config["out"])), "store" if config["format"] == "nnunet" else "checkpoint"
    for key in ("checkpoint", "store"):
        if (config[key] is None) == (key == source):
            raise ValueError(f"format={config['format']} writes a {source}: give {source}=, and no other source")
    if config["format"] == "nnunet":
        about = export_nnunet(config["store"], out)
        print(f"wrote {out}: {about['numTraining']} training cases, labels {about['labels']}")
    elif config["format"] == "onnx":
        difference = export_onnx(config["checkpoint"], out, plugins=config["plugins"])
        print(f"wrote {out}; its outputs differ from PyTorch's by at most {difference:.1e} of the largest")
    elif config["format"] == "bundle":
        export_bundle(config["checkpoint"], out, plugins=config["plugins"])
        print(f"wrote {out}; {out}/docs/README.md says how MONAI runs it")
    elif config["format"] == "hub":
        card = {key: config[key] for key in ("licence", "trained_on", "evaluation")}
        export_hub(config["checkpoint"], out, **card, plugins=config["plugins"])
        print(f"wrote {out}: read {out}/README.md, then publish it with hf upload ORG/NAME {out}")
    else:
        raise ValueError(f"format={config['format']}: choose onnx, bundle, hub or nnunet")


main = partial(run_command, "export", __doc__, export)

if __name__ == "__main__":
    sys.exit(main())
