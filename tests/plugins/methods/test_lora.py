"""LoRA experts, against PEFT's own classes and the plainest loop around them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inline_launching import inline_launching
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from expertctl import TrainingContext, TuningSettings, UserError, load_model, verify
from expertctl.core.artefacts.files import write_json
from expertctl.core.artefacts.safetensors_io import Checkpoint, write_tensors
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.errors import Interrupted
from expertctl.core.hooks.options import parse_options
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.run import read_run
from expertctl.core.models.adapters.lora import AdaptedTensors
from expertctl.core.models.generation import Sampling
from expertctl.core.models.loading import load_network
from expertctl.core.models.overlay import overlay_tensors
from expertctl.core.reporting import SILENT
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.distributed.ranks import Ranks
from expertctl.experts.training.distributed.replicas import laid_out
from expertctl.experts.training.run import train_run
from expertctl.experts.training.steps.loop import TrainingLoop
from expertctl.experts.training.steps.schedule import learning_rate, progress_at
from expertctl.merge.remaking.reproducing import reproduce
from expertctl.plugins.methods import lora
from expertctl.workspace import Workspace

peft = pytest.importorskip("peft")

CONFIG = TrainingConfig(
    tokens=30 * 2 * 16, sequence_length=16, batch_size=2, learning_rate=1e-2, weight_decay=0.1, clip=0.5, device="cpu"
)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({"rank": 4, "alpha": 3, "rslora": True}, {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dropout": ({"dropout": 0.2}, {"lora_dropout": 0.2}),
    "attention": ({"targets": "q_proj, v_proj"}, {"target_modules": ["q_proj", "v_proj"]}),
    "pattern": ({"targets": "layers.1.mlp.*"}, {"target_modules": r".*\.layers\.1\.mlp\..*_proj"}),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes, **settings))


def part_of(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return lora.prepare(TrainingContext(model, lora.LoraTraining(**options)))


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    folder = tmp_path / "part"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(1, 64, size=(60, 30)).tolist()
    write_part(folder, [EncodedDocument("x" * 30, row) for row in ids], separator=0, vocabulary=64)
    return TokenBlocks(TokenStore(folder), CONFIG.sequence_length)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_peft_in_a_plain_loop(blocks: TokenBlocks, variant: str) -> None:
    options, settings = VARIANTS[variant]
    loop = TrainingLoop(part_of(tiny_model(), **options), blocks, CONFIG)
    base = tiny_model()
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": LINEAR} | settings)
    assert_same_training(loop, peft.get_peft_model(base, config))


def test_activations_are_computed_again_unless_settings_say_otherwise(blocks: TokenBlocks) -> None:
    def trained(**settings: Any) -> tuple[bool, list[float]]:
        loop = TrainingLoop(part_of(tiny_model()), blocks, CONFIG.model_copy(update=settings))
        losses = [float(report.loss) for report in loop.steps()]
        return all(layer.gradient_checkpointing for layer in loop.module.model.layers), losses

    again, losses = trained()
    kept, plain = trained(activation_checkpointing=False, chunked_loss=False)
    assert again
    assert not kept
    assert losses == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_qlora_is_peft_beside_the_4_bits_of_transformers(blocks: TokenBlocks, tmp_path: Path, dora: bool) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    part = lora.prepare_quantised(TrainingContext(tiny_model(), lora.LoraTraining(dora=dora)))
    loop = TrainingLoop(part, blocks, CONFIG)
    assert {type(layer).__name__ for layer in part.module.modules()} & {"Linear4bit"}
    tiny_model().save_pretrained(tmp_path / "base")
    few_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=few_bits)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, use_dora=dora)
    model = peft.get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():  # both begin with the same random factors
        for own, other in zip(part.parameters.values(), trained, strict=True):
            other.copy_(own)
    assert_same_training(loop, model)


def assert_same_training(loop: TrainingLoop, model: Any) -> None:
    """Train with the loop, and another model on the same batches in a plain loop; losses and parameters have to be equal."""
    batches: list[Any] = []
    draw = loop._batch
    loop._batch = lambda: batches.append(draw()) or batches[-1]  # type: ignore[method-assign,func-returns-value]
    torch.manual_seed(2)
    losses = [float(report.loss) for report in loop.steps()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.epsilon)
    model.train()
    torch.manual_seed(2)
    for step, (_, batch) in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(CONFIG, progress_at(CONFIG, step))
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), batch.tokens[:, 1:].reshape(-1))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimiser.step()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5), step
    assert len(losses) == 30
    for own, expected in zip(loop.parameters.values(), trained, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"dora": True}])
def test_going_on_from_a_checkpoint_gives_the_same_bits(
    blocks: TokenBlocks, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = TrainingLoop(part_of(tiny_model(), **options), blocks, CONFIG)
    losses = [float(report.loss) for report in whole.steps()]

    first, begun = TrainingLoop(part_of(tiny_model(), **options), blocks, CONFIG), []
    for report in first.steps():
        begun.append(float(report.loss))
        if report.step == 7:
            break
    save_checkpoint(first, tmp_path / "state")
    second = TrainingLoop(part_of(tiny_model(), **options), blocks, CONFIG)
    torch.manual_seed(9)
    assert restore_latest(second, tmp_path / "state") == 7
    assert begun + [float(report.loss) for report in second.steps()] == losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def test_the_base_is_stored_in_bfloat16_and_the_adapter_in_float32(blocks: TokenBlocks) -> None:
    exact = tiny_model().bfloat16().float()
    for precision in ("bfloat16", "pure_bfloat16"):
        model = tiny_model()
        model.load_state_dict(exact.state_dict())
        loop = TrainingLoop(part_of(model), blocks, CONFIG.model_copy(update={"precision": precision}))
        before = {name: parameter.clone() for name, parameter in loop.parameters.items()}
        assert all(torch.isfinite(report.loss) for report in loop.steps())
        assert all(not torch.equal(before[name], parameter) for name, parameter in loop.parameters.items())
        assert {parameter.dtype for parameter in loop.parameters.values()} == {torch.float32}
        layers = [module for name, module in model.named_modules() if name.endswith(".base_layer")]
        assert layers
        assert all(layer.weight.dtype == torch.bfloat16 for layer in layers)


# --- through a workspace ---


@pytest.fixture(scope="module")
def workspace(seeded_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A project with experts prose (LoRA) and chance (DoRA). Add generalists, change nothing else."""
    workspace = Workspace(shutil.copytree(seeded_project, tmp_path_factory.mktemp("lora") / "project"))
    training = {"learning_rate": 2e-2}
    workspace.branch("prose", domain="prose", trains="lora", options={"rank": 4}, training=training)
    workspace.branch("chance", domain="chance", trains="lora", options={"dora": True}, training=training)
    with inline_launching():
        workspace.train().raise_for_failures()
    return workspace


