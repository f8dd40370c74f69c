# SPDX-License-Identifier: Apache-2.0
"""Python files as a corpus: what is found, what is left out, and that splits share no text."""

import pathlib
import pickle
import sysconfig

import pytest

from lm.data import builders, python_source, sources
from lm.data.python_source import Document
from lm.errors import UserError

LINES = "".join(f"value_{i} = compute_something({i})\n" for i in range(20))


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    files = {
        "a.py": LINES,
        "package/copy.py": LINES.replace("\n", "  \n") + "# a comment of its own, this one\n",
        "package/near.py": LINES.replace("(3)", "(333)"),
        "package/half.py": LINES[: len(LINES) // 2] + LINES.replace("compute", "return"),
        "package/empty.py": " \n",
        "package/short.py": "x = 1\n",
        "short2.py": "x = 1\n",
        "short3.py": "x = 2\n",
        "latin.py": "# -*- coding: latin-1 -*-\nname_of_it = 'é'\n",
        "broken.py": "# -*- coding: klingon -*-\n",
        "notes.txt": "no Python in here\n",
        "site-packages/other.py": "an_installed_package = True\n",
        "__pycache__/cached.py": "a_cached_file = True\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="latin-1")
    (root / "bytes.py").write_bytes(b"'\xff'\n")
    (root / "crlf.py").write_bytes(b"first_line = 1\r\nsecond_line = 2\r\n")
    return root


def opened(tree, tmp_path, **options):
    data = sources.PythonData(directories=(str(tree),), **options)
    return sources.open_source(data, tmp_path / "cache")


def test_what_is_read(tree, tmp_path):
    source = opened(tree, tmp_path)
    assert [document.file for document in source] == [
        "a.py",
        "crlf.py",
        "latin.py",
        "package/half.py",
        "package/short.py",
        "short3.py",
    ]
    texts = {document.file: document.text for document in source}
    assert texts["a.py"] == LINES
    assert texts["latin.py"].endswith("name_of_it = 'é'\n")
    assert texts["crlf.py"] == "first_line = 1\nsecond_line = 2\n"
    assert source.skipped == 2
    assert sorted(reason.split(":")[0] for _, reason in source.errors) == ["broken.py", "bytes.py"]
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_near_copies_follow_the_threshold(tree, tmp_path):
    names = [d.file for d in opened(tree, tmp_path, near=1.0)]
    assert "package/near.py" in names
    assert "package/copy.py" not in names
    assert "package/half.py" not in [d.file for d in opened(tree, tmp_path, near=0.3)]


def test_splits_are_by_file(tree, tmp_path):
    train = opened(tree, tmp_path, validation_fraction=0.5)
    held_out = opened(tree, tmp_path, validation_fraction=0.5, split="validation")
    assert len(train) == len(held_out) == 3
    assert not {d.text for d in train} & {d.text for d in held_out}


def test_prepared_once_for_the_same_content(tree, tmp_path, monkeypatch):
    before = list(opened(tree, tmp_path))

    def never(*_, **__):
        raise AssertionError("prepared again")

    monkeypatch.setattr(builders.RecordBuilder, "_download_and_prepare", never)
    assert list(opened(tree, tmp_path)) == before
    (tree / "a.py").write_text("another_text = 1\n")
    with pytest.raises(AssertionError, match="prepared again"):
        opened(tree, tmp_path)


def test_the_standard_library_and_packages():
    (root,) = python_source.roots()
    assert root == pathlib.Path(sysconfig.get_paths()["stdlib"]).resolve()
    assert len(python_source.roots(site_packages=True)) > 1
    names = dict(python_source.find([root / "json"]))
    assert {"__init__.py", "decoder.py"} <= names.keys()


def test_refusals(tree, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        opened(tmp_path / "nowhere", tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no Python files in"):
        opened(tmp_path / "bare", tmp_path)
    with pytest.raises(UserError, match="near must be"):
        opened(tree, tmp_path, near=0.0)


def test_documents_round_trip():
    document = Document("é\u2028\n", "a/b.py")
    assert Document.from_json(document.to_json()) == document
