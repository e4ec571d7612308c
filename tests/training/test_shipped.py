"""The encoders that the package brings: whole, small, loaded offline, and better than first weights."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.linear_model import RidgeCV
from torch import nn

import asa
from asa.cli import finetune
from asa.data.io.files import check_digest
from asa.data.phantom import reader as phantom
from asa.data.phantom.anatomy import STRUCTURES
from asa.data.preprocessing.cohort import CohortSettings, prepare_cohort
from asa.data.store import Store
from asa.models.sa_swin_unet import sa_swin_unet_tiny
from asa.models.sw_vit import sw_vit_tiny
from asa.models.unet import unet_tiny
from asa.models.vit_seg import vit_conv_tiny, vit_seg_base
from asa.ops.patches import patchify
from asa.tasks.checks import follow_init
from asa.training.checkpoint import load_encoder, load_model
from asa.training.checkpoint_files import SHIPPED, find_weights, shipped
from asa.training.pretrained import fitting_shipped, load_pretrained, read_source

NAMES = shipped()
SIZE = (112, 144, 128)
TINY = dict(order="alternating", bias="grid", position="mirror_sincos", mirror_patches=True)
NETWORK = dict(patch_size=8, decoder_depth=1, window=32)  # what else its pretraining was given


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_encoder_is_small_whole_and_says_what_it_is(name: str) -> None:
    folder = SHIPPED / name
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["README.md", "config.json", "digests.json", "model.safetensors", "training_subjects.json"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    for file in files:
        check_digest(folder / file)
    card = (folder / "README.md").read_text()
    assert f"asa-finetune init=asa://{name} ..." in card and "license: cc0-1.0" in card and "hf://" not in card
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_encoder_is_loaded_by_its_name_in_float32_at_any_size(name: str) -> None:
    encoder = load_encoder(f"asa://{name}", img_size=(32, 32, 64))
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert encoder(torch.rand(1, 1, 32, 32, 64)).shape == (1, 4 * 4 * 8, 96)
    assert find_weights(Path(f"asa://{name}")) == SHIPPED / name / "model.safetensors"  # a Path has one slash
    assert isinstance(load_model(f"asa://{name}"), asa.MaskedAutoencoder)


@pytest.mark.parametrize("name", ["asa://other", "asa://../encoders/tiny-t1", "asa://"])
def test_a_name_that_is_not_in_the_package_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"not in this package; it has asa://tiny-t1"):
        find_weights(name)


def test_an_encoder_is_named_for_a_network_that_it_fits_and_for_no_other() -> None:
    fits = vit_conv_tiny(3, img_size=(32, 32, 64), window=8, **TINY)
    assert fitting_shipped(fits, TINY) == ["asa://tiny-t1"]
    assert fitting_shipped(vit_conv_tiny(3, img_size=(32, 32, 64)), {}) == []  # the paper's encoding and order
    assert fitting_shipped(vit_seg_base(3, img_size=32, **TINY), TINY) == []


@pytest.mark.parametrize(
    "others", [["model=unet_small"], ["model=unet_tiny"], ["model=unet_small", "model.position=mirror_sincos"]]
)
def test_a_refusal_of_an_encoder_holds_all_that_the_command_needs_to_run(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[str]
) -> None:
    given = [f"data.store={store}", f"out={tmp_path}/run", "init=asa://tiny-t1", "crop=64", *others]
    said = []
    for further in (["plan=only", "plan_rate=1"], []):
        assert finetune.main([*given, *further]) == 1
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]  # a plan checks it, too
    needed = re.findall(r"\bmodel(?:\.\w+)?=\w+(?=[ ,]|$)", said[0])
    assert finetune.main([*given, *needed, "plan=only", "plan_rate=1"]) == 0
    assert finetune.main([*given, *needed, "transfer=explain"]) == 0
    assert "the transfer is possible" in capsys.readouterr().out
    assert finetune.main([*given, "transfer=explain"]) == 0  # it lists the tensors of one that is refused, too
    explained = capsys.readouterr().out
    assert "encoder.patch_embed.weight" in explained and said[0].partition("error: ")[2].strip() in explained


FOLLOWED = {f"++model.{key}": value for key, value in TINY.items()}


@pytest.mark.parametrize(
    ("command", "given", "followed"),
    [
        ("finetune", ["init=asa://tiny-t1"], {"model": "unet_tiny", **FOLLOWED}),
        ("finetune", ["init='asa://tiny-t1'", "method=regress"], {"model": "asa_regressor_tiny", **FOLLOWED}),
        (
            "finetune",
            ["init=asa://tiny-t1", "model.order=raster", "+model.bias=sequence"],  # what is given stays
            {"model": "unet_tiny", **{key: FOLLOWED[key] for key in ("++model.position", "++model.mirror_patches")}},
        ),
        (
            "pretrain",  # the same network, whole
            ["init=asa://tiny-t1"],
            {"model": "asa_tiny", **FOLLOWED} | {f"++model.{k}": v for k, v in NETWORK.items()},
        ),
        ("pretrain", ["init=asa://tiny-t1", "method=sa_swin"], {}),
        ("finetune", ["init=asa://tiny-t1", "method=restore"], {}),
        ("finetune", ["init=asa://tiny-t1", "model=unet_small"], {}),
        ("finetune", ["init=asa://tiny-t1", "experiment=aseg"], {}),
        ("finetune", ["init=asa://other"], {}),
        ("finetune", ["init=null"], {}),
        ("finetune", ["init=hf://nobody/nothing", "plan=only"], {}),  # not fetched
        ("finetune", ["init=[asa://tiny-t1"], {}),
        ("predict", ["init=asa://tiny-t1"], {}),
    ],
)
def test_a_network_that_is_not_given_follows_the_encoder(
    command: str, given: list[str], followed: dict[str, object]
) -> None:
    assert follow_init(command, given) == followed


def test_a_network_of_another_package_is_not_followed(tmp_path: Path) -> None:
    model = {"_target_": "mine.nets.unet_tiny", "depth": 2}
    save_file({}, tmp_path / "model.safetensors", {"asa": json.dumps({"model": model})})
    assert follow_init("finetune", [f"init={tmp_path}"]) == {}
    model["_target_"] = "asa.models.sa_swin.sa_swin_base"
    model |= {"img_size": [32, 32, 32], "in_channels": 2, "norm": "post", "position": True, "self_attention": None}
    save_file({}, tmp_path / "model.safetensors", {"asa": json.dumps({"model": model})})
    as_trained = {"++model.depth": 2, "++model.norm": "post", "++model.position": True}
    assert follow_init("finetune", [f"init={tmp_path}"]) == {"model": "sa_swin_unet_base", **as_trained}
    model |= {"norm": "${oc.env:HOME}", "position": {"_target_": "asa.models.unet.unet_tiny"}, "depth": [2]}
    save_file({}, tmp_path / "model.safetensors", {"asa": json.dumps({"model": model})})
    assert follow_init("finetune", [f"init={tmp_path}"]) == {"model": "sa_swin_unet_base"}  # words and numbers only
    save_file({}, tmp_path / "model.safetensors")
    assert follow_init("finetune", [f"init={tmp_path}"]) == {}


def test_a_command_follows_its_encoder_and_says_so(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [f"data.store={store}", "init=asa://tiny-t1", "crop=64"]
    line = "as the encoder in init= was trained: model=unet_tiny model."
    assert finetune.main([*shared, f"out={tmp_path}/run", "transfer=explain"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(line) and "the transfer is possible" in said
    asa.finetune(store, tmp_path / "run", init="asa://tiny-t1", crop=64, transfer="explain")
    assert capsys.readouterr().out == said
    assert finetune.main([*shared, f"out={tmp_path}/run", "--print"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]
    assert printed["_target_"] == "asa.models.unet.unet_tiny" and printed.items() >= TINY.items()


def tokens_and_parts(encoder: nn.Module, volume: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a crop around the middle, and the fraction of each structure in their patches."""
    starts = [(n - size) // 2 for n, size in zip(volume.shape[1:], SIZE, strict=True)]
    crop = (slice(None), *(slice(start, start + size) for start, size in zip(starts, SIZE, strict=True)))
    image, parts = (torch.from_numpy(np.array(array[crop], dtype=np.float32))[None] for array in (volume, label))
    with torch.inference_mode():
        tokens = encoder(image)[0].numpy()
    fractions = [(patchify(parts, 8)[0] == value).float().mean(dim=1) for value in STRUCTURES]
    return tokens, torch.stack(fractions, dim=1).numpy()


@pytest.mark.slow
def test_a_ridge_on_the_tokens_of_a_phantom_finds_structures_of_another_better_than_on_first_weights(
    tmp_path: Path,
) -> None:
    pytest.importorskip("nilearn", reason="the phantoms need the extra phantom")
    records = phantom.records(tmp_path / "raw", kind="structures", subjects=2)
    labels = dict(STRUCTURES)
    assert not prepare_cohort(records, tmp_path / "store", CohortSettings(labels=labels), progress=False).failures
    store = Store(tmp_path / "store")
    torch.manual_seed(0)
    first = sw_vit_tiny(img_size=SIZE, window=32, **TINY).eval()
    scores = {}
    for name, encoder in {"shipped": load_encoder("asa://tiny-t1", img_size=SIZE), "first": first}.items():
        (x, y), (other_x, other_y) = (
            tokens_and_parts(encoder, store.image(record["id"]), store.label(record["id"])) for record in store.records
        )
        scores[name] = RidgeCV(np.logspace(-3, 3, 7)).fit(x, y).score(other_x, other_y)
    print(scores)
    assert scores["shipped"] > 1.5 * scores["first"]


def test_an_encoder_of_the_other_family_is_named_as_such() -> None:
    swin = {"_target_": "asa.models.sa_swin.sa_swin_tiny", "position": False}
    source, description = read_source("asa://tiny-t1")
    for known, model, said in (
        ({"model": swin}, unet_tiny(in_channels=1, out_channels=2, img_size=64), "is SA-Swin's encoder, and this netw"),
        (description, sa_swin_unet_tiny(in_channels=1, out_channels=2, img_size=64), "is ASA's encoder, and this netw"),
    ):
        with pytest.raises(ValueError, match=f"^init=it: {said}ork has .*: leave model= and experiment= out"):
            load_pretrained("it", source, known, model, {})
