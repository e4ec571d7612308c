"""What a fine-tuning starts from, and what is said of held-out subjects that this has seen in pretraining."""

from collections.abc import Mapping, Sequence
from typing import Any

from asa.cli.front import Config
from asa.data.leakage import LeakedSubject, TrainingDigests, find_leaks, stored_digests, training_digests
from asa.data.store import Store
from asa.evaluation.summary import listed
from asa.models.swin import Swin
from asa.training.pretrained import Source, start_from, start_sides

Opened = tuple[Source, dict[str, Any]]  # of asa.training.pretrained.read_source


def loaded(config: Config, opened: Opened, model: Any, *, explain: bool = False) -> str:
    """Load `init` into a network, or with `explain` only say what would happen to each tensor; what to print."""
    source, origin = opened
    if isinstance(model.encoder, Swin):
        return start_sides(config["init"], source, origin, model, config["model"])
    return start_from(config["init"], source, origin, model.encoder, config["model"], explain=explain)


def start(
    config: Config,
    opened: Opened | None,
    model: Any,
    records: Sequence[dict[str, Any]],
    store: Store,
    split: Mapping[str, Sequence[str]],
) -> tuple[TrainingDigests | None, list[LeakedSubject] | None]:
    """Load what a run starts from, and print what came of it.

    Args:
        config: the command's, with `init` and `model`.
        opened: what `init` names; None: from scratch.
        model: the network, which is changed in place.
        records: of the training part.
        store, split: whose held-out subjects are looked for.

    Returns:
        On which scans the network is trained in the end, and the held-out subjects that it has seen; None where that
        is not known, or from scratch nothing was seen.
    """
    if opened is None:
        return training_digests(records), None
    print(loaded(config, opened, model))
    before = stored_digests(opened[1].get("data", {}))
    seen = find_leaks(store.records, split, before) if before else None
    print("\n".join(seen_report(seen, config["init"])))
    return training_digests(records, before) if before else None, seen


def seen_report(seen: list[LeakedSubject] | None, init: str) -> list[str]:
    """Lines on the held-out subjects that the encoder of `init` was trained on; None: it does not say on which."""
    if seen is None:
        return [
            f"{init} does not say which scans it was trained on: whether it has seen held-out subjects is not checked"
        ]
    if not seen:
        return [f"{init} was not trained on any held-out subject"]
    lines = []
    if scans := [one for one in seen if one.match == "scan"]:
        lines.append(
            f"warning: {init} was trained on scans of {len(scans)} held-out subjects ({_listed_by_part(scans)}): "
            "pretrain with them held out (data.split_file), or read their scores as optimistic"
        )
    if names := [one for one in seen if one.match == "name"]:
        lines.append(
            f"note: {init} was trained on other scans of {len(names)} subjects with names of held-out ones "
            f"({_listed_by_part(names)}): if they are the same people, pretrain with them held out (data.split_file)"
        )
    return lines


def _listed_by_part(seen: list[LeakedSubject]) -> str:
    parts = dict.fromkeys(one.part for one in seen)
    return "; ".join(f"{part}: {listed([one.subject for one in seen if one.part == part], 5)}" for part in parts)
