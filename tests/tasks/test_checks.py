"""What is said about wrong settings and paths before torch is imported, and how little that costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from asa.cli import COMMANDS
from asa.config import compose
from asa.tasks.checks import CHECKS, check

HERE = "checkpoint=. input=. out=o"
# What is typed, and a part of what is said.
WRONG = [
    ("pretrain data.store=nowhere out=o", "nowhere: no prepared store here"),
    ("pretrain out=o", "data.store has to be given"),
    ("finetune data.store=nowhere out=o", "nowhere: no prepared store here"),
    ("finetune data.store=nowhere out=o train.steps=0", "train.steps=0: must be 1 or more"),
    ("finetune data.store=nowhere out=o train.device=gpu", "train.device=gpu: not a device"),
    ("finetune data.store=nowhere out=o predict.precision=fp8", "predict.precision=fp8: choose auto, fp32"),
    ("finetune data.store=nowhere out=o predict.batch_size=0", "predict.batch_size=0: "),
    ("finetune data.store=nowhere out=o augment.mirror_axes=X", "augment.mirror_axes=X: name axes"),
    ("pretrain data.store={store} out=o crop=[32,32]", "crop=[32,32]: give the edge in voxels, like 64, or three"),
    ("finetune data.store={store} out=o plan=maybe", "plan=maybe: choose only, or null"),
    ("finetune data.store={store} out=o data.split=null", "data.split=null: it is a group of settings"),
    ("finetune data.store={store} out=o transfer=no", "transfer=no: choose load or explain"),
    ("finetune data.store={store} out=o data.split.fold=all", "fold=all needs the number of folds: add"),
    ("finetune data.store={store} out=o policy=ibsrr", "policy=ibsrr: choose ibsr, "),
    ("finetune method=restore data.root=nowhere out=o", "nowhere: no such folder"),
    ("predict checkpoint=. input=nowhere out=o", "nowhere: no such file or folder"),
    ("predict checkpoint=nowhere input=. out=o", "nowhere: no checkpoint here"),
    ("predict atlas=nowhere input=. out=o", "nowhere: no prepared store here"),
    ("predict checkpoint=. input=. out={store}/manifest.json", "manifest.json is a file: out="),
    ("evaluate predictions=. truth=. out={store}/manifest.json/x", "manifest.json is a file: out="),
    ("export checkpoint=. out={store}/manifest.json/x.onnx", "manifest.json is a file: out="),
    (f"predict layout=tree {HERE}", "layout=tree: choose bids or mgz, or null for OUT/ID.nii.gz"),
    ("predict layout=mgz checkpoint=nowhere input=. out=o", "nowhere: no checkpoint here"),
    (f"predict mirror=X {HERE}", "mirror=X: name axes to mirror"),
    (f"predict uncertainty=x {HERE}", "uncertainty=x: choose entropy or spread, or null"),
    (f"predict part=all {HERE}", "part=all: choose train, validation or test, or null"),
    (f"predict fusion=mean {HERE}", "fusion=mean: choose joint or majority"),
    ("embed checkpoint=. input=nowhere out=o", "nowhere: no such file or folder"),
    (f"predict strip=bet {HERE}", "strip='bet': choose none, deepbet"),
    (f"embed strip=bet {HERE}", "strip='bet': choose none, deepbet"),
    (f"embed device=gpu {HERE}", "device=gpu: not a device"),
    (
        "finetune data.store={store} out=o data.placement=middle",
        "data.placement=middle: choose centre, random or midplane",
    ),
    (f"embed of=halves {HERE}", "of=halves: choose whole, sides or labels"),
    (f"embed part=all {HERE}", "part=all: choose train, validation or test, or null"),
    ("evaluate predictions=nowhere truth=. out=o", "nowhere: no such folder"),
    ("evaluate predictions=. truth=nowhere out=o", "nowhere: no such file or folder; truth= is"),
    ("evaluate predictions=. truth=. out=o policy=dice", "policy=dice: choose ibsr"),
    ("evaluate predictions=. truth=. out=o policy=probe", "column= has to be given"),
    (
        "evaluate predictions=no truth=. out=o policy=probe column=age",
        "no: no such folder; give the one that asa-embed",
    ),
    ("evaluate predictions=. truth=. out=o split_file=s.json", "s.json: no such file"),
    ("evaluate compare=[a,b] out=o", "summary.json: no such file"),
    ("prepare data=bids data.root=nowhere out=o", "nowhere: no such folder"),
    ("prepare data=bids data.root=. out=o workers=two", "workers=two: give 1 or more processes"),
    ("regions input=. out=o workers=0", "workers=0: give 1 or more processes"),
    ("prepare data=bids data.root=. out=o prepare.strip=x", "prepare.strip='x': choose none"),
    ("prepare data=bids data.root=. out=o labels=[1]", "labels: [1] should be values and names"),
    ("prepare data=bids out=o", "data.root has to be given"),
    ("prepare data=bids data.root=. out=o check=no", "check=no: choose only or also, or null"),
    ("prepare data=bids data.root=. out=o executor=slurm", "executor=slurm: choose processes or dask"),
    ("prepare data=bids data.root=. out=o scheduler=tcp://a:1", "executor=dask and scheduler=ADDRESS go together"),
    ("prepare data=bids data.root=. out=o executor=dask scheduler=a workers=2", "workers= is for executor=processes"),
    ("prepare data=bids data.root=. out=o labels=dataset", "labels=dataset: this reader knows no labels"),
    ("prepare data=bids data.root=. out=o labels={1:x} ignored=[1]", "ignored: 1 should be a label value that labels"),
    ("prepare data=bids data.root=. out=o labels={1:x} regions={a:[9]}", "regions: a joins [9]; give values"),
    ("prepare data=bids data.root=. out=o missing=drop", "missing='drop': choose refuse or zero"),
    ("prepare data=bids data.root=. out=o duplicates=drop", "duplicates='drop': choose refuse or keep"),
    ("prepare data=bids data.root=. out=o prepare.nan=drop", "prepare.nan='drop': choose refuse, or zero"),
    ("prepare data=bids data.root=. out=o prepare.midway=2", "prepare.midway=2: choose true or false"),
    ("prepare data=ibsr data.root=. out=o data.label=x", "data.label='x': choose fill, plain, or null"),
    ("prepare data=nnunet data.root=. out=o", "dataset.json: no such file; data.root= is the folder DatasetNNN_NAME"),
    ("prepare data=nnunet data.root=. data.part=all labels={1:x} out=o", "data.part='all': choose train or test"),
    ("ablate out=o", "store has to be given, or prepare"),
    ("ablate store=nowhere out=o", "nowhere: no prepared store here"),
    ("ablate store={store} out=o only=[x]", "only: no arm 'x'; there are scratch"),
    ("ablate store={store} out=o policy=ibsrr", "policy=ibsrr: choose ibsr, "),
    ("export checkpoint=nowhere out=o", "nowhere: no checkpoint here"),
    ("export checkpoint=a out=o format=zip", "format=zip: choose onnx"),
    ("export out=o format=nnunet", "format=nnunet writes a store"),
    ("view input=nowhere out=o.html viewer=x", "nowhere: no such folder"),
    ("view input=. out=page viewer=x", "out=page: the page is one file"),
    ("orient input=nowhere out=o axes=RAS", "nowhere: no such file or folder"),
    ("dicom input=nowhere out=o", "nowhere: no such folder"),
    ("run nowhere out=o strip=none", "nowhere: no such folder"),
    ("run . nowhere out=o", "strip= has to be given"),
    ("run . out=o strip=none plan=yes", "plan=yes: choose only, or null"),
    ("run study.yaml", "study.yaml: no such file"),
    ("regions input=nowhere out=o", "nowhere: no such folder"),
    ("simulate input=nowhere out=o kind=sr", "nowhere: no such folder"),
]


def test_wrong_settings_and_paths_are_said_without_torch(store: Path, tmp_path: Path) -> None:
    there = tmp_path.with_name(f"{tmp_path.name}_store")  # a path without blanks
    there.symlink_to(store)
    code = (
        "import sys\n"
        "from asa.cli import main\n"
        "for line in sys.stdin:\n"
        "    code = main(line.split())\n"
        "    print(code, 'torch' in sys.modules, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(line.replace("{store}", str(there)) for line, _ in WRONG),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    errors = done.stderr.splitlines()
    for (line, expected), said, found in zip(WRONG, errors, done.stdout.splitlines(), strict=True):
        assert expected in said, line
        assert found == "1 False", line
    assert not list(tmp_path.iterdir())
    assert {line.split()[0] for line, _ in WRONG} == COMMANDS.keys() - {"phantom"} and CHECKS.keys() < COMMANDS.keys()


@pytest.mark.parametrize("line", ["predict checkpoint=. input=nowhere out=o", "finetune data.store=nowhere out=o"])
def test_a_wrong_path_costs_less_than_a_second_and_a_half_of_cpu(line: str, tmp_path: Path) -> None:
    code = f"import sys, time; from asa.cli import main; main({line.split()}); print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert float(done.stdout) < 1.5


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("pretrain", ["method=sa_swin", "model=sa_swin_tiny", "data.health=nowhere.csv"]),
        ("finetune", ["method=classify", "model=asa_classifier_tiny", "data.classes=nowhere.csv"]),
        ("finetune", ["method=regress", "model=asa_regressor_tiny", "data.table=nowhere.csv"]),
    ],
)
def test_a_table_that_is_not_there_is_named_with_its_key(command: str, settings: list[str], store: Path) -> None:
    key = next(setting.partition("=")[0] for setting in settings if "nowhere" in setting)
    with pytest.raises(FileNotFoundError, match=rf"nowhere.csv: no such file.*; {key}= is a table \(CSV\)"):
        check(command, compose(command, [f"data.store='{store}'", "out=o", *settings]))


def test_an_input_whose_content_git_annex_has_elsewhere_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to(".git/annex/objects/ab/MD5E-s1--x/MD5E-s1--x")
    for command in ("predict", "embed"):
        with pytest.raises(FileNotFoundError, match=r"a\.nii\.gz: its content is not here.*datalad get"):
            check(command, compose(command, [f"input={tmp_path}/a.nii.gz", "checkpoint=asa://tiny-t1", "out=x"]))
