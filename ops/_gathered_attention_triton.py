# SPDX-License-Identifier: Apache-2.0
"""gathered_attention on CUDA GPUs through Triton: no kernel serves it."""

from ops import dispatch


def gathered_attention(*arguments, **settings):
    raise dispatch.Unsupported("triton: no triton kernel of gathered_attention")
