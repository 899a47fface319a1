"""Experts that are prompts: trained rows which the frozen seed reads before every text, stored as PEFT does.

`prompt` is prompt tuning (arXiv:2104.08691), `residual_prompt` trains through an MLP that is dropped afterwards
(arXiv:2305.03937), and `progressive_prompts` adds a prompt to frozen ones (arXiv:2301.12314). The folder of such an expert has the
whole prompt: `peft.PeftModel.from_pretrained(seed, folder)` loads it. How models read prompts: `core/models/adapters/prompts.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.artefacts.layout import Layout
from ....core.errors import UserError, unknown_name
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.training import SideTensor, TrainablePart, Trainer, TrainingContext
from ....core.manifests.manifest import read_manifest
from ....core.models.adapters.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ....core.models.adapters.prompts import (
    PROMPT_TENSOR,
    PROMPT_TYPE,
    embedding_width,
    is_prompt,
    num_prompt_tokens,
    prompt_tokens_of,
    read_prompt,
    require_promptable,
    with_prompt,
)
from ....core.models.loading import max_positions, seed_of
from ....core.models.stored_names import empty_model
from .options import ProgressiveTuning, PromptOptions, PromptTuning, ResidualTuning

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LARGEST = 1e4
"""Largest number in a prompt that training can lead to."""
LEAST_TEXT = 8
"""Fewest tokens of text that a prompt has to leave room for."""
_PROBED = 8


class PromptPart(TrainablePart):
    """The prompt of a frozen model, in float32."""

    keeps_float32 = True

    def __init__(self, model: PreTrainedModel, prompt: nn.Module) -> None:
        model.requires_grad_(False)
        with_prompt(model, prompt)
        super().__init__(model, {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad})
        self._prompt = prompt

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def extra_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the whole prompt, (P, D): with earlier ones, and without the network that it was trained through."""
        import torch

        trained = {
            name.removeprefix("prompt."): _whole(tensor.detach()).float() for name, tensor in self.parameters.items()
        }

        def whole(indices_BP: Tensor) -> Tensor:
            rows: Tensor = torch.func.functional_call(self._prompt, trained, (indices_BP,))
            return rows

        with torch.no_grad():
            device = next(iter(trained.values())).device
            indices_1P = torch.arange(prompt_tokens_of(self.module), device=device)[None]
            return {ADAPTER_WEIGHTS: {PROMPT_TENSOR: whole(indices_1P)[0].float()}}


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which each process has a part; all of them must call this."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


# --- preparing ---


def prepare_prompt(context: TrainingContext) -> TrainablePart:
    """Freeze the model and give it a new prompt, or that of another expert."""
    from .networks import Prompt

    options: PromptTuning = context.options
    rows = _new_rows(context)
    if options.start is not None:
        _copy(read_prompt(context.models[options.start]), rows)
    return PromptPart(context.model, Prompt(rows, options.tokens))


def prepare_residual(context: TrainingContext) -> TrainablePart:
    """Freeze the model and give it a prompt that is trained through an MLP with a residual connection."""
    from .networks import ResidualPrompt

    options: ResidualTuning = context.options
    rows = _new_rows(context)
    width = embedding_width(context.model)
    prompt = ResidualPrompt(
        rows, options.tokens, width, options.bottleneck, options.layers, layer_norm=options.layer_norm
    )
    return PromptPart(context.model, prompt)


def prepare_progressive(context: TrainingContext) -> TrainablePart:
    """Freeze the model and the prompts of earlier experts, and put a new one before or after them."""
    import torch

    from .networks import ProgressivePrompt

    options: ProgressiveTuning = context.options
    rows = _new_rows(context)
    earlier = [read_prompt(context.models[name]).float() for name in options.names]
    in_order = earlier[::-1] if options.place == "before" else earlier
    return PromptPart(context.model, ProgressivePrompt(rows, options.tokens, torch.cat(in_order), options.place))


def _new_rows(context: TrainingContext) -> nn.Module:
    from .networks import new_rows

    require_promptable(context.model)
    _require_same_from_embeddings(context.model)
    options: PromptOptions = context.options
    return new_rows(options.tokens, options.initialisation, context.model.get_input_embeddings())


def _copy(source: Tensor, rows: nn.Module) -> None:
    import torch

    (parameter,) = rows.parameters()
    with torch.no_grad():
        parameter.copy_(source)


def _require_same_from_embeddings(model: PreTrainedModel) -> None:
    """Raise `UserError` for a model that reads more of its tokens than their embeddings, which a prompt has not."""
    import torch

    was_training = model.training
    tokens = torch.arange(_PROBED, device=model.device)[None]
    with torch.no_grad():
        model.eval()
        expected = model(input_ids=tokens, use_cache=False).logits
        try:
            rows = model.get_input_embeddings()(tokens)
            embedded = model(inputs_embeds=rows, use_cache=False).logits
            model(inputs_embeds=rows + 1, use_cache=False)  # of no token
        except (ValueError, RuntimeError, TypeError, AttributeError):
            embedded = None
        model.train(was_training)
    if embedded is None or not torch.allclose(expected.float(), embedded.float(), rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} reads more of a token than its embedding, which a prompt has not; train another part, such as "
            "--trains lora"
        )


# --- checks before a run is set up ---


def require_prompt(folder: Path, options: PromptTuning, domains: Sequence[str]) -> None:
    """Raise `UserError` if PEFT is missing, or for a model or options that do not fit each other."""
    _require(folder, "prompt", options.tokens)
    if options.start is not None:
        expert = prompt_expert(folder, options.start)
        if num_prompt_tokens(expert) != options.tokens:
            raise UserError(
                f"the prompt of '{options.start}' has {num_prompt_tokens(expert)} rows, and tokens is {options.tokens}; give "
                f"--option tokens={num_prompt_tokens(expert)}"
            )


