"""Removing the prepared text of a domain, or a set of discovered clusters, with a look at what was trained on it."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.artefacts.files import exclusive, remove_tree
from ...core.artefacts.layout import Layout
from ...core.config.discovered import CLUSTERS_FOLDER, cluster_sets
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError, unknown_name
from ...core.manifests.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class RemovedText:
    """What was removed under one name."""

    domains: tuple[str, ...]
    """The domain, or the domains of the set of clusters."""
    trained: tuple[str, ...]
    """Finished artefacts that were trained on them."""
    declared: bool
    """Whether `expertctl.yaml` still declares the domain, whose text is then prepared again when it is needed."""


def trained_on(manifest: Manifest) -> set[str]:
    """Return the domains that an artefact itself was trained on, in its annealing too."""
    return {*manifest.domains, *manifest.data.annealing}


def remove_text(layout: Layout, project: ProjectConfig, name: str, *, force: bool = False) -> RemovedText:
    """Remove the tokens of a domain, or a set of clusters with the tokens of its domains; sources are never touched.

    Raises `UserError` for an unknown name, for a cluster whose set has to be named instead, and for a set that artefacts
    were trained on, unless `force`: their text could only be had by discovering the same clusters again.
    """
    sets = cluster_sets(layout.root)
    for set_name, clusters in sets.items():
        if name in clusters and name not in sets:
            raise UserError(
                f"'{name}' is a cluster of the set '{set_name}'; remove the set: expertctl data remove {set_name}"
            )
    known = {*project.domains, *sets, *(path.name for path in layout.corpora.glob("*") if path.is_dir())}
    if name not in known:
        raise unknown_name("domain or set of clusters", name, sorted(known), listed_as="this workspace has")
    domains = sets.get(name, (name,))
    trained = tuple(folder.name for folder in layout.finished() if set(domains) & trained_on(read_manifest(folder)))
    if name in sets and trained and not force:
        raise UserError(
            f"{', '.join(trained)} {'was' if len(trained) == 1 else 'were'} trained on the clusters '{name}', and could not be "
            "trained again without them; use --force to remove them all the same"
        )
    with exclusive(layout.lock(f"clusters-{name}"), f"clusters '{name}'", patience_s=0.5):
        for domain in domains:
            with exclusive(layout.lock(f"domain-{domain}"), f"domain '{domain}'", patience_s=0.5):
                remove_tree(layout.corpora / domain)
        if name in sets:
            remove_tree(layout.root / CLUSTERS_FOLDER / name)
    return RemovedText(domains, trained, name in project.domains and name not in sets)
