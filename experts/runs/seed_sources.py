"""Where an imported seed comes from: a folder, a URL, or a repository of the Hugging Face hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from ...core.artefacts.digests import CARD_FILE, TOKENIZER_FILES
from ...core.artefacts.hub_cache import is_hub_name
from ...core.artefacts.safetensors_io import INDEX_FILE
from ...core.errors import UserError
from ...core.remote.copies import refresh
from ...core.remote.hub import hub_snapshot
from ...core.remote.transfers import Transfer
from ...core.remote.urls import HUB, is_url
from ...core.reporting import SILENT, Reporter
from .seed import MODEL_FILES

SEED_FILES = (*MODEL_FILES, *TOKENIZER_FILES, CARD_FILE, INDEX_FILE, "*.safetensors")
"""Shell-style patterns of the files that are downloaded for a seed."""


def seed_folder(root: Path, source: str | Path, reporter: Reporter = SILENT) -> Path:
    """Return the local folder of a model to import; what a URL or `hub:owner/name` names is downloaded first.

    `root` is the workspace, which keeps copies from URLs; repositories are kept in the Hugging Face cache. The commit of a
    repository is reported. Raises `UserError` for `owner/name`, which names no folder: the hub is used only on request.
    """
    text = str(source)
    if text.startswith(HUB):
        snapshot = hub_snapshot(text, Transfer(reporter=reporter), SEED_FILES)
        if not text.endswith(f"@{snapshot.name}"):
            reporter.say(
                f"{text} is commit {snapshot.name} now; {text.partition('@')[0]}@{snapshot.name} always names it"
            )
        return snapshot
    if is_url(text):
        return refresh(root, text, reporter, wanted=_is_wanted)
    folder = Path(source).expanduser()
    if is_hub_name(text) and not folder.exists():
        raise UserError(f"{folder} is no folder; to download the model of this name from the hub, write {HUB}{text}")
    return folder


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in SEED_FILES)
