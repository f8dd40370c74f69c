# SPDX-License-Identifier: Apache-2.0
"""Proof on the user's own data: a layout against the N passes that it replaces.

The N-pass side is made here from the samples alone, one plain causal row each, and shares no code
with the layout: token i of sample k is predicted from row i - 1 of that sample, at position i - 1.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses, train
from lm.config import ModelConfig, require_choice
from lm.data import packing
from lm.data.conversations import Conversation
from lm.data.layout import Layout
from lm.errors import RunError
from lm.losses import Execution
from lm.setup import Setup
from lm.single_pass import layouts, pipeline
from lm.single_pass.samples import Sample
from lm.transformer import Params

CORRUPTIONS = ("mask", "position", "label")
_ROWS = 8  # N-pass rows that run together
_DENSE = 512  # up to this length the N-pass side runs the dense reference attention


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Limits: loss in nats (per token, relative to a loss above 1), gradients relative to the
    array's largest."""

    loss: float
    grad: float


TOLERANCES = {"float32": Tolerance(1e-5, 1e-4), "bfloat16": Tolerance(2e-2, 2e-2)}
TOLERANCES["float16"] = TOLERANCES["bfloat16"]


@dataclasses.dataclass
class Findings:
    """What `verify` saw; every count is over all conversations."""

    conversations: int = 0
    turns: int = 0
    edges: int = 0
    max_abs_loss: float = 0.0
    max_rel_loss: float = 0.0
    max_rel_grad: float = 0.0
    position_errors: int = 0
    visibility_errors: int = 0

    def problems(self, tolerance: Tolerance) -> list[str]:
        """What exceeds the tolerance, in words; empty when the claim holds."""
        found = []
        if not self.max_rel_loss <= tolerance.loss:
            found.append(f"per-token losses differ by {self.max_rel_loss:.3g} > {tolerance.loss:g}")
        if not self.max_rel_grad <= tolerance.grad:
            found.append(f"gradients differ by {self.max_rel_grad:.3g} > {tolerance.grad:g}")
        if self.position_errors:
            found.append(f"{self.position_errors} wrong positions")
        if self.visibility_errors:
            found.append(f"{self.visibility_errors} wrong visible pairs")
        return found


def verify(
    setup: Setup,
    params: Params,
    conversations: Iterable[Conversation],
    *,
    mode: str = "tree",
    implementation: str | None = None,
    corrupt: str | None = None,
) -> Findings:
    """Compares `mode` with the N-pass on whole conversations, under the setup's dtype.

    Losses are compared token by token. Gradients are those of the whole file's summed loss, and in
    float32 also of every conversation alone; in bfloat16 a single conversation's gradient carries
    2 to 3% of rounding noise of its own.

    implementation: of the layout's side; the N-pass side runs the reference wherever it fits.
    corrupt: plants one error in the first conversation, which must be found.
    """
    if corrupt is not None:
        require_choice("--corrupt", corrupt, CORRUPTIONS)
    findings = Findings()
    total = None  # (gradients, N-pass gradients) of the whole file
    for conversation in conversations:
        samples = pipeline.samples_of(setup, conversation)
        made, report = layouts.layouts_of(samples, mode)
        if corrupt is not None and not findings.conversations:
            made = [_corrupted(made[0], corrupt), *made[1:]]
        findings.conversations += 1
        findings.turns += len(samples)
        for layout, members in zip(made, report.members, strict=True):
            chosen = [samples[index] for index in members]
            _check_structure(layout, chosen, findings)
            grads = _check_numerics(setup, params, layout, chosen, implementation, findings)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            if setup.model.dtype == "float32":  # stricter: nothing averages out
                difference = relative_difference(*grads)
                findings.max_rel_grad = _worst(findings.max_rel_grad, difference)
    if total is not None:
        findings.max_rel_grad = _worst(findings.max_rel_grad, relative_difference(*total))
    return findings


def _check_structure(layout: Layout, samples: Sequence[Sample], findings: Findings) -> None:
    findings.edges += layout.num_edges
    for sample, path in zip(samples, layout.paths, strict=True):
        wrong = layout.positions[path] != np.arange(len(sample.tokens))
        findings.position_errors += int(np.sum(wrong | (layout.tokens[path] != sample.tokens)))
    findings.visibility_errors += count_visibility_errors(layout)


