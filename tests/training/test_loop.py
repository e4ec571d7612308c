"""Laws of the training loop, in one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import make_loader
from asa.data.store import Store
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import asa_tiny
from asa.settings import LoaderSettings, OptimSettings, TrainSettings
from asa.training import checkpoint as checkpoint_module
from asa.training import loop
from asa.training.checkpoint import load_encoder, load_model, read_weights, save_checkpoint
from asa.training.checkpoint_files import list_checkpoints
from asa.training.device import deterministic, pick_device, pick_precision
from asa.training.loop import train
from asa.training.optim import Schedule, make_optimizer

MODEL = {
    "_target_": "asa.models.masked_autoencoder.asa_tiny",
    "img_size": 32,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}
OPTIM = OptimSettings(lr=1e-3, warmup=1)


CHEAPER = {"decode": 0.25, "air": "drop", "masks": 2, "normalise": True}


def run(
    folder: Path,
    store: Path,
    steps: int = 6,
    workers: int = 0,
    own: dict | None = None,
    optim: OptimSettings = OPTIM,
    **settings: object,
) -> dict[str, float]:
    """Train a tiny autoencoder on four scans, with settings of the method's own."""
    torch.manual_seed(0)
    opened = Store(store)
    method = MaskedPretraining(model=asa_tiny(**{k: v for k, v in MODEL.items() if k != "_target_"}), **(own or {}))
    chosen = TrainSettings(**{**dict(steps=steps, batch_size=4, log_every=1, save_every=2, device="cpu"), **settings})
    folder.mkdir(exist_ok=True)
    dataset = CropDataset(opened, opened.records, (32, 32, 32), crop="random", air=8, seed=chosen.seed)
    loader = LoaderSettings(workers=workers)
    return train(method, dataset, folder, settings=chosen, optim=optim, loader=loader, description={"model": MODEL})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(folder)[-1] / "model.safetensors")


def log(folder: Path, *keys: str) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Stopped(Exception):
    """Raised to stop a run."""


@pytest.mark.parametrize(
    ("workers", "stop", "own"),
    [
        (0, 3, {}),
        (0, 5, {}),
        (2, 3, {}),
        (2, 5, {}),
        (0, 3, {"own": CHEAPER}),
        (0, 3, {"optim": OptimSettings(lr=1e-3, freeze=["encoder"], freeze_until=3)}),
        (0, 5, {"optim": OptimSettings(lr=1e-3, freeze=["encoder"], freeze_until=3)}),
    ],
)
def test_stopped_and_resumed_equals_never_stopped_to_the_bit(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, stop: int, own: dict
) -> None:
    run(tmp_path / "whole", store, **own)
    original = MaskedPretraining.forward
    calls = []

    def failing(self, batch):
        calls.append(1)
        if len(calls) > stop:
            raise Stopped
        return original(self, batch)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(MaskedPretraining, "forward", failing)
        run(tmp_path / "cut", store, workers=workers, **own)
    assert len(list_checkpoints(tmp_path / "cut")) == stop // 2
    run(tmp_path / "cut", store, workers=workers, **own)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    keys = ("step", "loss", "lr", "gradient_norm")
    assert log(tmp_path / "cut", *keys) == log(tmp_path / "whole", *keys)


