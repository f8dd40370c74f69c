# SPDX-License-Identifier: Apache-2.0
"""From conversations to rows, and runs: what is trained, resuming bit for bit, meshes, refusals."""

import collections
import dataclasses
import shutil

import jax
import numpy as np
import pytest

from lm import jobs, losses, sharding, train, transformer
from lm.async_decoding import language, layout, programs, requests, runs, simulate, training
from lm.async_decoding.config import AsyncConfig, RunConfig, ThreadConfig
from lm.async_decoding.requests import RequestConfig
from lm.config import (
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from lm.data import packing
from lm.data.layout import EDGE_FIELDS, HIDDEN_FIELDS, ROW_FIELDS
from lm.data.messages import Conversation, Message
from lm.errors import DataError, UserError
from lm.hf import weights
from lm.text import tokenizers
from lm.workdir import Workdir

MODEL = ModelConfig(num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
CONFIG = RunConfig(
    model=MODEL,
    data=DataConfig(source="requests", tokenizer="bpe:400", seq_len=256, limit=40, window=16),
    train=TrainConfig(batch_size=4, steps=6, checkpoint_every=3, log_every=1),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    requests=RequestConfig(
        min_parts=3, max_parts=3, min_steps=1, max_steps=2, fields=2, max_number=9
    ),
)


def with_data(config, **values):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **values))


def with_threads(config, **values):
    return dataclasses.replace(config, threads=ThreadConfig(**values))


@pytest.fixture(scope="module")
def resolved():
    return runs.resolve(CONFIG)


def contexts_of_rows(rows):
    """Every edge of packed rows: what its row sees, by position and token, and its target."""
    found = collections.Counter()
    for row in rows:
        keys = np.arange(len(row["tokens"]))
        for at, target in zip(row["edge_rows"], row["edge_targets"], strict=True):
            if target < 0:
                continue
            seen = (keys <= at) & (at < row["until"])
            if "hidden_from" in row:
                seen &= ~((row["hidden_from"] <= at) & (at < row["hidden_until"]))
            context = sorted(zip(row["positions"][seen], row["tokens"][seen], strict=True))
            found[tuple(map(tuple, np.array(context).tolist())), int(target)] += 1
    return found


@pytest.mark.parametrize("form", ["async", "plain"])
def test_rows_train_what_the_threads_remember(resolved, form):
    config = with_threads(CONFIG, form=form, positions="fork_join_max")
    run = dataclasses.replace(resolved, setup=dataclasses.replace(resolved.setup, config=config))
    source = runs.conversations(CONFIG)
    rows = list(training.rows(run, source))
    expected = collections.Counter()
    tokenizer, template = run.setup.tokenizer, run.setup.template
    end = tokenizer.token_id("<|im_end|>")
    for index in range(len(source)):
        prompt, answer = source[index].messages
        text = template.render([prompt.to_dict(False)], add_generation_prompt=True)
        program = language.recounted(language.parse(answer.content), tokenizer)
        if form == "plain":
            program = language.plain(language.render(program))
        encoded = programs.encode(program, tokenizer.encode(text), tokenizer, end)
        truth = simulate.simulate(encoded)
        standing = simulate.positions(encoded, "fork_join_max")
        for one in truth.values():
            if one.label is not None:
                context = sorted((standing[name], truth[name].token) for name in one.sees)
                expected[tuple(context), one.label] += 1
    assert contexts_of_rows(rows) == expected
    hidden = set(HIDDEN_FIELDS) if form == "async" else set()
    assert {frozenset(row) for row in rows} == {frozenset({*ROW_FIELDS, *EDGE_FIELDS} | hidden)}


def answered(*contents, **fields):
    messages = [
        Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)
    ]
    messages[-1] = dataclasses.replace(messages[-1], **fields)
    return Conversation(tuple(messages), file="file", line=3)


PROGRAM = '<promise topic="t" tokens="10"/><async topic="t">yes</async><sync/>no'


