# SPDX-License-Identifier: Apache-2.0
"""Training documents: trees that train what separate samples would, bounded, resumable; and runs
that go on bit for bit."""

import dataclasses
import random
import shutil

import jax
import numpy as np
import pytest

from configs import long_context as presets
from lm import losses, train, transformer
from lm.config import ModelConfig, freeze
from lm.data import documents, packing
from lm.errors import UserError
from lm.long_context import rows, samples, tasks, training
from lm.long_context.config import LongContextConfig, TasksConfig
from lm.text import tokenizers
from lm.workdir import Workdir

BYTES = tokenizers.load_tokenizer("bytes")
ALL = tuple(name for name, task in tasks.TASKS.items() if task.essay != "must")
LONG = TasksConfig(names=ALL, min_length=1000, max_length=9000, text_weight=0.1)
SHORT = TasksConfig(names=("niah_multikey_2", "niah_single_1"), min_length=350, max_length=600)
MODEL = ModelConfig(vocab_size=384, num_layers=1, embed_dim=32, head_dim=8, mlp_dim=48)


def smoke(**overrides):
    """The smoke config, changed: keys are dotted."""
    config = presets.smoke()
    config.model.num_layers, config.model.embed_dim = 1, 32
    config.train.batch_size = 4  # a row for each device
    for name, value in overrides.items():
        section, _, key = name.partition("_")
        config[section][key] = value
    return freeze(config.to_dict(), LongContextConfig)


def seen(layout, row):
    """The rows that a row sees, itself included."""
    keys = np.arange(layout.length)
    return keys[(keys <= row) & (row < layout.until)]


# --- one document


@pytest.mark.parametrize("name", ["niah_multikey_2", "vt", "kv_retrieval", "code_run", "passkey"])
def test_every_branch_is_a_sample_of_its_own(name):
    author = rows.Author(TasksConfig(names=(name,)), BYTES)
    (task,) = author.tasks
    document = author.document(task, random.Random(1), max(task.smallest, 24), 4, 3000)
    assert len(document.questions) == (1 if name == "passkey" else 4)
    made = rows.layout(*author.encode(document), text_weight=0.1)
    rows_of = np.flatnonzero(made.edge_weights == 1)
    start = 0
    for number, question in enumerate(document.questions):
        prompt = document.context + question.text + question.prefix
        whole = BYTES.encode(f"{prompt}{question.answer}<|eos|>")
        answer = len(whole) - len(BYTES.encode(prompt))
        mine = rows_of[start : start + answer]
        start += answer
        assert np.array_equal(made.edge_targets[mine], whole[-answer:])
        assert set(made.edge_turns[mine]) == {number}
        assert made.edge_turn_weights[mine].sum() == pytest.approx(1)
        visible = seen(made, made.edge_children[mine[-1]])  # from the end of the answer
        assert np.array_equal(made.tokens[visible], whole)
        assert np.array_equal(made.positions[visible], np.arange(len(whole)))
        # every token of the sample is predicted from the one before it
        before = dict(zip(made.edge_children.tolist(), made.edge_rows.tolist(), strict=True))
        assert [before[child] for child in visible[1:].tolist()] == visible[:-1].tolist()
    assert start == len(rows_of)
    assert made.edge_weights.min() == pytest.approx(0.1)
    assert made.edge_turn_weights[made.edge_weights < 1].sum() == 0


def test_text_without_weight_is_not_trained():
    context = np.arange(10, 15, dtype=np.int32)
    branches = [(np.array([1, 2]), np.array([3, 0])), (np.array([4]), np.array([5, 6, 0]))]
    made = rows.layout(context, branches, 0.0)
    assert made.tokens.tolist() == [10, 11, 12, 13, 14, 1, 2, 3, 0, 4, 5, 6, 0]
    assert made.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]
    assert made.until.tolist() == [13] * 5 + [9] * 4 + [13] * 4
    assert made.edge_rows.tolist() == [6, 7, 9, 10, 11]
    assert made.edge_targets.tolist() == [3, 0, 5, 6, 0]
    assert made.edge_weights.tolist() == [1] * 5
    trained = rows.layout(context, branches, 0.5)
    assert trained.edge_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 9, 10, 11]
    assert trained.edge_targets.tolist() == [11, 12, 13, 14, 1, 2, 3, 0, 4, 5, 6, 0]


