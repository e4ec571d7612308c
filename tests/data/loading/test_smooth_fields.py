"""Laws of deformations and of bias fields, which are both smooth fields of control points."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from asa.data.loading.augment import (
    KNOTS,
    Augmentation,
    AugmentSettings,
    draw_augmentation,
    intensity_transform,
    sampling_offsets,
    smooth_field,
    source_size,
    spatial_transform,
)
from asa.data.loading.crops import CropDataset

SIZE, SPACING = (24, 40, 70), (1.0, 1.0, 1.0)
DEFORMED = AugmentSettings(deform=3.0, deform_probability=1.0)


def drawn(settings: AugmentSettings, seed: int, size=SIZE, spacing=SPACING) -> Augmentation:
    return draw_augmentation(settings, torch.Generator().manual_seed(seed), 1, size, spacing)


def jacobian(displacement: torch.Tensor) -> torch.Tensor:
    """Determinants of the derivative of `x + displacement(x)`, by central differences."""
    rows = [torch.stack(torch.gradient(component)) for component in displacement]
    return torch.linalg.det((torch.stack(rows) + torch.eye(3)[:, :, None, None, None]).permute(2, 3, 4, 0, 1))


def test_a_smooth_field_is_a_cubic_b_spline_along_each_axis() -> None:
    size, spacing = (5, 40, 70), (2.0, 1.0, 0.9)
    points = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = points.numpy()
    for axis, (n, mm) in enumerate(zip(size, spacing, strict=True), start=1):
        count = expected.shape[axis]
        spline = BSpline(np.arange(-3, count + 1) * KNOTS, np.moveaxis(expected, axis, 0), 3)
        expected = np.moveaxis(spline(np.arange(n) * mm), 0, axis)
    np.testing.assert_allclose(smooth_field(points, size, spacing).numpy(), expected, atol=1e-5)


def test_a_field_of_zero_is_the_identity() -> None:
    still = Augmentation(displacement=torch.zeros(3, 4, 5, 6, dtype=torch.float64))
    box = source_size(SIZE, still)
    volume = torch.rand(2, *box)
    inner = volume[(slice(None), *(slice((b - n) // 2, (b - n) // 2 + n) for b, n in zip(box, SIZE, strict=True)))]
    torch.testing.assert_close(spatial_transform(volume, SIZE, still), inner)
    assert torch.equal(spatial_transform((volume * 9).byte(), SIZE, still, label=True), (inner * 9).byte())


def test_with_a_matrix_both_are_one_interpolation() -> None:
    turn = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.9, 0.2], [0.0, -0.2, 1.1]], dtype=torch.float64)
    still = torch.zeros(3, 4, 5, 6, dtype=torch.float64)
    both, alone = Augmentation(matrix=turn, displacement=still, mirror="W"), Augmentation(matrix=turn, mirror="W")
    assert source_size(SIZE, both) == source_size(SIZE, alone)
    volume = torch.rand(1, *source_size(SIZE, both))
    torch.testing.assert_close(
        spatial_transform(volume, SIZE, both), spatial_transform(volume, SIZE, alone), atol=1e-4, rtol=1e-4
    )


def test_no_amplitude_folds_space() -> None:
    for seed in range(5):
        usual, huge = (drawn(replace(DEFORMED, deform=amplitude), seed, (64, 64, 160)) for amplitude in (3, 1000))
        for each, least in ((usual, 0.1), (huge, 0.0)):
            assert each.displacement is not None
            assert jacobian(smooth_field(each.displacement, (64, 64, 160), SPACING)).min() > least


def test_displacements_have_the_standard_deviation_in_mm_that_was_asked_for() -> None:
    found = []
    for seed in range(40):
        made = drawn(replace(DEFORMED, deform=1.5), seed, (32, 32, 32), (2.0, 1.0, 4.0))
        assert made.displacement is not None
        found.append(smooth_field(made.displacement, (32, 32, 32), (2.0, 1.0, 4.0)))
    mm = torch.stack(found).std(dim=(0, 2, 3, 4)) * torch.tensor([2.0, 1.0, 4.0])
    torch.testing.assert_close(mm, torch.full((3,), 1.5), rtol=0.15, atol=0)


def test_a_deformed_crop_reads_only_its_box_and_label_and_image_move_together() -> None:
    settings = replace(
        DEFORMED, rotation=20, rotation_probability=1, scale=[0.8, 1.2], scale_probability=1, mirror_probability=0.5
    )
    for seed in range(8):
        made = drawn(settings, seed)
        reach = (torch.tensor(source_size(SIZE, made)) - 1) / 2
        assert (sampling_offsets(SIZE, made).abs().amax(dim=(1, 2, 3)) <= reach).all()
    label = np.zeros((1, 60, 60, 90), np.uint8)
    label[:, 15:45, 20:44, 30:60] = 1
    label[:, 24:36, 24:36, 20:70] = 2

    class Memory:
        def image(self, id: str) -> np.ndarray:
            return label.astype(np.float32) * 100

        def label(self, id: str) -> np.ndarray:
            return label

    dataset = CropDataset(Memory(), [{"id": "a"}], SIZE, crop="random", labelled=True, augment=settings)
    for epoch in range(6):
        sample = dataset[0, epoch]
        pure = sample["image"] == sample["image"].round(decimals=-2)  # away from edges, where values are mixed
        assert pure.float().mean() > 0.5
        assert torch.equal(sample["image"][pure] / 100, sample["label"][pure].float())


def test_the_spacing_of_the_record_gives_the_mm() -> None:
    class Memory:
        def image(self, id: str) -> np.ndarray:
            return np.random.default_rng(0).random((1, 48, 48, 48), dtype=np.float32)

        def label(self, id: str) -> None:
            return None

    fine, coarse = ({"id": "a", "chain": {"stored_affine": np.diag([mm, mm, mm, 1]).tolist()}} for mm in (1.0, 2.0))
    crops = [CropDataset(Memory(), [one], (32, 32, 32), augment=DEFORMED)[0]["image"] for one in (fine, coarse)]
    again = CropDataset(Memory(), [{"id": "a"}], (32, 32, 32), augment=DEFORMED)[0]["image"]
    assert torch.equal(crops[0], again) and not torch.equal(crops[0], crops[1])


def test_voxel_sizes_of_a_record_are_those_along_d_h_w() -> None:
    class Memory:
        def image(self, id: str) -> np.ndarray:
            return np.ones((1, *SIZE), np.float32)

        def label(self, id: str) -> None:
            return None

    settings, entry = (
        AugmentSettings(bias_field=0.5),
        {"id": "a", "chain": {"stored_affine": np.diag([1, 2, 4, 1]).tolist()}},
    )
    sample = CropDataset(Memory(), [entry], SIZE, augment=settings)[0]
    made = drawn(settings, sample["seed"], SIZE, (4.0, 2.0, 1.0))
    torch.testing.assert_close(sample["image"], intensity_transform(torch.ones(1, *SIZE), made))


def test_a_bias_field_is_a_smooth_factor_and_keeps_zeros() -> None:
    image = torch.rand(2, *SIZE)
    image[:, :4] = 0
    strengths = []
    for seed in range(30):
        made = drawn(AugmentSettings(bias_field=0.4), seed)
        assert made.bias is not None
        found = intensity_transform(image, made)
        factor = found[:, 4:] / image[:, 4:]
        assert not found[:, :4].any() and (factor > 0).all()
        torch.testing.assert_close(factor[0], factor[1])  # the same in all channels
        assert torch.stack(torch.gradient(factor[0])).abs().max() < 0.1 * factor.max()
        strengths.append(float(made.bias.std()))
    assert min(strengths) < 0.2 * max(strengths)


def test_fields_leave_the_other_draws_unchanged_and_are_off_by_default() -> None:
    settings = AugmentSettings(rotation=10, rotation_probability=1, blur=[0.5, 1], mirror_probability=0.5, noise=0.1)
    more = replace(settings, deform=2.0, deform_probability=1.0, bias_field=0.2)
    for seed in range(20):
        one, other = drawn(settings, seed), drawn(more, seed)
        assert one.displacement is None and one.bias is None and other.displacement is not None
        kept = replace(other, displacement=None, bias=None)
        assert torch.equal(one.matrix, kept.matrix) and replace(one, matrix=None) == replace(kept, matrix=None)
    assert sum(drawn(replace(more, deform_probability=0.3), seed).displacement is None for seed in range(60)) > 25


def test_wrong_settings_are_named() -> None:
    for name in ("deform", "bias_field"):
        with pytest.raises(ValueError, match=f"augment.{name}=-1"):
            AugmentSettings(**{name: -1})
    for name in ("rotation", "deform", "noise", "brightness", "bias_field"):
        for value in (float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"augment.{name}={value}: must be 0 or more, and finite"):
                AugmentSettings(**{name: value})
    with pytest.raises(ValueError, match="augment.deform_probability=2"):
        AugmentSettings(deform_probability=2)
