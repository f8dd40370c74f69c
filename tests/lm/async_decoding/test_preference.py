# SPDX-License-Identifier: Apache-2.0
"""Rounds of preference optimisation with a scripted decoder: pairs, loss, resuming, refusals."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, sharding, train, transformer
from lm.async_decoding import (
    bonbon,
    critical_path,
    language,
    layout,
    pairs,
    preference,
    quality,
    requests,
    runs,
    simulate,
    training,
)
from lm.async_decoding.config import PreferenceConfig, RunConfig, ThreadConfig
from lm.async_decoding.language import Program, Promise, Sync, Text
from lm.async_decoding.requests import RequestConfig
from lm.config import DataConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from lm.data import packing
from lm.errors import RunError, UserError
from lm.workdir import Workdir
from tests.lm.async_decoding import scripted

MODEL = ModelConfig(num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
CONFIG = RunConfig(
    model=MODEL,
    data=DataConfig(
        source="requests", tokenizer="bpe:400", seq_len=256, limit=8, eval_conversations=3
    ),
    train=TrainConfig(batch_size=4, steps=1, checkpoint_every=2, log_every=1),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    requests=RequestConfig(
        kinds=("sums",), min_parts=3, max_parts=3, min_steps=1, max_steps=1, fields=2, max_number=9
    ),
)
make_mesh = sharding.make
OWN = PreferenceConfig(
    rounds=2,
    prompts=4,
    samples=4,
    alpha=0.01,
    learning_rate=2e-4,
    prompts_at_once=2,
    quality_weight=2.0,
    beta=0.5,
)


def variants(prompt):
    """Answers to a request: as annotated, without threads, with a wrong part, and malformed."""
    parts = requests.parts_of(prompt)
    lines = [part.line for part in parts]
    right = requests.program_of(parts)
    wrong = dataclasses.replace(right, threads=("A: nothing.\n", *right.threads[1:]))
    broken = language.to_text(right).replace("<sync/>", "") + language.PROMISE
    return [
        language.to_text(language.plain("".join(lines))),
        language.to_text(right),
        language.to_text(wrong),
        broken,
    ]


class Decoder:
    """Gives `variants` in turn; counts prompts, and stops after `most` calls."""

    def __init__(self, order=(0, 1, 2, 3), most=10**9):
        self.order, self.most = order, most
        self.prompts, self.calls, self.policies = 0, 0, []

    def __call__(self, run, params, temperature):
        tokenizer = run.setup.tokenizer
        end = training.end_of_turn(run.setup.template, tokenizer)
        self.policies.append((temperature, train.params_sha256(params)))

        def draw(prompts, seed):
            self.calls += 1
            if self.calls > self.most:
                raise KeyboardInterrupt
            self.prompts += len(prompts)
            chosen = itertools.cycle(self.order) if temperature else itertools.repeat(1)
            return [self._answer(p, next(chosen), tokenizer, end) for p in prompts]

        return draw

    def _answer(self, prompt, which, tokenizer, end):
        text = variants(prompt)[which]
        if which < 3:
            return scripted.answer_of(prompt, text, tokenizer, end)
        ids = np.append(tokenizer.encode("oh"), language.tag_ids(tokenizer)[language.SYNC])
        one = scripted.Thread(ids.astype(np.int32), 0, np.arange(1, len(ids) + 1))
        return scripted.raw_answer(prompt, [one], tokenizer, finished=False)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Meshes are another test: programs of one device compile faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    training.run(CONFIG, Workdir(path))
    return path


def config_of(start, **values):
    own = dataclasses.replace(OWN, **values)
    return dataclasses.replace(
        CONFIG,
        threads=ThreadConfig(stage="preference"),
        preference=own,
        init_from=str(start),
        data=dataclasses.replace(CONFIG.data, tokenizer="auto"),
        optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
        train=dataclasses.replace(CONFIG.train, epochs=16),
    )


def alone(run, params, asked, answer):
    """An answer's log-probability from a row of its own."""
    tokenizer, template = run.setup.tokenizer, run.setup.template
    prompt = quality.encode_prompt(asked.prompt, template, tokenizer)
    made = pairs.layout_of(
        pairs.program_of(answer, prompt, tokenizer, tokenizer.stop_ids), "predicted"
    )
    (row,) = packing.pack([made], 256)
    execution = losses.Execution(valid_vocab=run.setup.valid_vocab)
    batch = train.to_device(packing.stack([row]), None)
    return float(_log_probs(run.setup.model, execution, params, batch).sum())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probs(model, execution, params, batch):
    return losses.edge_log_probs(model, params, batch, execution)


