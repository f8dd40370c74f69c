# SPDX-License-Identifier: Apache-2.0
"""The evaluation harness on a random model that reads bytes: rows, resumption, comparisons,
refusals."""

import dataclasses
import json

import numpy as np
import pytest

from lm.errors import DataError, UserError
from lm.long_context import asking, decode, evaluate, tasks
from lm.long_context.judge import Judge
from lm.long_context.options import Budget, Options
from lm.text import chat
from lm.token_select.methods import Methods
from lm.workdir import Workdir
from tests.lm.long_context import judged, small
from tests.lm.long_context.judged import CONFIG, PAIR, SELECT, TABLE


@pytest.fixture(scope="module")
def speaker():
    return small.speaker()


@pytest.fixture
def opened(monkeypatch):
    judged.opens(monkeypatch)


def test_budgets():
    totals = [Budget.parse(x).total(TABLE, 1000) for x in ("512", "5%", "k=28", "k=5%", "100%")]
    assert totals == [512, 50, 64, 86, 1000]
    reusing = dataclasses.replace(SELECT, reuse=0.9)
    assert Budget.parse("k=28").total(Methods(reusing), 1000) == 72
    assert Methods(reusing).build("token_select", 72).config == reusing
    for text in ("", "5 %%", "k5", "0", "1.5", "101%", "-3"):
        with pytest.raises(UserError, match="--budgets="):
            Budget.parse(text)


def test_rows_comparison_and_resumption(opened, tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    options = dataclasses.replace(PAIR, budgets=("64", "k=7%"))
    result = evaluate.run(CONFIG, TABLE, tmp_path, options, workdir)
    pairs = [(row["method"], row["budget"]) for row in result["rows"]]
    # a share of 7 percent is 28 of the context of 400: the same budget, measured once
    assert pairs == [("dense", 400), ("token_select", 64), ("streaming_llm", 64)]
    for row in result["rows"]:
        assert (row["task"], row["length"], row["samples"]) == ("passkey", 400, 3)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    dense, *others = result["rows"]
    assert (dense["agreement"], dense["edit_distance"]) == (1, 0)
    assert [row["tokens_read"] for row in others] == [64, 64]
    assert all(row["agreement"] < 1 and 0 < row["edit_distance"] <= 1 for row in others)
    assert result["agreement"] == others[0]["agreement"]
    assert [(x["budget"], x["against"]) for x in result["summary"]] == [
        ("64", "dense"), ("64", "streaming_llm"), ("k=7%", "dense"), ("k=7%", "streaming_llm"),
    ]  # fmt: skip
    # cut off in the middle of the last row, and asked for a method more
    file = tmp_path / "eval.jsonl"
    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:-1]) + kept[-1][:20])
    calls = []
    monkeypatch.setattr(
        Judge,
        "method",
        lambda self, policy, *rest, plain=Judge.method: (
            calls.append(type(policy).__name__),
            plain(self, policy, *rest),
        )[1],
    )
    again = evaluate.run(CONFIG, TABLE, tmp_path, options, workdir)
    assert calls == []  # the answers were there
    for row, known in zip(again["rows"], result["rows"], strict=True):
        assert row | {"date": ""} == known | {"date": ""}
    assert again["summary"] == result["summary"]
    # other samples are other rows
    more = evaluate.run(CONFIG, TABLE, tmp_path, dataclasses.replace(PAIR, seeds=(0, 1)), workdir)
    assert calls == ["Dense", "TokenSelect", "StreamingLLM"]
    assert len(more["rows"]) == 6
    assert list(more["summary"][0]["differences"]) == ["passkey 400", "passkey 400 seed 1"]


def test_a_users_prompts_cost_agreement_and_time(opened, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        json.dumps({"prompt": "To be, or not to be. " * 18 + "Or is it?", "references": "question"})
        + "\n\n"
        + json.dumps({"input": "A sample " * 9, "answer_prefix": "\nIs", "outputs": ["a", "b"]})
        + "\n"
    )
    options = dataclasses.replace(
        PAIR, data=str(file), max_new_tokens=6, capacity=400, methods=("token_select",)
    )
    result = evaluate.run(CONFIG, TABLE, tmp_path, options, Workdir(tmp_path))
    dense, mine = result["rows"]
    assert (dense["task"], dense["length"], dense["longest_prompt"]) == ("mine", 400, 387)
    assert {"prefill_ms", "token_ms_p50", "token_ms_p95", "tokens_per_s"} <= mine.keys()
    assert mine["tokens_read"] == 64
    assert mine["guard"] is dense["guard"] is None
    # without right answers agreement alone is compared
    file.write_text(
        "plain text, a prompt of its own " * 12
        + "then more"
        + "\n{not JSON, but long enough to read}\n"
    )
    result = evaluate.run(CONFIG, TABLE, tmp_path, options, Workdir(tmp_path))
    assert result["accuracy"] is None
    assert result["summary"][0]["of"] == "agreement"


def test_a_template_leaves_room_for_itself(speaker):
    task = tasks.find("passkey")
    for length in (800, 801):
        made = asking.of_task(speaker, task, length, 4, 0, chat=True)
        assert max(map(len, made.prompts)) + task.new_tokens <= length
    text = speaker.tokenizer.decode(made.prompts[0])
    opening = speaker.template.render(
        [{"role": "user", "content": "Q"}], add_generation_prompt=True
    )
    head, tail = opening.split("Q")
    assert text.startswith(head)
    assert tail in text[-200:]
    assert not text.endswith(tail)  # the beginning of the answer comes after it


