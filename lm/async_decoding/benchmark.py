# SPDX-License-Identifier: Apache-2.0
"""Programs written by the threaded decoder beside the same texts written token after token.

The work is given, so that speed does not depend on what a model would say: `decode.step`, which the
decoder runs, with draws that are made as ever and then replaced by the program's tokens. The
sequential text runs in the loop of `lm.generate`, as many steps as it has tokens. Runs of the
methods alternate and medians are compared; prefill, with the first token, is timed apart.

A batch is over when its last answer is: its steps are those of the longest, on either side.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import generate, hardware
from lm.async_decoding import composed, compositions, critical_path, verify_pool
from lm.async_decoding.composed import Composition
from lm.async_decoding.compositions import Makers
from lm.async_decoding.decode import Loop
from lm.async_decoding.programs import EncodedProgram
from lm.async_decoding.threads import Rules
from lm.config import SamplingConfig, require_positive
from lm.errors import UserError
from lm.progress import Progress, say
from lm.prompting import Speaker

KIND = "async_speed"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """An answer to be written: its program, and the tokens of its text with the end."""

    program: EncodedProgram
    tokens: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed.

    threads: blocks that are written at once, one method each. compose: texts of `compositions`, one
    method each for every number of threads.
    """

    batches: tuple[int, ...] = (1, 4)
    threads: tuple[int, ...] = (8,)
    compose: tuple[str, ...] = ("none",)
    repeats: int = 5
    scheme: str = "predicted"
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("batches", "threads"):
            if not getattr(self, name):
                raise UserError(f"--{name}: at least one is needed")
            for value in getattr(self, name):
                require_positive(f"--{name}", value)
        require_positive("--repeats", self.repeats)
        Rules(2, 1, self.scheme)  # refuses positions that cannot be decoded
        for text in self.compose or ("",):
            compositions.parse(text)


def lengthened(works: Sequence[Work], size: int, vocabulary: int, seed: int) -> list[Work]:
    """The same answers to prompts of `size` tokens or more: random ones come before."""
    rng = np.random.default_rng(seed)
    out = []
    for work in works:
        prompt = work.program.prompt
        more = rng.integers(0, vocabulary, max(size - len(prompt), 0)).astype(np.int32)
        program = dataclasses.replace(work.program, prompt=np.concatenate([more, prompt]))
        out.append(dataclasses.replace(work, program=program))
    return out


def benchmark(
    speaker: Speaker,
    works: Sequence[Work],
    options: Options,
    makers: Makers = compositions.NOTHING,
) -> Iterator[Row]:
    """Rows as they come: for every batch size the sequential one, then one per composition and
    number of threads. Answers beyond whole batches are left out.

    makers: what compositions need of other rooms.

    Raises:
      UserError: fewer answers than a batch takes, a composition that cannot be made, or a budget
        above a prompt.
    """
    if len(works) < max(options.batches):
        raise UserError(f"{len(works)} answers for a batch of {max(options.batches)}")
    shortest = min(len(work.program.prompt) for work in works)
    built = {text: compositions.build(text, makers) for text in options.compose}
    for text, (composition, _) in built.items():
        if composition.budget > shortest:
            raise UserError(f"--compose={text}: the shortest prompt has {shortest} tokens")
    with Progress("benchmark", len(options.batches)) as progress:
        for batch in options.batches:
            yield from _cell(speaker, works, batch, options, built)
            progress.advance()


def _cell(
    speaker: Speaker,
    works: Sequence[Work],
    batch: int,
    options: Options,
    built: Mapping[str, tuple[Composition, Any]],
) -> Iterator[Row]:
    whole = len(works) - len(works) % batch
    groups = [works[first : first + batch] for first in range(0, whole, batch)]
    runs: list[_Run] = [_Sequential(speaker, groups, options)]
    runs += [
        _Threaded(speaker, groups, options, count, text, *parts)
        for text, parts in built.items()
        for count in options.threads
    ]
    for run in runs:
        run.once()  # warms up
        run.forget()
    for _ in range(options.repeats):
        for run in runs:
            run.once()
    prompts = [len(work.program.prompt) for work in works[:whole]]
    about = {
        "batch": batch,
        "tokens": statistics.fmean(work.tokens for work in works[:whole]),
        "promises": statistics.fmean(work.program.num_blocks for work in works[:whole]),
        "prompt_tokens": statistics.fmean(prompts),
        "answers": whole,
        "repeats": options.repeats,
        "layers": speaker.model.num_layers,
        "positions": options.scheme,
    }
    for run in runs:
        row = run.row(runs[0]) | about
        say(
            f"{row['method']}, batch {batch}: {row['steps']:.4g} steps of "
            f"{row['step_ms_p50']:.3g} ms, {row['tokens_per_s']:.4g} tokens/s, "
            f"{row['wall_speedup']:.2f}x of {row['critical_path_speedup']:.2f}x"
        )
        yield row


