"""Laws of relative patch location and of jigsaw puzzles."""

import hashlib
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import losses
from torch import Tensor

from asa.baselines.puzzle import (
    CENTRE,
    PuzzlePretraining,
    cell_corners,
    cut,
    distant_permutations,
    other_cells,
    paste,
    piece_size,
)
from asa.baselines.puzzle_net import puzzle_tiny
from asa.cli import finetune, pretrain
from asa.data.loading.crops import sample_seed
from asa.models.masked_autoencoder import asa_tiny

SIZE = (32, 40, 48)  # cells of 10 x 13 x 16 voxels
PIECE = (8, 8, 12)
KINDS = {"rpl": (None, 2, 26), "jigsaw": (40, 27, 40)}


def make(kind: str, **model: object) -> PuzzlePretraining:
    torch.manual_seed(0)
    permutations, pieces, answers = KINDS[kind]
    own: dict = dict(img_size=SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=2, window=8, position="raster")
    method = PuzzlePretraining(
        model=puzzle_tiny(pieces, answers, **own | model), permutations=permutations, jitter=2
    ).double()
    method.model.encoder.position = method.model.encoder.position.double()
    return method


def seeds(count: int) -> Tensor:
    return torch.tensor([sample_seed(k) for k in range(count)])


def batch_of(count: int) -> dict[str, Tensor]:
    image = torch.rand(count, 1, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"image": image, "seed": seeds(count)}


# ------------------------------------------------------------------------------------------ orders and pieces


@pytest.mark.parametrize("count", [2, 100, 702])
def test_the_orders_are_permutations_and_as_far_apart_as_so_many_can_be(count: int) -> None:
    table = distant_permutations(count)
    assert table.shape == (count, 27) and (np.sort(table) == np.arange(27)).all()
    distances = (table[:, None] != table[None]).sum(axis=2)[~np.eye(count, dtype=bool)]
    # Of 28 permutations two have the same element in the first place, so 27 everywhere is impossible.
    assert distances.min() >= 26 and (table[0] == np.arange(27)).all()


