"""The ensemble against a mixture written down naively, in float64, over members loaded independently.

Shapes: K = experts, B = batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

import expertctl
from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.settings import MergeConfig
from expertctl.core.errors import UserError
from expertctl.core.manifests.verification import verify
from expertctl.core.models.kernels.posterior import EWMA_RATE, SMALLEST_PRIOR
from expertctl.merge.ensemble.posterior_mixing import PosteriorMixer
from expertctl.merge.merging import merge

EXPERTS = ("code", "law", "news")
PRIOR = {"code": 0.5, "law": 0.2, "news": 0.3}
FAMILIES = {"olmo2": {"family": "olmo2"}, "llama_tied": {"family": "llama", "tied": True}}
POSTERIORS = ("prefix", "last_token")
TEXT = [72, 41, 8, 8, 99, 250, 3, 17, 120, 64, 5, 201]
ROWS = [TEXT, [9, 210, 33], [77, 6, 140, 140, 2, 58, 91]]


# --- the oracle ---


@dataclass
class NaiveMixture:
    """p(x_t | x_<t) = sum_k p(k | x_<t) p_k(x_t | x_<t), one text and one token at a time."""

    members: Sequence[torch.nn.Module]
    prior: Sequence[float]
    posterior: str
    top_k: int | None = None
    every: int = 16

    def token_log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        """Each member's log-probabilities after every token, (K, T, V)."""
        with torch.inference_mode():
            logits = [member(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for member in self.members]
        return np.stack([row.double().log_softmax(-1).numpy() for row in logits])

    def after(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The next token's probabilities (T, V) and p(expert | text so far) (T, K), after every token."""
        log_probs = self.token_log_probs(tokens)
        probabilities, weights = [], []
        chosen = range(len(self.members))
        for t in range(len(tokens)):
            joint = []
            for k, prior in enumerate(self.prior):
                heard = [log_probs[k, i - 1, tokens[i]] for i in range(1, t + 1)]
                evidence = sum(heard) if self.posterior == "prefix" else sum(heard[-1:])
                joint.append(prior * np.exp(evidence))
            if self.top_k is not None and t > 0 and t % self.every == 0:
                chosen = np.argsort(-np.array(joint), kind="stable")[: self.top_k]
            joint = [share if k in chosen else 0.0 for k, share in enumerate(joint)]
            weights.append(np.array(joint) / sum(joint))
            probabilities.append(sum(w * np.exp(log_probs[k, t]) for k, w in enumerate(weights[-1])))
        return np.stack(probabilities), np.stack(weights)

    def continued(self, tokens: Sequence[int], count: int, stop: int) -> list[int]:
        """The likeliest continuation, token by token, each time from the whole text."""
        text = list(tokens)
        for _ in range(count):
            text.append(int(self.after(text)[0][-1].argmax()))
            if text[-1] == stop:
                break
        return text


def independent_members(workspace: Path, names: Sequence[str]) -> list[torch.nn.Module]:
    """Load experts with nothing of ours: the seed's file with the expert's tensors laid over it."""
    seed = load_file(workspace / "seed" / "model.safetensors")
    members = []
    for name in names:
        state = seed | load_file(workspace / "experts" / name / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(workspace / "seed")
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        members.append(model.double().eval())
    return members


# --- ensembles to look at ---

Make = Callable[..., Path]


@pytest.fixture(scope="module", params=FAMILIES)
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Path:
    return new_workspace(tmp_path_factory.mktemp(request.param) / "ws", EXPERTS, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Path:
    """One workspace for what does not depend on the family."""
    return new_workspace(tmp_path_factory.mktemp("olmo") / "ws", EXPERTS)


def make_ensemble(workspace: Path, experts: Sequence[str] = EXPERTS, weights: Any = PRIOR, **options: Any) -> Path:
    """Merge into an ensemble with the prior that is given by `weights`; made once for each set of arguments."""
    name = "-".join(str(part).replace("_", "") for part in ("e", *experts, *options.values()))
    folder = workspace / "generalists" / name
    if not folder.exists():
        own_prior = options.get("prior", "given") != "given"
        config = MergeConfig(
            method="ensemble",
            experts=tuple(experts),
            weights="uniform" if own_prior else {expert: weights[expert] for expert in experts},
            options=options,
        )
        merge(Layout(workspace), name, config)
    return folder


def loaded(folder: Path) -> Any:
    return expertctl.load_model(folder)[0]


@pytest.fixture(scope="module", params=POSTERIORS)
def pair(request: pytest.FixtureRequest, workspace: Path) -> tuple[Any, NaiveMixture]:
    """An ensemble as it is loaded, and the same mixture written naively."""
    model = loaded(make_ensemble(workspace, posterior=request.param))
    return model, NaiveMixture(independent_members(workspace, EXPERTS), list(PRIOR.values()), request.param)


@pytest.fixture(scope="module")
def model(pair: tuple[Any, NaiveMixture]) -> Any:
    return pair[0]


@pytest.fixture(scope="module")
def naive(pair: tuple[Any, NaiveMixture]) -> NaiveMixture:
    return pair[1]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def padded(rows: Sequence[Sequence[int]], side: str) -> dict[str, torch.Tensor]:
    """Return rows of different lengths as one batch, with arbitrary tokens where padding is."""
    longest = max(map(len, rows))
    batch = {"input_ids": [], "attention_mask": []}
    for row in rows:
        padding, gap = [7] * (longest - len(row)), [0] * (longest - len(row))
        ones = [1] * len(row)
        batch["input_ids"].append([*padding, *row] if side == "left" else [*row, *padding])
        batch["attention_mask"].append([*gap, *ones] if side == "left" else [*ones, *gap])
    return {name: torch.tensor(values) for name, values in batch.items()}


def assert_close(actual: torch.Tensor, expected: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(actual.double().numpy(), np.asarray(expected), rtol=tolerance, atol=tolerance)


# --- forward ---


def test_logits_are_log_probabilities_of_the_naive_mixture(model: Any, naive: NaiveMixture) -> None:
    output = model(input_ids=torch.tensor([TEXT]))
    probabilities, weights = naive.after(TEXT)
    assert_close(output.logits[0].exp(), probabilities)
    assert_close(output.expert_weights[0], weights)


def test_the_oracle_is_worth_something(naive: NaiveMixture) -> None:
    """Experts differ and the text moves the posterior; else every mixture would look right."""
    _, weights = naive.after(TEXT)
    assert np.abs(weights - weights[0]).max() > 0.2
    log_probs = naive.token_log_probs(TEXT)
    assert np.abs(log_probs[0] - log_probs[1]).max() > 1


def test_probabilities_sum_to_one(model: Any) -> None:
    output = model(**padded(ROWS, "left"))
    assert_close(output.logits.exp().sum(-1), np.ones(output.logits.shape[:2]))
    assert_close(output.expert_weights.sum(-1), np.ones(output.logits.shape[:2]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_rows_on_their_own(model: Any, naive: NaiveMixture, side: str) -> None:
    batch = padded(ROWS, side)
    output = model(**batch)
    for index, row in enumerate(ROWS):
        real = batch["attention_mask"][index].bool()
        probabilities, weights = naive.after(row)
        assert_close(output.logits[index][real].exp(), probabilities)
        assert_close(output.expert_weights[index][real], weights)


@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 6), (1, 11), (12,)], ids=str)
def test_a_cache_gives_in_pieces_what_one_pass_gives(model: Any, pieces: tuple[int, ...]) -> None:
    whole = model(input_ids=torch.tensor([TEXT])).logits
    cache, logits, begin = None, [], 0
    for size in pieces:
        piece = torch.tensor([TEXT[begin : begin + size]])
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache, begin = output.past_key_values, begin + size
        logits.append(output.logits)
    assert cache.get_seq_length() == len(TEXT)
    assert_close(torch.cat(logits, dim=1), whole)


def test_a_cache_goes_on_from_a_left_padded_batch(model: Any, naive: NaiveMixture) -> None:
    begins = padded(ROWS, "left")
    goes_on = torch.tensor([[11, 12], [13, 14], [15, 16]])
    first = model(**begins, use_cache=True)
    mask = torch.cat([begins["attention_mask"], torch.ones(3, 2, dtype=torch.long)], dim=1)
    second = model(input_ids=goes_on, attention_mask=mask, past_key_values=first.past_key_values)
    for index, row in enumerate(ROWS):
        probabilities, weights = naive.after([*row, *goes_on[index].tolist()])
        assert_close(second.logits[index].exp(), probabilities[-2:])
        assert_close(second.expert_weights[index], weights[-2:])


def test_left_padding_leaves_absolute_positions_as_they_are(new_workspace: Any, tmp_path: Path) -> None:
    """Rotary embeddings would not notice a shift; GPT-2's learned positions do."""
    workspace = new_workspace(tmp_path / "ws", EXPERTS, family="gpt2", tied=True)
    model = loaded(make_ensemble(workspace))
    naive = NaiveMixture(independent_members(workspace, EXPERTS), list(PRIOR.values()), "prefix")
    batch = padded(ROWS, "left")
    logits = model(**batch).logits
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for index, row in enumerate(ROWS):
        assert_close(logits[index, -len(row) :].exp(), naive.after(row)[0])
        alone = naive.continued(row, 4, stop=model.config.eos_token_id)[len(row) :]
        assert together[index].tolist()[: len(alone)] == alone


def test_logits_to_keep_gives_the_last_ones_only(model: Any) -> None:
    whole = model(input_ids=torch.tensor([TEXT])).logits
    assert torch.equal(model(input_ids=torch.tensor([TEXT]), logits_to_keep=2).logits, whole[:, -2:])


def test_labels_give_the_mean_loss_of_unmasked_tokens(model: Any, naive: NaiveMixture) -> None:
    labels = torch.tensor([TEXT])
    labels[0, :4] = -100
    loss = model(input_ids=torch.tensor([TEXT]), labels=labels).loss
    probabilities, _ = naive.after(TEXT)
    assert_close(loss, -np.mean([np.log(probabilities[t - 1, TEXT[t]]) for t in range(4, len(TEXT))]))


def test_copies_of_one_expert_are_that_expert(workspace: Path) -> None:
    """Three experts with the same bytes, whatever the prior, are the single model."""
    single = independent_members(workspace, ["law"])[0]
    folder = make_ensemble(workspace)
    config = json.loads((folder / "config.json").read_text())
    config_class, model_class = _classes()
    alike = model_class(config_class(**config), [single.float() for _ in EXPERTS]).eval()
    tokens = torch.tensor([TEXT])
    assert_close(alike(input_ids=tokens).logits, single(input_ids=tokens).logits.log_softmax(-1))


def test_one_expert_is_that_expert(workspace: Path) -> None:
    model = loaded(make_ensemble(workspace, ["law"], {"law": 1.0}))
    single = independent_members(workspace, ["law"])[0]
    tokens = torch.tensor([TEXT])
    assert_close(model(input_ids=tokens).logits, single(input_ids=tokens).logits.log_softmax(-1))


def _classes() -> tuple[Any, Any]:
    from expertctl.merge.ensemble.model import EnsembleConfig, EnsembleForCausalLM

    return EnsembleConfig, EnsembleForCausalLM


# --- generate ---


def test_greedy_generation_equals_a_naive_loop_without_cache(model: Any, naive: NaiveMixture) -> None:
    for row in ROWS:
        generated = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)
        assert generated[0].tolist() == naive.continued(row, 8, stop=model.config.eos_token_id)


def test_a_left_padded_batch_generates_what_its_rows_generate_alone(model: Any) -> None:
    batch = padded(ROWS, "left")
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)
    for index, row in enumerate(ROWS):
        alone = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row) :].tolist()
        assert together[index, batch["input_ids"].shape[1] :].tolist()[: len(alone)] == alone


