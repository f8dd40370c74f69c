# SPDX-License-Identifier: Apache-2.0
"""token_importance on TPU through Pallas: no kernel serves it."""

from ops import dispatch


def token_importance(*arguments, **settings):
    raise dispatch.Unsupported("pallas_tpu: no kernel of token_importance")
