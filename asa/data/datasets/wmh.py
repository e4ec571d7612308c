"""WMH Segmentation Challenge: T1, FLAIR and white-matter hyperintensities of several scanners (https://wmh.isi.uu.nl)."""

import re
from collections.abc import Sequence
from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, find_file, make_record, sorted_records
from asa.data.io.files import matching_files

CHANNELS = {"t1": "T1", "flair": "FLAIR"}
RELEASES = ("training", "test", "public")  # folders of the release, above those of the sites


def records(root: str | Path, *, channels: Sequence[str] = tuple(CHANNELS), label: bool = True) -> list[Record]:
    """Records of `[training/|test/]SITE/SUBJECT/pre/T1.nii.gz`, `pre/FLAIR.nii.gz` and `wmh.nii.gz`.

    A site is one folder or two: Amsterdam/GE3T is the site Amsterdam_GE3T. Id and subject are SITE_SUBJECT, because
    numbers repeat between sites. Characters that cannot be part of a file name become "_".

    Args:
        root: folder of the sites, or of `training` and `test`.
        channels: t1, flair or both, in the order of the store.
        label: False for scans without `wmh.nii.gz`.

    Raises:
        ValueError: unknown channels, a scan that repeats, or a root too far above the sites.
    """
    if not channels or isinstance(channels, str) or set(channels) - set(CHANNELS):
        raise ValueError(f"data.channels={channels}: choose from [{', '.join(CHANNELS)}]")
    root = existing_folder(root, "the sites, Utrecht, Singapore, ...")
    patterns = [f"{above}/pre/{file}.nii.gz" for above in ("*/*", "*/*/*", "*/*/*/*") for file in CHANNELS.values()]
    folders = {path.parent.parent for path in matching_files(root, *patterns)}
    result: list[Record] = []
    for folder in folders:
        *above, number = folder.relative_to(root).parts
        site_folders = above[1:] if above[0] in RELEASES and len(above) > 1 else above
        if len(site_folders) > 2:
            raise ValueError(f"{folder}: too deep below the root; give the folder that holds Utrecht, Singapore, ...")
        site = "_".join(_clean(part) for part in site_folders)
        name = f"{site}_{_clean(number)}"
        images = {channel: find_file(folder / "pre" / CHANNELS[channel], (".nii.gz",)) for channel in channels}
        result.append(make_record(name, name, images, site=site, label=folder / "wmh.nii.gz" if label else None))
    return sorted_records(result, source=f"[training/|test/]SITE/SUBJECT/pre/T1.nii.gz below {root}")


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_")
