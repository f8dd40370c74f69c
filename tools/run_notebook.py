# SPDX-License-Identifier: Apache-2.0
"""Executes notebooks in place and keeps their outputs small and free of the machine they ran on.

python tools/run_notebook.py notebooks/single_pass.ipynb [...]
"""

import os
import pathlib
import re
import sys

import nbformat
from nbclient import NotebookClient

MAX_BYTES = 300_000
_PLACES = re.compile(r"/tmp/[^\s'\"]+")


def execute(path: pathlib.Path, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook at `path` after running every cell on the CPU; raises when a cell does."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["JAX_PLATFORMS"] = "cpu"
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
    )
    return client.execute()


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without times, progress lines and temporary paths, so that a new run changes only results."""
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in outputs:
                if "text" in output:
                    output.text = _PLACES.sub("/tmp/...", output.text)
            cell.outputs = outputs
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def main(paths: list[str]) -> None:
    for name in paths:
        path = pathlib.Path(name)
        text = nbformat.writes(cleaned(execute(path))) + "\n"
        if len(text) > MAX_BYTES:
            sys.exit(f"{path}: {len(text)} bytes with outputs, more than {MAX_BYTES}")
        path.write_text(text)
        print(f"{path}: {len(text)} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
