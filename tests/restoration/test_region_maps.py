"""Providers of label maps, the command that stores them, and simulated degradations."""

import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from asa.cli import regions, simulate
from asa.restoration.images import (
    common_window,
    list_pictures,
    read_picture,
    read_regions,
    read_values,
    write_picture,
    write_regions,
)
from asa.restoration.region_maps import make_provider, outlined, paint
from asa.restoration.simulation import decimated, low_count_pet, low_dose_ct, make_degradation

pytest.importorskip("skimage")


def discs(h: int = 64, w: int = 72) -> np.ndarray:
    """Two bright discs on a dark ground, `(1, h, w)`."""
    y, x = np.mgrid[:h, :w]
    image = np.full((h, w), 0.1)
    image[(y - 20) ** 2 + (x - 20) ** 2 < 144] = 0.9
    image[(y - 44) ** 2 + (x - 50) ** 2 < 144] = 0.5
    return image[None]


def simulated(clean: Path, out: Path, kind: str, *settings: str) -> None:
    assert simulate.main([f"input={clean}", f"out={out}", f"kind={kind}", *settings]) == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["felzenszwalb", "slic"])
def test_superpixels_separate_simple_shapes(name: str, channels: int) -> None:
    image = np.repeat(discs(), channels, axis=0)
    labels = make_provider(name)("a", image)
    assert labels.shape == image.shape[1:] and labels.dtype == np.int64
    # A rim may change sides: Felzenszwalb's method smooths first.
    inner = [set(labels[binary_erosion(image[0] == value, iterations=2)]) for value in (0.1, 0.5, 0.9)]
    assert not inner[0] & inner[1] and not inner[0] & inner[2] and not inner[1] & inner[2]


def test_a_larger_scale_gives_felzenszwalb_larger_regions() -> None:
    image = (discs() + np.random.default_rng(0).normal(0, 0.1, (1, 64, 72))).clip(0, 1)
    many, few = (len(np.unique(make_provider("felzenszwalb", scale=scale)("a", image))) for scale in (10.0, 1000.0))
    assert many > 2 * few


@pytest.mark.parametrize("channels", [1, 3])
def test_slic_makes_approximately_the_requested_number_of_regions(channels: int) -> None:
    image = np.repeat(discs(), channels, axis=0) + np.random.default_rng(0).normal(0, 0.03, (channels, 64, 72))
    found = len(np.unique(make_provider("slic", regions=30)("a", image.clip(0, 1))))
    assert 15 <= found <= 45


def test_masks_are_painted_from_large_to_small_and_the_rest_is_one_region() -> None:
    small, large, hidden = np.zeros((3, 6, 6), dtype=bool)
    large[:4, :4], small[1:3, 1:3], hidden[1, 1] = True, True, True
    labels = paint([hidden, large, small], (6, 6))
    expected = np.zeros((6, 6), dtype=int)
    expected[:4, :4], expected[1:3, 1:3], expected[1, 1] = 1, 2, 3
    assert np.array_equal(labels, expected)
    assert np.array_equal(paint([], (2, 3)), np.zeros((2, 3)))


def test_segment_anything_runs_with_the_users_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a local file of Segment Anything weights"):
        make_provider("sam")
    weights = tmp_path / "sam.pth"
    weights.touch()
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match="pip install segment-anything"):
        make_provider("sam", weights=weights)

    class Generator:
        def __init__(self, network: object) -> None: ...

        def generate(self, image: np.ndarray) -> list[dict]:
            assert image.dtype == np.uint8 and image.shape[2] == 3
            return [{"segmentation": image[..., 0] > 200}, {"segmentation": image[..., 0] > 100}]

    made = {"vit_b": lambda checkpoint: SimpleNamespace(to=lambda device: (checkpoint, device))}
    stand_in = SimpleNamespace(sam_model_registry=made, SamAutomaticMaskGenerator=Generator)
    monkeypatch.setitem(sys.modules, "segment_anything", stand_in)
    labels = make_provider("sam", weights=weights, model="vit_b")("a", discs())
    assert np.array_equal(labels, np.select([discs()[0] > 0.8, discs()[0] > 0.4], [2, 1], 0))


