"""The ablation: what its numbers are, and the command on tiny brains."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from asa.cli import COMMANDS
from asa.config import as_overrides, compose, flatten
from asa.data.splits import read_split, write_split
from asa.evaluation.comparison import Run
from asa.reporting import ablation
from asa.reporting.ablation import Trial, ablation_rows, labelled_text, latex, markdown, overview
from asa.tasks import studies
from asa.tasks.run import configure
from asa.training.process import RESUME_CODE, Stopped

SETTING = {"policy": "ibsr", "metrics": ["dice", "hd95_mm", "nsd_1mm"], "labels": {"1": "a", "2": "b"}}
HEADINGS = ("Dice", "HD95 (mm)", "NSD at 1 mm")
SETTING |= {"regions": {"a": [1], "b": [2]}, "ignored labels": []}


def trial(
    arm: str,
    seed: int,
    dice: dict[str, tuple[float, float]],
    labelled: str = "3",
    subjects: dict[str, str] | None = None,
    **setting: object,
) -> Trial:
    values = {
        (case, region): {"dice": value, "hd95_mm": 1.0, "nsd_1mm": 1.0}
        for case, pair in dice.items()
        for region, value in zip("ab", pair, strict=True)
    }
    run = Run(f"{arm}{seed}", SETTING | setting, values, dict.fromkeys(values, "5 voxels"), subjects=subjects or {})
    return Trial(arm, labelled, seed, run)


def dice_rows(trials: list[Trial], arms: list[str]) -> dict[tuple[str, str], object]:
    return {(row.arm, row.region): row for row in ablation_rows(trials, arms) if row.metric.name == "dice"}


def test_a_case_that_two_seeds_tested_counts_once_with_its_average() -> None:
    trials = [trial("x", 0, {"p": (0.2, 0.4), "q": (0.6, 0.6)}), trial("x", 1, {"p": (0.4, 0.4), "r": (0.9, 0.5)})]
    row = dice_rows(trials, ["x"])["x", "a"]
    assert row.values.mean == pytest.approx((0.3 + 0.6 + 0.9) / 3)
    assert (row.values.used, row.values.total, row.seeds) == (3, 3, 2)
    assert row.seed_sd == pytest.approx((0.65 - 0.4) / math.sqrt(2)) and row.difference is None


def test_a_subject_counts_once_whichever_trials_know_of_its_sessions() -> None:
    """Files of an evaluation name subjects only where one has several cases."""
    known = {"s1_a": "s1", "s1_b": "s1", "s2_a": "s2"}
    first = {"s1_a": (0.2, 0.2), "s1_b": (0.4, 0.2), "s2_a": (0.9, 0.2)}
    trials = [
        trial(arm, seed, {case: (a + gain, b) for case, (a, b) in cases.items()}, subjects=subjects)
        for arm, gain in (("x", 0.0), ("y", 0.1))
        for seed, cases, subjects in ((0, first, known), (1, {"s2_a": (0.5, 0.2), "s3_a": (0.1, 0.2)}, None))
    ]
    row = dice_rows(trials, ["x", "y"])["x", "a"]
    assert row.values.mean == pytest.approx((0.3 + 0.7 + 0.1) / 3)
    assert (row.values.used, row.values.total, row.unit) == (3, 3, "subject")
    assert row.seed_sd == pytest.approx((0.6 - 0.3) / math.sqrt(2))
    rows = ablation_rows(trials, ["x", "y"])
    assert {row.difference.total for row in rows if row.difference} == {3}
    text = markdown(rows, trials, ["x", "y"])
    assert "mean of 2 regions, on 3 subjects." in text and "the 95 % interval over subjects" in text
    assert "seeds | subjects |" in text and "averaged over its cases and the seeds that tested it" in text
    assert "Means over the subjects" in latex(rows, trials)


def test_the_mean_of_the_regions_is_of_each_case_and_undefined_where_one_is() -> None:
    rows = dice_rows([trial("x", 0, {"p": (0.2, 0.4), "q": (0.6, math.nan)})], ["x"])
    assert rows["x", "mean"].values.mean == pytest.approx(0.3)
    assert (rows["x", "mean"].values.used, rows["x", "mean"].values.total) == (1, 2)


def test_differences_are_of_the_same_seeds_and_cases() -> None:
    first = [trial("x", 0, {"p": (0.2, 0.2), "q": (0.5, 0.5)})]
    other = [trial("y", 0, {"p": (0.3, 0.2), "q": (0.9, 0.5)}), trial("y", 1, {"r": (0.0, 0.0)})]
    row = dice_rows([*first, *other], ["x", "y"])["y", "a"]
    assert row.difference.mean == pytest.approx((0.1 + 0.4) / 2) and row.difference.total == 2
    assert row.values.mean == pytest.approx((0.3 + 0.9 + 0.0) / 3)


def test_an_interval_does_not_leave_what_a_score_can_be_and_a_difference_may_be_negative() -> None:
    trials = [trial("x", 0, {"p": (0.99, 0.5), "q": (0.2, 0.5)}), trial("y", 0, {"p": (0.0, 0.5), "q": (0.9, 0.5)})]
    row = dice_rows(trials, ["x", "y"])["y", "a"]
    assert (row.values.low, row.values.high) == (0, 1) and row.difference.low < -1


def test_trials_that_were_scored_in_different_ways_are_refused() -> None:
    trials = [trial("x", 0, {"p": (0.2, 0.4)}), trial("y", 0, {"p": (0.2, 0.4)}, policy="asa_paper")]
    with pytest.raises(ValueError, match="y0 was evaluated with another policy than x0"):
        ablation_rows(trials, ["x", "y"])


def test_an_arm_without_the_first_beside_it_has_no_difference_and_a_line_all_the_same() -> None:
    trials = [trial("y", 0, {"p": (0.2, 0.4)})]
    assert dice_rows(trials, ["x", "y"])["y", "a"].difference.used == 0
    text = markdown(ablation_rows(trials, ["x", "y"]), trials, ["x", "y"], ["something to know"])
    assert "| 3 | y | 0.200 | 0.400 | 0.300 | undefined |" in text and "- something to know" in text


def test_the_tables_begin_with_the_verdict_in_words() -> None:
    cases = {"p": (0.2, 0.4), "q": (0.3, 0.4), "r": (0.4, 0.4)}
    better = {name: (a + 0.1 + k / 100, b + 0.1) for k, (name, (a, b)) in enumerate(cases.items())}
    trials = [trial("x", 0, cases), trial("y", 0, better), trial("z", 0, cases)]
    text = markdown(ablation_rows(trials, "xyz"), trials, "xyz")
    title, _, first, second, *_ = text.splitlines()
    assert title == "# Ablation"
    assert first.startswith("- y with 3 labelled is ahead of x: Dice +0.105 (95 % interval +0.09")
    assert first.endswith("mean of 2 regions, on 3 cases.") and second.startswith("- z with 3 labelled and x: no diff")


def test_the_figure_of_many_regions_has_one_scale_and_fits_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"p": (0.2, 0.9), "q": (0.3, 0.8)}
    rows = ablation_rows([trial(arm, 0, cases) for arm in "xy"], "xy")
    rows = [replace(row, region=f"{row.region}{k}") for k in range(3) for row in rows]
    figures = []
    monkeypatch.setattr(ablation, "png_of", figures.append)
    ablation._figure(rows, "xy")
    (figure,) = figures
    shown = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in shown] == list(dict.fromkeys(row.region for row in rows))
    assert len({axis.get_ylim() for axis in shown}) == 1 and figure.get_size_inches()[0] * figure.dpi <= 1600
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y"]


def test_the_overview_has_a_column_for_each_metric_and_region_and_a_line_for_each_arm() -> None:
    trials = [trial("x", 0, {"p": (0.2, 0.4), "q": (0.6, 0.4)}), trial("y_1", 0, {"p": (0.5, 0.6), "q": (0.5, 0.6)})]
    rows = ablation_rows(trials, ["x", "y_1"])
    heads, *lines = overview(rows)
    assert heads == ["labelled", "arm", *(f"{metric} {region}" for metric in HEADINGS for region in "ab")]
    assert [line[:4] for line in lines] == [
        ["3", "x", "0.400 (0.000 to 1.000)", "0.400 (0.400 to 0.400)"],
        ["3", "y_1", "0.500 (0.500 to 0.500)", "0.600 (0.600 to 0.600)"],
    ]
    tex, text = latex(rows, trials, ["100 % of it"]), markdown(rows, trials, ["x", "y_1"])
    assert r"3 & y\_1 & 0.500 (0.500 to 0.500) & " in tex and "% 100 % of it" in tex.splitlines()
    written = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(written) == 3 and {line.count("&") for line in written} == {7}
    assert f"| {' | '.join(lines[1])} |" in text


def test_numbers_of_labelled_subjects_have_one_name_each() -> None:
    assert [labelled_text(count) for count in (3, 0.1, 0.125, 1.0, None, 1)] == ["3", "10%", "12.5%", "all", "all", "1"]


def test_settings_are_written_as_the_command_line_reads_them() -> None:
    node = {"experiment": "oasis_pretrain", "train.steps": 7, "optim": {"lr": 1e-5, "betas": [0.9, 0.5]}}
    node |= {"data": {"store": "it's, a {store}", "split": {"test": 0.5, "site": None}}, "crop": [32, 64, 32]}
    config = configure("pretrain", node, {"out": "x"})
    assert (config["optim"]["lr"], config["optim"]["betas"], config["crop"]) == (1e-5, [0.9, 0.5], [32, 64, 32])
    assert config["data"]["store"] == "it's, a {store}" and config["train"]["steps"] == 7
    assert config["data"]["split"]["test"] == 0.5 and config["data"]["placement"] == "random"


# ------------------------------------------------------------------------------------------ the command

TINY = {"train": {"steps": 1, "batch_size": 1, "device": "cpu"}, "optim.warmup": 0, "loader.workers": 0}
PRETRAIN = TINY | {"model": "asa_tiny", "crop": 32}
FINETUNE = TINY | {"model": "unet_tiny", "+model.feature_size": 4, "crop": [64, 32, 32]}


@pytest.fixture
def ablate(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run asa-ablate on the tiny brains: code, output, errors."""

    def run(*overrides: str) -> tuple[int, str, str]:
        own = [f"store={store}", f"out={tmp_path}/out", "labelled=[1]", "split.test=1"]
        own += as_overrides("ablate", {"pretrain": PRETRAIN, "finetune": FINETUNE})
        capsys.readouterr()
        code = COMMANDS["ablate"].main([*own, *overrides])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """The commands that are called, by name and run, in place of running them; an evaluation is made up."""
    calls: list[tuple[str, dict]] = []
    broken: dict[str, BaseException] = {}

    def fake(name: str, *settings: dict, config_dir: str | None = None) -> None:
        flat: dict = {}
        for node in settings:
            flat |= flatten(node)
        calls.append((name, flat))
        place = Path(flat["out"])
        if error := broken.get(f"{name} {place.name}"):
            raise error
        if name == "evaluate":
            place.mkdir(parents=True, exist_ok=True)
            (place / "summary.json").write_text("{}")

    monkeypatch.setattr(studies, "call", fake)
    evaluated = trial("x", 0, {"p": (0.2, 0.4), "q": (0.3, 0.3)}).run

    def read(name: str, folder: Path) -> Run:
        if (folder / "summary.json").read_text() != "{}":
            raise ValueError(f"{folder}: damaged")
        return evaluated

    monkeypatch.setattr(studies, "read_run", read)
    calls_of = lambda name: [flat for called, flat in calls if called == name]  # noqa: E731
    return calls_of, broken


