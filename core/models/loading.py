"""Loading any artefact as a transformers model: seed, expert, generalist, or a plain Hugging Face folder."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from ..artefacts.files import is_unfinished, read_json
from ..artefacts.layout import Layout
from ..artefacts.lineage import MANIFEST_NAMES, Manifest, manifest_path, read_manifest, require_intact
from ..artefacts.safetensors_io import Checkpoint, TensorEntry, checkpoint_files
from ..errors import UserError, first_line, unknown_name
from ..hooks.manager import installed_plugins
from ..process.environment import without_loading_bars

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS_FILE = "model.safetensors"
DTYPE_NAMES = ("auto", "bfloat16", "float16", "float32", "float64")
# transformers switches process-wide settings while it loads: two loads at once have left tied heads untied. Its
# first import is not safe in threads either.
_LOADING = RLock()


def register_auto_classes() -> None:
    """Make transformers know every model class that merge methods bring along, and the way in which loaded mixtures run.

    `AutoModelForCausalLM` then loads them, and a mixture that was pickled whole runs in another process.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from .kernels.sorted_loop import register_sorted_loop

    register_sorted_loop()
    for config_class, model_class in installed_plugins().auto_classes():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]  # all have it
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def load_model(
    folder: str | Path,
    *,
    seed: str | Path | None = None,
    dtype: str = "auto",
    without: Collection[str] = (),
    as_trained: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any artefact as (model in evaluation mode, tokenizer).

    `seed` is needed only for an expert that lies outside its workspace. `dtype` is `auto` (as stored) or a
    torch dtype's name. `without` names experts of an ensemble or a mixture that are switched off: their tensors take no
    part, files stay as they are. An expert that was trained as part of something larger (`flexolmo`: beside the public
    feed-forward) comes back as that, or, without `as_trained`, as the dense model of its tensors. Raises `UserError` for folders that are unfinished, damaged or of no known kind.
    """
    model = load_network(folder, seed=seed, dtype=dtype, without=without, as_trained=as_trained)
    with _LOADING:
        return model, load_tokenizer(tokenizer_folder(Path(folder), Path(seed) if seed is not None else None))


def load_network(
    folder: str | Path,
    *,
    seed: str | Path | None = None,
    dtype: str = "auto",
    without: Collection[str] = (),
    as_trained: bool = True,
) -> PreTrainedModel:
    """Load an artefact's model alone, as `load_model` does; a folder without a tokenizer will do."""
    path = Path(folder)
    if isinstance(without, str):
        without = (without,)
    if dtype not in DTYPE_NAMES:
        raise unknown_name("dtype", dtype, DTYPE_NAMES)
    if is_unfinished(path):  # whose files may look complete, while tensors are still to come
        raise UserError(f"{path} is what a job has written that did not end; resume it")
    manifest = _manifest_of(path)
    if manifest is None and (path / "run.json").is_file():
        raise UserError(f"{path} is not finished: it has a run.json and no manifest; train it to its end")
    with _LOADING, without_loading_bars():
        if manifest is not None and manifest.kind == "expert":
            if without:
                raise UserError(f"{path} is an expert and has none that can be switched off")
            model = _from_pretrained(seed_of(path, manifest, seed), dtype)
            trainer = installed_plugins().trainers().get(manifest.trainable or "")
            if as_trained and trainer is not None and trainer.restore is not None:
                model = trainer.restore(model, path)
            else:
                overlay_tensors(model, Checkpoint([path / WEIGHTS_FILE]))
            return model.eval()
        model = _from_pretrained(path, dtype)
        if without:
            model = _without(model, path, manifest, without)
        if model.device.type == "cpu":
            from .kernels.sorted_loop import use_sorted_loop

            use_sorted_loop(model)
        return model


def _without(
    model: PreTrainedModel, folder: Path, manifest: Manifest | None, gone: Collection[str]
) -> PreTrainedModel:
    method = installed_plugins().merge_methods().get(manifest.config.get("method", "")) if manifest else None
    if manifest is None or method is None or method.switch_off is None:
        raise UserError(f"{folder} has no experts that can be switched off; ensembles and mixtures have")
    mixture = manifest.config.get("mixture") or {}
    parents = [parent.name for parent in manifest.parents if parent.kind != "seed"]
    averaged = (mixture.get("options") or {}).get("shared") == "average"
    experts = list(mixture.get("experts") or parents)
    for name in gone:
        if name not in experts:
            raise unknown_name("expert", name, experts, listed_as="the model has")
        if averaged and name in parents:
            remedy = "" if mixture.get("tuned") else "; `expertctl expert remove` makes it again without"
            warnings.warn(
                f"all but its feed-forwards is the mean of its experts, '{name}' included{remedy}",
                stacklevel=3,
            )
        for tuning in mixture.get("tuned", ()):
            if name in tuning.get("experts", ()) and "began_as" not in tuning:
                warnings.warn(
                    f"its {tuning['trains']} trained on {', '.join(tuning['domains'])} while '{name}' was one of its "
                    "experts",
                    stacklevel=3,
                )
    return method.switch_off(model, experts, gone).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; raises `UserError` when it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"{folder} has no tokenizer that can be loaded ({first_line(error)}); put its tokenizer.json there"
        ) from None
    return tokenizer


