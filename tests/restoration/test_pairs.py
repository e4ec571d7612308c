"""Pairs of 2-D images: files, records, crops, and what is refused."""

from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from asa.data.loading.loader import LoaderSettings, make_loader
from asa.restoration.images import (
    read_picture,
    read_regions,
    size_of,
    stored_window,
    write_picture,
    write_regions,
)
from asa.restoration.pairs import PairDataset, find_pairs

Image = pytest.importorskip("PIL.Image")


def coordinates(h: int, w: int) -> np.ndarray:
    """A picture `(1, h, w)` whose values name their place."""
    return (np.arange(h * w, dtype=np.float32).reshape(1, h, w)) / 65535


def write_pairs(root: Path, count: int = 3, size: tuple[int, int] = (24, 20), upscale: int = 2) -> Path:
    h, w = size
    for k in range(count):
        fine = coordinates(h * upscale, w * upscale)
        write_picture(root / "high" / f"s{k}.png", fine)
        write_picture(root / "low" / f"s{k}.png", fine[:, ::upscale, ::upscale])
        write_regions(root / "regions" / f"s{k}.png", np.rint(fine[0, ::upscale, ::upscale] * 65535))
    return root


def test_a_written_image_is_read_unchanged(tmp_path: Path) -> None:
    for image in (np.random.default_rng(0).random((1, 7, 5)), np.random.default_rng(1).random((3, 7, 5))):
        write_picture(tmp_path / "a.png", image)
        step = 65535 if len(image) == 1 else 255
        np.testing.assert_allclose(read_picture(tmp_path / "a.png"), image, atol=0.51 / step)


def test_a_label_map_keeps_all_16_bits(tmp_path: Path) -> None:
    labels = np.array([[0, 255, 256], [65535, 7, 7]])
    write_regions(tmp_path / "a.png", labels)
    assert np.array_equal(read_regions(tmp_path / "a.png"), labels)
    with pytest.raises(ValueError, match="0 to 65535"):
        write_regions(tmp_path / "a.png", labels - 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "1", "LA"])
