"""Domains created by `data discover`, one per cluster, which the project has without listing them in its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..artefacts.files import read_json
from ..errors import UserError

if TYPE_CHECKING:
    from .settings import DomainConfig

CLUSTERS_FOLDER = "clusters"
CLUSTERS_FILE = "clusters.json"


def discovered_domains(root: Path) -> dict[str, DomainConfig]:
    """Return the domains of all cluster sets of a workspace by name; raises `UserError` for a damaged set."""
    from .settings import DomainConfig

    domains = {}
    for path in sorted((root / CLUSTERS_FOLDER).glob(f"*/{CLUSTERS_FILE}")):
        content = read_json(path)
        try:
            for cluster in content["clusters"]:
                parts = {
                    part: f"{CLUSTERS_FOLDER}/{path.parent.name}/{cluster['name']}/{part}.jsonl"
                    for part in cluster["documents"]
                }
                domains[cluster["name"]] = DomainConfig.model_validate({**parts, "licence": content.get("licence")})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a valid list of clusters ({error}); run `expertctl data discover` again"
            ) from None
    return domains


def discoverer_of(root: Path, name: str) -> str:
    """Return the name of the discoverer that created a cluster set."""
    return str(read_json(root / CLUSTERS_FOLDER / name / CLUSTERS_FILE).get("by", "tfidf"))


def cluster_sets(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the domain names of each cluster set."""
    return {
        path.parent.name: tuple(cluster["name"] for cluster in read_json(path)["clusters"])
        for path in sorted((root / CLUSTERS_FOLDER).glob(f"*/{CLUSTERS_FILE}"))
    }
