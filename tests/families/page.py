"""The page docs/families.md, found out with tiny models.

    python tests/families/page.py --jobs 2 > docs/families.md

It takes about as many minutes as the tests of the families, which compare their results with the page.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "EXPERTCTL_PLUGINS": "", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from tiny_families import EXCLUDED, FAMILIES

INTRODUCTION = """# Model families

What works with each family of causal language models in transformers {version}, tried with a tiny random model on a CPU.
`tests/families` repeats every cell, and `python tests/families/page.py` prints this page.

| Column | Works if |
|---|---|
| Feed-forward trainer | `branch --trains feed_forward` trains the feed-forward networks, and coordinators accept them |
| Average | an average of two experts has the means of their parameters, under the names that transformers writes |
| Ensemble | `merge --method ensemble` generates the same tokens with and without a cache |
| Mixture | `merge --method btx` gives a model of the named class that runs; `MixtureForCausalLM` is expertctl's own |
| Stitched | `merge --method stitch` runs, and generates the same tokens with and without a cache |
| Router tuning | `tune --trains router` trains the routers that the model itself has |

Seeds of all families can be imported and trained. What does not work is refused before anything is written, with the
reason in brackets.
"""
NAMES = """## Names of tensors

For many families, transformers renames tensors when it loads a checkpoint, or stacks those of a layer's experts, and
reverts this when it saves. expertctl writes tensors as transformers saves them: seeds, experts and merged models have
the names of published checkpoints, which vLLM and other programs read.

- Patterns of `branch --trains` and of merges are matched against these names. A pattern that matches only some of the
  experts that are stacked in memory is refused.
- A folder whose names differ from the seed's, such as a GPT-2 without the prefix `transformer.`, is merged under the
  seed's names.
- A folder with stacked experts and one with single experts cannot be merged: load the former with `from_pretrained`, and
  save it with `save_pretrained`.
- Seeds that were imported under the names in memory, and their experts, go on working.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("families", nargs="*", help="print the rows of these families only")
    arguments = parser.parse_args()
    families = arguments.families or list(FAMILIES)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        rows = dict(zip(families, pool.map(row, families), strict=True))
    print("\n".join(table(rows)) if arguments.families else page(rows), end="")


def row(family: str) -> dict[str, str]:
    """Return the cells of a family by column."""
    from family_checks import CHECKS, family_workspace

    with tempfile.TemporaryDirectory() as folder:
        workspace = family_workspace(Path(folder) / "ws", family)
        return {column: check(workspace) for column, check in CHECKS.items()}


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return the whole page."""
    import transformers
    from family_checks import REASONS

    reasons = [f"{number}. {reason}" for number, (_, reason) in enumerate(REASONS, start=1)]
    groups = {reason: [name for name in EXCLUDED if EXCLUDED[name] == reason] for reason in EXCLUDED.values()}
    others = [f"| {reason} | {', '.join(f'`{name}`' for name in names)} |" for reason, names in groups.items()]
    parts = [
        INTRODUCTION.format(version=transformers.__version__),
        *table(rows),
        "\nReasons:\n",
        *reasons,
        f"\n{NAMES}",
        "## Other model types\n",
        "`AutoModelForCausalLM` also accepts these types, which are not tried:\n",
        "| Kind | Types |\n|---|---|",
        *others,
    ]
    return "\n".join(parts) + "\n"


def table(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the lines of the table."""
    from family_checks import CHECKS

    head = ["Family", *CHECKS]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| `{family}` | {' | '.join(cells.values())} |" for family, cells in rows.items()]


if __name__ == "__main__":
    main()
