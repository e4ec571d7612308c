"""The phantom cohort: synthetic subjects with realistic anatomy, in the layouts of the public datasets.

Each subject is the ICBM 2009a symmetric template (T1, GM and WM maps from the package nilearn) under a random
diffeomorphism, with its own cortical folds, tissue contrast, bias field and noise. No subject is a patient: every
folder has a JSON file with "phantom": true. Arrays are (D, H, W) in RAS+ axes, lengths are mm.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.data.datasets import brats, wmh
from asa.data.io.files import check_out, read_json, write_json
from asa.data.io.nifti import write_image
from asa.data.phantom.anatomy import (
    ASYMMETRY,
    Template,
    aseg_label,
    blend,
    load_template,
    make_subject,
    structure_label,
    take_image,
    tissue_label,
)
from asa.data.phantom.lesions import Lesion, hyperintensities, plan_tumour, tumour
from asa.data.preprocessing.registration import NAME

# Files of a subject, with the label map. The position of a kind is part of its seeds: append only.
KINDS = {"t1": 1, "ibsr": 2, "wmh": 3, "brats": 5, "structures": 2, "freesurfer": 2}
SITES = ("Utrecht", "Singapore", "Amsterdam/GE3T")  # of the WMH challenge


def make_cohort(
    kind: str,
    subjects: int,
    seed: int,
    out: str | Path,
    *,
    resolution: float = 1.0,
    rim: bool = False,
    names: int = 2021,
    progress: bool = True,
) -> list[Path]:
    """Write a cohort of synthetic subjects, skull-stripped unless `rim` is set.

    A subject depends on (seed, number, kind) and the options only: the same call writes the same bytes, and more
    subjects do not change the first ones.

    Args:
        kind: "t1" (BIDS, unlabelled), "ibsr" (IBSR_18 with CSF, GM, WM), "wmh" (WMH challenge: T1 and FLAIR,
            labels 1 lesion, 2 other pathology), "brats" (T1, T1Gd, T2, FLAIR and a tumour), "structures" (T1 with
            the deep structures of `asa.data.phantom.anatomy`, in one folder), or "freesurfer" (FreeSurfer's layout:
            the same structures, the cortex and the white matter, by side).
        resolution: isotropic voxel size in mm, from 0.7 to 8.
        rim: add a skull-like rim around the brain, and noise in the air.
        names: year of BraTS whose names and label values "brats" writes: 2021 (1, 2, 4) or 2023 (1, 2, 3).

    Returns:
        The files written.

    Raises:
        ImportError: nilearn, which contains the template, is not installed.
        ValueError: an option out of range, or `out` holds another phantom cohort.
    """
    if kind not in [*KINDS]:  # a list, as it may be of any type
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    typed = isinstance(subjects, int) and isinstance(seed, int) and isinstance(rim, bool)
    in_range = typed and subjects >= 1 and seed >= 0 and names in (2021, 2023)
    if not in_range or not isinstance(resolution, int | float) or not 0.7 <= resolution <= 8:
        raise ValueError(
            f"subjects={subjects} seed={seed} resolution={resolution} rim={rim} names={names}: give 1 subject or more, "
            "seed from 0, resolution 0.7 to 8 mm, rim true or false, names 2021 or 2023"
        )
    out = Path(out)
    about = {
        "phantom": True,
        "description": "asa phantom cohort: made-up people, not patients",
        "kind": kind,
        "seed": seed,
        "template": NAME,
        "resolution": float(resolution),
        "rim": rim,
        "asymmetry": ASYMMETRY,
        "names": names,
    }
    template = load_template(rim=rim, ventricles=kind == "wmh", structures=kind in ("structures", "freesurfer"))
    claim(out, about)
    written: list[Path] = []
    for number in tqdm(range(1, subjects + 1), desc=f"phantom {kind}", unit="subject", disable=not progress):
        written += _write_subject(template, out, number, seed, about)
    return written


def claim(out: Path, about: dict[str, Any]) -> None:
    """Write the description of the cohort; a folder of another cohort is an error."""
    path = out / "phantom.json"
    check_out(out, path.name, "a phantom cohort")
    if path.is_file() and (existing := read_json(path)) != about:
        differ = [key for key in about if not isinstance(existing, dict) or existing.get(key) != about[key]]
        raise ValueError(f"{out}: holds another phantom cohort ({', '.join(differ)} differ); choose another out=")
    write_json(path, about)
    if about["kind"] == "t1":
        named = {"Name": "asa phantom cohort (made-up people, not patients)", "BIDSVersion": "1.8.0"}
        made = {"DatasetType": "raw", "GeneratedBy": [{"Name": "asa-phantom"}]}
        write_json(out / "dataset_description.json", {**named, **made})


def _files(out: Path, kind: str, number: int, names: int) -> tuple[dict[str, Path], Path | None, Path]:
    """Paths of a subject's images (by modality), label map and JSON."""
    if kind == "t1":
        stem = f"sub-{number:03d}/anat/sub-{number:03d}_T1w"
        return {"t1": out / f"{stem}.nii.gz"}, None, out / f"{stem}.json"
    if kind == "ibsr":
        name = f"IBSR_{number:02d}"
        own = out / name
        images = {"t1": own / f"{name}_ana_strip.nii.gz"}
        return images, own / f"{name}_segTRI_fill_ana.nii.gz", own / "phantom.json"
    if kind == "structures":
        name = f"subject_{number:03d}"
        return {"t1": out / f"{name}_T1.nii.gz"}, out / f"{name}_structures.nii.gz", out / f"{name}.json"
    if kind == "freesurfer":
        own = out / f"subject_{number:03d}"
        return {"t1": own / "mri" / "T1.mgz"}, own / "mri" / "aseg.mgz", own / "phantom.json"
    if kind == "wmh":
        own = out / SITES[(number - 1) % len(SITES)] / str(number)
        images = {modality: own / "pre" / f"{file}.nii.gz" for modality, file in wmh.CHANNELS.items()}
        return images, own / "wmh.nii.gz", own / "phantom.json"
    name = f"BraTS2021_{number:05d}" if names == 2021 else f"BraTS-GLI-{number:05d}-000"
    own = out / name
    images = {modality: own / f"{name}{ending}.nii.gz" for modality, ending in brats.CHANNELS[names].items()}
    return images, own / f"{name}{brats.LABEL_FILES[names]}.nii.gz", own / "phantom.json"


