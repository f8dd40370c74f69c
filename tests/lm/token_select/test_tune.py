# SPDX-License-Identifier: Apache-2.0
"""The choice of settings, on a random model that reads bytes."""

import dataclasses

import pytest

from lm import tuned
from lm.errors import UserError
from lm.long_context.judge import Judge
from lm.long_context.options import Options
from lm.token_select import choice, tune
from lm.workdir import Workdir
from tests.lm.long_context import judged, small
from tests.lm.long_context.judged import CONFIG, PAIR, SELECT, TABLE


@pytest.fixture(scope="module")
def speaker():
    return small.speaker()


@pytest.fixture
def opened(monkeypatch):
    judged.opens(monkeypatch)


def test_the_setting_that_reads_least_is_chosen():
    options = tune.Options(ks=(8, 16, 32, 64, 400), n_locals=(16, 32), thetas=(0.8, 0.9))
    groups = tune.settings(SELECT, options, 300)
    assert [len(group) for group in groups] == 4 * [4]  # 400 is more than the context
    assert {(x.n_local, x.chunk, x.pool) for group in groups for x in group} == {
        (16, 16, 0), (16, 16, 5), (32, 32, 0), (32, 32, 5),
    }  # fmt: skip

    def agreement(select):
        known = select.k * (2 if select.pool else 1) + select.n_local
        return min(1.0, known / 100) - (0.5 if 0 < select.reuse < 0.9 else 0)

    seen = []

    def measure(select):
        seen.append(select)
        return {"agreement": agreement(select)}

    found = tune.choose(measure, groups, options.thetas, 0.9, 300)
    assert (found.k, found.n_local, found.pool, found.reuse) == (32, 32, 5, 0.9)
    assert len(set(seen)) < 16  # halving: not every k is tried
    assert tune.choose(measure, groups, (), 0.75, 300).n_local == 16
    assert tune.choose(measure, groups, options.thetas, 1.5, 300) is None
    assert tune.choose(measure, groups, (0.9,), 0.9, 75).reuse == 0  # no room for what it keeps
    with pytest.raises(UserError, match="reads the whole context of 20"):
        tune.settings(SELECT, options, 20)


def test_a_choice_is_kept_with_what_it_was_made_for(opened, speaker, tmp_path, capsys):
    few = Options(samples=2, batch_size=2)
    options = tune.Options(target=1, ks=(28,), n_locals=(32,), pools=(0,), thetas=(), data=few)
    result = tune.run(CONFIG, tmp_path, Workdir(tmp_path), options)
    assert result["chosen"] is None
    assert result["rows"][0]["agreement"] < 1
    assert not (tmp_path / "tuned.json").exists()
    whole = dataclasses.replace(options, ks=(28, 360))  # 360 reads everything
    result = tune.run(CONFIG, tmp_path, Workdir(tmp_path), whole)
    assert (result["chosen"]["k"], result["chosen"]["n_local"]) == (360, 32)
    assert (result["agreement"], len(result["rows"])) == (1, 2)
    judge = Judge(CONFIG, TABLE, dataclasses.replace(PAIR, tuned=str(tmp_path)), speaker)
    assert judge.methods.select == dataclasses.replace(SELECT, k=360)
    assert "tuned for another" not in capsys.readouterr().err
    now = {**tuned.hashes(speaker.params, speaker.tokenizer, None), "model": "x"}
    choice.apply(choice.read(tmp_path), SELECT, now)
    assert "tuned for another model and template" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"token_select\.tune writes it"):
        choice.read(tmp_path / "nothing")
    (tmp_path / "tuned.json").write_text('{"chosen": {"n": 3}}')
    with pytest.raises(UserError, match=r"not what experiments\.token_select\.tune writes"):
        choice.read(tmp_path)
