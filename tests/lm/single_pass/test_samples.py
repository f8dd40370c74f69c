# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
from absl import logging

from lm.data.conversations import Conversation, Message
from lm.errors import DataError, UserError
from lm.single_pass import samples
from lm.single_pass.samples import samples_of
from lm.text import chat, tokenizers
from tests.lm.single_pass.adversarial import ALL, LOOP, PLAIN, said, talk, tool, turns, user

TOKENIZER = tokenizers.load_tokenizer("bytes")
CHATML = chat.load_template("chatml", TOKENIZER)


def texts(conversation, template=CHATML, **options):
    """(prompt, completion) of each sample as text."""
    return [
        (
            TOKENIZER.decode(s.tokens[: s.prompt_length]),
            TOKENIZER.decode(s.tokens[s.prompt_length :]),
        )
        for s in samples_of(conversation, template, TOKENIZER, **options)
    ]


def custom(source: str) -> chat.ChatTemplate:
    return dataclasses.replace(CHATML, name="custom", source=source)


def test_literal_texts_of_two_turns():
    found = texts(PLAIN["two_turns"])
    start = "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n"
    after = "reply 0<|im_end|>\n<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\n"
    assert found == [
        (start, "<think>\nwhy\n</think>\n\nreply 0<|im_end|>"),
        (start + after, "<think>\nbecause\n</think>\n\nreply 1<|im_end|>"),
    ]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("policy", samples.POLICIES)
def test_samples_are_what_inference_sees(name, policy):
    conversation = ALL[name]
    found = samples_of(conversation, CHATML, TOKENIZER, policy)
    assert len(found) == conversation.num_turns
    threads = conversation.threads()
    for sample in found:
        thread = threads[sample.thread]
        assert thread[sample.message].role == "assistant"
        kept = samples.keeps_thoughts(thread, sample.message, policy)
        shown = [m.to_dict(k) for m, k in zip(thread, kept, strict=False)]
        prompt = CHATML.render(shown[:-1], add_generation_prompt=True, tools=conversation.tools)
        whole = CHATML.render(shown, add_generation_prompt=False, tools=conversation.tools)
        assert TOKENIZER.decode(sample.tokens[: sample.prompt_length]) == prompt
        assert TOKENIZER.decode(sample.tokens) + "\n" == whole
        assert sample.tokens[-1] in TOKENIZER.stop_ids
        assert (sample.file, sample.line) == ("talk.jsonl", 7)


def test_policies_through_a_tool_loop():
    conversation = talk(*LOOP)
    kept = {
        policy: [
            ("product" in prompt, "the sum" in prompt, "done" in prompt)
            for prompt, _ in texts(conversation, policy=policy)
        ]
        for policy in samples.POLICIES
    }
    no, yes = False, True
    assert kept["interleaved"] == [(no, no, no), (yes, no, no), (yes, yes, no), (no, no, no)]
    assert kept["preserved"] == [(no, no, no), (yes, no, no), (yes, yes, no), (yes, yes, yes)]
    assert kept["per_message"] == [(no, no, no)] * 4


def test_tool_output_is_never_trained():
    completions = [completion for _, completion in texts(talk(*LOOP))]
    assert [c.count("<tool_call>") for c in completions] == [1, 1, 0, 0]
    assert not any("tool_response" in c for c in completions)


def test_empty_thought_is_not_no_thought():
    (_, empty), (_, none) = texts(talk(*turns(["", None])))
    assert empty == "<think>\n\n</think>\n\nreply 0<|im_end|>"
    assert none == "reply 1<|im_end|>"


def test_leading_greeting_is_context():
    found = samples_of(PLAIN["greeting"], CHATML, TOKENIZER)
    assert [s.turn for s in found] == [0, 1]
    assert "hello there" in texts(PLAIN["greeting"])[0][0]
    assert "greet\n" not in texts(PLAIN["greeting"])[0][0]  # dropped at the user's turn


def test_shared_messages_of_branches_are_trained_once():
    found = samples_of(ALL["regenerated"], CHATML, TOKENIZER)
    places = [(s.thread, s.message, s.turn) for s in found]
    assert places == [(0, 1, 0), (0, 3, 1), (0, 5, 2), (1, 3, 1), (2, 3, 1), (2, 5, 2), (3, 3, 1)]


@pytest.mark.parametrize("thought", ["because", "", "reply 0"])
def test_a_template_without_reasoning_gets_the_thought_in_the_content(thought):
    plain = chat.load_template("chatml_plain", TOKENIZER)
    assert texts(talk(*turns([thought])), plain) == texts(talk(*turns([thought])))


def test_inline_thoughts_stay_inline_in_the_tool_loop():
    plain = chat.load_template("chatml_plain", TOKENIZER)
    found = texts(talk(*LOOP), plain, delimiters=("<r>", "</r>"))
    assert [prompt.count("<r>") for prompt, _ in found] == [0, 1, 2, 0]
    assert [completion.count("<r>") for _, completion in found] == [1, 1, 1, 1]


def test_a_thought_that_a_tool_call_repeats_still_reaches_the_rendering():
    plain = chat.load_template("chatml_plain", TOKENIZER)
    ask = (user("?"), said("", "2*3", call="2*3"), tool("6"), said("6", "6"))
    for _, completion in texts(talk(*ask), plain):
        assert completion.startswith("<think>\n")