def test_a_method_is_told_what_fraction_of_the_steps_is_done_also_after_a_resume(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(MaskedPretraining, "progress", lambda self, done: told.append(done), raising=False)
    run(tmp_path / "run", store, steps=2)
    assert told == [0, 1 / 2]
    told.clear()
    run(tmp_path / "run", store, steps=5)
    assert told == [2 / 5, 3 / 5, 4 / 5]


def test_what_is_frozen_until_a_step_is_trained_from_there_on(store: Path, tmp_path: Path) -> None:
    optim = OptimSettings(lr=1e-3, schedule="constant", freeze=["encoder"], freeze_until=4)
    run(tmp_path, store, optim=optim, keep=9)
    first, second, third = (load_file(path / "model.safetensors") for path in list_checkpoints(tmp_path))
    encoder = [name for name in first if ".encoder." in name]
    assert encoder and all(torch.equal(first[name], second[name]) for name in encoder)
    assert not any(torch.equal(second[name], third[name]) for name in encoder if name.endswith("weight"))
    assert not any(torch.equal(first[name], second[name]) for name in first.keys() - set(encoder) if "weight" in name)


@pytest.mark.parametrize("own", [{}, CHEAPER])
def test_gradient_accumulation_equals_the_whole_batch(store: Path, tmp_path: Path, own: dict) -> None:
    run(tmp_path / "one", store, own=own)
    run(tmp_path / "two", store, own=own, accumulate=2)
    run(tmp_path / "four", store, own=own, accumulate=4)
    one = np.array(log(tmp_path / "one", "loss", "masked_mse", "gradient_norm"))
    for other in ("two", "four"):
        np.testing.assert_allclose(
            np.array(log(tmp_path / other, "loss", "masked_mse", "gradient_norm")), one, rtol=1e-5
        )


def test_a_run_is_the_loop_of_the_textbook(store: Path, tmp_path: Path) -> None:
    optim = OptimSettings(lr=1e-3, schedule="poly", warmup=2, weight_decay=0)
    settings = TrainSettings(steps=5, batch_size=4, clip=0.05, log_every=1, device="cpu", precision="fp32")
    opened, loader = Store(store), LoaderSettings(workers=0)
    dataset = CropDataset(opened, opened.records, (32, 32, 32), crop="random", seed=settings.seed)
    size = {key: value for key, value in MODEL.items() if key != "_target_"}
    torch.manual_seed(0)
    ours, method = (MaskedPretraining(model=asa_tiny(**size)) for _ in range(2))
    ours.load_state_dict(method.state_dict())
    tmp_path.joinpath("run").mkdir()
    train(ours, dataset, tmp_path / "run", settings=settings, optim=optim, loader=loader, description={"model": MODEL})

    optimizer = torch.optim.AdamW(method.parameters(), lr=1, betas=tuple(optim.betas), weight_decay=0)
    rates, expected = Schedule(optim, settings.steps, settings.batch_size), []
    batches = make_loader(dataset, settings.batch_size, loader, micro_batches=1, start_step=0, rank=0, world_size=1)
    for step, batch in zip(range(settings.steps), batches, strict=False):
        optimizer.param_groups[0]["lr"] = rates[step]
        loss = method(batch)["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(method.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item(), rates[step]))
    assert all(norm > settings.clip for _, norm, _ in expected)
    np.testing.assert_allclose(log(tmp_path / "run", "loss", "gradient_norm", "lr"), expected, rtol=1e-4)
    for name, weight in method.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


def test_the_newest_checkpoints_are_kept_and_rebuild_the_model(store: Path, tmp_path: Path) -> None:
    run(tmp_path, store)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000006"]
    model, found = load_model(tmp_path), weights(tmp_path)
    assert not model.training
    assert_same({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, found)
    encoder = load_encoder(list_checkpoints(tmp_path)[-1] / "model.safetensors")
    assert_same(dict(encoder.state_dict()), dict(model.encoder.state_dict()))
    assert read_weights(tmp_path)[1]["step"] == 6


def test_a_save_that_fails_leaves_the_previous_checkpoint_intact(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no space left")

    run(tmp_path, store, steps=2)
    before = weights(tmp_path)
    monkeypatch.setattr(checkpoint_module.torch, "save", broken)
    with pytest.raises(OSError, match="no space left.*step-00000002"):
        save_checkpoint(tmp_path, 4, nn.Linear(2, 2), {"model": {}}, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert_same(before, weights(tmp_path))


def test_time_triggers_checkpoints_too(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_MINUTES", 0)
    run(tmp_path, store, steps=3, save_every=100, keep=9)
    assert len(list_checkpoints(tmp_path)) == 3


def test_the_log_contains_losses_rates_and_timing(store: Path, tmp_path: Path) -> None:
    run(tmp_path, store, steps=2)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    errors = {"loss", "mean_predictor_loss", "masked_mse", "mean_predictor_mse"}
    assert errors | {"lr", "gradient_norm", "volumes_per_second", "data_wait"} <= line.keys()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_bf16_losses_stay_close_to_fp32(store: Path, tmp_path: Path) -> None:
    run(tmp_path / "fp32", store, steps=4)
    run(tmp_path / "bf16", store, steps=4, precision="bf16")
    full, half = (np.array(log(tmp_path / name, "loss"))[:, 0] for name in ("fp32", "bf16"))
    np.testing.assert_allclose(half, full, rtol=0.02)


def test_a_malicious_checkpoint_is_refused(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    shell = {"_target_": "subprocess.getoutput", "cmd": f"touch {owned}"}
    write = {"_target_": "asa.data.io.files.write_json", "path": str(owned), "content": 1}
    nested = {"_target_": "asa.models.masked_autoencoder.asa_tiny", "img_size": write}
    for k, description in enumerate([{"model": shell, "plugins": ["subprocess"]}, {"model": write}, {"model": nested}]):
        save_checkpoint(tmp_path / str(k), 1, nn.Linear(2, 2), description, {}, keep=1)
        with pytest.raises(ValueError, match="not allowed"):
            load_model(tmp_path / str(k))
    assert not owned.exists()


def test_files_that_are_not_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        load_model(tmp_path / "absent")
    (tmp_path / "x.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_model(tmp_path / "x.safetensors")


def test_schedules_follow_their_formulas() -> None:
    cosine = Schedule(OptimSettings(lr=1.0, warmup=10, warmup_lr=0.1, final_lr=0.2), 110, 8)
    assert cosine[0] == pytest.approx(0.1) and cosine[5] == pytest.approx(0.55)
    assert cosine[10] == pytest.approx(1.0) and cosine[60] == pytest.approx(0.6) and cosine[110] == pytest.approx(0.2)
    poly = Schedule(OptimSettings(lr=0.01, schedule="poly"), 100, 2)
    assert poly[0] == pytest.approx(0.01) and poly[50] == pytest.approx(0.01 * 0.5**0.9)
    scaled = Schedule(OptimSettings(lr=1.5e-4, reference_batch=256, schedule="constant"), 10, 96)
    assert scaled[3] == pytest.approx(1.5e-4 * 96 / 256)
    with pytest.raises(ValueError, match="optim.warmup=10"):
        Schedule(OptimSettings(warmup=10), 10, 1)
    for total, steps in ((20000, 500), (20, 0), (1, 0), (400, 10)):
        fraction, number = (Schedule(OptimSettings(warmup=warmup), total, 1) for warmup in (0.025, steps))
        assert [fraction[step] for step in range(min(total, 600))] == [number[step] for step in range(min(total, 600))]
    with pytest.raises(ValueError, match=r"optim.warmup=2.5: give whole steps, or a fraction"):
        OptimSettings(warmup=2.5)
    with pytest.raises(ValueError, match="optim.schedule"):
        Schedule(OptimSettings(schedule="step"), 10, 1)


def test_weight_decay_is_not_applied_to_biases_norms_and_tokens() -> None:
    model = MaskedPretraining(model=asa_tiny(img_size=16))
    optimizer = make_optimizer(model, OptimSettings(weight_decay=0.1))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[1]["weight_decay"] == 0.0
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names and all(name.endswith("weight") and "norm" not in name for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_invalid_settings_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision is auto"):
        pick_precision("fp8", torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a GPU"):
        pick_precision("fp16", torch.device("cpu"))
    assert pick_precision("auto", torch.device("cpu")) == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            pick_device("cuda")
    with pytest.raises(ValueError, match="optim.name"):
        make_optimizer(nn.Linear(2, 2), OptimSettings(name="lion"))
    with pytest.raises(ValueError, match="does not divide"):
        run(tmp_path, store, accumulate=3)


def test_deterministic_kernels_give_the_same_run_and_are_switched_off_afterwards(store: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", store), run(tmp_path / "b", store, deterministic=True)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    with (
        pytest.raises(ValueError, match="train.deterministic=true: put_ has no deterministic kernel"),
        deterministic(True),
    ):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set ...")
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="out of memory"), deterministic(True):
        raise RuntimeError("out of memory")