def test_pngs_of_every_mode_are_grey_or_colour(tmp_path: Path, mode: str) -> None:
    Image.fromarray(np.full((4, 6, 3), 255, dtype=np.uint8)).convert(mode).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png")
    assert found.shape == ((1 if mode in ("L", "1", "LA") else 3), 4, 6)
    np.testing.assert_allclose(found, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_pngs_of_8_bits_are_read_whatever_their_size(tmp_path: Path, mode: str) -> None:
    for height, width in ((16, 160), (116, 5), (4, 1616)):
        Image.fromarray(np.full((height, width, 3), 255, dtype=np.uint8)).convert(mode).save(tmp_path / "a.png")
        assert read_picture(tmp_path / "a.png").shape[1:] == size_of(tmp_path / "a.png") == (height, width)


def test_a_window_becomes_zero_to_one_and_other_values_are_clipped(tmp_path: Path) -> None:
    values = np.array([[-2000, -1000, 0], [500, 1000, 3000]], dtype=np.float32)  # rows, columns
    nib.save(nib.Nifti1Image(values.T[:, :, None], np.eye(4)), tmp_path / "a.nii.gz")
    found = read_picture(tmp_path / "a.nii.gz", (-1000, 1000))
    np.testing.assert_allclose(found[0], [[0, 0, 0.5], [0.75, 1, 1]])
    with pytest.raises(ValueError, match=r"a\.nii\.gz: give the values.*data\.window="):
        read_picture(tmp_path / "a.nii.gz")
    for wrong in ((1, 0), (0,), "01"):
        with pytest.raises(ValueError, match=r"window="):
            read_picture(tmp_path / "a.nii.gz", wrong)


def test_a_picture_written_with_a_window_is_read_in_its_units(tmp_path: Path) -> None:
    image = np.linspace(0, 1, 20).reshape(1, 4, 5)
    write_picture(tmp_path / "a.png", image, (-1000, 1000))
    assert stored_window(tmp_path / "a.png") == (-1000, 1000)
    for window in (None, (-1000, 1000)):
        np.testing.assert_allclose(read_picture(tmp_path / "a.png", window), image, atol=1e-5)
    np.testing.assert_allclose(read_picture(tmp_path / "a.png", (0, 500)), (image * 4 - 2).clip(0, 1), atol=5e-5)
    write_picture(tmp_path / "a.png", image)
    assert stored_window(tmp_path / "a.png") is None


@pytest.mark.parametrize("theirs", ["image", "text"])
def test_only_images_that_asa_wrote_are_replaced(tmp_path: Path, theirs: str) -> None:
    image, path = np.zeros((1, 4, 5)), tmp_path / "a.png"
    Image.fromarray(np.full((4, 5), 7, np.uint8)).save(path) if theirs == "image" else path.write_text("mine")
    before = path.read_bytes()
    for write in (lambda: write_picture(path, image), lambda: write_regions(path, image[0])):
        with pytest.raises(ValueError, match=r"a\.png: exists and is no image that asa wrote: move it away"):
            write()
    assert path.read_bytes() == before
    path.unlink()
    write_picture(path, image)
    write_regions(path, image[0] + 1)
    assert read_regions(path).tolist() == np.ones((4, 5)).tolist()


def test_dicom_slices_are_read_in_hounsfield_units() -> None:
    pydicom = pytest.importorskip("pydicom")
    path = Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm"
    header = pydicom.dcmread(path)
    hu = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    np.testing.assert_allclose(read_picture(path, (-1024, 3000))[0], (hu.clip(-1024, 3000) + 1024) / 4024, atol=1e-5)


@pytest.mark.parametrize("name", ["a.png", "a.dcm", "a.nii"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    if name == "a.dcm":
        pytest.importorskip("pydicom")
    (tmp_path / name).write_bytes(100 * b"no image")
    with pytest.raises(ValueError, match=name):
        read_picture(tmp_path / name, (0, 1))


def test_invalid_files_are_named(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), dtype=np.float32), np.eye(4)), tmp_path / "v.nii")
    with pytest.raises(ValueError, match="not one slice"):
        read_picture(tmp_path / "v.nii", (0, 1))
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    halves = np.arange(20, dtype=np.float32).reshape(4, 5)
    halves[2, 3] += 0.5  # one pixel is enough
    nib.save(nib.Nifti1Image(halves, np.eye(4)), tmp_path / "half.nii")
    for name in ("colour.png", "half.nii"):
        with pytest.raises(ValueError, match="a label map has one whole number"):
            read_regions(tmp_path / name)
    nib.save(nib.Nifti1Image(np.zeros((0, 5), dtype=np.int16), np.eye(4)), tmp_path / "empty.nii")
    with pytest.raises(ValueError, match=r"empty\.nii"):
        read_regions(tmp_path / "empty.nii")


def test_a_crop_has_the_same_position_in_all_three_images(tmp_path: Path) -> None:
    pairs = find_pairs(write_pairs(tmp_path, size=(24, 20)))
    dataset = PairDataset(pairs, 8, upscale=2)
    places, turned = set(), set()
    for epoch in range(12):
        item = dataset[1, epoch]
        assert item["image"].shape == (1, 8, 8) and item["target"].shape == (1, 16, 16)
        values = (item["image"][0] * 65535).round().long()
        assert torch.equal(values, item["regions"])
        # Turned as the image is, the fine one holds the coarse one's pixels at one corner of each block.
        fine = (item["target"][0] * 65535).round().long()
        corners = [fine[i::2, j::2] for i in (0, 1) for j in (0, 1)]
        assert sum(torch.equal(corner, values) for corner in corners) == 1
        places.add(int(values.min()))
        turned.add(next(k for k, corner in enumerate(corners) if torch.equal(corner, values)))
    assert len(places) > 6 and len(turned) == 4
    again = dataset[1, 11]
    assert torch.equal(again["image"], item["image"]) and again["seed"] == item["seed"]


