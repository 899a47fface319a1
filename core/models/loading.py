"""Loading of any artefact (seed, expert, generalist, Hugging Face folder) as a transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from ..artefacts.digests import MANIFEST_NAMES
from ..artefacts.files import is_unfinished, read_json
from ..artefacts.layout import Layout
from ..artefacts.model_config import refuse_quantized
from ..artefacts.safetensors_io import Checkpoint, TensorEntry, checkpoint_files
from ..errors import UserError, unknown_name
from ..hooks.manager import installed_plugins
from ..hooks.merging import MergeMethod
from ..hooks.training import Trainer
from ..manifests.manifest import Manifest, find_manifest, read_manifest
from ..manifests.verification import require_intact
from ..process.environment import without_loading_bars
from ..process.placement import DeviceMap, check_device_map, place_members
from ..text.tokenizer import load_tokenizer
from .adapters.folder import is_adapter
from .adapters.lora import AdaptedTensors
from .adapters.prompts import fixed_prompt, is_prompt, num_prompt_tokens, read_prompt, with_prompt
from .kernels.quantised_linear import quantise as quantise_layers
from .kernels.quantised_linear import require_quantisation
from .overlay import overlay_tensors as overlay_tensors
from .stored_names import checkpoint_tensors as checkpoint_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS_FILE = "model.safetensors"
POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length")
"""Fields of `config.json` that say how many positions a model has."""
DTYPE_NAMES = ("auto", "bfloat16", "float16", "float32", "float64")
# transformers changes process-wide settings while it loads; concurrent loads have left tied heads untied. Its first
# import is not thread-safe either.
_LOADING = RLock()


def register_auto_classes() -> None:
    """Register the model classes of all merge methods and the sorted-loop expert kernel with transformers.

    `AutoModelForCausalLM` can then load those models, and an unpickled mixture can run in another process.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from .kernels.sorted_loop import register_sorted_loop

    register_sorted_loop()
    plugins = installed_plugins()
    for name, method in plugins.offers(MergeMethod).items():
        if method.auto_classes is None:
            continue
        try:
            config_class, model_class = method.auto_classes()
        except Exception as error:
            plugins.report_failure(MergeMethod, name, "auto_classes", error)
            continue
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]  # all have it
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def load_model(
    folder: str | Path,
    *,
    seed: str | Path | None = None,
    dtype: str = "auto",
    without: Collection[str] = (),
    as_trained: bool = True,
    device_map: DeviceMap | None = None,
    quantise: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any artefact as (model in evaluation mode, tokenizer).

    `seed` is required only for an expert outside its workspace. `dtype` is `auto` (as stored) or the name of a torch
    dtype. `without` disables experts of an ensemble or a mixture; files stay unchanged. An expert trained inside a
    larger model (`flexolmo`: beside the public FFN) is loaded as that model, or, without `as_trained`, as a dense
    model with its tensors. `device_map` places the members of an ensemble or a stitched model on devices: `auto` (over
    the GPUs by size), `code=cuda:0,law=cpu`, or a dictionary. `quantise` keeps the weights of linear layers in 8 bits (`int8`) or 4 (`nf4`),
    for inference only. Raises `UserError` if the folder is unfinished, damaged or
    of unknown kind, and for a device map that does not fit.
    """
    model = load_network(
        folder,
        seed=seed,
        dtype=dtype,
        without=without,
        as_trained=as_trained,
        device_map=device_map,
        quantise=quantise,
    )
    with _LOADING:
        return model, load_tokenizer(tokenizer_folder(Path(folder), Path(seed) if seed is not None else None))


def load_network(
    folder: str | Path,
    *,
    seed: str | Path | None = None,
    dtype: str = "auto",
    without: Collection[str] = (),
    as_trained: bool = True,
    device_map: DeviceMap | None = None,
    quantise: str | None = None,
) -> PreTrainedModel:
    """Load an artefact's model without its tokenizer; arguments as for `load_model`."""
    if quantise is not None:
        if device_map is not None:
            raise UserError("a device map is for members in full precision; give either device_map or quantise")
        require_quantisation(quantise)
    model = _load_network(Path(folder), seed, dtype, without, as_trained, device_map)
    if quantise is not None:
        quantise_layers(model, quantise)
    return model


def _load_network(
    path: Path,
    seed: str | Path | None,
    dtype: str,
    without: Collection[str],
    as_trained: bool,
    device_map: DeviceMap | None,
) -> PreTrainedModel:
    if isinstance(without, str):
        without = (without,)
    if dtype not in DTYPE_NAMES:
        raise unknown_name("dtype", dtype, DTYPE_NAMES)
    if is_unfinished(path):  # its files may look complete while tensors are still missing
        raise UserError(f"{path} is the output of an unfinished job; resume the job")
    manifest = _manifest_of(path)
    if manifest is None and (path / "run.json").is_file():
        raise UserError(f"{path} is an unfinished run: it has a run.json and no manifest; resume its training")
    if device_map is not None:
        require_members(path, device_map)
    with _LOADING, without_loading_bars():
        if manifest is not None and manifest.kind == "expert":
            if without:
                raise UserError(f"{path} is a single expert; only experts of ensembles and mixtures can be disabled")
            seed_folder = seed_of(path, manifest, seed)
            model = _from_pretrained(seed_folder, dtype)
            trainer = installed_plugins().offers(Trainer).get(manifest.trainable or "")
            if is_prompt(path):
                with_prompt(model, fixed_prompt(read_prompt(path)))
            elif as_trained and trainer is not None and trainer.restore is not None:
                model = trainer.restore(model, path)
            else:
                overlay_tensors(model, changed_tensors(path, seed_folder))
            return model.eval()
        model = _from_pretrained(path, dtype)
        if without:
            model = _switch_off_experts(model, path, manifest, without)
        if model.device.type == "cpu":
            from .kernels.sorted_loop import use_sorted_loop

            use_sorted_loop(model)
        if device_map is not None:
            place_members(model, device_map)
        return model


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of a model folder; raises `UserError` if transformers cannot read or does not support it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is no folder of a model")
    with _LOADING:
        register_auto_classes()
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())  # an error of a field has it on the second line
            raise UserError(f"{folder} is not a model supported by transformers: {reason:.300}") from None
    return config


