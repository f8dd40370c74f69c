# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.async_decoding import assembly, language, programs
from lm.async_decoding.language import TAGS, LanguageError, Program, Promise, Sync, Text
from lm.text import tokenizers, vocabulary

TOKENIZER = tokenizers.load_tokenizer("bytes").add_tokens(TAGS)
END = TOKENIZER.token_id("<|im_end|>")
A, B = Promise("a", 10), Promise("b c", 20)
CHARACTERS = 'xyé "/>=<\n'

texts = st.text(CHARACTERS, min_size=1, max_size=8).filter(
    lambda text: not any(tag in text for tag in language.RESERVED)
)
topics = st.text("ab /=<>é", min_size=1, max_size=4).filter(
    lambda text: not language.topic_problem(text)
)
promises = st.builds(Promise, topics, st.integers(1, 100).map(lambda n: 10 * n))


@st.composite
def legal(draw):
    """Programs that `validate` accepts."""
    items, threads, waiting = [], [], False
    for kind in draw(st.lists(st.sampled_from("tppps"), max_size=9)):
        if kind == "t" and not (items and isinstance(items[-1], Text)):
            items.append(Text(draw(texts)))
        elif kind == "p":
            items.append(draw(promises))
            threads.append(draw(texts))
            waiting = True
        elif kind == "s" and waiting:
            items.append(Sync())
            waiting = False
    return Program(tuple(items), tuple(threads))


@settings(max_examples=200, deadline=None)
@given(legal())
def test_texts_and_tokens_read_back(program):
    language.validate(program)
    assert language.parse(language.to_text(program)) == program
    assembled = assembly.assemble_text(language.to_text(program))
    assert assembled.text == language.render(program)
    assert set(assembled.warnings) <= {"promises_without_sync"}

    encoded = programs.encode(program, np.zeros(1, np.int32), TOKENIZER, END)
    threads = [
        [*opening, *block, encoded.close]
        for opening, block in zip(encoded.openings, encoded.blocks, strict=True)
    ]
    assert language.parse_ids(encoded.main, threads, TOKENIZER, [END]) == program
    for blocks in (threads, encoded.blocks):  # a decoder may keep the forced opening or not
        again = assembly.assemble_ids(encoded.main, blocks, TOKENIZER, [END])
        assert again.text == language.render(program)
    # tags are whole tokens and nothing else is: the text tokenises into the same ids
    whole = TOKENIZER.encode(language.to_text(program))
    assert sorted([*whole, END]) == sorted(np.concatenate([encoded.main, *threads]).tolist())


