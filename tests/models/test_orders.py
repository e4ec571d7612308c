"""Laws of windows along all three axes, and of a bias that means an offset on the grid."""

import re

import pytest
import torch
from torch import Tensor

from asa import LinearWindowAttention, MaskedAutoencoder, SWViT, patchify, random_mask
from asa.methods.pretrain import MaskedPretraining
from asa.models.classifier import asa_classifier_tiny
from asa.models.sw_vit import FARTHEST
from asa.models.transfer import Source, other_position, transfer_encoder
from asa.models.unet import unet_tiny
from asa.models.vit_seg import vit_linear_tiny, vit_seg_tiny
from asa.ops.patches import (
    Selection,
    TokenSequence,
    alternating_orders,
    one_hot_coordinates,
    select_tokens,
    token_sequences,
)

SIZE, GRID = (12, 20, 24), (3, 5, 6)  # patches of 4 voxels
BOTH = dict(order="alternating", bias="grid")
KINDS = [{}, {"order": "alternating"}, {"bias": "grid"}, BOTH]


def encoder(**settings: object) -> SWViT:
    torch.manual_seed(0)
    sizes = dict(img_size=SIZE, patch_size=4, embed_dim=12, depth=3, num_heads=2, window=4, position="sincos")
    model = SWViT(**{**sizes, **settings})
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.relative_position_bias)
    return model.double().eval()


