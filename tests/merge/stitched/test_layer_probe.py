"""A pass layer by layer is the model's own, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import family_config, family_model

from expertctl import UserError
from expertctl.merge.stitched.layer_probe import output_forms, probe_layers, require_steps
from expertctl.merge.stitched.stepwise import OutputForm, Stepwise, decoder_layers, hidden_states_of

TOKENS = torch.arange(3, 13)[None]
PLAIN = OutputForm()


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", PLAIN),
        ("llama4_text", PLAIN),
        ("opt", PLAIN),
        ("gpt_oss", PLAIN),  # a mixture of experts, whose kernels look at numbers
        ("gptj", OutputForm(tuple, 1)),
        ("bamba", OutputForm(tuple, 1)),
        ("rwkv", OutputForm(tuple, 2)),
        ("openai-gpt", OutputForm(list, 0)),
        ("gemma3n_text", PLAIN),  # later layers read keys and values of earlier ones
    ],
)
def test_the_states_are_those_of_the_models_own_pass(family: str, form: OutputForm) -> None:
    model, last = family_model(family), {}
    (forms,) = output_forms([model])
    assert set(forms) == {form}
    layers = decoder_layers(model)

    def keep(layer: Any, inputs: Any, output: Any) -> None:
        last["states"] = hidden_states_of(output)

    with torch.inference_mode():
        hook = layers[-1].register_forward_hook(keep)
        model(TOKENS, use_cache=False)
        hook.remove()
        stepwise = Stepwise(model, forms)
        stepwise.begin(input_ids=TOKENS, use_cache=False)
        assert torch.equal(stepwise.advance(len(layers)), last["states"])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("glm_moe_dsa", "hands more than hidden states from layer to layer"),
        ("qwen4_exp_text", "hands 128 channels from layer to layer, and its hidden size is 32"),
        ("hrm_text", "has no list of 16 decoder layers"),
    ],
)
def test_other_families_are_refused(family: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"{reason}; models of this family cannot be stitched"):
        require_steps({"model_type": family, **family_config(family).to_dict()})


def test_states_that_change_between_layers_are_refused() -> None:
    """RWKV halves its hidden states every few layers."""
    config = family_config("rwkv")
    config.rescale_every = 1
    with pytest.raises(UserError, match="changes the hidden states between its layers"):
        probe_layers(config)


def test_the_sizes_of_a_member_have_transformers_names() -> None:
    config = require_steps({"model_type": "mpt", **family_config("mpt").to_dict()})
    assert config.hidden_size == config.d_model