def count_visibility_errors(layout: Layout, chunk: int = 1024) -> int:
    """Pairs on which `until` and a brute-force ancestor check disagree, some rows at a time.

    Rows on no path belong to no sample (the published layout's last context copy): what they see
    trains nothing.
    """
    errors = 0
    used = np.zeros(layout.length, bool)
    for path in layout.paths:
        used[path] = True
    keys = np.arange(layout.length)
    for start in range(0, layout.length, chunk):
        rows = np.arange(start, min(start + chunk, layout.length))
        ancestors = np.zeros((len(rows), layout.length), bool)
        for path in layout.paths:
            inside = np.flatnonzero((path >= start) & (path < start + len(rows)))
            for depth in inside:
                ancestors[path[depth] - start, path[: depth + 1]] = True
        seen = (keys[None] <= rows[:, None]) & (rows[:, None] < layout.until[None])
        errors += int((seen != ancestors)[used[rows]].sum())
    return errors


def _check_numerics(setup, params, layout, samples, implementation, findings):
    model = setup.model
    fast = Execution(implementation=implementation, valid_vocab=setup.valid_vocab)
    (row,) = packing.pack([layout], _padded(max(layout.length, layout.num_edges)))
    log_probs, grads = _value_and_grad(model, fast, params, packing.stack([row]))
    # each trained token of each sample, by the row where the layout keeps it
    by_child = dict(zip(layout.edge_children.tolist(), np.asarray(log_probs)[0], strict=False))
    expected_grads = None
    for start in range(0, len(samples), _ROWS):
        group = samples[start : start + _ROWS]
        batch = chains(group)
        plain = dataclasses.replace(
            fast, implementation="reference" if batch["tokens"].shape[1] <= _DENSE else None
        )
        expected, part = _value_and_grad(model, plain, params, batch)
        expected_grads = (
            part if expected_grads is None else jax.tree.map(jnp.add, expected_grads, part)
        )
        for index, sample in enumerate(group):
            path = layout.paths[start + index][sample.prompt_length :]
            got = np.array([by_child.get(child, np.nan) for child in path.tolist()])
            _compare(got, np.asarray(expected)[index, : len(path)], findings)
    return grads, expected_grads


def _compare(got: np.ndarray, expected: np.ndarray, findings: Findings) -> None:
    difference = np.abs(got.astype(np.float64) - expected)
    findings.max_abs_loss = _worst(findings.max_abs_loss, float(difference.max()))
    relative = difference / np.maximum(1.0, np.abs(expected))
    findings.max_rel_loss = _worst(findings.max_rel_loss, float(relative.max()))


def _worst(a: float, b: float) -> float:
    """The larger one; a NaN is worse than anything."""
    return float("inf") if np.isnan(a) or np.isnan(b) else max(a, b)


def relative_difference(got: Params, expected: Params) -> float:
    """max over arrays of max |got - expected| / max |expected|."""

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale, difference = np.abs(b).max(), np.abs(a - b).max()
        return difference / scale if scale else (0.0 if not difference else float("inf"))

    return float(np.max(jax.tree.leaves(jax.tree.map(one, got, expected))))