def test_the_six_arms_are_those_of_table_4(ablate, recorded, tmp_path: Path) -> None:
    calls_of, _ = recorded
    code, out, _ = ablate("labelled=[1,2]")
    assert code == 0 and "wrote ablation.md, .tex, .csv and .png" in out
    assert len(calls_of("pretrain")) == 4  # once an arm, not once a number of labels
    tuned = calls_of("finetune")
    assert len(tuned) == 12
    found = {}
    for flat in tuned[:6]:
        arm = str(flat["out"]).removeprefix(f"{tmp_path}/out/runs/seed0_1_")
        before = next((other for other in calls_of("pretrain") if other["out"] == flat.get("init")), None)
        position = flat["model.position"]
        if before:
            method = configure("pretrain", before)["method"]
            assert method["model"]["position"] == position, "the encoder would be refused"
            found[arm] = (position, True, method["importance"])
        else:
            found[arm] = (position, False, None)
    assert found == {
        "scratch": ("raster", False, None),
        "mae": ("raster", True, None),
        "attentive_mae": ("raster", True, "orientation"),
        "spe": ("mirror", False, None),
        "spe_mae": ("mirror", True, None),
        "asa": ("mirror", True, "orientation"),
    }


def test_arms_keep_what_sets_them_apart_under_an_experiment_that_sets_it_too() -> None:
    arms = compose("ablate", ["out=x", "store=y"])["arms"]
    for name, importance in (
        ("mae", None),
        ("spe_mae", None),
        ("attentive_mae", "orientation"),
        ("asa", "orientation"),
    ):
        settings = ({"experiment": "asa_paper", "data.store": "y", "out": "x"}, arms[name]["pretrain"])
        method = configure("pretrain", *settings)["method"]
        assert method["importance"] == importance
        assert method["model"]["position"] == arms[name]["finetune"]["model.position"]


