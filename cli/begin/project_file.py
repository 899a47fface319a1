"""The commented `expertctl.yaml` of a new workspace."""

from __future__ import annotations

import json
from pathlib import Path

SCRATCH_SEED = """\
seed:
  # from: path/to/model     # a Hugging Face causal language model; by default a seed is pretrained:
  preset: tiny              # tiny: 1.3 million parameters, small: 7 million
  family: olmo2             # or llama
  training:
    tokens: 600000
    schedule_end: 0.5       # the seed runs half of the learning-rate schedule; experts run the rest
"""
IMPORTED_SEED = """\
seed:
  from: {folder}
"""
DOMAIN_HINTS = """\
  # law: {path: text/law}                        # a file or folder; a tenth is held out for validation
  # code: {train: code.jsonl, valid: code-valid.jsonl, text_field: content, licence: MIT}
"""
REST = """\

# Training settings of all models. The seed and each expert can override them in their own `training` section.
training:
  tokens: 150000            # training budget of one run
  sequence_length: 256      # tokens per block
  batch_size: 8             # blocks per forward pass
  accumulation: 1           # forward passes per optimiser step
  learning_rate: 0.003
  schedule: linear          # linear, cosine or constant
  # device: auto            # auto, cpu, cuda, cuda:1 ...
  # precision: auto         # auto: bfloat16 on GPUs that support it, else float32
  # threads: 1              # CPU threads per run; 1 is fastest for several runs at once

# Usually one expert per domain. `expertctl branch` can start further experts that are not listed here.
experts:
  # law: {domain: law}                           # starts from the seed, trains all parameters
  # code: {domain: code, trains: feed_forward}   # attention, norms and embeddings stay frozen
  # tax: {domain: law, from: {law: 0.7, code: 0.3}, training: {tokens: 50000}}
  # kept: {domain: law, dp: {epsilon: 8, delta: 1e-6}}   # with differential privacy: docs/privacy.md

# Generalists to make with `expertctl merge NAME`.
merges:
  forest: {method: ensemble}
  soup: {method: average, weights: posterior}

# launcher: local           # where training runs; `expertctl plugins` lists the launchers
"""


def project_file(*, seed: Path | None = None, bundled: bool = False) -> str:
    """Return the text of a new `expertctl.yaml`; without `seed`, the seed is pretrained."""
    parts = [
        "# Project file. Everything except the domains has a working default.\n\n",
        "# The checkpoint that experts start from.\n",
        SCRATCH_SEED if seed is None else IMPORTED_SEED.format(folder=json.dumps(str(seed))),
        "\n# Text corpora by name.\n",
        _domains() if bundled else f"domains:\n{DOMAIN_HINTS}",
        _with_experts(REST) if bundled else REST,
    ]
    return "".join(parts)


def _domains() -> str:
    from ...experts.text.bundled import BUNDLED

    lines = [f"  {name}: {{bundled: {name}}}".ljust(34) + f"# {source.summary}\n" for name, source in BUNDLED.items()]
    return "domains:\n" + "".join(lines) + DOMAIN_HINTS


def _with_experts(text: str) -> str:
    from ...experts.text.bundled import BUNDLED

    lines = "".join(f"  {name}: {{domain: {name}}}\n" for name in BUNDLED)
    return text.replace("experts:\n", "experts:\n" + lines)
