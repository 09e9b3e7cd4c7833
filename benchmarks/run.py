"""``python -m benchmarks.run SUITE``: checks, times, prints a table and appends to benchmarks/results/SUITE-DEVICE.csv."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

# PyTorch's default, pinned: with 1 its large blocks ask for huge pages, which helps what allocates most (eager).
# Read when its allocator starts.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")

import pandas as pd
import torch
from tqdm import tqdm

from .measure import environment

SUITES = ("losses", "linear", "memory", "capture", "signals", "store", "generate", "verify", "kv", "dense")
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs per contender, at least 7 for a result worth keeping")
    parser.add_argument("--quick", action="store_true", help="the first case only, without torch.compile")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    about = environment(args.device)  # before a suite changes the instruction set
    suite = importlib.import_module(f".{args.suite}", __package__)
    with tqdm(total=1, unit="run", leave=False, mininterval=1) as progress:
        rows = list(suite.bench(args.device, args.repeats, args.quick, progress))
    table = pd.DataFrame(rows)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    for keys, part in table.groupby(list(suite.GROUP), sort=False):
        print("\n" + "  ".join(f"{name}={value}" for name, value in zip(suite.GROUP, keys)))
        print(part.drop(columns=list(suite.GROUP)).to_string(index=False, na_rep="-"))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{args.suite}-{args.device}.csv"
        table.assign(**about).to_csv(path, mode="a", header=not path.exists(), index=False)
        print(f"\nappended to {path}")
    return table


if __name__ == "__main__":
    main()