def test_rounds_prefer_what_scores_best_and_resume(start, tmp_path):
    config, decoder = config_of(start), Decoder()
    whole = preference.run(config, Workdir(tmp_path / "a"), decoder)
    first = tmp_path / "a" / "round_1"
    chosen = pairs.loads((first / "pairs.jsonl").read_text())
    # right and parallel wins; what is cut off has no right part, and is short: worst at lambda 2
    # unless the speed of two tokens outweighs it
    assert len(chosen) == 4
    run, params = runs.load(start)
    rows = Workdir(first).rows("samples.jsonl")[1:]
    order = np.random.default_rng(0).permutation(8)
    asked = quality.questions(runs.conversations(config))
    tokenizer = run.setup.tokenizer
    for pair, row in zip(chosen, rows, strict=True):
        question = asked[order[pair.prompt]]
        answers = [
            pairs.from_record(question.prompt, one, tokenizer, tokenizer.stop_ids)
            for one in row["answers"]
        ]
        length = len(tokenizer.encode(question.reference)) + 1
        scores = [
            critical_path.speedup(length, a.steps) + 2 * requests.quality(a.prompt, a.text)
            for a in answers
        ]
        assert pair.best == max((0, 1, 2), key=scores.__getitem__)
        assert pair.worst == min(range(4), key=scores.__getitem__)
        for index, reference in zip((pair.best, pair.worst), pair.reference, strict=True):
            np.testing.assert_allclose(
                alone(run, params, question, answers[index]), reference, rtol=1e-5
            )
    metrics = Workdir(first).rows("metrics.jsonl")
    assert metrics[0]["gap"] == pytest.approx(0, abs=1e-3)
    assert metrics[-1]["gap"] == pytest.approx(1 / OWN.beta, abs=1.0)  # what IPO aims at
    assert metrics[-1]["loss_per_token"] < metrics[0]["loss_per_token"]
    # the policy of round 2 is what round 1 trained, not where it started
    sampled = [digest for temperature, digest in decoder.policies if temperature]
    assert sampled[0] == train.params_sha256(params)
    assert sampled[1] == train.params_sha256(runs.load(first)[1])
    assert len(set(sampled)) == 2
    assert runs.newest(tmp_path / "a") == tmp_path / "a" / "round_2"

    # stopped while sampling in round 2: nothing is drawn twice, and the end is the same
    stopped, place = Decoder(most=5), Workdir(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        preference.run(config, place, stopped)
    rest = Decoder()
    again = preference.run(config, place, rest)
    assert stopped.prompts + rest.prompts == decoder.prompts
    assert train.params_sha256(again.state.params) == train.params_sha256(whole.state.params)
    after = Decoder()
    done = preference.run(config, Workdir(tmp_path / "a"), after)
    assert after.calls == 0
    assert train.params_sha256(done.state.params) == train.params_sha256(whole.state.params)

    rows = Workdir(tmp_path / "a").rows("eval.jsonl")
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert {row["quality"] for row in rows} == {1.0}
    assert rows[0]["hypervolume"] == pytest.approx(rows[0]["speedup_critical_path"] - 1)
    assert rows[1]["skipped"] == {"sample malformed": 4}
    other = config_of(start, samples=3)
    (tmp_path / "a" / "round_2" / "done.json").unlink()
    with pytest.raises(UserError, match=r"holds samples of other settings \(samples\)"):
        preference.run(other, Workdir(tmp_path / "a"), Decoder())


def test_pairs_of_another_lambda_are_not_trained_on(start, tmp_path):
    place = Workdir(tmp_path / "a")
    preference.run(config_of(start, rounds=1), place, Decoder())
    with pytest.raises(UserError, match=r"rounds of other settings \(preference.quality_weight\)"):
        preference.run(config_of(start, rounds=1, quality_weight=0.5), place, Decoder())
    half = place.path / "round_2" / "checkpoints"
    half.mkdir(parents=True)  # killed before it saved anything
    assert runs.newest(place.path) == place.path / "round_1"


def test_samples_of_another_start_are_not_taken(start, tmp_path):
    """With adapters, what is trained begins the same on every model."""
    seeded = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=1))
    training.run(seeded, Workdir(tmp_path / "other"))
    config, place = config_of(start, rounds=1), Workdir(tmp_path / "a")
    adapters = dataclasses.replace(config.model, lora=LoraConfig(rank=2))
    config = dataclasses.replace(config, model=adapters)
    with pytest.raises(KeyboardInterrupt):
        preference.run(config, place, Decoder(most=1))
    other = dataclasses.replace(config, init_from=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"holds samples of other settings \(policy\)"):
        preference.run(other, place, Decoder())