def chains(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """The N-pass batch: a plain causal row per sample, made from its tokens alone.

    Edge e of a row is its e-th trained token. Rows beyond the samples are padding.
    """
    size = _padded(max(len(sample.tokens) for sample in samples))
    rows = []
    for sample in samples:
        row = packing.empty_row(size)
        n, start = len(sample.tokens), sample.prompt_length
        row["tokens"][:n], row["positions"][:n], row["until"][:n] = sample.tokens, np.arange(n), n
        row["edge_rows"][: n - start] = np.arange(start - 1, n - 1)
        row["edge_targets"][: n - start] = sample.tokens[start:]
        row["edge_weights"][: n - start] = 1
        row["edge_turn_weights"][: n - start] = 1 / (n - start)
        rows.append(row)
    return packing.stack([*rows, *[packing.empty_row(size)] * (_ROWS - len(rows))])


def _padded(length: int) -> int:
    """Few different lengths, so that few programs are compiled."""
    return max(128, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_and_grad(
    model: ModelConfig, execution: Execution, params: Params, batch: losses.Batch
) -> tuple[jax.Array, Params]:
    """Log-probability per edge, and the gradient of their weighted sum."""

    def total(params):
        compute = train.cast(params, model.dtype)
        return losses.weighted_log_prob(model, compute, batch, execution)

    grads, log_probs = jax.grad(total, has_aux=True)(params)
    return log_probs, grads


def _corrupted(layout: Layout, kind: str) -> Layout:
    """The layout with one planted error that has consequences."""
    edge = layout.num_edges // 2
    if kind == "label":
        targets = layout.edge_targets.copy()
        targets[edge] = targets[edge] + 1 if targets[edge] == 0 else targets[edge] - 1
        return dataclasses.replace(layout, edge_targets=targets)
    row = int(layout.edge_rows[edge])
    if kind == "position":
        positions = layout.positions.copy()
        positions[row] += 1
        return dataclasses.replace(layout, positions=positions)
    until = layout.until.copy()
    closed = np.flatnonzero(until < layout.length)
    if len(closed):
        until[closed[0]] = layout.length  # a thought that later turns should not see
    else:
        until[0] = 1  # a chain hides nothing: take its first token away instead
    return dataclasses.replace(layout, until=until)


def check_row(
    setup: Setup, params: Params, row: Mapping[str, np.ndarray], execution: Execution
) -> Findings:
    """One packed row of [S] arrays against plain causal passes over its own root-to-leaf paths.

    This is the check that runs during training: it sees the arrays that the step sees, and nothing
    else.
    """
    findings = Findings(conversations=1)
    batch = packing.stack([dict(row)])
    got = np.asarray(_log_probs(setup.model, execution, params, batch))[0]
    paths, edges = _paths(row)
    plain = dataclasses.replace(execution, implementation=None)
    for path, chosen in zip(paths, edges, strict=True):
        # a row that sees other rows than its ancestors has a path that skips or repeats a depth
        findings.position_errors += int((row["positions"][path] != np.arange(len(path))).sum())
        if not len(chosen):
            continue
        chain = packing.empty_row(_padded(len(path)))
        chain["tokens"][: len(path)] = row["tokens"][path]
        chain["positions"][: len(path)] = np.arange(len(path))
        chain["until"][: len(path)] = len(path)
        place = {int(r): index for index, r in enumerate(path)}
        chain["edge_rows"][: len(chosen)] = [place[int(row["edge_rows"][e])] for e in chosen]
        chain["edge_targets"][: len(chosen)] = row["edge_targets"][chosen]
        expected = _log_probs(setup.model, plain, params, packing.stack([chain]))
        _compare(got[chosen], np.asarray(expected)[0, : len(chosen)], findings)
        findings.edges += len(chosen)
    return findings


def _paths(row: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Root-to-leaf paths of a packed row, and the edges that each trains (every edge once)."""
    until, used = row["until"], np.flatnonzero(row["until"] > 0)
    leaves = used[until[used] == used + 1]
    left = np.flatnonzero(row["edge_targets"] >= 0)
    paths, edges = [], []
    for leaf in leaves:
        path = np.flatnonzero((np.arange(len(until)) <= leaf) & (until > leaf))
        following = dict(zip(path[:-1].tolist(), row["tokens"][path[1:]].tolist(), strict=True))
        mine = [
            e for e in left if following.get(int(row["edge_rows"][e])) == row["edge_targets"][e]
        ]
        left = np.setdiff1d(left, mine)
        paths.append(path)
        edges.append(np.array(mine, int))
    if len(left):
        raise RunError(f"{len(left)} edges of a row lead to no token of it")
    return paths, edges


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probs(
    model: ModelConfig, execution: Execution, params: Params, batch: losses.Batch
) -> jax.Array:
    return losses.edge_log_probs(model, train.cast(params, model.dtype), batch, execution)
