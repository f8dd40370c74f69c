# SPDX-License-Identifier: Apache-2.0
"""What a run takes over from what it starts from."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest

from lm import setup
from lm.config import Config, DataConfig, ModelConfig
from lm.errors import UserError
from lm.text import tokenizers
from lm.workdir import Workdir

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "hf" / "llama"
TEXTS = ["one fish, two fish, red fish, blue fish"] * 4


def started_from(path, **data):
    return Config(init_from=str(path), data=DataConfig(**{"template": "chatml", **data}))


@pytest.fixture
def imported(tmp_path):
    """A Hugging Face directory with a tokenizer of its own."""
    path = tmp_path / "hf"
    shutil.copytree(GOLDEN, path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"vocab_size": 512}))
    tokenizers.train_bpe(TEXTS, 280).save(path)
    return path


def recorded(path, config):
    """The workdir of a run that has begun."""
    Workdir(path).create(config)
    Workdir(path).record(config)
    return path


def test_the_tokenizer_of_what_a_run_started_from_is_that_of_its_heirs(imported, tmp_path):
    first = setup.resolve(started_from(imported))
    path = imported
    for name in "abc":
        config = started_from(path)
        path = recorded(tmp_path / name, config)
        found = setup.resolve(started_from(path))
        assert found.tokenizer.name == first.tokenizer.name == str(imported)
        assert found.valid_vocab is None  # a stranger's table is as it is


def test_padding_of_the_table_stays_padding(tmp_path):
    config = Config(model=ModelConfig(num_layers=1), data=DataConfig(template="chatml"))
    first = setup.resolve(config)
    assert (first.valid_vocab, first.model.vocab_size) == (267, 384)
    recorded(tmp_path / "a", config)
    second = started_from(tmp_path / "a")
    found = setup.resolve(second)
    assert (found.valid_vocab, found.model) == (267, first.model)
    recorded(tmp_path / "b", second)
    assert setup.resolve(started_from(tmp_path / "b")).valid_vocab == 267
    bpe = tokenizers.train_bpe(TEXTS, 280)
    bpe.save(tmp_path / "bpe")
    found = setup.resolve(started_from(tmp_path / "a", tokenizer=str(tmp_path / "bpe")))
    assert found.valid_vocab == max(bpe.vocab_size, 267)


def test_a_stranger_of_another_size_is_refused(tmp_path):
    config = Config(model=ModelConfig(vocab_size=128, num_layers=1))
    with pytest.raises(UserError, match="the tokenizer has 267 tokens, the model only 128"):
        setup.resolve(config)
    whole = dataclasses.replace(config, model=ModelConfig(vocab_size=384))
    assert setup.resolve(whole).valid_vocab is None  # asked for by name


def test_what_is_held_out_is_what_training_held_out(tmp_path):
    file = tmp_path / "x.jsonl"
    trained = DataConfig(source=f"gsm8k:{file}", validation_fraction=0.1, max_turns=4)
    asked = DataConfig(
        source=f"gsm8k:{os.path.relpath(file)}", validation_fraction=0.3, seed=5, max_turns=8
    )
    split, own = setup.split_of([trained], asked)
    assert split == "validation"
    assert (own.validation_fraction, own.seed, own.max_turns) == (0.1, 0, 4)
    assert own.source == asked.source
    assert setup.split_of([trained], DataConfig(source=str(file)))[0] == "all"  # another format
    counted = DataConfig(source="arithmetic", seed=1)  # split by content
    assert setup.split_of([DataConfig(source="arithmetic")], counted) == ("validation", counted)
