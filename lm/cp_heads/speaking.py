# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with a CP head that can be talked to, drafting with its head."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lm import prompting, setup, tuned
from lm.config import SamplingConfig
from lm.cp_heads import attach, checkpoints, decode, tune
from lm.cp_heads.decode import Statistics
from lm.cp_heads.drafters import Heads, Target
from lm.cp_heads.head import HeadConfig, HeadParams
from lm.cp_heads.tune import Tuned
from lm.errors import UserError
from lm.generate import Generation


@dataclasses.dataclass(frozen=True, eq=False)
class Drafting:
    """A model and its head."""

    speaker: prompting.Speaker
    config: HeadConfig
    head: HeadParams

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        key: jax.Array,
        *,
        chains: int = 1,
        implementation: str | None = None,
        chunk: int = 16,
    ) -> Iterator[tuple[list[Generation], Statistics]]:
        """What `decode.stream` gives. Raises UserError as it does."""
        speaker = self.speaker
        target = Target(
            speaker.model,
            sampling,
            implementation=implementation,
            valid_vocab=speaker.valid_vocab,
        )
        return decode.stream(
            target,
            speaker.params,
            Heads(self.config, chains),
            self.head,
            prompts,
            speaker.stop_ids,
            key,
            chunk=chunk,
        )


def as_chosen(drafting: Drafting, choice: Tuned) -> Drafting:
    """Drafts as `tune` chose; says so where that was for another model, tokenizer or template.

    Raises UserError for a head that the choice is not about.
    """
    speaker = drafting.speaker
    now = tuned.hashes(speaker.params, speaker.tokenizer, speaker.template)
    config, head = tune.fitted(choice, drafting.config, drafting.head, now)
    return dataclasses.replace(drafting, config=config, head=head)


def load(path: pathlib.Path, *, template: str | None = None, dtype: str | None = None) -> Drafting:
    """The newest checkpoint of a run, or a Hugging Face directory with a head.

    Raises UserError: no head, or it is of another model.
    """
    if attach.is_attached(path) or setup.is_hf(path):
        attached = attach.load(path)
        speaker = prompting.load_hf(attached.base, template=template, dtype=dtype)
        attach.check(attached, speaker.model, speaker.params)
        return Drafting(speaker, attached.config, attached.head)
    resolved, params, made = checkpoints.load_run(path)
    if made is None:
        raise UserError(f"{path} has no CP head: train one on it (loss.mode=heads, init_from)")
    speaker = prompting.of_run(resolved, params, template=template, dtype=dtype)
    # documents, which the head was trained on, open with it
    speaker = dataclasses.replace(speaker, bos=resolved.tokenizer.bos or "")
    return Drafting(speaker, resolved.config.head, made)