def test_arms_of_a_seed_share_the_split_and_pretraining_never_sees_the_test_subjects(
    ablate, recorded, tmp_path: Path
) -> None:
    calls_of, _ = recorded
    assert ablate("seeds=[0,1]", "only=[scratch,asa]")[0] == 0
    for seed in (0, 1):
        file = tmp_path / "out" / "splits" / f"seed{seed}.json"
        runs = [
            flat for name in ("pretrain", "finetune") for flat in calls_of(name) if f"seed{seed}_" in str(flat["out"])
        ]
        assert len(runs) == 3 and {flat["data.split_file"] for flat in runs} == {file}
        assert {flat["train.seed"] for flat in runs} == {seed}
    assert read_split(tmp_path / "out" / "splits" / "seed0.json")["test"]


def test_an_ablation_of_a_store_that_has_grown_since_is_refused(ablate, recorded, tmp_path: Path) -> None:
    assert ablate("only=[scratch]")[0] == 0
    file = tmp_path / "out" / "splits" / "seed0.json"
    split = read_split(file)
    write_split(file, {**split, "train": split["train"][1:]})  # as when it began without one of them
    code, _, err = ablate("only=[scratch,asa]")
    assert code == 1 and "seed0.json: the store's subjects are others than when this began" in err
    assert read_split(file)["train"] == split["train"][1:]


