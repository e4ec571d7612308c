"""Crops, augmentation and the sampler."""

from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from asa.data.loading.augment import (
    Augmentation,
    AugmentSettings,
    draw_augmentation,
    intensity_transform,
    source_size,
    spatial_transform,
    swap_sides,
)
from asa.data.loading.crops import CropDataset, Foreground, sample_seed
from asa.data.loading.loader import EndlessSampler, LoaderSettings, make_loader
from asa.data.store import Store, read_box
from asa.ops.labels import IGNORED

STRONG = AugmentSettings(
    rotation=30,
    rotation_probability=1,
    scale=[0.7, 1.4],
    scale_probability=1,
    mirror_probability=0.5,
    gamma=[0.7, 1.5],
    gamma_probability=1,
    noise=0.1,
    brightness=0.2,
)


class Memory:
    """Volumes in memory, as a source of crops."""

    def __init__(self, image: np.ndarray, label: np.ndarray | None = None) -> None:
        self.arrays = image, label

    def image(self, record_id: str) -> np.ndarray:
        return self.arrays[0]

    def label(self, record_id: str) -> np.ndarray | None:
        return self.arrays[1]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_box_is_zero_outside_the_volume() -> None:
    volume = np.arange(1, 2 * 4 * 5 * 6 + 1, dtype=np.float32).reshape(2, 4, 5, 6)
    padded = np.pad(volume, ((0, 0), (10, 10), (10, 10), (10, 10)))
    for start in ([-3, -2, 1], [0, 0, 0], [2, 3, 4], [-9, 0, 0], [3, -1, -4]):
        expected = padded[:, start[0] + 10 :, start[1] + 10 :, start[2] + 10 :][:, :7, :8, :5]
        np.testing.assert_array_equal(read_box(volume, start, (7, 8, 5)), expected)


@pytest.mark.parametrize("size", [(8, 8, 8), (12, 10, 9), (5, 7, 20)])
def test_a_centre_crop_is_centred_on_the_volume(size: tuple[int, int, int]) -> None:
    volume = np.zeros((1, 12, 10, 14), dtype=np.float32)
    volume[:, 5:7, 4:6, 6:8] = 1.0
    crop = CropDataset(Memory(volume), [{"id": "a"}], size)[0, 0]["image"]
    places = crop[0].nonzero().float().mean(dim=0)
    for place, edge in zip(places.tolist(), size, strict=True):
        assert abs(place - (edge - 1) / 2) <= 0.5


def test_random_crops_lie_inside_and_cover_the_volume() -> None:
    volume = np.arange(10 * 9 * 8, dtype=np.float32).reshape(1, 10, 9, 8) + 1
    dataset = CropDataset(Memory(volume), [{"id": "a"}], (4, 4, 8), crop="random")
    starts = set()
    for epoch in range(300):
        crop = dataset[0, epoch]["image"]
        first = int(crop[0, 0, 0, 0]) - 1
        z, y, x = np.unravel_index(first, (10, 9, 8))
        np.testing.assert_array_equal(crop.numpy(), volume[:, z : z + 4, y : y + 4, x : x + 8])
        starts.add((z, y))
    assert starts == {(z, y) for z in range(7) for y in range(6)}


def test_crops_along_the_midplane_are_random_but_for_the_left_right_axis() -> None:
    volume = np.arange(10 * 9 * 8, dtype=np.float32).reshape(1, 10, 9, 8) + 1
    dataset = CropDataset(Memory(volume), [{"id": "a"}], (4, 4, 4), crop="midplane")
    firsts = [int(dataset[0, epoch]["image"][0, 0, 0, 0]) - 1 for epoch in range(300)]
    starts = {tuple(int(n) for n in np.unravel_index(first, (10, 9, 8))) for first in firsts}
    assert starts == {(z, y, 2) for z in range(7) for y in range(6)}


