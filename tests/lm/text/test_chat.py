# SPDX-License-Identifier: Apache-2.0
"""Chat templates: literal renderings of the built-in ones, their sources, what is refused."""

import dataclasses
import datetime
import itertools
import json

import pytest

from lm.errors import UserError
from lm.text import chat, tokenizers

BYTES = tokenizers.load_tokenizer("bytes")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b é"}}]
TOOL_LINE = '{"type": "function", "function": {"name": "add", "description": "a < b é"}}'
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 3."}
THOUGHT = {"role": "assistant", "reasoning_content": "one, two", "content": "It is 3."}
AGAIN = {"role": "user", "content": "And now?"}
CALL = {
    "role": "assistant",
    "reasoning_content": "use it",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "3"}

CHATML_TOOLS = (
    "# Tools\n\nThese functions can be called; a JSON object describes each:\n<tools>\n"
    + TOOL_LINE
    + "\n</tools>\n\nTo call one, answer with its name and its arguments as JSON, in this form:\n"
    '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
)
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + TOOL_LINE
    + "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
LLAMA_TOOLS = (
    "You can call these functions; a JSON object describes each:\n\n"
    + TOOL_LINE
    + '\n\nTo call one, answer only with {"name": NAME, "parameters": {...}}'
)
GEMMA_TOOLS = (
    "You can call these functions; a JSON object describes each:\n\n"
    + TOOL_LINE
    + "\n\nTo call one, answer with its name and its arguments as JSON, in this form:\n"
    '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
)
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format