def require_residual(folder: Path, options: ResidualTuning, domains: Sequence[str]) -> None:
    """Raise `UserError` as `require_prompt`."""
    _require(folder, "residual_prompt", options.tokens)


def require_progressive(folder: Path, options: ProgressiveTuning, domains: Sequence[str]) -> None:
    """Raise `UserError` as `require_prompt`, and for earlier experts that are no prompts or contain each other."""
    if not options.names:
        raise UserError(
            "trainer 'progressive_prompts' adds a prompt to earlier ones; name them with --option earlier=NAMES, or train the "
            "first one with --trains prompt"
        )
    experts = {name: prompt_expert(folder, name) for name in options.names}
    _require(folder, "progressive_prompts", stacked_tokens(folder, options))
    prompts = {name: read_prompt(expert) for name, expert in experts.items()}
    for name, other in itertools.permutations(prompts, 2):
        if _contains(prompts[name], prompts[other]):
            raise UserError(
                f"the prompt of '{name}' contains that of '{other}' already; leave '{other}' out of earlier"
            )


def _contains(whole: Tensor, part: Tensor) -> bool:
    places = range(len(whole) - len(part) + 1)
    return any(bool((whole[place : place + len(part)] == part).all()) for place in places)


def prompt_expert(seed: Path, name: str) -> Path:
    """Return the folder of a finished expert that is a prompt of a seed; raises `UserError` for others."""
    layout = Layout.find(seed)
    if name not in layout.finished_experts():
        raise unknown_name("finished expert", name, layout.finished_experts())
    expert = layout.experts / name
    if not is_prompt(expert):
        raise UserError(f"expert '{name}' is not a prompt, but trained {read_manifest(expert).trainable}; name prompts")
    seed_of(expert, read_manifest(expert), seed)
    return expert


def _require(folder: Path, trainer: str, tokens: int) -> None:
    try:
        import peft  # noqa: F401  # whether it works with the installed transformers, too
    except ImportError as error:
        raise UserError(
            f'trainer {trainer} needs peft ({error}); install it with: pip install "expertctl[lora]"'
        ) from None
    require_promptable(empty_model(folder))
    if tokens + LEAST_TEXT > max_positions(folder):
        raise UserError(
            f"a prompt of {tokens} tokens leaves no room for text in the seed's {max_positions(folder)} positions; lower tokens"
        )


# --- files ---


def prompt_tokens(seed: Path, options: PromptOptions) -> int:
    """Return the number of rows of a prompt that is trained alone."""
    return options.tokens


def stacked_tokens(seed: Path, options: ProgressiveTuning) -> int:
    """Return the number of rows of a prompt with all earlier ones."""
    experts = Layout.find(seed).experts
    return options.tokens + sum(num_prompt_tokens(experts / name) for name in options.names)


def _documents(tokens: Callable[[Path, Any], int]) -> Callable[[Path, Any], Mapping[str, Mapping[str, Any]]]:
    """Return a function for `Trainer.side_documents`: PEFT's configuration, without its version."""

    def side_documents(seed: Path, options: Any) -> Mapping[str, Mapping[str, Any]]:
        settings = {
            "peft_type": PROMPT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": read_manifest(seed).name,
            "inference_mode": True,
            "num_virtual_tokens": tokens(seed, options),
            "num_transformer_submodules": 1,
            "token_dim": _width(seed),
            "prompt_tuning_init": "RANDOM",  # the rows are in the file
        }
        return {ADAPTER_CONFIG: settings}

    return side_documents


def _files(tokens: Callable[[Path, Any], int]) -> Callable[[Path, Any], Mapping[str, Mapping[str, SideTensor]]]:
    """Return a function for `Trainer.side_files`."""

    def side_files(seed: Path, options: Any) -> Mapping[str, Mapping[str, SideTensor]]:
        shape = (tokens(seed, options), _width(seed))
        return {ADAPTER_WEIGHTS: {PROMPT_TENSOR: SideTensor(shape, -LARGEST, LARGEST, dtype="F32")}}

    return side_files


def _width(seed: Path) -> int:
    return embedding_width(empty_model(seed))


def _trainer(name: str, summary: str, tokens: Callable[[Path, Any], int], **functions: Any) -> Trainer:
    return Trainer(
        name,
        summary,
        makes="adapter",
        side_files=_files(tokens),
        side_documents=_documents(tokens),
        context_tokens=tokens,
        **functions,
    )


@hookimpl
def trainers() -> list[Trainer]:
    return [
        _trainer(
            "prompt",
            "rows that the frozen seed reads before every text (prompt tuning), as a PEFT folder",
            prompt_tokens,
            prepare=prepare_prompt,
            options=PromptTuning,
            require=require_prompt,
            models=lambda options: () if options.start is None else (options.start,),
        ),
        _trainer(
            "residual_prompt",
            "a prompt that is trained through an MLP with a residual connection, which is dropped afterwards",
            prompt_tokens,
            prepare=prepare_residual,
            options=ResidualTuning,
            require=require_residual,
        ),
        _trainer(
            "progressive_prompts",
            "a new prompt before or after the frozen prompts of earlier experts",
            stacked_tokens,
            prepare=prepare_progressive,
            options=ProgressiveTuning,
            require=require_progressive,
            models=lambda options: options.names,
        ),
    ]
