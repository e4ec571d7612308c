"""A cohort with faults in it: each is named and leaves nothing behind, and the good scans are as if they were alone."""

import contextlib
import csv
import gzip
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from heads import LABELS, centred, scan

from asa.cli import COMMANDS
from asa.data.datasets import folder
from asa.data.io.files import gzipped
from asa.data.io.nifti import Volume, identity_of, read_image, read_label, write_image, write_label
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.scan import ScanQuality
from asa.data.preprocessing.settings import CohortSettings
from asa.data.store import Store

SHAPE = (30, 36, 32)
LAS = centred(SHAPE, np.diag([-5.0, 5.0, 5.0]))  # so coarse that a whole head is small
SROW_X, SROW_Y = slice(280, 296), slice(296, 312)  # rows of the sform in a NIfTI-1 header
HANG = 300  # seconds, which nothing else takes, also on a busy machine
GOOD = [f"good_{number}" for number in range(3)]
GLOBS = {"t1": "*_t1.nii.gz", "flair": "*_flair.nii.gz"}

Fault = Callable[[Path, str], None]  # damages the files of one id in a folder


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def lines(self, word: str) -> dict[str, str]:
        """Of the lines "ID: WORD: TEXT" the text by id."""
        return dict(re.findall(rf"^(\S+): {word}: (.*)$", self.out, re.MULTILINE))


def settings(root: Path, out: Path, *more: str) -> list[str]:
    """Arguments of asa-prepare for a cohort that `write_scan` wrote."""
    images = ", ".join(f"{channel}: '{glob}'" for channel, glob in GLOBS.items())
    labels = ", ".join(f"{value}: {name}" for value, name in LABELS.items())
    where = [f"data.root={root}", f"data.images={{{images}}}", "data.label=*_seg.nii.gz"]
    return [*where, f"labels={{{labels}}}", f"out={out}", *more]


def command(*arguments: str) -> Result:
    """asa-prepare in this process, with its configuration composed as on the command line."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = COMMANDS["prepare"].main(arguments)
    return Result(code, out.getvalue(), err.getvalue())


def bytes_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def write_scan(root: Path, id: str) -> None:
    """T1, FLAIR and label map of one head; no two ids have a voxel pattern in common."""
    head, tissues = scan(SHAPE, LAS)
    rng = np.random.default_rng(zlib.crc32(id.encode()))
    for channel in GLOBS:
        noisy = np.where(head.data > 0, np.rint(head.data) + rng.integers(0, 20, SHAPE), 0)
        write_image(root / f"{id}_{channel}.nii.gz", noisy, LAS)
    write_label(root / f"{id}_seg.nii.gz", tissues.data, head)


# ---------------------------------------------------------------------------------------------- faults


def packed(change: Callable[[bytes], bytes]) -> Fault:
    """Change the bytes of the T1's file."""

    def damage(root: Path, id: str) -> None:
        path = root / f"{id}_t1.nii.gz"
        path.write_bytes(change(path.read_bytes()))

    return damage


def unpacked(change: Callable[[bytes], bytes]) -> Fault:
    """Change the bytes inside the T1's gzip."""
    return packed(lambda content: gzipped(change(gzip.decompress(content))))


