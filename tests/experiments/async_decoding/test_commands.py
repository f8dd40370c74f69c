# SPDX-License-Identifier: Apache-2.0
"""The commands keep their contracts: the last line, the exit status, one line on bad input."""

import json

import pytest

from configs import async_decoding
from lm.async_decoding import language, requests
from lm.async_decoding.config import AsyncConfig
from lm.config import freeze
from lm.data import conversations
from tests import commands

SMOKE = "--config=configs/async_decoding.py:smoke"
TINY = (SMOKE, *commands.TINY, "--config.train.steps=2", "--config.train.log_every=1")


def test_training_and_its_baseline(tmp_path):
    flags = (*TINY, "--config.stage=sft", "--config.threads.form=plain", f"--workdir={tmp_path}")
    result, err = commands.run("async_decoding.train", *flags)
    assert result.keys() == {"step", "loss", "params_sha256"}
    assert result["step"] == 2
    assert "form='plain'" in err
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["threads"]["stage"] == "sft"
    assert "stage" not in recorded  # other methods' commands read the record, too
    arguments = (f"--checkpoint={tmp_path}", "--max_new_tokens=12", "--threads=2")
    process = commands.start("async_decoding.generate", *arguments, "--prompt=Count. <sync/>")
    out, err = process.communicate(timeout=600)
    assert not process.returncode, err
    shown, _, last = out.rstrip("\n").rpartition("\n")
    result = json.loads(last)
    assert result["tokens"] == result["steps"] <= 12
    assert shown == result["text"]
    assert "\033" not in out  # no terminal, no colours
    assert result["warnings"].get("tag_in_prompt") is None
    assert result["speedup"] > 0
    refused = "async_decoding.generate", *arguments[1:], "--prompt=a"
    assert "pass one of --hf_dir and --checkpoint" in commands.refusal(*refused)


def test_requests_as_a_file(tmp_path):
    out = tmp_path / "requests.jsonl"
    flags = (SMOKE, f"--out={out}")
    result, _ = commands.run("async_decoding.requests", *flags, "--count=5", "--split=validation")
    assert result == {"out": str(out), "conversations": 5}
    config = freeze(async_decoding.smoke().to_dict(), AsyncConfig).run().requests
    known = [requests.generate(0, i, config, "validation").messages for i in range(5)]
    assert [one.messages for one in conversations.read_conversations(out)] == known
    line = commands.refusal("async_decoding.requests", *flags, "--config.data.source=arithmetic")
    assert "only requests are made here" in line
    line = commands.refusal("async_decoding.requests", SMOKE, f"--out={out / 'below'}", status=1)
    assert "cannot be written" in line


def test_verification_fails_on_one_error(tmp_path):
    flags = ("--programs=20", "--logits=0", "--config.data.eval_conversations=4")
    result, err = commands.run("async_decoding.verify", SMOKE, *flags, "--corrupt=label", status=1)
    assert result == {
        "programs": 24,
        "visibility_errors": 0,
        "label_errors": 2,
        "position_errors": 0,
        "thread_logit_error": 0.0,
        "pool_logit_error": 0.0,
        "sequential_mismatches": 0,
    }
    assert "check failed: 2 label errors" in err


def test_the_benchmark_times_given_programs(tmp_path):
    flags = (*TINY, "--batches=1", "--threads=4", "--answers=3", "--repeats=1",
             "--compose=evict:knorm:24", "--prompt_tokens=48")  # fmt: skip
    result, _ = commands.run("async_decoding.benchmark", *flags, f"--workdir={tmp_path}")
    sequential, threaded = result["rows"]
    methods = (sequential["method"], threaded["method"])
    assert methods == ("sequential", "async evict:knorm:24")
    assert 48 <= threaded["prompt_tokens"] < 50
    assert sequential["steps"] == sequential["tokens"]
    assert threaded["promises"] > 0
    assert threaded["steps"] < sequential["steps"]
    for row in (sequential, threaded):
        assert {"threads", "batch", "wall_speedup", "realised", "peak_bytes"} <= row.keys()
        assert row["checkpoint"] == "random"
    kept = (tmp_path / "benchmark.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == result["rows"]
    assert (tmp_path / "plots" / "benchmark.png").is_file()
    line = commands.refusal("async_decoding.benchmark", SMOKE, "--compose=spec_kv:8")
    assert "--compose=spec_kv:TOKENS needs --draft or --draft_layers" in line


def test_annotated_files_are_trained(tmp_path):
    file, out = tmp_path / "plain.jsonl", tmp_path / "annotated.jsonl"
    items = (
        "Elms shade many an avenue with their leaves in midsummer.",
        "Oaks live for centuries, feeding jays and squirrels alike.",
    )
    answer = "".join(f"- {item}\n" for item in items)
    messages = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": answer}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    result, _ = commands.run("async_decoding.annotate", f"--data={file}", f"--out={out}")
    assert result["annotated"] == result["answers"] == 1
    assert result["refused"] == {}
    tagged = [messages[0], {"role": "assistant", "content": "Here <sync/> waits."}]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (messages, tagged)))
    report, _ = commands.run(
        "async_decoding.annotate", f"--data={mixed}", f"--out={tmp_path / 'some.jsonl'}"
    )
    assert (report["annotated"], report["dropped"]) == (1, 1)
    assert list(report["refused"].values()) == [1]
    content = json.loads(out.read_text())["messages"][1]["content"]
    assert language.render(language.parse(content)) == answer
    (tmp_path / "bad.jsonl").write_text(out.read_text().replace("</async>", ""))
    flags = (*TINY, f"--data={tmp_path / 'bad.jsonl'}", f"--workdir={tmp_path / 'w'}")
    line = commands.refusal("async_decoding.train", *flags, "--config.data.validation_fraction=0.0")
    assert "bad.jsonl:1: message 1: at " in line
    assert "is not closed" in line


@pytest.mark.parametrize("preset", async_decoding.PRESETS)
def test_presets_are_whole(preset):
    config = freeze(async_decoding.get_config(preset).to_dict(), AsyncConfig)
    assert config.run().threads.stage == "sft"


def test_quality_under_a_composition(tmp_path):
    commands.run("async_decoding.train", *TINY, f"--workdir={tmp_path}")
    flags = (SMOKE, f"--checkpoint={tmp_path}", "--config.data.eval_conversations=2")
    compose = ("--compose=evict:streaming_llm:16", "--config.sampling.max_new_tokens=12")
    result, _ = commands.run("async_decoding.evaluate", *flags, *compose, "--batch_size=2")
    (row,) = result["rows"]
    assert (row["method"], row["compose"]) == ("async predicted", "evict:streaming_llm:16")
    assert row["n"] == 2
    assert 0 < row["steps"] <= 12
    line = commands.refusal("async_decoding.evaluate", *flags, "--heads=x")
    assert "--heads: only with --compose=cp_heads" in line
    line = commands.refusal("async_decoding.evaluate", *flags, "--compose=evict:none:16")
    assert "'none' is not one of snapkv" in line