def test_the_model_cannot_tell_a_branch_from_a_sample():
    author = rows.Author(TasksConfig(names=("niah_multikey_2",)), BYTES)
    document = author.document(author.tasks[0], random.Random(2), 3, 3, 500)
    context, branches = author.encode(document)
    tree = rows.layout(context, branches, 0.0)
    alone = [documents.chain(np.concatenate([context, *branch])) for branch in branches]
    params = transformer.init(MODEL, jax.random.key(0))

    of_batch = jax.jit(
        lambda batch: losses.edge_log_probs(MODEL, params, batch, losses.Execution())
    )

    def log_probs(layouts):
        (row,) = packing.pack(layouts, sum(layout.length for layout in alone))
        out = of_batch(train.to_device(packing.stack([row]), None))
        return np.asarray(out[0])[row["edge_targets"] >= 0]

    together, apart = log_probs([tree]), log_probs(alone)
    at, expected = 0, []
    for (_, answer), layout in zip(branches, alone, strict=True):
        at += layout.num_edges
        expected.append(apart[at - len(answer) : at])
    np.testing.assert_allclose(together, np.concatenate(expected), rtol=2e-5, atol=2e-5)


# --- the stream


def test_documents_are_the_same_by_index():
    made, again = (rows.Documents(LONG, 3, BYTES, 12000) for _ in range(2))
    other = rows.Documents(LONG, 4, BYTES, 12000)
    assert repr(made) == repr(again) != repr(other)
    for index in (0, 7, 1 << 30):
        for field in dataclasses.fields(made[index]):
            a, b = getattr(made[index], field.name), getattr(again[index], field.name)
            assert np.array_equal(a, b), field.name
    assert not np.array_equal(made[7].tokens, other[7].tokens)
    assert not np.array_equal(made[7].tokens, made[8].tokens)


def sample_lengths(layout):
    """Of the samples of a document: where the position starts anew, another question ends."""
    ends = np.flatnonzero(np.diff(layout.positions, append=0) < 1)
    return (layout.positions[ends] + 1).tolist()


def test_documents_keep_to_their_lengths():
    made = rows.Documents(LONG, 3, BYTES, 12000)
    lengths, questions = [], []
    for index in range(120):
        layout = made[index]
        assert layout.length <= 12000
        samples_of = sample_lengths(layout)
        assert len(samples_of) == layout.edge_turns.max() + 1
        assert max(samples_of) <= 9000
        lengths.append(max(samples_of))
        questions.append(len(samples_of))
    assert np.histogram(lengths, bins=4, range=(1000, 9000))[0].min() > 10  # spread over the range
    assert max(questions) == LONG.questions
    assert min(questions) == 1


def test_lengths_grow():
    config = dataclasses.replace(SHORT, max_length=1600, growth=400)
    assert rows.longest(config, 0) == 350
    assert rows.longest(config, 200) == 975
    assert rows.longest(config, 400) == rows.longest(config, 10**9) == 1600

    made = rows.Documents(config, 0, BYTES, 2000)
    early = [max(sample_lengths(made[i])) for i in range(20)]
    late = [max(sample_lengths(made[i])) for i in range(400, 420)]
    assert np.mean(early) < 600
    assert max(late) > 1200


def test_the_bound_doubles_in_as_many_tokens_each_time():
    config = dataclasses.replace(
        SHORT, min_length=100, max_length=1600, growth=100_000, pace="doublings"
    )
    bounds = np.array([rows.longest(config, n) for n in range(config.growth + 1)])
    tokens = np.cumsum(bounds)
    ends = [tokens[np.searchsorted(bounds, 2**n * 100)] for n in range(1, 5)]
    spent = np.diff([0, *ends])
    assert bounds[0] == 100
    assert bounds[-1] == 1600
    assert spent.max() < 1.02 * spent.min()


def test_a_stream_goes_on_from_where_it_was():
    options = {"seed": 1, "seq_len": 800, "window": 4}
    whole = iter(rows.rows(SHORT, BYTES, **options))
    first = [next(whole) for _ in range(7)]
    state = whole.get_state()
    rest = [next(whole) for _ in range(7)]
    again = iter(rows.rows(SHORT, BYTES, **options))
    again.set_state(state)
    for expected, row in zip(rest, again, strict=False):
        assert all(np.array_equal(expected[name], row[name]) for name in expected)
    assert packing.statistics(whole)["answers"] >= packing.statistics(whole)["documents"] > 10
    # two processes share the documents
    halves = [iter(rows.rows(SHORT, BYTES, **options, process=(i, 2))) for i in range(2)]
    assert not np.array_equal(next(halves[0])["tokens"], next(halves[1])["tokens"])
    assert len({row["tokens"].tobytes() for row in first + rest}) == 14


def test_training_never_sees_a_sample_of_evaluation():
    made = rows.Documents(SHORT, 0, BYTES, 800)
    seen_texts = "".join(BYTES.decode(made[i].tokens) for i in range(50))
    for sample in samples.samples(tasks.find("niah_multikey_2"), 600, 5, 0, BYTES):
        assert sample.outputs[0] not in seen_texts


