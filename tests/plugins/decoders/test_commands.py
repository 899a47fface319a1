"""Decoders in `generate` and `eval`: what users see, on every kind of artefact, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertctl import Sampling, UserError
from expertctl.core.testing import tiny_model_folder
from expertctl.workspace import Workspace

GREEDY = Sampling(4, temperature=0)
PROMPTS = ["The fox", "def area(width, height): whereas", "x"]
DECODERS: dict[str, dict[str, Any]] = {
    "contrastive": {"amateur": "news", "form": "reasoning"},
    "context_aware": {"context": "The court of the first"},
    "experts_against_seed": {"weights": {"law": 0.8, "news": -0.5}},
    "sinks": {"sinks": 2, "window": 6},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, new_workspace: Callable[..., Path]) -> Workspace:
    root = new_workspace(tmp_path_factory.mktemp("decoders") / "workspace")
    workspace = Workspace(root)
    workspace.merge("forest", method="ensemble", options={"prior": "uniform"})
    workspace.merge("campus", method="btx", options={"router": "random"})
    workspace.merge("stitched", method="stitch")
    return workspace


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("model", ["code", "forest", "campus", "stitched"])
def test_every_kind_of_artefact_generates_in_a_padded_batch_what_it_does_alone(
    workspace: Workspace, model: str, decoder: str
) -> None:
    arguments: dict[str, Any] = {"decoder": decoder, "decoder_options": DECODERS[decoder]}
    together = workspace.generate_batch(model, PROMPTS, GREEDY, **arguments)
    alone = workspace.generate(model, PROMPTS[1], GREEDY, **arguments)
    assert together[1] == alone
    plain = workspace.generate_batch(model, PROMPTS, GREEDY)
    assert [text.text for text in together] != [text.text for text in plain]


def test_the_shares_of_an_ensembles_experts_can_be_shown(workspace: Workspace) -> None:
    generation = workspace.generate("forest", "The fox", GREEDY, shares=True, decoder="sinks")
    assert generation.experts == ("code", "law", "news")
    assert sum((generation.continuation[0].shares or {}).values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "decoder", "options", "reason"),
    [
        ("code", "contrastve", {}, "no decoder 'contrastve' .did you mean 'contrastive'"),
        ("code", "contrastive", {"amater": "seed"}, "no option 'amater'.*did you mean 'amateur'"),
        ("code", "contrastive", {"amateur": "sead"}, "no model 'sead'.*did you mean 'seed'"),
        ("seed", "contrastive", {}, "amateur 'seed' has the weights of the expert"),
        ("code", "contrastive", {"alpha": 2}, "alpha is 2.*in the range 0 to 1"),
        ("code", "context_aware", {}, "give either context or context_file"),
        ("code", "context_aware", {"context_file": "nowhere.txt"}, "nowhere.txt is not a file"),
        ("code", "context_aware", {"context": "court " * 200}, "leaves 0 of the model's 128 positions"),
        ("code", "experts_against_seed", {}, "weights names no expert"),
        ("code", "sinks", {"window": 1000}, "do not fit the model's 128 positions"),
        ("code", "best_of", {"samples": 1}, "samples is 1; it must be at least 2"),
    ],
)
def test_what_does_not_fit_is_one_line(
    workspace: Workspace, model: str, decoder: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        workspace.generate(model, "The fox", GREEDY, decoder=decoder, decoder_options=options)
    assert "\n" not in str(caught.value)


def test_models_of_different_tokenizers_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    other = tiny_model_folder(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    (first, number), (second, other_number) = list(vocabulary.items())[40:42]
    vocabulary |= {first: other_number, second: number}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match=r"code and .*other have different tokenizers"):
        workspace.generate("code", "x", GREEDY, decoder="contrastive", decoder_options={"amateur": str(other)})


def test_a_larger_amateur_is_noted(workspace: Workspace) -> None:
    said: list[str] = []

    class Notes:
        def say(self, text: str) -> None:
            said.append(text)

        def progress(self, *arguments: Any) -> None: ...

    reporter: Any = Notes()
    options = {"amateur": "forest"}
    workspace.generate("code", "x", GREEDY, decoder="contrastive", decoder_options=options, reporter=reporter)
    assert len(said) == 1
    assert "expects a weaker amateur" in said[0]


def test_the_context_takes_positions_of_the_text(workspace: Workspace) -> None:
    options = {"context": "The quick brown fox jumps over the lazy dog."}
    with pytest.raises(UserError, match=r"exceeds the model's \d+ positions"):
        workspace.generate("code", "x", Sampling(125), decoder="context_aware", decoder_options=options)


def test_text_is_generated_beyond_the_models_positions_with_sinks(workspace: Workspace) -> None:
    generation = workspace.generate("code", "The fox", Sampling(200, seed=2), decoder="sinks")
    assert len(generation.prompt) + len(generation.continuation) > 128


# --- eval ---


def bits(workspace: Workspace, **arguments: Any) -> float:
    scores = workspace.evaluate("law", domains=["text"], context=16, **arguments).scores
    return scores["law"]["text"].values["bits_per_byte"]


@pytest.fixture(scope="module")
def with_text(workspace: Workspace) -> Workspace:
    folder = workspace.root / "text"
    folder.mkdir()
    documents = [f"The court of instance {number} decides on the {number}th case." for number in range(40)]
    for part, lines in (("train", documents[:20]), ("valid", documents[20:30]), ("test", documents[30:])):
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{part}.jsonl").write_text(content, encoding="utf-8")
    config = "training: {sequence_length: 16}\ndomains: {text: {path: text}}\n"
    (workspace.root / "expertctl.yaml").write_text(config, encoding="utf-8")
    return Workspace(workspace.root)


def test_text_is_scored_by_the_decoders_distribution(with_text: Workspace) -> None:
    plain = bits(with_text)
    doubled = bits(with_text, decoder="experts_against_seed", decoder_options={"weights": {"law": 0.5}})
    assert doubled != pytest.approx(plain, rel=1e-3)
    # law + 1 (seed - law) is the seed
    towards_seed = bits(
        with_text, decoder="experts_against_seed", decoder_options={"weights": {"seed": 1.0}, "seed": "law"}
    )
    seed = with_text.evaluate("seed", domains=["text"], context=16).scores["seed"]["text"].values["bits_per_byte"]
    assert towards_seed == pytest.approx(seed, rel=1e-4)
    # all that a window holds fits into the cache
    assert bits(with_text, decoder="sinks") == pytest.approx(plain, rel=1e-4)
    everything = {"amateur": "seed", "alpha": 0}
    assert math.isfinite(bits(with_text, decoder="contrastive", decoder_options=everything))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"decoder": "contrastive"}, "cannot score text: .*plausible set.*set alpha=0"),
        ({"decoder": "best_of"}, "cannot score text: it chooses among samples"),
        ({"decoder": "sinks", "nproc": 2}, "either nproc or decoder"),
        ({"decoder_options": {"alpha": 0}}, "without a decoder"),
        (
            {"decoder": "context_aware", "decoder_options": {"context": "court " * 29}},
            r"leaves \d+ positions of law, and a window has 16 tokens; give at most --context",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(with_text: Workspace, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        bits(with_text, **arguments)


# --- command line ---


def test_the_commands_take_decoders(with_text: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from expertctl.cli.main import main

    def call(*arguments: str) -> dict[str, Any]:
        assert main(["--workspace", str(with_text.root), "--json", *arguments]) == 0
        content: dict[str, Any] = json.loads(capsys.readouterr().out)
        return content

    generated = call(
        *("generate", "law", "The fox", "--temperature", "0", "--max-new-tokens", "6", "--decoder", "contrastive"),
        *("--decoder-option", "form=reasoning", "--beams", "2"),
    )
    expected = with_text.generate(
        "law",
        "The fox",
        Sampling(6, 0, beams=2),
        decoder="contrastive",
        decoder_options={"form": "reasoning"},
    )
    assert generated["text"] == expected.text
    options = ("--decoder", "experts_against_seed", "--decoder-option", "weights={news: 0.5}")
    table = call("eval", "law", "--domains", "text", "--context", "16", *options)
    value = table["models"]["law"]["bits_per_byte"]["text"]
    assert value == pytest.approx(
        bits(with_text, decoder="experts_against_seed", decoder_options={"weights": {"news": 0.5}})
    )
