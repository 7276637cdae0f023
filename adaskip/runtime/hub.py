"""Routers on the Hugging Face Hub: fetched by id and revision, and uploaded with their model card."""

from __future__ import annotations

import re
from pathlib import Path

from adaskip.errors import CheckpointError, ConfigError
from adaskip.runtime.card import PLACE
from adaskip.runtime.description import CARD, CONFIG, WEIGHTS

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str | Path) -> bool:
    """Return whether a name can only mean a repository of the Hub: ``user/name``, and no folder here is called so.

    >>> is_hub_id("me/routers"), is_hub_id("runs/a/router"), is_hub_id("./routers")
    (True, False, False)
    """
    return bool(_ID.fullmatch(str(name))) and not Path(name).exists()


def check_name(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        ConfigError: says what one looks like.
    """
    if not _ID.fullmatch(name):
        raise ConfigError(f"expected a repository of the Hub as USER/NAME, such as me/routers, got {name!r}")


def fetch(name: str, revision: str | None = None) -> Path:
    """Return the folder of the Hub's cache that holds the routers of a repository; nothing else of it is fetched.

    Args:
        name: ``user/name``.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        CheckpointError: there is no such repository or revision, or the Hub cannot be reached and holds nothing here.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name}, revision {revision}" if revision else name
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{name}: has no revision {revision!r} on the Hub; leave it out, or name a branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name}: no such folder here, and no such repository on the Hub that you may read; a private one needs "
            "`hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{at}: no such folder here, the Hub cannot be reached, and its cache holds nothing of that name"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{at}: no such folder here, and the Hub says: {_first_line(error)}") from error


def push(folder: Path, name: str, *, private: bool | None = None, revision: str | None = None, message: str) -> str:
    """Upload a folder to a repository of the Hub, which is made where there is none; return its address.

    A card in the folder that says from where routers are loaded names the repository from then on.

    Args:
        folder: what ``save_pretrained`` or ``adaskip export`` wrote.
        name: ``user/name``.
        private: whether a new repository is; None: as the user's or organisation's settings say.
        revision: branch to upload to, made where there is none; None: the main branch.
        message: of the commit.

    Raises:
        ConfigError: the name is none of a repository.
        CheckpointError: the Hub refuses, or cannot be reached; the folder stays as it is.
    """
    check_name(name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api, card = HfApi(library_name="adaskip"), folder / CARD
    if card.is_file():
        card.write_text(card.read_text(encoding="utf-8").replace(f'"{PLACE}"', f'"{name}"'), encoding="utf-8")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: the upload failed ({_first_line(error)}); where it is the key: hf auth login"
        ) from error
    return str(address)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
