# SPDX-License-Identifier: Apache-2.0
"""token_importance on CUDA GPUs through Triton: no kernel serves it."""

from ops import dispatch


def token_importance(*arguments, **settings):
    raise dispatch.Unsupported("triton: no triton kernel of token_importance")
