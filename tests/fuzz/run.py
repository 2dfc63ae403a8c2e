"""Read damaged files and see that nothing breaks.

    python tests/fuzz/run.py                        # 100,000 files, all formats
    python tests/fuzz/run.py onnx --count 5000 --seed 7 --keep /tmp/bad

Each file is read in a process of its own kind, which may not die, hang, return a wrong value,
fail without naming the file, or take more memory than twice the file plus 16 MB. Exits with 1 if
one does; ``--keep`` saves what did it. The same seed damages the same files in the same way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.mutations import mutate
from fuzz.targets import TARGETS, Target

SECONDS = 10  # of the processor for one file, which takes milliseconds
SILENCE = 300  # seconds without any answer, after which a process counts as hung
SLACK = 16 << 20  # bytes of memory beside twice the file


FORM = re.compile(r"[\w.]+: .*expected .*, got ", re.DOTALL)


class Finding(NamedTuple):
    """Something that must not happen."""

    target: str
    number: int
    what: str
    content: bytes


class Hang(BaseException):
    """Raised by the alarm; no reader can swallow it as an ordinary error."""


def examine(
    target: Target, path: Path, content: bytes, whole: bytes, peak: Any = None
) -> tuple[str, str]:
    """Read one damaged file: ("accepted" or "refused", what is wrong or "")."""
    path.write_bytes(content)
    tracemalloc.reset_peak()
    start, _ = tracemalloc.get_traced_memory()
    resident = _peak_resident()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # not by the clock: the machine may be busy
    try:
        value = target.read(path)
        verdict, fault = "accepted", ""
    except Hang:
        return "hung", f"no answer within {SECONDS} s of computing"
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        text = f"{error}{''.join(getattr(error, '__notes__', ()))}"
        named = path.name in text or path.parent.name in text or FORM.match(text)
        verdict, fault = (
            "refused",
            "" if named else f"the error names neither file nor argument: {text:.200}",
        )
    except BaseException as error:
        verdict, fault = "refused", f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    most = tracemalloc.get_traced_memory()[1] - start
    grown = max(most, _peak_resident() - resident)
    if grown > 2 * len(content) + SLACK:
        fault = fault or f"{grown >> 20} MB of memory for a file of {len(content)} bytes"
    if verdict == "accepted" and not fault:
        fault = target.wrong(value, content, whole)
    return verdict, fault


def _peak_resident() -> int:
    """The most memory that this process ever had, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def work(name: str, numbers: range, seed: int, at: Any, results: Any, target: Any = None) -> None:
    """Examine some files in this process; `at` says which one it is at."""
    import os
    import warnings

    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # safetensors and protobuf may print

    def hang(*args: object) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, hang)
    target = target or TARGETS[name]
    files = target.files()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder) / f"file{target.suffix}"
        for whole in files:  # a first reading imports and compiles
            path.write_bytes(whole)
            value = target.read(path)
            fault = target.wrong(value, whole, whole)
            if fault:
                raise SystemExit(f"{name}: a whole file: {fault}")
        tracemalloc.start()
        for i in numbers:
            at.value = i
            which, content = mutate(files, np.random.default_rng([seed, i]), target.rewrite)
            verdict, fault = examine(target, path, content, files[which])
            results.put((i, verdict, fault, content if fault else b""))
    results.put(None)


def fuzz(
    name: str, count: int, seed: int, progress: Any = None, target: Target | None = None
) -> tuple[Counter[str], list[Finding]]:
    """Examine `count` damaged files of one format, and go on after a crash."""
    context = multiprocessing.get_context("fork" if target else "spawn")
    verdicts: Counter[str] = Counter()
    findings: list[Finding] = []
    first = 0
    while first < count:
        at, results = context.Value("q", -1), context.Queue()
        arguments = (name, range(first, count), seed, at, results, target)
        process = context.Process(target=work, args=arguments, daemon=True)
        process.start()
        finished, heard = False, time.monotonic()
        while not finished:
            try:
                message = results.get(timeout=1)
            except Exception:  # queue.Empty
                silent = time.monotonic() - heard
                if process.is_alive() and silent < SILENCE:
                    continue
                hung = process.is_alive()
                process.kill()
                process.join()
                if at.value < 0:
                    raise RuntimeError(f"{name}: the reading of whole files failed") from None
                first = at.value + 1
                reader = target or TARGETS[name]
                rng = np.random.default_rng([seed, at.value])
                content = mutate(reader.files(), rng, reader.rewrite)[1]
                what = "hung in native code" if hung else f"the process died ({process.exitcode})"
                verdicts["crashed"] += 1
                findings.append(Finding(name, at.value, what, content))
                break
            heard = time.monotonic()
            if message is None:
                finished, first = True, count
                continue
            i, verdict, fault, content = message
            verdicts[verdict] += 1
            if fault:
                findings.append(Finding(name, i, fault, content))
            if progress is not None:
                progress.update()
        process.join()
    return verdicts, findings


def main(argv: list[str] | None = None) -> int:
    """Fuzz the formats that the command line names."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"{', '.join(TARGETS)}; "
                        "all of them by default")  # fmt: skip
    parser.add_argument("--count", type=int, default=100_000, help="files in all (100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (0)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="save what was found there")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.formats) - set(TARGETS)
    if unknown:
        parser.error(f"FORMAT: expected {', '.join(TARGETS)}, got {sorted(unknown)[0]}")
    names = arguments.formats or list(TARGETS)
    each, found = -(-arguments.count // len(names)), 0
    print(
        "| format | files | refused | read | faults |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for name in names:
        with tqdm(total=each, desc=name, unit="file", leave=False, disable=None) as progress:
            verdicts, findings = fuzz(name, each, arguments.seed, progress)
        print(f"| {name} | {sum(verdicts.values()):,} | {verdicts['refused']:,} | "
              f"{verdicts['accepted']:,} | {len(findings)} |", flush=True)  # fmt: skip
        found += len(findings)
        for finding in findings[:20]:
            print(f"{name} #{finding.number}: {finding.what}", file=sys.stderr, flush=True)
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            for finding in findings:
                path = arguments.keep / f"{name}-{arguments.seed}-{finding.number}"
                path.write_bytes(finding.content)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