def tokens_of(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens_of(model)).logits
    return logits


def peft_model(workspace: Workspace, name: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(workspace.layout.seed)
    return peft.PeftModel.from_pretrained(base, workspace.experts / name).eval()


@pytest.mark.parametrize("name", ["prose", "chance"])
def test_the_folder_is_one_of_peft(workspace: Workspace, name: str) -> None:
    folder = workspace.experts / name
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert {"adapter_config.json", "adapter_model.safetensors", "expert.json"} <= files
    assert [file for file in files if file.endswith(".safetensors")] == ["adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "seed"
    assert config["target_modules"] == sorted(LINEAR)
    assert str(workspace.layout.root) not in (folder / "adapter_config.json").read_text()
    tensors = load_file(folder / "adapter_model.safetensors")
    options = parse_options(lora.LoraTraining, read_run(folder).options, "lora")
    declared = lora.adapter_file(workspace.layout.seed, options)["adapter_model.safetensors"]
    assert {tensor: tuple(value.shape) for tensor, value in tensors.items()} == {
        tensor: value.shape for tensor, value in declared.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert verify(folder) == []

    model, _ = load_model(folder)
    assert type(model) is type(load_network(workspace.layout.seed))
    expected = logits_of(peft_model(workspace, name))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits_of(load_network(workspace.layout.seed)), atol=1e-3)


@pytest.mark.parametrize("name", ["prose", "chance"])
def test_an_average_of_weight_one_is_peft_merged(workspace: Workspace, name: str) -> None:
    workspace.merge(f"merged-{name}", method="average", experts=[name])
    merged = Checkpoint.of_folder(workspace.generalists / f"merged-{name}")
    expected = peft_model(workspace, name).merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for tensor in merged:
        torch.testing.assert_close(merged.read(tensor), expected[tensor], atol=1e-6, rtol=1e-5)
    assert verify(workspace.generalists / f"merged-{name}") == []


def test_an_ensemble_mixes_both(workspace: Workspace) -> None:
    workspace.merge("forest", method="ensemble", experts=["prose", "chance"])
    model, _ = load_model(workspace.generalists / "forest")
    for name, member in model.named_members.items():
        torch.testing.assert_close(logits_of(member), logits_of(peft_model(workspace, name)), atol=1e-5, rtol=1e-5)
    assert model(input_ids=tokens_of(model)).expert_weights.shape == (2, 12, 2)
    assert verify(workspace.generalists / "forest") == []


def test_a_mixture_takes_the_adapted_feed_forward_networks(workspace: Workspace) -> None:
    workspace.merge("mix", method="btx", experts=["prose", "chance"])
    model, _ = load_model(workspace.generalists / "mix")
    assert torch.isfinite(logits_of(model)).all()


def test_a_pushed_expert_is_pulled_and_continues_texts_as_before(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    before = {path.name: path.read_bytes() for path in (copy.experts / "prose").iterdir() if path.is_file()}
    greedy = Sampling(max_new_tokens=12, temperature=0)
    continued = copy.generate("prose", "The", greedy)
    prompt = torch.tensor([[token.id for token in continued.prompt]])
    made = peft_model(workspace, "prose").generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )
    assert [token.id for token in continued.continuation] == made[0, prompt.shape[1] :].tolist()
    copy.push("prose", (tmp_path / "remote").as_uri())
    shutil.rmtree(copy.experts / "prose")
    copy.pull((tmp_path / "remote").as_uri(), "prose")
    pulled = copy.experts / "prose"
    assert all((pulled / name).read_bytes() == content for name, content in before.items() if "adapter" in name)
    assert verify(pulled) == []
    assert copy.generate("prose", "The", greedy) == continued
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(copy.layout.seed), pulled)
    torch.testing.assert_close(logits_of(loaded.eval()), logits_of(load_model(pulled)[0]), atol=1e-5, rtol=1e-5)


def test_a_merge_of_adapters_is_reproduced(workspace: Workspace) -> None:
    workspace.merge("both", method="linear", experts=["prose", "chance"])
    folder = workspace.generalists / "both"
    assert reproduce(read_manifest(folder), folder, layout=workspace.layout).same


def test_other_experts_start_from_an_adapted_one(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    copy.branch("more", domain="chance", start="prose", training={"learning_rate": 1e-4})
    with inline_launching():
        copy.train("more").raise_for_failures()
    assert copy.evaluate("more", "prose", domains=["prose"])
    with pytest.raises(UserError, match="adapter of the seed, so it cannot start from experts"):
        copy.branch("again", domain="chance", start="prose", trains="lora")


def test_a_changed_adapter_is_not_merged(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    path = copy.experts / "prose" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed"):
        copy.merge("broken", method="average", experts=["prose"])


def test_a_stopped_run_resumes_to_the_same_bytes(workspace: Workspace, seeded_project: Path, tmp_path: Path) -> None:
    again = Workspace(shutil.copytree(seeded_project, tmp_path / "again"))
    again.branch("prose", domain="prose", trains="lora", options={"rank": 4}, training={"learning_rate": 2e-2})
    folder, calls = again.experts / "prose", iter(range(100))
    with pytest.raises(Interrupted):
        train_run(folder, SILENT, lambda: next(calls) == 6)
    assert list((folder / ".training").glob("step-*"))
    train_run(folder, SILENT, lambda: False)
    for file in ("adapter_model.safetensors", "adapter_config.json", "expert.json"):
        assert (folder / file).read_bytes() == (workspace.experts / "prose" / file).read_bytes(), file


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(workspace: Workspace, seeded_project: Path, tmp_path: Path) -> None:
    again = Workspace(shutil.copytree(seeded_project, tmp_path / "again"))
    again.branch("prose", domain="prose", trains="lora", options={"rank": 4}, training={"learning_rate": 2e-2})
    folder = again.experts / "prose"
    code = f"from expertctl import Workspace; Workspace({str(again.layout.root)!r}).train().raise_for_failures()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not list((folder / ".training").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "expert.json").exists()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    for file in ("adapter_model.safetensors", "adapter_config.json", "expert.json"):
        assert (folder / file).read_bytes() == (workspace.experts / "prose" / file).read_bytes(), file


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "c_attn"}, r"no linear layer matches target 'c_attn'; the model has .*down_proj.*q_proj"),
        ({"targets": "embed_tokens"}, "no linear layer matches target 'embed_tokens'"),
        ({"targets": "q_proj,"}, "no linear layer matches target ''"),
        ({"targets": ""}, "no linear layer matches target ''"),
        ({"rank": 10_000}, r"rank 10000 exceeds the smaller side of 'model.layers.0.*lower it"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": 2.5}, "option rank"),
        ({"alpha": 0}, "alpha is 0; it must be greater than 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and less than 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": "nan"}, "dropout is nan"),
        ({"modules_to_save": "lm_head"}, "no option 'modules_to_save'"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    workspace: Workspace, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        workspace.branch("bad", domain="prose", trains="lora", options=options)
    assert "\n" not in str(refused.value)
    assert not (workspace.experts / "bad").exists()


def test_a_generalist_is_not_tuned_by_an_adapter(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="trainer 'lora' trains an expert; use it with `expertctl branch"):
        workspace.generalists.tune("bad", "seed", TuningSettings("lora", ["prose"]))


def test_dora_is_refused_with_differential_privacy(workspace: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    privacy = {"epsilon": 8, "delta": 1e-3}
    copy.branch("private", domain="prose", trains="lora", options={"dora": True}, dp=privacy)
    with pytest.raises(UserError, match=r"lora_magnitude_vector.* cannot train with differential privacy"):
        train_run(copy.experts / "private", SILENT, lambda: False)


def test_a_qlora_expert_is_a_peft_folder_like_others(workspace: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    copy = Workspace(shutil.copytree(workspace.layout.root, tmp_path / "copy"))
    copy.branch("small", domain="prose", trains="qlora", training={"learning_rate": 2e-2})
    with inline_launching():
        copy.train("small").raise_for_failures()
    assert verify(copy.experts / "small") == []
    seed, small = (
        copy.evaluate(name, domains=["prose"]).scores[name]["prose"].values["bits_per_byte"]
        for name in ("seed", "small")
    )
    assert small < seed
    model, _ = load_model(copy.experts / "small")
    torch.testing.assert_close(logits_of(model), logits_of(peft_model(copy, "small")), atol=1e-5, rtol=1e-5)


def test_weights_in_few_bits_are_not_sharded() -> None:
    pytest.importorskip("bitsandbytes")
    part = lora.prepare_quantised(TrainingContext(tiny_model(), lora.LoraTraining()))
    with pytest.raises(UserError, match="few bits cannot be sharded"):
        laid_out(part, torch.device("cpu"), Ranks(0, 2), "fsdp", bfloat16=False)


def test_a_missing_bitsandbytes_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="few bits need bitsandbytes"):
        workspace.branch("small", domain="prose", trains="qlora")


def test_a_missing_peft_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "expertctl\[lora\]"'):
        workspace.branch("bad", domain="prose", trains="lora")
    load_model(workspace.experts / "prose")  # needs no PEFT


def test_a_tied_head_is_refused() -> None:
    options = parse_options(lora.LoraTraining, {"targets": "lm_head"}, "lora")
    assert set(lora.target_layers(tiny_model(), options)) == {"lm_head"}
    with pytest.raises(UserError, match="'lm_head' shares its matrix with the token embedding"):
        lora.target_layers(tiny_model(tie_word_embeddings=True), options)


def test_fused_experts_are_refused_by_name() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    with pytest.raises(UserError, match=r"one tensor \('model.layers.0.mlp.experts.*targets=q_proj"):
        lora.target_layers(model, lora.LoraTraining())
    assert len(lora.target_layers(model, lora.LoraTraining(targets="q_proj,v_proj"))) == 2


def test_transposed_layers_are_adapted(new_workspace: Any, tmp_path: Path) -> None:
    seed = new_workspace(tmp_path / "gpt2", (), family="gpt2", tied=True) / "seed"
    part = part_of(AutoModelForCausalLM.from_pretrained(seed))
    for parameter in part.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_json(folder / "adapter_config.json", lora.adapter_config(seed, lora.LoraTraining())["adapter_config.json"])
    for file, tensors in part.extra_tensors().items():
        write_tensors(folder / file, tensors)
    expected = logits_of(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(seed), folder).eval())
    model = AutoModelForCausalLM.from_pretrained(seed).eval()
    overlay_tensors(model, AdaptedTensors(Checkpoint.of_folder(seed), folder))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
