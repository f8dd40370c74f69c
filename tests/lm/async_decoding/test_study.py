# SPDX-License-Identifier: Apache-2.0
"""The recipe in calls that end early: nothing is done twice, and little must survive a machine."""

import collections
import dataclasses
import itertools
import json
import math
import shutil

import pytest

from lm import sharding, studies
from lm.async_decoding import (
    baselines,
    evaluate,
    preference,
    requests,
    runs,
    samplers,
    speaking,
    study,
    training,
)
from lm.async_decoding.config import ThreadConfig
from lm.errors import UserError
from lm.stages import Clock
from lm.workdir import Workdir
from tests.lm.async_decoding import scripted
from tests.lm.async_decoding.test_preference import CONFIG as BASE
from tests.lm.async_decoding.test_preference import OWN, Decoder

CONFIG = dataclasses.replace(BASE, preference=OWN)
QUESTIONS, SAMPLES = CONFIG.data.eval_conversations, OWN.prompts * OWN.samples
TIMED = 2
SFT = {"sft": ("plain", "predicted"), "forms": ("best", "sot"), "schemes": ("oracle",)}


class Counted:
    """What was trained, and how many prompts were answered, by model or lambda."""

    def __init__(self):
        self.trained: list[str] = []
        self.answered: collections.Counter[str] = collections.Counter()


def in_a_row(speaker, prompts, sampling, seed):
    end, found = speaker.tokenizer.token_id("<|im_end|>"), []
    for prompt in prompts:
        text = "".join(part.line for part in requests.parts_of(prompt))
        found.append(scripted.answer_of(prompt, text, speaker.tokenizer, end))
    return found


@pytest.fixture
def counted(monkeypatch):
    """Trains two small models and a lambda; answers are scripted."""
    found, train = Counted(), training.run

    def trained(config, workdir):
        found.trained.append(workdir.path.name)
        return train(config, workdir)

    def decoder(config, threads, batch):
        weight = config.preference.quality_weight
        # under an infinite lambda all samples are alike
        decode = Decoder((0,) if math.isinf(weight) else (0, 1, 2, 3))

        def make(run, params, temperature):
            draw = decode(run, params, temperature)
            name = f"samples {weight:g}" if temperature else f"greedy {threads}, {batch}"

            def counting(prompts, seed):
                found.answered[name] += len(prompts)
                return draw(prompts, seed)

            return counting

        return make

    monkeypatch.setattr(sharding, "make", lambda *_, **__: None)
    monkeypatch.setattr(study, "_SFT", SFT)
    monkeypatch.setattr(study, "_FIRST", 1)
    monkeypatch.setattr(training, "run", trained)
    monkeypatch.setattr(samplers, "decoder", decoder)
    for name in ("plain_answers", "sot_answers"):
        monkeypatch.setattr(baselines, name, in_a_row)
    return found


def run(path, monkeypatch, checks=10**9, **options):
    """A call whose time is up after so many looks at the clock."""
    looks = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "left", lambda self: 1e6 if next(looks) <= checks else -1)
        return study.run(CONFIG, Workdir(path), (2.0, math.inf), timed=TIMED, **options)


def test_a_study_in_pieces(tmp_path, counted, monkeypatch):
    # looks at the clock: before a model, twice around its training, before every batch of answers
    found = run(tmp_path, monkeypatch, (5 + 1 + TIMED) + (3 + 1 + 1))
    assert (found["stage"], found["done"]) == ("sft", False)
    assert [row["name"] for row in found["rows"]] == ["plain"]
    assert counted.trained == ["base", "plain", "predicted"]
    # another machine: weights, rows and answers are all there is
    shutil.rmtree(tmp_path / "runs")
    assert run(tmp_path, monkeypatch, stage="sft")["done"]
    assert counted.trained == ["base", "plain", "predicted"]
    assert counted.answered[f"greedy 8, {study.BATCH}"] == QUESTIONS
    assert counted.answered["greedy 8, 1"] == 2 * TIMED  # each twice, in two calls
    assert {one.name for one in (tmp_path / "weights").iterdir()} == {"base", "predicted"}
    loaded, _ = runs.load(tmp_path / "weights" / "predicted")
    assert evaluate.form_of(tmp_path / "weights" / "predicted") == "async"
    speaker, threads = speaking.load(tmp_path / "weights" / "predicted", hf=False)
    assert threads == loaded.config.threads
    assert speaker.valid_vocab == loaded.setup.valid_vocab
    vocab = loaded.setup.tokenizer.vocab_size
    assert loaded.setup.valid_vocab == vocab < loaded.setup.model.vocab_size

    calls = 1
    while not run(tmp_path, monkeypatch, 4, stage="preference")["done"]:
        calls += 1
    assert calls > 2
    assert counted.answered["samples 2"] == OWN.rounds * SAMPLES
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "weights" / "base")  # sot needs it again, a lambda does not
    run(tmp_path, monkeypatch, stage="lambdas")
    assert counted.trained == ["base", "plain", "predicted"]
    result = run(tmp_path, monkeypatch)
    assert (result["stage"], result["done"]) == ("plot", True)
    assert counted.trained == ["base", "plain", "predicted", "base", "best", "sot", "oracle"]
    assert counted.answered["samples 2"] == OWN.rounds * SAMPLES
    names = [row["name"] for row in result["rows"]]
    assert names == ["plain", "predicted", "lambda_2", "best", "sot"]
    assert result["rows"][2]["lambda"] == 2
    assert result["held_out_loss"].keys() == {"predicted", "oracle"}
    assert result["no_pairs"].keys() == {"lambda_inf"}
    area = result["hypervolume"]["speedup_critical_path"]
    assert area.keys() == {"predicted", "lambdas", "best", "sot"}
    assert area["lambdas"] == pytest.approx(result["rows"][2]["speedup_critical_path"] - 1)
    assert result["dominated"]["speedup_critical_path"] == dict.fromkeys(
        ("predicted", "best", "sot"), True
    )
    names = {path.rpartition("/")[2] for path in result["plots"]}
    assert {"front_critical_path.png", "front_wall.png", "front_by_round.png"} < names
    assert {"timeline_async_predicted.png", "timeline_async_predicted_lambda_2.png"} < names

    kept = Workdir(tmp_path).rows("eval.jsonl")
    losses = [row for row in kept if row["kind"] == "held_out"]
    assert losses[0]["tokens"] == losses[1]["tokens"] > 0
    (last,) = [row for row in kept if row["kind"] == evaluate.KIND and row["name"] == "lambda_2"]
    assert last["round"] == OWN.rounds
    assert (last["n"], last["timed"]) == (QUESTIONS, TIMED)
    methods = {row["name"]: row["method"] for row in kept if row["kind"] == evaluate.KIND}
    assert methods["best"] == f"{methods['predicted']}, best annotations"
    assert last["realised"] > 0 < last["speedup_wall"]
    again = run(tmp_path, monkeypatch)
    assert again == result
    assert len(Workdir(tmp_path).rows("eval.jsonl")) == len(kept)
    assert len(counted.trained) == 7
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=2))
    with pytest.raises(UserError, match="plain was made by another config"):
        study.run(other, Workdir(tmp_path))