def _write_subject(template: Template, out: Path, number: int, seed: int, about: dict[str, Any]) -> list[Path]:
    """Draw one subject, simulate its images, and write them."""
    kind, resolution = about["kind"], about["resolution"]
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    images, label_file, note = _files(out, kind, number, about["names"])
    drawn: dict[str, Any] = {}
    plan = plan_tumour(template.maps[template.names["white"]], template.extent, rng) if kind == "brats" else None
    subject = make_subject(template, rng, resolution, plan)
    lesions: list[Lesion] = []
    if kind == "wmh":
        lesions, drawn = hyperintensities(subject.maps, template.extent, rng)
    elif plan is not None:
        values = tuple(brats.LABELS[about["names"]])
        lesions = tumour(subject.maps, subject.tissue[0], plan, template.extent, rng, values)
        drawn = {"tumour": asdict(plan)}
    fractions, label = blend(lesions, subject.brain)
    if kind == "ibsr":
        label = tissue_label(subject)
    elif kind == "structures":
        label = structure_label(subject.maps, subject.brain)
    elif kind == "freesurfer":
        label = aseg_label(structure_label(subject.maps, subject.brain), tissue_label(subject))
    quality = (0.8, 1.0, 1.5)[(number - 1) % len(SITES)] if kind == "wmh" else 1.0
    affine = np.diag([resolution, resolution, resolution, 1.0])
    affine[:3, 3] = np.array(template.centre) - resolution * (np.array(label.shape[::-1]) - 1) / 2
    for modality, path in images.items():
        image, drawn[modality] = take_image(subject, modality, lesions, fractions, rim=about["rim"], quality=quality)
        write_image(path, image.transpose(2, 1, 0), affine, dtype=np.int16)
    if label_file is not None:
        write_image(label_file, label.transpose(2, 1, 0), affine, dtype=np.uint8)
    write_json(note, {**about, "number": number, "drawn": drawn})
    return [*images.values(), *([label_file] if label_file else []), note]