def test_beam_search_is_the_same_with_and_without_cache(model: Any) -> None:
    batch = padded(ROWS, "left")
    settings = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with_cache = model.generate(**batch, **settings)
    without = model.generate(**batch, **settings, use_cache=False)
    assert with_cache.shape[0] == 2 * len(ROWS)
    assert torch.equal(with_cache, without)


def test_sampling_several_sequences_is_the_same_with_and_without_cache(model: Any) -> None:
    batch = padded(ROWS, "left")
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(
            model.generate(
                **batch, max_new_tokens=6, do_sample=True, num_return_sequences=4, top_k=0, use_cache=use_cache
            )
        )
    assert drawn[0].shape[0] == 4 * len(ROWS)
    assert torch.equal(*drawn)
    assert len({tuple(row.tolist()) for row in drawn[0][:4]}) > 1


# --- scoring ---


def test_target_log_probs_equals_gathering_from_forward(model: Any) -> None:
    tokens = torch.tensor([TEXT, TEXT[::-1]])
    gathered = model(input_ids=tokens[:, :-1]).logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert_close(model.target_log_probs(tokens), gathered)


def test_responsibilities_are_shares_of_each_token(model: Any, naive: NaiveMixture) -> None:
    responsibilities = model.responsibilities(torch.tensor([TEXT]))
    assert responsibilities.shape == (1, len(TEXT) - 1, len(EXPERTS))
    assert_close(responsibilities.sum(-1), np.ones((1, len(TEXT) - 1)))
    log_probs = naive.token_log_probs(TEXT)
    _, weights = naive.after(TEXT)
    for t in range(1, len(TEXT)):
        joint = weights[t - 1] * np.exp(log_probs[:, t - 1, TEXT[t]])
        assert_close(responsibilities[0, t - 1], joint / joint.sum())


