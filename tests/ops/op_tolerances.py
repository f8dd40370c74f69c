# SPDX-License-Identifier: Apache-2.0
"""How far an implementation may be from the reference, in one place.

Differences are measured against the largest entry of the expected array, which is how rounding in
sums of products behaves; an entry must also be infinite exactly where the reference is.
"""

import jax
import numpy as np

# By the type of the inputs. bfloat16 keeps 8 bits and float16 11; scores and sums are float32 in
# both.
RELATIVE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


def assert_close(actual, expected, dtype) -> None:
    """Compares pytrees of arrays computed from inputs of type `dtype`."""
    tolerance = RELATIVE[np.dtype(dtype).name]
    paths = jax.tree_util.tree_leaves_with_path(expected)
    leaves = jax.tree.leaves(actual)
    assert len(leaves) == len(paths)
    for got, (path, want) in zip(leaves, paths, strict=True):
        name = jax.tree_util.keystr(path)
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, name
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
        bound = tolerance * max(1e-3, np.abs(want[finite]).max(initial=0.0))
        np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=bound, err_msg=name)