def test_one_pretraining_serves_all_seeds_where_the_split_does_not_change(ablate, recorded, store: Path) -> None:
    calls_of, _ = recorded
    assert ablate("seeds=[0,1]", "only=[asa]", f"unlabelled={store}")[0] == 0
    (pretraining,) = calls_of("pretrain")
    assert "data.split_file" not in pretraining and len(calls_of("finetune")) == 2
    assert {flat["init"] for flat in calls_of("finetune")} == {pretraining["out"]}


def test_a_run_that_fails_is_named_the_others_go_on_and_the_same_command_does_it_again(ablate, recorded) -> None:
    calls_of, broken = recorded
    broken["pretrain seed0_mae"] = ValueError("no room")
    broken["finetune seed0_1_spe"] = RuntimeError("a bug")
    code, out, err = ablate("only=[scratch,mae,spe,asa]")
    assert code == 1 and "2 of 4 runs failed" in err
    assert "seed0_1_mae: failed: pretraining: no room" in out and "seed0_1_spe: failed: RuntimeError: a bug" in out
    assert "failed and not counted: seed0_1_mae, seed0_1_spe" in out and "| 1 | asa |" in out
    broken.clear()
    before = len(calls_of("evaluate"))
    code, out, _ = ablate("only=[scratch,mae,spe,asa]")
    assert code == 0 and out.count("done before") == 2 and len(calls_of("evaluate")) == before + 2