# --- top_k and the updating prior ---


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_chooses_members_by_the_text_so_far(olmo: Path, top_k: int, posterior: str) -> None:
    model = loaded(make_ensemble(olmo, top_k=top_k, every=3, posterior=posterior))
    naive = NaiveMixture(independent_members(olmo, EXPERTS), list(PRIOR.values()), posterior, top_k, every=3)
    text = [*TEXT, *ROWS[0], *ROWS[1]]
    probabilities, weights = naive.after(text)
    output = model(input_ids=torch.tensor([text]))
    assert_close(output.logits[0].exp(), probabilities)
    assert_close(output.expert_weights[0], weights)
    assert (weights[3:] > 0).sum(axis=1).tolist() == [top_k] * (len(text) - 3)
    scored = model.target_log_probs(torch.tensor([text]))
    assert_close(scored[0], [np.log(probabilities[t - 1, text[t]]) for t in range(1, len(text))])


@pytest.mark.parametrize("posterior", POSTERIORS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=14), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 13), max_size=5),
    every=st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
)
def test_members_that_were_skipped_catch_up(
    olmo: Path, posterior: str, rows: list[list[int]], cuts: list[int], every: int, side: str
) -> None:
    """In pieces, in batches and with padding, a row is read as it is alone and at once."""
    model = loaded(make_ensemble(olmo, top_k=1, every=3, posterior=posterior))
    model.mixer = PosteriorMixer(replace(model.mixer._settings, every=every))
    batch = padded(rows, side)
    length = batch["input_ids"].shape[1]
    ends = sorted({*(cut for cut in cuts if cut < length), length})
    cache, outputs = None, []
    with torch.no_grad():
        for begin, end in pairwise([0, *ends]):
            output = model(
                input_ids=batch["input_ids"][:, begin:end],
                attention_mask=batch["attention_mask"][:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            outputs.append(output)
        logits = torch.cat([output.logits for output in outputs], dim=1)
        for number, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row])).logits[0]
            own = logits[number, length - len(row) :] if side == "left" else logits[number, : len(row)]
            assert_close(own, alone, 1e-4)


