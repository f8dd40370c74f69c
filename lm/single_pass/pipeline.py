# SPDX-License-Identifier: Apache-2.0
"""From conversations to batches of rows: a grain pipeline that is shuffled, sharded, packed and
resumable."""

import dataclasses
from collections.abc import Sequence

import grain

from lm.data import packing
from lm.data.conversations import Conversation
from lm.setup import Setup
from lm.single_pass import layouts, samples

# One thread reads: rendering and tokenising are Python, and more threads only wait for each other.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)


def samples_of(setup: Setup, conversation: Conversation) -> list[samples.Sample]:
    """The N-pass samples of one conversation under the config's template, tokenizer and policy."""
    return samples.samples_of(
        conversation,
        setup.template,
        setup.tokenizer,
        policy=setup.config.data.policy,
        delimiters=setup.delimiters,
    )


@dataclasses.dataclass(frozen=True)
class ToGroup(grain.transforms.Map):
    """Conversation -> its layouts under one mode, with counts of what did not fit."""

    setup: Setup
    mode: str

    def map(self, conversation: Conversation) -> packing.Group:
        data = self.setup.config.data
        made, report = layouts.layouts_of(
            samples_of(self.setup, conversation), self.mode, data.seq_len, data.overlong
        )
        return packing.Group(made, report.counts())


def rows(
    setup: Setup,
    source: Sequence[Conversation],
    *,
    mode: str | None = None,
    epochs: int | None = 1,
    shuffle: bool = True,
    process: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Packed rows; `epochs=None` goes on forever. `process` is (index, count)."""
    data = setup.config.data
    dataset = grain.MapDataset.source(source).seed(data.seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(epochs)[process[0] :: process[1]]
    dataset = dataset.map(ToGroup(setup, mode or data.mode))
    return packing.PackedRows(dataset.to_iter_dataset(_READ), data.seq_len, data.window)
