"""Laws of the encoder, the masked autoencoder and its loss."""

import math

import pytest
import torch

import asa
from asa import AttentiveReconstructionLoss, MaskedAutoencoder, SWViT, gradient_importance, patchify, random_mask
from asa.methods.pretrain import MaskedPretraining


def small_autoencoder(**overrides: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, window=8, decoder_depth=2)
    return MaskedAutoencoder(**{**sizes, **overrides})


def test_the_paper_size_has_36_million_parameters() -> None:
    assert sum(p.numel() for p in asa.asa_base().parameters()) == pytest.approx(36.0e6, rel=0.005)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("position", ["mirror", "paper", "sincos", "mirror_sincos"])
def test_every_masked_prediction_depends_on_visible_voxels_and_on_no_others(ratio: float, position: str) -> None:
    model = small_autoencoder(position=position).double()
    mask = random_mask(1, 64, ratio, torch.Generator().manual_seed(3))
    volume = torch.rand(1, 1, 16, 16, 16, dtype=torch.float64, requires_grad=True)
    prediction = model(volume, mask)
    visible = ~mask[0]
    for row in range(prediction.shape[1]):
        (gradient,) = torch.autograd.grad(prediction[0, row].sum(), volume, retain_graph=True)
        per_patch = patchify(gradient, 4)[0].abs().sum(dim=1)
        assert per_patch[visible].max() > 0
        assert per_patch[~visible].max() == 0


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 0.95])
def test_with_the_papers_windows_every_masked_prediction_depends_on_visible_voxels(ratio: float) -> None:
    # Eight decoder blocks of windows of 32 reach 128 tokens to either side.
    model = MaskedAutoencoder(img_size=64, embed_dim=24, depth=2, num_heads=2, window=32, decoder_depth=8)
    mask = random_mask(1, 512, ratio, torch.Generator().manual_seed(0))
    volume = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        before, after = model(volume, mask), model(1 - volume, mask)
    assert ((before - after).abs().amax(dim=2) > 1e-6).all()


def test_targets_of_visible_patches_and_voxels_of_masked_ones_have_no_effect() -> None:
    model = small_autoencoder()
    volume, mask = torch.rand(2, 1, 16, 16, 16), random_mask(2, 64, 0.75)
    prediction = model(volume, mask)
    hidden = mask[:, :, None].expand(-1, -1, 64)
    noise = torch.rand(2, 64, 64)
    other_masked = asa.unpatchify(torch.where(hidden, noise, patchify(volume, 4)), (4, 4, 4), 4)
    assert torch.equal(model(other_masked, mask), prediction)
    plain = AttentiveReconstructionLoss(patch_size=4, importance=None)
    other_visible = asa.unpatchify(torch.where(hidden, patchify(volume, 4), noise), (4, 4, 4), 4)
    torch.testing.assert_close(plain(prediction, other_visible, mask), plain(prediction, volume, mask))


def test_mirrored_masked_positions_get_different_predictions() -> None:
    # The encodings of (t, h, w) and (t, h, W-1-w) are equal: only the relative position bias distinguishes the sides.
    model = small_autoencoder()
    mask = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    mask[:, ::2, ::2, 1] = False
    prediction = torch.zeros(1, 64, 64)
    flat = mask.flatten(1)
    with torch.no_grad():
        prediction[flat] = model(torch.rand(1, 1, 16, 16, 16), flat)[0]
    grid = prediction.reshape(4, 4, 4, 64)
    assert (grid[..., 0, :] - grid[..., 3, :]).abs().amax(dim=-1).min() > 1e-5