def test_members_that_are_not_chosen_do_not_run(olmo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(make_ensemble(olmo, top_k=1, every=8))
    calls = [0] * 3
    for index, member in enumerate(model.members):
        member.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    model.generate(torch.tensor([TEXT[:9]]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    # the prompt, which ends after its first choice; then, of 15 passes, one choice by all after 16 tokens
    assert sorted(calls)[:2] == [2, 2]
    assert sum(calls) == 3 + 3 + 14


def test_only_experts_with_a_prior_are_loaded(new_workspace: Any, tmp_path: Path) -> None:
    weights = {**PRIOR, "law": 0.0}
    folder = make_ensemble(new_workspace(tmp_path / "ws", EXPERTS), weights=weights)
    (folder / "experts" / "law.safetensors").unlink()
    assert loaded(folder).expert_names == ["code", "news"]


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_top_k_must_name_between_one_and_all_experts(olmo: Path, top_k: int) -> None:
    with pytest.raises(UserError, match=f"top_k is {top_k}; with 3 experts it must be in the range 1 to 3"):
        make_ensemble(olmo, top_k=top_k)


def _moved(naive: NaiveMixture, prior: np.ndarray, tokens: Sequence[int], *, first: bool) -> np.ndarray:
    """The prior after one text: 0.3 of the posterior before its last token, 0.7 of the old prior; at first only the former."""
    moving = NaiveMixture(naive.members, list(prior), naive.posterior)
    _, weights = moving.after(tokens[:-1])
    mean = weights[-1] if first else EWMA_RATE * weights[-1] + (1 - EWMA_RATE) * prior
    return np.maximum(mean, SMALLEST_PRIOR) / np.maximum(mean, SMALLEST_PRIOR).sum()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_updating_prior_moves_with_every_text_and_starts_again_when_loaded(olmo: Path, posterior: str) -> None:
    folder = make_ensemble(olmo, prior="updating", posterior=posterior)
    naive = NaiveMixture(independent_members(olmo, EXPERTS), [1 / 3] * 3, posterior)
    model, prior = loaded(folder), np.full(3, 1 / 3)
    for number, row in enumerate(ROWS):
        probabilities, _ = NaiveMixture(naive.members, list(prior), posterior).after(row)
        scored = model.target_log_probs(torch.tensor([row]))
        assert_close(scored[0], [np.log(probabilities[t - 1, row[t]]) for t in range(1, len(row))])
        prior = _moved(naive, prior, row, first=number == 0)
        assert_close(model.mixer.prior, prior)
    assert_close(loaded(folder).mixer.prior, np.full(3, 1 / 3))


def test_a_known_domain_has_a_prior_of_its_own(olmo: Path) -> None:
    model = loaded(make_ensemble(olmo, posterior="prefix"))
    own = (0.1, 0.1, 0.8)
    model.mixer = PosteriorMixer(replace(model.mixer._settings, domain_priors={"law": own}))
    assert model.text_domains == ("law",)
    known = NaiveMixture(independent_members(olmo, EXPERTS), own, "prefix").after(TEXT)[0]
    model.begin_text("law")
    assert_close(model(input_ids=torch.tensor([TEXT])).logits[0].exp(), known)
    model.begin_text()
    unknown = NaiveMixture(independent_members(olmo, EXPERTS), list(PRIOR.values()), "prefix").after(TEXT)[0]
    assert_close(model(input_ids=torch.tensor([TEXT])).logits[0].exp(), unknown)


# --- files and memory ---


def test_experts_share_the_seed_tensors_that_training_left_alone(new_workspace: Any, tmp_path: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", EXPERTS, changed="model.layers.*.mlp.*")
    folder = make_ensemble(workspace)
    model = loaded(folder)
    for name, first in model.members[0].named_parameters():
        places = {dict(member.named_parameters())[name].data_ptr() for member in model.members}
        assert len(places) == (3 if ".mlp." in name else 1), (name, first.shape)
    naive = NaiveMixture(independent_members(workspace, EXPERTS), list(PRIOR.values()), "prefix")
    assert_close(model(input_ids=torch.tensor([TEXT])).logits[0].exp(), naive.after(TEXT)[0])


def test_an_ensemble_folder_is_made_of_links(new_workspace: Any, tmp_path: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", EXPERTS, changed="model.layers.*.mlp.*")
    folder = make_ensemble(workspace)
    for name in EXPERTS:
        original = workspace / "experts" / name / "model.safetensors"
        assert (folder / "experts" / f"{name}.safetensors").stat().st_ino == original.stat().st_ino
    seed = workspace / "seed" / "model.safetensors"
    assert (folder / "seed" / "model.safetensors").stat().st_ino == seed.stat().st_ino
    assert verify(folder) == []


def test_experts_that_changed_everything_need_no_seed_in_the_folder(olmo: Path) -> None:
    assert not (make_ensemble(olmo) / "seed").exists()


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"prior": "updating", "top_k": 2}], ids=str)
def test_saving_and_loading_again_changes_nothing(olmo: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = loaded(make_ensemble(olmo, **options))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.tensor([TEXT])
    assert again.expert_names == model.expert_names
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for _ in range(2):
        assert torch.equal(again.target_log_probs(tokens), model.target_log_probs(tokens))


def test_saving_keeps_tied_embeddings_tied(new_workspace: Any, tmp_path: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", EXPERTS, family="llama", tied=True)
    model = loaded(make_ensemble(workspace))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for member in again.members:
        assert member.lm_head.weight.data_ptr() == member.model.embed_tokens.weight.data_ptr()
    tokens = torch.tensor([TEXT])
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_chosen_dtype_holds_for_every_member(olmo: Path) -> None:
    model, _ = expertctl.load_model(make_ensemble(olmo), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.members.parameters()} == {torch.bfloat16}
    assert model(input_ids=torch.tensor([TEXT])).logits.dtype == torch.float32


def test_bfloat16_experts_stay_bfloat16(new_workspace: Any, tmp_path: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", EXPERTS, dtype="bfloat16", changed="model.layers.*.mlp.*")
    model = loaded(make_ensemble(workspace))
    assert {parameter.dtype for parameter in model.members.parameters()} == {torch.bfloat16}


def test_a_missing_expert_file_is_named(new_workspace: Any, tmp_path: Path) -> None:
    folder = make_ensemble(new_workspace(tmp_path / "ws", EXPERTS))
    (folder / "experts" / "law.safetensors").unlink()
    with pytest.raises(UserError, match=r"law\.safetensors is missing"):
        loaded(folder)


def test_a_tensor_that_no_file_holds_is_named_and_not_made_up(new_workspace: Any, tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    import shutil

    workspace = new_workspace(tmp_path / "ws", EXPERTS, changed="model.layers.*.mlp.*")
    folder = make_ensemble(workspace)
    shutil.rmtree(folder / "seed")
    with pytest.raises(UserError, match=r"no tensor 'lm_head\.weight' for expert 'code'"):
        loaded(folder)


FRESH_PROCESS = """
import sys, torch, expertctl
from transformers import AutoModelForCausalLM, AutoTokenizer
expertctl.register_auto_classes()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(type(model).__name__, len(tokenizer))
print(model.generate(torch.tensor([[72, 41, 8]]), max_new_tokens=6, do_sample=False).tolist())
"""


def test_auto_classes_load_an_ensemble_in_a_fresh_process(olmo: Path) -> None:
    folder = make_ensemble(olmo)
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    name, generated = done.stdout.strip().splitlines()
    assert name == "EnsembleForCausalLM 300"
    expected = loaded(folder).generate(torch.tensor([[72, 41, 8]]), max_new_tokens=6, do_sample=False)
    assert generated == str(expected.tolist())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GenerationMixin, "_supports_default_dynamic_cache"),
        (PretrainedConfig, "_attn_implementation"),
        (PreTrainedModel, "_init_weights"),
        (PreTrainedModel, "_supports_flash_attn"),
        (PreTrainedModel, "_supports_sdpa"),
    ],
)
def test_private_names_of_transformers_that_model_classes_override_exist(owner: type, name: str) -> None:
    assert hasattr(owner, name), (
        f"transformers no longer has {owner.__name__}.{name}, which the ensemble, the mixture container or the stitched "
        "model uses; adapt the model class to its replacement"
    )
