"""The segmentation U-Net and its loss."""

import numpy as np
import pytest
import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock

import asa
from asa.losses.segmentation import DeeplySupervisedDiceCE
from asa.methods.segment import Segmentation
from asa.models.kernels import InstanceNorm, PointwiseConv, use_own_kernels
from asa.models.sw_vit import SWViT
from asa.models.unet import SegmentationUNet, unet_base, unet_small, unet_tiny
from asa.models.vit_seg import vit_seg_tiny
from asa.ops.labels import IGNORED


def encoder(**overrides: object) -> SWViT:
    return SWViT(**{**dict(img_size=64, embed_dim=24, depth=4, num_heads=2, window=8), **overrides})


def test_the_paper_size_has_85_million_parameters() -> None:
    with torch.device("meta"):
        model = unet_base(out_channels=4, in_channels=4)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(85e6, rel=0.01)


def test_the_hidden_states_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        assert unet_base(out_channels=2).taps == [2, 4, 6, 8, 11]
        assert unet_small(out_channels=2).taps == [1, 2, 4, 5, 7]  # of 8 blocks, as near to the same parts


def test_deep_supervision_gives_five_scales_and_the_finest_alone_otherwise() -> None:
    model = unet_tiny(3, in_channels=2, img_size=(64, 32, 64)).eval()
    volume = torch.rand(1, 2, 64, 32, 64)
    with torch.no_grad():
        scales = model(volume, deep_supervision=True)
        finest = model(volume)
    assert [tuple(out.shape) for out in scales] == [(1, 3, 64 // 2**k, 32 // 2**k, 64 // 2**k) for k in range(5)]
    assert torch.equal(scales[0], finest)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_any_patch_size_that_is_a_power_of_two_works(patch_size: int) -> None:
    model = SegmentationUNet(encoder(patch_size=patch_size, img_size=(64, 32, 32)), 2, feature_size=4)
    assert model(torch.rand(1, 1, 64, 32, 32)).shape == (1, 2, 64, 32, 32)
    convolutions = [type(module) for module in model.modules() if isinstance(module, UnetBasicBlock | UnetResBlock)]
    assert set(convolutions) == {UnetResBlock}


@pytest.mark.parametrize("factory", [unet_base, unet_small, unet_tiny])
def test_every_parameter_of_every_size_gets_a_gradient(factory) -> None:
    model = factory(3, feature_size=4, img_size=(64, 32, 32), in_channels=2)
    label = torch.randint(0, 3, (1, 1, 64, 32, 32), dtype=torch.uint8)
    DeeplySupervisedDiceCE()(model(torch.rand(1, 2, 64, 32, 32), deep_supervision=True), label).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("size", "said"),
    [(48, "patches of 32: pad it"), (32, r"larger than 32\^3, like crop=64"), ((64, 64, 40), "patches of 32: crop it")],
)
def test_sizes_that_are_not_divisible_by_32_raise_an_error(size, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SegmentationUNet(encoder(img_size=size), 2)


LARGER = [pytest.param(size, marks=pytest.mark.slow) for size in [(64, 64, 32), (96, 64, 32), (64, 32, 64)]]


@pytest.mark.parametrize("size", [(96, 32, 32), *LARGER])
def test_bfloat16_on_a_cpu_is_close_to_float32_at_every_size(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = SegmentationUNet(encoder(img_size=size), 2, feature_size=4)
    volume, label = torch.rand(1, 1, *size), torch.randint(0, 2, (1, 1, *size), dtype=torch.uint8)
    outputs, gradients = [], []
    for enabled in (False, True, True):
        # Fill freed memory with NaN, to detect kernels that read memory that was never written.
        garbage = [torch.full((2**k,), float("nan")) for k in range(8, 22)]
        del garbage
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(volume, deep_supervision=True)
        DeeplySupervisedDiceCE()(logits, label).backward()
        outputs.append(torch.cat([scale.detach().double().flatten() for scale in logits]))
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(outputs[0], outputs[1], dim=0) > 0.99
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98
    assert torch.equal(outputs[1], outputs[2]) and torch.equal(gradients[1], gradients[2])


def test_channels_last_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    norm = InstanceNorm(24).double()
    first = (3 * torch.randn(2, 24, 6, 5, 4, dtype=torch.float64) + 1).requires_grad_()
    last = first.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    weight = torch.randn_like(first)
    mean, var = first.mean((2, 3, 4), keepdim=True), first.var((2, 3, 4), correction=0, keepdim=True)
    for features in (first, last):
        out = norm(features)
        (out * weight).sum().backward()
        torch.testing.assert_close(out, (first - mean) / (var + 1e-5).sqrt())
    assert norm(last).is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(first.grad, last.grad)

    few = torch.randn(2, 3, 2, 2, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    assert torch.autograd.gradcheck(InstanceNorm(3), few.requires_grad_())

    model = SegmentationUNet(encoder(img_size=(64, 32, 32)), 2, feature_size=4).double()
    volume, results = torch.rand(1, 1, 64, 32, 32, dtype=torch.float64), []
    for norm in (InstanceNorm.forward, torch.nn.InstanceNorm3d.forward):
        monkeypatch.setattr(InstanceNorm, "forward", norm)
        results.append(model(volume))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_on_a_cpu_every_norm_and_pointwise_convolution_gives_channels_last(batch: int, channels: int) -> None:
    net, layouts = encoder(img_size=(64, 32, 32), in_channels=channels), []
    model = SegmentationUNet(net, 2, feature_size=4)
    for module in model.modules():
        if isinstance(module, InstanceNorm | PointwiseConv):
            module.register_forward_hook(lambda _, inputs, out: layouts.append(out.stride(1) == 1))
    model(torch.rand(batch, channels, 64, 32, 32))
    assert len(layouts) > 30 and all(layouts)


def test_a_pointwise_convolution_is_a_convolution() -> None:
    torch.manual_seed(0)
    model = SegmentationUNet(encoder(img_size=(64, 32, 32)), 2, feature_size=4).double()
    kernels = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)]
    for module in kernels:
        assert isinstance(module, PointwiseConv) == (module.kernel_size == module.stride == (1, 1, 1))
    head = model.heads[0].conv.conv
    assert head.bias is not None and isinstance(head, PointwiseConv)
    volume, results = torch.randn(2, 4, 6, 5, 4, dtype=torch.float64), []
    for forward in (head, lambda x: torch.nn.functional.conv3d(x, head.weight, head.bias)):
        x = volume.clone().requires_grad_()
        head.zero_grad()
        out = forward(x)
        out.pow(2).sum().backward()
        results.append((out, x.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    torch.testing.assert_close(*results)


def test_kernels_replace_modules_but_not_parameters_and_draw_nothing() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv3d(2, 3, 1),
        torch.nn.InstanceNorm3d(3),
        torch.nn.Conv3d(3, 3, 3),
        torch.nn.Conv3d(3, 1, 1, bias=False),
    )
    before, state = dict(network.named_parameters()), torch.get_rng_state()
    use_own_kernels(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in network] == [PointwiseConv, InstanceNorm, torch.nn.Conv3d, PointwiseConv]
    after = dict(network.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_statistics_of_many_voxels_are_accurate_in_float32() -> None:
    torch.manual_seed(0)
    features = (10 + 2 * torch.randn(1, 3, 64, 64, 64)).contiguous(memory_format=torch.channels_last_3d)
    results = []
    for x in (features.requires_grad_(), features.detach().double().contiguous().requires_grad_()):
        out = InstanceNorm(3)(x)
        (out**3).mean().backward()  # a loss with a gradient in the directions that the norm removes
        results.append((out.detach().double(), x.grad.double()))
    (out, gradient), (true, true_gradient) = results
    assert (out - true).abs().max() < 5e-6  # PyTorch's group norm: 1e-3
    assert (gradient - true_gradient).abs().max() < 1e-5 * true_gradient.abs().max()


def test_the_loss_is_dice_plus_cross_entropy_halved_at_each_scale() -> None:
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 1, 8, 8, 8), dtype=torch.uint8)
    logits = [torch.randn(2, 3, 8 // 2**k, 8 // 2**k, 8 // 2**k) for k in range(3)]
    expected = 0.0
    for k, out in enumerate(logits):
        step = 2**k
        near = slice(step // 2, None, step)  # the voxel nearest to the middle of a coarser one
        target = label[:, 0, near, near, near].long()
        probability = out.softmax(dim=1)
        dice = 0.0
        for c in (1, 2):
            p, t = probability[:, c], (target == c).float()
            for b in range(2):
                dice += (1 - (2 * (p[b] * t[b]).sum() + 1e-5) / (p[b].sum() + t[b].sum() + 1e-5)) / 2
        expected += 0.5**k * (dice / 2 + torch.nn.functional.cross_entropy(out, target))
    torch.testing.assert_close(DeeplySupervisedDiceCE()(logits, label), expected / 1.75)


def test_scales_beyond_the_weighted_ones_change_neither_the_loss_nor_the_other_weights() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 16 // 2**k, 16, 16, requires_grad=True) for k in range(3)]
    label = torch.randint(3, (2, 1, 16, 16, 16))
    found = DeeplySupervisedDiceCE(scales=2)(logits, label)
    torch.testing.assert_close(found, DeeplySupervisedDiceCE()(logits[:2], label))
    found.backward()
    assert not logits[2].grad.any() and logits[1].grad.any()
    with pytest.raises(ValueError, match="method.scales=0"):
        DeeplySupervisedDiceCE(scales=0)


def test_micro_batches_give_the_loss_of_the_whole_batch() -> None:
    logits, label = [torch.randn(4, 3, 8, 8, 8), torch.randn(4, 3, 4, 4, 4)], torch.randint(0, 3, (4, 1, 8, 8, 8))
    loss = DeeplySupervisedDiceCE()
    parts = [loss([out[k : k + 2] for out in logits], label[k : k + 2]) for k in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, loss(logits, label))


def loss_of_counted_voxels(logits: np.ndarray, label: np.ndarray, background_weight: float) -> float:
    """Dice + weighted cross-entropy of a sample's counted voxels, written out: logits (n, K), label (n,)."""
    logits, label = logits[label != IGNORED], label[label != IGNORED]
    if not len(label):
        return 0.0
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    weights = [background_weight if c == 0 else 1.0 for c in label]
    entropy = -sum(w * np.log(p[i, c]) for i, (c, w) in enumerate(zip(label, weights, strict=True))) / sum(weights)
    dice = [
        1 - (2 * p[label == c, c].sum() + 1e-5) / (p[:, c].sum() + (label == c).sum() + 1e-5)
        for c in range(1, p.shape[1])
    ]
    return float(np.mean(dice) + entropy)


def with_ignored(batch: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits at three scales, and a label with ignored voxels."""
    torch.manual_seed(0)
    label = torch.randint(0, 3, (batch, 1, 8, 8, 8), dtype=torch.uint8)
    label[torch.rand(label.shape) < 0.3] = IGNORED
    return [torch.randn(batch, 3, 8 // 2**k, 8 // 2**k, 8 // 2**k) for k in range(3)], label


@pytest.mark.parametrize("background_weight", [1.0, 0.1])
def test_the_loss_with_ignored_voxels_is_that_of_the_other_voxels(background_weight: float) -> None:
    logits, label = with_ignored()
    expected = 0.0
    for k, out in enumerate(logits):
        step = 2**k
        near = slice(step // 2, None, step)
        target = label[:, 0, near, near, near]
        assert (target == IGNORED).any()
        for one, values in zip(out.double().numpy(), target.numpy(), strict=True):
            expected += (
                0.5**k * loss_of_counted_voxels(one.reshape(3, -1).T, values.ravel(), background_weight) / len(out)
            )
    found = DeeplySupervisedDiceCE(background_weight=background_weight)(logits, label)
    assert float(found) == pytest.approx(expected / 1.75, rel=1e-5)


def test_slabs_change_neither_the_loss_nor_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, label = with_ignored()
    leaves = [out.double().requires_grad_() for out in logits]
    loss = DeeplySupervisedDiceCE(background_weight=0.3)
    whole = loss(leaves, label)
    expected = torch.autograd.grad(whole, leaves)
    monkeypatch.setattr("asa.losses.segmentation.SLAB", 700)  # 5 slabs of the finest, some of unequal size
    found = loss(leaves, label)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss(leaves, label), whole)


def test_only_logits_are_kept_for_the_backward_pass_of_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, label = torch.randn(1, 40, 16, 16, 16, requires_grad=True), torch.randint(40, (1, 1, 16, 16, 16))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sizes = []
    for slab in (logits.numel(), logits.numel() // 16):
        monkeypatch.setattr("asa.losses.segmentation.SLAB", slab)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            DeeplySupervisedDiceCE()([logits], label)
        sizes.append(sum(kept.values()) / logits.untyped_storage().nbytes())
    assert sizes[0] > 1.9 and sizes[1] < 1.2


def test_a_background_weight_outside_0_to_1_is_refused() -> None:
    for weight in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"background_weight=.*in \(0, 1\]"):
            DeeplySupervisedDiceCE(background_weight=weight)


def test_of_two_background_weights_the_first_grows_to_the_last_by_the_same_factor_each_step() -> None:
    method = Segmentation(model=vit_seg_tiny(3, img_size=32), background_weight=[0.05, 0.8])
    method.train()
    assert method.loss.background_weight == 0.05
    found = []
    for done in (0, 0.25, 0.5, 0.75, 1):
        method.progress(done)
        found.append(method.loss.background_weight)
    assert found == pytest.approx([0.05 * 16 ** (k / 4) for k in range(5)])
    batch = {"image": torch.rand(1, 1, 32, 32, 32), "label": torch.randint(3, (1, 1, 32, 32, 32))}
    validated = []
    for done in (0.1, 0.9):  # validations are compared, so that they have one loss
        method.train()
        method.progress(done)
        method.eval()
        validated.append(float(method(batch)["loss"]))
    assert validated[0] == validated[1] and method.loss.background_weight == 0.8
    one = Segmentation(model=vit_seg_tiny(3, img_size=32), background_weight=0.3)
    one.progress(0.7)
    assert one.loss.background_weight == pytest.approx(0.3)


@pytest.mark.parametrize("weight", [[0.05], [0.05, 0.1, 1], [0.05, 0], 0])
def test_not_one_or_two_background_weights_are_refused(weight: list[float] | float) -> None:
    with pytest.raises(ValueError, match=r"background_weight=.*in \(0, 1\], or two of them"):
        Segmentation(model=vit_seg_tiny(3, img_size=32), background_weight=weight)


def test_predictions_at_ignored_voxels_change_nothing() -> None:
    logits, label = with_ignored()
    finest = logits[0].requires_grad_()
    loss = DeeplySupervisedDiceCE()
    before = loss(logits, label)
    before.backward()
    ignored = (label == IGNORED).expand_as(finest)
    assert finest.grad is not None
    assert (finest.grad[ignored] == 0).all() and (finest.grad[~ignored] != 0).all()
    other = torch.where(ignored, 50 * torch.randn(finest.shape), finest.detach())
    assert torch.equal(loss([other, *logits[1:]], label), before)


def test_a_sample_with_only_ignored_voxels_adds_nothing() -> None:
    logits, label = with_ignored()
    label[1] = IGNORED
    logits = [out.requires_grad_() for out in logits]
    loss = DeeplySupervisedDiceCE()
    both = loss(logits, label)
    both.backward()
    torch.testing.assert_close(both, loss([out[:1] for out in logits], label[:1]) / 2)
    assert all(out.grad is not None and out.grad.isfinite().all() and not out.grad[1].any() for out in logits)


def test_micro_batches_give_the_loss_of_the_whole_batch_with_ignored_voxels() -> None:
    logits, label = with_ignored(4)
    label[0, :, :5] = IGNORED  # most voxels of this sample are ignored
    loss = DeeplySupervisedDiceCE()
    parts = [loss([out[k : k + 2] for out in logits], label[k : k + 2]) for k in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, loss(logits, label))


def test_every_public_name_can_be_imported() -> None:
    for name in asa.__all__:
        assert getattr(asa, name) is not None
