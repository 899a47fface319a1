"""`Workspace`: a project folder and all operations on it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertctl.core.artefacts.files import refuse_existing
from expertctl.core.artefacts.layout import Layout
from expertctl.core.artefacts.positions import Positions
from expertctl.core.config.settings import LauncherConfig, ProjectConfig
from expertctl.core.errors import UserError
from expertctl.core.manifests.manifest import Manifest, read_manifest
from expertctl.core.manifests.pulling import Pulled, pull
from expertctl.core.manifests.pushing import push
from expertctl.core.manifests.removal import Dependent, removable, remove
from expertctl.core.manifests.renaming import rename
from expertctl.core.manifests.run import read_run
from expertctl.core.models.decoding.opening import DecoderChoice
from expertctl.core.models.loading import read_config
from expertctl.core.remote.transfers import Transfer
from expertctl.core.remote.upload import Uploaded
from expertctl.core.remote.urls import is_url
from expertctl.core.reporting import SILENT, Reporter
from expertctl.experts.measures.evaluation import EvaluationTable, evaluate
from expertctl.experts.runs.jobs.status import JobStatus, job_status, require_no_job
from expertctl.experts.runs.seed import import_seed, start_pretraining
from expertctl.experts.runs.seed_sources import seed_folder
from expertctl.experts.runs.unfinished import unfinished
from expertctl.experts.scaling.pretraining import pretraining_cost

from .baselines import Baselines
from .data import Data
from .experts import Experts
from .generalists import Generalists
from .memories import Memories
from .project import Project
from .suites import Suites

if TYPE_CHECKING:
    from expertctl.core.models.generation import Generation, Sampling
    from expertctl.core.process.placement import DeviceMap
    from expertctl.merge.generalists.exporting import Exported


class Workspace:
    """A project folder; its operations by subject, and the common ones as short verbs.

    >>> ws = Workspace("demo")                                   # doctest: +SKIP
    >>> ws.branch("law", domain="law", trains="feed_forward")    # doctest: +SKIP
    >>> ws.train("law")                                          # doctest: +SKIP
    >>> ws.merge("forest", method="ensemble")                    # doctest: +SKIP
    >>> ws.generalists.compare("forest").verdict()               # doctest: +SKIP
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Find `expertctl.yaml` in `folder` (default: the current one) or above; raises `UserError` if there is none."""
        self._project = Project(Layout.find(Path(folder) if folder is not None else None))
        self.layout = self._project.layout
        self.root = self.layout.root
        self.data = Data(self._project)
        self.experts = Experts(self._project, self.data)
        self.generalists = Generalists(self._project, self.data)
        self.baselines = Baselines(self._project, self.data)
        self.memories = Memories(self._project)
        self.suites = Suites(self._project)
        self.prepare, self.discover = self.data.prepare, self.data.discover
        self.branch, self.train = self.experts.branch, self.experts.train
        self.merge, self.tune, self.compare = self.generalists.merge, self.generalists.tune, self.generalists.compare

    @property
    def config(self) -> ProjectConfig:
        """The checked content of `expertctl.yaml`."""
        return self._project.config

    def seed(
        self,
        source: str | Path | None = None,
        *,
        scratch: bool = False,
        preset: str | None = None,
        bos: bool | None = None,
        tokens: Sequence[str] | None = None,
        rope_base: float | None = None,
        positions: int | None = None,
        force: bool = False,
        launcher: str | LauncherConfig | None = None,
        reporter: Reporter = SILENT,
    ) -> Manifest:
        """Make the seed: import a Hugging Face model (`source`, or `seed.from`), otherwise pretrain from scratch.

        A model is a folder, a URL of fsspec, or `hub:owner/name` with or without `@revision`.
        `scratch` pretrains even if `seed.from` is set; `preset`, `bos`, `tokens`, `rope_base` and
        `positions` replace those of the section `seed`.
        """
        config = self.config
        changed = Positions(rope_base, positions)
        if not scratch:
            changed = Positions(rope_base or config.seed.rope_base, positions or config.seed.positions)
        folder = source if source is not None or scratch else config.seed.from_
        if folder is None and changed.is_given:
            raise UserError(
                "a RoPE base and a number of positions replace those of an imported model; name one with `from`"
            )
        if folder is not None:
            refuse_existing(self.layout.seed, force=force, what="seed")  # before a download
            if source is None and not is_url(folder):  # a path of the project file, relative to it
                folder = self.root / Path(folder).expanduser()
            return import_seed(
                self.layout,
                seed_folder(self.root, folder, reporter),
                bos=config.seed.bos if bos is None else bos,
                tokens=config.seed.tokens if tokens is None else tokens,
                positions=changed,
                licence=config.seed.licence,
                force=force,
                reporter=reporter,
            )
        given = {"preset": preset, "tokens": None if tokens is None else tuple(tokens)}
        changes = {name: value for name, value in given.items() if value is not None}
        config = config.model_copy(update={"seed": config.seed.model_copy(update=changes)})
        self._project.check_trackers()
        run = start_pretraining(self.layout, config, force=force)
        reporter.say(f"seed: {pretraining_cost(read_config(run), read_run(run).training)}")
        self._project.launch([run], launcher=launcher, reporter=reporter).raise_for_failures()
        return read_manifest(run)

    def push(
        self,
        artefact: str,
        url: str,
        *,
        private: bool = False,
        revision: str | None = None,
        force: bool = False,
        transfer: Transfer | None = None,
    ) -> Uploaded:
        """Push an artefact (a name or a folder) to a URL of fsspec or to `hub:owner/name`; see `expertctl push`."""
        from expertctl.merge.generalists.card import model_card

        return push(
            self.layout.artefact(artefact),
            url,
            card=model_card,
            private=private,
            revision=revision,
            force=force,
            transfer=transfer,
        )

    def pull(
        self,
        url: str,
        name: str | None = None,
        *,
        output: Path | None = None,
        force: bool = False,
        transfer: Transfer | None = None,
    ) -> Pulled:
        """Pull an artefact into the workspace, or any pushed folder into `output`; see `expertctl pull`."""
        from expertctl.merge.generalists.card import model_card

        return pull(url, self.layout, name, card=model_card, output=output, force=force, transfer=transfer)

    def export(
        self,
        model: str,
        to: str,
        output: str | Path,
        options: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> Exported:
        """Write a model (a name or a folder) by the exporter `to`; see `expertctl export`."""
        from expertctl.merge.generalists.exporting import export_model

        return export_model(self.layout.artefact(model), to, Path(output), options, force=force, reporter=reporter)

    def rename(self, name: str, new_name: str) -> Manifest:
        """Rename a finished expert, baseline or generalist; raises `UserError` if other artefacts were made of it."""
        from expertctl.merge.generalists.card import model_card

        return rename(self.layout, name, new_name, model_card)

    def remove(self, name: str, *, force: bool = False) -> list[Dependent]:
        """Remove an artefact or an unfinished run; returns the artefacts that were made of it.

        Raises `UserError` if there are any, unless `force`, and if a job of a cluster trains it.
        """
        if name in self.memories:
            self.memories.remove(name)
            return []
        require_no_job(removable(self.layout, name))
        return remove(self.layout, name, force=force)

    def job(self, name: str) -> JobStatus | None:
        """Return the job of a cluster that trains an unfinished run; None if there is none."""
        layout = self.layout
        runs = [folder / name for folder in (layout.root, layout.experts, layout.baselines, layout.generalists)]
        return next((status for run in runs if (status := job_status(run)) is not None), None)

    def unfinished(self) -> dict[str, str]:
        """Return the unfinished runs and merges, each with the command that resumes it."""
        return unfinished(self.layout, self.config)

    def evaluate(
        self,
        *models: str,
        domains: Sequence[str] | None = None,
        evaluator: str = "perplexity",
        context: int | None = None,
        stride: int | None = None,
        by_position: int | None = None,
        known_domains: bool = False,
        intervals: bool = False,
        ranked: Iterable[Collection[str]] = (),
        jobs: int | None = None,
        nproc: int = 1,
        device_map: DeviceMap | None = None,
        quantise: str | None = None,
        decoder: str | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        reporter: Reporter = SILENT,
    ) -> EvaluationTable:
        """Score models (names in this workspace, or folders; default: all finished ones) on the test text of domains.

        `context` and `stride` are the length of windows and their distance, in tokens; `by_position` scores by position instead,
        in buckets of which the first has so many positions; with `known_domains`, ensembles are
        told which domain they read; `intervals` adds those of bits per byte over documents. `ranked` are models that will be compared; it is refused if their tokenizers keep
        different shares of a text. `nproc` processes share the work; scores do not depend on their number.
        `device_map` places the members of all models on devices, `quantise` keeps weights in few bits; see `load_model`.
        `decoder` changes the distribution of all models; see `generate`.
        """
        names = models or tuple(folder.name for folder in self.layout.finished())
        if not names:
            raise UserError("there is no finished model to evaluate yet; make a seed with `expertctl seed`")
        folders = {name: self.layout.artefact(name) for name in names}
        return evaluate(
            self.layout,
            self.config,
            folders,
            domains,
            evaluator=evaluator,
            context=context,
            stride=stride,
            by_position=by_position,
            known_domains=known_domains,
            intervals=intervals,
            ranked=ranked,
            jobs=jobs,
            nproc=nproc,
            device_map=device_map,
            quantise=quantise,
            decoder=self._decoder(decoder, decoder_options),
            reporter=reporter,
        )

    def generate(
        self,
        model: str,
        prompt: str,
        sampling: Sampling | None = None,
        *,
        without: Sequence[str] = (),
        domain: str | None = None,
        shares: bool = False,
        device_map: DeviceMap | None = None,
        quantise: str | None = None,
        decoder: str | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        reporter: Reporter = SILENT,
    ) -> Generation:
        """Sample a continuation; `shares`: add each expert's share per token; `without`: experts to disable; `domain`: of
        the text, if the ensemble has a prior for it; `device_map`: devices of the members, `quantise`: weights in few bits, see
        `load_model`; `decoder`: changes the distribution, such as `contrastive`.
        """
        return self.generate_batch(
            model,
            [prompt],
            sampling,
            without=without,
            domain=domain,
            shares=shares,
            device_map=device_map,
            quantise=quantise,
            decoder=decoder,
            decoder_options=decoder_options,
            reporter=reporter,
        )[0]

    def generate_batch(
        self,
        model: str,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        *,
        without: Sequence[str] = (),
        domain: str | None = None,
        shares: bool = False,
        device_map: DeviceMap | None = None,
        quantise: str | None = None,
        decoder: str | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        reporter: Reporter = SILENT,
    ) -> list[Generation]:
        """Sample a continuation of each prompt, all in one batch; see `generate`."""
        from expertctl.core.models.generation import Sampling, generate_batch

        return generate_batch(
            self.layout.artefact(model),
            prompts,
            sampling or Sampling(),
            without=without,
            domain=domain,
            shares=shares,
            device_map=device_map,
            quantise=quantise,
            decoder=self._decoder(decoder, decoder_options),
            reporter=reporter,
        )

    def _decoder(self, name: str | None, options: Mapping[str, Any] | None) -> DecoderChoice | None:
        if name is None:
            if options:
                raise UserError("options of a decoder are given without a decoder; name one")
            return None
        return DecoderChoice.of_workspace(name, options, self.layout)