def image(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Change the voxels of the T1."""

    def damage(root: Path, id: str) -> None:
        path = root / f"{id}_t1.nii.gz"
        volume = read_image(path)
        write_image(path, change(volume.data), volume.affine)

    return damage


def label(change: Callable[[np.ndarray], np.ndarray], shift: float = 0) -> Fault:
    """Change the voxels of the label map, and shift it to the front by some mm."""

    def damage(root: Path, id: str) -> None:
        path = root / f"{id}_seg.nii.gz"
        volume = read_label(path)
        affine = volume.affine.copy()
        affine[1, 3] += shift
        write_image(path, change(volume.data), affine, dtype=np.uint8)

    return damage


def lacks(channel: str) -> Fault:
    return lambda root, id: (root / f"{id}_{channel}.nii.gz").unlink()


def twin(level: int = 6, dtype: type = np.float32) -> Fault:
    """The T1 of the first good scan, with another compression or data type."""

    def damage(root: Path, id: str) -> None:
        source, copy = root / f"{GOOD[0]}_t1.nii.gz", root / f"{id}_t1.nii.gz"
        volume = read_image(source)
        write_image(copy, volume.data, volume.affine, dtype=dtype)
        copy.write_bytes(gzipped(gzip.decompress(copy.read_bytes()), level))
        assert copy.read_bytes() != source.read_bytes()

    return damage


def flip_a_bit(content: bytes) -> bytes:
    """Flip one bit so that all voxels decompress, with other values, and only the checksum reveals it."""
    whole = np.frombuffer(gzip.decompress(content), np.float32, offset=352)
    for index in range(len(content) // 2, len(content) - 8):
        changed = content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]
        try:
            stream = zlib.decompressobj(-zlib.MAX_WBITS).decompress(changed[10:])
        except zlib.error:
            continue
        if len(stream) == 352 + whole.nbytes and np.isfinite(np.frombuffer(stream, np.float32, offset=352)).all():
            return changed
    raise AssertionError("every flipped bit breaks this stream")


FAULTS: dict[str, tuple[Fault, str]] = {
    "cut_short": (packed(lambda content: content[: len(content) // 2]), r"_t1\.nii\.gz: damaged or truncated gzip"),
    "flipped_bit": (packed(flip_a_bit), r"_t1\.nii\.gz: damaged or truncated gzip \(CRC.*; copy or download it again"),
    "zero_bytes": (packed(lambda content: b""), r"_t1\.nii\.gz: the file is empty; copy or download it again"),
    "text": (packed(lambda content: b"no image"), r"_t1\.nii\.gz: not a NIfTI or Analyze image \("),
    "not_a_number": (image(lambda data: np.where(data > 600, np.nan, data)), r"_t1\.nii\.gz: \d+ voxels are NaN"),
    "series": (image(lambda data: np.stack([data, data], -1)), r"_t1\.nii\.gz: shape .* is not 3-D; give one volume"),
    "flat": (unpacked(lambda raw: raw[:296] + raw[SROW_X] + raw[312:]), r"_t1\.nii\.gz: the affine is singular"),
    "other_shape": (label(lambda data: data[1:]), r"t1 and label .*: shapes \(30, 36, 32\) and \(29, 36, 32\) differ"),
    "elsewhere": (label(np.copy, shift=2), r"t1 and label of elsewhere: .* corners are 2\.00 mm apart"),
    "undeclared": (label(lambda data: data + 2 * (data == 7)), r"_seg\.nii\.gz: label value 9 \(\d+ voxels\) is not"),
    "no_flair": (lacks("flair"), r"has no flair; add the file"),
    "twin_packed": (twin(level=1), r"t1 is the same scan as in good_0, of another subject \(good_0\), voxel for voxel"),
    "twin_short": (twin(dtype=np.int16), r"t1 is the same scan as in good_0, .* leave one out, or set duplicates=keep"),
}


def plant(root: Path, *names: str) -> None:
    for name in names:
        write_scan(root, name)
        FAULTS[name][0](root, name)


class Cohort(NamedTuple):
    """Good scans alone and among all faults: the raw files, both stores, and the output of the second command."""

    raw: Path
    alone: Path
    store: Path
    result: Result


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    home = tmp_path_factory.mktemp("faults")
    (home / "raw").mkdir()
    for id in GOOD:
        write_scan(home / "raw", id)
    assert command(*settings(home / "raw", home / "alone")).code == 0
    plant(home / "raw", *FAULTS)
    result = command(*settings(home / "raw", home / "store"))
    return Cohort(home / "raw", home / "alone", home / "store", result)


@pytest.fixture(scope="module")
def checked(cohort: Cohort) -> Result:
    """The same cohort with check=only."""
    out = cohort.raw.with_name("checked")
    result = command(*settings(cohort.raw, out, "check=only"))
    assert not out.exists()
    return result


def test_a_flipped_bit_that_nibabel_accepts_is_planted(cohort: Cohort) -> None:
    spoilt = np.asarray(nib.load(cohort.raw / "flipped_bit_t1.nii.gz").dataobj)
    assert spoilt.shape == SHAPE and np.isfinite(spoilt).all()


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_reported_with_its_reason(cohort: Cohort, name: str) -> None:
    assert re.search(FAULTS[name][1], cohort.result.lines("failed")[name])


def test_a_cohort_with_faults_ends_with_an_error_and_their_number(cohort: Cohort) -> None:
    assert cohort.result.lines("failed").keys() == FAULTS.keys()
    assert cohort.result.code == 1 and f"error: {len(FAULTS)} scans failed" in cohort.result.err
    assert f"{len(GOOD)} prepared, 0 done before, {len(FAULTS)} failed" in cohort.result.out


def test_the_store_has_the_same_bytes_as_one_of_the_good_scans_alone(cohort: Cohort) -> None:
    assert bytes_of(cohort.store) == bytes_of(cohort.alone)
    assert [record["id"] for record in Store(cohort.store).records] == GOOD


def test_a_check_finds_the_same_faults_and_writes_no_store(cohort: Cohort, checked: Result) -> None:
    assert checked.code == 1 and f"error: {len(FAULTS)} scans failed" in checked.err
    assert checked.lines("failed") == cohort.result.lines("failed")
    assert "nothing written: " in checked.out


def test_a_check_has_one_row_per_scan_and_shows_the_faults_first(cohort: Cohort, checked: Result) -> None:
    page = cohort.raw.with_name("checked_check")
    rows = list(csv.DictReader((page / "quality_control.csv").open(newline="")))
    assert [row["id"] for row in rows] == sorted([*FAULTS, *GOOD])
    assert {row["id"]: row["reason"] for row in rows if row["status"] == "failed"} == checked.lines("failed")
    text = (page / "quality_control.html").read_text()
    shown = [text.index(f">{row['id']}<") for row in rows if row["status"] == "failed"]
    assert max(shown) < min(text.index(f">{id}<") for id in GOOD)


# ---------------------------------------------------------------------------------------------- choices


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Files of one good scan."""
    path = tmp_path / "raw"
    path.mkdir()
    write_scan(path, GOOD[0])
    return path


def test_a_missing_channel_is_zero_with_missing_zero_and_refused_otherwise(raw: Path) -> None:
    plant(raw, "no_flair")
    out = raw.with_name("store")
    filled = command(*settings(raw, out, "missing=zero"))
    assert filled.code == 0 and filled.lines("warning") == {"no_flair": "has no flair: filled with zeros"}
    store = Store(out)
    assert [record.get("missing") for record in store.records] == [None, ["flair"]]
    assert store.record("no_flair")["identity"].keys() == {"t1"}
    t1, flair = store.image("no_flair")
    assert t1.any() and not flair.any()
    before = bytes_of(out)
    assert command(*settings(raw, out)).lines("failed").keys() == {"no_flair"} and bytes_of(out) == before
    assert command(*settings(raw, raw.with_name("new"))).lines("failed").keys() == {"no_flair"}
    assert [record["id"] for record in Store(raw.with_name("new")).records] == [GOOD[0]]


def test_duplicates_are_kept_with_a_warning_if_asked_for(raw: Path) -> None:
    plant(raw, "twin_packed")
    kept = command(*settings(raw, raw.with_name("store"), "duplicates=keep"))
    assert kept.code == 0
    assert re.fullmatch(r"t1 is the same scan as in good_0, .* voxel for voxel", kept.lines("warning")["twin_packed"])
    assert len(Store(raw.with_name("store"))) == 2


def test_a_scan_that_the_store_holds_from_another_folder_is_a_duplicate(raw: Path) -> None:
    out, other = raw.with_name("store"), raw.with_name("other")
    assert command(*settings(raw, out)).code == 0
    other.mkdir()
    for path in raw.iterdir():
        shutil.copy(path, other / path.name.replace(GOOD[0], "again"))
    assert "same scan as in good_0" in command(*settings(other, out)).lines("failed")["again"]
    assert [record["id"] for record in Store(out).records] == [GOOD[0]]


def test_a_scan_that_is_no_more_in_the_cohort_stays_and_is_named(raw: Path) -> None:
    rows = [f"{name},{GOOD[0]}_{name}.nii.gz\n" for name in ("t1", "flair")]
    given = (f"data.root={raw}", "data.table=table.csv", f"out={raw}_store")
    for listed, expected in ((rows, False), (rows[:1], True)):
        (raw / "table.csv").write_text("id,t1\n" + "".join(listed))
        result = command(*given)
        assert result.code == 0 and len(Store(f"{raw}_store")) == 2
        assert ("1 scan of the store not in this cohort, kept there: flair" in result.out) == expected
    assert "in this cohort" not in command(*given, "dataset=other", "duplicates=keep").out  # two datasets in a store


def test_the_site_of_a_scan_is_in_the_manifest(raw: Path) -> None:
    (raw / "table.csv").write_text(f"id,site,t1\na,Rome,{GOOD[0]}_t1.nii.gz\nb,,{GOOD[0]}_flair.nii.gz\n")
    assert command(f"data.root={raw}", "data.table=table.csv", f"out={raw}_store").code == 0
    assert [record.get("site") for record in Store(f"{raw}_store").records] == ["Rome", None]
    (raw / "table.csv").write_text(f"id,site,t1\na,,{GOOD[0]}_t1.nii.gz\nb,Oslo,{GOOD[0]}_flair.nii.gz\n")
    assert command(f"data.root={raw}", "data.table=table.csv", f"out={raw}_store").code == 0
    assert [record.get("site") for record in Store(f"{raw}_store").records] == [None, "Oslo"]


def test_qform_and_sform_with_exchanged_sides_are_warned_about(raw: Path) -> None:
    def mirrored(content: bytes) -> bytes:  # the sform is RAS now, the qform LAS
        return content[: SROW_X.start] + (-np.frombuffer(content[SROW_X], "<f4")).tobytes() + content[SROW_X.stop :]

    unpacked(mirrored)(raw, GOOD[0])
    result = command(f"data.root={raw}", "data.images={t1: '*_t1.nii.gz'}", f"out={raw}_store")
    assert result.code == 0
    assert result.lines("warning")[GOOD[0]].endswith("qform is LAS, but sform is RAS (used); check left and right")


def test_a_changed_byte_is_detected_and_repaired_as_the_message_says(raw: Path) -> None:
    write_scan(raw, GOOD[1])
    out = raw.with_name("store")
    assert command(*settings(raw, out)).code == 0
    before = bytes_of(out)
    array = out / f"images/{GOOD[1]}.npy"
    content = bytearray(array.read_bytes())
    content[-1000] ^= 1
    array.write_bytes(content)
    found = command(*settings(raw, out, "verify=true"))
    assert found.code == 1 and ": 1 scan damaged, listed above" in found.err
    assert found.out.splitlines() == [f"{GOOD[1]}: {array}: bytes changed; delete it and run asa-prepare again"]
    array.unlink()
    assert command(*settings(raw, out)).code == 0
    assert bytes_of(out) == before
    assert "2 scans unchanged, all of them" in command(*settings(raw, out, "verify=true")).out


# ---------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("level", [1, 9])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("axes", [(0,), (0, 1, 2)])
def test_the_identity_of_voxels_does_not_depend_on_their_file(
    raw: Path, axes: tuple[int, ...], dtype: type, level: int
) -> None:
    original = read_image(raw / f"{GOOD[0]}_t1.nii.gz")
    affine = original.affine.copy()
    for axis in axes:
        affine[:3, 3] += affine[:3, axis] * (SHAPE[axis] - 1)
        affine[:3, axis] *= -1
    path = raw / "renamed.nii.gz"
    write_image(path, np.flip(original.data, axes), affine, dtype=dtype)
    path.write_bytes(gzipped(gzip.decompress(path.read_bytes()), level))
    assert identity_of(read_image(path)) == identity_of(original)


def test_permuted_axes_keep_the_identity_and_one_voxel_changes_it(raw: Path) -> None:
    original = read_image(raw / f"{GOOD[0]}_t1.nii.gz")
    permuted = Volume(original.data.transpose(2, 0, 1), original.affine[:, [2, 0, 1, 3]], original.header)
    assert identity_of(permuted) == identity_of(original)
    changed = original.data.copy()
    changed[15, 18, 16] += 1
    assert identity_of(Volume(changed, original.affine, original.header)) != identity_of(original)


def test_law_a_zero_with_a_sign_is_the_same_voxel_and_digests_stay_as_in_earlier_stores() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 5
    assert identity_of(Volume(values, np.eye(4), None)) == "804bcc3a941521e86d69993ec919ebaf"
    masked = [np.where(values < 0, zero, values).astype(np.float32) for zero in (0.0, -0.0)]
    assert len({identity_of(Volume(one, np.eye(4), None)) for one in masked}) == 1


# ---------------------------------------------------------------------------------------------- kills


@contextlib.contextmanager
def running_until(count: int, arguments: list[str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command with two workers in a process group of its own, as soon as so many images are written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "asa", "prepare", *arguments, "workers=2"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        limit = time.monotonic() + HANG
        while len(list(out.glob("images/*.npy"))) < count and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.002)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "workers"), [(1, 2), (2, 1)])
