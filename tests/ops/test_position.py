"""Laws of the symmetric position encoding."""

import math

import pytest
import torch

from asa import symmetric_position_encoding
from asa.ops.position import sincos_position_encoding

GRIDS = [(4, 4, 4), (3, 5, 6), (5, 3, 7), (2, 7, 1), (1, 1, 8), (16, 16, 16), (12, 12, 20)]


@pytest.mark.parametrize("grid", GRIDS)
def test_mirrored_positions_share_a_code_and_no_others_do(grid: tuple[int, int, int]) -> None:
    t, h, w = grid
    code = symmetric_position_encoding(grid, 24).reshape(t, h, w, 24)
    assert torch.equal(code, code.flip(2))
    one_side = code[:, :, : (w + 1) // 2].reshape(-1, 24)
    assert len(torch.unique(one_side, dim=0)) == len(one_side)


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 5, 6), (5, 3, 7)])
@pytest.mark.parametrize("convention", ["mirror", "paper"])
def test_the_code_is_equation_3(grid: tuple[int, int, int], convention: str) -> None:
    t_size, h_size, w_size = grid
    dim = 10
    code = symmetric_position_encoding(grid, dim, convention=convention, temperature=1000.0)
    row = 0
    for t in range(t_size):
        for h in range(h_size):
            for w in range(w_size):
                if convention == "paper":
                    place = t_size**2 * t + h_size * h - abs(w_size / 2 - w) + w_size / 2
                else:
                    middle = (w_size - 1) / 2
                    place = h_size * w_size * t + w_size * h + middle - abs(middle - w)
                for i in range(dim // 2):
                    angle = place / 1000.0 ** (2 * i / dim)
                    assert code[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                    assert code[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
                row += 1
    assert code.shape == (row, dim)


def test_the_printed_form_leaves_the_outermost_columns_unpaired() -> None:
    code = symmetric_position_encoding((1, 1, 6), 8, convention="paper")
    assert not torch.equal(code[0], code[5])
    assert torch.equal(code[1], code[5])


@pytest.mark.parametrize("grid", GRIDS)
def test_plain_codes_differ_everywhere(grid: tuple[int, int, int]) -> None:
    code = sincos_position_encoding(grid, 24)
    assert code.shape == (math.prod(grid), 24)
    assert len(torch.unique(code, dim=0)) == len(code)


def test_an_odd_width_and_an_unknown_convention_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        symmetric_position_encoding(4, 7)
    with pytest.raises(ValueError, match="convention"):
        symmetric_position_encoding(4, 8, convention="other")
