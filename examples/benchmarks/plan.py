"""Benchmark of `expertctl plan`: predicted time and memory of training steps against measured ones.

    python examples/benchmarks/plan.py

Measures the steps that the model of time and memory is fitted to, and then steps of shapes that it was not fitted on; all in fresh
processes, on one core, in CPU seconds, so that other load matters little.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from expertctl.experts.scaling.calibration import FITTED, Trial, measure_all
from expertctl.experts.scaling.step_model import fitted

NEW = (
    Trial(448, 1216, 7, 6144, 3, 256),
    Trial(320, 896, 10, 24576, 2, 384),
    Trial(704, 1856, 5, 12288, 2, 512),
    Trial(576, 1536, 12, 2048, 1, 768),
)
"""Within the range of the fitted shapes, and none of them."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model = fitted(measure_all(FITTED))
    print(
        "| width, layers, words, batch | step s | predicted | | MB | predicted | |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for trial, measured in zip(NEW, measure_all(NEW), strict=True):
        seconds, memory = model.step_seconds(measured.workload), model.peak_bytes(measured.workload)
        name = f"{trial.hidden}, {trial.layers}, {trial.vocabulary:,}, {trial.batch} x {trial.length}"
        time = f"{measured.seconds:.2f} | {seconds:.2f} | {seconds / measured.seconds - 1:+.1%}"
        print(
            f"| {name} | {time} | {measured.bytes / 1e6:,.0f} | {memory / 1e6:,.0f} | {memory / measured.bytes - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
