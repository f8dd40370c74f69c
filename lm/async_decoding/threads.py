# SPDX-License-Identifier: Apache-2.0
"""The threads of a request as a state machine on the device, B requests at once.

A step feeds one token of every active thread (`feed`), takes the tokens that follow (the model's,
or anybody's), and settles what that means (`settle`): main's tags are read, promises fork blocks,
blocks run through their forced opening, their text and their end, main waits at a `<sync/>`, and
the request is done. Nothing here knows of a model.

- A row is a place for a thread: row 0 is main, the others are for blocks. A block holds its row
  until its end has been fed.
- Promises that find no free row wait, first come, first served, while main goes on; what they may
  see was fixed when they were made, so that their text does not depend on the number of rows.
- A `<sync/>` is fed in the first step in which all that was promised before it has come to its end:
  the same step feeds the last of those ends.
- A block ends with `</async>`, with an end of answer, or after `language.CAP` times its promise.
  Whatever ended it, `</async>` is fed.
- What is no complete promise (`assembly.complete_promise`) is text. A promise of an illegal number
  counts as `language.clamp` of it.

Under `Rules.form` "apar" (`baselines`) every end of a promise is a fork: its block opens with one
token and may take all that is left; nothing waits, and nobody reads a block.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lm.async_decoding import language, positions, tables
from lm.async_decoding.tables import Tables
from lm.config import require_choice
from lm.errors import UserError

TEXT, TOPIC, NUMBER = range(3)  # where main stands in a tag
IDLE = -1  # the thread of a row that has none
ASYNC, APAR = "async", "apar"  # forms
APAR_SCHEME = "fork_join_max"  # of positions: what follows a fork goes on beside its block


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is static."""

    rows: int  # main and as many blocks as may be written at a time
    max_tokens: int  # that come out, over all threads of a request
    scheme: str  # of positions
    form: str = ASYNC  # or `APAR`

    def __post_init__(self) -> None:
        check_scheme(self.scheme)
        require_choice("form", self.form, (ASYNC, APAR))
        if self.form == APAR and self.scheme != APAR_SCHEME:
            raise UserError(f"positions={self.scheme!r}: forks of APAR go on by {APAR_SCHEME!r}")

    @property
    def max_promises(self) -> int:
        """A complete promise takes four tokens or more, a fork of APAR is one."""
        return max(self.max_tokens // 4, 1) if self.form == ASYNC else self.max_tokens

    @property
    def room(self) -> int:
        """Entries that the answer may take: an opening with its end is shorter than its promise."""
        return 2 * self.max_tokens


def check_scheme(scheme: str) -> None:
    """Raises UserError for positions that cannot be decoded."""
    if scheme not in positions.DECODABLE:
        known = ", ".join(positions.DECODABLE)
        raise UserError(
            f"positions={scheme!r} cannot be decoded: lengths are not known in time; one of {known}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The threads that are being written, [B, M] each."""

    thread: jax.Array  # int32: 0 is main, k the block of the k-th promise, `IDLE` none
    active: jax.Array  # bool: the next step feeds it
    token: jax.Array  # int32, to be fed
    position: jax.Array  # int32, of that token
    fork: jax.Array  # int32: of earlier threads, slots before it are seen
    joined: jax.Array  # int32: the last thread that is seen
    fed: jax.Array  # int32: tokens fed so far (of a block)
    opening: jax.Array  # int32: tokens of the opening; 0 for main
    topic: jax.Array  # int32: where the topic begins among main's tokens
    left: jax.Array  # int32: tokens of text that may still come
    closing: jax.Array  # bool: `token` is the last
    count: jax.Array  # int32: tokens that came out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Main:
    """What main has written and where it stands, [B] each but for the tokens."""

    tokens: jax.Array  # [B, max_tokens] int32
    tag: jax.Array  # int32: TEXT, TOPIC or NUMBER
    topic: jax.Array  # int32: where the topic of the open promise begins
    topic_length: jax.Array  # int32
    number: jax.Array  # int32
    digits: jax.Array  # int32: of the number, or `tables.NO_NUMBER`
    number_tokens: jax.Array  # int32
    reserved: jax.Array  # int32: positions that the token to be fed leaves free after itself
    waiting: jax.Array  # bool: at a sync
    ended: jax.Array  # bool
    furthest: jax.Array  # int32: last position of this group's finished blocks; -1
    written: jax.Array  # int32: tokens of this group's finished blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Promises:
    """What each promise fixed for its block, [B, promises] int32."""

    fork: jax.Array
    joined: jax.Array
    position: jax.Array  # of the block's first token
    topic: jax.Array
    topic_length: jax.Array
    left: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Log:
    """What came out, in order: [B, max_tokens] int32."""

    tokens: jax.Array
    threads: jax.Array
    steps: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All threads of B requests; a pytree."""

    rows: Rows
    main: Main
    promises: Promises
    log: Log
    slots: jax.Array  # [B] int32, filled entries of the pool
    made: jax.Array  # [B] int32, promises
    started: jax.Array  # [B] int32, blocks
    closed: jax.Array  # [B] int32, blocks that came to their end
    decoded: jax.Array  # [B] int32, tokens that came out
    done: jax.Array  # [B] bool
    steps: jax.Array  # [B] int32, of a request that is done
    step: jax.Array  # [] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feed:
    """What a step feeds, [B, M] int32 each."""

    tokens: jax.Array
    positions: jax.Array
    threads: jax.Array  # `IDLE` for rows that are not fed
    joined: jax.Array
    forks: jax.Array
    slots: jax.Array  # in time, and in the order of the rows; beyond every pool where not fed

    @property
    def active(self) -> jax.Array:
        return self.threads != IDLE


NEVER = jnp.iinfo(jnp.int32).max // 2  # a slot beyond every pool


def start(rules: Rules, lengths: jax.Array, slots: jax.Array | None = None) -> State:
    """Before the first token: main stands on the last token of prompts of these lengths [B]; 0 is
    no request. The first `slots` [B] entries of the pool are theirs, by default one per token."""
    B, M = lengths.shape[0], rules.rows

    def full(shape, value=0):
        return jnp.full(shape, value, jnp.int32)

    main = jnp.broadcast_to(jnp.arange(M)[None] == 0, (B, M))
    nothing = {name: full((B, M)) for name in ("token", "fed", "opening", "topic", "count")}
    rows = Rows(
        thread=jnp.where(main, 0, full((B, M), IDLE)),
        active=main & (lengths[:, None] > 0),
        position=jnp.where(main, lengths[:, None] - 1, 0),
        fork=jnp.where(main, NEVER, full((B, M))),
        joined=jnp.where(main, 0, full((B, M), IDLE)),
        left=jnp.where(main, NEVER, full((B, M))),
        closing=jnp.zeros((B, M), bool),
        **nothing,
    )
    scalars = ("tag", "topic", "topic_length", "number", "digits", "number_tokens", "reserved")
    states = Main(
        tokens=full((B, rules.max_tokens)),
        waiting=jnp.zeros(B, bool),
        ended=jnp.zeros(B, bool),
        furthest=full(B, -1),
        written=full(B),
        **{name: full(B) for name in scalars},
    )
    fields = [field.name for field in dataclasses.fields(Promises)]
    promises = Promises(**{name: full((B, rules.max_promises)) for name in fields})
    log = Log(*(full((B, rules.max_tokens)) for _ in range(3)))
    counts = {name: full(B) for name in ("made", "started", "closed", "decoded", "steps")}
    return State(
        rows=rows,
        main=states,
        promises=promises,
        log=log,
        slots=(lengths if slots is None else slots).astype(jnp.int32),
        done=lengths == 0,
        step=full(()),
        **counts,
    )


def feed(state: State) -> tuple[Feed, State]:
    """What the next step feeds, and the state with room for it in the pool."""
    rows = state.rows
    active = rows.active & ~state.done[:, None]
    place = state.slots[:, None] + jnp.cumsum(active, axis=1, dtype=jnp.int32) - 1
    found = Feed(
        tokens=jnp.where(active, rows.token, 0),
        positions=jnp.where(active, rows.position, 0),
        threads=jnp.where(active, rows.thread, IDLE),
        joined=jnp.where(active, rows.joined, IDLE),
        forks=jnp.where(active, rows.fork, 0),
        slots=jnp.where(active, place, NEVER),
    )
    slots = state.slots + jnp.sum(active, axis=1, dtype=jnp.int32)
    return found, dataclasses.replace(state, slots=slots)


def settle(rules: Rules, known: Tables, state: State, drawn: jax.Array) -> State:
    """The state after tokens [B, M] int32 followed what was fed; those of rows that were not fed,
    or are still in their opening, mean nothing."""
    every = jnp.ones(drawn.shape, bool)
    return stepped(accept(rules, known, state, drawn, every))


def stepped(state: State) -> State:
    """A step further."""
    return dataclasses.replace(state, step=state.step + 1)


def lead(rules: Rules, known: Tables, state: State, drawn: jax.Array, count: jax.Array) -> State:
    """What `count` [B, M] calls of `accept` leave, in one: of the tokens [B, M, n] that follow what
    rows were fed the first ones, all of them text with more to come. Only lengths change, and what
    main is reading; within a step these come before the last tokens of all rows."""
    rows, main, (B, M, n) = state.rows, state.main, drawn.shape
    place = jnp.arange(n, dtype=jnp.int32)[None, :, None]
    comes = (place < count[:, None]).reshape(B, n * M)
    rank = jnp.cumsum(comes, axis=1, dtype=jnp.int32) - comes
    kept = comes & (state.decoded[:, None] + rank < rules.max_tokens)
    threads = jnp.broadcast_to(rows.thread[:, None], (B, n, M)).reshape(B, n * M)
    state = _logged(state, jnp.swapaxes(drawn, 1, 2).reshape(B, n * M), threads, kept, rank)
    kept = kept.reshape(B, n, M)
    state = _written(state, drawn[:, 0], kept[:, :, 0])
    for j in range(n):  # a promise's topic and number are text
        state, _ = _read_tags(rules, known, state, drawn[:, 0, j], kept[:, j, 0])
    block, came = rows.opening > 0, jnp.sum(kept, axis=1, dtype=jnp.int32)
    free = jnp.where(count[:, 0] > 0, main.reserved, 0)
    rows = dataclasses.replace(
        rows,
        position=(rows.position + count).at[:, 0].add(free),
        fed=rows.fed + jnp.where(block, count, 0),
        left=rows.left - jnp.where(block, came, 0),
        count=rows.count + came,
    )
    main = dataclasses.replace(state.main, reserved=main.reserved - free)
    return dataclasses.replace(state, rows=rows, main=main)


def accept(rules: Rules, known: Tables, state: State, drawn: jax.Array, takes: jax.Array) -> State:
    """`settle` within a step, of the rows [B, M] bool that take a token; where drafts were fed it
    is the last of what a row takes, after `lead`."""
    rows = state.rows
    block = rows.opening > 0
    fed = rows.active & takes & ~state.done[:, None]
    speaks = fed & ~rows.closing & (rows.fed + 1 >= rows.opening)
    kinds = known.kinds[drawn]
    cut = speaks & block & (rows.left == 0) & (kinds != tables.ASYNC_END)
    comes = speaks & ~cut
    rank = jnp.cumsum(comes, axis=1, dtype=jnp.int32) - comes
    kept = comes & (state.decoded[:, None] + rank < rules.max_tokens)
    ends = block & (cut | (kept & ((kinds == tables.ASYNC_END) | (kinds == tables.END))))

    state = _logged(state, drawn, rows.thread, kept, rank)
    state = _written(state, drawn[:, :1], kept[:, :1])
    state, complete = _read_tags(rules, known, state, drawn[:, 0], kept[:, 0])
    state = _promised(rules, state, complete, fed[:, 0])
    state = _moved(known, state, drawn, fed, kept, ends)
    state = _synced(rules, state)
    over = state.decoded >= rules.max_tokens
    done = state.done | over | (state.main.ended & (state.closed == state.made))
    steps = jnp.where(done & ~state.done, state.step + 1, state.steps)
    return _forked(rules, known, dataclasses.replace(state, done=done, steps=steps))


def _logged(
    state: State, drawn: jax.Array, threads: jax.Array, kept: jax.Array, rank: jax.Array
) -> State:
    """Files what came out: [B, K] each, in the order of its rank."""
    log, most = state.log, state.log.tokens.shape[1]
    request = jnp.arange(drawn.shape[0], dtype=jnp.int32)[:, None]
    column = jnp.where(kept, state.decoded[:, None] + rank, most)  # beyond the end: dropped
    step = jnp.broadcast_to(state.step + 1, drawn.shape)
    new = {"tokens": drawn, "threads": threads, "steps": step}
    log = Log(
        **{n: getattr(log, n).at[request, column].set(x, mode="drop") for n, x in new.items()}
    )
    decoded = state.decoded + jnp.sum(kept, axis=1, dtype=jnp.int32)
    return dataclasses.replace(state, log=log, decoded=decoded)


def _written(state: State, drawn: jax.Array, kept: jax.Array) -> State:
    """Main's next tokens [B, n], those that came out."""
    main, place = state.main, jnp.arange(drawn.shape[1], dtype=jnp.int32)[None]
    own = jnp.where(kept, state.rows.count[:, :1] + place, main.tokens.shape[1])
    request = jnp.arange(len(drawn), dtype=jnp.int32)[:, None]
    tokens = main.tokens.at[request, own].set(drawn, mode="drop")
    return dataclasses.replace(state, main=dataclasses.replace(main, tokens=tokens))


def _read_tags(
    rules: Rules, known: Tables, state: State, token: jax.Array, kept: jax.Array
) -> tuple[State, jax.Array]:
    """Main one token further, and where [B] that token completes a promise."""
    main, kind = state.main, known.kinds[token]
    number, digits = tables.number_so_far(
        known, token, main.number, main.digits, main.number_tokens
    )
    opens = kind == tables.PROMISE
    in_topic = (main.tag == TOPIC) & (kind == tables.TEXT)
    divides = (main.tag == TOPIC) & (kind == tables.TOKENS)
    in_number = (main.tag == NUMBER) & (kind == tables.TEXT) & (digits != tables.NO_NUMBER)
    complete = kept & (kind == tables.PROMISE_END)
    waits = kind == tables.SYNC
    if rules.form == ASYNC:
        complete = complete & (main.tag == NUMBER) & (main.digits > 0)
    else:
        waits = jnp.zeros_like(waits)
    tag = jnp.where(opens | in_topic, TOPIC, jnp.where(divides | in_number, NUMBER, TEXT))
    count = state.rows.count[:, 0]
    new = dataclasses.replace(
        main,
        tag=tag.astype(jnp.int32),
        topic=jnp.where(opens, count + 1, main.topic),
        topic_length=jnp.where(divides, count - main.topic, main.topic_length),
        number=jnp.where(divides, 0, jnp.where(in_number, number, main.number)),
        digits=jnp.where(divides, 0, jnp.where(in_number, digits, main.digits)),
        number_tokens=jnp.where(divides, 0, main.number_tokens + in_number),
        waiting=main.waiting | waits,
        ended=main.ended | (kind == tables.END),
    )
    new = jax.tree.map(
        lambda x, old: x if x.ndim > 1 else jnp.where(kept, x, old).astype(old.dtype), new, main
    )
    return dataclasses.replace(state, main=new), complete


def _promised(rules: Rules, state: State, complete: jax.Array, spoke: jax.Array) -> State:
    """Keeps what a complete promise fixes. Its last token goes into the next slot, since main is
    fed first, and stands right after what was fed now and what that left free."""
    main, rows = state.main, state.rows
    step = language.STEP
    tokens = jnp.clip(-(-main.number // step) * step, step, language.MAX_TOKENS)
    position = rows.position[:, 0] + 1 + main.reserved
    left = language.CAP * tokens
    fixed = Promises(
        fork=state.slots + 1,
        joined=rows.joined[:, 0],
        position=position + 1,
        topic=main.topic,
        topic_length=main.topic_length,
        left=left if rules.form == ASYNC else jnp.full_like(left, rules.max_tokens),
    )
    place = jnp.where(complete, state.made, rules.max_promises)
    request = jnp.arange(place.shape[0], dtype=jnp.int32)
    promises = jax.tree.map(
        lambda old, new: old.at[request, place].set(new, mode="drop"), state.promises, fixed
    )
    ahead = main.topic_length + 2 + tokens + 1 if rules.scheme == "predicted" else 0
    rows = dataclasses.replace(
        rows, position=rows.position.at[:, 0].set(jnp.where(spoke, position, rows.position[:, 0]))
    )
    reserved = jnp.where(complete, ahead, jnp.where(spoke, 0, main.reserved)).astype(jnp.int32)
    return dataclasses.replace(
        state,
        rows=rows,
        main=dataclasses.replace(main, reserved=reserved),
        promises=promises,
        made=state.made + complete,
    )


def _moved(
    known: Tables,
    state: State,
    drawn: jax.Array,
    fed: jax.Array,  # [B, M] bool, in this step
    kept: jax.Array,  # [B, M] bool: its token came out
    ends: jax.Array,  # [B, M] bool: of blocks
) -> State:
    """Every row on its next token."""
    rows, main = state.rows, state.main
    block = rows.opening > 0
    at = jnp.where(block & fed, rows.fed + 1, rows.fed)  # the token to be fed, in its block
    forced = block & (at < rows.opening)
    freed = fed & rows.closing
    token = jnp.where(forced, _opening_token(known, main.tokens, rows, at), drawn)
    token = jnp.where(ends, known.close, token)
    length = at + 1  # of a block that ends
    position = jnp.where(block & fed, rows.position + 1, rows.position)
    finished = jnp.where(ends, position, -1)
    active = (rows.active & ~freed).at[:, 0].set(~main.ended & (main.waiting | rows.active[:, 0]))
    new = dataclasses.replace(
        rows,
        thread=jnp.where(freed, IDLE, rows.thread),
        active=active,
        token=jnp.where(fed, token, rows.token),
        position=position,
        fed=at,
        opening=jnp.where(freed, 0, rows.opening),
        left=rows.left - (kept & block & ~ends),
        closing=(rows.closing & ~freed) | ends,
        count=rows.count + kept,
    )
    main = dataclasses.replace(
        main,
        furthest=jnp.maximum(main.furthest, jnp.max(finished, axis=1)),
        written=main.written + jnp.sum(jnp.where(ends, length, 0), axis=1, dtype=jnp.int32),
    )
    closed = state.closed + jnp.sum(ends, axis=1, dtype=jnp.int32)
    return dataclasses.replace(state, rows=new, main=main, closed=closed)


def _opening_token(known: Tables, written: jax.Array, rows: Rows, at: jax.Array) -> jax.Array:
    """Token `at` [B, M] of the openings of these rows: a topic is copied from main's promise."""
    place = jnp.clip(rows.topic + at - 1, 0, written.shape[1] - 1)
    token = jnp.take_along_axis(written, place, axis=1)
    token = jnp.where(at == 0, known.opening, token)
    return jnp.where(at == rows.opening - 1, known.body, token)


def _synced(rules: Rules, state: State) -> State:
    """Main goes on when all that it waits for has ended; it sees those blocks from now on."""
    rows, main = state.rows, state.main
    passes = main.waiting & (state.closed == state.made) & ~state.done
    position = rows.position[:, 0]
    joins = {
        "predicted": position,
        "fork_join_max": jnp.maximum(position, main.furthest + 1),
        "fork_join_sum": position + main.written,
    }
    active = rows.active[:, 0] & (~main.waiting | passes)
    new = dataclasses.replace(
        rows,
        active=rows.active.at[:, 0].set(active),
        position=rows.position.at[:, 0].set(jnp.where(passes, joins[rules.scheme], position)),
        joined=rows.joined.at[:, 0].set(jnp.where(passes, state.made, rows.joined[:, 0])),
    )
    main = dataclasses.replace(
        main,
        waiting=main.waiting & ~passes,
        furthest=jnp.where(passes, -1, main.furthest),
        written=jnp.where(passes, 0, main.written),
    )
    return dataclasses.replace(state, rows=new, main=main)


def _forked(rules: Rules, known: Tables, state: State) -> State:
    """Promises into free rows, in their order."""
    rows, promises = state.rows, state.promises
    free = (rows.thread == IDLE) & ~state.done[:, None]
    number = state.started[:, None] + jnp.cumsum(free, axis=1, dtype=jnp.int32) - free
    takes = free & (number < state.made[:, None])
    place = jnp.clip(number, 0, promises.fork.shape[1] - 1)
    fixed = jax.tree.map(lambda x: jnp.take_along_axis(x, place, axis=1), promises)
    opening = {"token": known.opening, "opening": fixed.topic_length + 2}
    if rules.form == APAR:
        opening = {"token": known.body, "opening": jnp.ones_like(fixed.topic_length)}
    given = opening | {
        "thread": number + 1,
        "active": True,
        "position": fixed.position,
        "fork": fixed.fork,
        "joined": fixed.joined,
        "fed": 0,
        "topic": fixed.topic,
        "left": fixed.left,
        "closing": False,
        "count": 0,
    }
    new = {name: jnp.where(takes, x, getattr(rows, name)) for name, x in given.items()}
    started = state.started + jnp.sum(takes, axis=1, dtype=jnp.int32)
    return dataclasses.replace(state, rows=Rows(**new), started=started)
