"""Laws of the symmetric position encoding."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from asa import symmetric_position_encoding
from asa.ops.position import sincos_position_encoding

GRIDS = [(4, 4, 4), (3, 5, 6), (5, 3, 7), (2, 7, 1), (1, 1, 8), (16, 16, 16), (12, 12, 20)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("encode", [symmetric_position_encoding, partial(sincos_position_encoding, symmetric=True)])
def test_mirrored_positions_have_the_same_encoding_and_no_others_do(
    grid: tuple[int, int, int], encode: Callable[..., torch.Tensor]
) -> None:
    t, h, w = grid
    encoding = encode(grid, 24).reshape(t, h, w, 24)
    assert torch.equal(encoding, encoding.flip(2))
    one_side = encoding[:, :, : (w + 1) // 2].reshape(-1, 24)
    assert len(torch.unique(one_side, dim=0)) == len(one_side)


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 5, 6), (5, 3, 7)])
@pytest.mark.parametrize("convention", ["mirror", "paper"])
def test_the_encoding_is_equation_3(grid: tuple[int, int, int], convention: str) -> None:
    t_size, h_size, w_size = grid
    dim = 10
    encoding = symmetric_position_encoding(grid, dim, convention=convention, temperature=1000.0)
    row = 0
    for t in range(t_size):
        for h in range(h_size):
            for w in range(w_size):
                if convention == "paper":
                    position = t_size**2 * t + h_size * h - abs(w_size / 2 - w) + w_size / 2
                else:
                    middle = (w_size - 1) / 2
                    position = h_size * w_size * t + w_size * h + middle - abs(middle - w)
                for i in range(dim // 2):
                    angle = position / 1000.0 ** (2 * i / dim)
                    assert encoding[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                    assert encoding[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
                row += 1
    assert encoding.shape == (row, dim)


def test_the_printed_form_does_not_pair_the_outermost_columns() -> None:
    encoding = symmetric_position_encoding((1, 1, 6), 8, convention="paper")
    assert not torch.equal(encoding[0], encoding[5])
    assert torch.equal(encoding[1], encoding[5])


@pytest.mark.parametrize("grid", GRIDS)
def test_without_its_symmetry_the_code_is_that_of_the_token_number(grid: tuple[int, int, int]) -> None:
    raster, mirror = (symmetric_position_encoding(grid, 24, convention=name) for name in ("raster", "mirror"))
    row = symmetric_position_encoding((1, 1, 2 * math.prod(grid)), 24)[: math.prod(grid)]
    assert torch.equal(raster, row)
    left = (grid[2] + 1) // 2  # the columns where both are the same
    assert torch.equal(raster.reshape(*grid, 24)[:, :, :left], mirror.reshape(*grid, 24)[:, :, :left])


@pytest.mark.parametrize("grid", GRIDS)
def test_the_left_half_of_the_symmetric_code_of_three_axes_is_that_of_the_plain_one(grid: tuple[int, int, int]) -> None:
    left = (grid[2] + 1) // 2
    plain, symmetric = (sincos_position_encoding(grid, 24, symmetric=s).reshape(*grid, 24) for s in (False, True))
    assert torch.equal(plain[:, :, :left], symmetric[:, :, :left])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "encode", [sincos_position_encoding, partial(symmetric_position_encoding, convention="raster")]
)
def test_plain_encodings_all_differ(grid: tuple[int, int, int], encode: Callable[..., torch.Tensor]) -> None:
    encoding = encode(grid, 24)
    assert encoding.shape == (math.prod(grid), 24)
    assert len(torch.unique(encoding, dim=0)) == len(encoding)


def test_an_odd_width_and_an_unknown_convention_raise_an_error() -> None:
    with pytest.raises(ValueError, match="even"):
        symmetric_position_encoding(4, 7)
    with pytest.raises(ValueError, match="convention"):
        symmetric_position_encoding(4, 8, convention="other")
