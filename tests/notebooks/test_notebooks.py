"""The notebooks run from top to bottom, and what is committed reads well without running."""

import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra: nbformat")
pytest.importorskip("nbclient", reason="needs the notebooks extra: nbclient")
pytest.importorskip("ipykernel", reason="needs the notebooks extra: ipykernel")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))
from execute import executed, merged, notebooks  # noqa: E402

NOTEBOOKS = {path.stem: path for path in notebooks()}
LESSONS = {name: path for name, path in NOTEBOOKS.items() if path.parent.name == "notebooks"}
each = pytest.mark.parametrize("name", NOTEBOOKS)
each_lesson = pytest.mark.parametrize("name", LESSONS)

MAX_SIZE = 600_000  # bytes of a notebook with its outputs


def read(name):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def kinds(cell):
    """What a cell puts out: streams by name, other outputs by their types."""
    return [
        output.name if output.output_type == "stream" else sorted(output.data)
        for output in cell.outputs
    ]


def printed(notebook):
    return "".join(
        output.text
        for cell in code(notebook)
        for output in cell.outputs
        if output.output_type == "stream"
    )


@each
def test_it_runs_and_puts_out_what_is_committed(name, monkeypatch):
    """Not the same numbers, which depend on the processor, but the same kinds of output."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    fresh, committed = executed(NOTEBOOKS[name]), read(name)
    for now, before in zip(code(fresh), code(committed), strict=True):
        assert kinds(now) == kinds(before), now.source
    if name == "10-solutions":
        assert printed(fresh).count("Well done!") == 6
        assert "FAIL" not in printed(fresh)


@each
def test_the_committed_outputs_are_whole_and_small(name):
    notebook = read(name)
    assert NOTEBOOKS[name].stat().st_size < MAX_SIZE
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run: python notebooks/execute.py"
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert not re.search(r"/(home|tmp|work|root|usr)/", text), text
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each_lesson
def test_it_opens_with_what_one_will_know_and_asks_questions(name):
    notebook = read(name)
    first = notebook.cells[0].source
    assert first.startswith(f"# {int(name[:2])}. ")
    assert re.search(r"\*\*After (this notebook|these exercises) you can( answer)?\*\*", first)
    folded = re.findall(
        r"<details><summary><b>Question (\d)\.</b> .+?</summary>\n\n(.+?)\n</details>",
        prose(notebook),
        re.DOTALL,
    )
    assert [int(number) for number, _ in folded] == list(range(1, len(folded) + 1))
    assert 3 <= len(folded) <= 5
    assert all(len(answer) > 100 for _, answer in folded)
    assert prose(notebook).count("<details>") == prose(notebook).count("</details>")


def test_there_are_ten_and_each_leads_to_the_next():
    names = list(LESSONS)
    assert [int(name[:2]) for name in names] == list(range(1, 11))
    for name, following in pairwise(names):
        last = prose(read(name)).splitlines()[-1]
        assert last.startswith("**Next:** ")
        assert f"({following}.ipynb)" in prose(read(name)).split("**Next:**")[1]


@each
def test_links_lead_on(name):
    for link in re.findall(r"\]\(([^)#]+)\)", prose(read(name))):
        assert (NOTEBOOKS[name].parent / link).exists(), link


def test_the_solutions_fill_in_the_blanks_and_change_nothing_else():
    blank = r"raise NotImplementedError  # your code: .*"
    exercises = [cell.source for cell in code(read("10-exercises"))]
    solutions = [cell.source for cell in code(read("10-solutions"))]
    assert len(exercises) == len(solutions)
    blanks = 0
    for exercise, solution in zip(exercises, solutions):
        before, *after = re.split(blank, exercise)
        blanks += len(after)
        assert solution.startswith(before)
        assert all(solution.endswith(rest) for rest in after)
        assert after or solution == exercise
        assert not re.search(blank, solution)
    assert blanks == 6
    assert printed(read("10-exercises")).count("still blank") == 7


def test_texts_that_follow_each_other_are_joined():
    from nbformat.v4 import new_output

    out = lambda text, name="stdout": new_output("stream", text=text, name=name)  # noqa: E731
    data = new_output("display_data", data={"text/plain": "a picture"})
    joined = merged([out("a"), out("b"), data, out("c"), out("d", "stderr")])
    assert [output.get("text") for output in joined] == ["ab", None, "c", "d"]
