"""The project file: what is wrong in it is one line with file, line, key and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from expertctl.core.config.project import load_project
from expertctl.core.config.settings import (
    ExpertConfig,
    MergeConfig,
    ProjectConfig,
    TrainingConfig,
    overlay,
    validate_settings,
)
from expertctl.core.errors import UserError
from expertctl.core.hooks.options import parse_options

FULL = """
seed: {preset: small, family: llama, domains: [law], training: {tokens: 1000}}
domains:
  law: {path: texts/law, valid_share: 0.2, licence: CC0-1.0}
  code: {bundled: python}
  news: {train: a.jsonl, valid: b.jsonl, text_field: body}
training:
  learning_rate: 1e-3
  betas: [0.9, 0.99]
experts:
  law: {domain: law, from: {code: 0.5, seed: 0.5}, trains: feed_forward}
  code: {domain: code, training: {learning_rate: 0.01}}
merges:
  forest: {method: ensemble, experts: [law, code], weights: posterior, options: {top_k: 2}}
"""


Load = Callable[[str | bytes], ProjectConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str | bytes) -> ProjectConfig:
        path = tmp_path / "expertctl.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_project(path)

    return load


def test_a_full_file_is_read_into_its_sections(load: Load) -> None:
    project = load(FULL)
    assert project.seed.domains == ("law",)
    assert project.domains["news"].text_field == "body"
    assert project.training.learning_rate == 1e-3
    assert project.experts["law"].from_ == {"code": 0.5, "seed": 0.5}
    assert project.merges["forest"] == MergeConfig(
        method="ensemble", experts=("law", "code"), weights="posterior", options={"top_k": 2}
    )


def test_settings_that_may_be_unset_take_true_and_false(load: Load) -> None:
    assert load("seed: {from: /model, bos: true}").seed.bos is True
    assert load("training: {chunked_loss: false}").training.chunked_loss is False


def test_domains_may_have_names_reserved_among_experts(load: Load) -> None:
    assert list(load("domains: {auto: {bundled: cpp}, v1.2_a-b: {bundled: python}}").domains) == [
        "auto",
        "v1.2_a-b",
    ]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "experts:\n  # none yet\n"])
def test_an_empty_file_is_all_defaults(load: Load, text: str) -> None:
    assert load(text) == ProjectConfig()


LAW = "domains: {law: {bundled: python}}\n"

WRONG = {
    # unknown keys, at every level
    "traning: {}": "1: unknown key 'traning' (did you mean 'training'?)",
    "zzz: {}": "1: unknown key 'zzz'; known here: domains, experts, launcher, merges, seed, tracking, training",
    "seed:\n  form: x": "2: unknown key 'form' in seed (did you mean 'from'?)",
    "training:\n  lerning_rate: 1": "2: unknown key 'lerning_rate' in training (did you mean 'learning_rate'?)",
    "seed:\n  training:\n    tokenz: 1": "3: unknown key 'tokenz' in seed.training (did you mean 'tokens'?)",
    "domains:\n  law:\n    bundeled: python": "3: unknown key 'bundeled' in domains.law (did you mean 'bundled'?)",
    LAW + "experts:\n  a:\n    doman: law": "4: unknown key 'doman' in experts.a (did you mean 'domain'?)",
    LAW + "experts:\n  a: {domain: law,\n      training: {tokns: 3}}": (
        "4: unknown key 'tokns' in experts.a.training (did you mean 'tokens'?)"
    ),
    "merges:\n  f:\n    metod: average": "3: unknown key 'metod' in merges.f (did you mean 'method'?)",
    # missing ones
    "merges:\n  f:\n    weights: uniform": "2: merges.f.method: field required",
    # wrong types
    "- a": "1: input should be a mapping of keys to values",
    "3": "1: input should be a mapping of keys to values",
    "[]": "1: input should be a mapping of keys to values",
    "training: [1]": "1: training: input should be a mapping of keys to values",
    "domains:\n  law:": "2: domains.law: input should be a mapping of keys to values",
    "training:\n  tokens: many": "2: training.tokens: input should be a valid integer, … (it is 'many')",
    "training:\n  tokens: 3.5": "2: training.tokens: input should be a valid integer, … (it is 3.5)",
    "training:\n  learning_rate: yes": "2: training.learning_rate: input should not be true or false",
    "training:\n  betas: 3": "2: training.betas: input should be a valid list (it is 3)",
    "training:\n  betas: [0.9]": "2: training.betas.1: field required",
    "training:\n  device: 3": "2: training.device: input should be a valid string (it is 3)",
    "merges:\n  f: {method: m,\n      experts: a}": "3: merges.f.experts: input should be a valid list (it is 'a')",
    "merges:\n  f:\n    method: m\n    weights: {a: x}": "4: merges.f.weights.a: input should be a valid number, … 'x')",
    LAW + "experts:\n  a:\n    domain: law\n    from: [b]": "5: experts.a.from: input should be a valid string",
    LAW
    + "experts:\n  a:\n    domain: law\n    from: {b: x}": "5: experts.a.from.b: input should be a valid number, … 'x')",
    "1: 2": "1: 1: keys should be strings",
    # impossible values
    "training:\n  tokens: -3": "2: training.tokens: input should be greater than 0 (it is -3)",
    "training:\n  warmup: 1.5": "2: training.warmup: input should be less than or equal to 1 (it is 1.5)",
    "training:\n  learning_rate: .inf": "2: training.learning_rate: input should be a finite number (it is inf)",
    "training:\n  learning_rate: .nan": "2: training.learning_rate: input should be a finite number (it is nan)",
    "training:\n  schedule: lnear": "2: training.schedule: input should be 'linear', 'cosine', 'constant', 'wsd' or 'restarts' (it is 'lnear')",
    "training:\n  schedule_begin: 0.5\n  schedule_end: 0.2": "1: training: schedule_begin must be smaller than schedule_end",
    "merges:\n  f:\n    method: m\n    weights: unifrom": "4: merges.f.weights: input should be 'uniform' or 'posterior' (it is 'unifrom')",
    "merges:\n  f:\n    method: m\n    weights: {a: .nan}": "4: merges.f.weights.a: input should be a finite number (it is nan)",
    "domains:\n  law: {}": "2: domains.law: give exactly one of 'bundled', 'path' or 'train'",
    "domains:\n  law: {bundled: python, path: x}": "2: domains.law: give exactly one of 'bundled', 'path' or 'train'",
    "domains:\n  law: {train: x}": "2: domains.law: 'train' and 'valid' go together; use 'path' to split one source",
    "domains:\n  law: {path: x,\n        valid_share: 1}": "3: domains.law.valid_share: input should be less than 1 (it is 1)",
    # names that do not exist
    LAW + "experts:\n  a:\n    domain: lwa": "4: experts.a.domain: no domain 'lwa' (did you mean 'law'?)",
    LAW + "experts:\n  v1.2:\n    domain: zz": "4: experts.v1.2.domain: no domain 'zz'; domains: law",
    LAW + "seed:\n  domains: [law, xyz]": "3: seed.domains: no domain 'xyz'; domains: law",
    "experts:\n  a:\n    domain: law": "3: experts.a.domain: no domain 'law'; domains: none",
    # names that cannot be folders
    "domains:\n  law: {bundled: python}\n  a/b: {bundled: cpp}": (
        "3: domains.a/b: a domain cannot be called 'a/b': use letters, digits, '-', '_' and '.', starting with …"
    ),
    "domains:\n  ..: {bundled: cpp}": "2: domains...: a domain cannot be called '..': use letters, …",
    "domains:\n  'my law': {bundled: cpp}": "2: domains.my law: a domain cannot be called 'my law': use …",
    "domains:\n  '': {bundled: cpp}": "2: domains.: a domain cannot be called '': use letters, …",
    # the same key twice
    "training:\n  tokens: 1\n  tokens: 2": "3: duplicate key 'tokens'",
    LAW + "'domains': {}": "2: duplicate key 'domains'",
    # not YAML
    "a: [": "1: not valid YAML: …",
    "a: b: c": "1: not valid YAML: mapping values are not allowed here",
    "ok: 1\n\ta: 1": "2: not valid YAML: found character '\\t' that cannot start any token",
    "a: *nope": "1: not valid YAML: found undefined alias 'nope'",
    "a: !!python/object:os.system {}": "1: not valid YAML: could not determine a constructor for the tag …",
    "? [1, 2]\n: 3": "1: not valid YAML: found unhashable key",
    "a: &x [*x]": " not valid YAML: maximum recursion depth exceeded…",
    "a: " + "[" * 3000: " not valid YAML: maximum recursion depth exceeded…",
    "seed: {licence: 2020-13-45}": " not valid YAML: month must be in 1..12",
    "a: \x00": " not valid YAML: …#x0000…",
}


@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=list(WRONG.values()))
def test_errors_name_file_line_key_and_nearest_name(load: Load, tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    message = str(caught.value)
    expected = ".*".join(re.escape(part) for part in f"{tmp_path / 'expertctl.yaml'}:{said}".split("…"))
    assert re.fullmatch(rf"{expected}( \(it is .*\))?", message)
    assert "\n" not in message
    assert "pydantic" not in message


def test_a_tracker_without_options_may_stand_alone(load: Load) -> None:
    assert load("tracking:\n  tensorboard:\n  wandb: {project: x}\n").tracking == {
        "tensorboard": {},
        "wandb": {"project": "x"},
    }


def test_text_that_is_not_utf_8_is_named_with_its_byte(load: Load) -> None:
    with pytest.raises(UserError, match=r"expertctl\.yaml is not UTF-8 text \(byte 3\)"):
        load(b"a: \xff\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.yaml: No such file"):
        load_project(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_project(tmp_path)


# --- settings laid over each other ---


def test_training_settings_of_an_expert_lie_over_the_projects(load: Load) -> None:
    project = load("training: {tokens: 5000, batch_size: 2}\nseed: {training: {tokens: 7000}}")
    resolved = project.training_of(project.seed.training)
    assert (resolved.tokens, resolved.batch_size) == (7000, 2)
    assert resolved.learning_rate == TrainingConfig().learning_rate


def test_a_setting_that_equals_the_default_still_counts_as_given() -> None:
    project = TrainingConfig(batch_size=2)
    assert overlay(project, TrainingConfig(batch_size=8)).batch_size == 8
    assert overlay(project, TrainingConfig()).batch_size == 2


def test_settings_that_only_together_make_no_sense_are_a_users_error() -> None:
    project = ProjectConfig(training=TrainingConfig(schedule_end=0.4))
    with pytest.raises(UserError, match="training: schedule_begin must be smaller than schedule_end"):
        project.training_of(TrainingConfig(schedule_begin=0.6))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainingConfig().tokens = 3


def test_steps_follow_from_the_token_budget_and_are_at_least_one() -> None:
    config = TrainingConfig(tokens=10_000, sequence_length=64, batch_size=4, accumulation=2)
    assert config.tokens_per_step == 512
    assert config.steps == 19
    assert TrainingConfig(tokens=1).steps == 1


def test_settings_given_in_code_are_checked_like_the_file() -> None:
    assert validate_settings(ExpertConfig, {"domain": "law", "from": "auto"}, "expert 'a'").from_ == "auto"
    with pytest.raises(UserError, match="expert 'a': unknown key 'trian' \\(did you mean 'trains'"):
        validate_settings(ExpertConfig, {"domain": "law", "trian": "all"}, "expert 'a'")
    with pytest.raises(UserError, match=r"merge 'f': weights: input should be 'uniform' or 'posterior'"):
        validate_settings(MergeConfig, {"method": "average", "weights": "unifrom"}, "merge 'f'")


# --- options of plugins ---


@dataclass(frozen=True)
class Options:
    trim: int = 1
    how: Literal["mean", "median"] = "mean"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.trim < 0:
            raise ValueError("trim is 0 or more")


def test_options_become_the_plugins_dataclass() -> None:
    assert parse_options(Options, {}, "it") == Options()
    assert parse_options(Options, {"trim": "3", "scale": 0.5}, "it") == Options(trim=3, scale=0.5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trin": 1}, r"it has no option 'trin' \(did you mean 'trim'\?\); it has: how, scale, trim"),
        ({"trim": "x"}, "it: option trim: Input should be a valid integer"),
        ({"how": "max"}, "it: option how: Input should be 'mean' or 'median'"),
        ({"trim": -1}, "trim is 0 or more"),
    ],
)
def test_bad_options_are_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_options(Options, values, "it")


def test_a_method_without_options_takes_none() -> None:
    parse_options(None, {}, "it")
    with pytest.raises(UserError, match="it has no option 'a'; it has: none"):
        parse_options(None, {"a": 1}, "it")