def test_stored_label_maps_are_checked_and_numbered_anew(tmp_path: Path) -> None:
    write_regions(tmp_path / "a.png", np.where(discs()[0] > 0.4, 60000, 7))
    provider = make_provider("stored", folder=tmp_path)
    assert np.array_equal(provider("a", discs()), discs()[0] > 0.4)
    with pytest.raises(FileNotFoundError, match="no label map of b"):
        provider("b", discs())
    with pytest.raises(ValueError, match="the label map is"):
        provider("a", discs()[:, :10])
    with pytest.raises(ValueError, match="give stored="):
        make_provider("stored")
    with pytest.raises(ValueError, match="choose one of felzenszwalb"):
        make_provider("magic")
    for wrong in ({"scale": -1}, {"scale": "x"}, {"regions": 0}):
        ((key, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"^{key}={value}: give a number above 0$"):
            make_provider("slic", **wrong)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_label_maps_are_stored_once_with_previews(tmp_path: Path, workers: int, capsys) -> None:
    for k in range(3):
        write_picture(tmp_path / "low" / f"s{k}.png", discs())
    (tmp_path / "low" / "bad.png").write_bytes(b"no image")
    out = tmp_path / "regions"
    given = [f"input={tmp_path / 'low'}", f"out={out}", "provider=slic", f"workers={workers}"]
    assert regions.main([*given, "regions=9"]) == 1
    said = capsys.readouterr()
    assert "bad: failed: " in said.out and "1 images failed" in said.err
    labels = read_regions(out / "s0.png")
    assert f"3 label maps with {len(np.unique(labels))} to" in said.out
    assert set(list_pictures(out)) == {"s0", "s1", "s2"}
    assert read_picture(out / "previews" / "s0.png").shape == (3, 64, 72)
    (tmp_path / "low" / "bad.png").unlink()
    assert regions.main([*given, "regions=9"]) == 0
    said = capsys.readouterr()
    assert "3 label maps existed already" in said.out and "label maps with" not in said.out
    for settings, message in (
        ([*given, "regions=10"], "made with other settings"),
        ([f"input={out}", *given[1:], "regions=9"], "would replace the images"),
    ):
        assert regions.main(settings) == 1
        assert message in capsys.readouterr().err


def test_a_preview_outlines_regions() -> None:
    labels = np.zeros((4, 4), dtype=int)
    labels[:, 2:] = 1
    drawn = outlined(np.zeros((1, 4, 4)), labels)
    assert np.array_equal(drawn.any(axis=0), np.array([[0, 1, 0, 0]] * 4, dtype=bool))


def test_the_commands_write_pairs_and_label_maps(tmp_path: Path, monkeypatch, capsys) -> None:
    write_picture(tmp_path / "clean" / "a.png", discs(65, 72))
    pairs = tmp_path / "pairs"
    monkeypatch.setattr(sys, "argv", ["asa-simulate", f"input={tmp_path / 'clean'}", f"out={pairs}", "kind=sr"])
    assert simulate.main() == 0
    assert read_picture(pairs / "low" / "a.png").shape == (1, 32, 36)
    assert read_picture(pairs / "high" / "a.png").shape == (1, 64, 72)
    monkeypatch.setattr(sys, "argv", ["asa-regions", f"input={pairs / 'low'}", f"out={pairs / 'regions'}"])
    assert regions.main() == 0
    assert read_regions(pairs / "regions" / "a.png").shape == (32, 36)
    assert "1 label maps with" in capsys.readouterr().out
    for arguments, message in (
        (["kind=ct"], "kind=ct needs HU"),
        (["kind=mri"], "choose one of ct, pet, sr"),
        (["kind=sr", "factor=3"], "choose 2 or 4"),
        (["kind=ct", "window=[-1000,1000]", "photons=0"], "photons=0: has to be a number, above 0"),
        (["kind=ct", "window=[-1000,1000]", "pixel=0"], "pixel=0: has to be a number, above 0"),
        (["kind=sr", "blur=-1"], "blur=-1: has to be a number, 0 or more"),
        (["kind=sr", "factor=4", f"out={pairs}"], "holds pairs simulated with other settings (factor)"),
    ):
        other = [f"input={tmp_path / 'clean'}", f"out={tmp_path / 'other'}", *arguments]
        monkeypatch.setattr(sys, "argv", ["asa-simulate", *other])
        assert simulate.main() == 1
        assert message in capsys.readouterr().err


def water(edge: int = 64) -> np.ndarray:
    """A cylinder of water in air, HU."""
    y, x = np.mgrid[:edge, :edge] - edge // 2
    return np.where(x**2 + y**2 < (0.4 * edge) ** 2, 0.0, -1000.0)


def test_ct_noise_is_unbiased_and_decreases_with_the_root_of_the_photons() -> None:
    image = water()
    inside = image == 0
    spread = []
    for photons in (1e4, 4e4):
        noise = low_dose_ct(image, np.random.default_rng(0), photons=photons, pixel=3.0, views=90) - image
        assert abs(noise[inside].mean()) < 0.1 * noise[inside].std()
        spread.append(noise[inside].std())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.1)


