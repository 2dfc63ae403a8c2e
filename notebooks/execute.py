"""Run notebooks from top to bottom and write their outputs into the files.

    python notebooks/execute.py             # all of them
    python notebooks/execute.py 02 05       # those whose names begin so

Times of day and other metadata of a run are left out, so that a second run changes only what
the notebook prints.
"""

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def notebooks():
    """Paths of all notebooks, in their order."""
    return sorted(HERE.glob("*.ipynb")) + sorted(HERE.glob("solutions/*.ipynb"))


def executed(path, timeout=600):
    """Return the notebook at `path` with fresh outputs; an error in a cell is raised."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not the version at hand
    return notebook


def merged(outputs):
    """Join texts that follow each other on one stream: how they were cut depends on the moment."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def main(names):
    """Execute the notebooks that begin with one of `names`, in place."""
    import nbformat

    for path in notebooks():
        if not names or any(path.name.startswith(name) for name in names):
            began = time.perf_counter()
            notebook = executed(path)
            nbformat.write(notebook, path)
            size = path.stat().st_size / 1000
            print(f"{path.name}: {time.perf_counter() - began:.0f} s, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
