# SPDX-License-Identifier: Apache-2.0
"""What figures show is what the rows say."""

import io
import itertools
import math

import matplotlib.colors
import numpy as np
import pytest
from matplotlib import image

from lm import plots

METRICS = [
    {"step": 1, "loss_per_token": 4.0, "step_ms": 2000.0},
    {"step": 5, "loss_per_token": 2.0, "step_ms": 100.0},
    {"step": 10, "loss_per_token": 0.5, "step_ms": 200.0},
]
DEPTHS = [
    {"method": method, "depth": depth, "exact_match": share, "n": 40}
    for method, shares in {"tree": (1.0, 0.5), "n_pass": (0.9, 0.5)}.items()
    for depth, share in enumerate(shares)
]
MODES = {
    "tree": {"tokens": 1000, "pairs": 50_000, "flops": 2e9},
    "paper": None,
    "n_pass": {"tokens": 2000, "pairs": 80_000, "flops": 4e9},
}


def test_a_method_keeps_its_colour():
    assert plots.colour("tree") == plots.colour("tree (run_2)")
    assert plots.colour("k_pass:2") == plots.colour("k_pass:4")
    known = [
        plots.colour(name) for name in ("tree", "n_pass", "n_pass_merged", "paper", "k_pass:2")
    ]
    assert len(set(known)) == len(known)
    assert plots.colour("something else") not in known


def test_bars_of_many_methods_have_colours_of_their_own():
    names = ["speckv", "dense", "specpc", "streaming_llm", "speckv_pc", "snapkv", "spec_prefill"]
    names += ["laq", "pyramidkv", "adakv", "tova", "knorm", "keydiff", "h2o", "random"]
    rows = [
        {"implementation": name, "case": "niah_multikey_2", "length": 9, "tflops": 1.0}
        for name in names
    ]
    bars = plots.rates(rows).axes[0].containers
    colours = {bar.get_label(): bar.patches[0].get_facecolor() for bar in bars}
    assert list(colours) == names
    assert len(set(colours.values())) == len(names)
    assert matplotlib.colors.to_hex(colours["dense"]) == plots.colour("dense")


def test_elapsed_counts_every_step_once():
    # 1 step of 2 s, 4 of 0.1 s, 5 of 0.2 s
    assert plots.elapsed(METRICS) == pytest.approx([2.0, 2.4, 3.4])


@pytest.mark.parametrize(
    ("draw", "x"),
    [(plots.loss_by_step, [1, 5, 10]), (plots.loss_by_time, [2.0, 2.4, 3.4])],
)
def test_loss_curves_hold_the_rows(draw, x):
    figure = draw({"tree": METRICS, "n_pass": METRICS})
    (axes,) = figure.axes
    assert len(axes.lines) == 2
    for line in axes.lines:
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), [4.0, 2.0, 0.5])
    assert axes.lines[0].get_color() == plots.colour("tree")
    assert "nats" in axes.get_ylabel()


def test_names_of_lines_that_end_together_lie_apart():
    figure = plots.loss_by_step({"tree": METRICS, "n_pass": METRICS, "paper": METRICS})
    plots.png(figure)  # lays the figure out
    (axes,) = figure.axes
    boxes = sorted((t.get_window_extent() for t in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    for below, above in itertools.pairwise(boxes):
        assert above.y0 >= below.y1 - 1


def test_runs_of_one_method_differ_by_line_style():
    figure = plots.loss_by_step({"tree (a)": METRICS, "tree (b)": METRICS})
    first, second = figure.axes[0].lines
    assert first.get_color() == second.get_color()
    assert first.get_linestyle() != second.get_linestyle()


def test_exact_match_by_depth_shows_shares_and_intervals():
    figure = plots.exact_match_by_depth(DEPTHS)
    (axes,) = figure.axes
    tree, n_pass = axes.containers
    assert list(tree.lines[0].get_ydata()) == [1.0, 0.5]
    assert list(n_pass.lines[0].get_ydata()) == [0.9, 0.5]
    bars = n_pass.lines[2][0].get_segments()
    low, high = plots.interval(0.9, 40)
    np.testing.assert_allclose([float(end[1]) for end in bars[0]], [low, high])
    assert list(axes.get_xticks()) == [0, 1]


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        (0.8, 10, (0.4902, 0.9433)),  # worked by hand from Wilson's formula with z = 1.96
        (1.0, 20, (0.8389, 1.0)),
        (0.0, 20, (0.0, 0.1611)),
        (0.5, 0, (0.0, 1.0)),
    ],
)
def test_wilson_interval(share, count, expected):
    assert plots.interval(share, count) == pytest.approx(expected, abs=1e-4)


