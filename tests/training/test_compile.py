"""torch.compile takes the networks of pretraining and segmentation as one graph."""

import pytest
import torch
from torch import nn

from asa.methods.pretrain import MaskedPretraining
from asa.methods.segment import Segmentation
from asa.models.masked_autoencoder import asa_tiny
from asa.models.unet import unet_tiny
from asa.models.vit_seg import vit_seg_tiny
from asa.training.device import autocast

SIZE = (96, 32, 32)
METHODS = {
    "asa": lambda **own: MaskedPretraining(model=asa_tiny(img_size=SIZE, **own)),
    "asa_fast": lambda **own: MaskedPretraining(
        model=asa_tiny(img_size=SIZE, **own), decode=0.25, masks=2, normalise=True
    ),
    "unet": lambda **own: Segmentation(model=unet_tiny(out_channels=3, feature_size=4, img_size=SIZE, **own)),
    "vit_seg": lambda **own: Segmentation(model=vit_seg_tiny(out_channels=3, img_size=SIZE, **own)),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_one_graph(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    method: nn.Module = METHODS[name](checkpointing=checkpointing)
    model = method.model
    assert isinstance(model, nn.Module)
    found = []

    def explained(*inputs: object, **named: object) -> object:
        found.append(torch._dynamo.explain(compute)(*inputs, **named))
        return compute(*inputs, **named)

    compute = model.forward
    monkeypatch.setattr(model, "forward", explained)
    batch = {"image": torch.rand(1, 1, *SIZE), "label": torch.randint(3, (1, 1, *SIZE)), "seed": torch.arange(1)}
    with autocast(torch.device("cpu"), torch.bfloat16 if name == "asa" else torch.float32):
        assert method(batch)["loss"].isfinite()
    (only,) = found
    assert (only.graph_count, only.graph_break_count) == (1, 0), only.break_reasons
