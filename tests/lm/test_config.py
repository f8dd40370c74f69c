# SPDX-License-Identifier: Apache-2.0
"""Configs freeze into dataclasses; what does not belong raises one clear line."""

import math

import pytest

from configs import cp_heads, draft_inference, single_pass
from lm.config import Config, ModelConfig, SamplingConfig, freeze, to_dict
from lm.cp_heads.config import CpConfig
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError
from lm.long_context.config import TasksConfig


@pytest.mark.parametrize(
    ("presets", "kind", "preset"),
    [
        (presets, kind, preset)
        for presets, kind in (
            (single_pass, Config),
            (cp_heads, CpConfig),
            (draft_inference, DraftConfig),
        )
        for preset in presets.PRESETS
    ],
)
def test_presets_freeze_and_survive_json(presets, kind, preset):
    values = presets.get_config(preset).to_dict()
    config = freeze(values, kind)
    assert freeze(to_dict(config), kind) == config
    assert _count(values) < 80


def _count(values):
    return sum(_count(v) if isinstance(v, dict) else 1 for v in values.values())


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'smok'; known: smoke"):
        single_pass.get_config("smok")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"step": 3}}, "unknown config key train.step; did you mean train.steps?"),
        ({"zzz": 1}, "unknown config key zzz"),
        ({"train": {"steps": "many"}}, "train.steps='many' must be of type int"),
        ({"train": {"steps": True}}, "train.steps=True must be of type int"),
        ({"train": 3}, "config key train is a section"),
        ({"train": {"remat": "some"}}, "train.remat='some' is not one of none, full, dots"),
        ({"train": {"batch_size": 3, "accumulate": 2}}, "batch_size=3 is not a multiple"),
        ({"model": {"num_heads": 3, "num_kv_heads": 2}}, "num_heads=3 is not a multiple"),
        ({"model": {"head_dim": 7}}, "head_dim=7 must be even"),
        ({"model": {"lora": {"targets": ["q", "router"]}}}, "unknown router"),
        ({"model": {"lora": {"targets": "q"}}}, "must be a sequence"),
        ({"data": {"seq_len": 0}}, "data.seq_len=0 must be at least 1"),
        ({"model": {"num_heads": 0}}, "model.num_heads=0 must be at least 1"),
        ({"model": {"num_kv_heads": 0}}, "model.num_kv_heads=0 must be at least 1"),
        ({"model": {"embed_dim": -4}}, "model.embed_dim=-4 must be at least 1"),
        ({"model": {"lora": {"rank": -1}}}, "model.lora.rank=-1 must not be negative"),
        ({"optimizer": {"learning_rate": -1.0}}, "learning_rate=-1.0 must not be negative"),
        ({"train": {"steps": -5}}, "train.steps=-5 must not be negative"),
        ({"train": {"steps": 0, "epochs": 0}}, "train.epochs=0 must be at least 1"),
        ({"sampling": {"temperature": -0.5}}, "temperature=-0.5 must not be negative"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p=0.0 must be in"),
    ],
)
def test_bad_values_raise_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        freeze(values)
    assert "\n" not in str(caught.value)


def test_what_lists_hold_is_checked():
    assert freeze({"eval_lengths": [8, 16]}, TasksConfig).eval_lengths == (8, 16)
    with pytest.raises(UserError, match=r"eval_lengths\[1\]='x' must be of type int"):
        freeze({"eval_lengths": [8, "x"]}, TasksConfig)
    with pytest.raises(UserError, match="temperature=nan must be finite"):
        SamplingConfig(temperature=math.nan)
    with pytest.raises(UserError, match="temperature=inf must be finite"):
        SamplingConfig(temperature=math.inf)


def test_numbers_and_nested_options():
    values = {
        "optimizer": {"learning_rate": 1},
        "model": {"rope_scaling": {"kind": "yarn", "factor": 4}},
    }
    config = freeze(values)
    assert config.optimizer.learning_rate == 1.0
    assert config.model.rope_scaling.factor == 4.0
    assert freeze({"model": {"rope_scaling": None}}) == Config(model=ModelConfig())
