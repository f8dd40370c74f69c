# SPDX-License-Identifier: Apache-2.0
"""The decoder as what training and evaluation draw answers with."""

from collections.abc import Callable

from lm.async_decoding import decode
from lm.async_decoding.answers import Answer
from lm.async_decoding.config import RunConfig
from lm.async_decoding.preference import MakeSampler, Sampler
from lm.async_decoding.runs import Run
from lm.transformer import Params


def decoder(
    config: RunConfig,
    threads: int,
    batch: int,
    pieces: Callable[[Run, Params], decode.Pieces] | None = None,
) -> MakeSampler:
    """Draws with the config's sampling, but at the temperature that is asked for.

    threads: blocks that are written at once. batch: requests that are decoded together. pieces: of
      a composition, for a model; None: the decoder by itself.
    """

    def make(run: Run, params: Params, temperature: float) -> Sampler:
        settings = decode.Settings(
            max_tokens=config.sampling.max_new_tokens,
            temperature=temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            threads=threads,
        )

        own = None if pieces is None else pieces(run, params)

        def draw(prompts, seed: int) -> list[Answer]:
            return decode.answers(run, params, settings, prompts, seed, batch=batch, pieces=own)

        return draw

    return make
