"""Laws of masked pretraining: decoding a part of the patches, air, several masks, normalised targets."""

import pytest
import torch
from torch import Tensor

from asa.losses.reconstruction import draw_patches, gradient_importance
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.ops.patches import Selection, constant_patches, patchify, random_mask, select_tokens, unpatchify

GRID, SIZE, TOKENS = (4, 4, 4), 16, 64


def make(window: int = 8, **settings: object) -> MaskedPretraining:
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        img_size=SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=2, window=window, decoder_depth=2
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):  # zero at first, so that a gradient may vanish by chance
            torch.nn.init.normal_(weight, std=0.1)
    return MaskedPretraining(model=model, **settings).double()


def volumes(count: int = 2, air: tuple[int, ...] = ()) -> Tensor:
    """Random volumes; sample k has `air[k]` patches of air, at its end."""
    patches = torch.randn(count, TOKENS, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k, n in enumerate(air):
        patches[k, TOKENS - n :] = 0
    return unpatchify(patches, GRID, 4)


def batch_of(image: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    return {"image": image, "seed": torch.tensor(seeds), "air": constant_patches(image, 4)}


def losses(method: MaskedPretraining, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by all parameters in one vector."""
    method.zero_grad()
    loss = method(batch)["loss"]
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in method.parameters()])


def probabilities(p: list[float], count: int) -> list[float]:
    """Inclusion probabilities by their definition: proportional to p, but for those that would exceed 1."""
    certain: set[int] = set()
    while True:
        rest = sum(value for k, value in enumerate(p) if k not in certain)
        chances = [1.0 if k in certain else (count - len(certain)) * p[k] / rest for k in range(len(p))]
        if max(chances) <= 1 + 1e-9:
            return chances
        certain |= {k for k, chance in enumerate(chances) if chance > 1}


@pytest.mark.parametrize("count", [1, 7, 20, 39, 40])
def test_patches_are_drawn_with_probabilities_proportional_to_their_weights(count: int) -> None:
    p = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    p /= p.sum()
    n = 4000
    masked = Selection(torch.arange(100, 140).repeat(n, 1))
    offsets = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    (drawn, valid), shares = draw_patches(masked, p.repeat(n, 1), torch.full((n,), count), offsets)
    assert valid is None and drawn.shape == (n, count)
    assert (drawn.diff(dim=1) > 0).all()  # in raster order, none twice
    expected = torch.tensor(probabilities(p.tolist(), count))
    found = torch.bincount(drawn.flatten() - 100, minlength=40) / n
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2 / n)
    torch.testing.assert_close(shares, (p.float() / expected)[drawn - 100], rtol=1e-5, atol=0)


def test_the_mean_over_draws_of_the_weighted_errors_is_the_whole_loss() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(1, 40, generator=g, dtype=torch.float64) ** 3
    p[0, ::5] = 0
    p /= p.sum()
    errors, n = torch.rand(40, generator=g, dtype=torch.float64), 20000
    offsets = torch.rand(n, generator=g, dtype=torch.float64)
    masked = Selection(torch.arange(40).repeat(n, 1))
    (drawn, _), shares = draw_patches(masked, p.expand(n, -1), torch.full((n,), 10), offsets)
    estimates = (shares * errors[drawn]).sum(dim=1)
    deviation = float(estimates.std())
    assert float(estimates.mean()) == pytest.approx(float((p[0] * errors).sum()), abs=4 * deviation / n**0.5)
    independent = float((errors * p[0]).sum()) ** 2  # of one patch drawn by p, the variance of its error
    independent = float((p[0] * errors**2).sum()) - independent
    assert deviation**2 < independent / 10


def test_patches_without_weight_are_drawn_last_and_weigh_nothing() -> None:
    p = torch.zeros(1, 10, dtype=torch.float64)
    p[0, [2, 7]] = 0.5
    (drawn, _), shares = draw_patches(Selection(torch.arange(10)[None]), p, torch.tensor([5]), torch.tensor([0.3]))
    assert {2, 7} <= set(drawn[0].tolist()) and len(set(drawn[0].tolist())) == 5
    assert [share for k, share in zip(drawn[0].tolist(), shares[0].tolist(), strict=True) if k not in (2, 7)] == [0] * 3
    assert shares.sum() == 1


def test_rows_with_fewer_patches_are_padded() -> None:
    valid = torch.arange(8) < torch.tensor([[8], [5]])
    p = valid.double() / valid.sum(dim=1, keepdim=True)
    masked = Selection(torch.arange(8).repeat(2, 1), valid)
    (drawn, kept), shares = draw_patches(masked, p, torch.tensor([4, 2]), torch.tensor([0.2, 0.9], dtype=torch.float64))
    assert kept is not None and kept.sum(dim=1).tolist() == [4, 2]
    assert drawn[1, :2].max() < 5 and len(set(drawn[1, :2].tolist())) == 2
    torch.testing.assert_close(shares, torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0]]))


@pytest.mark.parametrize("importance", ["orientation", None])
def test_the_mean_over_draws_is_the_whole_loss_and_its_gradient(importance: str | None) -> None:
    # Windows of one token: no prediction depends on which others are decoded.
    whole, part = (make(window=1, importance=importance, decode=decode) for decode in (1.0, 0.25))
    batch, n = batch_of(volumes(1), [3]), 200
    expected = losses(whole, batch)
    mask = part.mask(batch["seed"])
    found = []
    for k in range(n):
        part._draw = lambda seeds, air, u=(k + 0.5) / n: (mask, torch.tensor([u], dtype=torch.float64))
        found.append(torch.cat([value.flatten() for value in losses(part, batch)]))
    samples, target = torch.stack(found), torch.cat([value.flatten() for value in expected])
    error = (samples.mean(dim=0) - target).norm() / target.norm()
    spread = (samples - target).norm(dim=1).mean() / target.norm()
    assert error < spread / 20 and error < 0.02
    assert spread > 0.05  # the draws do differ


@pytest.mark.parametrize(("decode", "count"), [(0.25, 12), (0.29, 14), (0.3, 14), (0.01, 1)])
def test_the_fraction_of_the_masked_patches_that_is_decoded_is_rounded(
    decode: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, seen = make(decode=decode), []
    forward = method.model.forward
    monkeypatch.setattr(
        method.model, "forward", lambda image, **kw: (seen.append(kw["decoded"]), forward(image, **kw))[1]
    )
    method(batch_of(volumes(1), [3]))  # 48 patches are masked
    assert seen[0].indices.shape == (1, count)


def test_scores_are_means_over_masked_patches_beside_the_mean_of_visible_voxels_without_padding() -> None:
    method, image, seeds = make(air="drop", importance=None), volumes(2, air=(10, 37)), [3, 4]
    batch = batch_of(image, seeds)
    mask, patches, scores = method.mask(batch["seed"], batch["air"]), patchify(image, 4), {"model": [], "mean": []}
    for k in range(2):
        shown = ~mask[k] & ~batch["air"][k]
        visible, masked = Selection(shown.nonzero().T), Selection(mask[k].nonzero().T)
        target = patches[k][mask[k]]
        prediction = method.model(image[k : k + 1], visible=visible, decoded=masked)[0].detach()
        scores["model"].append((prediction - target).square().mean())
        scores["mean"].append((patches[k][shown].mean() - target).square().mean())
    found = method(batch)
    assert int(mask[0].sum()) != int(mask[1].sum())  # one of them is padded
    for name, key in (("masked_mse", "model"), ("mean_predictor_mse", "mean"), ("mean_predictor_loss", "mean")):
        assert float(found[name]) == pytest.approx(float(sum(scores[key]) / 2), rel=1e-5)


def test_decoding_all_is_the_loss_of_the_whole_network_to_the_bit() -> None:
    method, batch = make().float(), batch_of(volumes().float(), [3, 4])
    mask = method.mask(batch["seed"])
    expected = method.loss(method.model(batch["image"], mask), batch["image"], mask)
    assert torch.equal(method(batch)["loss"], expected)


@pytest.mark.parametrize("settings", [{"decode": 0.25}, {"air": "drop"}, {"decode": 0.25, "air": "drop", "masks": 2}])
def test_a_sample_has_the_same_loss_in_every_batch(settings: dict) -> None:
    # So the gradient of a global batch does not depend on the number of processes.
    method, image, seeds = make(**settings), volumes(3, air=(10, 0, 37)), [3, 4, 5]
    together = losses(method, batch_of(image, seeds))
    alone = [losses(method, batch_of(image[k : k + 1], seeds[k : k + 1])) for k in range(3)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.stack(parts).mean(dim=0), rtol=1e-6, atol=1e-9)


def test_draws_come_from_the_seed_of_the_sample() -> None:
    method, image = make(decode=0.25), volumes(1)
    first, again, other = (method(batch_of(image, [seed]))["loss"].item() for seed in (3, 3, 4))
    assert first == again != other


def test_every_decoded_prediction_depends_on_visible_voxels_and_on_no_others() -> None:
    method = make(decode=0.25, air="drop")
    image = volumes(1, air=(20,)).requires_grad_()
    batch = batch_of(image.detach(), [3])
    mask, air = method.mask(batch["seed"], batch["air"]), batch["air"]
    masked = select_tokens(mask)
    drawn, _ = draw_patches(masked, torch.ones(masked.indices.shape) / 33, torch.tensor([8]), torch.tensor([0.5]))
    prediction = method.model(image, visible=select_tokens(~mask & ~air), decoded=drawn)
    assert prediction.shape == (1, 8, 64)
    for row in range(8):
        (gradient,) = torch.autograd.grad(prediction[0, row].sum(), image, retain_graph=True)
        seen = patchify(gradient, 4)[0].abs().sum(dim=1)
        assert seen[~mask[0] & ~air[0]].max() > 0 and seen[mask[0] | air[0]].max() == 0


@pytest.mark.parametrize("decode", [1.0, 0.25])
def test_dropping_the_air_of_a_volume_without_air_changes_no_bit(decode: float) -> None:
    batch = batch_of(volumes().float(), [3, 4])
    keep, drop = (losses(make(air=air, decode=decode).float(), batch) for air in ("keep", "drop"))
    assert torch.equal(keep[0], drop[0]) and torch.equal(keep[1], drop[1])


def test_without_air_a_sample_is_the_sequence_of_its_other_patches() -> None:
    # The reference: a network whose volume is one row of the patches that are not air, with their encodings.
    method, image = make(air="drop"), volumes(1, air=(24,))
    batch = batch_of(image, [3])
    mask = method.mask(batch["seed"], batch["air"])
    assert mask.sum() == 30 and not (mask & batch["air"]).any()
    row = MaskedAutoencoder(
        img_size=(4, 4, 160), patch_size=4, embed_dim=24, depth=2, num_heads=2, window=8, decoder_depth=2
    ).double()
    row.load_state_dict(method.model.state_dict())
    row.encoder.position = method.model.encoder.position[:40]
    row.position = row.encoder.position
    visible, masked = select_tokens(~mask & ~batch["air"]), select_tokens(mask)
    prediction = method.model(image, visible=visible, decoded=masked)
    expected = row(unpatchify(patchify(image, 4)[:, :40], (1, 1, 40), 4), mask[:, :40])
    torch.testing.assert_close(prediction, expected, rtol=1e-9, atol=1e-12)


def test_the_mask_covers_the_same_fraction_of_the_patches_that_are_not_air() -> None:
    air = torch.zeros(2, 100, dtype=torch.bool)
    air[0, 60:] = True
    mask = random_mask(2, 100, 0.75, torch.Generator().manual_seed(0), air)
    assert mask.sum(dim=1).tolist() == [45, 75] and not (mask & air).any()
    assert torch.equal(mask[1:], random_mask(2, 100, 0.75, torch.Generator().manual_seed(0))[1:])
    with pytest.raises(ValueError, match="cannot be split"):
        random_mask(1, 4, 0.75, None, torch.tensor([[True, True, True, False]]))


def test_a_volume_of_nothing_but_air_keeps_it() -> None:
    method = make(air="drop")
    result = method(batch_of(volumes(2, air=(64, 30)), [3, 4]))
    assert all(torch.isfinite(value) for value in result.values())
    for kept, dropped in ((1, 0), (2, 62)):  # two patches are enough: one to encode, one to predict
        air = method._air(batch_of(volumes(1, air=(TOKENS - kept,)), [3]))
        assert (0 if air is None else int(air.sum())) == dropped
    with pytest.raises(ValueError, match="PATCH_SIZE"):
        method({"image": volumes(1), "seed": torch.tensor([3])})


def test_patches_are_air_where_each_channel_is_constant() -> None:
    image = torch.zeros(1, 2, 8, 8, 8)
    image[0, 0, :4] = 3.0  # another constant
    image[0, 1, 7, 7, 7] = 1e-6
    assert constant_patches(image, 4)[0].tolist() == [True] * 7 + [False]


def test_several_masks_are_the_mean_of_single_ones() -> None:
    several, single, batch = make(masks=3), make(), batch_of(volumes(), [3, 4])
    masks = several.mask(batch["seed"])
    assert masks.shape == (6, TOKENS) and len({tuple(row) for row in masks.tolist()}) == 6
    assert torch.equal(masks[::3], single.mask(batch["seed"]))  # the first is that of a single mask
    expected = []
    for k in range(3):
        single._draw = lambda seeds, air, k=k: (masks[k::3], torch.zeros(2))
        expected.append(torch.cat([value.flatten() for value in losses(single, batch)]))
    found = torch.cat([value.flatten() for value in losses(several, batch)])
    torch.testing.assert_close(found, torch.stack(expected).mean(dim=0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("importance", ["orientation", None])
def test_normalised_targets_have_mean_0_and_variance_1_and_constant_ones_no_weight(importance: str | None) -> None:
    method, image = make(normalise=True, importance=importance), volumes(1, air=(20,)) * 5 + 2
    batch = batch_of(image, [3])
    mask = method.mask(batch["seed"])
    prediction, patches = method.model(image, mask), patchify(image, 4)
    scores = gradient_importance(image, 4)[0] if importance else torch.ones(TOKENS)
    total = weight = 0.0
    for row, k in enumerate(mask[0].nonzero()[:, 0].tolist()):
        patch = patches[0, k]
        if patch.std() > 0:
            target = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
            total += float(scores[k]) * float((prediction[0, row] - target).square().mean())
            weight += float(scores[k])
    result = method(batch)
    assert float(result["loss"]) == pytest.approx(total / weight, rel=1e-5)
    assert float(result["mean_predictor_loss"]) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "settings", [{"decode": 0.3}, {"normalise": True}, {"air": "drop", "decode": 0.25, "masks": 2}]
)
def test_a_reconstruction_predicts_each_masked_patch_and_keeps_the_others(settings: dict) -> None:
    method, image = make(**settings), volumes(2, air=(11, 30))
    batch = batch_of(image, [3, 4])
    views = method.pictures(batch)["reconstruction"]
    air = batch["air"] if method.drops_air else None
    mask = method.mask(batch["seed"], air)[:: method.masks]
    shown, truth = patchify(views["prediction"], 4), patchify(image.float(), 4)
    assert torch.equal(shown[~mask].float(), truth[~mask])
    assert (shown[mask].float() != truth[mask]).any(dim=1).float().mean() > (0.6 if air is None else 0.99)
    assert torch.equal(patchify(views["masked"], 4).isnan().any(dim=2), mask)
    if settings == {"normalise": True}:
        torch.testing.assert_close(shown[mask].mean(dim=1).float(), truth[mask].mean(dim=1), rtol=0, atol=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"decode": 0},
        {"decode": 1.5},
        {"decode": True},
        {"air": "vacuum"},
        {"masks": 0},
        {"masks": 1.5},
        {"normalise": 1},
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}="):
        make(**settings)


def test_the_decoder_may_be_narrower() -> None:
    model = MaskedAutoencoder(
        img_size=SIZE, patch_size=4, embed_dim=24, depth=1, num_heads=2, window=8, decoder_depth=1, decoder_dim=12
    )
    assert model(torch.rand(1, 1, 16, 16, 16), random_mask(1, TOKENS, 0.75)).shape == (1, 48, 64)
    assert model.decoder[0].attention.num_heads == 1 and model.position.shape == (TOKENS, 12)
    with pytest.raises(ValueError, match="decoder_dim=16 is not a multiple of 12"):
        MaskedAutoencoder(img_size=SIZE, patch_size=4, embed_dim=24, num_heads=2, decoder_dim=16)


@pytest.mark.parametrize("settings", [{}, {"importance": None}, {"normalise": True}, {"air": "drop", "decode": 0.5}])
def test_an_excluded_patch_has_no_weight_and_the_others_have_all_of_it(settings: dict) -> None:
    method, image, seen = make(**settings), volumes(1, air=(10,)), []
    batch = batch_of(image, [3])
    excluded = torch.zeros(1, TOKENS, dtype=torch.bool)
    excluded[0, :20] = True
    original = method.loss.weights
    method.loss.weights = lambda *given: seen.append((given[1], original(*given))) or seen[-1][1]
    free = method(batch)["loss"]
    loss = method(batch | {"excluded": excluded})["loss"]
    (masked, before), (same, weights) = seen
    assert torch.equal(masked, same) and float(weights.sum()) == pytest.approx(1)
    out = excluded[0][masked]
    assert out.any() and before[out].any() and not weights[out].any()
    torch.testing.assert_close(weights[~out], before[~out] / before[~out].sum())  # their weights grow alike
    assert loss != free
    assert torch.equal(method(batch | {"excluded": torch.zeros_like(excluded)})["loss"], free)


def test_a_sample_whose_patches_are_all_excluded_has_no_loss() -> None:
    loss, gradient = losses(make(), batch_of(volumes(1), [3]) | {"excluded": torch.ones(1, TOKENS, dtype=torch.bool)})
    assert loss == 0 and not gradient.any()