def test_blocks_may_stand_behind_their_promise():
    inline = (
        '1<promise topic="a" tokens="10"/><async topic="a">x</async>2'
        '<promise topic="b c" tokens="20"/><async topic="b c">y</async><sync/>3'
    )
    program = Program((Text("1"), A, Text("2"), B, Sync(), Text("3")), ("x", "y"))
    assert language.parse(inline) == program
    assert language.render(program) == "1x2y3"


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ('ab<promise topic="a', 19, "the topic of a promise is not closed"),
        ('<promise topic="" tokens="10"/>', 16, "a promise without a topic"),
        ('<promise topic="a" tokens="x"/>', 27, "is not a number"),
        ('<promise topic="a" tokens="0"/>', 27, "tokens=0 of a promise is not a multiple of 10"),
        ('<promise topic="a" tokens="15"/>', 27, "tokens=15"),
        ('<promise topic="a" tokens="010"/>', 27, "tokens=010"),
        ('<promise topic="a" tokens="10">', 29, "a promise is not closed by '\"/>'"),
        ('<promise topic="a" tokens="10"/>z', 33, "the promise of 'a' has no block"),
        ('<promise topic="a" tokens="10"/>z<sync/>', 33, "the promise of 'a' has no block"),
        ('<promise topic="a" tokens="10"/><async topic="b">', 49, "the block of 'b' is not closed"),
        (
            '<promise topic="a" tokens="10"/><async topic="b">x</async>',
            32,
            "the block of 'b' where 'a' comes next",
        ),
        ('<async topic="a">x</async>', 0, "the block of 'a' was not promised"),
        ("x</async>", 1, "outside of a block"),
        (
            '<promise topic="a" tokens="10"/><async topic="a">x<sync/></async>',
            50,
            "<sync/> inside the block of 'a'",
        ),
        (
            '<promise topic="a" tokens="10"/><async topic="a"><async topic="b">',
            49,
            "inside the block of 'a'",
        ),
    ],
)
def test_errors_say_where_and_why(text, position, reason):
    with pytest.raises(LanguageError) as caught:
        language.parse(text)
    assert caught.value.position == position
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("main", "threads", "thread", "position", "reason"),
    [
        ("ab", [], 0, 2, "the answer has no end"),
        ("a|b", [], 0, 2, "goes on after its end"),
        ("é</async>|", [], 0, 2, "</async> in the main thread"),
        ('<promise topic="a" tokens="10"/>|', [], 0, 7, "1 promises and 0 blocks"),
        ('<promise topic="a" tokens="10"/>|', ["x</async>"], 1, 0, "begin with its opening"),
        ('<promise topic="a" tokens="10"/>|', ['<async topic="b">x</async>'], 1, 0, "promised as"),
        ('<promise topic="a" tokens="10"/>|', ['<async topic="a">xy'], 1, 5, "is not closed"),
        ('<promise topic="a" tokens="10"/>|', ['<async topic="a">x|'], 1, 4, "inside the block"),
        ('<promise topic="a" tokens="10"/>|', ['<async topic="a"></async>x'], 1, 4, "goes on"),
    ],
)
def test_errors_in_tokens_say_where_and_why(main, threads, thread, position, reason):
    ids = [TOKENIZER.encode(text.replace("|", "<|im_end|>")) for text in (main, *threads)]
    with pytest.raises(LanguageError) as caught:
        language.parse_ids(ids[0], ids[1:], TOKENIZER, [END])
    assert (caught.value.thread, caught.value.position) == (thread, position)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("items", "threads", "position", "reason"),
    [
        ((A,), (), 1, "1 promises and 0 blocks"),
        ((A,), ("",), 0, "the block of 'a' is empty"),
        ((A,), ("x<sync/>",), 0, "holds the tag '<sync/>'"),
        ((Text('x<async topic="'),), (), 0, "holds the tag"),
        ((Text("x"), Text("y")), (), 1, "two texts in a row"),
        ((Text("x"), Sync()), (), 1, "waits for nothing"),
        ((A, Sync(), Sync()), ("x",), 2, "waits for nothing"),
        ((Promise("a", 0),), ("x",), 0, "tokens=0"),
        ((Promise("a", 1_000_000),), ("x",), 0, "tokens=1000000"),
        ((Promise('a"', 10),), ("x",), 0, "has a quote"),
        ((Promise("a ", 10),), ("x",), 0, "space around it"),
    ],
)
def test_what_must_not_be_trained_is_refused(items, threads, position, reason):
    with pytest.raises(LanguageError) as caught:
        language.validate(Program(items, threads))
    assert caught.value.position == position
    assert reason in caught.value.reason


