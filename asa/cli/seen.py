"""What is said of held-out subjects that an encoder has seen in pretraining."""

from asa.data.identity import Seen
from asa.engine.summary import listed


def seen_report(seen: list[Seen] | None, init: str) -> list[str]:
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


def _listed_by_part(seen: list[Seen]) -> str:
    parts = dict.fromkeys(one.part for one in seen)
    return "; ".join(f"{part}: {listed([one.subject for one in seen if one.part == part], 5)}" for part in parts)