def test_a_run_whose_evaluation_is_damaged_is_scored_again(ablate, recorded, tmp_path: Path) -> None:
    calls_of, _ = recorded
    assert ablate("only=[scratch,spe]")[0] == 0
    (tmp_path / "out" / "evaluations" / "seed0_1_spe" / "summary.json").write_text("{")
    code, out, _ = ablate("only=[scratch,spe]")
    assert code == 0 and out.count("done before") == 1 and len(calls_of("evaluate")) == 3


def test_an_alarm_of_a_pretraining_is_said_below_the_table(ablate, recorded, tmp_path: Path, monkeypatch) -> None:
    fake = studies.call

    def alarming(name: str, *settings: dict, config_dir: str | None = None) -> None:
        fake(name, *settings, config_dir=config_dir)
        if name == "pretrain":
            print("step 5: loss 1\nALARM: collapsed at 5\nstep 9: loss 1\nALARM: no better than the mean predictor's")

    monkeypatch.setattr(studies, "call", alarming)
    assert ablate("only=[scratch,asa]", "labelled=[1]")[0] == 0
    notes = [line for line in (tmp_path / "out" / "ablation.md").read_text().splitlines() if "ALARM" in line]
    assert notes == ["- pretrained_seed0_asa: ALARM: no better than the mean predictor's"]


def test_one_that_is_asked_to_stop_leaves_with_the_code_that_says_so_and_a_table(
    ablate, recorded, tmp_path: Path
) -> None:
    _, broken = recorded
    broken["finetune seed0_1_spe"] = Stopped("stopped at step 1 of 2")
    code, _, err = ablate("only=[scratch,spe,asa]")
    assert code == RESUME_CODE and "the same command goes on" in err
    assert "scratch" in (tmp_path / "out" / "ablation.md").read_text()
    assert not list((tmp_path / "out" / "evaluations").glob("*asa"))


def test_a_folder_takes_more_runs_and_no_other_settings(ablate, recorded) -> None:
    assert ablate("only=[scratch]")[0] == 0
    assert ablate("only=[scratch,spe]", "labelled=[1,2]", "seeds=[0,1]")[0] == 0
    code, _, err = ablate("only=[scratch]", "policy=asa_paper")
    assert code == 1 and "another policy: choose another out=" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("only=[nope]", "no arm 'nope'; there are scratch, mae"),
        ("labelled=[9]", "data.labelled=9, but the split has 3 training subjects"),
        ("seeds=[]", "seeds=[]: give a list"),
        ("split.test=0", "no test subjects"),
        ("store=null", "store has to be given, or prepare"),
        ("+prepare.out=x", "prepare.out is set by asa-ablate"),
        ("+finetune.init=x", "finetune.init is set by asa-ablate"),
        ("+arms.mine={pretrain: null}", "arms.mine needs pretrain"),
        ("+arms.mine={pretrain: {}, finetune: {init: x}}", "arms.mine.finetune.init is set by asa-ablate"),
        (
            "+arms.mine={pretrain: null, finetune: {train.seed: 3}}",
            "arms.mine.finetune.train.seed is set by asa-ablate",
        ),
        ("+arms.mine={pretrain: {data.store: x}, finetune: {}}", "arms.mine.pretrain.data.store is set by asa-ablate"),
    ],
)
def test_wrong_settings_are_one_line_before_anything_is_run(
    ablate, recorded, tmp_path: Path, override: str, message: str
) -> None:
    code, _, err = ablate(override)
    assert code == 1 and message in err and len(err.splitlines()) == 1
    assert recorded[0]("finetune") == [] and not (tmp_path / "out").exists()


