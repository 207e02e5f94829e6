"""Answers are judged as the benchmarks' own programs judge them."""

from __future__ import annotations

import base64
import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm import scorers
from mllm.scorers import (
    chosen,
    circular,
    exact,
    mme,
    mme_said,
    pope,
    pope_said,
    rotations,
    vqa_accuracy,
    vqa_normalised,
)
from mllm.tasks import MME, MMMU, POPE, Exact, Item, MMBench, ShortAnswers, read_items, task_of

WORDS = st.text(string.ascii_letters + string.digits + " '.,?!-", max_size=20)


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldn't've"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("a man, an umbrella", "man umbrella"),
        ("black/white", "black white"),
        ("u.s.", "us"),
        ("  red \n", "red"),
        ("", ""),
    ],
)
def test_vqa_normalises(said: str, normal: str) -> None:
    assert vqa_normalised(said) == normal


@pytest.mark.parametrize(("equal", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_gives_the_published_steps(equal: int, score: float) -> None:
    """Of ten people's answers: 0, 30, 60, 90 and 100 per cent."""
    given_ = ["red"] * equal + [f"other {n}" for n in range(10 - equal)]
    assert vqa_accuracy("Red", given_) == pytest.approx(score)


@given(WORDS, st.lists(WORDS, min_size=2, max_size=12), st.randoms())
def test_vqa_is_a_share_whatever_the_order(said: str, given_: list[str], chance: object) -> None:
    score = vqa_accuracy(said, given_)
    assert 0 <= score <= 1
    chance.shuffle(given_)  # type: ignore[attr-defined]  # a random.Random
    assert vqa_accuracy(said, given_) == pytest.approx(score)
    assert vqa_accuracy(said, [*given_, said]) >= score - 1e-9
    assert vqa_accuracy(said, [said] * 4) == 1


@given(WORDS)
def test_what_is_normal_stays(said: str) -> None:
    """Words, once normalised, are what they were -- but for a contraction that is made of two."""
    once = vqa_normalised(said)
    assert vqa_normalised(vqa_normalised(once)) == vqa_normalised(once)
    assert not set(once.split()) & scorers.ARTICLES


@given(WORDS)
def test_exact_is_of_words_not_of_their_dress(said: str) -> None:
    assert exact(said, [f"  {said.upper()}. "]) == 1
    assert exact(said, [said + "x"]) == 0


@pytest.mark.parametrize(
    ("said", "mme_reads", "pope_reads"),
    [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("Yes, there is a dog.", "yes", "yes"),
        ("There is no dog", "other", "no"),
        ("It is not there. Yes", "other", "no"),
        ("I cannot tell", "other", "yes"),
        ("", "other", "yes"),
    ],
)
def test_yes_and_no_are_read(said: str, mme_reads: str, pope_reads: str) -> None:
    assert mme_said(said) == mme_reads
    assert pope_said(said) == pope_reads


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1))
def test_mme_plus_is_never_more_than_every_picture_allows(right: list[tuple[str, bool]]) -> None:
    pair = mme(right)
    assert 0 <= pair.plus <= 100
    assert pair.score == pair.accuracy + pair.plus
    perfect = all(one for _, one in right)
    assert (pair.score == 200) == perfect
    assert (pair.accuracy == 100) == (pair.plus == 100)


def test_mme_counts_pictures_whose_both_questions_are_right() -> None:
    pair = mme([("a", True), ("a", True), ("b", True), ("b", False)])
    assert (pair.accuracy, pair.plus, pair.score) == (75, 50, 125)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"]))))
def test_pope_is_what_its_counts_say(said: list[tuple[str, str]]) -> None:
    found = pope(said)
    hit = sum(pair == ("yes", "yes") for pair in said)
    wrong = sum(a != b for a, b in said)
    assert found.f1 == pytest.approx(2 * hit / (2 * hit + wrong) if hit else 0.0)
    assert found.accuracy == pytest.approx(1 - wrong / len(said) if said else 0.0)


CHOICES = ("a red car", "a blue boat", "a green tree", "no vehicle")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("The answer is B", "B"),
        ("First I thought (A), but it is (D).", "D"),
        ("B. a blue boat", "B"),
        ("I think that it shows a green tree there", "C"),
        ("it is a red car, or rather is it a blue boat", "B"),
        ("a blue boat", None),  # short answers must name a letter, in MMMU's own parsing too
        ("E", None),
        ("", None),
    ],
)
def test_a_letter_is_read(said: str, letter: str | None) -> None:
    assert chosen(said, CHOICES) == letter


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True))
def test_turns_bring_each_choice_to_each_place(choices: list[str]) -> None:
    turned = rotations(choices)
    assert turned[0] == tuple(choices)
    for place in range(len(choices)):
        assert {turn[place] for turn in turned} == set(choices)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=1))
