"""A sweep of a small model that can be killed: forks a process a line of input, which runs the sweep in a store.

Imported once, so that fifty restarts take seconds. Input lines: ``STORE CSV LOG``; it answers with the process's id.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pandas as pd
import torch
from families import build

from resting.baselines.teal import Teal
from resting.benchmarks.cells.cell import Result
from resting.benchmarks.sweep.run_cells import run_cells
from resting.benchmarks.sweep.store import Store, StoreError
from resting.method.mean_error import MeanError
from resting.sparsifier import Calibration

torch.set_num_threads(1)  # what is forked must not need threads that are not
MODEL = build("llama")
WINDOWS = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(0))
CELLS = [
    (hashlib.sha256(f"{wrap} {target}".encode()).hexdigest(), (wrap, target))
    for wrap in (False, True)
    for target in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
]


def measure(item: tuple[bool, float]) -> Result:
    wrap, target = item
    method = MeanError(Teal(target=target)) if wrap else Teal(target=target)
    plan = method.fit(MODEL, Calibration(WINDOWS))
    with torch.no_grad(), plan.applied(MODEL):
        value = float(MODEL(input_ids=WINDOWS).logits.double().logsumexp(-1).mean())
    row = {"model": "tiny", "method": method.label, "target": target, "metric": "m", "value": value}
    return Result("done", rows=[row | {"reason": None}], windows={"pad": [value] * 500})


def run(store: Path, csv: Path, log: Path) -> None:
    """Run the sweep; every cell that this process saved is a line in `log`."""
    found = {}
    for key, _, result, was_finished in run_cells(CELLS, Store(store), measure):
        if not was_finished:
            with log.open("a") as file:
                file.write(f"{key}\n")
        found[key] = result.rows
    pd.DataFrame([row for key, _ in CELLS for row in found[key]]).to_csv(csv, index=False)


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if "wait" in line else "", flush=True)
            continue
        try:
            run(*(Path(part) for part in line.split()[:3]))
        except StoreError as error:
            Path(line.split()[2]).write_text(str(error))
            os._exit(2)
        os._exit(0)


if __name__ == "__main__":
    main()
