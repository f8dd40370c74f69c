# SPDX-License-Identifier: Apache-2.0
"""gathered_attention on TPU through Pallas: no kernel serves it."""

from ops import dispatch


def gathered_attention(*arguments, **settings):
    raise dispatch.Unsupported("pallas_tpu: no kernel of gathered_attention")
