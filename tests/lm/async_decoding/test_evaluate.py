# SPDX-License-Identifier: Apache-2.0
"""Rows and figures of scripted answers: speeds and qualities by hand, nothing answered twice."""

import dataclasses
import json
import math
import pathlib
import shutil
from unittest import mock

import numpy as np
import pytest

from lm import sharding
from lm.async_decoding import baselines, evaluate, figures, language, requests, runs, training
from lm.async_decoding.config import RunConfig
from lm.async_decoding.requests import RequestConfig
from lm.config import Config, DataConfig, ModelConfig, SamplingConfig, TrainConfig
from lm.errors import UserError
from lm.workdir import Workdir
from tests.lm.async_decoding import scripted

CONFIG = RunConfig(
    model=ModelConfig(num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4,
                      mlp_dim=8),
    data=DataConfig(source="requests", tokenizer="bytes", seq_len=512, limit=4,
                    eval_conversations=5),
    train=TrainConfig(batch_size=4, steps=1),
    sampling=SamplingConfig(max_new_tokens=6),
    requests=RequestConfig(kinds=("sums", "plan"), min_parts=3, max_parts=4, min_steps=1,
                           max_steps=1, max_number=9),
)  # fmt: skip


CALLS: list[int] = []  # of the sequential baseline


class Decoder:
    """Answers as annotated; every third answer of threads has a wrong part."""

    def __init__(self):
        self.calls = 0

    def __call__(self, run, params, temperature):
        assert temperature == CONFIG.sampling.temperature
        end = training.end_of_turn(run.setup.template, run.setup.tokenizer)

        def draw(prompts, seed):
            self.calls += 1
            return [self.answer(run, prompt, end) for prompt in prompts]

        return draw

    def answer(self, run, prompt, end):
        program = requests.program_of(requests.parts_of(prompt))
        if len(prompt) % 3 == 0:
            program = dataclasses.replace(program, threads=("A: no.\n", *program.threads[1:]))
        text = language.to_text(program)
        answer = scripted.answer_of(prompt, text, run.setup.tokenizer, end)
        return dataclasses.replace(answer, seconds=answer.steps * 1.25)


def one_thread(speaker, prompts, sampling, seed):
    """The sequential answers, right all of them."""
    CALLS.append(len(prompts))
    end = speaker.tokenizer.token_id("<|im_end|>")
    found = []
    for prompt in prompts:
        program = requests.program_of(requests.parts_of(prompt))
        text = language.to_text(language.plain(language.render(program)))
        answer = scripted.answer_of(prompt, text, speaker.tokenizer, end)
        found.append(dataclasses.replace(answer, seconds=float(answer.steps)))
    return found


def with_threads(path, source, **threads):
    """A run as another one, told apart by what its config says."""
    shutil.copytree(source, path)
    file = path / "config.json"
    values = json.loads(file.read_text())
    values["threads"] |= threads
    file.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Meshes are another test: programs of one device compile faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make", lambda *_, **__: None)
        patch.setattr(baselines, "plain_answers", one_thread)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    training.run(CONFIG, Workdir(path / "async"))
    with_threads(path / "plain", path / "async", form="plain")
    with_threads(path / "sot", path / "async", form="sot")
    round_2 = path / "preferred" / "round_2"
    with_threads(round_2, path / "async", stage="preference")
    values = json.loads((round_2 / "config.json").read_text()) | {"init_from": str(path / "async")}
    values["preference"]["quality_weight"] = math.inf
    (round_2 / "config.json").write_text(json.dumps(values))
    shutil.copy(round_2 / "config.json", path / "preferred")
    return path


def by_hand(name):
    """Qualities, steps and tokens of the scripted answers."""
    decoder, found = Decoder(), []
    for index in range(5):
        prompt = requests.generate(0, index, CONFIG.requests, "validation").messages[0].content
        program = requests.program_of(requests.parts_of(prompt))
        wrong = name == "async" and len(prompt) % 3 == 0
        parts = len(requests.parts_of(prompt))
        found.append(((parts - wrong) / parts, prompt, program))
    assert decoder.calls == 0
    return [quality for quality, _, _ in found]


def test_rows_are_what_the_answers_were(folder):
    paths = [folder / "plain", folder / "async", folder / "preferred"]
    decoder = Decoder()
    rows = evaluate.run(CONFIG, paths, decoder)["rows"]
    # each question twice: the second time is timed
    assert decoder.calls == 2 * 5 * 2
    assert CALLS == [1] * 5 * 2
    sequential, threads, _ = rows
    assert [row["method"] for row in rows] == ["sequential", "async predicted", "async predicted"]
    assert [row["lambda"] for row in rows] == [None, None, "inf"]
    assert [row["round"] for row in rows] == [None, None, 2]
    assert sequential["speedup_critical_path"] == sequential["speedup_wall"] == 1
    assert sequential["quality"] == 1
    assert threads["quality"] == pytest.approx(np.mean(by_hand("async")))
    assert threads["quality_difference"] == pytest.approx(threads["quality"] - 1)
    low, high = threads["quality_ci95"]
    assert low <= threads["quality"] <= high
    kept = [
        json.loads(next((path / "evaluation").glob("*.json")).read_text())["answers"]
        for path in paths[:2]
    ]
    ratios = [a["decoded"] / b["steps"] for a, b in zip(*kept, strict=True)]
    expected = math.exp(np.mean(np.log(ratios)))
    assert threads["speedup_critical_path"] == pytest.approx(expected)
    assert expected > 1.2
    assert threads["realised"] == pytest.approx(0.8)
    assert threads["well_formed"] == threads["finished"] == 1
    assert threads["parallelism"] > 1.2

    again = evaluate.run(CONFIG, paths[::-1], decoder)["rows"]
    assert decoder.calls == 20  # nothing is answered again
    assert [row["key"] for row in again] == [row["key"] for row in rows[::-1]]
    for path in paths:
        assert len(Workdir(path).rows("eval.jsonl")) == 1
    # other questions are other answers; many at once are not timed
    more = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, eval_conversations=4))
    options = evaluate.Options(batch_size=3)
    (row,) = evaluate.run(more, paths[1:2], decoder, options, paths[0])["rows"]
    assert decoder.calls == 22
    assert row["speedup_wall"] is None
    assert row["n"] == 4
    (lonely,) = evaluate.run(CONFIG, paths[1:2], decoder)["rows"]
    assert lonely["speedup_critical_path"] is None