class _Run:
    """A method at one batch size, compiled; subclasses say how it begins and goes on."""

    name: str
    threads: int | None = None
    compose = "none"
    memory: int

    def __init__(self, groups: Sequence[Sequence[Work]]):
        self.groups = groups
        self.counts = [0] * len(groups)  # steps of each group, the first token's included
        self.forget()

    def forget(self) -> None:
        self.first: list[float] = []
        self.single: list[float] = []
        self.seconds: list[list[float]] = [[] for _ in self.groups]

    def start(self, group: int) -> Any:
        raise NotImplementedError

    def advance(self, state: Any, group: int, limit: int) -> Any:
        """Up to `limit` steps from the first token on, or to the end."""
        raise NotImplementedError

    def steps(self, state: Any, group: int) -> int:
        raise NotImplementedError

    def once(self) -> None:
        """Every group to its end, then the first one again, step by step."""
        for group in range(len(self.groups)):
            began = time.perf_counter()
            state = jax.block_until_ready(self.start(group))
            self.first.append(time.perf_counter() - began)
            began = time.perf_counter()
            state = jax.block_until_ready(self.advance(state, group, _ENDLESS))
            self.seconds[group].append(time.perf_counter() - began)
            self.counts[group] = self.steps(state, group)
        state = jax.block_until_ready(self.start(0))
        for limit in range(2, self.counts[0] + 1):
            began = time.perf_counter()
            state = jax.block_until_ready(self.advance(state, 0, limit))
            self.single.append(time.perf_counter() - began)

    def row(self, sequential: "_Run") -> Row:
        medians, others = (
            [statistics.median(times) for times in run.seconds] for run in (self, sequential)
        )
        wall, path = (
            critical_path.geometric_mean(other / own for own, other in zip(*pair, strict=True))
            for pair in ((medians, others), (self.counts, sequential.counts))
        )
        p50, p95 = (1e3 * float(x) for x in np.percentile(self.single, [50, 95]))
        written = sum(work.tokens for group in self.groups for work in group)
        return {
            "kind": KIND,
            "method": self.name,
            "compose": self.compose,
            "threads": self.threads,
            "steps": statistics.fmean(self.counts),
            "critical_path_speedup": path,
            "wall_speedup": wall,
            "realised": wall / path,
            "step_ms_p50": p50,
            "step_ms_p95": p95,
            "tokens_per_s": written / sum(medians),
            "prefill_ms": 1e3 * statistics.median(self.first),
            "peak_bytes": self.memory,
        }


_ENDLESS = np.iinfo(np.int32).max


class _Sequential(_Run):
    """The texts, token after token; which tokens come does not change the time."""

    name = "sequential"

    def __init__(self, speaker: Speaker, groups: Sequence[Sequence[Work]], options: Options):
        super().__init__(groups)
        self.lengths = [max(work.tokens for work in group) for group in groups]
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=max(self.lengths))
        static = generate.Program(
            speaker.model, sampling, 0, None, options.implementation, speaker.valid_vocab
        )
        prompts = [work.program.prompt for group in groups for work in group]
        key = jax.random.key(0)
        static, (tokens, lengths, indices, self.stops, _) = generate.request(
            static, prompts, (), key, None, None
        )
        size = len(groups[0])
        self.params = speaker.params
        self.arguments = [
            (*(x[first : first + size] for x in (tokens, lengths, indices)), self.stops, key)
            for first in range(0, len(prompts), size)
        ]
        lowered = generate.begin.lower(static, self.params, *self.arguments[0])
        limit = jax.ShapeDtypeStruct((), np.int32)
        more = generate.advance.lower(static, self.params, lowered.out_info, self.stops, limit)
        self.compiled = lowered.compile(), more.compile()
        self.memory = max(map(hardware.compiled_bytes, self.compiled))

    def start(self, group: int) -> Any:
        return self.compiled[0](self.params, *self.arguments[group])

    def advance(self, state: Any, group: int, limit: int) -> Any:
        most = np.int32(min(limit, self.lengths[group]))
        return self.compiled[1](self.params, state, self.stops, most)

    def steps(self, state: Any, group: int) -> int:
        return self.lengths[group]


class _Threaded(_Run):
    """The programs, by the threaded decoder."""

    def __init__(
        self,
        speaker: Speaker,
        groups: Sequence[Sequence[Work]],
        options: Options,
        threads: int,
        compose: str,
        composition: Composition,
        weights: Any,
    ):
        super().__init__(groups)
        self.threads = threads
        self.compose, self.composition, self.weights = compose, composition, weights
        self.name = "async" if compose == compositions.NONE else f"async {compose}"
        programs = [work.program for group in groups for work in group]
        longest = max(critical_path.timeline(program).decoded for program in programs)
        rules = Rules(1 + threads, -(-(longest + 1) // 64) * 64, options.scheme)
        self.static, self.known, tokens, lengths = verify_pool.arguments(
            speaker, programs, rules, options.implementation
        )
        size = len(groups[0])
        self.params = speaker.params
        firsts = range(0, len(programs), size)
        self.prompts = [(tokens[i : i + size], lengths[i : i + size]) for i in firsts]
        script = verify_pool.script_of(programs)
        self.scripts = [jnp.asarray(script[i : i + size]) for i in firsts]
        fixed = self.static, composition, verify_pool.forcing
        arguments = self.ahead(0)
        lowered = composed.begin.lower(*fixed, *self.given(0), *arguments)
        limit = jax.ShapeDtypeStruct((), np.int32)
        state = lowered.out_info
        more = composed.advance.lower(*fixed, self.params, weights, self.known, state, limit)
        self.compiled = lowered.compile(), more.compile()
        self.memory = max(map(hardware.compiled_bytes, self.compiled))

    def ahead(self, group: int) -> tuple[Any, ...]:
        return self.composition.ahead(self.static, self.params, *self.prompts[group])

    def given(self, group: int) -> tuple[Any, ...]:
        return self.params, self.known, self.scripts[group]

    def start(self, group: int) -> Loop:
        return self.compiled[0](*self.given(group), *self.ahead(group))

    def advance(self, state: Loop, group: int, limit: int) -> Loop:
        del group  # its script is in the state
        return self.compiled[1](self.params, self.weights, self.known, state, np.int32(limit))

    def steps(self, state: Loop, group: int) -> int:
        found = jax.device_get(state.threads)
        written = [work.program for work in self.groups[group]]
        wanted = [critical_path.timeline(program).decoded for program in written]
        if found.decoded.tolist() != wanted:
            raise AssertionError(f"{found.decoded.tolist()} tokens came out, not {wanted}")
        return int(found.steps.max())
