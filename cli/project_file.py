"""The commented `expertctl.yaml` that a new workspace begins with."""

from __future__ import annotations

import json
from pathlib import Path

SCRATCH_SEED = """\
seed:
  # from: path/to/model     # a Hugging Face causal language model; without it, one is pretrained here:
  preset: tiny              # tiny: 1.3 million parameters, small: 7 million
  family: olmo2             # or llama
  training:
    tokens: 600000
    schedule_end: 0.5       # experts go on with the learning-rate schedule where the seed's run ends
"""
IMPORTED_SEED = """\
seed:
  from: {folder}
"""
DOMAIN_HINTS = """\
  # law: {path: text/law}                        # a file or folder; a tenth is kept for validation
  # code: {train: code.jsonl, valid: code-valid.jsonl, text_field: content, licence: MIT}
"""
REST = """\

# How every model trains; the seed and each expert may override any of it under a `training` of its own.
training:
  tokens: 150000            # budget of one run
  sequence_length: 256      # tokens in a block
  batch_size: 8             # blocks in a forward pass
  accumulation: 1           # forward passes in an optimiser step
  learning_rate: 0.003
  schedule: linear          # linear, cosine or constant
  # device: auto            # auto, cpu, cuda, cuda:1 ...
  # precision: auto         # auto: bfloat16 on a GPU that has it, else float32
  # threads: 1              # CPU threads of one run; with several runs at once, 1 is fastest

# One expert for each domain is the usual choice. `expertctl branch` starts others without this file.
experts:
  # law: {domain: law}                           # starts from the seed, trains every parameter
  # code: {domain: code, trains: feed_forward}   # attention, norms and embeddings stay the seed's
  # tax: {domain: law, from: {law: 0.7, code: 0.3}, training: {tokens: 50000}}
  # kept: {domain: law, dp: {epsilon: 8, delta: 1e-6}}   # with differential privacy: docs/privacy.md

# Generalists that `expertctl merge NAME` makes.
merges:
  forest: {method: ensemble}
  soup: {method: average, weights: posterior}

# launcher: local           # where training runs: `expertctl plugins` lists what is installed
"""


def project_file(*, seed: Path | None = None, bundled: bool = False) -> str:
    """Return the text of a new `expertctl.yaml`: with a seed to import or one to pretrain."""
    parts = [
        "# What this project is made of. Everything but the domains has a default that works.\n\n",
        "# The checkpoint that experts start from.\n",
        SCRATCH_SEED if seed is None else IMPORTED_SEED.format(folder=json.dumps(str(seed))),
        "\n# Named bodies of text.\n",
        _domains() if bundled else f"domains:\n{DOMAIN_HINTS}",
        _with_experts(REST) if bundled else REST,
    ]
    return "".join(parts)


def _domains() -> str:
    from ..experts.text.bundled import BUNDLED

    lines = [
        f"  {name}: {{bundled: {name}}}".ljust(34) + f"# {source.summary}\n"
        for name, source in BUNDLED.items()
    ]
    return "domains:\n" + "".join(lines) + DOMAIN_HINTS


def _with_experts(text: str) -> str:
    from ..experts.text.bundled import BUNDLED

    lines = "".join(f"  {name}: {{domain: {name}}}\n" for name in BUNDLED)
    return text.replace("experts:\n", "experts:\n" + lines)