def test_ct_noise_is_that_of_filtered_back_projection() -> None:
    # Variance at the centre of a ramp-filtered reconstruction: pi^2 / (12 views) * the variance of a line, in 1 / pixel
    # (Kak and Slaney, Principles of Computerized Tomographic Imaging, 1988, section 5.2); linear interpolation between
    # detector elements lowers it.
    image, photons, views, pixel = water(), 1e4, 90, 3.0
    line = 0.0193 * pixel * 2 * 0.4 * 64
    draws = [low_dose_ct(image, np.random.default_rng(k), photons=photons, pixel=pixel, views=views) for k in range(8)]
    found = np.std([draw[28:36, 28:36] for draw in draws])
    expected = 1000 / (0.0193 * pixel) * np.sqrt(np.pi**2 / (12 * views) * np.exp(line) / photons)
    assert 0.5 * expected < found < expected


def test_pet_noise_is_unbiased_and_decreases_with_the_root_of_the_counts() -> None:
    image = np.where(water() == 0, 5.0, 0.0)
    inside = image > 0
    spread = []
    for counts in (1e6, 4e6):
        noise = low_count_pet(image, np.random.default_rng(0), counts=counts, views=90) - image
        assert abs(noise[inside].mean()) < 0.1 * noise[inside].std()
        spread.append(noise[inside].std())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.1)
    # The unit does not matter.
    doubled = low_count_pet(2 * image, np.random.default_rng(0), counts=1e6, views=90)
    np.testing.assert_allclose(doubled, 2 * low_count_pet(image, np.random.default_rng(0), counts=1e6, views=90))
    with pytest.raises(ValueError, match="activity"):
        low_count_pet(image - 1, np.random.default_rng(0))


