"""``python -m benchmarks.run SUITE``: checks, times, prints a table and appends to benchmarks/results/SUITE-DEVICE.csv."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
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
    rows = []
    try:
        with tqdm(total=1, unit="run", leave=False, mininterval=1) as progress:
            for row in suite.bench(args.device, args.repeats, args.quick, progress):
                rows.append(row)
    finally:  # what was measured before a check failed, or a person lost patience, is kept
        table = pd.DataFrame(rows)
        if rows:
            report(table, suite.GROUP, about)
        if rows and not args.no_save:
            print(f"\nappended to {keep(table.assign(**about), RESULTS / f'{args.suite}-{args.device}.csv')}")
    return table


def keep(table: pd.DataFrame, path: Path) -> Path:
    """Adds the rows to a file, whose columns become those of both."""
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        earlier = pd.read_csv(path, dtype=str, keep_default_na=False)
        table = pd.concat([earlier, table.astype(object).where(table.notna(), "")]).fillna("")
    table.to_csv(path, index=False)
    return path


def report(table: pd.DataFrame, group: Sequence[str], about: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    for keys, part in table.groupby(list(group), sort=False):
        print("\n" + "  ".join(f"{name}={value}" for name, value in zip(group, keys)))
        print(part.drop(columns=list(group)).to_string(index=False, na_rep="-"))


if __name__ == "__main__":
    main()