def test_a_template_that_drops_its_own_thought_is_refused():
    strip = custom(
        "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DataError, match=r"talk.jsonl:7: message 1 .*drops the thought"):
        samples_of(PLAIN["one_turn"], strip, TOKENIZER)


def test_a_prompt_that_is_no_prefix_is_refused_with_the_place():
    odd = custom(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    with pytest.raises(DataError, match=r"not a prefix .* character 28 .*'nswer]'.*'ssistant]"):
        samples_of(PLAIN["no_thought"], odd, TOKENIZER)


def test_a_generation_prompt_that_opens_the_thought():
    opened = custom(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    found = texts(PLAIN["two_turns"], opened)
    assert found[0] == ("[user]question 0<|im_end|>[assistant]<think>\n", found[0][1])
    assert found[0][1] == "why\n</think>\n\nreply 0<|im_end|>"
    empty = texts(PLAIN["empty_thought"], opened)
    assert empty[0][1] == "\n</think>\n\nreply 0<|im_end|>"
    with pytest.raises(DataError, match="not a prefix"):
        samples_of(PLAIN["no_thought"], opened, TOKENIZER)


def test_a_template_that_raises_is_a_data_error():
    refusing = custom("{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*no such role"):
        samples_of(PLAIN["one_turn"], refusing, TOKENIZER)


def test_an_override_of_the_policy_is_said_once(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(samples, "_said", set())
    qwen = chat.load_template("qwen3", TOKENIZER)
    for _ in range(2):
        found = texts(PLAIN["two_turns"], qwen, policy="preserved")
    assert "why" not in found[1][0]
    assert len(lines) == 1
    assert "'preserved' keeps; the template is followed" in lines[0]
    texts(PLAIN["two_turns"], qwen)
    assert len(lines) == 1


def test_without_an_end_of_turn_token_everything_is_trained_and_said(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    endless = custom(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert texts(PLAIN["no_thought"], endless)[0][1] == "reply 0\n"
    assert len(lines) == 1
    assert "will not stop" in lines[0]


def test_unknown_policy():
    with pytest.raises(UserError, match="policy='never'"):
        samples_of(PLAIN["one_turn"], CHATML, TOKENIZER, "never")


def test_one_tokenizer_call_per_conversation():
    calls = []

    class Counting:
        stop_ids, fingerprint, decode = TOKENIZER.stop_ids, "x", TOKENIZER.decode

        def encode_batch(self, batch):
            calls.append(len(batch))
            return TOKENIZER.encode_batch(batch)

    samples_of(PLAIN["forty_turns"], CHATML, Counting())
    assert calls == [80]


@pytest.mark.parametrize("template", ["chatml", "chatml_plain", "qwen3", "llama3", "gemma"])
def test_spans_hold_exactly_the_messages(template):
    chosen = chat.load_template(template, TOKENIZER)
    conversation = talk(
        Message("system", "user"),
        user(" assistant "),
        said("im_start", "user"),
        user("user"),
        said("a\nb", "system "),
    )
    sample = samples_of(conversation, chosen, TOKENIZER)[-1]
    text = sample.rendering.prompt + sample.rendering.completion
    found = [(s.role, s.turn, text[s.start : s.end]) for s in samples.spans(sample.rendering)]
    assert found == [
        ("system", 0, "user"),
        ("user", 0, "assistant"),
        ("response", 0, "im_start"),
        ("user", 1, "user"),
        ("thought", 1, "system"),
        ("response", 1, "a\nb"),
    ]


def test_spans_of_a_template_that_looks_at_contents():
    """Marks change such a rendering; the parts are searched for instead."""
    looking = custom(
        "{% for m in messages %}[{{ m.role }}]{% if m.content.startswith('q') %}!{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    sample = samples_of(PLAIN["two_turns"], looking, TOKENIZER)[-1]
    text = sample.rendering.prompt + sample.rendering.completion
    found = [text[s.start : s.end] for s in samples.spans(sample.rendering)]
    assert found == ["question 0", "reply 0", "question 1", "because", "reply 1"]


def test_response_start_follows_the_thought_and_its_space():
    conversation = talk(*turns(["why", "", None]), user("x"), said("", "only a thought"))
    for sample in samples_of(conversation, CHATML, TOKENIZER):
        rest = TOKENIZER.decode(sample.tokens[samples.response_start(sample) :])
        reply = conversation.messages[sample.message].content
        assert rest == reply + "<|im_end|>"


def test_subword_tokenizer_tokenises_prompt_and_completion_apart():
    bpe = tokenizers.train_bpe(["question reply because 0 1 2"] * 8, 300)
    template = chat.load_template("chatml", bpe)
    for sample in samples_of(PLAIN["some_thoughts"], template, bpe):
        prompt, completion = sample.rendering.prompt, sample.rendering.completion
        expected = np.concatenate([bpe.encode(prompt), bpe.encode(completion)])
        np.testing.assert_array_equal(sample.tokens, expected)
        assert sample.prompt_length == len(bpe.encode(prompt))
        assert sample.tokens.dtype == np.int32


def test_a_conversation_from_memory_has_a_place_too():
    sample = samples_of(Conversation(tuple(turns(["a"]))), CHATML, TOKENIZER)[0]
    assert (sample.file, sample.line) == ("samples", 0)