def test_a_killed_command_ends_its_workers_and_continues_to_the_same_bytes(
    cohort: Cohort, tmp_path: Path, count: int, workers: int
) -> None:
    arguments = settings(cohort.raw, tmp_path / "store")
    with running_until(count, arguments, tmp_path / "store") as process:
        process.kill()
        process.communicate(timeout=HANG)  # ends with the last worker, because they hold the output too
        assert process.returncode == -signal.SIGKILL
    assert bytes_of(tmp_path / "store") != bytes_of(cohort.store)
    again = command(*arguments, f"workers={workers}")
    assert again.lines("failed") == cohort.result.lines("failed") and again.code == 1
    assert bytes_of(tmp_path / "store") == bytes_of(cohort.store)


def test_a_killed_worker_does_not_affect_other_scans(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_workers(_: ScanQuality) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    store = shutil.copytree(cohort.store, tmp_path / "store")
    records = folder.records(cohort.raw, images=GLOBS, label="*_seg.nii.gz")
    given: Any = dict(cohort=CohortSettings(labels=LABELS), workers=2, progress=False)
    report = prepare_cohort(records, store, **given, on_scan=kill_workers)
    assert report.failures.keys() == cohort.result.lines("failed").keys()  # what its worker had not done is done again
    assert bytes_of(store) == bytes_of(cohort.store)
    lost = lambda function, jobs, workers, **_: ((job, None) for job in jobs)  # noqa: E731
    monkeypatch.setattr("asa.data.preprocessing.cohort.in_processes", lost)
    report = prepare_cohort(records, store, **given, on_scan=lambda _: None)  # looks at all scans
    assert report.failures and all("a worker process was killed" in reason for reason in report.failures.values())
    assert bytes_of(store) == bytes_of(cohort.store)


def test_a_command_killed_before_its_first_manifest_can_be_started_again(raw: Path) -> None:
    out = raw.with_name("store")
    out.mkdir()
    (out / ".manifest.json.part").write_bytes(b"{")
    (out / "records.jsonl").touch()
    assert command(*settings(raw, out)).code == 0
    assert not [name for name in bytes_of(out) if name.endswith(".part")]


def test_arrays_without_an_entry_are_removed_when_their_scan_fails(raw: Path) -> None:
    out = raw.with_name("store")
    assert command(*settings(raw, out)).code == 0
    before = bytes_of(out)
    for kind in ("images", "labels"):
        shutil.copy(out / kind / f"{GOOD[0]}.npy", out / kind / "cut_short.npy")
    plant(raw, "cut_short")
    assert command(*settings(raw, out)).code == 1
    assert bytes_of(out) == before


def test_one_odd_subject_of_a_bids_dataset_fails_and_the_others_are_prepared(tmp_path: Path) -> None:
    root = tmp_path / "bids"
    for name in ("a", "b", "c_acq-x", "c_acq-y"):
        write_scan(tmp_path, name)
        folder = root / f"sub-{name[0]}" / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}_t1.nii.gz").rename(folder / f"sub-{name}_T1w.nii.gz")
    odd = root / os.fsdecode(b"sub-caf\xe9") / "anat"  # Latin-1
    odd.mkdir(parents=True)
    shutil.copy(root / "sub-a/anat/sub-a_T1w.nii.gz", odd / os.fsdecode(b"sub-caf\xe9_T1w.nii.gz"))
    (root / "participants.tsv").write_text("participant_id\tsite\nX1\tRome\nX2\tOslo\n")
    given = ("data=bids", f"data.root={root}", f"out={tmp_path / 'store'}")
    for done in ("2 prepared, 0 done before", "0 prepared, 2 done before"):
        found = command(*given)
        assert found.code == 1 and f"{done}, 2 failed" in found.out
        failed = found.lines("failed")
        assert "'data.entities={acq: x}'" in failed["sub-c"] and "is not in UTF-8" in failed["sub-caf"]
        assert "asa-prepare: warning:" in found.err and "2 of its 2 names match none here" in found.err
    assert [record["id"] for record in Store(tmp_path / "store").records] == ["sub-a", "sub-b"]
    assert command(*given, "data.acq=x").err.count("leaves out 3 of 4 scans") == 1