def test_a_row_after_one_that_a_kill_cut_short(tmp_path):
    place = Workdir(tmp_path)
    place.append("eval.jsonl", {"round": 0})
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"round": 1, "qua')
    place.append("eval.jsonl", {"round": 2})
    place.append("eval.jsonl", {"round": 3})
    assert [row["round"] for row in place.rows("eval.jsonl")] == [0, 2, 3]


def test_what_gives_no_pair_is_counted(start, tmp_path):
    with pytest.raises(RunError, match="gives a pair: 2 x prompt malformed, 8 x sample malformed"):
        preference.run(config_of(start, prompts=2), Workdir(tmp_path / "a"), Decoder(order=(3,)))
    with pytest.raises(RunError, match="no prompt gives a pair: 2 x prompt tied"):
        preference.run(config_of(start, prompts=2), Workdir(tmp_path / "b"), Decoder(order=(0,)))


def test_a_sequential_run_gives_the_lengths(start, tmp_path):
    config = config_of(start, prompts=2, baseline=str(start))
    with pytest.raises(RunError, match="tied"):
        preference.run(config, Workdir(tmp_path), Decoder(order=(0,)))
    rows = Workdir(tmp_path).rows("baseline.jsonl")
    assert rows[0]["baseline"] == str(start)
    assert len(rows) == 1 + 3 + 2  # held out, and asked in training
    question = quality.questions(runs.conversations(config, "validation"))[0]
    run, _ = runs.load(start)
    tokenizer, end = run.setup.tokenizer, run.setup.tokenizer.token_id("<|im_end|>")
    text = variants(question.prompt)[1]
    parallel = scripted.answer_of(question.prompt, text, tokenizer, end)
    assert rows[1]["tokens"] == parallel.decoded
    longer = dataclasses.replace(config.sampling, max_new_tokens=99)
    shutil.rmtree(tmp_path / "round_1")
    with pytest.raises(UserError, match=r"baseline.jsonl is of another sampling"):
        preference.run(
            dataclasses.replace(config, sampling=longer), Workdir(tmp_path), Decoder(order=(0,))
        )


def test_a_trained_run_stays_what_it_is(start, tmp_path):
    before = (start / "config.json").read_text()
    elsewhere = config_of(start, rounds=1)
    with pytest.raises(UserError, match="holds a trained run: take another --workdir"):
        preference.run(elsewhere, Workdir(start), Decoder())
    with pytest.raises(UserError, match="init_from is the workdir itself"):
        training.run(dataclasses.replace(CONFIG, init_from=str(start)), Workdir(start))
    assert (start / "config.json").read_text() == before
    assert not (start / "round_1").exists()
    (tmp_path / "round_1").mkdir()
    with pytest.raises(UserError, match="holds rounds of preference optimisation"):
        training.run(CONFIG, Workdir(tmp_path))


def test_rounds_go_on_as_they_began(start, tmp_path):
    """Also where no pair was chosen yet, and where a kill came among prompts drawn together."""
    config, place = config_of(start, rounds=1), Workdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        preference.run(config, place, Decoder(most=2))
    assert not list(tmp_path.glob("round_1/pairs.jsonl"))
    with pytest.raises(UserError, match=r"rounds of other settings \(preference.quality_weight\)"):
        preference.run(config_of(start, rounds=1, quality_weight=8.0), place, Decoder())
    samples = tmp_path / "round_1" / "samples.jsonl"
    rows = samples.read_text().splitlines(keepends=True)
    assert len(rows) == 1 + 2
    samples.write_text("".join(rows[:2]))  # one of two prompts
    rest = Decoder()
    preference.run(config, place, rest)
    assert samples.read_text().splitlines(keepends=True)[:3] == rows


