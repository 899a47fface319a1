"""Creating the seed: importing a Hugging Face folder, or setting up a pretraining run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.digests import TOKENIZER_FILES
from ...core.artefacts.files import exclusive, link_or_copy, new_folder, read_json, refuse_existing, write_json
from ...core.artefacts.layout import Layout
from ...core.artefacts.licence_card import licence_on_card
from ...core.artefacts.model_config import embedding_rows, refuse_quantized
from ...core.artefacts.positions import Positions, require_changeable_positions, write_positions
from ...core.artefacts.safetensors_io import INDEX_FILE, Checkpoint, checkpoint_files, write_tensors
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError, first_line
from ...core.manifests.finishing import finish_artefact
from ...core.manifests.manifest import ImportedSeed, Manifest
from ...core.manifests.run import RUN_FILE, RunSpec, is_finished, read_run
from ...core.models.loading import WEIGHTS_FILE
from ...core.models.stored_names import empty_model, stored_tensors
from ...core.process.environment import without_loading_bars
from ...core.reporting import SILENT, Reporter
from ...core.text.tokenizer import TextEncoder, add_special_tokens, set_begin, train_tokenizer
from ..text.corpora import domain_config, domain_documents
from ..text.run_text import require_run_text
from .presets import model_config, preset
from .trainable import models_of_objective, require_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_POSITIONS = Positions()
MODEL_FILES = ("config.json", "generation_config.json")


def import_seed(
    layout: Layout,
    source: Path,
    *,
    bos: bool | None = None,
    tokens: Sequence[str] = (),
    positions: Positions = OWN_POSITIONS,
    licence: str | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Manifest:
    """Import a Hugging Face causal LM folder as the seed; its files are linked, not copied.

    `bos` decides whether documents begin with the tokenizer's BOS token (default: as the tokenizer does itself). `tokens` are
    special tokens to add. `positions` replace the model's own. Without `licence`, the licence is that of the folder's model card, if it has one.

    Raises `UserError`, before anything is written, if the folder has only pickled weights, is truncated, has no
    tokenizer or too large a one, lacks tensors, or is not a causal language model of transformers.
    """
    refuse_existing(layout.seed, force=force, what="seed")
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json: it is not a Hugging Face model folder")
    refuse_quantized(source, read_json(source / "config.json"))
    weights = checkpoint_files(source)
    tensors = Checkpoint(weights)
    _check_vocabulary(TextEncoder.of_folder(source), source, reporter)
    model = _empty_model(source)
    if positions.is_given:
        require_changeable_positions(model.config, positions, str(source))
    expected = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    is_complete = expected.keys() <= tensors.entries.keys()
    if is_complete:
        _check_shapes(expected, tensors, source)
    with exclusive(layout.lock("run-seed"), "the seed"), new_folder(layout.seed, force=force, what="seed") as partial:
        for name in (*MODEL_FILES, *TOKENIZER_FILES):
            if (source / name).is_file():
                link_or_copy(source / name, partial / name)
        num_ids = add_special_tokens(partial, tokens) if tokens else 0
        if bos is not None:
            set_begin(partial, begins=bos)
        config = read_json(source / "config.json")
        if not config.get("architectures"):
            (partial / "config.json").unlink()
            write_json(partial / "config.json", {"architectures": [type(model).__name__], **config})
        rows = embedding_rows(source) or 0
        if num_ids > rows:
            _rewrite_weights(source, partial, reporter, rows=num_ids)
        elif expected.keys() == tensors.entries.keys():
            for file in weights:
                link_or_copy(file, partial / file.name)
            if len(weights) > 1:
                link_or_copy(source / INDEX_FILE, partial / INDEX_FILE)
        else:
            _rewrite_weights(source, partial, reporter)
        if positions.is_given:
            write_positions(partial, read_json(partial / "config.json"), model.config, positions)
        encoder = TextEncoder.of_folder(partial)
        begin = tuple(str(encoder.tokenizer.id_to_token(token_id)) for token_id in encoder.begin)
        origin = ImportedSeed(config.get("model_type"), begin, positions.base, positions.number)
        manifest = Manifest(kind="seed", name="seed", config=origin, licence=licence or licence_on_card(source))
        return finish_artefact(partial, manifest)


def _check_vocabulary(encoder: TextEncoder, source: Path, reporter: Reporter) -> None:
    """Raise `UserError` for a tokenizer of another model; added tokens without an embedding are only reported."""
    if encoder.rows is None:
        return
    plain = encoder.tokenizer.get_vocab(with_added_tokens=False)
    encoder.require_rows(list(plain.values()))
    added = encoder.tokenizer.get_vocab(with_added_tokens=True)
    beyond = sorted(token for token, token_id in added.items() if token_id >= encoder.rows)
    reporter.say(
        f"{len(beyond)} added tokens of the tokenizer in {source}, such as {beyond[0]!r}, have no row in the model's "
        "embedding; text that contains them will be refused"
    )


def _check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Checkpoint, source: Path) -> None:
    for name, shape in expected.items():
        if tensors.entry(name).shape != shape:
            raise UserError(
                f"tensor '{name}' in {tensors.entry(name).file} is {list(tensors.entry(name).shape)}, but "
                f"{source / 'config.json'} describes {list(shape)}; download the model again"
            )


def _empty_model(source: Path) -> PreTrainedModel:
    """Return the model that transformers builds for a folder, without memory for its tensors."""
    try:
        return empty_model(source)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{source} is not a causal language model supported by transformers: {first_line(error)}"
        ) from None


def _rewrite_weights(source: Path, target: Path, reporter: Reporter, *, rows: int | None = None) -> None:
    """Write the weights as `save_pretrained` does, without tensors that the model does not use.

    Checkpoints of some families come under several names: without a prefix, or with the experts of a layer in one tensor. With
    `rows`, the embedding and the output layer get so many, new ones with the mean of the others.
    """
    from transformers import AutoModelForCausalLM

    with without_loading_bars():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype="auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
        except RuntimeError as error:  # tensors of other shapes
            raise UserError(f"{source} does not fit its config.json: {first_line(error)}; download it again") from None
    model, loading = loaded
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"{source} lacks {len(missing)} tensors of its model, such as '{missing[0]}'; download it again"
        )
    if loading["unexpected_keys"]:
        unused = sorted(loading["unexpected_keys"])
        reporter.say(
            f"left out {len(unused)} tensors of {source} that its config.json does not describe, such as '{unused[0]}'"
        )
    if rows is not None:
        _add_rows(model, rows)
        (target / "config.json").unlink()
        model.config.save_pretrained(target)
        reporter.say(f"the embedding has {rows} rows now, the new ones with the mean of the others")
    write_tensors(target / WEIGHTS_FILE, stored_tensors(model))


def _add_rows(model: PreTrainedModel, rows: int) -> None:
    """Give a model's embedding and output layer more rows, which hold the mean of the old ones."""
    import torch

    before = len(next(model.get_input_embeddings().parameters()))
    model.resize_token_embeddings(rows, mean_resizing=False)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for parameter in {parameter for layer in layers if layer is not None for parameter in layer.parameters()}:
            parameter[before:] = parameter[:before].float().mean(dim=0).to(parameter)


