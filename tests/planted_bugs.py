"""Plant one bug at a time and see the test suite catch it.

    python tests/planted_bugs.py             # all of them
    python tests/planted_bugs.py conv2d pool # those whose file or description says so

Each bug is one change to one line of a copy of the package. The tests that mirror the changed file
run first; if they let it pass, those that stand near it or name it; then all others. Exits with 1
if a bug survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bug_list import BUGS, Bug

ROOT = Path(__file__).resolve().parent.parent
# These look at the sources, and would see any change.
BLIND = "tests/test_planted_bugs.py", "tests/test_readme.py", "tests/notebooks"


def make_copy(folder: Path) -> None:
    """Copy what the tests need, compiled kernels too, which stay there from bug to bug."""
    for part in ("minicnn", "tests", "benchmarks", "notebooks"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy2(path, folder)


def suites(file: str) -> list[list[str]]:
    """Test files by how close they are to a file of the package: mirrors, neighbours, all."""
    every = {
        str(found.relative_to(ROOT))
        for found in (ROOT / "tests").rglob("test_*.py")
        if not str(found.relative_to(ROOT)).startswith(BLIND)
    }

    def mirrors(file: str) -> set[str]:
        folder, stem = Path("tests") / Path(file).parent, Path(file).stem
        while stem:
            names = (stem, f"{stem}_*", f"{folder.name}_{stem}")
            found = {f for f in every for n in names if Path(f).match(f"{folder}/test_{n}.py")}
            if found:
                return found
            stem = stem.rpartition("_")[0]
        if folder.name in ("tests", "ops", "layers"):
            return set()
        return {name for name in every if Path(name).parent == folder}

    path = Path(file)
    word = re.compile(rf"\b{path.stem}\b")
    importing = re.compile(
        rf"^(from|import) .*\b{path.stem}\b|^    from .* import .*\b{path.stem}\b", re.M
    )
    near = {name for name in every if word.search((ROOT / name).read_text())}
    for source in (ROOT / "minicnn").rglob("*.py"):
        if importing.search(source.read_text()):
            near |= mirrors(str(source.relative_to(ROOT / "minicnn")))
    first = mirrors(file)
    near -= first
    return [sorted(names) for names in (first, near, every - first - near) if names]


def caught_by(bug: Bug, copy: Path) -> str:
    """Run the tests with the bug planted; say what failed first, or "" if nothing did."""
    source, target = ROOT / "minicnn" / bug.file, copy / "minicnn" / bug.file
    text = source.read_text()
    assert text.count(bug.old) == 1, f"{bug.what}: its line has changed"
    target.write_text(text.replace(bug.old, bug.new))
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("NUMBA", "OMP", "OPENBLAS")}
    environment = os.environ | one_thread | {"PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    try:
        for tests in suites(bug.file):
            run = subprocess.run(
                [*command, *tests], cwd=copy, env=environment, capture_output=True, text=True
            )
            failed = [
                line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
            ]
            if failed:
                return failed[0].split(" - ")[0].partition(" ")[2]
            if run.returncode < 0:
                return f"{tests[0]} (killed by signal {-run.returncode})"
            if run.returncode not in (0, 5):  # 5: all were skipped as they were collected
                raise RuntimeError(f"{bug.what}: pytest broke off:\n{run.stdout}{run.stderr}")
    finally:
        shutil.copy2(source, target)  # with its time, so that what was compiled from it is valid
    return ""


def main() -> int:
    """Plant the bugs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="plant only bugs that say one of these words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--first", type=int, default=1, help="begin with this number of the list")
    arguments = parser.parse_args()
    words = arguments.words or [""]
    bugs = [bug for bug in BUGS if any(word in bug.file or word in bug.what for word in words)]
    bugs = bugs[arguments.first - 1 :]
    survived = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(arguments.jobs):
            make_copy(Path(name) / str(i))
            copies.put(Path(name) / str(i))

        def plant(bug: Bug) -> tuple[str, float]:
            copy, began = copies.get(), time.perf_counter()
            try:
                return caught_by(bug, copy), time.perf_counter() - began
            finally:
                copies.put(copy)

        for i, (bug, (test, seconds)) in enumerate(
            zip(bugs, pool.map(plant, bugs)), arguments.first
        ):
            what = f"{i:3} {bug.file}: {bug.what}"
            print(f"{what}: {test or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
            survived += not test
    print(f"{len(bugs) - survived} of {len(bugs)} planted bugs caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