def test_a_judge_and_an_export(folder, tmp_path):
    paths = [folder / "plain", folder / "async"]

    def prefers_the_longer(pairs):
        return [float(len(second) > len(first)) for _, first, second in pairs]

    options = evaluate.Options(judge=prefers_the_longer, judge_name="longer")
    rows = evaluate.run(CONFIG, paths, Decoder(), options)["rows"]
    assert "win_rate" not in rows[0]
    assert rows[1]["win_rate"] == 0
    assert rows[1]["judge"] == "longer"
    assert rows[1]["key"].endswith("-longer")
    newer = dataclasses.replace(options, judge_parts=["retrained"])
    again = evaluate.run(CONFIG, paths, Decoder(), newer)["rows"]
    assert again[1]["key"] != rows[1]["key"]
    with pytest.raises(UserError, match="--judge compares with a sequential run"):
        evaluate.run(CONFIG, paths[1:], Decoder(), options)
    with pytest.raises(UserError, match="no run that writes in a row"):
        evaluate.run(CONFIG, paths[:1], Decoder(), evaluate.Options(), paths[1])
    assert evaluate.export(paths, rows, tmp_path / "out.json") == 10
    found = json.loads((tmp_path / "out.json").read_text())
    assert found[0].keys() == {"instruction", "output", "generator"}
    assert {one["generator"] for one in found} == {"sequential", "async predicted"}


def test_prompts_of_a_file_are_asked(folder, tmp_path):
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps([{"instruction": "Name a tree.", "output": "An elm."}] * 2))
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, source=str(file)))
    asked = evaluate.questions(config, [folder / "async"])
    assert [one.reference for one in asked] == ["An elm."] * 2
    learnt = [
        dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=x))
        for x in (0.5, 0.25)
    ]
    with (
        mock.patch.object(runs, "config_at", side_effect=learnt),
        pytest.raises(UserError, match="the runs held out different parts"),
    ):
        evaluate.questions(config, [folder / "async", folder / "sot"])
    options = evaluate.Options(scorer="rouge_l")
    (row,) = evaluate.run(config, [folder / "sot"], Decoder(), options)["rows"]
    assert row["method"] == "sot"  # decoded by itself, six tokens of an untrained model
    assert 0 <= row["quality"] < 1
    with pytest.raises(UserError, match="choose token_f1 or rouge_l"):
        evaluate.run(config, [folder / "async"], FixedText())


class FixedText(Decoder):
    def answer(self, run, prompt, end):
        return scripted.answer_of(prompt, "Elm.", run.setup.tokenizer, end)


def test_timelines_say_when_threads_wrote(folder):
    run, _ = runs.load(folder / "async")
    text = '<promise topic="t" tokens="10"/>a<async topic="t">bcdefghijkl</async><sync/>m'
    answer = scripted.answer_of("p", text, run.setup.tokenizer, scripted.END)
    found = evaluate.timeline(answer, run)
    promised = 6  # tags, topic and two digits
    start = promised + 3
    assert found["threads"][1] == {"label": "t", "opening": 3, "spans": [[start, start + 11]]}
    # the promise, "a" and the sync; then "m" and the end when the block has ended
    assert found["threads"][0]["spans"] == [[1, promised + 2], [start + 12, start + 13]]
    assert found["steps"] == start + 13
    figure = figures.timeline(found, "async")
    assert (
        figure.axes[0].get_xlabel() == f"decoder steps: {found['steps']} for 22 tokens, 1.00 a step"
    )


def test_figures_are_made_from_rows(folder, tmp_path):
    paths = [folder / "plain", folder / "async", folder / "preferred"]
    evaluate.run(CONFIG, paths, Decoder())
    with (paths[2] / "eval.jsonl").open("a") as file:
        for number in range(2):
            row = {"kind": "preference", "lambda": "inf", "round": number, "quality": 0.9,
                   "speedup_critical_path": 1.5 + number, "hypervolume": 0.5}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    rows = figures.gather(paths)
    drawn = figures.draw(rows, figures.timelines(paths))
    assert {"front_critical_path", "front_wall", "front_by_round"} < drawn.keys()
    assert "timeline_async_predicted" in drawn
    texts = [text.get_text() for text in drawn["front_critical_path"].axes[0].texts]
    assert sorted(texts) == ["async predicted", "sequential", "λ=∞"]
    saved = figures.save(drawn, tmp_path / "plots")
    assert all(pathlib.Path(path).read_bytes()[1:4] == b"PNG" for path in saved)
    with pytest.raises(UserError, match="no row of async decoding"):
        figures.gather([tmp_path])
    with pytest.raises(UserError, match="no such workdir"):
        figures.gather([tmp_path / "none"])
    with pytest.raises(UserError, match="which checkpoint"):
        evaluate.run(CONFIG, [], Decoder())


def test_the_run_of_another_method_is_refused(tmp_path):
    Workdir(tmp_path).record(Config())
    with pytest.raises(UserError, match="of another method: it was not trained for threads"):
        evaluate.form_of(tmp_path)
