"""asa-simulate: degraded partners of clean images, by simulation."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from asa.cli.front import Config, run_command

KINDS = ("ct", "pet", "sr")


def simulate(config: Config) -> None:
    """Write low/, high/ and simulated.json.

    Raises:
        ValueError: settings or images that do not fit; the message names them.
    """
    from asa.data.files import write_json
    from asa.data.loader import sample_seed
    from asa.data.picture import list_pictures, read_picture, write_picture

    out, window = Path(str(config["out"])), config["window"]
    kind = config["kind"]
    degrade = _degradation(config)
    for id, path in tqdm(list_pictures(config["input"]).items(), desc="simulate", unit="image"):
        clean = read_picture(path, window)
        if kind != "sr" and len(clean) != 1:
            raise ValueError(f"{path}: kind={kind} takes grey images")
        if kind == "sr":  # cut to whole blocks
            clean = clean[:, : clean.shape[1] // config["factor"] * config["factor"]]
            clean = clean[:, :, : clean.shape[2] // config["factor"] * config["factor"]]
        low = degrade(clean, np.random.default_rng(sample_seed(config["seed"], id)))
        write_picture(out / "high" / f"{id}.png", clean)
        write_picture(out / "low" / f"{id}.png", low)
    write_json(out / "simulated.json", {key: value for key, value in config.items() if key not in ("input", "out")})
    print(f"wrote simulated pairs to {out}")


def _degradation(config: Config) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """An image `(C, H, W)` in [0, 1] -> its degraded one."""
    from asa.data.simulate import decimated, low_count_pet, low_dose_ct

    kind, window = config["kind"], config["window"]
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "sr":
        if config["factor"] not in (2, 4):
            raise ValueError(f"factor={config['factor']}: super-resolution is by 2 or 4")
        return lambda image, _: decimated(image, config["factor"], blur=config["blur"])
    if kind == "pet":
        return lambda image, generator: low_count_pet(image[0], generator, counts=config["counts"])[None]
    if window is None:
        raise ValueError("kind=ct computes in HU: say which HU become 0 and 1, like window=[-1000,1000]")
    low, high = window

    def ct(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        noisy = low_dose_ct(image[0] * (high - low) + low, generator, photons=config["photons"], pixel=config["pixel"])
        return ((noisy - low) / (high - low))[None]

    return ct


def main() -> int:
    """Entry point."""
    return run_command("simulate", "Make degraded partners of clean images by simulation.", simulate)


if __name__ == "__main__":
    sys.exit(main())
