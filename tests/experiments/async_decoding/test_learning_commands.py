# SPDX-License-Identifier: Apache-2.0
"""The commands that learn, ask and compare keep their contracts."""

import json
import subprocess
import sys

import pytest

from lm.async_decoding import language
from tests import commands
from tests.lm.async_decoding.server import Server

SMOKE = "--config=configs/async_decoding.py:smoke"


def with_key(module, *flags):
    """A command in an environment of its own: (last line, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *flags],
        cwd=commands.ROOT,
        env=commands.environment() | {"SKIM_TEST_KEY": "sk-hidden"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_an_endpoint_annotates_within_its_budget(tmp_path):
    answer = "- Elms shade avenues.\n- Oaks feed jays.\n"
    marked = (
        '<promise topic="elms" tokens="10"/>- Oaks feed jays.\n'
        '<async topic="elms">- Elms shade avenues.\n</async>'
    )
    file, out = tmp_path / "plain.jsonl", tmp_path / "annotated.jsonl"
    file.write_text(json.dumps({"instruction": "Trees?", "output": answer}) + "\n")
    with Server(reply=lambda body: marked) as server:
        flags = (f"--data={file}", f"--out={out}", "--annotator=endpoint", f"--url={server.url}",
                 "--model=m", "--price_in=1e6")  # fmt: skip
        line = commands.refusal("async_decoding.annotate", *flags, "--max_cost=1")
        assert "above --max_cost=1" in line
        assert not server.bodies
        result, err = with_key("async_decoding.annotate", *flags, "--key_env=SKIM_TEST_KEY")
        assert server.headers[0]["Authorization"] == "Bearer sk-hidden"
    assert result["annotated"] == result["promises"] == 1
    assert "1 of 1 requests to m: about" in err
    content = json.loads(out.read_text())["messages"][1]["content"]
    assert language.render(language.parse(content)) == answer
    assert "sk-hidden" not in err + "".join(f.read_text() for f in tmp_path.iterdir())
    line = commands.refusal(
        "async_decoding.annotate", f"--data={file}", f"--out={out}", "--model=m"
    )
    assert "--model: only with --annotator=endpoint" in line


def test_judgements_and_figures_need_no_model(tmp_path):
    file = tmp_path / "annotations.json"
    records = [
        {"output_1": "x" * (10 + i % 3), "output_2": "y" * 11, "preference": 1 + (i % 4 > 0),
         "instruction": "a"}
        for i in range(40)
    ]  # fmt: skip
    file.write_text(json.dumps(records))
    known = tmp_path / "difficulties.json"
    known.write_text('{"a": 0.5}')
    flags = (f"--judgements={file}", "--require=quality>=0.5")
    line = commands.refusal("async_decoding.evaluate", *flags)
    assert "no result has a quality" in line
    result, _ = commands.run("async_decoding.evaluate", flags[0], f"--difficulty={known}")
    (row,) = result["rows"]
    assert row["plain"] == 75
    assert abs(row["length_controlled"] - 75) < 5
    rows = [
        {"kind": "async", "method": name, "lambda": None, "quality": 0.9, "batch": 1,
         "quality_ci95": [0.8, 1.0], "speedup_critical_path": speed,
         "speedup_critical_path_ci95": [speed, speed], "speedup_wall": None}
        for name, speed in (("sequential", 1.0), ("async predicted", 1.9))
    ]  # fmt: skip
    kept = tmp_path / "rows.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, _ = commands.run("async_decoding.plot", f"--rows={kept}", f"--out={tmp_path / 'p'}")
    assert result == {"plots": [str(tmp_path / "p" / "front_critical_path.png")]}


@pytest.mark.parametrize(
    ("verb", "flags", "reason"),
    [
        ("train", (SMOKE, "--config.stage=preference", "--workdir=unused"), "set init_from"),
        ("evaluate", (SMOKE,), "give --checkpoint or --judgements"),
        ("plot", (), "which rows?"),
    ],
)
def test_what_is_missing_is_said(verb, flags, reason):
    assert reason in commands.refusal(f"async_decoding.{verb}", *flags)
