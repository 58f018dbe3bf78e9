"""Locating a model's files: a local folder, or a hub repository that is downloaded into the hub's cache.

All code that reads a model gets its folder here. One place reports errors of the hub (a gated model, a wrong name,
no network, an incomplete download).

Weights are taken wherever they are safetensors, in this order:

    model.safetensors, or model.safetensors.index.json and its shards      as transformers names them
    an index, a complete set of NAME-00001-of-00002.safetensors, or a      under transformers' names, as links in a
    single file, of any other name                                         folder of qllava's cache
    the conversion that the hub's own bot offers in a pull request,        the same; settings still come from main
    if it was made of the very pickles that main has

Pickles are never read here. If a model has only pickles, the error names the command that converts them.
"""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from qllava.arguments import no_folder
from qllava.config import InputError, cache_folder, expanded
from qllava.models.errors import one_line
from qllava.models.layouts import PICKLES, Found, arrange, find_weights, read_index, refuse_llava_own

BOT = "SFconvertbot"
"""Author of the hub's own conversions; pull requests of other authors are ignored."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
SETTINGS = (".json", ".jinja", ".model", ".txt")
"""Suffixes of a model's files that are not weights."""


class HubError(InputError):
    """A hub model cannot be downloaded; the message gives the reason and what to do."""


def settings_folder(name: str) -> Path:
    """Return a folder with a model's configs, tokenizer and processor, without fetching weights.

    Args:
        name: A folder or a hub name.

    Raises:
        InputError: If the model does not exist, or is in the layout of LLaVA's own code.
    """
    folder = Path(expanded(name))
    if folder.is_dir():
        refuse_llava_own(name, [path.name for path in folder.iterdir()], folder)
        return folder
    _refuse_path(name, folder)
    return _fetched_settings(name, constants.ENDPOINT, constants.HF_HUB_CACHE, is_offline_mode())


def model_folder(name: str) -> Path:
    """Return the folder of a complete model, with safetensors under the names that transformers expects.

    Args:
        name: A folder or a hub name.

    Raises:
        InputError: If the model does not exist, cannot be downloaded, or has no safetensors.
    """
    folder = settings_folder(name)
    if not Path(expanded(name)).is_dir():
        return _fetched_weights(name, constants.ENDPOINT, constants.HF_HUB_CACHE, is_offline_mode())
    files = [path.name for path in folder.iterdir()]
    found = find_weights(files, name)
    if found is None:
        raise no_safetensors(name, files)
    return folder if found.usual else arrange(found, folder, folder, cache_folder() / "models")


def no_safetensors(name: str, files: Sequence[str]) -> InputError:
    """Return the error for a model without safetensors."""
    if not any(file.endswith(PICKLES) for file in files):
        return InputError(f"{name} has no weights (*.safetensors). Copy or download the model again.")
    out = f"{Path(name).name}-safetensors"
    return InputError(
        f"{name} has only pickled weights, and qllava reads only safetensors. Convert them once: "
        f"python -m qllava.models.convert {shlex.quote(name)} {shlex.quote(out)} (it reads only tensors), "
        f"and use {out} in place of {name}."
    )


def fetch(name: str, files: Sequence[str], revision: str = "main") -> Path:
    """Download files of a repository if they are not cached, and return their folder in the hub's cache.

    Raises:
        HubError: If they cannot be downloaded.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[glob_of(file) for file in files]))
    except Exception as error:  # the hub's client raises its own, httpx's and the operating system's
        raise _trouble(name, error) from error


def glob_of(file: str) -> str:
    """Return a glob pattern that matches only this file."""
    return re.sub(r"([\[*?])", r"[\1]", file)


def repository_files(name: str) -> list[str]:
    """Return the names of the files in a repository's top folder; raise HubError if the hub cannot be read."""
    try:
        siblings = HfApi().model_info(name).siblings or []
    except Exception as error:
        raise _trouble(name, error) from error
    return sorted(file.rfilename for file in siblings if "/" not in file.rfilename)


def _refuse_path(name: str, folder: Path) -> None:
    """Raise InputError for a path that is not a folder."""
    if folder.is_file():
        raise InputError(f"{name} is a file. Give the folder of a model.")
    if said := no_folder(name):
        raise InputError(said)
    if not _HUB_NAME.fullmatch(name) or len(folder.parts) != name.count("/") + 1 or name.startswith("."):
        raise InputError(f"The folder {name} does not exist. Give the folder of a model or a hub name.")


@lru_cache(maxsize=64)
def _fetched_settings(name: str, endpoint: str, cache: str, offline: bool) -> Path:
    """Return `settings_folder` of a hub model; asked once per process, hub and cache."""
    try:
        files = repository_files(name)
    except HubError:
        cached = _cached(name)
        if cached is None:
            raise
        refuse_llava_own(name, [path.name for path in cached.iterdir()], cached)
        return cached
    small = [file for file in files if file.endswith(SETTINGS)]
    if not small:
        raise HubError(f"The hub repository {name} has no config.json, so it is not a model. Correct the name.")
    folder = fetch(name, small)
    refuse_llava_own(name, files, folder)
    return folder


@lru_cache(maxsize=64)
def _fetched_weights(name: str, endpoint: str, cache: str, offline: bool) -> Path:
    """Return `model_folder` of a hub model."""
    settings = _fetched_settings(name, endpoint, cache, offline)
    try:
        files = repository_files(name)
    except HubError as error:
        return _cached_weights(name, settings, error)
    found = find_weights(files, name)
    if found is not None:
        folder = fetch(name, _all(found, settings))
        return folder if found.usual else arrange(found, settings, folder, cache_folder() / "models")
    revision, converted = _conversion(name, files)
    if converted is None:
        raise no_safetensors(name, files)
    weights = fetch(name, [converted.index], revision) if converted.index else settings
    weights = fetch(name, _all(converted, weights), revision)
    return arrange(converted, settings, weights, cache_folder() / "models", known_as=_known_as(name))


