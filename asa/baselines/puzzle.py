"""Relative patch location and jigsaw puzzles in 3-D (Taleb et al., NeurIPS 2020).

A volume is divided into 3 x 3 x 3 cells, and a piece is cut from each at a random place inside it, so that no answer
shows in edges that continue from one piece to the next. Either two pieces are shown, that of the cell in the middle and
another, and the question is which cell that is (26 answers); or all pieces in one of some known orders, and the
question is in which.

All pieces of a sample get the position encodings of one and the same box of the volume's token grid. It is drawn from
the sample's seed independently of the answer, so that no encoding tells where a piece comes from, and over the samples
the encoder learns with all the encodings that it meets in fine-tuning.

Letters: volume `C D H W`, 27 cells in raster order (W fastest), P pieces `C d h w` of L tokens each, K answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.baselines.puzzle_net import PuzzleNet
from asa.methods.base import Batch
from asa.ops.patches import grid_size, triple

SIDE = 3  # cells along each axis
CELLS = SIDE**3
PLACES = np.indices((SIDE, SIDE, SIDE)).reshape(3, -1).T  # of the cells, 27 3
CENTRE = CELLS // 2
ORDERS = (CELLS - 1) * CELLS  # of `distant_permutations`


def cell_size(spatial: Sequence[int]) -> tuple[int, int, int]:
    """Size of a cell of a volume in voxels; up to two voxels at the end of an axis belong to no cell."""
    d, h, w = triple(spatial)
    return d // SIDE, h // SIDE, w // SIDE


def piece_size(spatial: Sequence[int], patch_size: int, jitter: int) -> tuple[int, int, int]:
    """Size of the pieces in voxels: as many whole patches as a cell holds with `jitter` voxels to spare on an axis."""
    if type(jitter) is not int or jitter < 0:
        raise ValueError(f"method.jitter={jitter}: must be a whole number of voxels from 0")
    d, h, w = ((n - jitter) // patch_size * patch_size for n in cell_size(spatial))
    if min(d, h, w) <= 0:
        least = -(-SIDE * (patch_size + jitter) // patch_size) * patch_size
        raise ValueError(
            f"crop={list(spatial)}: a third of it holds no patch of {patch_size} voxels with {jitter} to spare: give "
            f"{least} or more along each axis, or a smaller method.jitter"
        )
    return d, h, w


def cell_corners(spatial: Sequence[int]) -> np.ndarray:
    """First voxel of each cell, `(27, 3)` int64."""
    return PLACES * np.array(cell_size(spatial))


def cut(volume: Tensor, starts: np.ndarray, size: Sequence[int]) -> Tensor:
    """Boxes of one size: volume `(C, D, H, W)` and first voxels `(P, 3)` -> `(P, C, d, h, w)`."""
    d, h, w = size
    return torch.stack([volume[:, z : z + d, y : y + h, x : x + w] for z, y, x in starts.tolist()])


def paste(pieces: Tensor, starts: np.ndarray, shape: Sequence[int]) -> Tensor:
    """The reverse of `cut`: a volume `(C, D, H, W)`, NaN outside the pieces."""
    volume = torch.full(tuple(shape), float("nan"), dtype=pieces.dtype, device=pieces.device)
    d, h, w = pieces.shape[2:]
    for piece, (z, y, x) in zip(pieces, starts.tolist(), strict=True):
        volume[:, z : z + d, y : y + h, x : x + w] = piece
    return volume


def distant_permutations(count: int) -> np.ndarray:
    """2 to 702 permutations of the 27 cells, of which any two differ in at least 26 places: int64 `(count, 27)`.

    No set of more than 27 permutations has a larger Hamming distance: two of 28 have the same element in the first
    place. They are maps x -> a x + b of the field of 27 elements: two of them agree where (a - a') x = b' - b, for at
    most one x. An element is a cell's three digits of base 3, the coefficients of a polynomial modulo t^3 + 2 t + 1,
    whose root generates all a. (Noroozi and Favaro, ECCV 2016, search for distant permutations among random ones.)
    Those returned are evenly spaced in the order of a and b; the first is the identity.
    """
    if type(count) is not int or not 2 <= count <= ORDERS:
        raise ValueError(f"method.permutations={count}: must be a whole number from 2 to {ORDERS}")
    times_t = np.array([[0, 1, 0], [1, 0, 1], [2, 0, 0]])  # t^3 = t + 2
    factors = [np.eye(3, dtype=np.int64)]
    while len(factors) < CELLS - 1:
        factors.append(times_t @ factors[-1] % SIDE)
    scaled = PLACES @ np.stack(factors).swapaxes(1, 2)  # 26 27 3: a, x, with the coefficients of t^2, t and 1 last
    maps = (scaled[:, None] + PLACES[:, None]) % SIDE  # 26 27 27 3: a, b, x
    table: np.ndarray = (maps @ np.array([9, 3, 1])).reshape(ORDERS, CELLS)
    return table[np.arange(count) * ORDERS // count]


def other_cells() -> np.ndarray:
    """The cell in the middle with each of the others, `(26, 2)` int64."""
    return np.array([(CENTRE, cell) for cell in range(CELLS) if cell != CENTRE])


@dataclass(frozen=True)
class Draws:
    """The random draws of a batch, on the CPU."""

    answers: Tensor  # int64 (B,)
    offsets: Tensor  # first voxel of each shown piece inside its cell, int64 (B, P, 3)
    indices: Tensor  # tokens of the volume's grid whose position encodings the pieces get, int64 (B, L)


class PuzzlePretraining(nn.Module):
    """Relative patch location, or jigsaw puzzles. A sample's random draws come from its own seed.

    Args:
        model: the network, for as many pieces and answers.
        permutations: orders of jigsaw puzzles; any two differ in 26 of 27 places or all. None: relative patch location.
        jitter: least number of voxels along each axis by which a piece is smaller than its cell. Pieces have the size
            of whole patches; what is left over is added.
    """

    task = "pretraining"
    mirrored = False
    error = ("loss", "random_guess_loss")

    def __init__(self, model: PuzzleNet, *, permutations: int | None = None, jitter: int = 3) -> None:
        super().__init__()
        if not isinstance(model, PuzzleNet):
            raise ValueError(f"puzzles need model=puzzle_..., got {type(model).__name__}")
        table = other_cells() if permutations is None else distant_permutations(permutations)
        if (model.answers, model.pieces) != table.shape:
            raise ValueError(
                f"the puzzles have {table.shape[1]} pieces and {len(table)} answers, the model is for {model.pieces} "
                f"and {model.answers}: method=rpl and method=jigsaw set both"
            )
        encoder = model.encoder
        self.model, self.table = model, table  # K P, the cell of each piece
        self.size = piece_size(encoder.img_size, encoder.patch_size, jitter)
        self.corners = cell_corners(encoder.img_size)

    def draw(self, seeds: Tensor) -> Draws:
        """Draw the puzzles of samples from their seeds `(B,)`."""
        encoder = self.model.encoder
        slack = [n - m + 1 for n, m in zip(cell_size(encoder.img_size), self.size, strict=True)]
        patches = grid_size(self.size, encoder.patch_size)
        room = [n - m + 1 for n, m in zip(encoder.grid, patches, strict=True)]
        tokens = torch.arange(math.prod(encoder.grid)).view(1, *encoder.grid)
        answers, offsets, indices = [], [], []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(seed)
            answers.append(torch.randint(len(self.table), (), generator=generator))
            shifts = [torch.randint(n, (self.table.shape[1],), generator=generator) for n in slack]
            offsets.append(torch.stack(shifts, dim=1))
            corner = [int(torch.randint(n, (), generator=generator)) for n in room]
            indices.append(cut(tokens, np.array([corner]), patches).flatten())
        return Draws(torch.stack(answers), torch.stack(offsets), torch.stack(indices))

    def logits(self, image: Tensor, draws: Draws) -> Tensor:
        """The network's answers `(B, K)` to the puzzles of images `(B, C, D, H, W)`."""
        starts = self.starts(draws.answers, draws.offsets)
        pieces = torch.stack([cut(one, own, self.size) for one, own in zip(image, starts, strict=True)])
        logits: Tensor = self.model(pieces, draws.indices.to(image.device, non_blocking=True))
        return logits

    def starts(self, answers: Tensor, offsets: Tensor) -> np.ndarray:
        """First voxels of the shown pieces `(B, P, 3)`, if the answers `(B,)` are right."""
        return self.corners[self.table[answers.numpy()]] + offsets.numpy()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The "loss" of a batch with "image" `(B, C, D, H, W)` and "seed"; and for the log "accuracy" and
        "random_guess_loss", that of equal probabilities of all answers.
        """
        image, draws = batch["image"], self.draw(batch["seed"])
        logits, answers = self.logits(image, draws).float(), draws.answers.to(image.device, non_blocking=True)
        loss = F.cross_entropy(logits, answers)
        return {
            "loss": loss,
            "random_guess_loss": torch.full_like(loss, math.log(len(self.table))),
            "accuracy": (logits.argmax(dim=1) == answers).float().mean(),
        }

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """The figure "puzzle" of a batch: four volumes `(B, C, D, H, W)`, the last of them `(B, 1, D, H, W)`.

        The image; the shown pieces in their own cells, NaN elsewhere; the same pieces in the cells of the network's
        answer; and the difference of the two.
        """
        image, draws = batch["image"], self.draw(batch["seed"])
        answered = self.logits(image, draws).argmax(dim=1).cpu()
        true, found = (self.starts(answers, draws.offsets) for answers in (draws.answers, answered))
        pieces = [cut(one, own, self.size) for one, own in zip(image, true, strict=True)]
        shown, solved = (
            torch.stack([paste(some, own, image.shape[1:]) for some, own in zip(pieces, starts, strict=True)])
            for starts in (true, found)
        )
        difference = (solved.nan_to_num() - shown.nan_to_num()).abs().mean(dim=1, keepdim=True)
        return {"puzzle": {"input": image, "pieces": shown, "prediction": solved, "error": difference}}
