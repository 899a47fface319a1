"""The decoder `knn` against the paper's formula in float64, without cache, batch and padding; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_workspaces import naive_log_probs, stored, text_config
from naive_decoding import Scores, beam_search, double_model, greedy

from expertctl import Sampling, UserError, Workspace
from expertctl.core.models.decoding.memories.manifest import KEYS_FILE, read_memory
from expertctl.core.models.decoding.opening import DecoderChoice, OpenedDecoder, check_decoder
from expertctl.core.models.generation import continue_prompts
from expertctl.core.models.loading import load_model
from expertctl.experts.memories.settings import BuildSettings
from expertctl.plugins.decoders.knn import KnnOptions, resolve_interpolation

COUNT = 5
K, TEMPERATURE, WEIGHT = 7, 20.0, 0.6
OPTIONS = {"k": K, "temperature": TEMPERATURE, "lambda": WEIGHT}
PROMPTS = ("Whereas the", "def area(width, height): whereas", "x", "Größe, façade")


@pytest.fixture(scope="module", params=["llama", "olmo2"])
def workspace(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_workspace: Any
) -> Workspace:
    """With a norm before the last feed-forward network, and without; memories of two domains."""
    root = tmp_path_factory.mktemp(request.param)
    workspace = Workspace(new_workspace(root / "workspace", family=request.param, config=text_config(root / "text")))
    for domain in ("law", "code"):
        workspace.memories.build(f"{domain}-memory", [domain], settings=BuildSettings(fit=False))
    return workspace


@dataclass(frozen=True)
class Case:
    opened: OpenedDecoder
    scores: Scores
    tokenizer: Any
    prompts: list[list[int]]


@pytest.fixture(params=["law-memory", "law-memory,code-memory"])
def case(request: pytest.FixtureRequest, workspace: Workspace) -> Case:
    model, tokenizer = load_model(workspace.layout.seed)
    model.generation_config.eos_token_id = None
    choice = DecoderChoice(
        "knn", {"memory": request.param, **OPTIONS}, workspace.layout.artefact, workspace.layout.memory
    )
    memories = [stored(workspace.memories / name) for name in request.param.split(",")]
    double = double_model(workspace.layout.seed)

    def scores(text: Any) -> torch.Tensor:
        return naive_log_probs(double, memories, list(text), K, TEMPERATURE, WEIGHT)

    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return Case(check_decoder(choice).open(model, tokenizer), scores, tokenizer, prompts)


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_the_distribution_is_that_of_the_paper(case: Case) -> None:
    with torch.no_grad():
        logits = case.opened.model(**left_padded(case.prompts)).logits[:, -1].double()
    for row, prompt in zip(logits, case.prompts, strict=True):
        assert float(row.exp().sum()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(row.exp(), case.scores(prompt).exp(), atol=1e-5, rtol=0)


def test_every_position_of_a_text_has_the_distribution_of_the_paper(case: Case) -> None:
    text = case.prompts[1]
    with torch.no_grad():
        logits = case.opened.model(input_ids=torch.tensor([text])).logits[0].double()
    for position in range(len(text)):
        expected = case.scores(text[: position + 1]).exp()
        torch.testing.assert_close(logits[position].exp(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_those_of_the_reference_alone_and_in_a_padded_batch(case: Case, use_cache: bool) -> None:
    expected = [greedy(case.scores, prompt, COUNT) for prompt in case.prompts]
    case.opened.model.generation_config.use_cache = use_cache
    sampling = Sampling(COUNT, temperature=0)
    assert continue_prompts(case.opened, case.tokenizer, case.prompts, sampling) == expected
    assert continue_prompts(case.opened, case.tokenizer, case.prompts[:1], sampling) == expected[:1]


def test_beams_are_those_of_the_reference(case: Case) -> None:
    prompts = case.prompts[:2]
    expected = [beam_search(case.scores, prompt, COUNT, 2) for prompt in prompts]
    sampling = Sampling(COUNT, temperature=0, beams=2)
    assert continue_prompts(case.opened, case.tokenizer, prompts, sampling) == expected
    assert continue_prompts(case.opened, case.tokenizer, prompts[:1], sampling) == expected[:1]


def test_without_weight_the_model_is_as_before(workspace: Workspace) -> None:
    options = {"memory": "law-memory", **OPTIONS, "lambda": 0}
    plain = workspace.generate("seed", "Whereas", Sampling(8, temperature=0))
    assert (
        workspace.generate("seed", "Whereas", Sampling(8, temperature=0), decoder="knn", decoder_options=options)
        == plain
    )


def test_text_is_scored_better_with_a_memory_of_its_domain(workspace: Workspace) -> None:
    workspace.memories.fit("law-memory", k=8)
    fit = read_memory(workspace.memories / "law-memory").fit
    assert fit is not None
    assert fit.bits_with < fit.bits_without
    plain = workspace.evaluate("seed", domains=["law"]).scores["seed"]["law"]
    better = workspace.evaluate(
        "seed", domains=["law"], decoder="knn", decoder_options={"memory": "law-memory"}
    ).scores["seed"]["law"]
    assert better.values["bits_per_byte"] < 0.9 * plain.values["bits_per_byte"]


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("seed", {}, "needs a memory"),
        ("seed", {"memory": "lav-memory"}, "no memory 'lav-memory'.*did you mean 'law-memory'"),
        ("seed", {"memory": "law-memory", "k": 0}, "k is 0; it must be at least 1"),
        ("seed", {"memory": "law-memory", "lambda": 2}, "lambda is 2.*in the range 0 to 1"),
        ("seed", {"memory": "law-memory", "temperature": 0}, "temperature is 0"),
        (
            "law",
            {"memory": "law-memory"},
            r"memory 'law-memory' was made with seed 'seed' \(\w{12}\), and law computes other",
        ),
        ("seed", {"memory": "code-memory"}, "no temperature: fit one with `expertctl memory fit`"),
    ],
)
def test_what_does_not_fit_is_one_line(workspace: Workspace, model: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        workspace.generate(model, "x", Sampling(2), decoder="knn", decoder_options=options)
    assert "\n" not in str(caught.value)


def damage_keys(folder: Path) -> None:
    content = bytearray((folder / KEYS_FILE).read_bytes())
    content[5] ^= 1
    (folder / KEYS_FILE).write_bytes(content)


def damage_manifest(folder: Path) -> None:
    content = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    content["window"] = 7
    (folder / "memory.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_keys, "file keys.bin was changed"),
        (lambda folder: (folder / KEYS_FILE).write_bytes(b""), "file keys.bin was changed"),
        (lambda folder: (folder / "values.bin").unlink(), "file values.bin is missing"),
        (lambda folder: (folder / "more").touch(), "file more was added"),
        (damage_manifest, "memory.json itself was changed"),
        (lambda folder: (folder / "memory.json").write_text("{"), "memory.json"),
        (lambda folder: (folder / "memory.json").unlink(), "no memory"),
    ],
)
def test_a_damaged_memory_is_refused(
    workspace: Workspace, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(workspace.memories / "law-memory", folder)
    options = {"memory": str(folder), **OPTIONS}
    workspace.generate("seed", "x", Sampling(1), decoder="knn", decoder_options=options)
    damage(folder)
    with pytest.raises(UserError, match=reason) as caught:
        workspace.generate("seed", "x", Sampling(1), decoder="knn", decoder_options=options)
    assert "\n" not in str(caught.value)


def test_defaults_of_several_memories_are_the_means_of_what_was_fitted(workspace: Workspace) -> None:
    fit = read_memory(workspace.memories / "law-memory").fit or workspace.memories.fit("law-memory", k=8).fit
    assert fit is not None
    chosen = resolve_interpolation(KnnOptions(), [fit, None, fit])
    assert chosen.temperature == pytest.approx(fit.temperature)
    assert chosen.lambda_ == pytest.approx(fit.lambda_)
    assert resolve_interpolation(KnnOptions(k=3, temperature=2, lambda_=0.5), [fit]).k == 3
