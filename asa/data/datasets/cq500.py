"""CQ500: head CTs of 491 people with the reads of three radiologists (Chilamkurthy et al., Lancet 2018).

    CQ500CT0 CQ500CT0/Unknown Study/CT Plain/CT000000.dcm   a folder for each series of a study, 1 to 10 of them
    reads.csv                                               name (CQ500-CT-0), Category, R1:ICH, ..., R3:MidlineShift

The reader takes what asa-dicom made of the folders, and one series of each study. Folders and columns are as users of
the dataset describe them. No file of the dataset itself was read.
"""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, make_record, sorted_records
from asa.data.io.files import write_whole
from asa.data.io.tables import check_own, csv_text, read_rows

SERIES, TABLE = "series.csv", "findings.csv"  # of asa-dicom, and what is written beside it
RATERS = ("R1", "R2", "R3")
FINDINGS = (
    *("ICH", "IPH", "IVH", "SDH", "EDH", "SAH", "ChronicBleed"),
    *("Fracture", "CalvarialFracture", "OtherFracture", "MassEffect", "MidlineShift"),
)
LOWEST = 100.0  # mm from the first to the last slice, below which a series is not a whole head
_STUDY = re.compile(r"CQ500[-_ ]?CT[-_ ]?(\d+)", re.IGNORECASE)
_CONTRAST = {"contrast", "post", "cect", "c", "iv", "oral", "angio", "cta"}
_PLAIN = {"plain", "pre", "non", "without"}

Row = dict[str, str]


def records(root: str | Path, *, reads: str | Path | None = None, finding: str = "ICH") -> list[Record]:
    """Records of one series of each study, with the channel `ct`; id and subject are the name in reads.csv.

    Of the series of a study those with contrast, those for bone and those of less than 100 mm are left out; of the
    others the one with the thinnest slices is taken, and of equal ones that with the most. Names say what a series is:
    with contrast are POST, CONTRAST, CECT, C, IV, ORAL and 4cc without PRE or PLAIN, for bone BONE, HRCT and HiRes.
    Warnings count the series and the studies that are left out.

    Args:
        root: folder that asa-dicom made of the dataset, with its series.csv.
        reads: reads.csv of the dataset. What at least two of the three raters see is written to `findings.csv` in the
            folder: subject, health (1 where none of `FINDINGS` is seen), class, and each finding as 1 or 0.
        finding: the class is its name where it is seen, and "none" elsewhere.

    Raises:
        FileNotFoundError: no table of asa-dicom, or no `reads`.
        ValueError: an unknown finding, tables with other columns, or a read that is neither 0 nor 1.
    """
    root = existing_folder(root, f"what asa-dicom made of CQ500, with {SERIES}").absolute()
    if finding not in FINDINGS:
        raise ValueError(f"data.finding={finding}: choose one of {', '.join(FINDINGS)}")
    if not (root / SERIES).is_file():
        raise FileNotFoundError(f"{root / SERIES}: no such table: make it with asa-dicom input=CQ500 out={root}")
    studies: dict[str, list[Row]] = {}
    for row in read_rows(root / SERIES):
        if "slice_mm" not in row:
            raise ValueError(f"{root / SERIES}: has no column slice_mm: run asa-dicom again with the same out=")
        if number := (_STUDY.findall(row["source"]) or _STUDY.findall(row["subject"]))[-1:]:
            studies.setdefault(f"CQ500-CT-{int(number[0])}", []).append(row)
    found, left = [], dict[str, list[str]]()
    for name, rows in studies.items():
        fitting = [row for row in rows if not _unfit(row)]
        best = min(fitting, key=lambda row: (float(row["slice_mm"]), -int(row["slices"]), row["id"]), default=None)
        for row in rows:
            if row is not best:
                left.setdefault(_unfit(row) or "with thicker slices, or fewer", []).append(_title(row))
        if best is None:
            left.setdefault("studies without any other", []).append(name)
        else:
            found.append(make_record(name, name, {"ct": root / best["file"]}))
    if left:
        shown = "; ".join(f"{len(names)} {reason}, like {names[0]}" for reason, names in left.items())
        warnings.warn(f"{root / SERIES}: left out are series {shown}", stacklevel=2)
    if reads is not None:
        _write_findings(Path(reads), root / TABLE, finding, {record["id"] for record in found})
    return sorted_records(found, source=f"series of CQ500CT0, ... in {root / SERIES}")


def _title(row: Row) -> str:
    """The folder of a series, which is called as the series, with that of its study."""
    source = Path(row["source"])
    return f"{source.parent.parent.name}/{source.name}"


def _unfit(row: Row) -> str:
    """Why a series is not taken, whatever the others are; "" if it can be."""
    name = f"{Path(row['source']).name} {row['description']}".lower()
    words = set(re.findall(r"[a-z]+", name))
    if (words & _CONTRAST or re.search(r"\d ?cc\b", name)) and not words & _PLAIN:
        return "with contrast"
    if words & {"bone", "hrct"} or "hires" in name.replace(" ", ""):
        return "for bone"
    if int(row["slices"]) * float(row["slice_mm"]) < LOWEST:
        return f"of less than {LOWEST:g} mm"
    return ""


def _write_findings(reads: Path, out: Path, finding: str, studies: Iterable[str]) -> None:
    """Write what the majority of the raters sees in each study of reads.csv."""
    rows = read_rows(reads)
    columns = ["name", *(f"{rater}:{name}" for rater in RATERS for name in FINDINGS)]
    if absent := [column for column in columns if not rows or column not in rows[0]]:
        raise ValueError(f"{reads}: has no column {absent[0]}: is it the reads.csv of CQ500?")
    check_own(out, "data=cq500", {"subject", "health", "class"})
    cells = []
    for row in rows:
        if wrong := [column for column in columns[1:] if row[column] not in ("0", "1")]:
            raise ValueError(f"{reads}: {row['name']}: {wrong[0]} is {row[wrong[0]]!r}, and has to be 0 or 1")
        seen = [sum(int(row[f"{rater}:{name}"]) for rater in RATERS) >= 2 for name in FINDINGS]
        kind = finding if seen[FINDINGS.index(finding)] else "none"
        cells.append([row["name"], int(not any(seen)), kind, *map(int, seen)])
    write_whole(out, csv_text(["subject", "health", "class", *FINDINGS], cells).encode())
    names = {row["name"] for row in rows}
    for lone, where in ((set(studies) - names, reads), (names - set(studies), out.parent / SERIES)):
        if lone:
            warnings.warn(f"{len(lone)} studies are not in {where}, like {min(lone)}", stacklevel=3)
