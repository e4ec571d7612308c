"""Relative patch location and jigsaw puzzles in 3-D (Taleb et al., NeurIPS 2020).

A volume is divided into 3 x 3 x 3 cells, and a piece is cut from each at a random place inside it, so that no answer
shows in edges that continue from one piece to the next. Either two pieces are shown, that of the cell in the middle and
another, and the question is which cell that is (26 answers); or all pieces in one of some known orders, and the
question is in which.

All pieces of a sample get the position encodings of one and the same box of the volume's token grid. It is drawn from
the sample's seed independently of the answer, so that no encoding tells where a piece comes from, and over the samples
the encoder learns with all the encodings that it meets in fine-tuning.

Letters: image `B C D H W`, P pieces `C d h w` of L tokens each, K answers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.baselines.pieces import cell_corners, cell_size, cut, distant_permutations, other_cells, paste, piece_size
from asa.baselines.puzzle_net import PuzzleNet
from asa.methods.base import Batch
from asa.ops.patches import grid_size


@dataclass(frozen=True)
class Draws:
    """The random draws of a batch, on the CPU."""

    answers: Tensor  # int64 (B,)
    offsets: Tensor  # first voxel of each shown piece inside its cell, int64 (B, P, 3)
    indices: Tensor  # tokens of the volume's grid whose position encodings the pieces get, int64 (B, L)


class PuzzlePretraining(nn.Module):
    """Relative patch location, or jigsaw puzzles. A sample's random draws come from its own seed.

    Args:
        model: the network; its encoder is ASA's.
        permutations: orders of jigsaw puzzles; any two differ in 26 of 27 places or all. None: relative patch location.
        jitter: least number of voxels along each axis by which a piece is smaller than its cell. Pieces have the size
            of whole patches; what is left over is added.

    Raises:
        ValueError: a model that is not for these puzzles, or a setting outside its range.
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
        slack = [n - m + 1 for n, m in zip(cell_size(self.model.encoder.img_size), self.size, strict=True)]
        patches = grid_size(self.size, self.model.encoder.patch_size)
        grid = torch.arange(math.prod(self.model.encoder.grid)).view(1, *self.model.encoder.grid)
        answers, offsets, indices = [], [], []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(seed)
            answers.append(torch.randint(len(self.table), (), generator=generator))
            shifts = [torch.randint(n, (self.table.shape[1],), generator=generator) for n in slack]
            offsets.append(torch.stack(shifts, dim=1))
            room = [n - m + 1 for n, m in zip(grid.shape[1:], patches, strict=True)]
            corner = [int(torch.randint(n, (), generator=generator)) for n in room]
            indices.append(cut(grid, np.array([corner]), patches).flatten())
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
        """The "loss" of a batch with "image" and "seed"; and for the log "accuracy" and "random_guess_loss", that of
        equal probabilities of all answers.
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
