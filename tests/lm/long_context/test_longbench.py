# SPDX-License-Identifier: Apache-2.0
"""LongBench's scorers on cases counted by hand, and its files."""

import itertools
import json

import pytest

from lm.errors import DataError, UserError
from lm.long_context import longbench


def test_f1_counts_words_without_articles_and_punctuation():
    # found: cat sat on mat; wanted: cat on mat now; 3 in common
    assert longbench.f1("The cat sat on a mat.", "cat on the mat, now") == pytest.approx(0.75)
    assert longbench.f1("", "cat") == longbench.f1("dog", "cat") == 0
    assert longbench.f1("no no no", "no") == pytest.approx(2 * (1 / 3) / (4 / 3))


def test_rouge_l_needs_the_order():
    # a c d of "a b c d" and "a c x d"
    assert longbench.rouge_l("a b c d", "a c x d") == pytest.approx(0.75)
    assert longbench.rouge_l("d c b a", "a b c d") == pytest.approx(0.25)


def test_common_subsequences_against_brute_force():
    def brute(first, last):
        for size in range(min(len(first), len(last)), 0, -1):
            mine = set(itertools.combinations(first, size))
            if mine & set(itertools.combinations(last, size)):
                return size
        return 0

    for first in ("", "ab", "abcab", "bbaca", "cabcaab"):
        for last in ("", "b", "cbabac", "aaccb"):
            assert longbench.common(first, last) == brute(first, last)


def test_classes_numbers_and_lines_of_code():
    classes = ("Date", "Expression", "Abbreviation Expression", "City")
    score = longbench.class_score
    assert score("Date", "Date", classes) == 1
    assert score("Date or City", "Date", classes) == 0.5
    # a part of the right name does not count as another answer
    assert score("Abbreviation Expression", "Abbreviation Expression", classes) == 1
    assert score("City", "Date", classes) == 0
    assert longbench.number_score("1, 2 or 12", "Paragraph 12") == pytest.approx(1 / 3)
    assert longbench.number_score("none", "3") == 0
    # the line after the comment: "abcd" and "abxd" share 3 of 8 characters
    assert longbench.edit_similarity("# what\nabcd\nmore", "abxd") == pytest.approx(6 / 8)


def test_a_dataset_decides_the_scorer_and_the_best_reference_counts():
    score = longbench.score
    assert score("hotpotqa", (), "red\nor blue", ["green", "red or blue"]) == 1
    assert score("triviaqa", (), "\nred\nblue", ["red"]) == 1  # the first line alone
    assert score("qasper", (), "\nred\nblue", ["red"]) < 1
    assert score("trec", ("Date", "City"), "Date\nCity", ["Date"]) == 1
    assert score("lcc_e", (), "x = 1", ["x = 1"]) == 1
    assert score("lsht", ("体育", "军事、国防"), "\n体育\n军事、国防", ["体育"]) == 1
    assert score("passage_retrieval_zh", (), "段落12，不是3", ["段落12"]) == 0.5


def test_files(tmp_path):
    path = tmp_path / "mine.jsonl"
    line = {"context": "C", "input": "Q", "answers": ["A"], "dataset": "trec", "all_classes": None}
    path.write_text(json.dumps(line) + "\n\n")
    assert longbench.is_file(path)
    (record,) = longbench.read(path)
    assert (record.context, record.question, record.answers) == ("C", "\nQ", ("A",))
    (record,) = longbench.read(path, {"trec": "Read {context}! {input}?"})
    assert record.context + record.question == "Read C! Q?"
    with pytest.raises(UserError, match="must have"):
        longbench.read(path, {"trec": "{input} {context}"})
    path.write_text(json.dumps(line | {"answers": "A"}))
    with pytest.raises(DataError, match="lists of texts"):
        longbench.read(path)
    path.write_text(json.dumps({"prompt": "mine"}))
    assert not longbench.is_file(path)
    assert not longbench.is_file(tmp_path / "none")


def test_templates_are_looked_up_as_datasets_are(tmp_path):
    path = tmp_path / "mine.jsonl"
    line = {"context": "C", "input": "Q", "answers": ["A"], "dataset": "trec_e"}
    path.write_text(json.dumps(line))

    def asked(templates):
        (record,) = longbench.read(path, templates)
        return record.context + record.question

    plain, own = "Read {context}! {input}?", "Own {context}: {input}"
    assert asked({"trec": plain}) == "Read C! Q?"
    assert asked({"trec": plain, "trec_e": own}) == "Own C: Q"
    # a table of all published prompts serves a file of one dataset
    assert asked({"trec": plain, "lcc": own, "vcsum": own}) == "Read C! Q?"
    for templates, names in (
        ({"lcc": own}, "lcc"),
        ({"trec": plain, "trek": own}, "trek"),
        ({"TREC": own, "trec_en": own}, "TREC, trec_en"),
    ):
        message = f"no record takes the templates of {names}: the file's datasets are trec_e"
        with pytest.raises(UserError, match=message):
            longbench.read(path, templates)


@pytest.mark.parametrize("name", ["dureader", "multifieldqa_zh", "vcsum", "vcsum_e"])
def test_what_is_scored_by_chinese_words_is_refused(tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps({"context": "C", "answers": ["A"]}))
    with pytest.raises(UserError, match=f"{name} is scored by Chinese words, and jieba"):
        longbench.read(path)