def require_members(folder: Path, device_map: DeviceMap) -> None:
    """Raise `UserError` unless the device map fits the members of the model in a folder; loads no weights."""
    names: Collection[str] = ()
    if (folder / "config.json").is_file() and _is_own_type(read_json(folder / "config.json")):
        names = getattr(read_config(folder), "member_names", ())
    check_device_map(device_map, names, folder)


def has_own_class(folder: Path) -> bool:
    """Return whether the model in a folder is of one of expertctl's classes."""
    return _is_own_type(read_json(folder / "config.json"))


def _is_own_type(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith("expertctl_")


def _switch_off_experts(
    model: PreTrainedModel, folder: Path, manifest: Manifest | None, disabled: Collection[str]
) -> PreTrainedModel:
    """Disable experts of a generalist; warns about tensors that still depend on them."""
    merged = manifest.merged if manifest is not None else None
    method = installed_plugins().offers(MergeMethod).get(merged.method) if merged is not None else None
    if manifest is None or merged is None or method is None or method.switch_off is None:
        raise UserError(f"{folder} has no experts to disable; only ensembles and mixtures have")
    parents = [parent.name for parent in manifest.parents if parent.kind != "seed"]
    is_averaged = merged.mixture is not None and merged.mixture.options.get("shared") == "average"
    experts = list(merged.experts or parents)
    for name in disabled:
        if name not in experts:
            raise unknown_name("expert", name, experts, listed_as="the model has")
        if is_averaged and name in parents:
            remedy = "" if merged.tunings else "; `expertctl expert remove` recomputes it without this expert"
            warnings.warn(
                f"everything outside the feed-forward networks is still the average of all experts, including "
                f"'{name}'{remedy}",
                stacklevel=3,
            )
        for tuning in merged.tunings:
            if name in tuning.experts and not tuning.copied_from:
                warnings.warn(
                    f"trainer '{tuning.trains}' ran on {', '.join(tuning.domains)} while '{name}' was one of the experts",
                    stacklevel=3,
                )
    return method.switch_off(model, experts, disabled).eval()


def tokenizer_folder(folder: Path, seed: Path | None = None) -> Path:
    """Return the folder with an artefact's tokenizer: the seed's folder for an expert, otherwise its own."""
    manifest = _manifest_of(folder)
    return seed_of(folder, manifest, seed) if manifest is not None and manifest.kind == "expert" else folder


def _manifest_of(folder: Path) -> Manifest | None:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    return find_manifest(folder)


def load_empty(folder: Path) -> PreTrainedModel:
    """Load a model of transformers in float32 without its weights: only non-persistent buffers are not on the meta device."""
    import torch

    from .kernels.sorted_loop import use_sorted_loop

    with _LOADING, without_loading_bars():
        model = _from_pretrained(folder, "float32", device_map="meta")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for name, buffer in model.named_non_persistent_buffers():
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, torch.empty_like(buffer, device="cpu"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    use_sorted_loop(model)
    return model


def _from_pretrained(folder: Path, dtype: str, **arguments: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    check_loadable(folder)
    with _LOADING:
        read_config(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True, **arguments
        )
    if not isinstance(loaded, tuple):  # one of expertctl's model classes, which does its own checks
        model: PreTrainedModel = loaded
        return model.eval()
    model, report = loaded
    for name in sorted(report["missing_keys"]):
        # transformers would initialise it randomly and only warn
        raise UserError(f"{folder} has no tensor '{name}', which its config.json requires; download or create it again")
    return model.eval()


def require_intact_models(folders: Iterable[Path]) -> None:
    """Raise `UserError` if a byte of an artefact or of an expert's seed differs; skip folders without a manifest."""
    verified: set[Path] = set()  # experts share their seed, which may be large
    for folder in folders:
        for artefact in _source_artefacts(folder):
            if artefact.resolve() not in verified:
                require_intact(artefact)
                verified.add(artefact.resolve())


def _source_artefacts(folder: Path) -> Iterator[Path]:
    """Yield the artefacts that a model is loaded from, none for a plain Hugging Face folder."""
    manifest = _manifest_of(folder)
    if manifest is not None:
        yield folder
        if manifest.kind == "expert":
            yield seed_of(folder, manifest)


def max_positions(folder: Path) -> int:
    """Return a model's maximum number of positions from `config.json`; a large number if it has no limit."""
    config = read_json(folder / "config.json")
    limits = [config.get(key) for key in POSITION_LIMITS]
    return min((limit for limit in limits if isinstance(limit, int)), default=1 << 40)


def text_positions(folder: Path) -> int:
    """Return how many tokens of a text an artefact can read: its model's positions without those that a prompt takes."""
    model = folder if (folder / "config.json").is_file() else tokenizer_folder(folder)
    return max_positions(model) - num_prompt_tokens(folder)


def check_loadable(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a model folder; raises `UserError` if the model cannot be loaded.

    Reads only headers, so it detects missing, truncated and pickled weights but not changed bytes.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is not a model folder, or it is unfinished")
    config = read_json(folder / "config.json")
    refuse_quantized(folder, config)
    if not _is_own_type(config):
        for file in checkpoint_files(folder):
            Checkpoint([file])
    return config


def seed_of(expert: Path, manifest: Manifest, given: str | Path | None = None) -> Path:
    """Return the seed folder of an expert; raises `UserError` if the expert was branched from another seed."""
    parent = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
    if parent is None:
        raise UserError(f"{expert / MANIFEST_NAMES['expert']} has no seed among its parents")
    folder = Path(given) if given is not None else Layout.find(expert).seed
    if not (folder / MANIFEST_NAMES["seed"]).is_file():
        raise UserError(
            f"expert '{manifest.name}' needs its seed, and {folder} is not a seed folder; pass the seed with seed="
        )
    seed = read_manifest(folder)
    if seed.digest != parent.digest:
        raise UserError(
            f"expert '{manifest.name}' was branched from seed {parent.digest[:12]}, but {folder} is {seed.digest[:12]}"
        )
    require_same_configuration(manifest, seed)
    return folder


def require_same_configuration(expert: Manifest, seed: Manifest) -> None:
    """Raise `UserError` for an expert whose seed had these tensors, but another `config.json`."""
    config = expert.run.parents.get("seed/config.json") if expert.run is not None else None
    if config not in (None, seed.files.get("config.json")):
        raise UserError(
            f"expert '{expert.name}' was branched from a seed with another config.json, such as another RoPE base or number of "
            "positions: the same weights compute another function; make that seed again"
        )


def changed_tensors(expert: Path, seed: Checkpoint | Path) -> Checkpoint | AdaptedTensors:
    """Return the tensors of the seed that training an expert changed: stored ones, or the seed's with its adapter.

    Raises `UserError` for an adapter that changes none, such as a prompt.
    """
    if not is_adapter(expert):
        return Checkpoint([expert / WEIGHTS_FILE])
    return AdaptedTensors(seed if isinstance(seed, Checkpoint) else Checkpoint.of_folder(seed), expert)


class ExpertTensors:
    """Tensors of an expert, trained or the seed's; raises `UserError` if a trained one has another shape or dtype."""

    def __init__(self, seed: Checkpoint, folder: Path) -> None:
        self.seed = seed
        self.changed = changed_tensors(folder, seed)
        for name, entry in self.changed.entries.items():
            seed_entry = seed.entry(name)
            if (entry.shape, entry.dtype) != (seed_entry.shape, seed_entry.dtype):
                raise UserError(
                    f"tensor '{name}' is {entry.dtype} {list(entry.shape)} in {folder}, "
                    f"but {seed_entry.dtype} {list(seed_entry.shape)} in the seed"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.seed)

    def entry(self, name: str) -> TensorEntry:
        return self.changed.entries.get(name) or self.seed.entry(name)

    def read(self, name: str) -> Tensor:
        return self.changed.read(name) if name in self.changed else self.seed.read(name)

    def span(self, name: str, begin: int, end: int) -> Tensor:
        return (self.changed if name in self.changed else self.seed).span(name, begin, end)
