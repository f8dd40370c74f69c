# SPDX-License-Identifier: Apache-2.0
"""top_tokens on CUDA GPUs through Triton: no kernel serves it."""

from ops import dispatch


def top_tokens(*arguments, **settings):
    raise dispatch.Unsupported("triton: no triton kernel of top_tokens")
