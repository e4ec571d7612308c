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
from asa.data.io.files import write_json
from asa.data.leakage import LeakedSubject
from asa.data.loading.crops import Samples
from asa.data.loading.loader import LoaderSettings
from asa.training.distributed import is_main
from asa.training.loop import TrainSettings, Validate, check_settings, train
from asa.training.optim import OptimSettings


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

    def method(
        self,
        scans: int,
        *,
        labelled: bool,
        example: Mapping[str, Any] | None = None,
        names: tuple[str, str] = ("volumes", "scans"),
    ) -> Any | None:
        """The method with its first weights; None if only the plan was asked for, which is printed.

        Args:
            scans: in the training part.
            labelled: batches have labels.
            example: see `asa.training.plan.make_plan`.
            names: see `asa.training.plan.plan_report`.
        """

        def make() -> Any:
            return build(self.config["method"], plugins=self.config["plugins"])

        if self.planning:
            show_plan(
                self.config, make, scans, self.settings, self.optim, labelled=labelled, example=example, names=names
            )
            return None
        preflight(make, self.settings, self.optim, labelled=labelled, example=example)
        torch.manual_seed(self.settings.seed)
        return make()

    @contextmanager
    def run(self, split: Mapping[str, Sequence[str]], seen: list[LeakedSubject] | None = None) -> Iterator[Path]:
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
        """Train in the run folder; `data` is what checkpoints say of the data. See `asa.training.loop.train`."""
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
