"""Ways to begin a mixture's router from prompts: texts of what an expert is good at, and of what it is not.

Prompts stand in the merge's options: `positive_prompts: {code: [...]}`, `negative_prompts`. Shapes: L = layers, T = tokens, d = width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.mixtures import RouterInputs, RouterStart
from .starts import options_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Side = Callable[[Sequence[str]], "NDArray[Any]"]
"""Makes one vector for each layer, (L, d), or one for all, (d,), of several prompts."""


def prompt_rows(inputs: RouterInputs) -> RouterStart:
    """Return the mean hidden state of each expert's positive prompts, less that of its negative ones, of length 1.

    Hidden states are what the seed gives its feed-forwards, averaged over a prompt's tokens; no padding is involved. Both sides
    have length 1 before one is taken from the other.
    """
    import numpy as np

    from ....core.models.feed_forwards import input_moments
    from ....core.models.loading import load_model

    options_of(inputs, {}, "prompts")
    model, tokenizer = load_model(inputs.seed, dtype="float32")

    def mean(prompts: Sequence[str]) -> NDArray[Any]:
        blocks = [np.asarray(tokenizer(text)["input_ids"], dtype=np.int64) for text in prompts]
        found: NDArray[Any] = np.mean(
            [input_moments(model, [one]).mean.numpy() for one in blocks if one.size], axis=0
        )
        return _unit(found)

    return _from_prompts(inputs, mean, "prompts")


def prompt_state_rows(inputs: RouterInputs) -> RouterStart:
    """Return what each layer is given at a prompt's last token, positive less negative prompts, of length 1.

    As mergekit-moe's `gate_mode: hidden` does it; with option `average` 1 as `hidden_avg`: over all tokens of a prompt.
    """
    import torch

    from ....core.models.loading import load_model

    average = bool(options_of(inputs, {"average": 0}, "prompt_states")["average"])
    model, tokenizer = load_model(inputs.seed, dtype="float32")

    def mean(prompts: Sequence[str]) -> NDArray[Any]:
        found = []
        for text in prompts:
            tokens_1T = torch.tensor([tokens_of(tokenizer, text)])
            with torch.inference_mode():
                states = model(input_ids=tokens_1T, output_hidden_states=True, use_cache=False).hidden_states
            states_LTd = torch.cat(states[: inputs.num_layers]).double()
            found.append(states_LTd.mean(dim=1) if average else states_LTd[:, -1])
        mean_Ld: NDArray[Any] = torch.stack(found).mean(dim=0).numpy()
        return mean_Ld

    return _from_prompts(inputs, mean, "prompt_states")


def prompt_token_rows(inputs: RouterInputs) -> RouterStart:
    """Return the mean token embedding of each expert's prompts, of length 1, the same in every layer.

    Cheap, since no model runs; says little of what deeper layers see. As mergekit-moe's `gate_mode: cheap_embed`: every token
    counts the same, and both sides have length 1 before one is taken from the other.
    """
    import numpy as np

    from ....core.artefacts.safetensors_io import Checkpoint
    from ....core.models.loading import load_tokenizer
    from ...engine.reading import Reader
    from ...sources.models import StoredTensor
    from ...sources.tensor_names import embedding_name

    options_of(inputs, {}, "prompt_tokens")
    entries = Checkpoint.of_folder(inputs.seed).entries
    name = embedding_name(entries)
    if name is None:
        raise UserError(f"{inputs.seed} has no token embedding that is known by its name")
    with Reader() as reader:
        embedding = reader.whole(StoredTensor(entries[name], name=name))
    tokenizer = load_tokenizer(inputs.seed)

    def mean(prompts: Sequence[str]) -> NDArray[Any]:
        tokens = np.concatenate([tokens_of(tokenizer, text) for text in prompts])
        found: NDArray[Any] = embedding[tokens].mean(axis=0, dtype=np.float64)
        return _unit(found)

    return _from_prompts(inputs, mean, "prompt_tokens")


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return a prompt's tokens, beginning with the token that texts begin with, where there is one."""
    found: list[int] = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False)["input_ids"]
    if not found:
        raise UserError(f"the prompt {text!r} has no tokens; give another")
    return found


def _from_prompts(inputs: RouterInputs, side: _Side, router: str) -> RouterStart:
    """Return rows of what `side` makes of positive prompts, less what it makes of negative ones."""
    import numpy as np

    rows = np.zeros((inputs.num_layers, len(inputs.experts), inputs.width))
    for number, name in enumerate(inputs.experts):
        given = inputs.own.get(name, {})
        positive = prompts_of(given, "positive_prompts", name)
        if not positive:
            raise UserError(
                f"router start '{router}' needs positive_prompts for '{name}'; give them under the merge's options, or "
                "choose another start"
            )
        rows[:, number] = side(positive)
        negative = prompts_of(given, "negative_prompts", name)
        if negative:
            rows[:, number] -= side(negative)
        if not rows[:, number].any():
            raise UserError(
                f"positive and negative prompts of '{name}' say the same, so that nothing leads to it; change one"
            )
    return RouterStart(_unit(rows).astype(np.float32))


def prompts_of(given: Mapping[str, Any], key: str, name: str) -> list[str]:
    """Return an expert's prompts; raises `UserError` for anything but a list of texts."""
    prompts = given.get(key, [])
    if not isinstance(prompts, list | tuple) or not all(isinstance(one, str) and one for one in prompts):
        raise UserError(f"{key} of '{name}' are no list of texts")
    return list(prompts)


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: NDArray[Any] = rows / np.where(lengths > 0, lengths, 1)
    return scaled
