# SPDX-License-Identifier: Apache-2.0
"""The rooms import one way, papers do not know each other, and every file states its licence."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ["experiments", "lm", "ops", "pallas_kernels"]  # each may import itself and those after it
PAPERS = {"single_pass", "cp_heads", "token_select", "draft_inference", "async_decoding"}
FILES = sorted(path for room in [*ROOMS, "configs"] for path in (ROOT / room).rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    """Full names of what a file imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        top = name.split(".")[0]
        if room == "configs":
            assert top in ("ml_collections", "configs"), name
        elif top in ROOMS:
            assert ROOMS.index(top) >= ROOMS.index(room), name
        else:
            assert top not in ("tests", "tools"), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_papers_do_not_import_papers(path):
    own = set(path.relative_to(ROOT).parts) & PAPERS
    for name in imported(path):
        others = set(name.split(".")) & (PAPERS - own)
        if path.relative_to(ROOT).parts[0] in ("experiments", "lm") and own:
            assert not others, name


def test_ops_and_kernels_know_no_model():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("ops", "pallas_kernels"):
            assert not {n for n in imported(path) if n.split(".")[0] in ("flax", "lm", "optax")}


def test_every_file_states_its_licence():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