def _all(found: Found, folder: Path) -> list[str]:
    """Return all weight files, including those named by an index."""
    if found.index is None:
        return list(found.files)
    return [found.index, *sorted(set(read_index(folder / found.index).values()))]


def _known_as(name: str) -> str:
    """Return the folder in qllava's cache under which a conversion is found again without a network."""
    return constants.REPO_ID_SEPARATOR.join(("models", *name.split("/")))


def _conversion(name: str, files: Sequence[str]) -> tuple[str, Found | None]:
    """Return the ref and the weights of the newest conversion of the hub's bot; None if there is none.

    Anybody may open a pull request, so only pull requests of the bot whose pickles are identical to those of main are
    used.
    """
    pickles = [file for file in files if file.endswith(PICKLES)]
    if not pickles:
        return "", None
    api = HfApi()
    try:
        asked = api.get_repo_discussions(name, author=BOT, discussion_type="pull_request")
        offered = [one for one in asked if one.is_pull_request and one.author == BOT and one.status != "closed"]
        own = _content(api, name, "main", pickles)
        for one in sorted(offered, key=lambda one: one.num, reverse=True):
            revision = f"refs/pr/{one.num}"
            held = [file.rfilename for file in api.model_info(name, revision=revision).siblings or []]
            found = find_weights([file for file in held if "/" not in file], name)
            if found is not None and _content(api, name, revision, pickles) == own:
                return revision, found
    except Exception as error:
        raise _trouble(name, error) from error
    return "", None


def _content(api: HfApi, name: str, revision: str, files: Sequence[str]) -> dict[str, str]:
    """Return identifiers of the content of files at a revision."""
    infos = api.get_paths_info(name, list(files), revision=revision)
    return {info.path: info.lfs.sha256 if info.lfs else info.blob_id for info in infos if isinstance(info, RepoFile)}


def _cached(name: str) -> Path | None:
    """Return the cached folder of a repository's main, complete or not; None if there is none."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no repository can have this name
        return None
    return Path(found).parent if isinstance(found, str) else None


def _cached_weights(name: str, settings: Path, error: HubError) -> Path:
    """Return the cached weights of a model whose hub cannot be reached, or raise `error` if they are incomplete."""
    converted = cache_folder() / "models" / _known_as(name)
    if converted.is_dir():
        return converted
    found = _complete(name, settings)
    if found is None:
        raise error
    return settings if found.usual else arrange(found, settings, settings, cache_folder() / "models")


def _complete(name: str, folder: Path) -> Found | None:
    """Return the weights in a folder of the hub's cache; None if some of their files are missing."""
    try:
        found = find_weights([path.name for path in folder.iterdir()], name)
        whole = found is not None and all((folder / file).is_file() for file in _all(found, folder))
    except InputError:  # some shards are missing, or the index cannot be read
        return None
    return found if whole else None


def hub_trouble(name: str, error: BaseException) -> HubError | None:
    """Return the error for a hub problem that another library met; None if the hub was not the reason."""
    chain = _chain(error)
    if not any(isinstance(one, HfHubHTTPError | OfflineModeIsEnabled | LocalEntryNotFoundError) for one in chain):
        return None
    return _trouble(name, error)


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and its causes."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _trouble(name: str, error: BaseException) -> HubError:
    """Return the error for an exception of the hub's client."""
    if isinstance(error, HubError):
        return error
    chain = _chain(error)
    page = f"{constants.ENDPOINT}/{name}"

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    full = any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in chain)
    codes = {one.response.status_code for one in chain if isinstance(one, HfHubHTTPError) and one.response is not None}
    if raised(GatedRepoError):
        said = f"{name} is gated. Accept its licence on {page}, log in (hf auth login), and run the command again."
    elif raised(HFValidationError):
        said = f"{name} is neither a folder nor a hub name (OWNER/NAME). Correct the name."
    elif raised(RepositoryNotFoundError) or codes & {401, 403}:
        said = (
            f"The folder {name} does not exist, and the hub has no model of this name that you may read. Correct the "
            "name, or log in if it is private (hf auth login)."
        )
    elif raised(OfflineModeIsEnabled) or is_offline_mode():
        said = (
            f"{name} is not a folder, is not completely in the hub's cache, and HF_HUB_OFFLINE "
            f"is set. Check the name, or download the model once without HF_HUB_OFFLINE: hf download {name}"
        )
    elif full:
        said = (
            f"{name} does not fit on the disk of {constants.HF_HUB_CACHE}. Free space, or set HF_HOME to another disk."
        )
    elif raised(EntryNotFoundError) and not raised(LocalEntryNotFoundError):
        said = f"A file of {name} was removed from the hub ({one_line(error)}). Run the command again."
    elif codes:
        said = f"The hub refused to send {name} ({one_line(chain[-1])}). Run the command again later."
    elif _unreachable(chain):
        said = (
            f"{name} is not a folder, is not in the hub's cache, and {constants.ENDPOINT} cannot be "
            "reached. Check the name and the network, or copy the model to this machine and give its folder."
        )
    else:
        said = f"The download of {name} was interrupted ({one_line(error)}). Run the command again to resume it."
    return HubError(said)


def _unreachable(chain: Sequence[BaseException]) -> bool:
    """Return whether no connection was made; a connection that broke later is a different error."""
    names = {type(one).__name__ for one in chain}
    return bool(names & {"ConnectError", "ConnectTimeout", "ProxyError", "ConnectionRefusedError", "gaierror"})