# (template, messages, tools, generation prompt, expected)
CASES = {
    "chatml-turns": (
        "chatml",
        [SYSTEM, USER, ANSWER, AGAIN],
        None,
        True,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "chatml-thoughts-kept-wherever-present": (
        "chatml",
        [USER, THOUGHT, AGAIN, ANSWER],
        None,
        False,
        "<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\none, two\n</think>\n\nIt is 3.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nIt is 3.<|im_end|>\n",
    ),
    "chatml-empty-thought": (
        "chatml",
        [USER, {**ANSWER, "reasoning_content": ""}],
        None,
        False,
        "<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is 3.<|im_end|>\n",
    ),
    "chatml-tools": (
        "chatml",
        [SYSTEM, USER, CALL, RESULT, THOUGHT],
        TOOLS,
        False,
        f"<|im_start|>system\nBe brief.\n\n{CHATML_TOOLS}<|im_end|>\n"
        "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\nuse it\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\none, two\n</think>\n\nIt is 3.<|im_end|>\n",
    ),
    "chatml-tools-without-system": (
        "chatml",
        [USER],
        TOOLS,
        False,
        f"<|im_start|>system\n{CHATML_TOOLS}<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n",
    ),
    "chatml_plain-drops-thoughts": (
        "chatml_plain",
        [SYSTEM, USER, THOUGHT, AGAIN],
        None,
        True,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "chatml_plain-keeps-content": (
        "chatml_plain",
        [USER, {**ANSWER, "content": " <think>x</think>\n\ny "}],
        None,
        False,
        "<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n <think>x</think>\n\ny <|im_end|>\n",
    ),
    "chatml_plain-tools": (
        "chatml_plain",
        [USER, CALL, RESULT],
        TOOLS,
        True,
        f"<|im_start|>system\n{CHATML_TOOLS}<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3-turns": (
        "llama3",
        [SYSTEM, USER, THOUGHT, {**AGAIN, "content": " And now? \n"}],
        None,
        True,
        "<|bos|>"
        + LLAMA("system", "Be brief.")
        + LLAMA("user", "1 + 2?")
        + LLAMA("assistant", "It is 3.")
        + LLAMA("user", "And now?")
        + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama3-tools": (
        "llama3",
        [SYSTEM, USER, CALL, RESULT, ANSWER],
        TOOLS,
        False,
        "<|bos|>"
        + LLAMA("system", "Be brief.\n\n" + LLAMA_TOOLS)
        + LLAMA("user", "1 + 2?")
        + LLAMA("assistant", '{"name": "add", "parameters": {"a": 1}}')
        + LLAMA("ipython", "3")
        + LLAMA("assistant", "It is 3."),
    ),
    "llama3-tools-without-system": (
        "llama3",
        [USER],
        TOOLS,
        False,
        "<|bos|>" + LLAMA("system", LLAMA_TOOLS) + LLAMA("user", "1 + 2?"),
    ),
    "gemma-turns": (
        "gemma",
        [SYSTEM, USER, THOUGHT, AGAIN],
        None,
        True,
        "<|bos|><start_of_turn>user\nBe brief.\n\n1 + 2?<end_of_turn>\n"
        "<start_of_turn>model\nIt is 3.<end_of_turn>\n<start_of_turn>user\nAnd now?<end_of_turn>\n"
        "<start_of_turn>model\n",
    ),
    "gemma-tools": (
        "gemma",
        [USER, CALL, RESULT, ANSWER],
        TOOLS,
        False,
        f"<|bos|><start_of_turn>user\n{GEMMA_TOOLS}\n\n1 + 2?<end_of_turn>\n"
        '<start_of_turn>model\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<end_of_turn>\n<start_of_turn>user\n<tool_response>\n3\n</tool_response><end_of_turn>\n"
        "<start_of_turn>model\nIt is 3.<end_of_turn>\n",
    ),
    "qwen3-drops-thoughts-before-the-last-question": (
        "qwen3",
        [SYSTEM, USER, THOUGHT, AGAIN, THOUGHT],
        None,
        False,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\none, two\n</think>\n\nIt is 3.<|im_end|>\n",
    ),
    "qwen3-thought-inline-in-the-content": (
        "qwen3",
        [
            USER,
            {**ANSWER, "content": "<think>\nold\n</think>\n\n3"},
            AGAIN,
            {**ANSWER, "content": "<think>\nnew\n</think>\n\n4"},
        ],
        None,
        False,
        "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nnew\n</think>\n\n4<|im_end|>\n",
    ),
    "qwen3-empty-tags-in-the-last-message": (
        "qwen3",
        [USER, ANSWER],
        None,
        False,
        "<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is 3.<|im_end|>\n",
    ),
    "qwen3-tools": (
        "qwen3",
        [SYSTEM, USER, CALL, RESULT, {**RESULT, "content": "4"}],
        TOOLS,
        True,
        f"<|im_start|>system\nBe brief.\n\n{QWEN_TOOLS}<|im_end|>\n"
        "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\nuse it\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n"
        "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
}
BUILTIN = pytest.mark.parametrize("name", chat.BUILTIN)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_literal_rendering(case):
    name, messages, tools, prompt, expected = case
    template = chat.load_template(name, BYTES)
    assert template.render(messages, add_generation_prompt=prompt, tools=tools) == expected


@BUILTIN
def test_the_prompt_is_a_prefix_of_the_whole(name):
    """What is generated after the prompt continues the text that training sees."""
    template = chat.load_template(name, BYTES)
    histories = [
        [USER],
        [SYSTEM, USER],
        [{**ANSWER, "content": "Hello!"}, USER],
        [USER, THOUGHT, AGAIN],
        [USER, CALL, RESULT],
        [SYSTEM, USER, CALL, RESULT, {**RESULT, "content": "4"}, CALL, RESULT, ANSWER, AGAIN],
    ]
    two_calls = {**CALL, "content": "Wait.", "tool_calls": CALL["tool_calls"] * 2}
    answers = [ANSWER, THOUGHT, CALL, two_calls, {**ANSWER, "reasoning_content": ""}]
    for history, answer, tools in itertools.product(histories, answers, (None, TOOLS)):
        prompt = template.render(history, add_generation_prompt=True, tools=tools)
        whole = template.render([*history, answer], add_generation_prompt=False, tools=tools)
        assert whole.startswith(prompt)
        assert len(whole) > len(prompt)
        assert answer["content"] is None or answer["content"] in whole[len(prompt) :]


@BUILTIN
def test_builtins_refuse_what_they_cannot_write(name):
    template = chat.load_template(name, BYTES)
    with pytest.raises(UserError, match=f"{name}: unknown role critic"):
        template.render([USER, {"role": "critic", "content": "no"}], add_generation_prompt=False)
    with pytest.raises(UserError, match="content of a message must be a string"):
        template.render([{"role": "user", "content": 3}], add_generation_prompt=False)


def test_gemma_never_loses_a_system_message():
    template = chat.load_template("gemma", BYTES)
    with pytest.raises(UserError, match="need a user turn"):
        template.render([SYSTEM], add_generation_prompt=True)
    with pytest.raises(UserError, match="only possible at the start"):
        template.render([USER, SYSTEM], add_generation_prompt=True)


def _template(tmp_path, source, **options):
    file = tmp_path / "t.jinja"
    file.write_text(source)
    return chat.load_template(str(file), BYTES, **options)


def test_names_that_checkpoints_expect(tmp_path):
    source = (
        "{{ bos_token }}|{{ strftime_now('%d %b %Y') }}|{{ tools is none }}|{{ unk_token }}|"
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}|"
        "{{ {'b': '<é>', 'a': 1} | tojson }}|"
        "{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}"
    )
    template = _template(tmp_path, source, date=datetime.date(2024, 7, 26))
    expected = (
        '<|bos|>|26 Jul 2024|True||1 + 2?|{"b": "<é>", "a": 1}|{\n "a": [\n  2\n ],\n "b": 1\n}'
    )
    assert template.render([USER, ANSWER], add_generation_prompt=False) == expected
    other = _template(tmp_path, source, date=datetime.date(2024, 7, 27))
    assert other.fingerprint != template.fingerprint


def test_today_without_a_date(tmp_path):
    template = _template(tmp_path, "{{ strftime_now('%Y') }}")
    year = int(template.render([USER], add_generation_prompt=False))
    assert year in (datetime.datetime.now().year, datetime.datetime.now().year - 1)


def test_white_space_around_blocks_goes(tmp_path):
    template = _template(tmp_path, "a\n   {% if true %}\nb\n  {% endif %}\nc\n")
    assert template.render([USER], add_generation_prompt=False) == "a\nb\nc"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'changed'}) }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ range(10000000) | list | length }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_refuses(tmp_path, source):
    template = _template(tmp_path, source)
    messages = [dict(USER)]
    with pytest.raises(UserError, match=r"t\.jinja"):
        template.render(messages, add_generation_prompt=False)
    assert messages == [USER]