def test_every_answer_is_an_example_and_history_has_no_tags(resolved):
    tokenizer, template = resolved.setup.tokenizer, resolved.setup.template
    conversation = answered("a <sync/>", PROGRAM, "b", "c")
    first, second = training.examples_of(conversation, template, tokenizer)
    assert "a <sync/>" in tokenizer.decode(first.prompt)
    assert "yesno<|im_end|>" in tokenizer.decode(second.prompt)
    tags = set(language.tag_ids(tokenizer).values())
    assert not tags & {*first.prompt.tolist(), *second.prompt.tolist()}
    assert first.program == language.parse(PROGRAM)
    assert second.program == language.plain("c")
    assert training.end_of_turn(template, tokenizer) == tokenizer.token_id("<|im_end|>")


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (answered("a", "b</async>"), "file:3: message 1: at 1: </async> outside of a block"),
        (answered("a", "b<sync/>"), "file:3: message 1: at 1: <sync/> waits for nothing"),
        (answered("a", "b", thought="hm"), "file:3: message 1: a thought"),
    ],
)
def test_what_cannot_be_trained_stops_or_is_counted(resolved, conversation, reason):
    prepared = training.Prepared(resolved, [conversation])
    with pytest.raises(DataError) as caught:
        prepared[0]
    assert str(caught.value).startswith(reason)
    config = with_data(resolved.config, on_error="skip")
    lenient = dataclasses.replace(
        resolved, setup=dataclasses.replace(resolved.setup, config=config)
    )
    group = training.Prepared(lenient, [conversation])[0]
    assert not group.layouts
    assert group.counts == {"malformed": 1}


def test_what_does_not_fit_is_counted_or_cut(resolved):
    def counts(config, content=PROGRAM, prompt="a"):
        setup = dataclasses.replace(resolved.setup, config=config)
        run = dataclasses.replace(resolved, setup=setup)
        return training.Prepared(run, [answered(prompt, content)])[0]

    size = counts(resolved.config).layouts[0].length
    short = with_data(resolved.config, seq_len=size)
    assert counts(short).counts == {"examples": 1}
    dropped = counts(short, prompt="x" * 50)
    assert dropped.counts == {"examples": 1, "overlong": 1}
    assert not dropped.layouts
    (cut,) = counts(with_data(short, overlong="truncate"), prompt="x" * 50).layouts
    assert cut.length == size
    assert cut.positions[0] == 0
    assert counts(with_data(short, overlong="truncate", seq_len=9)).counts["overlong"] == 1
    # 10 promised, 10 * CAP + 1 written: decoding would cut it
    long = PROGRAM.replace("yes", "=" * (10 * language.CAP + 1))
    assert counts(resolved.config, long).counts == {"examples": 1}
    kept = with_threads(resolved.config, recount=False)
    assert counts(kept, long).counts == {"examples": 1, "overrun": 1}
    setup = dataclasses.replace(resolved.setup, config=with_data(kept, on_error="skip"))
    run = dataclasses.replace(resolved, setup=setup)
    source = [answered("a", text) for text in (long, "<sync/>", PROGRAM)]
    ((example, program),) = training.decodable(run, source)
    assert language.render(example.program) == language.render(language.parse(PROGRAM))
    assert not training.overruns(program)
    with pytest.raises(DataError, match="waits for nothing"):
        list(training.decodable(resolved, source))
    assert training.what_was_read({"fill": 0.5, "overrun": 2}) == "rows 50.0% full; 2 overrun"


def test_runs_resume_bit_for_bit(tmp_path):
    first = jobs.result(training.run(CONFIG, Workdir(tmp_path / "a")))
    assert first["step"] == 6
    for newer in (tmp_path / "a" / "checkpoints").glob("6*"):
        shutil.rmtree(newer)
    assert jobs.result(training.run(CONFIG, Workdir(tmp_path / "a"))) == first
    run, params = runs.load(tmp_path / "a")
    assert train.params_sha256(params) == first["params_sha256"]
    assert run.config.threads == CONFIG.threads
    assert run.setup.tokenizer.token_id(language.SYNC) is not None
    assert not run.new_tags

    # the next run starts from it, with its tokens
    after = dataclasses.replace(with_data(CONFIG, tokenizer="auto"), init_from=str(tmp_path / "a"))
    started = runs.resolve(after)
    assert not started.new_tags
    assert started.setup.tokenizer.fingerprint == run.setup.tokenizer.fingerprint
    assert started.setup.model == run.setup.model
    assert train.params_sha256(runs.trained_params(started, None)) == first["params_sha256"]
    other = dataclasses.replace(with_data(after, tokenizer="bpe:300"))
    with pytest.raises(UserError, match=r"data\.tokenizer=auto takes its own"):
        runs.resolve(other)
    # nothing is trained any more: the config stays what was trained
    drawn = dataclasses.replace(CONFIG, sampling=SamplingConfig(temperature=0.5))
    assert jobs.result(training.run(drawn, Workdir(tmp_path / "a"))) == first
    assert runs.load(tmp_path / "a")[0].config.sampling == CONFIG.sampling
    plain = with_threads(CONFIG, form="plain")
    with pytest.raises(UserError, match=r"was trained with another threads\.form"):
        training.run(plain, Workdir(tmp_path / "a"))