def start_pretraining(layout: Layout, project: ProjectConfig, *, force: bool = False) -> Path:
    """Set up the pretraining run of a seed from scratch: tokenizer, configuration, `run.json`.

    An unfinished run with the same settings is kept and can be resumed. Returns the run's folder. Raises `UserError`
    if an unfinished run has other settings.
    """
    settings = project.seed
    spec = RunSpec(
        kind="seed",
        name="seed",
        domains=settings.domains or tuple(project.domains),
        training=project.training_of(settings.training),
        preset=settings.preset,
        family=settings.family,
        licence=settings.licence,
        tokens=settings.tokens,
        tied=settings.tied,
    )
    if models_of_objective(spec.training):
        raise UserError("a seed is the first model, so its objective has no other to learn from; set another objective")
    if not spec.domains:
        raise UserError("there is no domain to pretrain the seed on; add one under 'domains' in expertctl.yaml")
    size = preset(settings.preset)
    if spec.training.sequence_length > size.max_position_embeddings:
        raise UserError(
            f"training.sequence_length {spec.training.sequence_length} exceeds the {size.max_position_embeddings} "
            f"positions of preset '{settings.preset}'; lower it or use a larger preset"
        )
    if is_finished(layout.seed):
        refuse_existing(layout.seed, force=force, what="seed")
    elif (layout.seed / RUN_FILE).is_file() and not force:
        if read_run(layout.seed) != spec:
            raise UserError(
                f"{layout.seed} was started with other settings; restore them in expertctl.yaml to resume, or use "
                "--force to start over"
            )
        return layout.seed
    with exclusive(layout.lock("run-seed"), "the seed"), new_folder(layout.seed, force=True, what="seed") as partial:
        require_run_text(project, spec.domains, spec.training)
        domains = [domain_config(project, name) for name in spec.domains]
        texts = (text for domain in domains for text in domain_documents(domain, layout.root, "train"))
        train_tokenizer(
            texts, size.vocab_size, partial, max_length=size.max_position_embeddings, special_tokens=spec.tokens
        )
        require_steps(spec.training, partial)
        encoder = TextEncoder.of_folder(partial)
        config = model_config(size, settings.family, encoder.separator, encoder.vocabulary, tied=settings.tied)
        config.save_pretrained(partial)
        spec.write(partial)
    return layout.seed
