"""Augmentation against slow, obvious references: what is drawn, where a crop is read, and the order of intensities."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from asa.data.loading import augment
from asa.data.loading.augment import (
    Augmentation,
    AugmentSettings,
    draw_augmentation,
    intensity_transform,
    smooth_field,
    source_size,
    spatial_transform,
)

SIZE = (9, 12, 7)  # odd and even edges
TURN = torch.from_numpy(Rotation.from_euler("XYZ", (17, -24, 9), degrees=True).as_matrix()) / 1.2


def draws(count: int, settings: AugmentSettings, **more: object) -> list[Augmentation]:
    source = torch.Generator().manual_seed(0)
    return [draw_augmentation(settings, source, **more) for _ in range(count)]


def uniform(values: np.ndarray, low: float, high: float) -> None:
    """Check that values lie between two bounds, and that they reach and fill the range evenly."""
    assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high
    np.testing.assert_allclose(
        np.quantile(values, (0.25, 0.5, 0.75)), np.linspace(low, high, 5)[1:4], atol=0.1 * (high - low)
    )


def offsets(size: tuple[int, ...]) -> torch.Tensor:
    """Offset of each voxel of a box from its centre, (D, H, W, 3)."""
    axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def places(drawn: Augmentation) -> torch.Tensor:
    """Where each voxel of a crop of `SIZE` is read, as an offset from the centre of its box, (D, H, W, 3)."""
    at = offsets(SIZE)
    if drawn.displacement is not None:
        at = at + smooth_field(drawn.displacement, SIZE, drawn.spacing).double().movedim(0, -1)
    return at if drawn.matrix is None else at @ drawn.matrix.T


def displaced(**more: object) -> Augmentation:
    settings = AugmentSettings(deform=2.0, deform_probability=1.0)
    (drawn,) = draws(1, settings, size=SIZE, spacing=(2.0, 1.0, 3.0))
    return replace(drawn, **more)


MOVES = pytest.mark.parametrize(
    "drawn", [Augmentation(matrix=TURN), displaced(), displaced(matrix=TURN)], ids=["turned", "deformed", "both"]
)


# ---------------------------------------------------------------------------------------------- what is drawn


def test_rotations_about_each_axis_go_to_both_sides_and_are_uniform() -> None:
    drawn = draws(2000, AugmentSettings(rotation=30, rotation_probability=0.5))
    matrices = torch.stack([one.matrix for one in drawn if one.matrix is not None])
    assert len(matrices) / len(drawn) == pytest.approx(0.5, abs=0.05)
    about_axes = Rotation.from_matrix(matrices.numpy()).as_euler("XYZ", degrees=True).T
    for angles in about_axes:
        uniform(angles, -30, 30)
    np.testing.assert_allclose(np.corrcoef(about_axes), np.eye(3), atol=0.1)


def test_law_a_rotation_is_rigid_in_mm_whatever_the_voxels() -> None:
    settings, spacing = AugmentSettings(rotation=30, rotation_probability=1.0), (3.0, 1.0, 0.5)
    for inside, cube in zip(draws(20, settings, spacing=spacing), draws(20, settings), strict=True):
        in_mm = np.diag(spacing) @ inside.matrix.numpy() @ np.diag(1 / np.array(spacing))
        np.testing.assert_allclose(in_mm, cube.matrix.numpy(), atol=1e-12)
    assert all(torch.equal(one.matrix, other.matrix) for one, other in zip(
        draws(20, settings, spacing=(0.7,) * 3), draws(20, settings), strict=True
    ))  # fmt: skip


def test_zooms_gammas_and_contrasts_are_uniform_in_their_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "CONTRAST_PROBABILITY", 1)
    bounds = [0.5, 3.0]
    settings = AugmentSettings(scale=bounds, scale_probability=1, gamma=bounds, gamma_probability=1, contrast=bounds)
    drawn = draws(1000, settings)
    zooms = [1 / one.matrix[0, 0] for one in drawn]
    for values in (zooms, [one.gamma for one in drawn], [one.contrast for one in drawn]):
        uniform(np.log(values), *np.log(bounds))


def test_gain_noise_blur_and_bias_fill_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "BLUR_PROBABILITY", 1)
    settings = AugmentSettings(brightness=0.3, noise=0.2, blur=[0.5, 2.0], bias_field=0.4)
    drawn = draws(1000, settings, channels=2)
    uniform(np.array([one.gain for one in drawn]), 0.7, 1.3)
    uniform(np.array([one.noise for one in drawn]), 0.0, 0.2)
    uniform(np.array([one.blur[1] for one in drawn]), 0.5, 2.0)
    assert len({one.noise_seed for one in drawn}) == len(drawn)
    fields = [one.bias for one in draws(200, settings, size=(320,) * 3, spacing=(2.0,) * 3)]
    uniform(np.array([float(field.std()) * augment.SPLINE_SD for field in fields if field is not None]), 0.0, 0.4)


def test_each_transform_is_drawn_by_itself_with_its_probability() -> None:
    settings = AugmentSettings(
        rotation=10, rotation_probability=0.3, scale=[2.0, 2.0], scale_probability=0.3,
        gamma=[2.0, 2.0], gamma_probability=0.3, mirror_probability=0.3, mirror_axes="DHW",
        deform=1.0, deform_probability=0.3,
    )  # fmt: skip
    drawn = draws(4000, settings)
    chosen = np.array(
        [
            [
                one.matrix is not None and not torch.equal(one.matrix, one.matrix[0, 0] * torch.eye(3)),
                one.matrix is not None and float(torch.linalg.det(one.matrix)) < 0.5,
                one.gamma == 2.0,
                *(axis in one.mirror for axis in "DHW"),
                one.displacement is not None,
            ]
            for one in drawn
        ]
    )
    np.testing.assert_allclose(chosen.mean(axis=0), 0.3, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(chosen.T), np.eye(7), atol=0.06)


# ---------------------------------------------------------------------------------------------- where a crop is read


@MOVES
def test_a_moved_ramp_is_the_ramp_at_the_moved_places(drawn: Augmentation) -> None:
    """A ramp is what linear interpolation reproduces, so a crop holds the value of the place that it is read from."""
    slope = torch.tensor([[3.0, -2.0, 1.0], [0.5, 1.0, -4.0]], dtype=torch.float64)
    box = (offsets(source_size(SIZE, drawn)) @ slope.T).movedim(-1, 0).float()
    expected = (places(drawn) @ slope.T).movedim(-1, 0).float()
    torch.testing.assert_close(spatial_transform(box, SIZE, drawn), expected, atol=1e-3, rtol=0)


@MOVES
def test_a_moved_label_is_that_of_the_nearest_voxel(drawn: Augmentation) -> None:
    size = source_size(SIZE, drawn)
    box = torch.arange(math.prod(size), dtype=torch.int32).reshape(1, *size)  # every voxel is its own class
    d, h, w = (places(drawn) + (torch.tensor(size) - 1) / 2).round().long().unbind(-1)
    found = spatial_transform(box, SIZE, drawn, label=True)
    assert found.dtype == box.dtype and (found[0] == box[0, d, h, w]).float().mean() > 0.999  # ties by rounding


@MOVES
def test_a_crop_is_mirrored_after_it_is_moved(drawn: Augmentation) -> None:
    box = torch.rand(2, *source_size(SIZE, drawn))
    for axes, dims in (("W", [3]), ("DH", [1, 2])):
        mirrored = spatial_transform(box, SIZE, replace(drawn, mirror=axes))
        assert torch.equal(mirrored, spatial_transform(box, SIZE, drawn).flip(dims))


@MOVES
def test_the_box_has_the_centre_of_the_crop_all_that_is_read_and_little_more(drawn: Augmentation) -> None:
    edges = torch.tensor(source_size(SIZE, drawn))
    assert ((edges - torch.tensor(SIZE)) % 2 == 0).all()
    reach = places(drawn).abs().amax(dim=(0, 1, 2))
    assert (reach <= (edges - 1) / 2).all()
    bound = torch.tensor(SIZE) / 2
    if drawn.displacement is not None:
        bound = bound + drawn.displacement.abs().amax(dim=(1, 2, 3))
    if drawn.matrix is not None:
        bound = drawn.matrix.abs() @ bound.double()
    assert (edges <= 2 * bound + 5).all()


def test_without_a_move_the_box_is_the_crop() -> None:
    assert source_size(SIZE, Augmentation(mirror="W", gamma=2.0)) == SIZE


# ---------------------------------------------------------------------------------------------- intensities


def test_intensities_change_in_the_order_blur_gamma_contrast_bias_gain_noise_dropout() -> None:
    image = torch.rand(3, *SIZE) * torch.tensor([1.0, 5.0, 0.2])[:, None, None, None] - 0.1
    (drawn,) = draws(1, AugmentSettings(bias_field=0.5), size=SIZE)
    drawn = replace(
        drawn, blur=(0.0, 0.7, 0.9), gamma=1.7, contrast=1.4, gain=1.2, noise=0.05, noise_seed=3, dropped=(2,)
    )
    expected = []
    for channel, width in zip(image, drawn.blur, strict=True):
        blurred = gaussian_filter(channel.numpy(), width, mode="nearest", truncate=4) if width else channel.numpy()
        low, high = blurred.min(), blurred.max()
        bent = low + (high - low) * ((blurred - low) / (high - low)) ** 1.7
        expected.append(((bent - bent.mean()) * 1.4 + bent.mean()).clip(bent.min(), bent.max()))
    assert drawn.bias is not None
    wanted = torch.from_numpy(np.stack(expected)) * smooth_field(drawn.bias, SIZE, drawn.spacing).exp() * 1.2
    wanted += 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    wanted[2] = 0
    torch.testing.assert_close(intensity_transform(image, drawn), wanted, atol=2e-4, rtol=0)


def test_law_a_blurred_crop_of_one_value_keeps_it_at_its_faces() -> None:
    (drawn,) = draws(1, AugmentSettings(), size=SIZE)
    image = torch.ones(1, *SIZE)
    torch.testing.assert_close(intensity_transform(image, replace(drawn, blur=(1.0,))), image)
