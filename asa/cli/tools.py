"""The commands that are a single call, with what they print."""

from pathlib import Path

from asa.errors import counted, grouped
from asa.settings import Config


def make_phantoms(config: Config) -> None:
    """Write the cohort; a ValueError for no `source` with kind=lesions, or one with another kind."""
    from asa.data.phantom.cohort import make_cohort
    from asa.data.phantom.planted import plant_cohort

    out, source, planted = Path(str(config["out"])), config["source"], config["kind"] == "lesions"
    if (source is not None) != planted:
        raise ValueError("source= is a store for kind=lesions, which needs one: give both or neither")
    if planted:
        keys = ("lesions", "planted", "draws", "joined", "seed", "subjects")
        files = plant_cohort(source, out, **{key: config[key] for key in keys})
    else:
        own = {key: config[key] for key in ("kind", "seed", "resolution", "rim", "names")}
        files = make_cohort(out=out, subjects=10 if config["subjects"] is None else config["subjects"], **own)
    print(f"wrote {counted(len(files), 'file')} to {out}")


def orient(config: Config) -> None:
    """Write the files; a ValueError if some failed, which are listed first, and the others are written."""
    from asa.data.io.files import failure_lines
    from asa.data.io.orientation import orient_files

    source, out = Path(str(config["input"])), Path(str(config["out"]))
    written, kept, failures = orient_files(source, out, str(config["axes"]))
    for line in failure_lines(failures, "file"):
        print(line)
    if kept:
        print(f"not written, as an orientation is stored: {counted(len(kept), 'file')}, like {kept[0]}")
    if failures:
        raise ValueError(f"{counted(len(failures), 'file')} failed, listed above")
    print(f"wrote {counted(len(written), 'file')} to {config['out']}: check the results, left and right above all")


def convert_dicom(config: Config) -> None:
    """Convert the series; a ValueError if some are in no volume, which are listed first; the others are written."""
    from asa.data.io.dicom import TABLE, convert_series
    from asa.data.io.files import failure_lines

    report = convert_series(Path(str(config["input"])), Path(str(config["out"])))
    for line in failure_lines(report.failures, "file"):
        print(line)
    for warning, names in grouped(report.warnings).items():
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        print(f"{names[0]}{others}: warning: {warning}")
    if not report.written:
        raise ValueError(f"{config['input']}: no series is a volume")
    volumes = counted(len(report.written), "volume")
    if report.failures:
        raise ValueError(
            f"{len(report.failures)} series or files are in no volume, listed above; {volumes} "
            f"written to {config['out']}"
        )
    print(f"wrote {volumes} to {config['out']}; names and {TABLE} hold patients' ids and dates")


def export(config: Config) -> None:
    """Write the file or the folder."""
    from asa.export.hub import export_hub
    from asa.export.monai_bundle import export_bundle
    from asa.export.nnunet import export_nnunet
    from asa.export.onnx import export_onnx

    out = Path(str(config["out"]))
    if config["format"] == "nnunet":
        about = export_nnunet(config["store"], out)
        print(f"wrote {out}: {about['numTraining']} training cases, labels {about['labels']}")
    elif config["format"] == "onnx":
        difference = export_onnx(config["checkpoint"], out, plugins=config["plugins"])
        print(f"wrote {out}; its outputs differ from PyTorch's by at most {difference:.1e} of the largest")
    elif config["format"] == "bundle":
        export_bundle(config["checkpoint"], out, plugins=config["plugins"])
        print(f"wrote {out}; {out}/docs/README.md says how MONAI runs it")
    else:
        card = {key: config[key] for key in ("licence", "trained_on", "evaluation")}
        export_hub(config["checkpoint"], out, **card, plugins=config["plugins"])
        print(f"wrote {out}: read {out}/README.md, then publish it with hf upload ORG/NAME {out}")
