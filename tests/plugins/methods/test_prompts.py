"""Prompts as experts, against PEFT's own class, the plainest loop around it, and naive references."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inline_launching import inline_launching
from safetensors.torch import load_file, save_file
from tiny_families import family_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from expertctl import TrainingContext, TuningSettings, UserError, load_model, verify
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.errors import Interrupted
from expertctl.core.hooks.training import TrainablePart
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.models.adapters.prompts import fixed_prompt, prompt_tokens_of, with_prompt
from expertctl.core.models.generation import Sampling
from expertctl.core.models.loading import load_network
from expertctl.core.reporting import SILENT
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.run import train_run
from expertctl.experts.training.steps.loop import TrainingLoop
from expertctl.experts.training.steps.schedule import learning_rate, progress_at
from expertctl.plugins.methods.prompts import plugin
from expertctl.plugins.methods.prompts.options import ProgressiveTuning, PromptTuning, ResidualTuning
from expertctl.workspace import Workspace

peft = pytest.importorskip("peft")

CONFIG = TrainingConfig(
    tokens=20 * 2 * 16, sequence_length=16, batch_size=2, learning_rate=0.1, weight_decay=0.1, clip=0.5, device="cpu"
)
TOKENS = 5
TRAINING = {"learning_rate": 0.1, "checkpoint_seconds": 0}
NAMES = ("first", "residual", "second", "third", "behind")


def tiny_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, max_position_embeddings=64, **{"initializer_range": 0.3} | sizes | settings)
    )


def part_of(model: Any, options: Any, **earlier: Path) -> TrainablePart:
    torch.manual_seed(1)
    prepare = {
        PromptTuning: plugin.prepare_prompt,
        ResidualTuning: plugin.prepare_residual,
        ProgressiveTuning: plugin.prepare_progressive,
    }[type(options)]
    return prepare(TrainingContext(model, options, models=earlier))


def written_prompt(folder: Path, rows: int, seed: int, width: int = 16) -> Path:
    """Write a prompt of PEFT."""
    folder.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": rows, "token_dim": width}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prompt = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    save_file({"prompt_embeddings": prompt}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    folder = tmp_path / "part"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(1, 64, size=(60, 30)).tolist()
    write_part(folder, [EncodedDocument("x" * 30, row) for row in ids], separator=0, vocabulary=64)
    return TokenBlocks(TokenStore(folder), CONFIG.sequence_length)


def batches_of(loop: TrainingLoop) -> list[Any]:
    """Return a list that fills with the batches of a loop."""
    batches: list[Any] = []
    draw = loop._batch
    loop._batch = lambda: batches.append(draw()) or batches[-1]  # type: ignore[method-assign,func-returns-value]
    return batches


def naive_loss(model: Any, rows_PD: torch.Tensor, tokens_BT1: torch.Tensor) -> torch.Tensor:
    """Return the loss of the text's tokens behind a prompt, by a concatenation of embeddings."""
    embedded = model.get_input_embeddings()(tokens_BT1[:, :-1])
    inputs = torch.cat((rows_PD.expand(len(embedded), -1, -1), embedded), dim=1)
    logits = model(inputs_embeds=inputs, use_cache=False).logits[:, len(rows_PD) :]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, 64), tokens_BT1[:, 1:].reshape(-1))