@pytest.mark.parametrize("factor", [2, 4])
def test_bilinear_upscaling_restores_a_decimated_ramp(factor: int) -> None:
    import torch

    ramp = np.broadcast_to(np.arange(32.0), (1, 32, 32))
    small = decimated(ramp, factor)
    assert small.shape == (1, 32 // factor, 32 // factor)
    back = torch.nn.functional.interpolate(torch.from_numpy(small)[None], scale_factor=factor, mode="bilinear")
    np.testing.assert_allclose(back[0, :, :, 8:-8], ramp[:, :, 8:-8], atol=1e-3)


def test_simulated_pairs_are_read_in_the_units_of_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hu = np.linspace(-900, 400, 32 * 24).reshape(32, 24).astype(np.float32)
    (tmp_path / "clean").mkdir()
    nib.save(nib.Nifti1Image(hu.T[:, :, None], np.eye(4)), tmp_path / "clean" / "a.nii.gz")
    arguments = [f"input={tmp_path / 'clean'}", f"out={tmp_path / 'pairs'}", "kind=ct", "window=[-1000,1000]"]
    monkeypatch.setattr(sys, "argv", ["asa-simulate", *arguments])
    assert simulate.main() == 0
    for window in ((-1000, 1000), (-500, 100)):
        expected = read_picture(tmp_path / "clean" / "a.nii.gz", window)
        np.testing.assert_allclose(read_picture(tmp_path / "pairs" / "high" / "a.png", window), expected, atol=1e-4)
    low, high = (read_picture(tmp_path / "pairs" / part / "a.png", (-1000, 1000)) for part in ("low", "high"))
    assert 0 < np.abs(low - high).mean() < 0.1


def test_a_degradation_is_that_of_its_settings() -> None:
    image, seed = discs(24, 20), np.random.default_rng
    ct = make_degradation("ct", photons=3e3, pixel=2.0)(1500 * image - 1000, seed(1))
    np.testing.assert_array_equal(ct, low_dose_ct(1500 * image[0] - 1000, seed(1), photons=3e3, pixel=2.0)[None])
    pet = make_degradation("pet", counts=2e4)(image, seed(1))
    np.testing.assert_array_equal(pet, low_count_pet(image[0], seed(1), counts=2e4)[None])
    small = make_degradation("sr", factor=4, blur=0.8)(image, seed(1))
    np.testing.assert_array_equal(small, decimated(image, 4, blur=0.8))


def test_simulated_noise_does_not_depend_on_the_window(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    nib.save(nib.Nifti1Image(water().astype(np.float32)[:, :, None], np.eye(4)), tmp_path / "clean" / "a.nii.gz")
    found = []
    for window in ((-1000, 1000), (-150, 150)):
        out = tmp_path / str(window[1])
        simulated(tmp_path / "clean", out, "ct", f"window=[{window[0]},{window[1]}]", "photons=1e6", "pixel=3.0")
        found.append(read_values(out / "low" / "a.png")[0][0][water() == 0])
    assert found[0].std() > 1
    np.testing.assert_allclose(found[0], found[1], atol=0.05)


def test_simulated_pairs_keep_the_window_of_their_source(tmp_path: Path) -> None:
    write_picture(tmp_path / "clean" / "a.png", discs(24, 20), (-1000, 1000))
    simulated(tmp_path / "clean", tmp_path / "pairs", "sr")
    assert common_window((tmp_path / "pairs").glob("*/a.png")) == (-1000, 1000)


def test_images_of_several_windows_have_none_in_common(tmp_path: Path) -> None:
    for name, window in (("a", (-1000, 1000)), ("b", (-200, 200)), ("c", None)):
        write_picture(tmp_path / f"{name}.png", discs(24, 20), window)
    assert common_window([tmp_path / "c.png"]) is None
    for names, words in (("ab", "window -1000 to 1000, and .*b.png -200 to 200"), ("ac", "c.png none")):
        with pytest.raises(ValueError, match=words):
            common_window(tmp_path / f"{name}.png" for name in names)


def test_colours_of_16_bits_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # one pixel of RGB
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(7))), chunk(b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(ValueError, match="a.png: .*16 bits in colour"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not finite"):
        write_picture(tmp_path / "b.png", np.full((1, 4, 4), np.nan))


def test_simulation_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for k in range(2):
        write_picture(tmp_path / "clean" / f"{k}.png", discs(24, 20))
    for workers in (1, 2):
        simulated(tmp_path / "clean", tmp_path / str(workers), "pet", f"workers={workers}", "counts=1e5")
    for path in (tmp_path / "1").glob("*/*.png"):
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()
    assert (tmp_path / "1" / "low" / "0.png").read_bytes() != (tmp_path / "1" / "low" / "1.png").read_bytes()