def test_tags_are_new_rows_of_an_imported_model(tmp_path):
    tokenizer = tokenizers.load_tokenizer("bytes")
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size + 2, tied_embeddings=True)
    base = transformer.init(model, jax.random.key(3))
    weights.save(tmp_path, model, base, tokenizer=tokenizer)
    config = dataclasses.replace(with_data(CONFIG, tokenizer="auto"), init_from=str(tmp_path))
    run = runs.resolve(config)
    assert run.new_tags
    assert run.setup.model.vocab_size == 384
    assert run.setup.valid_vocab == tokenizer.vocab_size + len(language.TAGS)
    table = np.asarray(runs.trained_params(run, None)["embed"]["table"])
    used = np.asarray(base["embed"]["table"])[: tokenizer.vocab_size]
    np.testing.assert_array_equal(table[: len(used)], used)
    np.testing.assert_allclose(table[len(used) :], used.mean(0)[None].repeat(384 - len(used), 0),
                               atol=1e-6)  # fmt: skip
    adapters = dataclasses.replace(MODEL, lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match="adapters cannot learn new tokens"):
        runs.resolve(dataclasses.replace(config, model=adapters))


def steps(axes):
    """Losses and gradient norms of a few steps on rows with hidden runs."""
    rng = np.random.default_rng(0)
    made = [simulate.random_program(rng, vocabulary=60) for _ in range(30)]
    packed = packing.pack([layout.layout_of(one, "predicted") for one in made], 192)
    batch = packing.stack(packed[:8])
    model = dataclasses.replace(MODEL, vocab_size=64)
    devices = jax.devices()[: np.prod(axes)]
    mesh = sharding.make(MeshConfig(*axes), model, devices)
    objective = train.edge_objective(model, losses.Execution(mesh), "per_token")
    optimizer = train.make_optimizer(OptimizerConfig(warmup_steps=1, eps=1e-4), 10)
    step = jax.jit(train.make_step(objective, optimizer, TrainConfig(batch_size=8), "float32"))
    params = transformer.init(model, jax.random.key(0))
    if mesh is not None:
        params = jax.device_put(params, mesh.params(params))
    state = train.init_state(params, optimizer, 0, mesh)
    seen = []
    for _ in range(2):
        state, sums = step(state, {}, train.to_device(batch, mesh))
        seen.append([train.mean_losses(sums)["loss_per_token"], float(sums["grad_norm"])])
    return seen, training.batch_flops(model, batch)


def test_a_mesh_changes_nothing():
    alone, flops = steps((1, 1, 1))
    together, _ = steps((2, 1, 2))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert flops > 0


def test_hidden_pairs_cost_nothing():
    rng = np.random.default_rng(0)
    program = simulate.random_program(rng)
    made = layout.layout_of(program, "oracle")
    (row,) = packing.pack([made], made.length)
    batch, model = packing.stack([row]), dataclasses.replace(MODEL, vocab_size=64)
    expected = training.training_flops(model, made.length, made.num_edges, made.pairs)
    assert training.batch_flops(model, batch) == expected


def test_settings_that_contradict_are_refused(tmp_path):
    with pytest.raises(UserError, match="stage='dance' is not one of sft"):
        AsyncConfig(stage="dance").run()
    assert AsyncConfig().run() == RunConfig()
    for values in ({"form": "tree"}, {"positions": "late"}):
        with pytest.raises(UserError, match="is not one of"):
            ThreadConfig(**values)
    checked = dataclasses.replace(CONFIG, train=TrainConfig(verify_every=5))
    with pytest.raises(UserError, match="verify_every is not for async decoding"):
        training.run(checked, Workdir(tmp_path))
    small = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=272))
    with pytest.raises(UserError, match="has no room for"):
        runs.resolve(small)
    with pytest.raises(UserError, match="takes a number"):
        runs.resolve(with_data(CONFIG, tokenizer="bpe:big"))
    held_out = runs.conversations(with_data(CONFIG, eval_conversations=5), "all")
    assert [held_out[0]] == [requests.generate(0, 0, CONFIG.requests, "validation")]
