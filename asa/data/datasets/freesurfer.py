"""FreeSurfer's and FastSurfer's folders of subjects: SUBJECTS_DIR/SUBJECT/mri/T1.mgz, norm.mgz, aseg.mgz, ...

Label values and names are those of FreeSurfer's colour table (https://surfer.nmr.mgh.harvard.edu).
"""

import re
import warnings
from pathlib import Path
from typing import Any

from asa.data.datasets.nnunet import LabelScheme
from asa.data.datasets.record import Record, existing_folder, find_file, label_file, make_record, named_records
from asa.data.io.files import FREESURFER, matching_files

ENDINGS = (*FREESURFER, ".nii.gz", ".nii")
TIMES = ("base-tps", "base-tps.fastsurfer")  # of longitudinal templates: lists the folders of their time points
BIDS = r"^(sub-[A-Za-z0-9]+)_ses-"  # folders that BIDS Apps name after sessions

SIDED = {  # value on the left -> (value on the right, name)
    **{2: (41, "Cerebral-White-Matter"), 3: (42, "Cerebral-Cortex"), 4: (43, "Lateral-Ventricle")},
    **{5: (44, "Inf-Lat-Vent"), 7: (46, "Cerebellum-White-Matter"), 8: (47, "Cerebellum-Cortex")},
    **{10: (49, "Thalamus"), 11: (50, "Caudate"), 12: (51, "Putamen"), 13: (52, "Pallidum"), 17: (53, "Hippocampus")},
    **{18: (54, "Amygdala"), 26: (58, "Accumbens-area"), 28: (60, "VentralDC"), 30: (62, "vessel")},
    31: (63, "choroid-plexus"),
}
_MIDDLE = {
    **{14: "3rd-Ventricle", 15: "4th-Ventricle", 16: "Brain-Stem", 24: "CSF", 72: "5th-Ventricle"},
    **{77: "WM-hypointensities", 80: "non-WM-hypointensities", 85: "Optic-Chiasm"},
    **{251: "CC_Posterior", 252: "CC_Mid_Posterior", 253: "CC_Central", 254: "CC_Mid_Anterior", 255: "CC_Anterior"},
}
# Of the Desikan-Killiany atlas: 1000 + index on the left, 2000 + on the right; in wmparc 3000 and 4000 lie under them.
_CORTEX = (
    "unknown bankssts caudalanteriorcingulate caudalmiddlefrontal corpuscallosum cuneus entorhinal fusiform "
    "inferiorparietal inferiortemporal isthmuscingulate lateraloccipital lateralorbitofrontal lingual "
    "medialorbitofrontal middletemporal parahippocampal paracentral parsopercularis parsorbitalis parstriangularis "
    "pericalcarine postcentral posteriorcingulate precentral precuneus rostralanteriorcingulate rostralmiddlefrontal "
    "superiorfrontal superiorparietal superiortemporal supramarginal frontalpole temporalpole transversetemporal insula"
)
IGNORED = [29, 61, 78, 79, 81, 82]  # undetermined, and lesions that are rarely marked on a side


def aseg_labels() -> dict[int, str]:
    """Values and names of aseg.mgz."""
    sided = {value: f"Left-{name}" for value, (_, name) in SIDED.items()}
    sided |= {value: f"Right-{name}" for value, name in SIDED.values()}
    return dict(sorted((sided | _MIDDLE).items()))


def label_scheme(root: str | Path | None = None, *, label: str = "aseg", **_: Any) -> LabelScheme:
    """The labels of a label map by its name: aseg and its variants, aparc+aseg, aparc.DKTatlas+aseg, wmparc.

    Raises:
        ValueError: another label map, whose labels have to be given.
    """
    labels, parcels = aseg_labels(), {"ctx-lh": 1000, "ctx-rh": 2000}
    if label.startswith("wmparc"):
        parcels |= {"wm-lh": 3000, "wm-rh": 4000}
        labels |= {5001: "Left-UnsegmentedWhiteMatter", 5002: "Right-UnsegmentedWhiteMatter"}
    elif label.startswith("aseg"):
        parcels = {}
    elif not re.match(r"aparc(\.DKTatlas)?\+aseg", label):
        raise ValueError(
            f"data.label={label}: labels=dataset knows aseg, aparc+aseg, aparc.DKTatlas+aseg and wmparc; "
            "give the values and names of this one, like 'labels={17: Left-Hippocampus}'"
        )
    for part, first in parcels.items():
        labels |= {first + index: f"{part}-{name}" for index, name in enumerate(_CORTEX.split())}
    return LabelScheme(labels, list(IGNORED), {})


def records(
    root: str | Path,
    *,
    image: str = "T1",
    label: str | None = "aseg",
    stream: str = "cross",
    subject: str | None = None,
) -> list[Record]:
    """Records of `SUBJECT/mri/T1.mgz` and `SUBJECT/mri/aseg.mgz`.

    The channel is t1, the id the name of the folder. A subject is a folder, with three exceptions: time points that the
    file base-tps (of FastSurfer base-tps.fastsurfer) of a longitudinal template lists are of the template's subject,
    TIME.long.BASE is of subject BASE, and sub-X_ses-Y of subject sub-X. Averages (fsaverage, ...) and longitudinal
    templates are left out.

    Args:
        root: SUBJECTS_DIR.
        image: name in `mri/` without its ending: T1 (the head), norm (without skull), or orig_nu of FastSurfer.
        label: the same of the label map: aseg, aparc+aseg, or aparc.DKTatlas+aseg.deep of FastSurfer; None for none.
        stream: "cross" for the folders of single time points, "long" for TIME.long.BASE.
        subject: regular expression searched in the id, whose group 1 is the subject, in place of these rules.

    Raises:
        ValueError: an unknown stream.
    """
    root = existing_folder(root, "the subjects (SUBJECTS_DIR)")
    if stream not in ("cross", "long"):
        raise ValueError(f"data.stream={stream}: choose cross or long")
    folders = [path for path in matching_files(root, "*", folders=True) if not path.name.startswith(".")]
    lists = [path for folder in folders for name in TIMES if (path := folder / name).is_file()]
    templates = {path.parent.name: path.read_text(encoding="utf-8", errors="replace").split() for path in lists}
    base_of = {time: base for base, times in templates.items() for time in times}
    left: dict[str, list[str]] = {}
    result: list[Record] = []
    for folder in folders:
        name = folder.name
        _, longitudinal, base = name.partition(".long.")
        if name.startswith(("fsaverage", "cvs_avg")):
            left.setdefault("are averages", []).append(name)
        elif not (folder / "mri").is_dir():
            left.setdefault("have no folder mri", []).append(name)
        elif name in templates:
            left.setdefault("are longitudinal templates", []).append(name)
        elif bool(longitudinal) != (stream == "long"):
            other = "are longitudinal: data.stream=long takes them" if longitudinal else "are not longitudinal"
            left.setdefault(other, []).append(name)
        else:
            truth = None if label is None else label_file(folder / "mri" / label, ENDINGS)
            bids = re.match(BIDS, base or name)  # first, as a template may not list all time points
            owner = bids.group(1) if bids else base_of.get(name) or base or name
            found = {"t1": find_file(folder / "mri" / image, ENDINGS)}
            result.append(make_record(name, owner, found, label=truth))
    for reason, names in left.items():
        warnings.warn(f"{root}: {len(names)} folders are left out, which {reason}, like {names[0]}", stacklevel=2)
    return named_records(result, subject, source=f"SUBJECT/mri/{image}.mgz below {root}")