def follow(loop: TrainingLoop, trained: list[torch.Tensor], loss_of: Any) -> None:
    """Train a loop, and `trained` in the plainest loop on the same batches; compare losses and trained tensors."""
    batches = batches_of(loop)
    losses = [float(report.loss) for report in loop.steps()]
    groups = [
        {"params": [tensor for tensor in trained if tensor.dim() > 1], "weight_decay": 0.1},
        {"params": [tensor for tensor in trained if tensor.dim() == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.epsilon)
    for step, (_, batch) in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(CONFIG, progress_at(CONFIG, step))
        loss = loss_of(batch.tokens)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimiser.step()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5), step
    assert len(losses) == 20
    assert losses[-1] != pytest.approx(losses[0], abs=1e-3)
    for own, expected in zip(loop.parameters.values(), trained, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("initialisation", ["vocabulary", "random"])
def test_losses_are_those_of_peft_in_a_plain_loop(blocks: TokenBlocks, initialisation: str) -> None:
    part = part_of(tiny_model(), PromptTuning(TOKENS, initialisation))  # type: ignore[arg-type]
    loop = TrainingLoop(part, blocks, CONFIG)
    base = tiny_model()
    torch.manual_seed(1)
    kind = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}[initialisation]
    model = peft.get_peft_model(
        base,
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prompt_tuning_init=kind),
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[:, TOKENS:]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 64), tokens[:, 1:].reshape(-1))

    follow(loop, trained, loss_of)


@pytest.mark.parametrize(("layers", "layer_norm"), [(1, True), (2, False), (2, True)])
def test_a_residual_prompt_is_the_papers_formula(blocks: TokenBlocks, layers: int, layer_norm: bool) -> None:
    options = ResidualTuning(TOKENS, bottleneck=12, layers=layers, layer_norm=layer_norm)
    part = part_of(tiny_model(), options)
    rows, *weights = (parameter.detach().clone().requires_grad_() for parameter in part.parameters.values())
    each = 6 if layer_norm else 4
    assert len(weights) == each * layers  # no shared ones
    base = tiny_model().requires_grad_(False)

    def prompt() -> torch.Tensor:
        state = rows
        for begin in range(0, len(weights), each):
            w1, b1, w2, b2, *norm = weights[begin : begin + each]
            state = torch.relu(state @ w1.T + b1) @ w2.T + b2
            if norm:
                centred = state - state.mean(dim=-1, keepdim=True)
                state = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm[0] + norm[1]
        return rows + state

    loop = TrainingLoop(part, blocks, CONFIG)
    follow(loop, [rows, *weights], lambda tokens: naive_loss(base, prompt(), tokens))
    (stored,) = part.extra_tensors()["adapter_model.safetensors"].values()
    torch.testing.assert_close(stored, prompt().detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_progressive_prompt_is_a_concatenation(blocks: TokenBlocks, tmp_path: Path, place: str) -> None:
    folders = {name: written_prompt(tmp_path / name, size, size) for name, size in (("a", 2), ("b", 3))}
    options = ProgressiveTuning(TOKENS, earlier="a, b", place=place)  # type: ignore[arg-type]
    part = part_of(tiny_model(), options, **folders)
    assert len(part.parameters) == 1
    rows = next(iter(part.parameters.values())).detach().clone().requires_grad_()
    base = tiny_model().requires_grad_(False)
    a, b = (load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in folders.values())

    def prompt() -> torch.Tensor:
        return torch.cat((rows, b, a) if place == "before" else (a, b, rows))

    follow(TrainingLoop(part, blocks, CONFIG), [rows], lambda tokens: naive_loss(base, prompt(), tokens))
    (stored,) = part.extra_tensors()["adapter_model.safetensors"].values()
    kept = stored[TOKENS:] if place == "before" else stored[:-TOKENS]
    assert torch.equal(kept, torch.cat((b, a) if place == "before" else (a, b)))


@pytest.mark.parametrize("options", [PromptTuning(TOKENS), ResidualTuning(TOKENS, bottleneck=8)])
def test_going_on_from_a_checkpoint_gives_the_same_bits(blocks: TokenBlocks, tmp_path: Path, options: Any) -> None:
    whole = TrainingLoop(part_of(tiny_model(), options), blocks, CONFIG)
    losses = [float(report.loss) for report in whole.steps()]
    first, begun = TrainingLoop(part_of(tiny_model(), options), blocks, CONFIG), []
    for report in first.steps():
        begun.append(float(report.loss))
        if report.step == 7:
            break
    save_checkpoint(first, tmp_path / "state")
    second = TrainingLoop(part_of(tiny_model(), options), blocks, CONFIG)
    assert restore_latest(second, tmp_path / "state") == 7
    assert begun + [float(report.loss) for report in second.steps()] == losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"chunked_loss": True},
        {"activation_checkpointing": True},
        {"attention": "eager"},
        {"attention": "sdpa"},
        {"batch_size": 1, "accumulation": 2},
    ],
)
def test_settings_of_the_step_leave_the_losses_as_they_are(blocks: TokenBlocks, settings: dict[str, Any]) -> None:
    def losses(config: TrainingConfig) -> list[float]:
        loop = TrainingLoop(part_of(tiny_model(), PromptTuning(TOKENS)), blocks, config)
        return [float(report.loss) for report in loop.steps()]

    assert losses(CONFIG.model_copy(update=settings)) == pytest.approx(losses(CONFIG), abs=2e-5)


