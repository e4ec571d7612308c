"""What the commands that train have in common."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from asa.cli.front import Config, open_run
from asa.cli.planning import preflight, show_plan, wants_plan
from asa.config import build, typed
from asa.data.files import write_json
from asa.data.identity import Seen
from asa.data.loader import LoaderSettings, Samples
from asa.engine.distributed import is_main
from asa.engine.optim import OptimSettings
from asa.engine.train import TrainSettings, Validate, check_settings, train


class Job:
    """The training that a configuration describes, or the plan of it.

    Raises:
        ValueError: settings that do not fit each other, or this machine if training is not only planned.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings, self.optim = typed(TrainSettings, config["train"]), typed(OptimSettings, config["optim"])
        self.loader = typed(LoaderSettings, config["loader"])
        self.planning = wants_plan(config)
        if not self.planning:  # a plan may be for another machine
            check_settings(self.settings, self.optim)

    def make(self) -> Any:
        """The method."""
        return build(self.config["method"], plugins=self.config["plugins"])

    def planned(self, scans: int, *, labelled: bool, **kind: Any) -> bool:
        """Whether only the plan is asked for, which is printed then; else say whether a step will fit on the GPU.

        Args:
            scans: in the training part.
            labelled: batches have labels.
            kind: of the samples, where they are no crops of volumes (see `show_plan`).
        """
        if self.planning:
            show_plan(self.config, self.make, scans, self.settings, self.optim, labelled=labelled, **kind)
        else:
            preflight(self.make, self.settings, self.optim, labelled=labelled, example=kind.get("example"))
        return self.planning

    def method(self, scans: int, *, labelled: bool) -> Any | None:
        """The method with its first weights; None if only the plan was asked for (see `planned`)."""
        if self.planned(scans, labelled=labelled):
            return None
        torch.manual_seed(self.settings.seed)
        return self.make()

    @contextmanager
    def run(self, split: Mapping[str, Sequence[str]], seen: list[Seen] | None = None) -> Iterator[Path]:
        """The run folder, locked (see `open_run`), with the held-out subjects that `init` has seen written down."""
        with open_run(self.config, split, self.settings) as run:
            if seen is not None and is_main():
                write_json(run / "seen.json", {"init": self.config["init"], "seen": [asdict(one) for one in seen]})
            yield run

    def train(
        self,
        run: Path,
        method: Any,
        dataset: Samples,
        data: Mapping[str, Any],
        validate: Validate | None = None,
    ) -> dict[str, float]:
        """Train in the run folder; `data` is what checkpoints say of the data. See `asa.engine.train.train`."""
        return train(
            method,
            dataset,
            run,
            settings=self.settings,
            optim=self.optim,
            loader=self.loader,
            description={"model": self.config["model"], "data": data},
            validate=validate,
        )