def test_crops_of_odd_sizes_have_the_middle_of_the_volume_at_their_middle() -> None:
    volume = np.zeros((1, 11, 13, 15), dtype=np.float32)
    volume[0, 5, 6, 7] = 1
    for crop, size in (("centre", (5, 7, 9)), ("centre", (13, 15, 21)), ("midplane", (11, 13, 3))):
        found = CropDataset(Memory(volume), [{"id": "a"}], size, crop=crop)[0, 1]["image"]
        assert found.nonzero().tolist() == [[0, *(edge // 2 for edge in size)]]


@pytest.mark.parametrize("crop", ["random", "midplane"])
def test_the_mirror_is_the_crop_of_the_mirrored_volume(crop: str) -> None:
    volume = np.random.default_rng(0).random((2, 14, 12, 16), dtype=np.float32)
    settings = replace(STRONG, mirror_axes="DHW", deform=2.0, deform_probability=1.0, bias_field=0.3, blur=[0.5, 1.0])
    options = {"size": (7, 8, 6), "crop": crop, "augment": settings}
    one = CropDataset(Memory(volume), [{"id": "a"}], **options, mirrored=True)
    other = CropDataset(Memory(volume[..., ::-1].copy()), [{"id": "a"}], **options)
    for epoch in range(12):
        assert torch.equal(one[0, epoch]["mirror"], other[0, epoch]["image"])


def test_air_is_that_of_the_sample_as_it_is_given() -> None:
    volume = np.random.default_rng(0).random((2, 16, 16, 16), dtype=np.float32)
    volume[:, :, :8] = 0
    for settings, expected in ((AugmentSettings(), 4), (AugmentSettings(noise=0.5), 0)):
        sample = CropDataset(Memory(volume), [{"id": "a"}], (16, 16, 16), air=8, augment=settings)[0, 0]
        patches = [sample["image"][:, d : d + 8, h : h + 8, w : w + 8] for d in (0, 8) for h in (0, 8) for w in (0, 8)]
        assert sample["air"].tolist() == [all(channel.unique().numel() == 1 for channel in patch) for patch in patches]
        assert sample["air"].sum() == expected


def test_a_sample_depends_on_seed_epoch_and_record_alone(store) -> None:
    opened = Store(store)
    dataset = CropDataset(opened, opened.records, (32, 32, 32), crop="random", labelled=True, augment=STRONG, seed=3)
    first = dataset[1, 7]
    assert type(first["image"]) is type(first["label"]) is torch.Tensor  # no subclass that follows into the network
    dataset[0, 2]
    torch.rand(5)
    again = CropDataset(opened, opened.records, (32, 32, 32), crop="random", labelled=True, augment=STRONG, seed=3)[
        1, 7
    ]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["label"], again["label"])
    for other in (dataset[1, 8], CropDataset(opened, opened.records, (32, 32, 32), crop="random", seed=4)[1, 7]):
        assert not torch.equal(first["image"], other["image"])
    assert sample_seed(3, 7, "a") == sample_seed(3, 7, "a") < 2**63


def test_the_index_of_a_record_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    volume = rng.random((1, 12, 12, 12), dtype=np.float32)
    label = rng.integers(0, 3, (1, 12, 12, 12)).astype(np.uint8)
    records = [{"id": name} for name in "abc"]
    options = {"crop": "random", "labelled": True, "foreground": 0.5, "augment": STRONG}
    one, other = (
        CropDataset(Memory(volume, label), listed, (8, 7, 6), **options) for listed in (records, records[::-1])
    )
    for index in range(3):
        first, second = one[index, 4], other[2 - index, 4]
        assert first["id"] == second["id"] and torch.equal(first["image"], second["image"])
        assert torch.equal(first["label"], second["label"])
    assert not torch.equal(one[0, 4]["image"], one[1, 4]["image"])  # the same volume, another id


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers_or_start_step(store, workers: int) -> None:
    opened = Store(store)
    dataset = CropDataset(opened, opened.records[:3], (16, 16, 16), crop="random", labelled=True, augment=STRONG)
    settings = LoaderSettings(workers=workers)
    whole = list(islice(make_loader(dataset, 2, LoaderSettings(workers=0)), 5))
    part = list(islice(make_loader(dataset, 2, settings, start_step=2), 3))
    for expected, found in zip(whole[2:], part, strict=True):
        assert expected["id"] == found["id"]
        for key in ("image", "label", "seed"):
            assert torch.equal(expected[key], found[key])


@pytest.mark.slow
def test_workers_that_are_spawned_load_the_same_batches(store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asa.data.io.parallel.get_all_start_methods", lambda: ["spawn"])  # as on Windows
    opened = Store(store)
    dataset = CropDataset(opened, opened.records[:3], (16, 16, 16), crop="random", labelled=True, augment=STRONG)
    loaders = [make_loader(dataset, 2, LoaderSettings(workers=workers)) for workers in (0, 1)]
    assert type(loaders[1].multiprocessing_context).__name__ == "SpawnContext"
    for expected, found in islice(zip(*loaders, strict=True), 2):
        assert expected["id"] == found["id"] and torch.equal(expected["image"], found["image"])


def test_the_sampler_draws_every_record_once_per_epoch() -> None:
    addresses = [address for batch in islice(EndlessSampler(5, 4, micro_batches=2, seed=1), 20) for address in batch]
    assert len(addresses) == 40
    for epoch in range(8):
        assert sorted(index for index, e in addresses if e == epoch) == list(range(5))
    assert [i for i, e in addresses if e == 0] != [i for i, e in addresses if e == 1]
    with pytest.raises(ValueError, match="does not divide"):
        EndlessSampler(5, 4, micro_batches=3)


def test_a_start_step_counts_whole_batches_of_all_micro_batches() -> None:
    whole = list(islice(EndlessSampler(7, 12, micro_batches=3, seed=1), 30))
    assert {len(batch) for batch in whole} == {4}
    for step in (1, 2, 5):
        part = islice(EndlessSampler(7, 12, micro_batches=3, seed=1, start_step=step), 9)
        assert list(part) == whole[3 * step : 3 * step + 9]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_each_micro_batch_in_its_order(world_size: int) -> None:
    alone = list(islice(EndlessSampler(7, 24, micro_batches=3, start_step=2), 9))
    ranks = [
        islice(EndlessSampler(7, 24, micro_batches=3, start_step=2, rank=rank, world_size=world_size), 9)
        for rank in range(world_size)
    ]
    assert [[address for part in parts for address in part] for parts in zip(*ranks, strict=True)] == alone


def test_ranks_that_do_not_divide_a_micro_batch_are_refused() -> None:
    for micro_batches, world_size in ((1, 5), (2, 4), (3, 3)):
        with pytest.raises(ValueError, match=f"^{world_size} processes with train.accumulate={micro_batches} do not"):
            EndlessSampler(7, 12, micro_batches=micro_batches, world_size=world_size)


def test_the_order_of_a_loader_follows_the_seed_of_its_dataset() -> None:
    records = [{"id": name} for name in "abcdefgh"]
    for seed in (3, 4):
        dataset = CropDataset(Memory(np.ones((1, 4, 4, 4), np.float32)), records, (4, 4, 4), seed=seed)
        found = [batch["id"] for batch in islice(make_loader(dataset, 2, LoaderSettings(workers=0)), 8)]
        expected = islice(EndlessSampler(8, 2, seed=seed), 8)
        assert found == [[records[index]["id"] for index, _ in batch] for batch in expected]


def test_each_epoch_has_the_order_of_its_own_seed() -> None:
    orders = {
        (seed, epoch): tuple(index for index, at in chain(*islice(EndlessSampler(9, 3, seed=seed), 12)) if at == epoch)
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)


def test_spatial_transforms_are_the_same_for_image_and_label() -> None:
    rng = np.random.default_rng(0)
    label = np.zeros((1, 40, 40, 40), dtype=np.uint8)
    label[:, 10:30, 12:26, 8:22] = 1
    label[:, 16:24, 16:22, 10:30] = 2
    image = (label * 100).astype(np.float32)
    still = AugmentSettings(
        rotation=30, rotation_probability=1, scale=[0.7, 1.4], scale_probability=1, mirror_probability=0.5
    )
    dataset = CropDataset(
        Memory(image, label), [{"id": "a"}], (32, 32, 32), crop="random", labelled=True, augment=still
    )
    for epoch in rng.integers(0, 1000, 8).tolist():
        sample = dataset[0, epoch]
        # Away from edges, where interpolation mixes values, the image is the label times 100.
        pure = sample["image"] == sample["image"].round(decimals=-2)
        assert pure.float().mean() > 0.5
        assert torch.equal(sample["image"][pure].round() / 100, sample["label"][pure].float())
        assert set(sample["label"].unique().tolist()) <= {0, 1, 2}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast and blur change in every crop where they are set."""
    monkeypatch.setattr("asa.data.loading.augment.CONTRAST_PROBABILITY", 1)
    monkeypatch.setattr("asa.data.loading.augment.BLUR_PROBABILITY", 1)


@pytest.mark.usefixtures("always")
def test_intensity_transforms_leave_labels_unchanged(store) -> None:
    opened = Store(store)
    changed = AugmentSettings(
        gamma=[0.5, 2.0], gamma_probability=1, noise=0.2, brightness=0.3,
        contrast=[0.5, 0.8], blur=[0.5, 1.0],
    )  # fmt: skip
    plain, bright = (
        CropDataset(opened, opened.records, (24, 24, 24), crop="random", labelled=True, augment=augment)[2, 3]
        for augment in (None, changed)
    )
    assert torch.equal(plain["label"], bright["label"]) and not torch.equal(plain["image"], bright["image"])


def test_a_mirrored_crop_swaps_declared_pairs_and_only_these() -> None:
    label = np.zeros((1, 8, 8, 8), dtype=np.uint8)
    label[..., :4], label[..., 4:], label[:, 0] = 1, 2, 3  # left, right, midline structure
    image = label.astype(np.float32)
    always = AugmentSettings(mirror_probability=1.0)
    dataset = CropDataset(
        Memory(image, label), [{"id": "a"}], (8, 8, 8), labelled=True, augment=always, lateral_pairs=[(1, 2)]
    )
    assert torch.equal(dataset[0, 0]["label"], torch.from_numpy(label))
    assert torch.equal(dataset[0, 0]["image"], torch.from_numpy(image).flip(-1))
    values = torch.tensor([0, 1, 2, 3, 4, IGNORED])
    assert swap_sides(values, [(1, 2)]).tolist() == [0, 2, 1, 3, 4, IGNORED]


def test_ignored_voxels_stay_ignored_and_padding_is_background() -> None:
    label = np.ones((1, 24, 24, 24), dtype=np.uint8)
    label[..., 12:] = IGNORED
    image = (label == IGNORED).astype(np.float32)
    turned = AugmentSettings(rotation=30, rotation_probability=1, scale=[0.7, 1.4], scale_probability=1)
    for augment, values in ((None, {1, IGNORED}), (turned, {0, 1, IGNORED})):
        dataset = CropDataset(Memory(image, label), [{"id": "a"}], (24,) * 3, labelled=True, augment=augment)
        found = [dataset[0, epoch] for epoch in range(4)]
        assert set(torch.cat([sample["label"].unique() for sample in found]).tolist()) == values
        for sample in found:  # at ignored voxels away from their edge the image is 1
            assert (sample["image"][sample["label"] == IGNORED] > 0).all()
    wide = CropDataset(Memory(image, label), [{"id": "a"}], (24, 24, 30), labelled=True)[0, 0]["label"]
    assert not wide[..., :3].any() and not wide[..., 27:].any()


def test_an_identity_matrix_changes_nothing() -> None:
    drawn = Augmentation(matrix=torch.eye(3, dtype=torch.float64))
    for size in ((6, 7, 8), (9, 4, 5)):
        box = source_size(size, drawn)
        volume = torch.rand(2, *box)
        start = [(b - s) // 2 for b, s in zip(box, size, strict=True)]
        inner = volume[:, start[0] : start[0] + size[0], start[1] : start[1] + size[1], start[2] : start[2] + size[2]]
        torch.testing.assert_close(spatial_transform(volume, size, drawn), inner)


def test_a_quarter_turn_is_exact_and_a_zoom_enlarges() -> None:
    turn = Augmentation(matrix=torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64))
    box = source_size((8, 8, 8), turn)
    volume = torch.rand(1, *box)
    k = (box[0] - 8) // 2
    inner = volume[:, k : k + 8, k : k + 8, k : k + 8]
    turned = spatial_transform(volume, (8, 8, 8), turn)
    assert any(torch.allclose(turned, torch.rot90(inner, n, (2, 3)), atol=1e-5) for n in (1, 3))
    zoom = Augmentation(matrix=torch.eye(3, dtype=torch.float64) / 2)
    ball = torch.zeros(1, *source_size((16, 16, 16), zoom))
    ball[:, ball.shape[1] // 2 - 2 : ball.shape[1] // 2 + 2, ball.shape[2] // 2 - 2 : ball.shape[2] // 2 + 2] = 1.0
    assert (spatial_transform(ball, (16, 16, 16), zoom)[0, :, 8, 8] > 0.5).sum() == 8


def test_drawn_parameters_stay_in_their_ranges() -> None:
    source = generator()
    drawn = [draw_augmentation(STRONG, source) for _ in range(200)]
    zooms = [float(torch.linalg.det(d.matrix) ** (-1 / 3)) for d in drawn if d.matrix is not None]
    assert 0.7 <= min(zooms) < 0.75 and 1.33 < max(zooms) <= 1.4
    assert all(0.7 <= d.gamma <= 1.5 for d in drawn)
    assert 60 < sum(d.mirror == "W" for d in drawn) < 140 and {d.mirror for d in drawn} == {"", "W"}
    nothing = draw_augmentation(AugmentSettings(), source)
    assert nothing.matrix is None and not nothing.mirror and nothing.gamma == nothing.gain == 1 and nothing.noise == 0
    with pytest.raises(ValueError, match="augment.scale"):
        AugmentSettings(scale=[1.4, 0.7])


def test_gamma_keeps_the_range_and_noise_is_drawn_from_its_seed() -> None:
    image = torch.rand(1, 6, 6, 6)
    bent = intensity_transform(image, Augmentation(gamma=2.0))
    assert bent.min().item() == pytest.approx(image.min().item(), abs=1e-4)
    assert bent.max().item() == pytest.approx(image.max().item(), abs=1e-4)
    low, high = image.min(), image.max()
    torch.testing.assert_close(bent, ((image - low) / (high - low)) ** 2 * (high - low) + low, atol=1e-4, rtol=1e-4)
    noisy = Augmentation(noise=0.5, noise_seed=9)
    assert torch.equal(intensity_transform(image, noisy), intensity_transform(image, noisy))
    assert (intensity_transform(image, noisy) - image).std().item() == pytest.approx(0.5, rel=0.2)


def test_a_blur_is_a_gaussian_of_its_width_and_keeps_the_mean_inside() -> None:
    image = torch.rand(2, 24, 24, 24)
    for width in (0.2, 0.5, 0.8, 1.5):
        found = intensity_transform(image, Augmentation(blur=(width, 0.0)))
        expected = gaussian_filter(image[0].numpy(), width, mode="nearest", truncate=4)
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
        assert torch.equal(found[1], image[1])
    assert found[0].std() < 0.5 * image[0].std()
    settings, source = AugmentSettings(blur=[0.5, 1.0]), generator()
    widths = [draw_augmentation(settings, source, channels=2).blur for _ in range(2000)]
    assert all(width == 0 or 0.5 <= width <= 1 for pair in widths for width in pair)
    assert np.mean([bool(pair) for pair in widths]) == pytest.approx(0.19, abs=0.03)  # of two channels, one or both
    with pytest.raises(ValueError, match=r"augment.blur=\[1, 0\]"):
        AugmentSettings(blur=[1, 0])


def test_contrast_scales_the_distances_from_the_mean_and_stays_in_the_range() -> None:
    image = torch.rand(2, 8, 8, 8)
    weak, strong = (intensity_transform(image, Augmentation(contrast=factor)) for factor in (0.5, 2.0))
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(weak, mean + (image - mean) / 2)
    for before, after in zip(image, strong, strict=True):
        assert after.min() == before.min() and after.max() == before.max() and after.std() > before.std()
    settings, source = AugmentSettings(contrast=[0.75, 1.25]), generator()
    drawn = [draw_augmentation(settings, source).contrast for _ in range(400)]
    assert all(0.75 <= factor <= 1.25 for factor in drawn)
    assert np.mean([factor != 1 for factor in drawn]) == pytest.approx(0.15, abs=0.05)


@pytest.mark.usefixtures("always")
def test_settings_that_are_off_leave_the_draws_of_the_others_unchanged() -> None:
    more = replace(STRONG, mirror_axes="DHW", contrast=[0.5, 2], blur=[1, 1])
    for seed in range(20):
        one, other = (draw_augmentation(settings, generator(seed)) for settings in (STRONG, more))
        assert torch.equal(one.matrix, other.matrix) and ("W" in one.mirror) == ("W" in other.mirror)
        assert (one.gamma, one.gain, one.noise, one.noise_seed) == (
            other.gamma,
            other.gain,
            other.noise,
            other.noise_seed,
        )
        assert other.contrast != 1 and other.blur and (one.contrast, one.blur) == (1, ())


def test_each_axis_is_mirrored_by_itself_and_labels_change_sides_with_w_alone() -> None:
    settings, source = AugmentSettings(mirror_probability=0.5, mirror_axes="DHW"), generator()
    drawn = [draw_augmentation(settings, source).mirror for _ in range(400)]
    assert len(set(drawn)) == 8 and all(0.4 < np.mean([axis in found for found in drawn]) < 0.6 for axis in "DHW")
    volume = torch.rand(1, 3, 4, 5)
    assert torch.equal(spatial_transform(volume, (3, 4, 5), Augmentation(mirror="DW")), volume.flip(1).flip(3))
    label = np.zeros((1, 8, 8, 8), dtype=np.uint8)
    label[..., :4], label[..., 4:], label[:, :2] = 1, 2, 3
    always = AugmentSettings(mirror_probability=1.0, mirror_axes="DH")
    dataset = CropDataset(
        Memory(label.astype(np.float32), label), [{"id": "a"}], (8, 8, 8), labelled=True, augment=always,
        lateral_pairs=[(1, 2)],
    )  # fmt: skip
    assert torch.equal(dataset[0, 0]["label"], torch.from_numpy(label).flip(1))
    for wrong in ("", "X", "DD"):
        with pytest.raises(ValueError, match="augment.mirror_axes"):
            AugmentSettings(mirror_axes=wrong)


def test_a_record_without_label_is_named() -> None:
    with pytest.raises(ValueError, match="a: has no label map"):
        CropDataset(Memory(np.zeros((1, 4, 4, 4), np.float32)), [{"id": "a"}], (4, 4, 4), labelled=True)
    with pytest.raises(ValueError, match="no records"):
        CropDataset(Memory(np.zeros((1, 4, 4, 4), np.float32)), [], (4, 4, 4))
    with pytest.raises(ValueError, match="centre, random or midplane"):
        CropDataset(Memory(np.zeros((1, 4, 4, 4), np.float32)), [{"id": "a"}], (4, 4, 4), crop="corner")


# --- channels that are missing


def test_channels_are_dropped_with_their_probability_and_never_all_of_them() -> None:
    settings, source = AugmentSettings(modality_dropout=0.4), generator()
    dropped = [draw_augmentation(settings, source, channels=3).dropped for _ in range(3000)]
    assert max(len(channels) for channels in dropped) == 2
    # All three would be dropped in 0.4^3 of the crops, and each of them stays in a third of these.
    for channel in range(3):
        assert np.mean([channel in channels for channels in dropped]) == pytest.approx(0.4 - 0.4**3 / 3, abs=0.03)
    assert {draw_augmentation(settings, source, channels=1).dropped for _ in range(50)} == {()}


def test_of_the_channels_that_a_scan_has_one_is_kept_and_the_missing_ones_stay_0() -> None:
    volume = np.zeros((4, 4, 4, 4), np.float32)
    volume[[1, 3]] = np.random.default_rng(0).random((2, 4, 4, 4)) + 1
    settings = AugmentSettings(modality_dropout=0.6, noise=0.5)
    dataset = CropDataset(Memory(volume), [{"id": "a"}], (4, 4, 4), augment=settings)
    there = [tuple(dataset[0, epoch]["image"].flatten(1).any(dim=1).tolist()) for epoch in range(200)]
    assert set(there) == {(False, one, False, other) for one, other in ((True, True), (True, False), (False, True))}
    noisy = CropDataset(Memory(volume), [{"id": "a"}], (4, 4, 4), augment=AugmentSettings(noise=0.5))
    assert not noisy[0, 3]["image"][[0, 2]].any() and noisy[0, 3]["image"][[1, 3]].any()


def test_a_dropped_channel_is_zero_and_the_others_are_unchanged() -> None:
    image, noisy = torch.rand(3, 5, 5, 5), Augmentation(noise=0.5, noise_seed=9, gain=1.1)
    before = image.clone()
    found = intensity_transform(image, replace(noisy, dropped=(0, 2)))
    assert not found[0].any() and not found[2].any() and torch.equal(image, before)
    assert torch.equal(found[1], intensity_transform(image, noisy)[1])


def test_without_dropout_no_channel_is_zero(store) -> None:
    opened = Store(store)
    plain, dropped = (
        CropDataset(opened, opened.records, (24,) * 3, crop="random", augment=AugmentSettings(modality_dropout=p))[1, 5]
        for p in (0.0, 0.9)  # of one channel
    )
    assert plain["image"].any() and dropped["image"].any()
    with pytest.raises(ValueError, match="augment.modality_dropout=1"):
        AugmentSettings(modality_dropout=1.0)


# --- crops around labelled voxels


def blobs(seed: int = 0) -> np.ndarray:
    """A label map with classes of very different sizes, and ignored voxels."""
    label = np.random.default_rng(seed).choice([0, 1, 3, IGNORED], (1, 14, 12, 10), p=[0.7, 0.2, 0.02, 0.08])
    label[0, 13, 11, 9] = 7
    return label.astype(np.uint8)


def test_classes_and_their_voxels_are_drawn_with_equal_probabilities() -> None:
    label = blobs()
    foreground, counts = Foreground(label), {}
    for index, value in enumerate([1, 3, 7]):
        places = np.argwhere(label[0] == value)
        for k, place in enumerate(places):  # the slow reference: the k-th voxel in raster order
            found = foreground.draw(label, ((index + 0.5) / 3, (k + 0.5) / len(places)))
            assert found == tuple(place)
        counts[value] = len(places)
    assert counts[1] > 10 * counts[7] == 10 and foreground.classes == [1, 3, 7]
    assert Foreground(np.zeros((1, 4, 4, 4), np.uint8)).draw(label, (0.5, 0.5)) is None
    assert Foreground(np.full((1, 4, 4, 4), IGNORED, np.uint8)).draw(label, (0.5, 0.5)) is None


def test_crops_are_centred_on_labelled_voxels_with_the_given_probability() -> None:
    label = np.zeros((1, 40, 40, 40), np.uint8)
    label[0, 20, 9, 31], label[0, 1, 20, 20], label[0, :2, :2, :2] = 1, 2, IGNORED
    image = np.ones((1, 40, 40, 40), np.float32)
    dataset = CropDataset(Memory(image, label), [{"id": "a"}], (8,) * 3, crop="random", labelled=True, foreground=0.4)
    found = [dataset[0, epoch]["label"][0] for epoch in range(400)]
    middle = [int(crop[4, 4, 4]) == 1 for crop in found]
    edge = [int(crop[1, 4, 4]) == 2 for crop in found]  # as near to the middle as a crop inside the volume can
    assert np.mean(middle) == pytest.approx(0.2, abs=0.05) and np.mean(edge) == pytest.approx(0.2, abs=0.05)
    odd = CropDataset(Memory(image, label), [{"id": "a"}], (7, 9, 5), crop="random", labelled=True, foreground=1.0)
    for epoch in range(20):
        crop = odd[0, epoch]["label"][0]
        assert crop[3, 4, 2] == 1 or crop[1, 4, 2] == 2
    end = np.zeros_like(label)
    end[0, 39, 20, 38] = 1
    last = CropDataset(Memory(image, end), [{"id": "a"}], (8,) * 3, crop="random", labelled=True, foreground=1.0)
    assert all(last[0, epoch]["label"][0, 7, 4, 6] == 1 for epoch in range(5))
    midplane = CropDataset(
        Memory(image, label), [{"id": "a"}], (8,) * 3, crop="midplane", labelled=True, foreground=1.0
    )
    assert {int(midplane[0, epoch]["label"][0, 1, 4, 4]) for epoch in range(20)} == {0, 2}  # w stays in the middle


def test_a_labelled_voxel_stays_at_the_centre_under_rotation() -> None:
    label = np.zeros((1, 60, 60, 60), np.uint8)
    label[0, 28:33, 36:41, 22:27] = 1
    dataset = CropDataset(
        Memory(label.astype(np.float32), label), [{"id": "a"}], (17,) * 3, crop="random", labelled=True, foreground=1.0,
        augment=STRONG,
    )  # fmt: skip
    assert all(dataset[0, epoch]["label"][0, 7:10, 7:10, 7:10].any() for epoch in range(30))


def test_crops_around_labelled_voxels_depend_on_seed_epoch_and_record_alone(store) -> None:
    opened = Store(store)

    def dataset() -> CropDataset:
        return CropDataset(
            opened, opened.records, (24,) * 3, crop="random", labelled=True, foreground=0.5, augment=STRONG, seed=3
        )

    used, plain = dataset(), CropDataset(opened, opened.records, (24,) * 3, crop="random", labelled=True, seed=3)
    whole = [used[1, epoch] for epoch in range(8)]
    for epoch in (7, 2):
        assert torch.equal(dataset()[1, epoch]["image"], whole[epoch]["image"])
    assert used.foregrounds[opened.records[1]["id"]].classes == [1, 2, 3] and not plain.foregrounds
    for wrong in ({"labelled": False}, {"crop": "centre"}, {"foreground": 1.5}):
        with pytest.raises(ValueError, match=r"data\.foreground"):
            CropDataset(
                opened, opened.records, (24,) * 3, **{"crop": "random", "labelled": True, "foreground": 0.5, **wrong}
            )


def test_labels_of_a_store_are_not_opened_to_know_of_them(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(store)
    monkeypatch.setattr(Store, "label", lambda self, id: pytest.fail(f"{id} was opened"))
    assert len(CropDataset(opened, opened.records, (8, 8, 8), labelled=True)) == len(opened)
    entry = {**opened.records[0], "arrays": {"image": ""}}
    with pytest.raises(ValueError, match=f"{entry['id']}: has no label map"):
        CropDataset(opened, [entry], (8, 8, 8), labelled=True)
