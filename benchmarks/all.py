"""Run all benchmarks, write their figures as JSON, and make the summary of them.

The scripts run one after the other, each in a process of its own; leave the machine alone
meanwhile. With the default number of repeats that takes some ten minutes on two cores.

    python benchmarks/all.py
    python benchmarks/all.py --scripts step conv2d --repeats 9
    python benchmarks/all.py --no-compile --peers PyTorch             in half the time
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import summary
from harness import PEERS

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scripts", nargs="+", choices=summary.FAMILIES, default=list(summary.FAMILIES)
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="for the JSON files")
    parser.add_argument("--images", type=Path, default=HERE / "images", help="for the pictures")
    parser.add_argument("--peers", default=",".join(PEERS), help="as for the scripts")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=0, help="of every library (all cores)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    args = parser.parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    options = ["--repeats", str(args.repeats), "--peers", args.peers, "--only", args.only]
    options += ["--threads", str(args.threads), *["--no-compile"] * args.no_compile]
    failed = []
    for name in args.scripts:
        print(f"\n== {name}", flush=True)
        start, path = time.perf_counter(), args.results / f"{name}.json"
        command = [sys.executable, str(HERE / f"{name}.py"), *options, "--json", str(path)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    print()
    summary.main([str(args.results), "--images", str(args.images)])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
