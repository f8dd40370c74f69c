# SPDX-License-Identifier: Apache-2.0
"""Skeleton-of-Thought and APAR: what is trained equals chains, what is decoded reads as the
answer."""

import collections
import dataclasses

import numpy as np
import pytest

from lm.async_decoding import baselines, critical_path, language, layout, requests, training
from lm.async_decoding.config import ThreadConfig
from lm.async_decoding.language import Program, Promise, Text
from lm.config import SamplingConfig
from lm.generate import Generation
from lm.text import chat
from tests.lm.async_decoding.scripted import END, TOKENIZER

IDS = language.tag_ids(TOKENIZER)
PROMPT = np.arange(4, dtype=np.int32)
FORK, CHILD, CLOSE = (IDS[tag] for tag in (baselines.FORK, baselines.CHILD, baselines.CLOSE))


def requests_of(kind, count=6):
    config = requests.RequestConfig(kinds=(kind,), min_parts=3, max_parts=5, max_steps=6)
    made = [requests.generate(1, index, config).messages for index in range(count)]
    return [(asked.content, language.parse(answer.content)) for asked, answer in made]


def chains_of_edges(made):
    """Of a layout: per edge the tokens that it sees in order of position, and the target."""
    rows = np.arange(made.length)
    found = collections.Counter()
    for at, target in zip(made.edge_rows, made.edge_targets, strict=True):
        seen = (rows <= at) & (at < made.until)
        seen &= ~((made.hidden_from <= at) & (at < made.hidden_until))
        order = np.argsort(made.positions[seen], kind="stable")
        assert (np.diff(made.positions[seen][order]) == 1).all()  # a chain has no gap, no overlap
        found[tuple(made.tokens[seen][order].tolist()), int(target)] += 1
    return found


def trained(chain, loss_from):
    """Edges of one plain causal sequence, trained from its token `loss_from` on."""
    return collections.Counter(
        (tuple(chain[:at]), chain[at]) for at in range(loss_from, len(chain))
    )


@pytest.mark.parametrize("kind", ["sums", "facts", "linked", "plan", "chain"])
def test_apar_trains_the_chains_of_its_paragraphs(kind):
    forks = 0
    for _, program in requests_of(kind):
        made = layout.layout_of(
            baselines.encode(program, PROMPT, TOKENIZER, END, "apar"), baselines.SCHEME
        )
        flat = baselines.inlined(program)
        blocks = iter(flat.threads)
        main, expected = PROMPT.tolist(), collections.Counter()
        for item in flat.items:
            if isinstance(item, language.Text):
                main += TOKENIZER.encode(item.text).tolist()
                continue
            lead, detail = baselines.split_lead(item.topic, next(blocks))
            main += [*TOKENIZER.encode(lead).tolist(), FORK]
            child = [*main, CHILD, *TOKENIZER.encode(detail).tolist(), CLOSE]
            expected += trained(child, len(main) + 1)  # the loss begins behind the child token
            forks += 1
        expected += trained([*main, END], len(PROMPT))
        assert chains_of_edges(made) == expected
        assert language.render(flat) == language.render(program)
    assert (forks > 0) == (kind in ("sums", "facts", "linked"))


@pytest.mark.parametrize("kind", ["sums", "facts", "linked", "plan", "chain"])
def test_skeletons_train_two_phases(kind):
    for _, program in requests_of(kind):
        made = layout.layout_of(
            baselines.encode(program, PROMPT, TOKENIZER, END, "sot"), baselines.SCHEME
        )
        points = baselines.skeleton(program)
        if points is None:  # something waits: no skeleton
            assert kind not in ("sums", "facts")
            answer = TOKENIZER.encode(language.render(program)).tolist()
            expected = trained([*PROMPT.tolist(), *answer, END], len(PROMPT))
            assert chains_of_edges(made) == expected
            continue
        assert "".join(text for _, text in points) == language.render(program)
        first = PROMPT.tolist()
        for topic, _ in points:
            first += [IDS[language.PROMISE], *TOKENIZER.encode(topic).tolist()]
        expected = trained([*first, END], len(PROMPT))
        for topic, text in points:
            opened = [*first, IDS[language.ASYNC], *TOKENIZER.encode(topic).tolist(), CHILD]
            expected += trained([*opened, *TOKENIZER.encode(text).tolist(), CLOSE], len(opened))
        assert chains_of_edges(made) == expected


@pytest.mark.parametrize("form", ["sot", "apar"])
def test_what_closes_a_tag_is_text_in_html(form):
    html = 'see <a href="x">that</a>.<br id="y"/>\n'
    program = Program((Promise("one", 10), Text(html)), ("one: " + html,))
    made = baselines.encode(program, PROMPT, TOKENIZER, END, form)
    blocks = zip(made.openings, made.blocks, strict=True)
    threads = [made.main, *(np.array([*opening, *block, CLOSE]) for opening, block in blocks)]
    found = baselines.assemble(threads, TOKENIZER, TOKENIZER.stop_ids, form)
    assert found.text == language.render(program)