def test_the_base_is_frozen_and_the_prompt_in_float32(blocks: TokenBlocks) -> None:
    exact = tiny_model().bfloat16().float()
    for precision in ("bfloat16", "pure_bfloat16"):
        model = tiny_model()
        model.load_state_dict(exact.state_dict())
        loop = TrainingLoop(
            part_of(model, PromptTuning(TOKENS)), blocks, CONFIG.model_copy(update={"precision": precision})
        )
        before = {name: parameter.clone() for name, parameter in loop.parameters.items()}
        assert all(torch.isfinite(report.loss) for report in loop.steps())
        assert all(not torch.equal(before[name], parameter) for name, parameter in loop.parameters.items())
        assert {parameter.dtype for parameter in loop.parameters.values()} == {torch.float32}
        for name, tensor in exact.state_dict().items():
            assert torch.equal(model.state_dict()[name].float(), tensor), name


# --- reading ---


def test_generation_in_a_padded_batch_is_that_of_each_text_alone() -> None:
    model = with_prompt(tiny_model().eval(), fixed_prompt(torch.randn(TOKENS, 16, generator=torch.manual_seed(3))))
    texts = [torch.randint(1, 64, (length,)) for length in (3, 9, 6)]
    longest = max(map(len, texts))
    padded = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(text)).long() for text in texts])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **settings)[:, longest:]
    for row, text in zip(together, texts, strict=True):
        alone = model.generate(text[None], attention_mask=torch.ones(1, len(text)), **settings)[0, len(text) :]
        without_cache = model.generate(text[None], use_cache=False, **settings)[0, len(text) :]
        naive = text
        for _ in range(8):
            naive = torch.cat((naive, model(input_ids=naive[None]).logits[0, -1].argmax()[None]))
        assert row.tolist() == alone.tolist() == without_cache.tolist() == naive[len(text) :].tolist()
    beams = model.generate(texts[1][None], num_beams=3, **settings)
    assert beams.tolist() == model.generate(texts[1][None], num_beams=3, use_cache=False, **settings).tolist()


def test_a_cache_that_already_has_text_is_not_continued_by_generate() -> None:
    model = with_prompt(tiny_model().eval(), fixed_prompt(torch.randn(TOKENS, 16)))
    text = torch.randint(1, 64, (1, 9))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    begun = model.generate(text, return_dict_in_generate=True, **settings)
    longer = torch.cat((begun.sequences, torch.randint(1, 64, (1, 9))), dim=1)
    with pytest.raises(UserError, match="from the begin of the text"):
        model.generate(longer, past_key_values=begun.past_key_values, **settings)


def test_logits_continue_a_cache_token_by_token() -> None:
    model = with_prompt(tiny_model().eval(), fixed_prompt(torch.randn(TOKENS, 16)))
    text = torch.randint(1, 64, (2, 9))
    expected = model(input_ids=text).logits
    assert expected.shape == (2, 9, 64)
    state = model(input_ids=text[:, :4], use_cache=True)
    pieces = [state.logits]
    for place in range(4, 9):
        state = model(input_ids=text[:, place : place + 1], past_key_values=state.past_key_values, use_cache=True)
        pieces.append(state.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(text).logits, expected)  # the text as a positional argument
    torch.testing.assert_close(model(text, logits_to_keep=2).logits, expected[:, -2:])