def test_a_template_may_refuse_or_fail(tmp_path):
    template = _template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        template.render([USER], add_generation_prompt=False)
    template = _template(tmp_path, "{{ messages[0].content + 1 }}")
    with pytest.raises(UserError, match="failed on this conversation: TypeError"):
        template.render([USER], add_generation_prompt=False)
    with pytest.raises(UserError, match=r"t\.jinja, line 2"):
        _template(tmp_path, "\n{% if %}")


def test_arguments_are_parsed_only_when_they_are_an_object(tmp_path):
    template = _template(tmp_path, "{{ messages[0].tool_calls[0].function.arguments | tojson }}")

    def render(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        text = template.render([message], add_generation_prompt=False)
        assert call["function"]["arguments"] == arguments
        return json.loads(text)

    assert render('{"a": 1}') == {"a": 1}
    assert render({"a": 1}) == {"a": 1}
    assert render("not json") == "not json"
    assert render("[1]") == "[1]"


def test_a_tokenizer_is_saved_with_the_template_of_its_run(tmp_path):
    tokenizer = tokenizers.load_tokenizer("bytes")
    used = chat.load_template("qwen3", tokenizer)
    tokenizer.save(tmp_path / "own")
    tokenizer.save(tmp_path / "used", used.stored())
    asked = [{"role": "user", "content": "x"}]
    for name, wanted in (("own", chat.load_template("chatml", tokenizer)), ("used", used)):
        found = chat.load_template(None, tokenizers.load_tokenizer(str(tmp_path / name)))
        assert found.source == wanted.source
        rendered = [one.render(asked, add_generation_prompt=True) for one in (found, wanted)]
        assert rendered[0] == rendered[1]
    both = dataclasses.replace(used, tool_source="{{ tools }}")
    tokenizer.save(tmp_path / "both", both.stored())
    found = chat.load_template(None, tokenizers.load_tokenizer(str(tmp_path / "both")))
    assert (found.source, found.tool_source) == (both.source, both.tool_source)


def test_where_templates_come_from(tmp_path):
    assert chat.load_template(None, BYTES).source == chat.load_template("chatml", BYTES).source
    assert (
        chat.load_template("", BYTES).fingerprint == chat.load_template("chatml", BYTES).fingerprint
    )
    with pytest.raises(UserError, match="not a built-in"):
        chat.load_template("chatmll", BYTES)

    bare = tokenizers.train_bpe(["abc"], 300, special_tokens=("<|eos|>",))
    with pytest.raises(UserError, match=r"has no chat template; pass --config.data.template="):
        chat.load_template(None, bare)

    bare.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def reload(template):
        text = json.dumps({**settings, "chat_template": template})
        (tmp_path / "tokenizer_config.json").write_text(text)
        return chat.load_template(None, tokenizers.load_tokenizer(str(tmp_path)))

    def render(template, tools=None):
        return template.render([USER], add_generation_prompt=False, tools=tools)

    assert render(reload("plain")) == "plain"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    assert render(reload(named)) == "one"
    assert render(reload(named), TOOLS) == "two"
    with pytest.raises(UserError, match=r"named default \(only tool_use\)"):
        reload(named[1:])
    # the file wins over the settings
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert render(reload(named)) == "from the file"


def test_fingerprint_covers_the_special_tokens():
    other = tokenizers.JsonTokenizer(
        BYTES.definition, name="x", special_tokens={"bos_token": "<|im_start|>"}
    )
    chatml = [chat.load_template("chatml", t).fingerprint for t in (BYTES, other)]
    assert chatml[0] != chatml[1]
