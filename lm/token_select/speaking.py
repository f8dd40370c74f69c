# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint that can be talked to, reading selected tokens only."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm import prompting, setup
from lm.config import SamplingConfig
from lm.generate import Generation
from lm.token_select import decode
from lm.token_select.config import SelectConfig, TokenSelectConfig
from lm.token_select.decode import Statistics
from lm.token_select.method import TokenSelect
from lm.token_select.policy import Policy
from lm.workdir import Workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Selective:
    """A model, and what it reads."""

    speaker: prompting.Speaker
    policy: Policy

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


def load(
    path: pathlib.Path,
    select: SelectConfig | None = None,
    *,
    template: str | None = None,
    dtype: str | None = None,
) -> Selective:
    """The newest checkpoint of a run, or a Hugging Face directory; nothing is trained for it.

    select: None takes what the run was configured with, the paper's setting where there is none.

    Raises UserError.
    """
    hf = setup.is_hf(path)
    if select is None:
        select = SelectConfig() if hf else Workdir(path).config(TokenSelectConfig).select
    read = prompting.load_hf if hf else prompting.load_workdir
    return Selective(read(path, template=template, dtype=dtype), TokenSelect(select))
