"""Attention sinks, against a Llama in float64 that is written out by hand and reads token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive_decoding import double_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from expertctl import UserError
from expertctl.core.models.decoding.opening import OpenedDecoder
from expertctl.core.models.generation import Sampling, continue_prompts
from expertctl.core.models.loading import load_model
from expertctl.core.models.scoring import token_log_probs
from expertctl.core.testing import tiny_model_folder
from expertctl.plugins.decoders.sinks.layers import Columns
from expertctl.plugins.decoders.sinks.model import SinksModel

SINKS, WINDOW = 2, 6
TEXT = torch.randint(1, 250, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("sinks") / "llama", "llama")


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    model, _ = load_model(folder)
    model.generation_config.eos_token_id = None
    return model


def rotated(states_HLD: Tensor, positions_L: Tensor, base: float) -> Tensor:
    half = states_HLD.shape[-1] // 2
    angles = positions_L[:, None].double() / base ** (torch.arange(half).double() / half)
    first, second = states_HLD[..., :half], states_HLD[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def normalised(hidden_D: Tensor, norm: torch.nn.Module) -> Tensor:
    return hidden_D / (hidden_D.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


@torch.no_grad()
def streamed_logits(model: PreTrainedModel, text: list[int], sinks: int, window: int) -> Tensor:
    """Return the logits after each token, (T, V); keys have no positions until they are read."""
    network, base = model.model, model.config.rope_parameters["rope_theta"]
    heads, width = model.config.num_attention_heads, model.config.head_dim
    caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in network.layers]
    logits = []
    for token in text:
        hidden_D = network.embed_tokens.weight[token]
        for layer, cache in zip(network.layers, caches, strict=True):
            attention, inner_D = layer.self_attn, normalised(hidden_D, layer.input_layernorm)
            query, key, value = (
                projection(inner_D).view(heads, 1, width)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            cache.append((key, value))
            if len(cache) > sinks + window:
                del cache[sinks]
            places = torch.arange(len(cache))
            keys = rotated(torch.cat([key for key, _ in cache], dim=1), places, base)
            values = torch.cat([value for _, value in cache], dim=1)
            weights = (rotated(query, places[-1:], base) @ keys.transpose(1, 2) / width**0.5).softmax(-1)
            hidden_D = hidden_D + attention.o_proj((weights @ values).flatten())
            inner_D = normalised(hidden_D, layer.post_attention_layernorm)
            mlp = layer.mlp
            gate_F = torch.nn.functional.silu(mlp.gate_proj(inner_D))
            hidden_D = hidden_D + mlp.down_proj(gate_F * mlp.up_proj(inner_D))
        logits.append(model.lm_head(normalised(hidden_D, network.norm)))
    return torch.stack(logits)


@pytest.mark.parametrize("sinks", [0, SINKS])
def test_the_distribution_is_that_of_the_first_tokens_and_a_window(
    folder: Path, model: PreTrainedModel, sinks: int
) -> None:
    expected = streamed_logits(double_model(folder), TEXT, sinks, WINDOW).softmax(-1)
    wrapped = SinksModel(model, sinks, WINDOW)
    with torch.no_grad():
        whole = wrapped(input_ids=torch.tensor([TEXT])).logits[0].double()
        cache, pieces = None, []
        for begin, end in ((0, 5), (5, 6), (6, 20), (20, 40)):
            output = wrapped(input_ids=torch.tensor([TEXT[begin:end]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits[0].double())
    torch.testing.assert_close(whole.softmax(-1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(pieces).softmax(-1), expected, atol=1e-5, rtol=0)


def test_the_reference_is_the_model_while_nothing_is_forgotten(folder: Path) -> None:
    """Else the test above would compare two errors."""
    double = double_model(folder)
    with torch.no_grad():
        logits = double(input_ids=torch.tensor([TEXT])).logits[0]
    torch.testing.assert_close(
        streamed_logits(double, TEXT, 2, 64), logits, atol=1e-4, rtol=0
    )  # transformers' rotations are float32
    assert (streamed_logits(double, TEXT, SINKS, WINDOW) - logits).abs().max() > 0.1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_generates_what_each_text_does_alone(
    folder: Path, model: PreTrainedModel, beams: int, use_cache: bool
) -> None:
    wrapped = SinksModel(model, SINKS, WINDOW)
    wrapped.generation_config.use_cache = use_cache
    _, tokenizer = load_model(folder)
    prompts = [TEXT[:3], TEXT[:7], TEXT[:1], TEXT[:19]]
    opened, sampling = OpenedDecoder(wrapped), Sampling(12, temperature=0, beams=beams)
    together = continue_prompts(opened, tokenizer, prompts, sampling)
    assert together == [continue_prompts(opened, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    if beams == 1:
        double = double_model(folder)
        for prompt, tokens in zip(prompts, together, strict=True):
            logits = streamed_logits(double, [*prompt, *tokens], SINKS, WINDOW)
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@torch.no_grad()
def model_that_rests_on_the_first_token() -> PreTrainedModel:
    """Return a model that predicts token t + 1 after t while its attention finds token 0, whose value is zero.

    All other values vote for one wrong token. Widths 0 to 15 hold the token, 16 marks tokens other than 0, 17 token 0.
    """
    config = AutoConfig.for_model(
        "llama",
        vocab_size=16,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=32,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    layer = model.model.layers[0]
    for parameter in (model.model.embed_tokens.weight, model.lm_head.weight, *layer.self_attn.parameters()):
        parameter.zero_()
    layer.mlp.down_proj.weight.zero_()
    tokens = torch.arange(1, 16)
    model.model.embed_tokens.weight[tokens, tokens] = 4.0
    model.model.embed_tokens.weight[tokens, 16] = 4.0
    model.model.embed_tokens.weight[0, 17] = 4.0
    slowest = 15  # the pair of widths that RoPE hardly rotates
    layer.self_attn.q_proj.weight[slowest, 16] = layer.self_attn.k_proj.weight[slowest, 17] = 4.0
    layer.self_attn.v_proj.weight[0, 16] = 1.0
    layer.self_attn.o_proj.weight[5, 0] = 10.0
    model.lm_head.weight[tokens % 15 + 1, tokens] = 5.0
    return model


def test_sinks_keep_the_loss_flat_where_a_plain_window_explodes() -> None:
    model = model_that_rests_on_the_first_token()
    stream = [0, *(number % 15 + 1 for number in range(120))]
    tokens = torch.tensor([stream])

    def loss(sinks: int, window: int) -> Tensor:
        with torch.inference_mode():
            return -token_log_probs(SinksModel(model, sinks, window), tokens)[0, 1:]

    dense = -token_log_probs(model, tokens)[0, 1:]
    assert dense.max() < 0.1
    assert loss(1, 30).max() < 0.1
    plain = loss(0, 31)
    assert plain[:28].max() < 0.1
    assert plain[32:].median() > 5


def test_padding_leaves_the_cache_before_a_text_does() -> None:
    columns = Columns(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    assert columns.evicted(2, 2).tolist() == [[2, 3, 4, 5], [1, 2, 4, 5], [0, 1, 4, 5]]


def test_memory_does_not_grow(model: PreTrainedModel) -> None:
    wrapped, cache, sizes = SinksModel(model, SINKS, WINDOW), None, set()
    tokens = torch.randint(1, 250, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for number in range(120):
            output = wrapped(input_ids=tokens[:, number : number + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            assert torch.isfinite(output.logits).all()
            if number >= SINKS + WINDOW:
                layers = cache.base.layers
                sizes.add(sum(layer.keys.numel() + layer.values.numel() for layer in layers))
    assert len(sizes) == 1
    assert cache.get_seq_length() == 120


@pytest.mark.slow
@pytest.mark.long
def test_memory_is_flat_over_many_tokens(folder: Path) -> None:
    import resource

    model, _ = load_model(folder)
    wrapped, cache, peaks = SinksModel(model, 4, 12), None, []
    tokens = torch.randint(1, 250, (1, 20_000), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for begin in range(0, 20_000, 500):
            output = wrapped(
                input_ids=tokens[:, begin : begin + 500], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert torch.isfinite(output.logits).all()
    assert peaks[-1] - peaks[3] < 10_000, "kilobytes"


@pytest.mark.parametrize("family", ["qwen3", "cohere", "glm", "phi", "gpt_neox", "mixtral"])
def test_other_rotary_families_are_invariant_too(family: str, tmp_path: Path) -> None:
    """While nothing is forgotten, the model's own logits; and afterwards, a padded batch equals each text alone."""
    model, _ = load_model(tiny_model_folder(tmp_path / family, family))
    wrapped = SinksModel(model, SINKS, WINDOW)
    with torch.no_grad():
        output = wrapped(input_ids=torch.tensor([TEXT[:4]]), use_cache=True)
        more = wrapped(input_ids=torch.tensor([TEXT[4:8]]), past_key_values=output.past_key_values).logits[0]
        dense = model(input_ids=torch.tensor([TEXT[:8]])).logits[0]
        alone = wrapped(input_ids=torch.tensor([TEXT[:20]])).logits[0, -1]
        padded = wrapped(
            input_ids=torch.tensor([[0] * 5 + TEXT[:20]]), attention_mask=torch.tensor([[0] * 5 + [1] * 20])
        ).logits[0, -1]
    torch.testing.assert_close(torch.cat((output.logits[0], more)), dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "no rotary position embedding"),
        ("bloom", {}, "no rotary position embedding"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "length of the text",
        ),
        ("mistral", {"sliding_window": 8}, "not all of their layers"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "plain rotary"),
        ("mamba", {}, "not all of their layers"),
    ],
)
def test_models_without_plain_rotary_positions_are_refused(
    family: str, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        **changes,
    )
    with pytest.raises(UserError, match=reason):
        SinksModel(AutoModelForCausalLM.from_config(config).eval(), SINKS, WINDOW)


def test_more_tokens_than_positions_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="4 sinks and a window of 125 tokens do not fit the model's 128 positions"):
        SinksModel(model, 4, 125)
    assert SinksModel(model, 4).size == 128