# --- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, with its checkpoints at 4 and 8."""
    path = tmp_path_factory.mktemp("finished") / "run"
    config = smoke(train_steps=8, train_checkpoint_every=4, data_tokenizer="bpe:500")
    return path, config, training.run(config, Workdir(path))


def test_a_run_learns(finished):
    path, _, result = finished
    metrics = Workdir(path).rows("metrics.jsonl")
    assert result.step == 8
    assert metrics[-1]["loss_per_turn"] < 0.9 * metrics[0]["loss_per_turn"]
    assert Workdir(path).config(LongContextConfig).tasks.names == ("niah_single_1", "passkey")


def test_a_run_goes_on_bit_for_bit(finished, tmp_path):
    path, config, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    newest = max((copy / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    assert newest.name == "8"
    shutil.rmtree(newest)
    again = training.run(config, Workdir(copy))
    assert train.params_sha256(again.state.params) == train.params_sha256(result.state.params)
    assert again.loss == result.loss


def test_the_tokenizer_is_learnt_from_the_tasks_and_kept(finished):
    path, config, _ = finished
    resolved = training.resolve(config, path / "tokenizer")
    fresh = training.resolve(config)
    assert resolved.tokenizer.fingerprint == fresh.tokenizer.fingerprint
    text = "One of the special magic numbers for 1234567"
    assert len(fresh.tokenizer.encode(text)) < 0.8 * len(text)
    assert len(fresh.tokenizer.encode("1234567")) == 7


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"data_source": "arithmetic"}, "data.source=arithmetic"),
        ({"data_limit": 5}, "data.limit"),
        ({"train_steps": 0}, "set train.steps"),
        ({"train_weighting": "per_turn"}, "tasks.text_weight=0"),
        ({"train_verify_every": 2}, "verify_every"),
        ({"data_tokenizer": "bpe:many"}, "takes a number"),
        ({"data_tokenizer": "bpe:100"}, "too small"),
        ({"tasks_names": ("nope",)}, "unknown task 'nope'"),
        ({"tasks_names": ("niah_single_2",)}, "set tasks.haystack"),
        ({"tasks_haystack": __file__}, "no task of tasks.names takes"),
        ({"tasks_max_length": 1000}, "exceeds rows of data.seq_len"),
        ({"tasks_names": ("vt",)}, "too short for vt"),
    ],
)
def test_what_cannot_be_trained_is_refused(overrides, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        training.run(smoke(**overrides), Workdir(tmp_path / "run"))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_hold_together(name, monkeypatch):
    monkeypatch.setattr(training, "_BPE_DOCUMENTS", 50)
    config = freeze(presets.get_config(name).to_dict(), LongContextConfig)
    training.check(config)
    assert config.tasks.max_length <= config.data.seq_len
    resolved = training.resolve(config)
    made = rows.Documents(config.tasks, 0, resolved.tokenizer, config.data.seq_len)
    assert made[0].length <= config.data.seq_len


def test_a_checkpoint_keeps_its_tokenizer(finished, tmp_path):
    path, config, _ = finished
    onwards = dataclasses.replace(config, init_from=str(path))
    with pytest.raises(UserError, match=r"data.tokenizer=auto"):
        training.run(onwards, Workdir(tmp_path / "run"))
    data = dataclasses.replace(config.data, tokenizer="auto")
    resolved = training.resolve(dataclasses.replace(onwards, data=data))
    kept = training.resolve(config, path / "tokenizer")
    assert resolved.tokenizer.fingerprint == kept.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"names": ()}, "names is empty"),
        ({"min_length": 0}, "min_length"),
        ({"min_length": 600}, "below tasks.min_length"),
        ({"text_weight": 1.5}, "text_weight"),
        ({"growth": -1}, "growth"),
        ({"pace": "slow"}, "pace"),
        ({"questions": 0}, "questions"),
        ({"eval_lengths": (0,)}, "eval_lengths"),
        ({"eval_samples": 0}, "eval_samples"),
    ],
)
def test_what_makes_no_sense_is_refused(values, reason):
    with pytest.raises(UserError, match=reason):
        TasksConfig(**values)


def test_an_essay_is_trained_on(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("A sentence of the essay. " * 200)
    config = dataclasses.replace(SHORT, names=("niah_single_2",), haystack=str(path))
    made = rows.Documents(config, 0, BYTES, 800)
    text = BYTES.decode(made[0].tokens)
    assert "sentence of the essay" in text
    assert "grass" not in text
    assert max(sample_lengths(made[0])) <= 600
