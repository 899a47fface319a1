"""Finishing an artefact: its model card, the digests of everything in its folder, and last its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..artefacts.digests import CARD_FILE, digest_of_tensors, digest_of_tokenizer, digests_of_folder
from ..artefacts.files import write_text
from ..artefacts.versions import tool_versions
from .manifest import Manifest


def finish_artefact(
    folder: Path,
    manifest: Manifest,
    *,
    card: Callable[[Manifest], str] | None = None,
    known: Mapping[str, str] | None = None,
) -> Manifest:
    """Write the model card and the manifest of a folder whose other files are complete; return the whole manifest.

    Digests are computed here; those of the tokenizer and the versions of tools only where `manifest` leaves them out.
    `known` holds digests of tensors that were computed while they were written.
    """
    described = replace(
        manifest,
        tokenizer=manifest.tokenizer or digest_of_tokenizer(folder),
        versions={**tool_versions(), **manifest.versions},
    )
    if card is not None:
        write_text(folder / CARD_FILE, card(described))
    tensors, files = digests_of_folder(folder, known)
    complete = replace(described, tensors=tensors, files=files, digest=digest_of_tensors(tensors))
    complete.write(folder)
    return complete