def test_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n, p, q = 60, 0.9, 0.8
    draws = rng.binomial(n, [p, q], (4000, 2)) / n
    inside = 0
    for a, b in draws:
        low, high = plots.difference(a, n, b, n)
        inside += low <= p - q <= high
    assert inside / len(draws) == pytest.approx(0.95, abs=0.012)


def test_cost_bars_leave_out_what_was_refused():
    figure = plots.costs(MODES)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "tokens",
        "attention pairs",
        "model FLOPs",
    ]
    for axes, key in zip(figure.axes, ("tokens", "pairs", "flops"), strict=True):
        assert [bar.get_width() for bar in axes.patches] == [
            MODES["tree"][key],
            MODES["n_pass"][key],
        ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["tree", "n_pass"]
    assert [text.get_text() for text in figure.axes[2].texts] == ["2.00 G", "4.00 G"]


def test_speed_bars():
    rows = [
        {"method": "tree", "step_ms": 10.0, "conversations_per_s": 30.0},
        {"method": "n_pass", "step_ms": 11.0, "conversations_per_s": 15.0},
    ]
    figure = plots.speed(rows)
    widths = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert widths == [[10.0, 11.0], [30.0, 15.0]]


def test_png_depends_on_the_rows_alone():
    first, second = (plots.png(plots.loss_by_step({"tree": METRICS})) for _ in range(2))
    assert first == second
    pixels = image.imread(io.BytesIO(first))
    assert pixels.shape[1] == int(6.4 * plots.DPI)
    assert plots.png(plots.loss_by_step({"n_pass": METRICS})) != first


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (12.3456, "12.3"),
        (999.4, "999"),
        (999.9, "1.00 k"),
        (1234567, "1.23 M"),
        (2.5e15, "2.50 P"),
        (math.inf, "n/a"),
        (-4000, "-4.00 k"),
    ],
)
def test_short(value, expected):
    assert plots.short(value) == expected


def test_by_rank_holds_the_rows_and_the_baselines():
    lines = {"cp n=4": [(4, 2.0, 0.1), (1, 1.5, math.nan)], "hmm n=4": [(2, 1.8, 0.1)]}
    (axes,) = plots.by_rank(lines, "tokens per call", {"autoregressive": 1.0}).axes
    first, last = (container.lines[0] for container in axes.containers)
    np.testing.assert_allclose(first.get_xdata().astype(float), [1, 4])
    np.testing.assert_allclose(first.get_ydata().astype(float), [1.5, 2.0])
    assert first.get_color() == plots.colour("cp") != last.get_color()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    texts = {text.get_text() for text in axes.texts}
    assert {"autoregressive", "cp n=4", "hmm n=4"} <= texts
    assert axes.get_ylim()[0] == 0


def test_heat_shows_the_largest_of_columns_that_share_a_place():
    values = np.zeros((2, 1000))
    values[1, 501] = 0.7
    figure = plots.heat(values, ["a", "b"], "token")
    (image,) = figure.axes[0].images
    shown = np.asarray(image.get_array())
    assert shown.shape[1] <= 480
    assert shown[0].max() == 0
    assert shown[1].max() == pytest.approx(0.7)
    assert (shown > 0).sum() == 1
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