def autoencoder(**settings: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    sizes = dict(img_size=SIZE, patch_size=4, embed_dim=12, depth=3, num_heads=2, window=8, decoder_depth=3)
    return MaskedAutoencoder(**{**sizes, **settings}).double().eval()


def volumes(batch: int = 1) -> Tensor:
    return torch.rand(batch, 1, *SIZE, generator=torch.Generator().manual_seed(1)).double()


def reach(model: SWViT, token: int) -> Tensor:
    """The tokens that one token's output depends on, bool (T, H, W)."""
    volume = volumes().requires_grad_()
    output = model(volume)[0, token]
    (gradient,) = torch.autograd.grad(output @ torch.randn_like(output), volume)  # the sum of a layer norm is constant
    return (patchify(gradient, 4)[0].abs().sum(dim=1) > 0).unflatten(0, GRID)


def test_with_alternating_orders_a_token_of_three_blocks_depends_on_patches_in_all_directions() -> None:
    t, h, w = 1, 2, 3
    token = (t * GRID[1] + h) * GRID[2] + w
    raster, alternating = reach(encoder(), token), reach(encoder(order="alternating"), token)
    assert not raster[0].any() and not raster[2].any()  # nothing above or below
    for axis, place in enumerate((t, h, w)):
        others = [n for n in range(3) if n != axis]
        seen = alternating.any(dim=others[1]).any(dim=others[0])
        assert seen[:place].any() and seen[place + 1 :].any()


def test_the_orders_are_permutations_and_each_has_another_axis_fastest() -> None:
    orders = alternating_orders(GRID)
    grid = torch.arange(orders.shape[1]).unflatten(0, GRID)
    assert torch.equal(orders[0], grid.flatten())
    assert all(torch.equal(places.sort().values, grid.flatten()) for places in orders)
    for places, axis in zip(orders, (2, 1, 0), strict=True):
        steps = places.unflatten(0, GRID).diff(dim=axis)
        assert (steps == 1).all()


@pytest.mark.parametrize("settings", KINDS)
def test_the_network_is_the_same_function_whatever_order_the_indices_come_in(settings: dict) -> None:
    model, volume = autoencoder(**settings), volumes(2)
    visible, decoded = (select_tokens(part) for part in (lambda m: (~m, m))(random_mask(2, 90, 0.6)))
    turned = [torch.stack([torch.randperm(part.indices.shape[1]) for _ in range(2)]) for part in (visible, decoded)]
    expected = model(volume, visible=visible, decoded=decoded)
    others = Selection(decoded.indices.gather(1, turned[1]))
    found = model(volume, visible=visible, decoded=others)
    torch.testing.assert_close(found, expected.gather(1, turned[1][:, :, None].expand_as(expected)))
    if settings.get("order") == "alternating":  # in raster order, selections are taken as they come
        tokens = model.encoder.encode(volume, visible)
        shuffled = model.encoder.encode(volume, Selection(visible.indices.gather(1, turned[0])))
        torch.testing.assert_close(shuffled, tokens.gather(1, turned[0][:, :, None].expand_as(tokens)))


def test_raster_order_is_the_published_network_to_the_bit() -> None:
    model, volume, mask = autoencoder(), volumes(2), random_mask(2, 90, 0.6)
    names = [name for name in model.state_dict() if "orders" in name or "coordinates" in name]
    assert names == [] and model.encoder.sequences() == [TokenSequence()]
    visible = select_tokens(~mask)
    tokens = model.encoder.embed(volume, visible.indices)
    for block in model.encoder.blocks:
        tokens = block(tokens)
    assert torch.equal(model.encoder.norm(tokens), model.encoder(volume, mask))


@pytest.mark.parametrize("settings", KINDS)
def test_no_token_attends_to_padding(settings: dict) -> None:
    """Samples of different lengths in one batch are encoded as if each was alone."""
    model, volume = encoder(**settings), volumes(2)
    kept = torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) < torch.tensor([[0.3], [0.7]])
    together = model.encode(volume, select_tokens(kept))
    for k in range(2):
        alone = model.encode(volume[k : k + 1], select_tokens(kept[k : k + 1]))
        torch.testing.assert_close(together[k, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("order", ["raster", "alternating"])
@pytest.mark.parametrize("shift", [0, 4, 7])
def test_windows_of_a_sequence_equal_dense_attention_with_the_offsets_of_the_grid(order: str, shift: int) -> None:
    """Token by token: attend to the tokens of the same window of the sequence, with the bias of the three offsets."""
    torch.manual_seed(shift)
    grid, far = (2, 3, FARTHEST + 4), FARTHEST
    orders = alternating_orders(grid) if order == "alternating" else None
    index = torch.stack([torch.randperm(120)[:37].sort().values for _ in range(2)])
    coordinates = one_hot_coordinates(grid).double()
    layer = LinearWindowAttention(6, 2, window=8, shift=shift, bias="grid").double()
    torch.nn.init.normal_(layer.relative_position_bias)
    tokens = torch.randn(2, 37, 6, dtype=torch.float64, requires_grad=True)
    places = torch.stack([index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]], dim=2)
    for k, sequence in enumerate(token_sequences(index, None, orders, coordinates)):
        found, slow = layer(tokens, sequence), torch.zeros_like(tokens)
        for b in range(2):
            keys = index[b] if orders is None else orders[k][index[b]]
            place = keys.argsort().argsort().tolist()
            q, k_, v = layer.qkv(tokens[b]).chunk(3, dim=1)
            for i in range(37):
                near = [j for j in range(37) if (place[i] - shift) // 8 == (place[j] - shift) // 8]
                for m in range(2):
                    part = slice(3 * m, 3 * m + 3)
                    logits = []
                    for j in near:
                        offsets = [min(max(int(d), -far), far) + far for d in places[b, i] - places[b, j]]
                        bias = sum(layer.relative_position_bias[m, axis, o] for axis, o in enumerate(offsets))
                        logits.append(q[i, part] @ k_[j, part] / 3**0.5 + bias)
                    weights = torch.stack(logits).softmax(dim=0)
                    slow[b, i, part] = sum(weight * v[j, part] for weight, j in zip(weights, near, strict=True))
        slow = layer.proj(slow)
        torch.testing.assert_close(found, slow)
        weight, inputs = torch.randn_like(slow), [tokens, *layer.parameters()]
        for one, other in zip(
            torch.autograd.grad((found * weight).sum(), inputs, retain_graph=True),
            torch.autograd.grad((slow * weight).sum(), inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_the_bias_on_the_grid_is_that_of_an_offset_in_masked_and_dense_sequences_and_in_other_crops() -> None:
    """One window over everything: what two tokens give each other does not depend on which others there are."""
    layer = LinearWindowAttention(6, 2, window=400, bias="grid").double()
    torch.nn.init.normal_(layer.relative_position_bias)

    def bias(grid: tuple[int, int, int], *pair: tuple[int, int, int]) -> Tensor:
        index = torch.tensor([[(t * grid[1] + h) * grid[2] + w for t, h, w in pair]])
        (sequence,) = token_sequences(index, None, None, one_hot_coordinates(grid).double())
        with torch.no_grad():
            layer.qkv.weight.zero_(), layer.qkv.bias.zero_()
            layer.qkv.weight[12:], layer.proj.weight[:] = torch.eye(6), torch.eye(6)
            layer.proj.bias.zero_()
            return layer(torch.eye(len(pair), 6, dtype=torch.float64)[None], sequence)[0, 0]

    expected = bias((3, 5, 6), (1, 1, 1), (2, 3, 0))
    torch.testing.assert_close(bias((3, 5, 6), (0, 2, 3), (1, 4, 2)), expected)
    torch.testing.assert_close(bias((7, 4, 9), (5, 0, 8), (6, 2, 7)), expected)
    assert (bias((7, 4, 9), (6, 2, 7), (5, 0, 8)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("window", "holds"), [(16, True), (8, False)])
def test_orders_commute_with_the_mirror_where_half_a_window_is_made_of_whole_slabs(window: int, holds: bool) -> None:
    """Each order keeps a slab of 8 tokens together here: rows (W), or sagittal or coronal planes of 8 tokens."""
    model = encoder(img_size=(8, 16, 16), window=window, order="alternating", position="mirror_sincos")
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.relative_position_bias)
    patches = model.patch_embed(patchify(torch.rand(1, 1, 8, 16, 16, dtype=torch.float64), 4))

    def run(embedded: Tensor) -> Tensor:
        return model.run(embedded + model.position, model.sequences())

    def mirror(tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, model.grid).flip(3).flatten(1, 3)

    assert ((run(mirror(patches)) - mirror(run(patches))).abs().max() < 1e-9) == holds


@pytest.mark.parametrize("settings", KINDS[1:])
@pytest.mark.parametrize(
    "make", [unet_tiny, vit_seg_tiny, vit_linear_tiny, asa_classifier_tiny], ids=lambda make: make.__name__
)
def test_every_network_on_the_encoder_trains_with_it(make, settings: dict) -> None:
    torch.manual_seed(0)
    model = make(3, img_size=(32, 32, 64), **settings)
    model(torch.rand(1, 1, 32, 32, 64)).square().mean().backward()
    assert [name for name, p in model.encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("settings", KINDS[1:])
def test_pretraining_with_dropped_air_and_parts_of_the_masked_patches_gives_every_parameter_a_gradient(
    settings: dict,
) -> None:
    method = MaskedPretraining(model=autoencoder(**settings).float(), decode=0.5, air="drop", masks=2)
    air = torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) < 0.3
    loss = method({"image": volumes(2).float(), "seed": torch.arange(2), "air": air})["loss"]
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("settings", KINDS[1:])
def test_checkpointing_changes_no_bit(settings: dict) -> None:
    losses = []
    for checkpointing in (False, True):
        model = autoencoder(**settings, checkpointing=checkpointing)
        model(volumes(), random_mask(1, 90, 0.6, torch.Generator().manual_seed(0))).square().mean().backward()
        losses.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))


def test_the_bias_on_the_grid_is_transferred_unchanged_to_another_window_and_crop() -> None:
    source, target = encoder(**BOTH), encoder(**BOTH, window=32, img_size=(16, 16, 40))
    weights = {f"encoder.{name}": tensor for name, tensor in source.state_dict().items()}
    plan = transfer_encoder(Source(weights, 4), target)
    assert {entry.action for entry in plan} == {"loaded"}
    assert all(torch.equal(one, other) for one, other in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(("key", "value"), [("order", "alternating"), ("bias", "grid")])
def test_an_encoder_pretrained_with_another_order_or_bias_is_refused(key: str, value: str) -> None:
    assert other_position({key: value}, {key: value}) is None
    assert re.search(f"pretrained with {key}={value}.*add model.{key}={value}", str(other_position({key: value}, {})))


def test_unknown_orders_and_biases_are_named() -> None:
    with pytest.raises(ValueError, match="order of the tokens must be raster or alternating, got 'hilbert'"):
        encoder(order="hilbert")
    with pytest.raises(ValueError, match="bias must be sequence or grid, got 'none'"):
        encoder(bias="none")
    with pytest.raises(ValueError, match="needs the coordinates"):
        LinearWindowAttention(6, 2, 8, bias="grid")(torch.zeros(1, 4, 6))