MALFORMED = {
    'x<promise topic="y': ("xy", {"unclosed_promise": 1}),
    'x<promise topic="y"/>z': ("xyz", {"unclosed_promise": 1}),
    '<promise topic="y" tokens="many"/>z': ("ymanyz", {"unclosed_promise": 1}),
    'x<sync/>y"/>': ('xy"/>', {"sync_without_promises": 1}),
    "x</async>y": ("xy", {"stray_end": 1}),
    '<async topic="t">x</async>y': ("xy", {"block_without_promise": 1}),
    '<promise topic="t" tokens="0"/><async topic="t">x</async><sync/>': ("x", {"bad_tokens": 1}),
    '<promise topic="t" tokens="1000000"/>y<async topic="t">x</async><sync/>': (
        "xy",
        {"bad_tokens": 1},
    ),
    '<promise topic="t" tokens="10"/>y<sync/>z': ("yz", {"promise_without_block": 1}),
    '<promise topic="t" tokens="10"/>y<async topic="t">x<sync/>z': ("xyz", {"unclosed_block": 1}),
    '<promise topic="t" tokens="10"/><async topic="t">x<promise topic="u" tokens="10"/></async>': (
        "xu10",
        {"tag_in_block": 1, "promises_without_sync": 1},
    ),
    '<promise topic="t" tokens="10"/>y<async topic="u"x</async><sync/>': (
        'u"xy',
        {"unclosed_opening": 1},
    ),
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_texts_end_in_text_and_warnings(text):
    assembled = assembly.assemble_text(text)
    expected, warnings = MALFORMED[text]
    assert assembled.text == expected
    assert assembled.warnings == warnings


def test_malformed_tokens_end_in_text_and_warnings():
    main = TOKENIZER.encode('1<promise topic="t" tokens="10"/>2<|im_end|>3')
    blocks = [TOKENIZER.encode("x<|im_end|>y"), TOKENIZER.encode("z</async>w")]
    prompt = TOKENIZER.encode("<sync/>")
    assembled = assembly.assemble_ids(main, blocks, TOKENIZER, [END], prompt)
    assert assembled.text == "1xy23zw"
    assert assembled.warnings == {
        "tag_in_prompt": 1,
        "promises_without_sync": 1,
        "end_in_block": 1,
        "unclosed_block": 1,
        "text_after_block": 1,
        "block_without_promise": 1,
        "text_after_end": 1,
    }
    assert set(assembled.warnings) <= set(assembly.WARNINGS)


scraps = st.lists(
    st.one_of(
        st.sampled_from([*TAGS, "<|im_end|>", "10", "0", "1000000", "9é"]),
        st.text("xyz", min_size=1, max_size=3),
        st.sampled_from([language.promise_text(A), language.block_text("a", "x")]),
    ),
    max_size=14,
).map("".join)


TAG = vocabulary.any_of(TAGS)
COMPLETE = re.compile(r'<promise topic="[^"<>]*" tokens="[0-9]+"/>|<async topic="[^"<>]*">')


def letters(text):
    """The letters x, y and z of a text, its tags apart."""
    return collections.Counter(re.findall("[xyz]", "".join(TAG.split(text)[::2])))


def check_kept(assembled, written):
    """All letters but those in complete tags are there, and none twice."""
    needed = letters("|".join(COMPLETE.sub("", text) for text in written))
    assert needed <= letters(assembled.text) <= letters("|".join(written))
    assert set(assembled.warnings) <= set(assembly.WARNINGS)
    assert all(count > 0 for count in assembled.warnings.values())


@settings(max_examples=300, deadline=None)
@given(scraps, st.lists(scraps, max_size=4))
def test_no_output_loses_text(main, threads):
    check_kept(assembly.assemble_text(main.replace("<|im_end|>", "")), [main])
    ids = [TOKENIZER.encode(text) for text in (main, *threads)]
    check_kept(assembly.assemble_ids(ids[0], ids[1:], TOKENIZER, [END]), [main, *threads])


@settings(max_examples=200, deadline=None)
@given(scraps)
def test_tags_in_a_prompt_are_text(text):
    ids = language.encode_prompt(text, TOKENIZER)
    assert TOKENIZER.decode(ids) == text
    assert not set(language.tag_ids(TOKENIZER).values()) & set(ids.tolist())


def test_a_trained_tokenizer_takes_the_tags():
    trained = tokenizers.train_bpe(["Rome is old. " * 9], 300).add_tokens(TAGS)
    program = Program((Text("Rome"), Promise("Rome is", 30), Sync()), ("old. Rome",))
    encoded = programs.encode(program, trained.encode("x"), trained, trained.token_id("<|eos|>"))
    whole = trained.encode(language.promise_text(Promise("Rome is", 30)))
    assert encoded.main[-2 - len(whole) : -2].tolist() == whole.tolist()
    assert language.recounted(program, trained).promises == (Promise("Rome is", 10),)
    longer = dataclasses.replace(program, threads=("old. Rome " * 900,))
    assert language.recounted(longer, trained).promises[0].tokens == language.MAX_TOKENS
    with pytest.raises(ValueError, match="lacks the tags"):
        language.tag_ids(tokenizers.load_tokenizer("bytes"))


def test_clamped_promises():
    assert [language.clamp(n) for n in (0, 1, 10, 11, 999, 10**9)] == [10, 10, 10, 20, 1000, 1000]
