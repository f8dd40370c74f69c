# SPDX-License-Identifier: Apache-2.0
"""SFT on annotated answers: from conversations to packed rows, and the job that trains on them.

Each assistant message of a conversation is an example: its prompt is the history as the template
shows it, earlier answers without tags; what is trained is its program, with threads.form=plain the
same answer without tags, or one of the other baselines. The tags of a prompt are text and steer
nothing.
"""

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import SupportsIndex

import grain
import jax
import numpy as np
from absl import logging

from lm import jobs, loop, setup, sharding, train, transformer
from lm.async_decoding import baselines, language, layout, programs, runs
from lm.async_decoding.config import RunConfig, ThreadConfig
from lm.async_decoding.language import LanguageError, Program
from lm.async_decoding.programs import EncodedProgram
from lm.async_decoding.runs import Run
from lm.config import ModelConfig
from lm.data import packing
from lm.data.conversations import Conversation
from lm.data.layout import Layout
from lm.errors import DataError, UserError
from lm.flops import training_flops
from lm.progress import say
from lm.text.chat import ChatTemplate
from lm.text.tokenizers import Tokenizer
from lm.workdir import Workdir

# Half of the time is the tokenizer library's, which runs beside Python.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=32)
_ROOM = 1 << 24  # tokens of layouts kept in memory, 50 bytes each
LOST = ("malformed", "overlong", "overrun")  # counts of what is not trained


def run(config: RunConfig, workdir: Workdir, profile: bool = False) -> loop.Result:
    """Trains, or goes on training, in `workdir`. Raises UserError and RunError."""
    _check_run(config, workdir)
    workdir.create(config)
    if config.train.verify_every:
        raise UserError(
            "train.verify_every is not for async decoding: `verify` checks layouts before training"
        )
    resolved = runs.resolve(config, workdir.path / "tokenizer")
    runs.save_tokenizer(resolved, workdir)
    model = resolved.setup.model
    millions = transformer.count_parameters(model) / 1e6
    say(f"{millions:.2f} M parameters, vocabulary {model.vocab_size}, {resolved.config.threads}")
    prepared = job(resolved, profile=str(workdir.path / "profile") if profile else "")
    result = loop.fit(prepared, workdir)
    say(what_was_read(packing.statistics(prepared.data)))
    return result


def _check_run(config: RunConfig, workdir: Workdir) -> None:
    """Raises UserError where another kind of run is here, or one that was trained on answers in
    another form: its name would go over to what it was not trained on."""
    if any(workdir.path.glob(f"{runs.ROUND}*")):
        raise UserError(f"{workdir.path} holds rounds of preference optimisation: use another")
    if not workdir.checkpoints.exists():
        return
    before = workdir.config(type(config)).threads
    changed = [
        f"threads.{name}"
        for name in ("form", "positions", "recount")
        if getattr(before, name) != getattr(config.threads, name)
    ]
    if changed:
        raise UserError(
            f"{workdir.path} was trained with another {', '.join(changed)}: use another workdir"
        )


def job(resolved: Run, profile: str = "") -> loop.Job:
    """The SFT job of a resolved config."""
    config, model = resolved.config, resolved.setup.model
    mesh = sharding.make(config.mesh, model)
    jobs.check_batch(config, mesh)
    if profile:
        jobs.check_profile(config)
    packed = rows(
        resolved,
        runs.conversations(config),
        epochs=None if config.train.steps else config.train.epochs,
        process=jobs.processes(config),
    )
    local = config.train.batch_size // jax.process_count()
    dataset = packing.batches(packed, local, config.data.seq_len)
    execution = jobs.execution_of(resolved.setup, mesh)
    return loop.Job(
        config=config,
        requested=resolved.setup.requested,
        objective=train.edge_objective(model, execution, config.train.weighting),
        initial=lambda: runs.trained_params(resolved, mesh),
        abstract=setup.abstract_trained(model),
        frozen=setup.frozen_params(resolved.setup, mesh),
        data=iter(dataset),
        total_steps=jobs.count_steps(config, dataset),
        sharding=mesh,
        flops=lambda host: batch_flops(model, host),
        profile=profile,
    )


def what_was_read(totals: Mapping[str, int | float]) -> str:
    """How full the rows were, and every count of what was left out."""
    lost = [f"{totals[name]:,.0f} {name}" for name in LOST if totals.get(name)]
    return f"rows {totals['fill']:.1%} full; " + (", ".join(lost) or "nothing dropped")


def batch_flops(model: ModelConfig, host: Mapping[str, np.ndarray]) -> float:
    """Model FLOPs of a step over these rows: `jobs.batch_flops` without the hidden pairs."""
    flops = jobs.batch_flops(model, host)
    if "hidden_from" not in host:
        return flops
    start = np.maximum(host["hidden_from"], np.arange(host["until"].shape[1])[None])
    hidden = (np.minimum(host["hidden_until"], host["until"]) - start).clip(0)
    return flops - training_flops(model, 0, 0, int(hidden.astype(np.int64).sum()))


# --- from conversations to rows


@dataclasses.dataclass(frozen=True)
class Example:
    """One answer with what came before it."""

    prompt: np.ndarray  # [P] int32
    program: Program


def end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int:
    """The token with which an answer ends under a template; UserError when there is none."""
    exchange = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    prompt = template.render(exchange[:1], add_generation_prompt=True)
    whole = template.render(exchange, add_generation_prompt=False)
    after = tokenizer.encode(whole.removeprefix(prompt)).tolist()
    found = [token for token in after if token in tokenizer.stop_ids] or tokenizer.stop_ids[:1]
    if not found:
        raise UserError(f"tokenizer {tokenizer.name} has no token that ends an answer")
    return found[0]


