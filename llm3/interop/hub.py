"""Folders of models on this machine, and models of the Hugging Face Hub in its local cache.

huggingface_hub keeps its cache and its own switches: HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

import re
from pathlib import Path

from llm3.errors import UserError
from llm3.interop.shards import INDEX, SINGLE, read_index

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_folder(name: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a model with all files but the weights, and its revision (a commit of the Hub, None for a folder).

    name: a path, or a name such as "org/model". Raises UserError if there is no such model, if the Hub cannot be
    reached, or for a revision of a folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r}: {name} is a folder, which has no revisions")
        return path.resolve(), None
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is neither a folder nor a name of a model, as in 'org/model'")
    folder = _download(name, revision, [*TEXT_FILES, INDEX])
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} has no config.json in the Hub's cache or on the Hub")
    return folder, folder.name


def weights_are_here(name: str, revision: str | None) -> bool:
    """Whether the weights of a model are in a folder or in the Hub's cache, without looking on the Hub."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not NAME.fullmatch(name):
            return True  # no model: whoever opens it says so
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(found, str):
            return False
        folder = Path(found).parent
    return all((folder / file).is_file() for file in set((read_index(folder) or {}).values()) or [SINGLE])


def fetch_weights(name: str, folder: Path, revision: str | None) -> None:
    """Download the weights of a model that `find_folder` found on the Hub, unless they are in its cache."""
    if revision is not None:
        index = read_index(folder)
        _download(name, revision, sorted(set(index.values())) if index else [SINGLE])


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download  # takes half a second
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    which = name if revision is None else f"{name} at revision {revision!r}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except GatedRepoError:
        raise UserError(f"{which} is gated: accept its terms on the Hub, then run hf auth login") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a folder nor a model on the Hub (or it is private: hf auth login)"
        ) from None
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a folder nor a name of a model: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        else:
            reason = f"the Hub cannot be reached ({type(error).__name__})"
        raise UserError(f"{which} is neither a folder nor in the Hub's cache, and {reason}") from None


def check_push(name: str) -> None:
    """Raise UserError for a repository that cannot be written to: a bad name, no network by choice, or no token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push={name!r}: {' '.join(str(error).split())}") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push={name}: HF_HUB_OFFLINE is set; unset it to upload")
    if not get_token():
        raise UserError(f"--push={name}: no token for the Hub: run hf auth login, or set HF_TOKEN")


def push_folder(folder: Path, name: str, message: str) -> str:
    """Upload a folder to a repository of the Hub, a new one as private; returns its address. Raises UserError."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the errors of its HTTP client among them
        raise UserError(
            f"--push={name}: {folder} was written, but not uploaded: {' '.join(str(error).split())}"
        ) from None
    return str(address)