def test_the_orders_never_change_as_the_answers_of_a_trained_network_depend_on_them() -> None:
    table = distant_permutations(702).astype(np.uint8)
    assert hashlib.sha256(table.tobytes()).hexdigest().startswith("71e650fa328b7c60")
    assert (distant_permutations(100) == table[np.arange(100) * 702 // 100]).all()


@pytest.mark.parametrize("count", [1, 703, 2.0, True])
def test_other_numbers_of_orders_are_refused(count: object) -> None:
    with pytest.raises(ValueError, match="from 2 to 702"):
        distant_permutations(count)  # type: ignore[arg-type]


def test_relative_patch_location_asks_for_each_cell_but_the_middle_once() -> None:
    table = other_cells()
    assert (table[:, 0] == CENTRE).all() and sorted(table[:, 1]) == [c for c in range(27) if c != CENTRE]


def test_pieces_are_whole_patches_that_fit_their_cells_with_the_jitter() -> None:
    for crop, patch, jitter in product((48, 64, 96, 100, 128), (4, 8), (0, 3, 5)):
        size = piece_size(crop, patch, jitter)[0]
        assert size % patch == 0 and size + jitter <= crop // 3 < size + jitter + patch
    with pytest.raises(ValueError, match="give 40 or more along each axis"):
        piece_size((32, 64, 64), 8, 3)
    assert piece_size(40, 8, 3) == (8, 8, 8)
    with pytest.raises(ValueError, match="method.jitter=-1"):
        piece_size(64, 8, -1)


def test_pasting_what_was_cut_restores_the_volume_where_there_are_pieces() -> None:
    volume, corners = batch_of(1)["image"][0], cell_corners(SIZE)
    pasted = paste(cut(volume, corners, PIECE), corners, volume.shape)
    inside = ~pasted.isnan()
    assert int(inside.sum()) == 27 * math.prod(PIECE) and torch.equal(pasted[inside], volume[inside])


# ------------------------------------------------------------------------------------------ the puzzles


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_names_the_cells_that_the_pieces_come_from(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = make(kind), {}
    compute = method.model.forward
    monkeypatch.setattr(method.model, "forward", lambda *inputs: seen.update(inputs=inputs) or compute(*inputs))
    # Every voxel holds the number of its cell; those at the ends of the axes belong to none.
    image = torch.full((1, *SIZE), -1.0, dtype=torch.float64)
    for z, y, x in product(*map(range, (30, 39, 48))):
        image[0, z, y, x] = 9 * (z // 10) + 3 * (y // 13) + x // 16
    batch = {"image": image.expand(12, -1, -1, -1, -1), "seed": seeds(12)}
    method(batch)
    pieces, answers = seen["inputs"][0], method.draw(batch["seed"]).answers
    assert pieces.shape == (12, len(method.table[0]), 1, *PIECE)
    first = pieces.flatten(2)[:, :, :1]
    assert (pieces.flatten(2) == first).all(), "a piece reaches over the edge of its cell"
    for shown, answer in zip(first[:, :, 0].int().tolist(), answers.tolist(), strict=True):
        expected = [CENTRE, answer + (answer >= CENTRE)] if kind == "rpl" else distant_permutations(40)[answer].tolist()
        assert shown == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_cross_entropy_of_the_answers_and_at_chance_at_first(kind: str) -> None:
    method, batch = make(kind), batch_of(6)
    draws, out = method.draw(batch["seed"]), method(batch)
    logits = method.logits(batch["image"], draws).detach()
    expected = [-float(row.softmax(0)[answer].log()) for row, answer in zip(logits, draws.answers, strict=True)]
    assert float(out["loss"].detach()) == pytest.approx(np.mean(expected), rel=1e-6)
    assert float(out["accuracy"]) == pytest.approx(float((logits.argmax(dim=1) == draws.answers).double().mean()))
    assert float(out["random_guess_loss"]) == pytest.approx(math.log(len(method.table)))
    assert float(out["loss"].detach()) == pytest.approx(math.log(len(method.table)), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_come_from_the_seed_of_the_sample_alone(kind: str) -> None:
    method, batch = make(kind), batch_of(5)
    order = [3, 0, 4]
    some = {key: value[order] for key, value in batch.items()}
    draws, part = method.draw(batch["seed"]), method.draw(some["seed"])
    for name in ("answers", "offsets", "indices"):
        assert torch.equal(getattr(draws, name)[order], getattr(part, name))
    whole, own = method.logits(batch["image"], draws), method.logits(some["image"], part)
    torch.testing.assert_close(whole[order], own)
    assert len(set(draws.indices[:, 0].tolist())) > 1 and draws.offsets.unique(dim=0).shape[0] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_offset_and_place_of_the_encodings_occurs_equally_often(kind: str) -> None:
    method, count = make(kind), 4000
    draws, answers = method.draw(seeds(count)), len(method.table)
    slack = (3, 6, 5)  # of pieces of 8 x 8 x 12 in cells of 10 x 13 x 16
    corner = draws.indices[:, 0]  # of 2 x 2 x 3 tokens in a grid of 8 x 10 x 12
    found = [draws.answers, *draws.offsets[:, 0].T, corner // 120, corner // 12 % 10, corner % 12]
    for values, kinds in zip(found, (answers, *slack, 7, 9, 10), strict=True):
        counts = torch.bincount(values)
        expected = count / kinds
        assert len(counts) == kinds and (counts - expected).abs().max() < 6 * math.sqrt(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_encoding_tells_the_answer(kind: str) -> None:
    method = make(kind)
    flat = torch.full((1, 1, *SIZE), 0.3, dtype=torch.float64)
    draws = method.draw(seeds(1))
    first = method.logits(flat, draws)
    # With pieces that are equal, whatever else the network gets is the same for every answer, to the bit.
    for answer in range(1, len(method.table)):
        other = type(draws)(torch.tensor([answer]), draws.offsets.flip(1), draws.indices)
        assert torch.equal(method.logits(flat, other), first)
    # And where the encodings are taken from does not depend on the answer: 26 answers against 7 places along an axis.
    many = method.draw(seeds(4000))
    half = many.answers < len(method.table) // 2
    depths = many.indices[:, 0] // (10 * 12)  # of a grid of 8 x 10 x 12 tokens
    table = torch.stack([torch.bincount(depths[chosen], minlength=7).double() for chosen in (half, ~half)])
    expected = table.sum(dim=1, keepdim=True) * table.sum(dim=0) / table.sum()
    assert ((table - expected).square() / expected).sum() < 22.5  # chi-square of 6 degrees of freedom, p = 0.001


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_of_one_box_of_encodings_is_what_the_encoder_computes_inside_the_volume(kind: str) -> None:
    """Patches, encodings and blocks are those of fine-tuning: the visible patches of a masked volume."""
    method = make(kind)
    encoder, draws = method.model.encoder, method.draw(seeds(1))
    (t, h, w), (d, y, x) = encoder.grid, PIECE
    start = int(draws.indices[0, 0])
    corner = np.array([[start // (h * w), start // w % h, start % w]]) * 4
    volume = batch_of(1)["image"]
    mask = torch.ones(1, t * h * w, dtype=torch.bool)
    mask[0, draws.indices[0]] = False
    pieces = cut(volume[0], corner, (d, y, x))[None].expand(1, method.model.pieces, -1, -1, -1, -1)
    tokens = encoder(volume, mask).mean(dim=1)
    expected = method.model.head(tokens.repeat(1, method.model.pieces))
    torch.testing.assert_close(method.model(pieces, draws.indices), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    method = make(kind)
    method(batch_of(2))["loss"].backward()
    assert [name for name, weight in method.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_cells_that_differ_are_learnt_and_cells_that_do_not_are_not(kind: str) -> None:
    method = make(kind, embed_dim=12, depth=1, in_channels=5).float()
    method.model.encoder.position = method.model.encoder.position.float()
    whole, generator = torch.zeros(5, *SIZE), torch.Generator().manual_seed(0)
    for z, y, x in cell_corners(SIZE):
        whole[:, z : z + 10, y : y + 13, x : x + 16] = torch.randn(5, 1, 1, 1, generator=generator)
    optimizer, out = torch.optim.Adam(method.parameters(), lr=1e-2), {}
    for step in range(40):
        own = torch.tensor([sample_seed(step, k) for k in range(16)])
        out = method({"image": whole.expand(16, -1, -1, -1, -1), "seed": own})
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert float(out["accuracy"]) > 0.5
    flat = method({"image": torch.zeros(200, 5, *SIZE), "seed": seeds(200)})
    assert float(flat["accuracy"]) < 0.15 and flat["loss"] > 0.95 * flat["random_guess_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_shows_the_pieces_where_they_were_and_where_the_answer_puts_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = make(kind), batch_of(2)
    right = torch.eye(len(method.table))[method.draw(batch["seed"]).answers]
    for logits in (right, right.roll(1, dims=1)):
        monkeypatch.setattr(method, "logits", lambda *_, own=logits: own)
        (figure,) = method.pictures(batch).values()
        inside = ~figure["pieces"].isnan()
        assert torch.equal(figure["pieces"][inside], batch["image"][inside])
        assert bool(figure["error"].any()) == (logits is not right)


def test_other_models_and_puzzles_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="puzzles need model=puzzle_"):
        PuzzlePretraining(model=asa_tiny(img_size=64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="27 pieces and 100 answers, the model is for 2 and 26"):
        PuzzlePretraining(model=puzzle_tiny(2, 26, img_size=64), permutations=100)
    with pytest.raises(ValueError, match="no mirrored patches"):
        puzzle_tiny(2, 26, img_size=64, mirror_patches=True)
    with pytest.raises(ValueError, match="takes 2 pieces"):
        puzzle_tiny(2, 26, img_size=64)(torch.zeros(1, 3, 1, 8, 8, 8), torch.zeros(1, 1, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ the commands

SMALL = ["crop=64", "train.batch_size=2", "train.device=cpu", "optim.warmup=0", "loader.workers=0"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_bit_and_its_encoder_is_fine_tuned(
    kind: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["asa", *arguments])
        assert command.main() == 0, capsys.readouterr().err
        return capsys.readouterr().out

    own = [f"data.store={store}", f"method={kind}", "model=puzzle_tiny", "data.split.validation=1", *SMALL]
    own += ["train.log_every=1", "train.validate_every=2", "optim.schedule=constant"]
    out = run(pretrain, *own, f"out={tmp_path}/whole", "train.steps=4", f"data.labelled_store={store}")
    assert f"of the random guess's {math.log(26 if kind == 'rpl' else 100):.5f}" in out
    for steps in (2, 4):
        run(pretrain, *own, f"out={tmp_path}/parts", f"train.steps={steps}")
    assert (losses(tmp_path / "parts") == losses(tmp_path / "whole")).all()

    tuned = [f"data.store={store}", f"init={tmp_path}/whole", "model=vit_seg_tiny", *SMALL]
    out = run(finetune, *tuned, f"out={tmp_path}/tuned", "model.position=raster", "train.steps=1")
    assert "loaded      56 tensors  56 same shape" in out and "left out     4 tensors" in out
    monkeypatch.setattr("sys.argv", ["asa", *tuned, f"out={tmp_path}/other"])
    assert finetune.main() == 1 and "add model.position=raster" in capsys.readouterr().err
