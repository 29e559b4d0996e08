"""Models from the hub: only the files we read, resumed where a download broke off, and one sentence when it fails."""

from __future__ import annotations

import errno
import re
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import UserError
from .shards import Progress, first_line

# As the hub has them: no two dashes or dots together, none at an end, ASCII, and 96 characters at most.
HUB_ID = re.compile(r"(?!.*(--|\.\.))(?=.{3,96}$)[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
SMALL = ["*.json", "*.json.update", "tokenizer.model", "*.jinja"]
SAFETENSORS = ["*.safetensors"]
BIN = ["pytorch_model*.bin"]
UNREAD = ["*/*", "consolidated*.safetensors"]  # folders, and the whole model once more in its makers' own form


def is_hub_id(model: str) -> bool:
    """Whether a text has the form owner/name."""
    return HUB_ID.fullmatch(model) is not None and not model.endswith(".git")


def cached(hub_id: str) -> Path | None:
    """The folder of an earlier complete download, without asking the network; None when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):  # ValueError: an id that the client does not take
        return None
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    """Whether all we read is there. A broken-off download may lack the index that names its shards, so their own names
    are asked too: of `-00001-of-00003` there must be three."""
    from .shards import TensorFolder

    try:
        shards = TensorFolder.find(folder)[1]
    except UserError:
        return False
    for shard in shards:
        if part := NUMBERED.fullmatch(shard):
            stem, _, count, ending = part.groups()
            if not all((folder / f"{stem}-{n:05}-of-{count}{ending}").exists() for n in range(1, int(count) + 1)):
                return False
    return all((folder / name).exists() for name in ("config.json", "tokenizer.json"))


def download(hub_id: str, on_progress: Progress | None = None) -> Path:
    """Download (or find already downloaded) the configuration, tokenizer and weights of a hub model.

    Safetensors are preferred; `.bin` shards are taken only where there are none. A broken download resumes.
    `on_progress(done, total)` counts bytes. Raises UserError when the hub cannot be reached, or the model does not
    exist or is gated.
    """
    if not is_hub_id(hub_id):
        raise UserError(f"{hub_id!r} is neither a folder here nor a name that the hub allows: check the name.")
    if (folder := cached(hub_id)) is not None:
        return folder
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        # One question first: unlike the downloads it does not retry for half a minute where there is no network.
        listing = HfApi().model_info(hub_id, timeout=20).siblings or []
        names = [file.rfilename for file in listing]
        if names and "adapter_config.json" not in names:  # an adapter is small, and its base is checked in its turn
            _check_before(hub_id, names)
        names = [name for name in names if not any(fnmatch(name, pattern) for pattern in UNREAD)]
        weights = SAFETENSORS if any(name.endswith(".safetensors") for name in names) else BIN
        wanted: Any = {"allow_patterns": SMALL + weights, "tqdm_class": _reporter(on_progress)}
        # config.json last: a folder that has it was not broken off.
        snapshot_download(hub_id, ignore_patterns=["config.json", *UNREAD], **wanted)
        return Path(snapshot_download(hub_id, ignore_patterns=UNREAD, **wanted))
    except GatedRepoError:
        raise UserError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id}, then type `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{hub_id!r} is neither a folder here nor a public model of the hub: check the name, or"
            " type `hf auth login` if it is private."
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(
            f"{hub_id!r} is no folder here and HF_HUB_OFFLINE is set: unset it, or give the path of a folder."
        ) from None
    except HfHubHTTPError as error:
        raise UserError(
            f"The hub refused {hub_id} ({first_line(error)}): try again later, or give a local folder."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full while downloading {hub_id}: make room, or set HF_HOME to a larger disk; what is"
                " there is kept."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{hub_id} cannot be downloaded, since the hub's cache cannot be written ({first_line(error)}): set"
                " HF_HOME to a folder that can."
            ) from None
        raise UserError(_unreachable(hub_id, error)) from None
    except Exception as error:
        # The client's network errors come from whichever HTTP library it was built on, with no common base class.
        if not type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3", "hf_xet")):
            raise
        raise UserError(_unreachable(hub_id, error)) from None


def _check_before(hub_id: str, names: list[str]) -> None:
    """Refuse what cannot be loaded anyway while only its config is here: weights are many gigabytes."""
    from huggingface_hub import hf_hub_download

    from .network import NetworkConfig
    from .quant_linear import read_form
    from .releases import complete
    from .shards import read_json

    for name in ("config.json", "tokenizer.json"):
        if name not in names:
            raise UserError(f"{hub_id} has no {name}, without which it cannot be read here: choose another copy of it.")
    with tempfile.TemporaryDirectory() as folder:  # not the cache, where a config says that a download was complete
        config = read_json(Path(hf_hub_download(hub_id, "config.json", local_dir=folder, tqdm_class=_reporter(None))))
    try:
        config = complete(config, hub_id)[0]
        NetworkConfig.from_dict(config)
        read_form(config)
    except UserError as error:
        raise UserError(f"{hub_id} was not downloaded. {error}") from None


def _unreachable(hub_id: str, error: BaseException) -> str:
    return (
        f"{hub_id!r} is no folder here and the hub cannot be reached ({first_line(error)}): "
        f"on a machine with a network type `hf download {hub_id} --local-dir FOLDER`, then use --model FOLDER."
    )


def _reporter(on_progress: Progress | None) -> Any:
    """A silent stand-in for the client's progress bar that adds up the bytes of all files."""
    from tqdm.auto import tqdm

    totals: dict[int, tuple[float, float]] = {}

    class Reporter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = True
            self._key, self._done, self._want = (
                id(self),
                float(kwargs.get("initial") or 0),
                float(kwargs.get("total") or 0),
            )
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            self._done += n or 0
            if self._bytes and on_progress:
                totals[self._key] = (self._done, max(self._want, float(self.total or 0), self._done))
                on_progress(int(sum(d for d, _ in totals.values())), int(sum(t for _, t in totals.values())))
            return None

    return Reporter