def loss_by_hand(found, reference, alpha, beta):
    gap = (found[0] - found[1]) - (reference[0] - reference[1])
    return -alpha * found[0] + (1 - alpha) * (gap - 1 / beta) ** 2


def rows_of_pairs(count, seed):
    """Random programs in pairs, as rows, with random reference log-probabilities."""
    rng = np.random.default_rng(seed)
    made = [
        layout.layout_of(
            simulate.random_program(rng, vocabulary=60, size=3, blocks=2), "fork_join_max"
        )
        for _ in range(2 * count)
    ]
    both = list(zip(made[::2], made[1::2], strict=True))
    size = max(a.length + b.length for a, b in both)
    return [pairs.row_of(a, b, tuple(rng.normal(size=2)), size) for a, b in both]


def test_the_loss_is_the_formula_and_a_mesh_changes_nothing():
    model = dataclasses.replace(MODEL, vocab_size=64)
    own = PreferenceConfig(alpha=0.3, beta=0.25)
    batch = pairs.stacked(rows_of_pairs(3, 0), 4)
    params = transformer.init(model, jax.random.key(0))

    def value(mesh):
        compute = bonbon.objective(model, losses.Execution(mesh), own)
        placed = params if mesh is None else jax.device_put(params, mesh.params(params))
        run = jax.jit(jax.value_and_grad(compute, has_aux=True))
        (total, sums), grads = run(placed, train.to_device(batch, mesh), jax.random.key(0))
        return total, sums, jax.device_get(grads)

    total, sums, grads = value(None)
    found = bonbon.sums_of(model, params, train.to_device(batch, None), losses.Execution())
    by_hand = sum(
        loss_by_hand(np.asarray(found[i], np.float64), batch["reference"][i], 0.3, 0.25)
        for i in range(3)
    )
    np.testing.assert_allclose(-total, by_hand, rtol=1e-5)
    assert float(sums["weight"]) == 3
    means = bonbon.metrics("per_token")(sums)
    np.testing.assert_allclose(means["loss_per_token"], by_hand / 3, rtol=1e-5)
    meshed = value(make_mesh(MeshConfig(2, 1, 2), model, jax.devices()))
    np.testing.assert_allclose(meshed[0], total, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), meshed[2], grads
    )
    assert jnp.isfinite(total)


def test_settings_that_contradict_are_refused(start):
    for values, reason in (
        ({"samples": 1}, "a best and a worst"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"speed": "warp"}, "is not one of critical_path, parallelism"),
        ({"temperature": 0.0}, "samples must differ"),
    ):
        with pytest.raises(UserError, match=reason):
            PreferenceConfig(**values)
    staged = ThreadConfig(stage="preference")
    with pytest.raises(UserError, match="set init_from"):
        RunConfig(threads=staged)
    for threads in (
        dataclasses.replace(staged, form="apar"), dataclasses.replace(staged, positions="oracle")
    ):  # fmt: skip
        with pytest.raises(UserError, match="is not one of"):
            RunConfig(threads=threads, init_from="x")
    assert preference.weight_name(float("inf")) == "inf"
    assert json.dumps(preference.weight_name(2.0)) == "2.0"


def test_a_dependent_part_may_not_be_promised_for_free():
    """The score of a sample is of what it says: a plan whose conclusion is guessed loses points."""
    program = Program(
        (Promise("A", 10), Text("B: pen 1, tea +1 = 2. B is 2.\n"), Sync(), Text("Most: B.\n")),
        ("A: cap 3, nut +1 = 4. A is 4.\n",),
    )
    prompt = "Count, then name the most.\nA: cap 3, nut +1\nB: pen 1, tea +1"
    answer = scripted.answer_of(prompt, language.to_text(program))
    scorer = quality.scorer("requests")
    assert scorer(quality.Question(prompt), answer.assembly) == pytest.approx(2 / 3)
