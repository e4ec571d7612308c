"""Simulate degraded images from clean ones, as pairs for restoration."""

import sys
from functools import partial
from pathlib import Path

from asa.cli.front import Config, run_command

PHYSICS = ("window", "photons", "pixel", "counts", "factor", "blur")


def simulate(config: Config) -> None:
    """Write low/, high/ and simulated.json.

    Raises:
        ValueError: images failed; they are listed first, and the others are written.
    """
    from asa.data.io.files import write_json
    from asa.data.restoration.simulation import simulate_folder

    kind, seed, out = config["kind"], config["seed"], Path(str(config["out"]))
    physics = {key: config[key] for key in PHYSICS}
    multiple = config["factor"] if kind == "sr" else 1
    count, failures = simulate_folder(
        config["input"], out, kind, multiple=multiple, seed=seed, workers=config["workers"], **physics
    )
    write_json(out / "simulated.json", {"kind": kind, **physics, "seed": seed})
    for id, reason in sorted(failures.items()):
        print(f"{id}: failed: {reason}")
    if failures:
        raise ValueError(f"{len(failures)} images failed, listed above")
    print(f"wrote {count} simulated pairs to {out}")


main = partial(run_command, "simulate", __doc__, simulate)

if __name__ == "__main__":
    sys.exit(main())
