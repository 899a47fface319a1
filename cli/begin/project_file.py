"""The commented `expertctl.yaml` of a new workspace, filled in from the template `project_file.yaml`."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

PRETRAINED_SEED = """\
  # from: path/to/model     # a Hugging Face causal language model; by default a seed is pretrained:
  preset: tiny              # tiny: 1.3 million parameters, small: 7 million
  family: olmo2             # or llama
  training:
    tokens: 600000
    schedule_end: 0.5       # the seed runs half of the learning-rate schedule; experts run the rest
"""


def project_file(*, seed: Path | None, bundled: bool) -> str:
    """Return the text of a new `expertctl.yaml`; without `seed`, the seed is pretrained."""
    from ...experts.text.bundled import BUNDLED

    corpora = BUNDLED if bundled else {}
    domains = [f"  {name}: {{bundled: {name}}}".ljust(34) + f"# {source.summary}\n" for name, source in corpora.items()]
    return Template(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).substitute(
        seed=PRETRAINED_SEED if seed is None else f"  from: {json.dumps(str(seed))}\n",
        domains="".join(domains),
        experts="".join(f"  {name}: {{domain: {name}}}\n" for name in corpora),
    )