def test_one_wrong_turn_is_a_wrong_question(right: list[tuple[str, bool]]) -> None:
    names = {name for name, _ in right}
    wrong = {name for name, one in right if not one}
    assert circular(right) == pytest.approx(1 - len(wrong) / len(names))


def question(**what: object) -> Item:
    return Item(**{"id": "1", "question": "What?", "answers": ("A",), "choices": CHOICES, **what})  # type: ignore[arg-type]  # of fields


def test_mmbench_asks_every_turn_and_wants_all() -> None:
    asked = MMBench().ask(question())
    assert [one.right for one in asked] == ["A", "D", "C", "B"]
    for one in asked:
        assert one.choices["ABCD".index(one.right)] == "a red car"
        assert f"{one.right}. a red car" in one.words
    assert MMBench().scores(asked, [one.right for one in asked]) == {"circular": 1.0, "single": 1.0}
    assert MMBench().scores(asked, ["A"] * 4) == {"circular": 0.0, "single": 0.25}
    with pytest.raises(ValueError, match="has no choices"):
        MMBench().ask(question(choices=()))


def test_tasks_score_by_subject() -> None:
    items = [question(subject="Art"), question(subject="Music", answers=("B",)), question(subject="Music")]
    asked = [one for item in items for one in MMMU().ask(item)]
    assert MMMU().scores(asked, ["A", "A", "A"]) == {"accuracy": pytest.approx(2 / 3), "Art": 1.0, "Music": 0.5}
    yes = [
        question(choices=(), answers=("Yes",), group="p", subject="count"),
        question(choices=(), answers=("no",), group="p", subject="count"),
    ]
    asked = [one for item in yes for one in MME().ask(item)]
    assert MME().scores(asked, ["Yes", "Yes"]) == {"score": 50.0, "count acc": 50.0, "count acc+": 0.0}
    assert POPE().scores(asked, ["yes", "no"])["f1"] == 1
    asked = [one for item in yes for one in ShortAnswers(kind="textvqa").ask(item)]
    assert ShortAnswers(kind="textvqa").scores(asked, ["yes", "no"]) == {"accuracy": 1.0, "count": 1.0}
    assert Exact().scores(Exact().ask(yes[0]), ["No"]) == {"exact": 0.0, "count": 0.0}


def test_files_are_read_in_each_benchmarks_own_words(tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(b"a file")
    rows = [
        {"question_id": 7, "image": "dog.png", "question": "What?", "answers": [{"answer": "dog"}, {"answer": "pup"}]},
        {"question_id": 8, "image": "dog.png", "text": "Is there a dog?", "label": "yes"},
        {"id": "art_1", "question": "Which?", "options": ["x", "y"], "answer": "B", "subfield": "Art"},
        {"id": 9, "question": "Which?", "choices": ["x", "y"], "answer": 1},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    vqa, pope_, mmmu, number = read_items(file)
    assert (vqa.id, vqa.answers, vqa.picture, vqa.group) == ("7", ("dog", "pup"), b"a file", "dog.png")
    assert (pope_.question, pope_.answers) == ("Is there a dog?", ("yes",))
    assert (mmmu.choices, mmmu.answers, mmmu.subject) == (("x", "y"), ("B",), "Art")
    assert number.answers == ("B",)
    data = base64.b64encode(b"x" * 900).decode()
    table = tmp_path / "mmbench.tsv"
    table.write_text(
        f"index\thint\tquestion\tA\tB\tC\tanswer\tcategory\timage\n3\tLook.\tWhich?\tx\ty\t\tB\tlogic\t{data}\n"
    )
    (one,) = read_items(table)
    assert (one.id, one.question, one.choices, one.answers, one.picture) == (
        "3",
        "Look.\nWhich?",
        ("x", "y"),
        ("B",),
        b"x" * 900,
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "expected an object with a question"),
        ('{"question": "What?"}', "has no 'answer"),
        ('{"answer": "x"}', "has no 'question"),
        ('{"question": "?", "answer": "x", "image": "../secret.png"}', "lies outside of"),
        ('{"question": "?", "answer": "x", "image": "nowhere.png"}', "no picture"),
        ('{"question": "?", "answer": "z", "choices": ["x", "y"]}', "is none of the choices"),
        ("", "has no questions"),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(ValueError, match=told):
        read_items(tmp_path / "q.jsonl")


def test_every_task_has_its_name() -> None:
    names = ("textvqa", "vqav2", "mme", "mmmu", "mmbench", "pope", "exact")
    assert [task_of(name).kind for name in names] == list(names)