def test_scans_whose_content_git_annex_holds_are_counted_in_one_line(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"s{number}_t1.nii.gz").symlink_to(".git/annex/objects/ab/MD5E-s1--x.nii.gz")
    found = command(f"data.root={tmp_path}", "data.images={t1: '*_t1.nii.gz'}", f"out={tmp_path / 'store'}")
    (failed,) = found.lines("failed").values()
    assert found.code == 1 and "datalad get" in failed and failed.endswith("(3 scans like this one)")
    assert "3 failed" in found.out


def test_a_background_of_nan_becomes_zero_where_asked_and_nan_in_the_head_never(tmp_path: Path) -> None:
    for id in ("good", "bad", "hole"):
        write_scan(tmp_path, id)
        head = read_image(tmp_path / f"{id}_t1.nii.gz")
        data = np.where(head.data > 0, head.data, np.nan)
        if id == "bad":
            data[tuple(side // 2 for side in SHAPE)] = np.nan
        if id == "hole":  # from the middle up to the border
            data[*(slice(3 * side // 8, 5 * side // 8) for side in SHAPE[:2]), SHAPE[2] // 2 :] = np.nan
        write_image(tmp_path / f"{id}_t1.nii.gz", data, LAS)
        write_image(tmp_path / f"{id}_zero.nii.gz", np.nan_to_num(data), LAS)
    given = (f"data.root={tmp_path}", "data.images={t1: '*_t1.nii.gz'}")
    failed = command(*given, f"out={tmp_path / 'refused'}").lines("failed")
    assert (
        set(failed) == {"good", "bad", "hole"} and "set prepare.nan=zero if they are its background" in failed["good"]
    )
    found = command(*given, f"out={tmp_path / 'store'}", "prepare.nan=zero")
    assert "are NaN, and are set to 0" in found.lines("warning")["good"]
    assert "1 voxels inside the head are NaN" in found.lines("failed")["bad"] and found.code == 1
    assert "voxels inside the head are NaN" in found.lines("failed")["hole"]
    command(f"data.root={tmp_path}", "data.images={t1: '*_zero.nii.gz'}", f"out={tmp_path / 'same'}")
    images = [Store(tmp_path / name).image("good") for name in ("store", "same")]
    np.testing.assert_array_equal(*images)
    assert Store(tmp_path / "store").settings["nan"] == "zero" and "nan" not in Store(tmp_path / "same").settings


# ---------------------------------------------------------------------------------------------- two datasets


def test_a_scan_of_another_dataset_replaces_none_of_its_id_while_that_exists(tmp_path: Path) -> None:
    for root, id in (("one", "a"), ("two", "b")):
        write_scan(tmp_path / root, id)
    for file in (tmp_path / "two").iterdir():
        file.rename(file.with_name(file.name.replace("b_", "a_")))
    store = tmp_path / "store"
    assert command(*settings(tmp_path / "one", store)).code == 0
    before = bytes_of(store)
    refused = command(*settings(tmp_path / "two", store))
    assert refused.code == 1 and bytes_of(store) == before
    (reason,) = refused.lines("failed").values()
    assert reason.startswith(
        f"the store holds another scan of this id, of {tmp_path}/one/a_flair.nii.gz: give dataset="
    )
    unread = tmp_path / "two" / "a_t1.nii.gz"
    unread.rename(tmp_path / "there")
    unread.symlink_to(tmp_path / "nowhere")  # as of DataLad, whose content is elsewhere
    assert command(*settings(tmp_path / "two", store)).code == 1 and bytes_of(store) == before
    (tmp_path / "there").replace(unread)
    assert command(*settings(tmp_path / "two", store), "dataset=two").code == 0
    first, second = Store(store).records
    assert (first["id"], first["subject"], first.get("site")) == ("a", "a", None)
    assert (second["id"], second["subject"], second["site"]) == ("two_a", "two_a", "two")
    assert bytes_of(store).items() > {key: value for key, value in before.items() if key.endswith(".npy")}.items()
    for file in (tmp_path / "one").iterdir():
        file.unlink()
    assert command(*settings(tmp_path / "two", store), "duplicates=keep").code == 0
    assert Store(store).record("a")["sources"]["t1"]["path"] == f"{tmp_path}/two/a_t1.nii.gz"
