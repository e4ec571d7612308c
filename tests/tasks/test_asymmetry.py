"""From a pretraining that knows who is healthy to asymmetry scores and maps of new scans, by the commands."""

import csv
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stores import read_tree, with_subjects, write_tree
from torch import Tensor

from asa.cli import predict, pretrain
from asa.data.io.nifti import read_image, write_image
from asa.data.io.tables import read_column
from asa.data.store import Store, write_array
from asa.evaluation.statistics import in_interval
from asa.evaluation.tables import matched
from asa.export.onnx import export_onnx
from asa.inference.anomaly import ASYMMETRY_TABLE as TABLE
from asa.inference.anomaly import AnomalyMap, AsymmetryScorer, HealthyReference, read_pretrained
from asa.inference.segmentation import PredictSettings, Segmenter
from asa.models.sa_swin import SASwin
from asa.models.swin import Swin
from asa.tasks.pretraining import read_health
from asa.training.checkpoint import load_encoder, load_model

SMALLEST = ("+model.embed_dim=4", "+model.num_heads=[1,1,2,2]", "+model.window=2", "+model.cross_heads=2")


def run(monkeypatch: pytest.MonkeyPatch, command, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["asa", *map(str, arguments)])
    return command.main()


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on scans of which two are known to be healthy, one not to be."""
    folder = tmp_path_factory.mktemp("asymmetry")
    (folder / "health.csv").write_text("subject,health\ns0,1\ns1,1\ns2,0\n")
    options = [
        f"data.store={store}", f"out={folder / 'run'}", "model=sa_swin_tiny", "method=sa_swin", "crop=32", *SMALLEST,
        "data.placement=random", f"data.health={folder / 'health.csv'}", "data.split.validation=1", "train.steps=2",
        "train.batch_size=2", "train.log_every=1", "optim.warmup=0", "loader.workers=0", "train.device=cpu",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, pretrain, *options) == 0
    return folder / "run"


def test_a_pretraining_keeps_a_network_that_loads_and_draws_reconstruction_and_symmetry(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert isinstance(load_model(trained), SASwin) and isinstance(load_encoder(trained), Swin)
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    names = events.Tags()
    assert {name.split("/")[-1] for name in names["images"]} >= {"reconstruction", "symmetry"}
    assert events.Images("reconstruction")[0].width >= 600
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    _target_: asa.models.sa_swin.sa_swin_tiny" in text
    hparams = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert hparams["train.steps"].number_value == 2 and hparams["data.placement"].string_value == "random"
    shown = {name.split("/")[-1] for name in names["scalars"]}
    assert {"rotation", "contrastive", "inpainting", "symmetry", "hidden_l1", "effective_rank"} <= shown


def test_raw_scans_and_stored_ones_have_the_same_scores_and_maps_in_their_own_space(
    trained: Path,
    raw: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for k in range(2):
        (scans / f"s{k}.nii.gz").write_bytes((raw / f"s{k}_T1.nii.gz").read_bytes())
    for source, out in ((scans, "raw"), (store, "stored")):
        arguments = (f"checkpoint={trained}", f"input={source}", f"out={tmp_path / out}", "predict.device=cpu")
        assert run(monkeypatch, predict, *arguments) == 0
        assert "warning: " in (shown := capsys.readouterr().err) and "without prepare.midway" in shown
    one, other = rows_of(tmp_path / "raw" / TABLE), rows_of(tmp_path / "stored" / TABLE)
    assert set(one) == {"s0", "s1"} and set(other) == {"s0", "s1", "s2", "s3"}
    for id, row in one.items():
        assert 0 < float(row["score"]) < 1
        assert float(row["score"]) == pytest.approx(float(other[id]["score"]), rel=1e-2)  # the store holds float16
        scan, found = read_image(scans / f"{id}.nii.gz"), read_image(tmp_path / "raw" / f"{id}.nii.gz")
        np.testing.assert_array_equal(found.affine, scan.affine)
        assert found.data.shape == scan.data.shape
        place = np.linalg.inv(found.affine) @ (*(float(row[axis]) for axis in "xyz"), 1)
        peak = found.data[tuple(np.rint(place[:3]).astype(int))]
        assert peak == pytest.approx(float(row["peak"]), rel=1e-4) == pytest.approx(float(found.data.max()), rel=1e-4)


@pytest.mark.parametrize("width", [40, 41])
def test_a_scan_that_is_its_own_mirror_image_scores_0(trained: Path, tmp_path: Path, width: int) -> None:
    half = np.random.default_rng(0).random((width, 36, 34)).astype(np.float32)
    half[:3], half[-3:], half[:, :4], half[:, -4:], half[:, :, :4], half[:, :, -4:] = 0, 0, 0, 0, 0, 0
    write_image(tmp_path / "scan.nii.gz", half + half[::-1], np.diag([1.0, 1.0, 1.0, 1.0]))
    with pytest.warns(UserWarning, match="without prepare.midway"):
        scorer = AsymmetryScorer(*read_pretrained(trained), PredictSettings(device="cpu"))
    case, like = scorer.preprocessor.prepare({"t1": tmp_path / "scan.nii.gz"})
    row = scorer.score_prepared("scan", case.image, case.chain, like, tmp_path / "map.nii.gz")
    assert row["score"] == row["peak"] == row["mean"] == "0"
    assert not read_image(tmp_path / "map.nii.gz").data.any()


def test_the_head_is_where_any_channel_or_its_mirror_image_is_not_0(trained: Path) -> None:
    with pytest.warns(UserWarning, match="without prepare.midway"):
        scorer = AsymmetryScorer(*read_pretrained(trained), PredictSettings(device="cpu"))
    scorer.model = SimpleNamespace(asymmetry=lambda image, level: (torch.zeros(1), torch.ones(1, *image.shape[2:])))
    image = torch.zeros(2, 2, 2, 6)
    image[0, 0, 0, 1], image[1, 1, 1, 5] = 1, 1
    expected = torch.zeros(2, 2, 6, dtype=torch.bool)
    expected[0, 0, [1, 4]], expected[1, 1, [0, 5]] = True, True
    scan = scorer.measure(image)
    assert torch.equal(scan.inside, expected) and torch.equal(scan.map, expected.float())


def found_of(map: Tensor, inside: Tensor) -> AnomalyMap:
    return AnomalyMap(map * inside, inside)


def test_the_top_is_the_mean_of_the_highest_hundredth_inside_the_head() -> None:
    generator = torch.Generator().manual_seed(0)
    map, inside = torch.rand(8, 9, 10, generator=generator), torch.rand(8, 9, 10, generator=generator) > 0.3
    values = sorted(
        value for value, counts in zip(map.flatten().tolist(), inside.flatten().tolist(), strict=True) if counts
    )
    highest = values[-math.ceil(len(values) / 100) :]
    assert found_of(map, inside).top == pytest.approx(sum(highest) / len(highest))
    assert found_of(map, inside).mean == pytest.approx(sum(values) / len(values))
    assert found_of(map, inside & False).top == found_of(map, inside & False).mean == 0


def test_beyond_healthy_counts_spreads_above_the_healthy_scans_that_reach_a_place() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [
        (torch.rand(3, 4, 5, generator=generator), torch.rand(3, 4, 5, generator=generator) > 0.4) for _ in range(4)
    ]
    drawn = [(map, inside & (torch.arange(5) < 4)) for map, inside in drawn]  # no healthy head reaches the last place
    new = found_of(2 * torch.rand(3, 4, 5, generator=generator), torch.ones(3, 4, 5, dtype=torch.bool))
    reach = {place: [float(map[place]) for map, inside in drawn if inside[place]] for place in np.ndindex(3, 4, 5)}
    spreads = {place: float(np.std(values)) for place, values in reach.items() if values}
    typical = sorted(spreads.values())[(len(spreads) - 1) // 2]
    found = HealthyReference((found_of(*one) for one in drawn), (3, 4, 5)).standardise(new)
    for place, values in reach.items():
        above = (float(new.map[place]) - np.mean(values)) / (spreads[place] + typical) if values else 0
        assert float(found.map[place]) == pytest.approx(max(above, 0), abs=1e-5)
    with pytest.raises(ValueError, match="two or more"):
        HealthyReference([new], (3, 4, 5))


def write_alike(store: Path, folder: Path, subjects: list[str]) -> Path:
    """A store of a0, a1, ... of these subjects, prepared as s0: it with noise of its own in each.

    The scans of the subject p have the digest of s0.
    """
    manifest = read_tree(store)
    first, image = manifest["records"][0], np.array(Store(store).image("s0"))
    folder.mkdir()
    manifest["settings"]["nan"] = "zero"  # this alone may differ from the training scans
    manifest["records"] = [{**first, "id": f"a{k}", "subject": subject} for k, subject in enumerate(subjects)]
    for k, record in enumerate(manifest["records"]):
        noise = np.random.default_rng(k).normal(0, 0.05, image.shape)
        array = (image + noise * (image != 0)).astype(np.float16)
        record["arrays"] = {"image": write_array(folder, record["id"], "image", array)}
        if record["subject"] != "p":
            record["identity"] = {"t1": f"{k}" * 32}
    write_tree(folder, manifest)
    return folder


@pytest.fixture
def alike(store: Path, tmp_path: Path) -> Path:
    """Two scans of one size, prepared like the others, and with the digests of none."""
    return write_alike(store, tmp_path / "alike", ["a0", "a1"])


def test_maps_are_beyond_healthy_scans_where_these_are_given(
    trained: Path, alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (f"checkpoint={trained}", f"input={alike}", f"out={tmp_path / 'out'}", "predict.device=cpu")
    with pytest.warns(UserWarning, match="without prepare.midway"):
        assert run(monkeypatch, predict, *arguments, f"healthy={alike}") == 0
        scorer = AsymmetryScorer(*read_pretrained(trained), PredictSettings(device="cpu"))
    scorer.compare_with(alike)
    image = torch.from_numpy(np.array(Store(alike).image("a1"), dtype=np.float32))
    found, turned = scorer.measure(image), scorer.measure(image.flip(-1))
    row = rows_of(tmp_path / "out" / TABLE)["a1"]
    assert float(row["top"]) == pytest.approx(found.top, rel=1e-4)
    assert float(row["mean"]) <= float(row["top"]) <= float(row["peak"])
    assert turned.score == pytest.approx(found.score, rel=1e-3)
    torch.testing.assert_close(turned.map, found.map.flip(-1), atol=1e-3, rtol=1e-3)
    symmetric = scorer.measure((image + image.flip(-1)) / 2)
    assert symmetric.score == symmetric.top == 0 and not symmetric.map.any()


@pytest.mark.filterwarnings("ignore:.*without prepare.midway")
def test_a_scan_in_the_store_scores_as_against_a_store_without_its_subject(
    trained: Path, store: Path, raw: Path, tmp_path: Path
) -> None:
    all_of = write_alike(store, tmp_path / "all", ["a0", "a1", "p", "a3"])
    settings, like = PredictSettings(device="cpu"), read_image(raw / "s0_T1.nii.gz")
    image = torch.from_numpy(np.array(Store(all_of).image("a2"), dtype=np.float32))
    manifest = read_tree(all_of)
    follow_up = {**manifest["records"][1], "subject": "p", "identity": {"t1": "f" * 32}}  # of other voxels
    first, _, own, last = manifest["records"]
    found = []
    for records in ([first, follow_up, own, last], [first, last]):
        write_tree(all_of, {**manifest, "records": records})
        scorer = AsymmetryScorer(*read_pretrained(trained), settings)
        scorer.compare_with(all_of)
        measured = scorer.measure(image, like=like)
        found.append((measured.map, measured.top, scorer.measure(image).top))
    (map, top, with_itself), (expected, expected_top, other) = found
    torch.testing.assert_close(map, expected)
    assert top == pytest.approx(expected_top) == pytest.approx(other) and with_itself < 0.9 * top
    write_tree(all_of, {**manifest, "records": [first, own]})
    with pytest.raises(ValueError, match="healthy: 1 scan of other subjects: give two or more"):
        scorer.compare_with(all_of)
        scorer.measure(image, like=like)


def test_healthy_scans_prepared_in_another_way_are_refused(trained: Path, store: Path, tmp_path: Path) -> None:
    manifest = read_tree(store)
    manifest["settings"]["margin"] += 1
    write_tree(tmp_path, manifest)
    differ = "in another way .*margin: 4 there, 5 here"
    with pytest.raises(ValueError, match=differ), pytest.warns(UserWarning, match="midway"):
        AsymmetryScorer(*read_pretrained(trained), PredictSettings(device="cpu")).compare_with(tmp_path)


def test_maps_whose_folder_is_removed_are_not_begun_anew(
    trained: Path, raw: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"

    def removing(self: AsymmetryScorer, image: torch.Tensor, like: object) -> object:
        shutil.rmtree(out)
        return measure(self, image, like)

    measure = AsymmetryScorer.measure
    monkeypatch.setattr(AsymmetryScorer, "measure", removing)
    given = [f"checkpoint={trained}", f"input={raw / 's0_T1.nii.gz'}", f"out={out}", "predict.device=cpu"]
    assert run(monkeypatch, predict, *given) == 1
    assert f"the folder {out} was removed while it was in use" in capsys.readouterr().err and not out.exists()


def test_scores_of_scans_that_come_later_are_added(trained: Path, raw: Path, tmp_path: Path, monkeypatch) -> None:
    given = [f"checkpoint={trained}", f"out={tmp_path}", "predict.device=cpu"]
    for k in (1, 0):
        assert run(monkeypatch, predict, *given, f"input={raw / f's{k}_T1.nii.gz'}") == 0
    whole = (tmp_path / TABLE).read_bytes()
    assert list(rows_of(tmp_path / TABLE)) == ["s0_T1", "s1_T1"]
    write_image(tmp_path.parent / "nan.nii.gz", np.full((4, 4, 4), np.nan), np.eye(4))
    assert run(monkeypatch, predict, *given, f"input={tmp_path.parent / 'nan.nii.gz'}") == 1
    assert (tmp_path / TABLE).read_bytes() == whole


def test_the_table_names_the_subjects_of_a_store(trained: Path, store: Path, tmp_path: Path, monkeypatch) -> None:
    copy = with_subjects(store, tmp_path / "store", {"s0": "p", "s1": "p", "s2": "s2", "s3": "q"})
    for _ in range(2):  # a table with subjects is its own
        given = [f"checkpoint={trained}", f"input={copy}", f"out={tmp_path / 'out'}", "predict.device=cpu"]
        assert run(monkeypatch, predict, *given) == 0
    found = rows_of(tmp_path / "out" / TABLE)
    assert {id: row["subject"] for id, row in found.items()} == {"s0": "p", "s1": "p", "s2": "", "s3": "q"}
    assert list(found["s0"])[:2] == ["id", "subject"]


@pytest.mark.parametrize("name", ["s0_T1.nii.gz", TABLE])
def test_files_that_are_no_asymmetry_maps_are_not_replaced(
    trained: Path, raw: Path, tmp_path: Path, monkeypatch, capsys, name: str
) -> None:
    (tmp_path / name).write_text("id,mine\n")
    given = [f"checkpoint={trained}", f"input={raw / 's0_T1.nii.gz'}", f"out={tmp_path}", "predict.device=cpu"]
    assert run(monkeypatch, predict, *given) == 1
    assert "choose another out=" in capsys.readouterr().err and (tmp_path / name).read_text() == "id,mine\n"
    (tmp_path / name).unlink()
    for _ in range(2):
        assert run(monkeypatch, predict, *given) == 0


def test_what_a_symmetry_network_cannot_do_is_said(
    trained: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match="not a segmentation model"):
        Segmenter(trained, PredictSettings(device="cpu"))
    with pytest.raises(ValueError, match="only networks on a SW-ViT"):
        pytest.importorskip("onnxscript")
        export_onnx(trained, tmp_path / "x.onnx")
    arguments = (f"checkpoint={trained}", f"input={store}", f"out={tmp_path / 'out'}")
    assert run(monkeypatch, predict, *arguments, "mirror=true") == 1
    assert "without mirror" in capsys.readouterr().err
    options = (f"data.store={store}", f"out={tmp_path / 'run'}", "data.health=healthy", "crop=32", "model=asa_tiny")
    assert run(monkeypatch, pretrain, *options, "train.device=cpu") == 1
    assert "method=sa_swin learns symmetry" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- who is healthy


def test_health_is_of_all_or_of_a_table_or_unknown(store: Path, tmp_path: Path) -> None:
    records = Store(store).records
    assert read_health(None, records) == {}
    assert {said["health"] for said in read_health("healthy", records).values()} == {1.0}
    (tmp_path / "t.csv").write_text("id,age,health\ns0,3,1\ns1,4,\ns2,5,0\nnobody,1,1\n")
    found = [said["health"] for said in read_health(str(tmp_path / "t.csv"), records).values()]
    assert found[0] == 1 and math.isnan(found[1]) and found[2] == 0 and math.isnan(found[3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,health\ns0,yes\n", "health of 'yes'"),
        ("id,ill\ns0,1\n", "give id, subject or participant_id, and health"),
        ("id,health\ns0,1\ns0,1\n", "s0 is in two rows"),
        ("subject,health\nx,1\n", "no subject of its 1 rows is one of the scans"),
        ("subject,health\ns0,1\ns0,1\n", "remove one; a table by session needs a column session_id, or a column id"),
        ("subject,session_id,health\ns0,1,1\ns0,ses-01,1\n", "subject s0 ses-01 is in two rows: remove one$"),
    ],
)
def test_a_table_that_does_not_fit_is_named(store: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_health(str(tmp_path / "t.csv"), Store(store).records)


def test_a_subjects_row_holds_for_all_its_scans(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("subject,class\na,x\n")
    records = [{"id": "a_1", "subject": "a"}, {"id": "a_2", "subject": "a"}, {"id": "b_1", "subject": "b"}]
    assert read_column(tmp_path / "t.csv", "class", records) == {"a_1": "x", "a_2": "x"}


def test_the_participants_of_bids_are_a_table_of_subjects(tmp_path: Path) -> None:
    (tmp_path / "participants.tsv").write_text("participant_id\tclass\nsub-a\tx\nsub-b\tn/a\n")
    records = [{"id": f"sub-{name}", "subject": f"sub-{name[0]}"} for name in ("a_ses-1", "a_ses-2", "b")]
    assert read_column(tmp_path / "participants.tsv", "class", records) == {"sub-a_ses-1": "x", "sub-a_ses-2": "x"}
    (tmp_path / "rows.csv").write_text("id\n" + "".join(f"{record['id']}\n" for record in records))
    (tmp_path / "subjects.TSV").write_text("subject\tclass\nsub-a\tx\nsub-b\tn/a\n")
    assert read_column(tmp_path / "subjects.TSV", "class", records) == {"sub-a_ses-1": "x", "sub-a_ses-2": "x"}
    rows, classes, subjects = matched(tmp_path / "rows.csv", tmp_path / "participants.tsv", "class")
    assert [row["id"] for row in rows] == ["sub-a_ses-1", "sub-a_ses-2"]
    assert classes == ["x", "x"] and subjects == ["sub-a", "sub-a"]


def test_a_row_of_a_subject_and_session_holds_for_the_scans_of_that_session(tmp_path: Path) -> None:
    sessions = "participant_id,session_id,age\nsub-a,ses-01,60\nsub-a,2,62\nsub-b,n/a,70\nsub-c,1,80\nsub-d,1,90\n"
    (tmp_path / "t.csv").write_text(sessions)
    ids = ["sub-a_ses-01", "sub-a_ses-02_run-1", "sub-a_ses-02_run-2", "sub-a_ses-3", "sub-a", "sub-b_ses-1", "sub-b"]
    records = [{"id": id, "subject": id[:5]} for id in (*ids, "sub-c", "sub-d_ses-2")]
    assert read_column(tmp_path / "t.csv", "age", records) == {
        **{"sub-a_ses-01": "60", "sub-a_ses-02_run-1": "62", "sub-a_ses-02_run-2": "62"},
        **{"sub-b_ses-1": "70", "sub-b": "70", "sub-c": "80"},
    }
    with pytest.raises(ValueError, match="no participant_id with its session_id of its 5 rows .* like sub-d_ses-2"):
        read_column(tmp_path / "t.csv", "age", records[-1:])


def test_a_number_that_is_undefined_is_said_to_be() -> None:
    assert in_interval(None, None, None) == "undefined" and in_interval(0.5, None, None) == "0.500"