def test_the_loader_takes_pairs(tmp_path: Path) -> None:
    dataset = PairDataset(find_pairs(write_pairs(tmp_path)), 8, upscale=2, seed=3)
    batch = next(iter(make_loader(dataset, 2, LoaderSettings(workers=0))))
    assert batch["target"].shape == (2, 1, 16, 16) and batch["regions"].dtype == torch.int64 and len(batch["id"]) == 2


def test_without_label_maps_an_image_is_one_region(tmp_path: Path) -> None:
    (pair,) = find_pairs(write_pairs(tmp_path, 1), regions=None)
    assert PairDataset([pair], 8, upscale=2).whole(0)["regions"].unique().tolist() == [0]


def test_images_of_different_cases_are_refused(tmp_path: Path) -> None:
    root = write_pairs(tmp_path)
    (root / "high" / "s1.png").rename(root / "high" / "t1.png")
    with pytest.raises(ValueError, match=r"s1 is in low/ and not in high/"):
        find_pairs(root)
    (root / "high" / "t1.png").rename(root / "high" / "s1.png")
    (root / "regions" / "s2.png").unlink()
    with pytest.raises(ValueError, match=r"s2 has no label map in regions/"):
        find_pairs(root)
    with pytest.raises(FileNotFoundError, match=r"asa-regions input="):
        find_pairs(root, regions="maps")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_pairs(root, low="dark")


@pytest.mark.parametrize(
    ("affine", "shape", "same"),
    [
        (np.diag([1.0, 1, 1, 1]), (8, 10, 1), True),
        (np.diag([-1.0, 1, 1, 1]), (8, 10, 1), False),  # the slice from right to left
        (np.diag([2.0, 2, 1, 1]), (8, 10, 1), False),
        (np.array([[0.5, 0, 0, -0.25], [0, 0.5, 0, -0.25], [0, 0, 1, 0], [0, 0, 0, 1]]), (16, 20, 1), True),
        (np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]]), (8, 10, 1), False),  # another slice
        (np.eye(4), (16, 20, 1), True),  # states nothing
    ],
)
def test_pairs_of_nifti_slices_are_of_one_place(
    tmp_path: Path, affine: np.ndarray, shape: tuple[int, ...], same: bool
) -> None:
    for folder, grid, sides in (("low", np.eye(4), (8, 10, 1)), ("high", affine, shape)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(np.zeros(sides, dtype=np.float32), grid), tmp_path / folder / "a.nii.gz")
    with nullcontext() if same else pytest.raises(ValueError, match="its header puts a corner"):
        find_pairs(tmp_path, regions=None)


def test_images_of_different_sizes_or_channels_are_refused(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, 1)
    pairs = find_pairs(root)
    with pytest.raises(ValueError, match=r"high/s0\.png: is 40 x 48 pixels.*model\.upscale=1.*20 x 24"):
        PairDataset(pairs, 8).whole(0)
    with pytest.raises(ValueError, match=r"low/s0\.png: is a grey image.*model\.in_channels=1"):
        PairDataset(pairs, 8, channels=3, upscale=2).whole(0)
    with pytest.raises(ValueError, match="lower crop"):
        PairDataset(pairs, 22, upscale=2)[0, 0]
    write_picture(root / "low" / "s0.png", np.zeros((3, 24, 20)))
    with pytest.raises(ValueError, match=r"low/s0\.png: is a colour image, but the network takes grey"):
        PairDataset(pairs, 8, upscale=2).whole(0)
    write_picture(root / "low" / "s0.png", coordinates(24, 20))
    write_regions(root / "regions" / "s0.png", np.zeros((12, 10)))
    with pytest.raises(ValueError, match=r"regions/s0\.png: the label map is 10 x 12 pixels, its image 20 x 24"):
        PairDataset(pairs, 8, upscale=2).whole(0)
    with pytest.raises(ValueError, match="check the split"):
        PairDataset([], 8)