def test_the_last_round_with_pairs_is_measured(tmp_path, counted, monkeypatch):
    """A round without pairs ends a lambda with what the one before left."""
    work = studies.Study(Workdir(tmp_path), Clock())
    recipe = study._Recipe(CONFIG, (2.0,))

    def stopped(config, folder, make, clock):
        place = folder.path / "round_1"
        base = str(work.weights("base"))
        training.run(recipe.config_of("predicted", base), Workdir(place))
        file = place / "config.json"
        values = json.loads(file.read_text())
        values["threads"]["stage"] = "preference"
        file.write_text(json.dumps(values | {"init_from": config.init_from}))
        raise preference.NoPairs("round 2: no prompt gives a pair")

    monkeypatch.setattr(preference, "run", stopped)
    recipe.measure("sft", work)
    recipe.measure("preference", work)
    rows = [row for row in work.workdir.rows("eval.jsonl") if row["name"] == "lambda_2"]
    assert [(row["kind"], row["round"]) for row in rows] == [("training", 1), ("async", 1)]
    assert not (tmp_path / "weights" / "lambda_2").exists()


def test_lambdas_share_the_first_samples(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(study, "_FIRST", 2)
    study.run(CONFIG, Workdir(tmp_path), (2.0, 8.0), "sft")
    assert study.run(CONFIG, Workdir(tmp_path), (2.0, 8.0), "preference")["done"]
    assert counted.answered["samples 2"] == OWN.rounds * SAMPLES
    assert counted.answered["samples 8"] == (OWN.rounds - 1) * SAMPLES


def test_other_forms_learn_from_the_best_annotations():
    asked = dataclasses.replace(CONFIG.requests, annotators=("half", "all"))
    recipe = study._Recipe(dataclasses.replace(CONFIG, requests=asked), (2.0,))
    assert recipe.config_of("predicted").requests == asked
    assert recipe.config_of("lambda_2").requests == asked
    for name in ("best", "sot"):
        assert recipe.config_of(name).requests == CONFIG.requests
    best, own = recipe.config_of("best"), recipe.config_of("predicted")
    assert dataclasses.replace(best, requests=own.requests) == own


def test_refusals(tmp_path, counted):
    workdir = Workdir(tmp_path)
    for stage in ("preference", "forms", "lambdas", "schemes"):
        with pytest.raises(UserError, match="--stage=sft comes first"):
            study.run(CONFIG, workdir, stage=stage)
    with pytest.raises(UserError, match="--stage='decode' is not one of"):
        study.run(CONFIG, workdir, stage="decode")
    with pytest.raises(UserError, match="--minutes=0 must be above 0"):
        study.run(CONFIG, workdir, minutes=0)
    for lambdas, reason in (((), "at least one"), ((2.0, 2.0), "must differ"), ((-1.0,), "weight")):
        with pytest.raises(UserError, match=reason):
            study.run(CONFIG, workdir, lambdas)
    with pytest.raises(UserError, match="--timed"):
        study.run(CONFIG, workdir, timed=0)
    staged = ThreadConfig(stage="preference")
    with pytest.raises(UserError, match=r"config\.stage must be sft"):
        study.run(dataclasses.replace(CONFIG, threads=staged, init_from="x"), workdir)
    model = dataclasses.replace(CONFIG.model, qk_norm=True, norm_plus_one=True)
    with pytest.raises(UserError, match="no Hugging Face architecture holds this model"):
        study.run(dataclasses.replace(CONFIG, model=model), workdir)
    assert counted.trained == []
