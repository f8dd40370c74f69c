# SPDX-License-Identifier: Apache-2.0
"""Presets of token selection freeze, and the paper's is the default."""

import pytest

from configs import token_select
from lm.config import freeze, to_dict
from lm.token_select.config import SelectConfig, TokenSelectConfig


def count(values):
    return sum(count(v) if isinstance(v, dict) else 1 for v in values.values())


@pytest.mark.parametrize("preset", token_select.PRESETS)
def test_presets_freeze_and_survive_json(preset):
    values = token_select.get_config(preset).to_dict()
    config = freeze(values, TokenSelectConfig)
    assert freeze(to_dict(config), TokenSelectConfig) == config
    assert count(values) < 80
    # every setting can be overridden from the command line
    assert set(values["select"]) == set(to_dict(SelectConfig()))
    longest = max(config.tasks.eval_lengths)
    assert config.select.budget < longest


def test_the_papers_setting_is_the_default():
    assert freeze(token_select.get_config("paper").to_dict(), TokenSelectConfig).select == (
        SelectConfig()
    )


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'papr'; known: smoke"):
        token_select.get_config("papr")
