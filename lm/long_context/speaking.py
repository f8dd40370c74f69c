# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint that can be talked to, under a policy."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm import prompting
from lm.config import SamplingConfig
from lm.generate import Generation
from lm.long_context import decode
from lm.long_context.decode import Statistics
from lm.long_context.policy import Method


@dataclasses.dataclass(frozen=True, eq=False)
class Selective:
    """A model, and what it reads."""

    speaker: prompting.Speaker
    policy: Method

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        key: jax.Array,
        **options: Any,
    ) -> Iterator[tuple[list[Generation], Statistics]]:
        """`decode.stream` of this model, with its options. Raises as it does."""
        speaker = self.speaker
        return decode.stream(
            speaker.model,
            speaker.params,
            prompts,
            sampling,
            self.policy,
            speaker.stop_ids,
            key,
            valid_vocab=speaker.valid_vocab,
            **options,
        )