def test_forms_have_their_own_positions():
    assert training.scheme_of(ThreadConfig(form="apar", positions="predicted")) == baselines.SCHEME
    assert training.scheme_of(ThreadConfig(positions="predicted")) == "predicted"
    assert training.scheme_of(ThreadConfig(form="plain", positions="oracle")) == "oracle"


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A speaker that knows every chain of some answers and goes on as they do."""

    chains: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...]
    tokenizer: object = TOKENIZER
    template: object = dataclasses.field(default_factory=lambda: chat.load_template(
        "chatml", TOKENIZER))  # fmt: skip

    def stream(self, prompts, sampling, key, chunk, ready=lambda: None):
        assert chunk == sampling.max_new_tokens
        ready()
        yield [self._continued(tuple(prompt.tolist()), chunk) for prompt in prompts]

    def _continued(self, prompt, most):
        (chain,) = {c for c in self.chains if c[: len(prompt)] == prompt and len(c) > len(prompt)
                    and not set(c[len(prompt):-1]) & {CLOSE, CHILD}}  # fmt: skip
        rest = list(chain[len(prompt) :])
        stop = next((i for i, t in enumerate(rest) if t in self.stop_ids), len(rest))
        found = np.array(rest[:stop][:most], np.int32)
        return Generation(found, np.zeros(len(found), np.float32), stop < min(len(rest), most))


def oracle_of(asked, form):
    """Chains of the trained edges: each longest context with its target is one."""
    chains = set()
    speaker = Oracle((), TOKENIZER.stop_ids)
    for prompt, program in asked:
        ids = baselines.quality.encode_prompt(prompt, speaker.template, TOKENIZER)
        encoded = baselines.encode(program, ids, TOKENIZER, END, form)
        made = layout.layout_of(encoded, baselines.SCHEME)
        edges = [(*context, target) for context, target in chains_of_edges(made)]
        chains |= {edge for edge in edges if edge[-1] in (END, CLOSE)}
    return dataclasses.replace(speaker, chains=tuple(chains))


@pytest.mark.parametrize("kind", ["sums", "linked", "chain"])
def test_decoded_skeletons_read_as_they_should(kind):
    asked = requests_of(kind, 3)
    sampling = SamplingConfig(max_new_tokens=600)
    prompts = [prompt for prompt, _ in asked]
    answers = baselines.sot_answers(oracle_of(asked, "sot"), prompts, sampling, 0)
    for (prompt, program), answer in zip(asked, answers, strict=True):
        assert answer.text == language.render(program)
        assert answer.finished
        encoded = baselines.encode(program, PROMPT, TOKENIZER, END, "sot")
        assert [t.ids[t.forced :].tolist() for t in answer.threads[1:]] == [
            [*block.tolist(), CLOSE] for block in encoded.blocks
        ]
        longest = max([len(block) + 1 for block in encoded.blocks], default=0)
        assert answer.steps == len(encoded.main) + longest
        assert answer.decoded == critical_path.timeline(encoded).decoded
        assert answer.prompt == prompt


def test_sequential_answers_are_timed_without_their_prompts():
    asked = requests_of("plan", 2)
    sampling = SamplingConfig(max_new_tokens=600)
    flat = [(prompt, language.plain(language.render(program))) for prompt, program in asked]
    speaker = oracle_of(flat, "apar")  # nothing to fork
    answers = baselines.plain_answers(speaker, [prompt for prompt, _ in flat], sampling, 0)
    for (_, program), answer in zip(flat, answers, strict=True):
        assert answer.text == language.render(program)
        assert answer.steps == answer.decoded == len(TOKENIZER.encode(answer.text)) + 1
        assert answer.finished
        assert 0 <= answer.seconds < 60


def test_what_runs_out_of_room_is_not_finished():
    asked = requests_of("sums", 1)
    sampling = SamplingConfig(max_new_tokens=25)
    (answer,) = baselines.sot_answers(oracle_of(asked, "sot"), [asked[0][0]], sampling, 0)
    assert not answer.finished
    assert len(answer.text) < len(language.render(asked[0][1]))


def test_leads():
    assert baselines.split_lead("A", "A: tea 3.") == ("A", ": tea 3.")
    assert baselines.split_lead("tea", "1. Tea is hot.") == ("1", ". Tea is hot.")
    assert baselines.split_lead("tea", "- Tea") == ("-", " Tea")
    assert baselines.split_lead("tea", "") == ("", "")