def tokenizer_folder(folder: Path, seed: Path | None = None) -> Path:
    """Return the folder that holds the tokenizer of an artefact: an expert's is its seed's."""
    manifest = _manifest_of(folder)
    return seed_of(folder, manifest, seed) if manifest is not None and manifest.kind == "expert" else folder


def _manifest_of(folder: Path) -> Manifest | None:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    return read_manifest(folder) if manifest_path(folder) else None


def _from_pretrained(folder: Path, dtype: str) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    check_loadable(folder)
    with _LOADING:
        register_auto_classes()
        try:
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is no model that transformers knows: {first_line(error)}") from None
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    if not isinstance(loaded, tuple):  # a class of ours, which checks by itself
        model: PreTrainedModel = loaded
        return model.eval()
    model, report = loaded
    for name in sorted(report["missing_keys"]):
        # transformers makes it up, with no more than a warning
        raise UserError(
            f"{folder} has no tensor '{name}', which its config.json asks for; fetch or make it again"
        )
    return model.eval()


def require_intact_model(folder: Path) -> None:
    """Check every byte of an artefact, and of the seed that an expert stands on; raises `UserError`.

    A plain Hugging Face folder has no manifest to be checked against.
    """
    require_intact_models([folder])


def require_intact_models(folders: Iterable[Path]) -> None:
    """Check several artefacts as `require_intact_model` does, reading each folder once."""
    done: set[Path] = set()  # experts share their seed, which may be large
    for folder in folders:
        for artefact in _with_its_seed(folder):
            if artefact.resolve() not in done:
                require_intact(artefact)
                done.add(artefact.resolve())


def _with_its_seed(folder: Path) -> Iterator[Path]:
    """Yield the artefacts that a model is read from; none for a plain Hugging Face folder."""
    manifest = _manifest_of(folder)
    if manifest is not None:
        yield folder
        if manifest.kind == "expert":
            yield seed_of(folder, manifest)


def max_positions(folder: Path) -> int:
    """Return how many tokens a model can look at, by its `config.json`; a large number where it does not say."""
    config = read_json(folder / "config.json")
    found = [config.get(key) for key in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    return min((value for value in found if isinstance(value, int)), default=1 << 40)


def check_loadable(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a model folder; raises `UserError` when it cannot be loaded.

    Only headers are read: missing, truncated and pickled weights are found, changed bytes are not.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is no model folder, or an unfinished one")
    config = read_json(folder / "config.json")
    if not str(config.get("model_type", "")).startswith("expertctl_"):
        for file in checkpoint_files(folder):
            Checkpoint([file])
    return config


def seed_of(expert: Path, manifest: Manifest, given: str | Path | None = None) -> Path:
    """Return the seed folder of an expert and check that it is the one the expert was branched from."""
    parent = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
    if parent is None:
        raise UserError(f"{expert / MANIFEST_NAMES['expert']} names no seed")
    folder = Path(given) if given is not None else Layout.find(expert).seed
    if not (folder / MANIFEST_NAMES["seed"]).is_file():
        raise UserError(
            f"expert '{manifest.name}' needs its seed, and {folder} is no seed folder; give it with seed="
        )
    found = read_manifest(folder).digest
    if found != parent.digest:
        raise UserError(
            f"expert '{manifest.name}' was branched from seed {parent.digest[:12]}, but {folder} is {found[:12]}"
        )
    return folder


def overlay_tensors(model: PreTrainedModel, tensors: Checkpoint | Mapping[str, Tensor]) -> None:
    """Copy tensors over those of the same name in a model; raises `UserError` for one it does not have."""
    import torch

    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name in tensors:
            if name not in own:
                raise UserError(
                    f"the model has no tensor '{name}': the expert belongs to another architecture"
                )
            source = tensors.read(name) if isinstance(tensors, Checkpoint) else tensors[name]
            own[name].copy_(source)


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's tensors as they stand in its checkpoint: by their names in memory, each shared one once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


class ExpertTensors:
    """All tensors of one expert: its own where training changed them, the seed's elsewhere."""

    def __init__(self, seed: Checkpoint, folder: Path) -> None:
        self.seed = seed
        self.changed = Checkpoint([folder / WEIGHTS_FILE])
        for name, entry in self.changed.entries.items():
            theirs = seed.entry(name)
            if (entry.shape, entry.dtype) != (theirs.shape, theirs.dtype):
                raise UserError(
                    f"tensor '{name}' is {entry.dtype} {list(entry.shape)} in {folder}, "
                    f"but {theirs.dtype} {list(theirs.shape)} in the seed"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.seed)

    def entry(self, name: str) -> TensorEntry:
        return self.changed.entries.get(name) or self.seed.entry(name)

    def read(self, name: str) -> Tensor:
        return self.changed.read(name) if name in self.changed else self.seed.read(name)