def examples_of(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[Example]:
    """The examples of a conversation, one per trained assistant message.

    Raises:
      DataError: an answer that is no valid program, or one with a thought or a tool call.
    """
    threads = conversation.threads()
    for thread, index in conversation.turns():
        message = threads[thread][index]
        where = (conversation.file, conversation.line)
        if message.thought is not None or message.tool_calls:
            raise DataError(*where, f"message {index}: a thought or a tool call has no threads")
        try:
            program = language.validate(language.parse(message.content))
        except LanguageError as error:
            raise DataError(*where, f"message {index}: {error}") from None
        history = [one.to_dict(with_thought=False) for one in threads[thread][:index]]
        for one in history:
            if one["role"] == "assistant":
                one["content"] = runs.without_tags(one["content"])
        text = template.render(history, add_generation_prompt=True, tools=conversation.tools)
        yield Example(language.encode_prompt(text, tokenizer), program)


def _readable(conversation: Conversation, resolved: setup.Setup) -> list[Example] | None:
    """The examples of a conversation; None, with a warning, where it has an answer that is no
    program and data.on_error says "skip". Raises DataError."""
    try:
        return list(examples_of(conversation, resolved.template, resolved.tokenizer))
    except DataError as error:
        if resolved.config.data.on_error == "stop":
            raise
        logging.warning("skipped %s", error)
        return None


def encoded(
    example: Example, tokenizer: Tokenizer, end: int, *, form: str = "async", recount: bool = True
) -> EncodedProgram:
    """An example as token ids in one of `config.FORMS`."""
    program = example.program
    if form in ("sot", "apar"):
        return baselines.encode(program, example.prompt, tokenizer, end, form)
    if form == "plain":
        program = language.plain(language.render(program))
    elif recount:
        program = language.recounted(program, tokenizer)
    return programs.encode(program, example.prompt, tokenizer, end)


def overruns(program: EncodedProgram) -> bool:
    """Whether a block is longer than decoding lets it become: it would be cut off."""
    cap = language.CAP * program.tokens
    return any(len(b) > most for b, most in zip(program.blocks, cap, strict=True))


def decodable(
    resolved: Run, source: Sequence[Conversation]
) -> Iterator[tuple[Example, EncodedProgram]]:
    """The examples of conversations with their programs, without those that are no programs, where
    data.on_error says so, and those that overrun; a line says how many.

    Raises DataError.
    """
    tokenizer, recount = resolved.setup.tokenizer, resolved.config.threads.recount
    end, left = end_of_turn(resolved.setup.template, tokenizer), 0
    for index in range(len(source)):
        for example in _readable(source[index], resolved.setup) or ():
            program = encoded(example, tokenizer, end, recount=recount)
            if overruns(program):
                left += 1
            else:
                yield example, program
    if left:
        say(f"{left} answers left out: a part takes more than twice its promise")


def scheme_of(threads: ThreadConfig) -> str:
    """The scheme of positions that a form is trained under; baselines have their own."""
    return baselines.SCHEME if threads.form in ("sot", "apar") else threads.positions


class Prepared(Sequence[packing.Group]):
    """The layouts of each conversation by index, kept once made, as far as there is room."""

    def __init__(self, resolved: Run, source: Sequence[Conversation], room: int = _ROOM):
        """room: how many tokens are kept."""
        self._setup, self._source = resolved.setup, source
        self._end = end_of_turn(self._setup.template, self._setup.tokenizer)
        self._room, self._kept = room, {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> packing.Group:
        number = operator.index(index)
        found = self._kept.get(number)
        if found is None:
            found = self._group(self._source[number])
            size = sum(layout.length for layout in found.layouts)
            if size <= self._room:
                self._room -= size
                self._kept[number] = found
        return found

    def _group(self, conversation: Conversation) -> packing.Group:
        examples = _readable(conversation, self._setup)
        if examples is None:
            return packing.Group((), {"malformed": 1})
        layouts: list[Layout] = []
        counts = {"examples": len(examples)}
        for example in examples:
            made = self._layout(example)
            if isinstance(made, str):
                counts[made] = counts.get(made, 0) + 1
            else:
                layouts.append(made)
        return packing.Group(layouts, counts)

    def _layout(self, example: Example) -> Layout | str:
        """The layout of an example, or the count that it goes to."""
        config: RunConfig = self._setup.config
        threads, data = config.threads, config.data
        program = encoded(
            example, self._setup.tokenizer, self._end, form=threads.form, recount=threads.recount
        )
        if overruns(program):
            return "overrun"
        excess = program.size - data.seq_len
        if excess > 0:
            if data.overlong == "drop" or excess >= len(program.prompt):
                return "overlong"
            program = dataclasses.replace(program, prompt=program.prompt[excess:])
        made = layout.layout_of(program, scheme_of(threads))
        if threads.form == "plain":  # nothing is hidden: attention need not look for it
            made = dataclasses.replace(made, hidden_from=None, hidden_until=None)
        return made

    def __repr__(self) -> str:
        # a data iterator's saved position names its source
        threads = self._setup.config.threads
        return f"Prepared({self._source!r}, {self._setup.tokenizer.fingerprint}, {threads})"


def rows(
    resolved: Run,
    source: Sequence[Conversation],
    *,
    epochs: int | None = 1,
    shuffle: bool = True,
    process: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Packed rows; `packing.batches` follows. `epochs=None` goes on forever, `process` is (index,
    count) of the host."""
    data = resolved.config.data
    dataset = grain.MapDataset.source(Prepared(resolved, source)).seed(data.seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(epochs)[process[0] :: process[1]]
    return packing.PackedRows(dataset.to_iter_dataset(_READ), data.seq_len, data.window)
