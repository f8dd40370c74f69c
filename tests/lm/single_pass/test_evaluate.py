# SPDX-License-Identifier: Apache-2.0
"""Evaluation: what the model is shown, how its replies are read and scored, the loss by depth."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import contexts, generate, setup, transformer
from lm.config import Config, DataConfig, ModelConfig, SamplingConfig, TrainConfig
from lm.data import arithmetic
from lm.data.conversations import Branch, Conversation, Message
from lm.errors import UserError
from lm.single_pass import dialogues, evaluate, pipeline, training
from lm.workdir import Workdir
from ops.visibility import Visibility

TINY = ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
SAMPLING = SamplingConfig(max_new_tokens=8)
CALL = {"type": "function", "id": "c", "function": {"name": "f", "arguments": {"x": "1"}}}


def resolved_of(**data) -> setup.Setup:
    return setup.resolve(Config(model=TINY, data=DataConfig(**data), sampling=SAMPLING))


def arithmetic_conversations(count: int, tools: bool = False) -> list[Conversation]:
    settings = arithmetic.ArithmeticConfig(min_turns=3, max_turns=3, tools=tools, tool_rate=0.7)
    return [arithmetic.generate(3, index, settings, "validation") for index in range(count)]


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str, thought: str | None = None) -> Message:
    return Message("assistant", content, thought=thought)


class Model:
    """Stands in for `generate.generate`: replies from a script, and keeps what it was shown."""

    def __init__(self, monkeypatch, reply):
        self.reply, self.prompts, self.batches = reply, [], []
        monkeypatch.setattr(generate, "generate", self)
        timing = generate.Timing(0.5, np.array([0.25]))
        monkeypatch.setattr(generate, "measure", lambda *args, **kwargs: timing)

    def __call__(self, model, params, prompts, sampling, stop_ids, key, *, indices, **kwargs):
        self.batches.append(list(indices))
        self.prompts += [(index, np.array(p)) for index, p in zip(indices, prompts, strict=True)]
        out = []
        for index in indices:
            tokens = np.asarray(self.reply(index, sum(i == index for i, _ in self.prompts) - 1))
            stopped = bool(len(tokens)) and int(tokens[-1]) in stop_ids
            tokens = tokens[:-1] if stopped else tokens
            out.append(generate.Generation(tokens, np.zeros(len(tokens)), stopped))
        return out


def params_of(resolved: setup.Setup) -> transformer.Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32),
        transformer.abstract(resolved.model)[1],
    )


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(
    ("policy", "template"),
    [
        ("interleaved", ""),
        ("preserved", ""),
        ("per_message", ""),
        ("interleaved", "chatml_plain"),
        ("interleaved", "qwen3"),
    ],
)
def test_a_perfect_model_is_shown_what_training_shows(monkeypatch, policy, template, tools):
    resolved = resolved_of(policy=policy, template=template)
    found = arithmetic_conversations(5, tools)
    samples = [pipeline.samples_of(resolved, conversation) for conversation in found]
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *args: ({1: 2.0}, {1: 4.0}))

    def reply(index, turn):
        sample = samples[index][turn]
        return sample.tokens[sample.prompt_length :]

    model = Model(monkeypatch, reply)
    got = evaluate.evaluate(resolved, params_of(resolved), found, evaluate.Options(batch_size=3))
    for index, own in enumerate(samples):
        shown = [prompt for i, prompt in model.prompts if i == index]
        assert len(shown) == len(own)
        for prompt, sample in zip(shown, own, strict=True):
            np.testing.assert_array_equal(prompt, sample.tokens[: sample.prompt_length])
    assert got.exact_match == 1.0
    assert got.n == sum(len(arithmetic.expected(conversation)) for conversation in found)
    assert [row["depth"] for row in got.rows] == [1, 2, 3]
    assert all(row["exact_match"] == 1.0 and row["cut_off"] == 0 for row in got.rows)
    assert sum(row["n"] for row in got.rows) == got.n
    assert all(len(batch) <= 3 for batch in model.batches)
    assert model.batches[:2] == [[0, 1, 2], [3, 4]]
    assert got.loss == 0.5


def test_own_mistakes_stay_in_the_history(monkeypatch):
    resolved = resolved_of()
    found = [
        Conversation((user("a"), assistant("It is 1."), user("b"), assistant("It is 2.", "x")))
    ]
    replies = ["<think>\nwrong\n</think>\n\nIt is 9.<|im_end|>", "It is 2."]
    model = Model(monkeypatch, lambda index, turn: resolved.tokenizer.encode(replies[turn]))
    got = evaluate.evaluate(resolved, params_of(resolved), found)
    second = resolved.tokenizer.decode(model.prompts[1][1])
    assert "It is 9." in second
    assert "wrong" not in second
    assert "It is 1." not in second
    assert [row["exact_match"] for row in got.rows] == [0.0, 1.0]
    (transcript,) = got.transcripts
    assert [m.content for m in transcript.messages] == ["a", "It is 9.", "b", "It is 2."]
    first, last = transcript.replies
    assert (first.thought, first.response, first.reference) == ("wrong", "It is 9.", "It is 1.")
    assert (first.stopped, last.stopped) == (True, False)
    assert [row["cut_off"] for row in got.rows] == [0, 1]
    json.dumps(transcript.to_dict())


def test_an_unclosed_thought_is_wrong_and_stays_as_text(monkeypatch):
    resolved = resolved_of()
    found = [Conversation((user("a"), assistant("It is 1.", "t"), user("b"), assistant("c")))]
    model = Model(
        monkeypatch, lambda index, turn: resolved.tokenizer.encode("<think>\nIt is 1.<|im_end|>")
    )
    got = evaluate.evaluate(resolved, params_of(resolved), found)
    assert got.exact_match == 0.0
    assert [row["unclosed"] for row in got.rows] == [1, 1]
    assert "<think>\nIt is 1.<|im_end|>" in resolved.tokenizer.decode(model.prompts[1][1])


def test_tool_results_are_the_references_and_final_answers_are_scored(monkeypatch):
    resolved = resolved_of()
    thread = (
        user("a"),
        Message("assistant", "", thought="t", tool_calls=(CALL,)),
        Message("tool", "RESULT", tool_call_id="c"),
        assistant("It is 1."),
        user("b"),
        assistant("It is 2."),
    )
    replies = ["<think>\nmine\n</think>\n\n<tool_call>OWN</tool_call>", "It is 1.", "It is 1."]
    model = Model(
        monkeypatch, lambda index, turn: resolved.tokenizer.encode(replies[turn] + "<|im_end|>")
    )
    got = evaluate.evaluate(resolved, params_of(resolved), [Conversation(thread)])
    second = resolved.tokenizer.decode(model.prompts[1][1])
    # the thought stays through the tool loop
    assert second.index("mine") < second.index("<tool_call>OWN") < second.index("RESULT")
    assert [reply.correct for reply in got.transcripts[0].replies] == [None, True, False]
    assert [(row["depth"], row["n"], row["exact_match"]) for row in got.rows] == [
        (1, 1, 1.0),
        (2, 1, 0.0),
    ]


def test_greetings_and_untrained_main_threads(monkeypatch):
    resolved = resolved_of()
    greeted = Conversation((assistant("hello"), user("a"), assistant("b")))
    branched = Conversation((user("a"),), branches=(Branch(1, (assistant("b"),)),))
    model = Model(monkeypatch, lambda index, turn: resolved.tokenizer.encode(" B\n<|im_end|>"))
    got = evaluate.evaluate(resolved, params_of(resolved), [branched, greeted])
    assert [index for index, _ in model.prompts] == [1]
    assert "hello" in resolved.tokenizer.decode(model.prompts[0][1])
    assert (got.n, got.exact_match) == (1, 1.0)
    with pytest.raises(UserError, match="no main thread"):
        evaluate.evaluate(resolved, params_of(resolved), [branched])
    with pytest.raises(UserError, match="no conversations"):
        evaluate.evaluate(resolved, params_of(resolved), [])


@pytest.mark.parametrize(
    ("text", "opened", "wanted"),
    [
        ("<think>\na\n</think>\n\nb", False, ("a", "b", True)),
        ("  <think>a</think>b", False, ("a", "b", True)),
        ("b", False, (None, "b", True)),
        ("b </think> c", False, (None, "b </think> c", True)),
        ("a\n</think>\n\nb", True, ("a", "b", True)),
        ("<think>a</think>b", True, ("a", "b", True)),
        ("<think>a", False, (None, "<think>a", False)),
        ("a", True, (None, "a", False)),
        ("<think></think>", False, ("", "", True)),
        ("", False, (None, "", True)),
    ],
)
def test_split_generation(text, opened, wanted):
    assert dialogues.split_generation(text, ("<think>", "</think>"), opened) == wanted


def test_depths():
    roles = ("system", "assistant", "user", "user", "assistant", "tool", "assistant", "user")
    thread = [Message(role, "") for role in roles]
    assert dialogues.depths_of(thread) == [0, 0, 1, 1, 1, 1, 1, 2]


def test_matches():
    arithmetic_data, gsm8k_data = DataConfig(), DataConfig(source="gsm8k:x.jsonl")
    assert dialogues.matches(arithmetic_data, "So: It is 12.", "It is 12.")
    assert not dialogues.matches(arithmetic_data, "It is 1.", "It is 12.")
    assert not dialogues.matches(arithmetic_data, "12", "It is 12.")
    assert dialogues.matches(gsm8k_data, "The answer is $1,200.", "The answer is 1200.")
    # a reference without an answer is compared as text
    assert dialogues.matches(arithmetic_data, "hello  World\n", "Hello world")
    file_data = DataConfig(source="x.jsonl")
    assert dialogues.matches(file_data, " A\nb ", "a B")
    assert not dialogues.matches(file_data, "It is 12. Yes.", "It is 12.")


def test_held_out_loss_is_that_of_the_samples():
    resolved = resolved_of()
    params = params_of(resolved)
    thread = arithmetic_conversations(1)[0].messages
    found = [
        *arithmetic_conversations(3, tools=True),
        Conversation(thread, branches=(Branch(3, (assistant("It is not.", "u"),)),)),
    ]
    samples = [pipeline.samples_of(resolved, conversation) for conversation in found]
    loss, weight = evaluate.held_out_loss(resolved, params, samples)
    wanted_loss, wanted_weight = {}, {}
    for conversation, own in zip(found, samples, strict=True):
        for sample in own:
            depth = dialogues.depths_of(conversation.threads()[sample.thread])[sample.message]
            nll = _nll(resolved, params, sample.tokens)[sample.prompt_length - 1 :]
            wanted_loss[depth] = wanted_loss.get(depth, 0.0) + float(nll.sum())
            wanted_weight[depth] = wanted_weight.get(depth, 0) + len(nll)
    assert weight == wanted_weight
    assert list(loss) == sorted(wanted_loss)
    for depth, value in loss.items():
        assert value == pytest.approx(wanted_loss[depth], rel=1e-5)


def _nll(resolved, params, tokens) -> np.ndarray:
    """Per token from the second on, from one plain causal pass over real tokens only."""
    padded = np.zeros(1024, np.int32)
    padded[: len(tokens)] = tokens
    logits = np.asarray(_logits(resolved.model, params, padded), np.float64)
    logits = logits[: len(tokens) - 1, : resolved.valid_vocab]
    picked = logits[np.arange(len(tokens) - 1), tokens[1:]]
    return np.log(np.exp(logits).sum(1)) - picked


def _logits(config, params, tokens):
    def run(params, tokens):
        context = contexts.Training(Visibility.causal(1, len(tokens)), implementation="reference")
        positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
        states, _ = transformer.hidden(config, params, tokens[None], positions, context)
        return transformer.logits(config, params, states[0])

    return jax.jit(run)(params, tokens)


def test_run_evaluates_the_newest_checkpoint(tmp_path):
    config = Config(
        model=TINY,
        data=DataConfig(max_turns=2, eval_conversations=3),
        train=TrainConfig(steps=1, batch_size=4),
        sampling=SamplingConfig(max_new_tokens=4),
    )
    workdir = Workdir(tmp_path)
    with pytest.raises(UserError, match="not a workdir"):
        evaluate.run(config, workdir)
    training.run(config, workdir)
    result, transcripts = evaluate.run(config, workdir)
    assert [row["depth"] for row in result["rows"]] == [1, 2]
    assert (result["step"], result["n"], len(transcripts)) == (1, 6, 3)
    assert 4 < result["loss"] < 8  # about uniform over the bytes: ln 267 is 5.6
    again, _ = evaluate.run(
        dataclasses.replace(config, data=dataclasses.replace(config.data, policy="preserved")),
        workdir,
    )
    assert again["setting"] == "preserved, greedy"
    rows = workdir.rows("eval.jsonl")
    assert [row["depth"] for row in rows] == [1, 2, 1, 2]
    for row in rows:
        assert row["method"] == "tree"
        assert row["n"] == 3
        assert row["prefill_ms"] > 0
        assert row["token_ms_p50"] <= row["token_ms_p95"]