@pytest.mark.parametrize(
    ("position", "holds"),
    [("mirror", True), ("mirror_sincos", True), ("raster", False), ("sincos", False)],
)
def test_mirroring_embedded_patches_in_their_rows_mirrors_the_output(position: str, holds: bool) -> None:
    torch.manual_seed(0)
    # Windows of two whole rows; half a window is one row, so shifted windows hold whole rows too.
    encoder = SWViT(
        img_size=(8, 16, 24), patch_size=4, embed_dim=24, depth=3, num_heads=2, window=12, position=position
    )
    encoder = encoder.double()
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attention.relative_position_bias)
    patches = encoder.patch_embed(patchify(torch.rand(1, 1, 8, 16, 24, dtype=torch.float64), 4))

    def run(embedded: torch.Tensor) -> torch.Tensor:
        tokens = embedded + encoder.position
        for block in encoder.blocks:
            tokens = block(tokens)
        return encoder.norm(tokens)

    def mirror(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(1, encoder.grid).flip(3).flatten(1, 3)

    difference = (run(mirror(patches)) - mirror(run(patches))).abs().max()
    assert (difference < 1e-9) == holds


def test_the_decoder_shifts_its_windows_too() -> None:
    assert [block.attention.shift for block in asa.asa_base().decoder] == [0, 16] * 4


@pytest.mark.parametrize("factory", [asa.asa_base, asa.asa_small, asa.asa_tiny])
@pytest.mark.parametrize("position", ["mirror", "sincos"])
def test_every_parameter_of_every_size_gets_a_gradient(factory, position: str) -> None:
    model = factory(img_size=32, position=position, in_channels=2)
    volume, mask = torch.rand(1, 2, 32, 32, 32), random_mask(1, 64, 0.75)
    AttentiveReconstructionLoss()(model(volume, mask), volume, mask).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_linear_maps_begin_with_xavier_weights_and_what_is_added_to_tokens_near_0() -> None:
    torch.manual_seed(0)
    model = asa.asa_tiny(img_size=32, window=64)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 6 * 4 + 3
    for linear in linears:
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.97 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
        assert float(linear.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for added in (model.mask_token, *(block.attention.relative_position_bias for block in model.encoder.blocks)):
        assert float(added.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_a_block_is_attention_and_an_mlp_of_normalised_tokens_each_added_to_its_input() -> None:
    torch.manual_seed(0)
    encoder, tokens = SWViT(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2), torch.randn(2, 9, 24)
    block = encoder.blocks[0]
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    middle = tokens + block.attention(block.norm1(tokens))
    first, _, second = block.mlp
    expected = middle + second(torch.nn.functional.gelu(first(block.norm2(middle))))
    torch.testing.assert_close(block(tokens), expected)


@pytest.mark.parametrize("order", ["raster", "alternating"])
def test_the_last_hidden_state_is_the_output_and_the_others_are_those_of_the_blocks(order: str) -> None:
    torch.manual_seed(0)
    encoder = SWViT(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2, window=8, order=order)
    torch.nn.init.normal_(encoder.norm.weight)
    volume = torch.rand(2, 1, 16, 16, 16)
    states = encoder.hidden_states(volume)
    assert torch.equal(states[-1], encoder(volume))
    tokens, sequences = encoder.embed(volume), encoder.sequences()
    for k, (block, state) in enumerate(zip(encoder.blocks, states, strict=True)):
        tokens = block(tokens, sequences[k % len(sequences)])
        assert torch.equal(state, tokens if k < 3 else encoder.norm(tokens))


def test_the_decoder_takes_encoded_and_mask_tokens_in_raster_order_with_their_encodings() -> None:
    model, volume, mask = small_autoencoder(), torch.rand(1, 1, 16, 16, 16), random_mask(1, 64, 0.75)
    torch.nn.init.normal_(model.norm.weight)
    encoded = iter(model.projection(model.encoder(volume, mask))[0])
    tokens = torch.stack([model.mask_token if masked else next(encoded) for masked in mask[0]])[None] + model.position
    for block in model.decoder:
        tokens = block(tokens)
    torch.testing.assert_close(model(volume, mask), model.head(model.norm(tokens[mask]))[None])


def test_visible_tokens_are_in_raster_order() -> None:
    encoder = SWViT(img_size=16, patch_size=4, embed_dim=12, depth=0, num_heads=2)
    volume, mask = torch.rand(2, 1, 16, 16, 16), random_mask(2, 64, 0.75)
    tokens = encoder(volume)
    seen = encoder(volume, mask)
    for b in range(2):
        torch.testing.assert_close(seen[b], tokens[b][~mask[b]])


@pytest.mark.parametrize("importance", ["orientation", "magnitude"])
def test_the_attentive_loss_is_equations_1_and_2(importance: str) -> None:
    volume, mask = torch.rand(2, 1, 16, 16, 16), random_mask(2, 64, 0.75)
    prediction = torch.rand(2, 48, 64)
    target, scores = patchify(volume, 4), gradient_importance(volume, 4, 9, importance)
    total = 0.0
    for b in range(2):
        masked = [i for i in range(64) if mask[b, i]]
        p = [scores[b, i].item() / sum(scores[b, j].item() for j in masked) for i in masked]
        assert sum(p) == pytest.approx(1.0)
        errors = [(prediction[b, n] - target[b, i]).square().mean().item() for n, i in enumerate(masked)]
        total += sum(weight * error for weight, error in zip(p, errors, strict=True)) / 2
    loss = AttentiveReconstructionLoss(patch_size=4, importance=importance)
    assert loss(prediction, volume, mask).item() == pytest.approx(total, rel=1e-5)


def test_the_weights_sum_to_1_over_the_masked_patches() -> None:
    volume, mask = torch.rand(3, 1, 16, 16, 16), random_mask(3, 64, 0.6)
    _, masked = asa.ops.patches.split_indices(mask)
    weights = AttentiveReconstructionLoss(patch_size=4).weights(volume, masked)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert weights.std() > 0


def test_equal_scores_give_the_plain_error() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16, 16)  # one direction in every patch: all scores 1 / b^2
    flat = torch.full((1, 1, 16, 16, 16), 0.3)  # every score 0
    mask = random_mask(1, 64, 0.75)
    prediction = torch.rand(1, 48, 64)
    for volume in (ramp, flat):
        plain = AttentiveReconstructionLoss(patch_size=4, importance=None)(prediction, volume, mask)
        attentive = AttentiveReconstructionLoss(patch_size=4)(prediction, volume, mask)
        expected = (prediction[0] - patchify(volume, 4)[0][mask[0]]).square().mean()
        torch.testing.assert_close(plain, expected)
        torch.testing.assert_close(attentive, expected)


def test_pretraining_on_one_volume_beats_predicting_the_mean() -> None:
    torch.manual_seed(0)
    method = MaskedPretraining(model=small_autoencoder(embed_dim=48, depth=2))
    z, y, x = torch.meshgrid(*[torch.linspace(-2, 2, 16)] * 3, indexing="ij")
    batch = {"image": (torch.sin(2 * z) + torch.cos(3 * y) * x)[None, None], "seed": torch.tensor([4])}
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(150):
        result = method(batch)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    assert result["masked_mse"] < 0.1 * result["mean_predictor_mse"]
    assert result["loss"] < 0.1 * result["mean_predictor_loss"]


def test_the_mean_predictor_is_weighted_like_the_loss() -> None:
    torch.manual_seed(0)
    image, seed = torch.rand(2, 1, 16, 16, 16), torch.tensor([4, 5])
    image[..., 8:] = 0.25  # constant: weight 0
    for importance in ("orientation", None):
        method = MaskedPretraining(model=small_autoencoder(embed_dim=48, depth=2), importance=importance)
        result, mask, expected = method({"image": image, "seed": seed}), method.mask(seed), []
        patches = patchify(image, method.loss.patch_size)
        scores = gradient_importance(image, method.loss.patch_size)
        for b in range(2):
            visible = patches[b, ~mask[b]].mean()
            errors = [float((patches[b, k] - visible).square().mean()) for k in mask[b].nonzero()[:, 0]]
            weights = scores[b, mask[b]] if importance else torch.ones(len(errors))
            expected.append(sum(w * e for w, e in zip((weights / weights.sum()).tolist(), errors, strict=True)))
        assert float(result["mean_predictor_loss"]) == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert result["loss"].item() == pytest.approx(result["masked_mse"].item(), rel=1e-6)


def test_a_mask_depends_on_the_seed_of_its_sample_only() -> None:
    method = MaskedPretraining(model=small_autoencoder())
    together, alone = method.mask(torch.tensor([7, 8])), method.mask(torch.tensor([8]))
    assert torch.equal(together[1:], alone) and not torch.equal(together[0], together[1])
    assert together.sum(dim=1).tolist() == [48, 48]


def test_a_reconstruction_keeps_the_visible_patches() -> None:
    method = MaskedPretraining(model=small_autoencoder())
    volume, mask = torch.rand(1, 1, 16, 16, 16), random_mask(1, 64, 0.75)
    views = method.reconstruct(volume, mask)
    seen = ~mask[0]
    for name in ("masked", "prediction"):
        assert torch.equal(patchify(views[name], 4)[0][seen], patchify(volume, 4)[0][seen])
    assert patchify(views["masked"], 4)[0][~seen].isnan().all()
    assert all(view.shape == volume.shape for view in views.values())


def test_wrong_sizes_raise_an_error_that_says_what_to_do() -> None:
    model = small_autoencoder()
    with pytest.raises(ValueError, match="crop the volume or build the network"):
        model(torch.rand(1, 1, 16, 16, 20), random_mask(1, 64, 0.75))
    with pytest.raises(ValueError, match="the mask must be"):
        model(torch.rand(1, 1, 16, 16, 16), random_mask(1, 63, 0.75))
    for masks in (0, 3):  # not a whole number of masks for each of two volumes
        with pytest.raises(ValueError, match=r"= \(2, 64\), got "):
            model(torch.rand(2, 1, 16, 16, 16), random_mask(4, 64, 0.75)[:masks])
    with pytest.raises(ValueError, match="prediction of the masked patches"):
        AttentiveReconstructionLoss(patch_size=4)(
            torch.zeros(1, 3, 64), torch.rand(1, 1, 16, 16, 16), random_mask(1, 64, 0.75)
        )
    with pytest.raises(ValueError, match="position must be"):
        SWViT(img_size=16, position="learned")


def test_the_decoders_of_the_sizes_are_shorter_than_their_encoders_and_have_heads_as_wide() -> None:
    with torch.device("meta"):
        sizes = [asa.asa_base(), asa.asa_small(), asa.asa_tiny()]
        narrow = asa.asa_tiny(embed_dim=48, num_heads=4, decoder_dim=24)
    assert [len(model.decoder) for model in sizes] == [8, 4, 2]
    assert all(len(model.decoder) < len(model.encoder.blocks) for model in sizes)
    assert {block.attention.num_heads for block in narrow.encoder.blocks} == {4}
    assert {block.attention.num_heads for block in narrow.decoder} == {2}
