"""Router initialisations from prompts: texts that an expert should or should not receive.

Prompts are merge options: `positive_prompts: {code: [...]}`, `negative_prompts`. Shapes: L = layers, T =
tokens, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.mixtures import RouterInputs, RouterRows
from .starts import options_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Embed = Callable[[Sequence[str]], "NDArray[Any]"]
"""Maps prompts to one vector per layer, (L, d), or one vector for all layers, (d,)."""


def prompt_rows(inputs: RouterInputs) -> RouterRows:
    """Return the normalized difference of mean hidden states of positive and negative prompts.

    Hidden states are the inputs of the seed's feed-forward networks, averaged over the tokens of a prompt
    without padding. Both means are normalized before subtraction.
    """
    import numpy as np

    from ....core.models.feed_forwards import input_moments
    from ....core.models.loading import load_model

    options_of(inputs, {}, "prompts")
    model, tokenizer = load_model(inputs.seed, dtype="float32")

    def mean(prompts: Sequence[str]) -> NDArray[Any]:
        blocks = [np.asarray(tokenizer(text)["input_ids"], dtype=np.int64) for text in prompts]
        means = [input_moments(model, [block]).mean.numpy() for block in blocks if block.size]
        return _normalize(np.mean(means, axis=0))

    return _from_prompts(inputs, mean, "prompts")


def prompt_state_rows(inputs: RouterInputs) -> RouterRows:
    """Return the normalized difference of layer inputs at the last token of positive and negative prompts.

    As `gate_mode: hidden` of mergekit-moe; option `average` 1 averages over all tokens of a prompt, as `hidden_avg`.
    """
    import torch

    from ....core.models.loading import load_model

    average = bool(options_of(inputs, {"average": 0}, "prompt_states")["average"])
    model, tokenizer = load_model(inputs.seed, dtype="float32")

    def mean(prompts: Sequence[str]) -> NDArray[Any]:
        means = []
        for text in prompts:
            tokens_1T = torch.tensor([tokens_of(tokenizer, text)])
            with torch.inference_mode():
                states = model(input_ids=tokens_1T, output_hidden_states=True, use_cache=False).hidden_states
            states_LTd = torch.cat(states[: inputs.num_layers]).double()
            means.append(states_LTd.mean(dim=1) if average else states_LTd[:, -1])
        mean_Ld: NDArray[Any] = torch.stack(means).mean(dim=0).numpy()
        return mean_Ld

    return _from_prompts(inputs, mean, "prompt_states")


def prompt_token_rows(inputs: RouterInputs) -> RouterRows:
    """Return the normalized difference of mean token embeddings of positive and negative prompts.

    As `gate_mode: cheap_embed` of mergekit-moe: tokens are weighted equally, and both means are normalized before
    subtraction. Cheap, since no model runs, but a poor approximation of the hidden states of deeper layers.
    """
    import numpy as np

    from ....core.artefacts.safetensors_io import Checkpoint
    from ....core.text.tokenizer import load_tokenizer
    from ...engine.reading import Reader
    from ...sources.models import StoredTensor
    from ...sources.tensor_names import embedding_name

    options_of(inputs, {}, "prompt_tokens")
    entries = Checkpoint.of_folder(inputs.seed).entries
    name = embedding_name(entries)
    if name is None:
        raise UserError(f"{inputs.seed} has no token embedding with a known tensor name; choose another router")
    with Reader() as reader:
        embedding = reader.read(StoredTensor(entries[name]))
    tokenizer = load_tokenizer(inputs.seed)

    def mean(prompts: Sequence[str]) -> NDArray[Any]:
        tokens = np.concatenate([tokens_of(tokenizer, text) for text in prompts])
        return _normalize(embedding[tokens].mean(axis=0, dtype=np.float64))

    return _from_prompts(inputs, mean, "prompt_tokens")


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a prompt, with the beginning-of-sequence token if the tokenizer has one."""
    tokens: list[int] = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise UserError(f"the prompt {text!r} has no tokens; use another prompt")
    return tokens


def _from_prompts(inputs: RouterInputs, embed: _Embed, router: str) -> RouterRows:
    """Return normalized rows: `embed` of the positive prompts minus `embed` of the negative prompts."""
    import numpy as np

    rows = np.zeros((inputs.num_layers, len(inputs.experts), inputs.width))
    for number, name in enumerate(inputs.experts):
        settings = inputs.expert_options.get(name, {})
        positive = prompts_of(settings, "positive_prompts", name)
        if not positive:
            raise UserError(
                f"router start '{router}' needs positive_prompts for '{name}'; add them to the merge's "
                "options, or choose another router"
            )
        rows[:, number] = embed(positive)
        negative = prompts_of(settings, "negative_prompts", name)
        if negative:
            rows[:, number] -= embed(negative)
        if not rows[:, number].any():
            raise UserError(
                f"the positive and negative prompts of '{name}' cancel out, which gives a router row of 0; change one"
            )
    return RouterRows(_normalize(rows).astype(np.float32))


def prompts_of(settings: Mapping[str, Any], key: str, name: str) -> list[str]:
    """Return an expert's prompts; raises `UserError` unless they are a list of nonempty strings."""
    prompts = settings.get(key, [])
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise UserError(f"{key} of '{name}' is not a list of nonempty texts")
    return list(prompts)


def _normalize(rows: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    normalized: NDArray[Any] = rows / np.where(norms > 0, norms, 1)
    return normalized