def test_a_token_that_opens_plain_text_is_counted(speaker):
    opened = dataclasses.replace(speaker, bos=speaker.tokenizer.bos)
    task, longest = tasks.find("kv_retrieval"), []
    for length in range(2000, 2090):  # a pair of the list is 81 bytes
        prompts = asking.of_task(opened, task, length, 1, 0).prompts
        assert speaker.tokenizer.decode(prompts[0][:1]) == speaker.tokenizer.bos
        longest.append(len(prompts[0]) + task.new_tokens - length)
    assert max(longest) == 0  # some fill their length


CODE = "    def f(x):\n        return x\n"


@pytest.mark.parametrize(
    ("context", "question", "kept"),
    [
        (CODE, "", CODE.strip()),  # trimmed at both ends
        (CODE, "Why?", CODE.lstrip()),
        ("user", "?", "user"),  # what the template writes itself
        ("", "Why?", ""),
    ],
)
def test_a_template_may_trim_a_context_and_hold_its_words(
    speaker, tmp_path, context, question, kept
):
    tokenizer = speaker.tokenizer
    llama = chat.load_template("llama3", tokenizer)
    speaker = dataclasses.replace(speaker, template=llama)
    fields = {"context": context, "input": question, "answers": ["y = 1"], "dataset": "lcc"}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(fields))
    opened = speaker.rendered(context + question, chat=True)
    before = opened.index("<|end_header_id|>\n\n", opened.index("user")) + 19
    for apart in (False, True):
        (made,) = asking.of_longbench(speaker, path, chat=True, apart=apart)
        assert tokenizer.decode(made.prompts[0]) == opened
        if apart:
            first = tokenizer.decode(made.prompts[0][: made.contexts[0]])
            assert first == opened[:before] + kept
        else:
            assert made.contexts == ()


def test_rows_say_what_the_guard_found(opened, tmp_path):
    table = Methods(dataclasses.replace(SELECT, guard_every=2))
    options = dataclasses.replace(PAIR, methods=("token_select",), batch_size=2)
    dense, mine = evaluate.run(CONFIG, table, tmp_path, options, Workdir(tmp_path))["rows"]
    assert dense["guard"] is None
    found = mine["guard"]
    # three questions, of which the last shares its batch with one that only fills it up
    assert found["checks"] == 3 * ((tasks.find("passkey").new_tokens - 1) // 2)
    assert 0 <= found["disagreements"] <= found["checks"]
    assert found["kl"] > 0
    assert found["dense_steps"] == 0


def test_one_program_serves_all_batches(speaker):
    judge = Judge(CONFIG, TABLE, PAIR, speaker)
    questions = [asking.of_task(speaker, tasks.find("passkey"), 400, n, n) for n in (4, 3, 5)]
    method = judge.method(TABLE.build("streaming_llm", 64))
    asking.ask(method, questions[0], 2)
    before = decode.prefill._cache_size(), decode.advance._cache_size()
    together = asking.ask(method, questions[1], 2)
    asking.ask(method, questions[2], 2)
    assert (decode.prefill._cache_size(), decode.advance._cache_size()) == before
    one = dataclasses.replace(questions[1], prompts=questions[1].prompts[1:2])
    alone = asking.ask(method, one, 2)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])


REFUSED = {
    "method": ({"methods": ("sinks",)}, "unknown method 'sinks'"),
    "task": ({"tasks": ("nail",)}, "unknown task 'nail'"),
    "budget_above": ({"budgets": ("401",)}, r"a budget of 401 tokens .* above the context of 400"),
    "budget_below": ({"budgets": ("5%",)}, "a budget of 20 tokens leaves nothing"),
    "length": ({"lengths": (90,)}, "too short"),
    "both": ({"data": "x.jsonl", "tasks": ("passkey",)}, "--data brings its own prompts"),
    "no_file": ({"data": "x.jsonl"}, "x.jsonl: No such file"),
    "capacity": ({"capacity": 5}, "--capacity is of --data"),
    "seeds": ({"seeds": ()}, "--seeds"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(opened, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.run(CONFIG, TABLE, tmp_path, dataclasses.replace(PAIR, **changes))


def test_files_that_are_refused(opened, tmp_path):
    file = tmp_path / "mine.jsonl"

    def run(text, **changes):
        file.write_text(text)
        evaluate.run(CONFIG, TABLE, tmp_path, dataclasses.replace(PAIR, data=str(file), **changes))

    with pytest.raises(UserError, match="no prompts"):
        run("\n")
    with pytest.raises(DataError, match="without a text under 'prompt'"):
        run('{"text": "x"}')
    with pytest.raises(DataError, match="'references' must be"):
        run('{"prompt": "x", "references": [3]}')
    with pytest.raises(UserError, match="prompt 1 has no references"):
        run('{"prompt": "x", "references": "y"}\n{"prompt": "x"}')
    with pytest.raises(UserError, match=r"prompt 0 has 40 tokens and 8 new .* a context of 47"):
        run(40 * "x", capacity=47, max_new_tokens=8)


def test_budgets_are_read_before_anything_runs():
    with pytest.raises(UserError, match="a share is at most 100%"):
        Options(budgets=("26", "k=500%"))
