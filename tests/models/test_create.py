"""The public names of `asa.models`: models by name and as values of `model=`."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asa.models
from asa.config import CONFIG_DIR, compose, sized_models
from asa.models import MaskedAutoencoder, create_model, list_models
from asa.models.sw_vit import BASE, SWViT


def test_every_public_name_can_be_imported_and_every_model_made() -> None:
    assert all(getattr(asa.models, name) is not None for name in dir(asa.models))
    for name in list_models():
        needed = {kind: ["out_channels"] for kind in ("unet", "unetr", "vit_seg", "vit_conv", "vit_linear")}
        needed |= {kind: ["out_channels"] for kind in ("nnformer", "transbts", "resenc", "primus")}
        needed |= {"classifier": ["classes"], "regressor": ["mean", "sd"], "puzzle": ["pieces", "answers"]}
        keywords = {keyword: 2 for kind, keywords in needed.items() if f"{kind}_" in name for keyword in keywords}
        with torch.device("meta"):
            assert isinstance(create_model(name, **keywords), torch.nn.Module)


def test_a_model_is_made_by_name_with_its_keywords() -> None:
    model = create_model("asa_tiny", img_size=32, depth=1)
    assert isinstance(model, MaskedAutoencoder) and len(model.encoder.blocks) == 1
    with pytest.raises(ValueError, match="unknown model 'unet_bsae'; did you mean unet_base"):
        create_model("unet_bsae")


@pytest.mark.parametrize(("kind", "others"), [(SWViT, {}), (MaskedAutoencoder, {"decoder_depth": 8})])
def test_without_sizes_a_class_is_the_papers_network(kind: type, others: dict[str, int]) -> None:
    defaults = {name: given.default for name, given in inspect.signature(kind).parameters.items()}
    paper = {**BASE, **others, "patch_size": 8, "mlp_ratio": 4.0, "position": "mirror", "order": "raster"}
    assert defaults == {**defaults, **paper, "bias": "sequence"}


def test_names_are_listed_by_a_pattern() -> None:
    assert list_models("vit_conv_*") == [f"vit_conv_{size}" for size in ("base", "small", "tiny")]
    assert list_models("*") == list_models()


def test_names_are_listed_without_importing_torch() -> None:
    code = "import sys; from asa.models import list_models; print('unet_base' in list_models(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False"]


def test_every_family_has_its_sizes_as_values_of_model() -> None:
    families = {path.stem for path in (CONFIG_DIR / "model" / "family").glob("*.yaml")}
    assert len(families) == 20
    written = dict.fromkeys(("nnformer", "transbts"), ("base", "tiny"))
    sizes = written | {"resenc": ("l", "tiny"), "primus": ("m", "tiny")}
    assert sized_models() == sorted(
        f"{family}_{size}" for family in families for size in sizes.get(family, ("base", "small", "tiny"))
    )
    config = compose("finetune", ["out=x", "model=sa_swin_unet_small"])
    assert config["model"]["_target_"] == "asa.models.sa_swin_unet.sa_swin_unet_small"
    assert list(config["model"])[:2] == ["_target_", "img_size"]


def test_a_users_own_model_file_can_extend_a_size(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [asa_base]\npatch_size: 16\ndepth: 6\n")
    overrides = ["out=x", "data.store=y", "model=mine", "method=mae"]
    model = compose("pretrain", overrides, config_dir=tmp_path)["method"]["model"]
    assert model["_target_"] == "asa.models.masked_autoencoder.asa_base"
    assert (model["patch_size"], model["depth"], model["position"]) == (16, 6, "sincos")
