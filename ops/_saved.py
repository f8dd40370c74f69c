# SPDX-License-Identifier: Apache-2.0
"""Names by which a rematerialisation policy finds what attention would be dear to compute again."""

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"


def attention(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both under the name `ATTENTION`: the backward kernels need them beside q, k and v."""
    return checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)