def test_an_arm_without_a_pretraining_may_bring_an_encoder(ablate, recorded) -> None:
    calls_of, _ = recorded
    assert ablate("+arms.mine={pretrain: null, finetune: {init: 'asa://tiny-t1'}}", "only=[scratch,mine]")[0] == 0
    assert [flat.get("init") for flat in calls_of("finetune")] == [None, "asa://tiny-t1"]


def test_an_ablation_is_continued_from_another_directory(
    ablate, recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_of, _ = recorded
    monkeypatch.chdir(tmp_path)
    assert ablate("only=[asa]", "out=elsewhere")[0] == 0
    (flat,) = calls_of("finetune")
    assert Path(flat["init"]).is_absolute() and Path(flat["data.split_file"]).is_absolute()


def test_arms_of_any_method_and_network_reach_the_commands(ablate, recorded) -> None:
    calls_of, _ = recorded
    arms = {
        "jigsaw": {"pretrain": {"method": "jigsaw", "model": "puzzle_tiny"}, "finetune": {"model.position": "raster"}},
        "tokens": {"pretrain": None, "finetune": {"model": "vit_seg_tiny", "method": "regions"}},
        "swin": {
            "pretrain": {"method": "sa_swin", "model": "sa_swin_tiny", "data.health": "healthy"},
            "finetune": {"model": "sa_swin_unet_tiny", "optim.lr": 0.5},
        },
    }
    own = [*as_overrides("ablate", {"+arms": arms}), "finetune={crop: 32}", "pretrain={crop: 32}"]
    code, _, err = ablate(*own, f"only=[{','.join(arms)}]")
    assert code == 0, err
    pretrained = [configure("pretrain", flat)["method"] for flat in calls_of("pretrain")]
    assert [method["_target_"].rpartition(".")[2] for method in pretrained] == [
        "PuzzlePretraining",
        "SASwinPretraining",
    ]
    tuned = [configure("finetune", flat) for flat in calls_of("finetune")]
    assert [config["model"]["_target_"].rpartition(".")[2] for config in tuned] == [
        "unet_tiny",
        "vit_seg_tiny",
        "sa_swin_unet_tiny",
    ]
    assert [bool(config["init"]) for config in tuned] == [True, False, True] and tuned[2]["optim"]["lr"] == 0.5
    assert tuned[1]["method"]["_target_"].endswith("RegionSegmentation")


# --- without a store


def test_without_a_store_one_is_made_once_and_all_runs_take_it(
    ablate, recorded, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_of, broken = recorded
    fake = studies.call

    def prepare(name: str, *settings: dict, config_dir: str | None = None) -> None:
        fake(name, *settings, config_dir=config_dir)
        if name == "prepare" and not (made := tmp_path / "out" / "store").exists():
            made.symlink_to(store)

    monkeypatch.setattr(studies, "call", prepare)
    wanted = ["store=null", "prepare={data: phantom/ibsr, data.subjects: 4}", "only=[scratch,asa]"]
    broken["prepare store"] = ValueError("3 scans failed")
    code, _, err = ablate(*wanted)
    assert code == 1 and "prepare: 3 scans failed" in err and calls_of("finetune") == []
    broken.clear()
    code, out, err = ablate(*wanted)
    assert code == 0, err
    assert f"store: {tmp_path}/out/store" in out
    (_, made) = calls_of("prepare")
    assert (made["data"], made["data.root"], made["data.subjects"]) == ("phantom/ibsr", tmp_path / "out" / "scans", 4)
    stores = {flat["data.store"] for name in ("pretrain", "finetune") for flat in calls_of(name)}
    stores |= {flat["truth"] for flat in calls_of("evaluate")} | {flat["input"] for flat in calls_of("predict")}
    assert stores == {made["out"]} == {tmp_path / "out" / "store"}
    assert ablate(*wanted, "seeds=[0,1]")[0] == 0
    code, _, err = ablate("store=null", "prepare={data: phantom/ibsr, data.subjects: 5}", "only=[scratch]")
    assert code == 1 and "another prepare" in err


def test_the_users_store_is_taken_where_it_is_given(ablate, recorded, store: Path) -> None:
    calls_of, _ = recorded
    assert ablate("prepare={data: phantom/ibsr}", "only=[scratch]")[0] == 0
    assert calls_of("prepare") == [] and {Path(flat["data.store"]) for flat in calls_of("finetune")} == {store}


@pytest.mark.slow
def test_from_a_store_to_a_table_and_a_figure(ablate, tmp_path: Path) -> None:
    code, out, _ = ablate("only=[scratch,asa]")
    assert code == 0 and "| 1 | asa |" in out
    folder = tmp_path / "out"
    with (folder / "ablation.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert {(row["arm"], row["metric"], row["cases_total"]) for row in rows} == {
        (arm, metric, "1") for arm in ("scratch", "asa") for metric in ("dice", "hd95_mm", "nsd_1mm")
    }
    assert (folder / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert "was not trained on any held-out subject" in (folder / "logs" / "seed0_1_asa.txt").read_text()
    again = ablate("only=[scratch,asa]")
    assert again[0] == 0 and again[1].count("done before") == 2


def test_a_classification_is_ablated_over_the_labelled_scans(
    ablate, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few-shot classification in one command, and it can be continued from another folder."""
    (tmp_path / "classes.csv").write_text("subject,class\ns0,sick\ns1,well\ns2,well\ns3,sick\n")
    monkeypatch.chdir(tmp_path)
    wanted = ["policy=classification", "only=[scratch,spe]", "labelled=[2]", "split.test=2", "finetune=null"]
    small = {"+model.embed_dim": 24, "+model.depth": 1, "+model.num_heads": 2}
    finetune = {"finetune": {**TINY, "method": "classify", "model": "asa_classifier_tiny", "crop": 32, **small}}
    code, _, err = ablate(*wanted, *as_overrides("ablate", finetune))
    assert code == 1 and "finetune.data.classes has to be given" in err
    finetune["finetune"]["data.classes"] = "classes.csv"
    code, out, err = ablate(*wanted, *as_overrides("ablate", finetune))
    assert code == 0, out + err
    assert "| labelled | arm | AUC all | Balanced accuracy all |" in out and "| 2 | spe |" in out
    with (tmp_path / "out/evaluations/seed0_2_scratch/scans.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    summary = json.loads((tmp_path / "out/evaluations/seed0_2_scratch/summary.json").read_text())
    assert len(rows) == 2 and {row["class"] for row in rows} <= {"sick", "well"}
    mean = sum(float(row["balanced_accuracy"]) for row in rows) / len(rows)
    assert mean == pytest.approx(summary["balanced_accuracy"])
    monkeypatch.chdir(Path("/"))
    finetune["finetune"]["data.classes"] = str(tmp_path / "classes.csv")
    code, out, err = ablate(*wanted, *as_overrides("ablate", finetune))
    assert code == 0 and out.count("done before") == 2, out + err


def test_experiments_of_the_users_own_folder_reach_the_commands_that_are_called(
    ablate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text("# @package _global_\ntrain: {log_every: 7}\n")
    got: list[dict] = []
    monkeypatch.setattr(studies, "finetune_task", got.append)  # no run comes of it: the prediction finds none
    wanted = ["only=[scratch]", "+finetune.experiment=short"]
    code, out, _ = ablate(*wanted, "--config-dir", str(tmp_path / "mine"))
    assert code == 1 and "no checkpoint here" in out and got[0]["train"]["log_every"] == 7
    code, out, _ = ablate(*wanted)
    assert code == 1 and "experiment=short: there is no such choice" in out and len(got) == 1


def test_settings_of_the_runs_are_checked_as_on_their_command_lines() -> None:
    with pytest.raises(ValueError, match="unknown key train.stepz"):
        studies.call("finetune", {"out": "x", "data.store": "y", "train.stepz": 1})
