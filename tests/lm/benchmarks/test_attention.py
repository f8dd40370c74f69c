# SPDX-License-Identifier: Apache-2.0
"""What the attention benchmark counts, compares and says; PyTorch's part where it is installed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lm import plots
from lm.benchmarks import attention, masks, random_masks, timing
from lm.benchmarks import attention_alternatives as alternatives
from lm.benchmarks.attention_problem import Heads, Prepared, Problem, parse_heads, repeat_heads
from lm.errors import UserError
from ops.dispatch import Unsupported
from ops.masked_attention import masked_attention
from ops.visibility import Visibility

HEADS = Heads(4, 2, 8)


def problem(name="async", length=200):
    return Problem.make(masks.case(name, length, batch=2), HEADS, "float32")


def problem_of_head_dim_64():
    return Problem.make(masks.case("one_pass", 1100), Heads(4, 2, 64), "bfloat16")


@pytest.mark.parametrize("family", random_masks.FAMILIES)
def test_flex_attention_is_given_the_same_mask(family):
    for seed, num_rows in enumerate((60, 25)):
        mask = random_masks.random_visibility(seed, family, 3, num_rows, 60, runs=False)
        mask_mod = alternatives.flex_mask(mask, np.asarray)
        indices = np.ogrid[:3, :num_rows, :60]
        got = mask_mod(indices[0], 0, indices[1], indices[2])
        np.testing.assert_array_equal(got, mask.as_array(num_rows))


def test_flops_are_those_of_visible_pairs():
    mask = Visibility.documents([[3, 1]], 6)  # 6 + 1 pairs
    case = masks.Case("documents", mask, masks.visible_pairs(mask, 6))
    made = Problem.make(case, HEADS, "float32")
    assert made.flops(backward=False) == 2 * 2 * 4 * 8 * 7  # two products of 2 H each
    assert made.flops(backward=True) == 7 * 2 * 4 * 8 * 7  # seven products


@pytest.mark.parametrize("name", attention.BLOCK_LISTS)
def test_block_lists_are_timed(name):
    assert 0 < attention.block_list_seconds(name, problem_of_head_dim_64()) < 1


def test_ours_returns_outputs_and_gradients():
    made = problem()
    for name, count in (("forward", 1), ("forward_backward", 4)):
        prepared = attention._prepare("xla", made, name == "forward_backward")
        results = prepared.wait(prepared.run())
        assert len(results) == count
        expected = masked_attention(made.q, made.k, made.v, made.case.visibility)
        np.testing.assert_allclose(results[0], expected, atol=1e-5)
        assert prepared.temp_bytes > 0
        rows = np.array([3, 170])
        np.testing.assert_array_equal(prepared.to_numpy(results[0], rows), results[0][:, rows])


def test_a_wrong_contender_is_told_by_its_difference():
    made = problem(length=64)
    right = attention._prepare("reference", made, True)

    def wrong():
        out, *gradients = right.run()
        return out, gradients[0] * 1.5, *gradients[1:]

    entries = [
        attention._Entry("right", right),
        attention._Entry("wrong", dataclasses.replace(right, run=wrong)),
    ]
    attention._compare(entries, made)
    assert [entry.difference for entry in entries] == [0.0, pytest.approx(0.5)]


def test_samples_are_long_enough_and_counted_per_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += 0.003
        return ()

    entry = attention._Entry("a", Prepared(run, lambda result: result, 0, lambda *_: None))
    entry.watch.calibrate()
    assert entry.watch.calls == 7  # of 3 ms, at least 20 ms
    for _ in range(4):
        entry.watch.sample()
    row = attention._row(entry, flops=6e9)
    assert row["ms"] == pytest.approx(3.0)
    assert row["tflops"] == pytest.approx(2.0)
    assert row["samples"] == 4


def rows(**rates):
    about = {"length": 8, "heads": "4x2x8", "pass": "forward"}
    return [
        {"case": case, "implementation": name, "tflops": rate, **about}
        for case, found in rates.items()
        for name, rate in found.items()
    ]


def test_ratios_are_of_ours_over_theirs():
    measured = rows(
        one_pass={"triton": 300.0, "torch_flex": 200.0, "xla": 50.0},
        causal={"triton": 450.0, "jax_cudnn": 500.0, "torch_cudnn": 600.0},
    )
    refused = {**measured[0], "implementation": "mosaic_gpu", "refused": "no"}
    del refused["tflops"]
    found = attention.ratios([*measured, refused])
    assert found["one_pass 8 4x2x8 forward"] == {
        "triton/torch_flex": 1.5,
        "triton/cudnn_causal": 0.5,
        "xla/torch_flex": 0.25,
        "xla/cudnn_causal": 50 / 600,
    }
    assert found["causal 8 4x2x8 forward"]["triton/jax_cudnn"] == 0.9


def test_a_plot_has_a_bar_for_every_rate():
    measured = rows(one_pass={"triton": 3.0, "xla": 2.0}, causal={"triton": 4.0})
    longer = [{**row, "length": 16, "tflops": 2 * row["tflops"]} for row in measured]
    figure = plots.rates([*measured, *longer])
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[3.0, 4.0, 2.0], [6.0, 8.0, 4.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["triton", "xla"]


@pytest.mark.parametrize("name", ["torch_cudnn", "torch_flash", "jax_triton", "jax_mosaic"])
def test_dense_kernels_refuse_other_masks(name):
    with pytest.raises(Unsupported, match="plain causal attention only"):
        alternatives.ALTERNATIVES[name](problem(), False)


@pytest.mark.parametrize("name", ["jax_triton", "jax_mosaic"])
def test_gpu_kernels_say_that_there_is_no_gpu(name):
    with pytest.raises(Unsupported, match="no GPU"):
        alternatives.ALTERNATIVES[name](problem("causal"), False)


def test_heads_are_repeated_in_the_order_of_groups():
    made = problem("causal", 16)
    k, v = repeat_heads(made)
    mask = made.case.visibility
    expected = masked_attention(made.q, made.k, made.v, mask, implementation="reference")
    got = masked_attention(made.q, k, v, mask, implementation="reference")
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert k.dtype == jnp.float32


@pytest.mark.parametrize("text", ["8x2", "8x3x64", "axbxc", "0x1x8"])
def test_heads_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match=f"heads '{text}'"):
        parse_heads(text)


def test_flex_attention_computes_the_same():
    pytest.importorskip("torch")
    made = problem()
    prepared = alternatives.torch_flex(made, False)
    (out,) = prepared.run()
    every_row = np.arange(200)
    expected = masked_attention(made.q, made.k, made.v, made.case.visibility)
    np.testing.assert_allclose(prepared.to_numpy(out, every_row), expected, atol=1e-5)
