# SPDX-License-Identifier: Apache-2.0
"""The page holds what the rows say, needs nothing else, and says what is missing."""

import dataclasses
import html.parser
import json
import math

import pytest

from lm import report, report_rows, tables
from lm.config import Config, DataConfig
from lm.errors import UserError
from lm.workdir import Workdir

PLAN = {
    "conversations": 10,
    "samples": 30,
    "seq_len": 256,
    "modes": {
        "tree": {"tokens": 1000, "pairs": 90_000, "flops": 2e9, "rows": 5, "fill": 0.8},
        "n_pass": {"tokens": 2500, "pairs": 160_000, "flops": 5e9, "rows": 10, "fill": 0.9},
        "paper": None,
    },
    "refused": {"paper": "FILE:3: a tool message"},
}


class Page(html.parser.HTMLParser):
    """Headings, text and every address that a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data.strip())

    @property
    def text(self):
        return " ".join(filter(None, self.words))


def make_run(path, mode="tree", shares=(0.9, 0.8)):
    config = Config(data=DataConfig(mode=mode))
    workdir = Workdir(path)
    workdir.create(config)
    workdir.record(config)
    for step in (1, 2, 4):
        row = {"step": step, "loss_per_token": 3.0 / step, "step_ms": 250.0, "tokens_per_s": 100.0}
        workdir.append("metrics.jsonl", row)
    for depth, share in enumerate(shares, 1):
        row = {"kind": "evaluate", "method": mode, "step": 4, "depth": depth, "n": 20}
        workdir.append("eval.jsonl", {**row, "exact_match": share, "loss": 0.1, "seed": 0})
    return workdir


@pytest.fixture
def compared(tmp_path):
    """A comparison of two modes, with a plan and a benchmark."""
    root = make_root(tmp_path / "ab")
    for mode, seconds, share in (("tree", 10.0, 0.85), ("n_pass", 25.0, 0.8)):
        make_run(root.path / mode, mode)
        row = {"kind": "compare", "method": mode, "seconds": seconds, "exact_match": share}
        root.append("compare.jsonl", {**row, "final_loss": 0.5, "n": 40, "steps": 4})
        row = {"kind": "benchmark", "method": mode, "step_ms": 7.5, "conversations_per_s": 3.25}
        root.append("benchmark.jsonl", row)
    return root


def make_root(path):
    root = Workdir(path)
    root.create(Config())
    root.record(Config())
    root.write("plan.json", json.dumps(PLAN))
    return root


def test_a_comparison_becomes_one_self_contained_page(compared):
    made = report.build([compared.path])
    page = Page(made.html)
    assert set(made.figures) == {"loss_by_step", "loss_by_time", "exact_match", "plan", "speed"}
    assert page.tags.count("img") == len(made.figures)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in made.html.replace("http-equiv", "")
    # 2 x (3 metrics + 2 evaluations), 2 comparisons, 2 benchmarks
    assert made.rows == 14
    for shown in ("2.50× less", "85.0 %", "+5.0 points", "3.25", "refuses this data: FILE:3"):
        assert shown in page.text, shown


def test_what_is_missing_is_named_with_its_command(tmp_path):
    workdir = make_run(tmp_path / "run")
    page = Page(report.build([workdir.path]).html)
    for verb in ("compare", "plan", "benchmark"):
        assert f"python -m experiments.single_pass.{verb} --workdir={workdir.path}" in page.text
    assert "experiments.single_pass.train" not in page.text
    assert "experiments.single_pass.evaluate" not in page.text


def test_a_plan_alone_is_a_page(tmp_path):
    folder = tmp_path / "planned"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    made = report.build([folder])
    assert set(made.figures) == {"plan"}
    assert "experiments.single_pass.train" in made.html


def test_several_workdirs_share_the_figures(tmp_path):
    paths = [make_run(tmp_path / name).path for name in ("first", "second")]
    made = report.build(paths)
    labels = [run.label for run in report_rows.gather(paths)]
    assert labels == ["tree (first)", "tree (second)"]
    assert made.rows == 10
    assert "tree (second)" in made.html
    # of two runs of one method, neither replaces the other
    rows = report_rows.rows_of(report_rows.gather(paths), lambda run: run.evaluations)
    assert len(rows) == 4
    assert {row["method"] for row in rows} == {"tree (first)", "tree (second)"}


def test_the_same_workdir_twice_counts_once(tmp_path):
    workdir = make_run(tmp_path / "run")
    assert report.build([workdir.path, workdir.path]).rows == 5


def test_text_from_files_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    workdir = make_run(tmp_path / "run")
    config = json.loads((workdir.path / "config.json").read_text())
    config["data"]["source"] = evil
    workdir.write("config.json", json.dumps(config))
    workdir.append("eval.jsonl", {"kind": evil, "method": evil, "depth": 1, "note": evil})
    made = report.build([workdir.path])
    assert "script" not in Page(made.html).tags
    assert evil in Page(made.html).text


def test_a_repeated_measurement_replaces_the_earlier_one(compared):
    row = {"kind": "compare", "method": "tree", "seconds": 12.5, "exact_match": 0.8, "n": 40}
    compared.append("compare.jsonl", row)
    measured = report.compared(report_rows.gather([compared.path])[0])
    assert list(measured) == ["tree", "n_pass"]
    assert measured["tree"]["seconds"] == 12.5
    assert measured["tree"]["tokens"] == 1000  # from the plan
    (line,) = report.verdict(measured)
    assert "no difference beyond chance" in line


def test_a_verdict_sees_a_real_difference():
    rows = {"tree": {"exact_match": 0.95, "n": 200}, "n_pass": {"exact_match": 0.6, "n": 200}}
    (line,) = report.verdict(rows)
    assert "a difference beyond chance" in line
    assert report.verdict({"tree": {"exact_match": 0.95}, "n_pass": {"exact_match": 0.6}}) == []
    nothing = {"exact_match": math.nan, "n": 0}
    assert report.verdict({"tree": nothing, "n_pass": nothing}) == []


def test_a_line_cut_short_is_left_out(tmp_path):
    workdir = make_run(tmp_path / "run")
    with (workdir.path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "loss')
    assert report.build([workdir.path]).rows == 5


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("missing", "is not a workdir"), ("config.json", "config.json"), ("plan.json", "plan.json")],
)
def test_bad_workdirs_are_one_clear_line(tmp_path, broken, reason):
    workdir = make_run(tmp_path / "run")
    path = tmp_path / "elsewhere" if broken == "missing" else workdir.path
    if broken != "missing":
        (workdir.path / broken).write_text("{not json")
    with pytest.raises(UserError, match=reason) as error:
        report.build([path])
    assert "\n" not in str(error.value)


def test_no_workdir_at_all():
    with pytest.raises(UserError, match="at least one"):
        report.build([])


def test_write_and_save_figures(tmp_path):
    workdir = make_run(tmp_path / "run")
    made = report.write([workdir.path], tmp_path)
    assert (tmp_path / "report.html").read_text() == made.html
    saved = report.save_figures(made, workdir.path)
    assert sorted(saved) == [
        str(workdir.path / "plots" / f"{name}.png") for name in sorted(made.figures)
    ]
    # a picture that another command left there comes onto the page, our own figures do not again
    (workdir.path / "plots" / "mask.png").write_bytes(made.figures["loss_by_step"])
    again = report.build([workdir.path])
    assert Page(again.html).tags.count("img") == len(made.figures) + 1


def test_comparison_says_what_was_saved_and_what_it_cost():
    table = tables.comparison(
        {
            "tree": {
                "tokens": 100,
                "seconds": 5.0,
                "exact_match": 0.9,
                "final_loss": 0.25,
                "cost": 0.0,
            },
            "n_pass": {"tokens": 250, "seconds": 4.0, "exact_match": 0.925, "final_loss": 0.25},
        }
    )
    lines = {row[0]: row[1:] for row in table.cells}
    assert lines["tokens through the model"] == ("100", "250", "2.50× less")
    assert lines["training time, s"] == ("5", "4", "1.25× more")
    assert lines["exact match"] == ("90.0 %", "92.5 %", "-2.5 points")
    assert lines["held-out loss, nats/token"] == ("0.2500", "0.2500", "+0.0000")
    assert "gradient noise" not in lines
    assert "cost" not in lines  # nothing is known of its price


def test_text_table_is_aligned():
    table = tables.table([{"method": "tree", "tokens": 5}, {"method": "n_pass", "tokens": 12345}])
    assert tables.text(table).splitlines() == [
        "mode    tokens",
        "--------------",
        "tree         5",
        "n_pass  12,345",
    ]


def test_table_leaves_out_what_cannot_be_shown():
    rows = [
        {"kind": "x", "method": "tree", "mode": "tree", "list": [1], "none": None, "flops": 1.5e9},
        {"kind": "x", "method": "paper", "mode": "paper", "list": [2], "none": None},
    ]
    table = tables.table(rows)
    assert table.columns == ("mode", "model FLOPs")
    assert table.cells == (("tree", "1.50 G"), ("paper", "–"))
    assert table.numeric == {1}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("exact_match", 0.875, "87.5 %"),
        ("predicted_speedup", 1.756, "1.76×"),
        ("peak_bytes", 300 * 2**20, "300 MiB"),
        ("peak_bytes", 3 * 2**30, "3.0 GiB"),
        ("tokens", 12345, "12,345"),
        ("tokens", 1234567, "1.23 M"),
        ("loss", float("nan"), "–"),
        ("loss", None, "–"),
        ("unknown_key", 3, "3"),
        ("unknown_key", 0.123456, "0.1235"),
        ("unknown_key", True, "True"),
        ("unknown_key", "text", "text"),
    ],
)
def test_cells(name, value, expected):
    assert tables.cell(name, value) == expected


def test_environment_of_equal_runs_is_one_column(compared):
    made = report.build([compared.path])
    table = report_rows.gather([compared.path])
    assert len(table) == 3
    assert dataclasses.is_dataclass(table[0])
    assert made.html.count("orbax-checkpoint") == 1


def test_a_run_of_heads_shows_its_rows_and_no_single_pass_hints(tmp_path):
    rows = {
        "eval.jsonl": {
            "kind": "acceptance",
            "method": "cp r4 n4 greedy",
            "rank": 4,
            "expected_tokens_per_call": 3.125,
            "acceptance": [0.9, 0.8, 0.7],
        },
        "benchmark.jsonl": {"kind": "decode", "method": "autoregressive", "tokens_per_s": 123.0},
    }
    (tmp_path / "config.json").write_text(json.dumps({"head": {"rank": 4}, "data": {"mode": "x"}}))
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    made = report.build([tmp_path])
    assert not made.figures
    for text in ("expected tokens per call", "3.125", "autoregressive", "123"):
        assert text in made.html
    assert "single_pass" not in made.html
