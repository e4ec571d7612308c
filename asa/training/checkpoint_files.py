"""Where the files of a checkpoint are: in a run, in a folder of its own, or on the Hub. Without torch.

`hf://ORG/NAME[@REVISION]` on the Hugging Face Hub is a folder of the local cache; `asa://NAME` is one that this package
brings. Only weights and digests are fetched, so that nothing in a repository can run code. They are placed where the
library of the Hub would place them (https://huggingface.co/docs/huggingface_hub/guides/manage-cache), but fetched here:
the library takes names of files from what a server answers, and a server can answer with any path.
"""

import functools
import re
from pathlib import Path
from typing import Any

from asa.data.io.files import DIGESTS, whole_file, write_whole
from asa.errors import one_line, require

# A Path has one slash. The revision names a file of the cache, so it must not lead out of it.
_REFERENCE = re.compile(r"hf:/{1,2}(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
PATIENCE = 30.0  # seconds for an answer

WEIGHTS, TRAINING = "model.safetensors", "training.pt"
NEWEST, BEST = "checkpoints", "best"  # folders of a run
SHIPPED_PREFIX = "asa://"
SHIPPED = Path(__file__).parents[1] / "encoders"


def list_checkpoints(run: Path, folder: str = NEWEST) -> list[Path]:
    """The run's checkpoints in one of its folders, oldest first."""
    return sorted((run / folder).glob("step-*"))


def shipped() -> list[str]:
    """Names of the encoders that the package brings, each a folder as asa-export format=hub writes it: `asa://NAME`."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{WEIGHTS}"))


def is_shipped(path: str | Path) -> bool:
    """Whether a path is the name of an encoder that the package brings."""
    return str(path).startswith("asa:/")  # a Path has one slash


def find_weights(path: str | Path) -> Path:
    """The weights file of a path: the file itself, that of a checkpoint folder, or the newest of a run or of RUN/best.

    Those of the Hub are fetched, with their digests, see `fetch`. A FileNotFoundError for none, or one in each fold.
    """
    if on_hub(path):
        return fetch(str(path), WEIGHTS, DIGESTS) / WEIGHTS
    if is_shipped(path):
        name = str(path).removeprefix("asa:").lstrip("/")
        if name not in shipped():
            offered = ", ".join(SHIPPED_PREFIX + one for one in shipped())
            raise FileNotFoundError(f"{path}: not in this package; it has {offered}")
        return SHIPPED / name / WEIGHTS
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if found := list_checkpoints(path) or list_checkpoints(path, "."):
        return found[-1] / WEIGHTS
    found = [fold for fold in path.glob("fold*") if list_checkpoints(fold)]
    if folds := ",".join(sorted(map(str, found), key=lambda fold: (len(fold), fold))):
        advice = f"give asa-predict checkpoint=[{folds}], and other commands one of them"
        raise FileNotFoundError(f"{path}: a cross-validation, with a network in each fold: {advice}")
    advice = "a run folder (or its best/, which exists with train.best), a checkpoint folder or a .safetensors file"
    raise FileNotFoundError(f"{path}: no checkpoint here; give {advice}")


def on_hub(path: str | Path) -> bool:
    """Whether a path is a reference to the Hub."""
    return str(path).startswith("hf:/")


@functools.cache
def fetch(reference: str, *files: str) -> Path:
    """The folder of the cache that holds files of a repository, which are fetched unless they are there.

    A process fetches a reference once, so that everything it reads is of one revision. A ValueError for what is no
    reference, a repository without one of the files, or a server that is not the Hub; a FileNotFoundError if neither
    the Hub nor a copy in the cache has it; an OSError for another failure; an ImportError without the extra `hub`.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference}: give hf://ORG/NAME, or hf://ORG/NAME@REVISION (a branch, tag or commit)")
    hub = require("huggingface_hub", "hub", "a checkpoint hf://...")
    errors = require("huggingface_hub.errors", "hub", "a checkpoint hf://...")
    repository, revision = match["repository"], match["revision"] or "main"
    try:
        about = hub.HfApi().model_info(repository, revision=revision, timeout=PATIENCE)
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{reference}: the model has no revision {revision}") from None
    except errors.RepositoryNotFoundError:  # the Hub answers the same about private ones
        absent = "no such model on the Hub, or a private or gated one: check the name, or run hf auth login"
        raise FileNotFoundError(f"{reference}: {absent}") from None
    except Exception as error:  # of the HTTP library, which is not the same in all versions
        cached = [hub.try_to_load_from_cache(repository, name, revision=revision) for name in files]
        if not all(isinstance(path, str) for path in cached):
            raise FileNotFoundError(_unreachable(hub, reference, repository, error)) from None
        return Path(cached[0]).parent
    if missing := sorted(set(files) - {file.rfilename for file in about.siblings or ()}):
        raise ValueError(f"{reference}: has no {missing[0]}: not a folder that asa-export format=hub wrote")
    if not _COMMIT.fullmatch(str(about.sha)):
        raise ValueError(f"{reference}: the server names the commit {str(about.sha)[:80]!r}: it is not the Hub")
    cache = Path(hub.constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    folder = cache / "snapshots" / about.sha
    try:
        for name in files:
            if not (folder / name).is_file():
                with whole_file(folder / name) as file:
                    url, headers = hub.hf_hub_url(repository, name, revision=about.sha), hub.utils.build_hf_headers()
                    hub.file_download.http_get(url, file, headers=headers, displayed_filename=name)
        if revision != about.sha:
            write_whole(cache / "refs" / revision, about.sha.encode())
    except Exception as error:
        raise OSError(f"{reference}: could not be fetched ({type(error).__name__}: {one_line(error)})") from None
    return folder


def _unreachable(hub: Any, reference: str, repository: str, error: BaseException) -> str:
    """What to do without a network, and what the cache holds."""
    cache, offline = hub.constants.HF_HUB_CACHE, hub.constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be reached ({one_line(error.__cause__ or error)})"
    try:
        repos = [repo for repo in hub.scan_cache_dir().repos if repo.repo_id == repository]
    except hub.errors.CacheNotFound:
        repos = []
    cached = sorted(name for repo in repos for one in repo.revisions for name in (*one.refs, one.commit_hash))
    held = f"holds only the revisions {', '.join(cached)}" if cached else "does not hold it"
    connect = "unset HF_HUB_OFFLINE" if offline else "connect to the network"
    elsewhere = f"run hf download {repository} on another machine and give the path of that folder"
    advice = f"{connect}, or {elsewhere}, or set HF_HOME to a cache that has it"
    return f"{reference}: {why}, and the cache {cache} {held}: {advice}"