def test_a_model_with_a_prompt_is_not_saved_without_it(tmp_path: Path) -> None:
    model = with_prompt(tiny_model(), fixed_prompt(torch.randn(TOKENS, 16)))
    with pytest.raises(UserError, match="would lack the prompt"):
        model.save_pretrained(tmp_path / "model")


# --- through a workspace ---


def branched(workspace: Workspace, name: str) -> None:
    domain = "chance" if name in ("second", "behind") else "prose"
    trains, options = {
        "first": ("prompt", {}),
        "residual": ("residual_prompt", {"bottleneck": 16}),
        "second": ("progressive_prompts", {"earlier": "first"}),
        "third": ("progressive_prompts", {"earlier": ["second", "residual"]}),
        "behind": ("progressive_prompts", {"earlier": "first", "place": "after"}),
    }[name]
    workspace.branch(name, domain=domain, trains=trains, options={"tokens": TOKENS, **options}, training=TRAINING)


@pytest.fixture(scope="module")
def workspace(seeded_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A project with an expert of each kind, and one of LoRA. Add generalists, change nothing else."""
    workspace = Workspace(shutil.copytree(seeded_project, tmp_path_factory.mktemp("prompts") / "project"))
    with inline_launching():
        for name in NAMES:
            branched(workspace, name)
            workspace.train(name).raise_for_failures()
        workspace.branch("lora", domain="prose", trains="lora", options={"rank": 2})
        workspace.train("lora").raise_for_failures()
    return workspace


def rows_of(workspace: Workspace, name: str) -> torch.Tensor:
    return load_file(workspace.experts / name / "adapter_model.safetensors")["prompt_embeddings"]


def tokens_of(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens_of(model)).logits
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_one_of_peft(workspace: Workspace, name: str) -> None:
    folder = workspace.experts / name
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert [file for file in files if file.endswith(".safetensors")] == ["adapter_model.safetensors"]
    assert str(workspace.layout.root) not in (folder / "adapter_config.json").read_text()
    assert rows_of(workspace, name).dtype == torch.float32
    assert verify(folder) == []
    base = AutoModelForCausalLM.from_pretrained(workspace.layout.seed)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    expected = logits_of(model)
    own, _ = load_model(folder)
    count = prompt_tokens_of(own)
    assert expected.shape[1] == count + 12
    assert isinstance(own, type(load_network(workspace.layout.seed)))
    torch.testing.assert_close(logits_of(own), expected[:, count:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(own), logits_of(load_network(workspace.layout.seed)), atol=1e-2)
    text = tokens_of(own)[:1, :5]
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it ignores the positions that transformers passes
        expected = model.generate(input_ids=text, **settings)
    assert own.generate(text, **settings).tolist() == expected.tolist()


def test_earlier_prompts_keep_their_bytes_and_become_parents(workspace: Workspace) -> None:
    first, residual, second = (rows_of(workspace, name) for name in ("first", "residual", "second"))
    assert torch.equal(second[TOKENS:], first)
    assert torch.equal(rows_of(workspace, "third")[TOKENS:], torch.cat((residual, second)))
    assert torch.equal(rows_of(workspace, "behind")[:TOKENS], first)
    for name, count in zip(NAMES, (1, 1, 2, 4, 2), strict=True):
        assert len(rows_of(workspace, name)) == count * TOKENS
    parents = {parent.name for parent in read_manifest(workspace.experts / "third").parents}
    assert parents == {"seed", "second", "residual"}


def test_a_prompt_is_tuned_on_from_another(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    options = {"tokens": TOKENS, "start": "first"}
    copy.branch("on", domain="chance", trains="prompt", options=options, training={"learning_rate": 1e-9})
    with inline_launching():
        copy.train("on").raise_for_failures()
    torch.testing.assert_close(rows_of(copy, "on"), rows_of(copy, "first"), atol=1e-6, rtol=0)
    assert {parent.name for parent in read_manifest(copy.experts / "on").parents} == {"seed", "first"}


def test_prompts_are_evaluated_and_generated_with(workspace: Workspace) -> None:
    table = workspace.evaluate("seed", *NAMES, domains=["prose"], context=48, stride=13)
    for name in NAMES:
        score = table.scores[name]["prose"]
        assert score.tokens == table.scores["seed"]["prose"].tokens
        assert score.values["bits_per_byte"] != table.scores["seed"]["prose"].values["bits_per_byte"]
    generation = workspace.generate("second", "import ", Sampling(max_new_tokens=5))
    assert len(generation.continuation) == 5


def test_an_ensemble_mixes_prompts_and_other_experts(workspace: Workspace, tmp_path: Path) -> None:
    workspace.merge("forest", method="ensemble", experts=["first", "lora", "third"])
    folder = workspace.generalists / "forest"
    assert verify(folder) == []
    model, _ = load_model(folder)
    assert list(map(prompt_tokens_of, model.members)) == [TOKENS, 0, 4 * TOKENS]
    for name, member in model.named_members.items():
        torch.testing.assert_close(logits_of(member), logits_of(load_model(workspace.experts / name)[0]))
    text, mask = tokens_of(model), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = model.generate(text, attention_mask=mask, **settings)
    alone = model.generate(text[1:, 5:], **settings)
    assert batch[1, 12:].tolist() == alone[0, 7:].tolist()
    positions = json.loads((workspace.layout.seed / "config.json").read_text())["max_position_embeddings"]
    assert model.config.max_position_embeddings == positions - 4 * TOKENS
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(again), logits_of(model))
    assert again.config.max_position_embeddings == positions - 4 * TOKENS
    smaller = model.without(["third"])
    assert smaller.config.max_position_embeddings == positions - TOKENS


def test_removing_a_member_keeps_the_other_prompts(workspace: Workspace) -> None:
    workspace.merge("grove", method="ensemble", experts=["first", "third"])
    workspace.generalists.change_experts("grove", "trees", remove=["third"])
    model, _ = load_model(workspace.generalists / "trees")
    expected = logits_of(load_model(workspace.experts / "first")[0]).log_softmax(dim=-1)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


# --- interruptions ---


@pytest.mark.parametrize("name", ["first", "residual", "second"])
def test_a_stopped_run_resumes_to_the_same_bytes(workspace: Workspace, tmp_path: Path, name: str) -> None:
    again = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "again"))
    shutil.rmtree(again.experts / name)
    branched(again, name)
    folder, calls = again.experts / name, iter(range(100))
    with pytest.raises(Interrupted):
        train_run(folder, SILENT, lambda: next(calls) == 6)
    assert list((folder / ".training").glob("step-*"))
    train_run(folder, SILENT, lambda: False)
    for file in ("adapter_model.safetensors", "adapter_config.json", "expert.json"):
        assert (folder / file).read_bytes() == (workspace.experts / name / file).read_bytes(), file


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(workspace: Workspace, tmp_path: Path) -> None:
    again = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "again"))
    shutil.rmtree(again.experts / "second")
    branched(again, "second")
    folder = again.experts / "second"
    code = (
        f"from expertctl import Workspace; Workspace({str(again.layout.root)!r}).train('second').raise_for_failures()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not list((folder / ".training").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "expert.json").exists()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    for file in ("adapter_model.safetensors", "adapter_config.json", "expert.json"):
        assert (folder / file).read_bytes() == (workspace.experts / "second" / file).read_bytes(), file


def test_an_earlier_prompt_that_changed_is_not_trained_with(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    path = copy.experts / "first" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    options = {"tokens": TOKENS, "earlier": "first"}
    copy.branch("bad", domain="prose", trains="progressive_prompts", options=options)
    with pytest.raises(UserError, match=r"first.* changed"):
        train_run(copy.experts / "bad", SILENT, lambda: False)


# --- refusals ---

MIXING = ("average", "ties", "slerp", "btx", "flexolmo", "stitch")


@pytest.mark.parametrize("method", MIXING)
def test_merges_of_tensors_are_refused_before_any_work(workspace: Workspace, method: str) -> None:
    reason = "is a prompt, which changes no tensor of the seed, so .*--method ensemble.*--trains progressive_prompts"
    for act in (workspace.merge, workspace.generalists.plan):
        with pytest.raises(UserError, match=reason) as refused:
            act("bad", method=method, experts=["first", "lora"])
        assert "\n" not in str(refused.value)
    assert not (workspace.generalists / "bad").exists()


def test_statistics_and_starts_of_prompts_are_refused(workspace: Workspace) -> None:
    with pytest.raises(UserError, match=r"is a prompt.*statistics for merges"):
        workspace.experts.statistics("first")
    with pytest.raises(UserError, match=r"is a prompt.*--from"):
        workspace.branch("bad", domain="chance", start="first")
    with pytest.raises(UserError, match="makes an adapter of the seed, so it cannot start from experts"):
        workspace.branch("bad", domain="chance", trains="prompt", start="lora")
    with pytest.raises(UserError, match="trains an expert; use it with `expertctl branch"):
        workspace.generalists.tune("bad", "seed", TuningSettings("prompt", ["prose"]))
    assert not (workspace.experts / "bad").exists()


def test_the_automatic_start_leaves_prompts_out(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    spec = copy.branch("more", domain="chance", start="auto")
    assert set(spec.start) == {"lora"}


@pytest.mark.parametrize(
    ("trains", "options", "message"),
    [
        ("prompt", {"tokens": 0}, "tokens is 0; it must be at least 1"),
        ("prompt", {"tokens": -3}, "tokens is -3; it must be at least 1"),
        ("prompt", {"tokens": 2.5}, "option tokens"),
        ("prompt", {"tokens": 5000}, "a prompt of 5000 tokens leaves no room for text in the seed's 1024 positions"),
        ("prompt", {"tokens": 1000}, r"sequence_length 32 exceeds .* of which the prompt takes 1000; .* at most 24"),
        ("prompt", {"initialisation": "text"}, "option initialisation"),
        ("prompt", {"start": "nobody"}, "no finished expert 'nobody'"),
        ("prompt", {"start": "lora"}, "expert 'lora' is not a prompt, but trained lora"),
        (
            "prompt",
            {"start": "second"},
            "the prompt of 'second' has 10 rows, and tokens is 20; give --option tokens=10",
        ),
        ("residual_prompt", {"layers": 0}, "layers is 0"),
        ("residual_prompt", {"bottleneck": 0}, "bottleneck is 0"),
        ("progressive_prompts", {}, "name them with --option earlier"),
        ("progressive_prompts", {"earlier": "nobody"}, "no finished expert 'nobody'"),
        ("progressive_prompts", {"earlier": "lora"}, "expert 'lora' is not a prompt"),
        ("progressive_prompts", {"earlier": "first,first"}, "earlier names 'first' twice"),
        (
            "progressive_prompts",
            {"earlier": ["first", "second"]},
            "the prompt of 'second' contains that of 'first' already",
        ),
        ("progressive_prompts", {"earlier": "first", "place": "between"}, "option place"),
        ("progressive_prompts", {"earlier": "first", "tokens": 1015}, "a prompt of 1020 tokens leaves no room"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    workspace: Workspace, trains: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        workspace.branch("bad", domain="prose", trains=trains, options=options)
    assert "\n" not in str(refused.value)
    assert not (workspace.experts / "bad").exists()


def test_an_expert_is_not_trained_from_itself(workspace: Workspace) -> None:
    options = {"earlier": "first"}
    with pytest.raises(UserError, match="'first' cannot be trained from itself"):
        workspace.branch("first", domain="prose", trains="progressive_prompts", options=options, force=True)
    assert verify(workspace.experts / "first") == []


def test_a_prompt_of_another_seed_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    path = copy.layout.seed / "seed.json"
    path.write_text(path.read_text().replace(read_manifest(copy.layout.seed).digest, "0" * 64))
    with pytest.raises(UserError, match="expert 'first' was branched from seed"):
        copy.branch("bad", domain="prose", trains="progressive_prompts", options={"earlier": "first"})


@pytest.mark.parametrize("setting", ["separate_documents", "pack_conversations"])
def test_documents_are_not_kept_apart_behind_a_prompt(workspace: Workspace, setting: str) -> None:
    with pytest.raises(UserError, match=f"training.{setting} gives a document its own attention, without the prompt"):
        workspace.branch("bad", domain="prose", trains="prompt", training={setting: True})


def test_a_context_that_the_prompt_does_not_leave_is_refused(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="--context 1020 exceeds the 1019 positions that a prompt of 5 leaves of first"):
        workspace.evaluate("first", domains=["prose"], context=1020)
    with pytest.raises(UserError, match="exceeds the model's 1019 positions that the model's own prompt of 5 leaves"):
        workspace.generate("first", "import ", Sampling(max_new_tokens=1019))


def test_models_without_input_embeddings_are_refused() -> None:
    class Hidden(LlamaForCausalLM):
        def get_input_embeddings(self) -> Any:
            raise NotImplementedError

    class Whole(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **named: Any) -> Any:
            return super().forward(input_ids, **named)

    class Deep(LlamaForCausalLM):
        def forward(self, *, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None, past_key_values: Any = None, logits_to_keep: Any = 0, **named: Any) -> Any:  # fmt: skip
            output = super().forward(input_ids, inputs_embeds=inputs_embeds, **named)
            output.logits = output.logits + (0 if input_ids is None else input_ids[..., None])
            return output

    config = tiny_model().config
    with pytest.raises(UserError, match="Hidden gives no access to its input embedding"):
        part_of(Hidden(config), PromptTuning(TOKENS))
    with pytest.raises(UserError, match="Whole takes no inputs_embeds, which a prompt needs; train another part"):
        part_of(Whole(config), PromptTuning(TOKENS))
    with pytest.raises(UserError, match="Deep reads more of a token than its embedding"):
        part_of(Deep(config), PromptTuning(TOKENS))


def test_a_missing_peft_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'trainer prompt needs peft .*pip install "expertctl\[lora\]"'):
        workspace.branch("bad", domain="prose", trains="prompt")
    load_model(workspace.experts / "first")  # needs no PEFT


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3_text", "qwen3_next", "olmo2", "mixtral", "opt"])
def test_families_read_and_continue_a_text_behind_a_prompt(family: str) -> None:
    model, plain = family_model(family), family_model(family)
    width = plain.get_input_embeddings().weight.shape[1]
    rows = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(0))
    part_of(family_model(family), PromptTuning(TOKENS))
    with_prompt(model, fixed_prompt(rows))
    text = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        embedded = torch.cat((rows.expand(2, -1, -1), plain.get_input_embeddings()(text)), dim=1)
        expected = plain(inputs_embeds=embedded, use_cache=False).logits[:, TOKENS:]
        torch.testing.assert_close(model(input_ids=text, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        naive = text
        for _ in range(4):
            following = model(input_ids=naive, use_cache=False).logits[:, -1].argmax(dim=-1)
            naive = torch.cat((naive, following[:, None]), dim=1)
        assert model.generate(text, **settings).tolist() == naive.tolist()


@pytest.mark.parametrize("family", ["mamba", "gemma4_text", "deepseek_v4"])
def test_families_that_cannot_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"which a prompt (needs|has not); train another part"):
        part_of(family_model(family), PromptTuning(TOKENS))
