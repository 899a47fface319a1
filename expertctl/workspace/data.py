"""The text of a workspace: tokenising, listing, clustering and selecting documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from expertctl.core.errors import UserError
from expertctl.core.hooks.text import ValidationText
from expertctl.core.manifests.manifest import manifest_path, read_manifest
from expertctl.core.models.loading import max_positions
from expertctl.core.reporting import SILENT, Reporter
from expertctl.core.text.conversation_blocks import blocks_of
from expertctl.core.text.token_store import TokenBlocks
from expertctl.experts.retrieval.index import PASSAGE, Found, Index, IndexManifest, build_index, read_index
from expertctl.experts.retrieval.tuning import RetrieverTuning
from expertctl.experts.text.corpora import PreparedDomain, domain_config, example_of, prepare_domain, prepared_domain
from expertctl.experts.text.discovery import Discovery, DiscoverySettings, discover
from expertctl.experts.text.proxy_corpus import Proxy, ProxySettings, make_proxy
from expertctl.experts.text.removal import RemovedText, remove_text

from .project import Project


class Data:
    """The domains of a project."""

    def __init__(self, project: Project) -> None:
        self._project = project

    def prepare(
        self, domains: Sequence[str] | None = None, *, force: bool = False, reporter: Reporter = SILENT
    ) -> list[PreparedDomain]:
        """Tokenise domains (default: all) with the seed's tokenizer; domains in the cache are not tokenised again."""
        layout, config = self._project.layout, self._project.config
        if not (layout.seed / "config.json").exists():
            raise UserError("text is tokenised with the seed's tokenizer, and there is no seed; run `expertctl seed`")
        return [
            prepare_domain(layout, name, domain_config(config, name), layout.seed, force=force, reporter=reporter)
            for name in domains or config.domains
        ]

    def prepared(self) -> dict[str, PreparedDomain | None]:
        """Return every domain of the project, with its tokens if its current text is in the cache."""
        layout = self._project.layout
        return {
            name: prepared_domain(layout, name, domain, layout.seed)
            for name, domain in self._project.config.domains.items()
        }

    def example(self, domain: PreparedDomain) -> list[tuple[str, bool]] | None:
        """Return a domain's first conversation as the seed reads it, in pieces with whether they count; None for plain text."""
        has_any = domain.open("train").has_conversations
        return example_of(domain, self._project.layout.seed) if has_any else None

    def proxy(
        self,
        name: str,
        *,
        like: str,
        source: str,
        documents: int | None = None,
        seed: int = 0,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> Proxy:
        """Write the documents of the domain `source` that are most similar to `like` to `proxies/NAME.jsonl`.

        No text of `like` is written. `documents` is their number; default: a tenth of the source's, at most 1,000.
        """
        return make_proxy(
            self._project.layout,
            self._project.config,
            name,
            like=like,
            source=source,
            documents=documents,
            settings=ProxySettings(seed=seed),
            force=force,
            reporter=reporter,
        )

    def discover(
        self,
        name: str,
        clusters: int | None = None,
        settings: DiscoverySettings | None = None,
        *,
        force: bool = False,
        reporter: Reporter = SILENT,
        **options: Any,
    ) -> Discovery:
        """Cluster documents into domains `NAME-0`, `NAME-1` ...; `options` are those of discoverer `settings.by`."""
        discovery = discover(
            self._project.layout,
            self._project.config,
            name,
            clusters,
            settings or DiscoverySettings(),
            options,
            force=force,
            reporter=reporter,
        )
        self._project.reload()  # it has more domains now
        return discovery

    def index(
        self,
        name: str,
        domains: Sequence[str] | None = None,
        *,
        embedder: Path | None = None,
        tune_for: str | None = None,
        tuning: RetrieverTuning | None = None,
        characters: int | None = None,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> IndexManifest:
        """Write `indexes/NAME` with the training text of domains (default: all), for the decoder `replug`.

        It is searched by words, or by the embeddings of a local model, which may be tuned for a model of the project: passages
        then count as near that help it to predict (REPLUG LSR, arXiv:2301.12652). `characters` is the length of the longest passage.
        """
        return build_index(
            self._project.layout,
            self._project.config,
            name,
            list(domains or self._project.config.domains),
            embedder=embedder,
            tune_for=None if tune_for is None else self._project.layout.artefact(tune_for),
            tuning=tuning,
            characters=characters or PASSAGE,
            force=force,
            reporter=reporter,
        )

    def search(self, name: str, query: str, count: int = 5) -> list[Found]:
        """Return the passages of an index that fit a query best, best first; raises `UserError` for an unknown index."""
        return Index(self._project.layout.index(name)).search([query], count)[0]

    def indexes(self) -> list[IndexManifest]:
        """Return the manifests of all indexes, by name."""
        return [read_index(folder) for folder in self._project.layout.finished_indexes()]

    def remove(self, name: str, *, force: bool = False) -> RemovedText:
        """Remove the prepared text of a domain, or a set of clusters; the text that they were made from stays.

        Raises `UserError` for a set of clusters that artefacts were trained on, unless `force`.
        """
        removed = remove_text(self._project.layout, self._project.config, name, force=force)
        self._project.reload()  # it has fewer domains without the clusters
        return removed

    def trained_domains(self, experts: Iterable[Path]) -> list[str]:
        """Return the domains that experts were trained on and that the project still has, sorted."""
        manifests = [read_manifest(folder) for folder in experts if manifest_path(folder) is not None]
        trained = {domain for manifest in manifests for domain in manifest.domains}
        return sorted(trained & set(self._project.config.domains))

    def validation(self, domains: Sequence[str]) -> list[ValidationText]:
        """Return the validation parts of domains, prepared, in blocks of at most the seed's positions."""
        return [
            ValidationText(prepared.name, self.blocks(prepared, "valid"))
            for prepared in (self.prepare(domains) if domains else [])
        ]

    def blocks(self, domain: PreparedDomain, part: str) -> TokenBlocks:
        """Return a part of a domain in blocks of the training length, or of the seed's positions if they are fewer."""
        length = self._project.config.training.sequence_length
        return blocks_of(domain.open(part), min(length, max_positions(self._project.layout.seed)))
