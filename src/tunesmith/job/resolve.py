"""Names in a job to folders on this machine: bundled, local, or downloaded from the Hub at a pinned commit."""

# pyright: standard
# Untyped nodes of YAML and hub calls pass through here; strict would only ask for casts.

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.bundled import BUNDLED, bundled_path
from tunesmith.core.errors import ModelError
from tunesmith.job.spec import ModelSpec

# safetensors and text only: pickled weights are never even downloaded.
MODEL_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """name: as written in the job. revision: the commit a hub id resolved to, else None."""

    name: str
    folder: Path
    revision: str | None = None


def resolve_model(spec: ModelSpec) -> ResolvedModel:
    """The folder of a model name. Raises ModelError in one line if there is none; honours HF_HUB_OFFLINE."""
    if bundled := bundled_path(spec.name):
        return ResolvedModel(spec.name, bundled)
    folder = Path(spec.name).expanduser()
    if os.path.isdir(folder):  # unlike Path's, never raises on a name too long
        return ResolvedModel(spec.name, _check_model_folder(folder))
    if os.path.exists(folder):
        raise ModelError(
            spec.name, "is a file", rule="a model is a folder with config.json", cure="Name its folder"
        )
    if spec.name.startswith("tunesmith/"):
        guess = difflib.get_close_matches(spec.name, BUNDLED, n=1, cutoff=0.0)
        raise ModelError(spec.name, "is not bundled", cure=f"Did you mean {guess[0]}?" if guess else "")
    if not _HUB_ID.fullmatch(spec.name):
        raise ModelError(spec.name, "no such folder", cure="Check the path")
    return _download_model(spec)


def is_offline() -> bool:
    """Whether the user keeps us from the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def _check_model_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            str(folder),
            "is an adapter",
            rule="`model` names the base",
            cure="Continue from it with method: {name: lora, adapter: ...}",
        )
    raise ModelError(
        str(folder), "has no config.json", rule="a model is a Hugging Face folder", cure="Check the path"
    )


def _download_model(spec: ModelSpec) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"{spec.name}@{spec.revision}" if spec.revision else spec.name
    offline = is_offline()
    try:
        folder = Path(
            snapshot_download(
                spec.name, revision=spec.revision, allow_patterns=MODEL_FILES, local_files_only=offline
            )
        )
    except GatedRepoError:
        raise ModelError(place, "is gated", cure="Accept its licence on the Hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ModelError(place, "has no such revision", cure="Check model.revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            place,
            "is neither a folder here nor a model on the Hub",
            cure="Check the name; private models need HF_TOKEN",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise ModelError(
            place,
            f"is not a folder here nor in the local cache, and {why}",
            cure="Name a folder, or go online once",
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            place, f"cannot be downloaded ({str(error).splitlines()[0]})", cure="Name a folder"
        ) from None
    # The cache keeps each commit in a folder of its name.
    return ResolvedModel(spec.name, _check_model_folder(folder), revision=folder.name)
