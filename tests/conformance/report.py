"""Run the suites that others wrote and print what became of them, as Markdown for the README.

    python tests/conformance/report.py

Needs ``pip install '.[conformance]'``, and PyTorch for its half. Exits with 1 if a case failed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conformance import onnx_suite, torch_suite


def main() -> int:
    """Print both tables, and each failure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", nargs="*", choices=("onnx", "torch", []), help="default: both")
    chosen = parser.parse_args().suite or ["onnx", "torch"]
    failed = []
    for name, suite in (("onnx", onnx_suite), ("torch", torch_suite)):
        if name in chosen:
            print(suite.table(), flush=True)
            print()
            failed += [o for o in suite.outcomes() if o.result == "failed"]
    for outcome in failed:
        print(outcome, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
