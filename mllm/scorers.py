"""How answers to known benchmarks are judged: text in, numbers out, as each benchmark's own evaluation does it.

Every function says its source, and where it deviates. Nothing here knows of a model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Literal

from pipelines.types import spec

# --- short answers: VQAv2, TextVQA


def _contractions() -> dict[str, str]:
    """Each contraction by the forms that lack some of its apostrophes, as people type them."""
    words = (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's "
        "how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've "
        "needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd've somebody'll "
        "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that'd that'd've that's "
        "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll "
        "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
        "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
    )
    found: dict[str, str] = {}
    for word in words.split():
        places = [at for at, letter in enumerate(word) if letter == "'"]
        for count in range(1, len(places) + 1):
            for gone in combinations(places, count):
                found["".join(letter for at, letter in enumerate(word) if at not in gone)] = word
    return found


CONTRACTIONS = _contractions()
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def vqa_normalised(answer: str) -> str:
    """An answer as VQA compares it: lower case, no punctuation or articles, digits for number words, contractions whole.

    After VQAEval of https://github.com/GT-Vision-Lab/VQA (processPunctuation, processDigitArticle), which TextVQA uses too. Its
    table of contractions is made here by leaving apostrophes away, and lacks its few misspelt entries.
    """
    text = " ".join(answer.split())
    commas = re.search(r"\d,\d", text) is not None
    for sign in PUNCTUATION:
        gone = commas or f"{sign} " in text or f" {sign}" in text
        text = text.replace(sign, "" if gone else " ")
    text = re.sub(r"(?<!\d)\.(?!\d)", "", text)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """VQA's soft accuracy in [0, 1]: against each choice of all `given` answers but one, min(1, equal / 3), and their mean.

    Antol et al., arXiv:1505.00468, and VQAEval, for ten people's answers; with fewer it is the same formula. One answer alone
    counts 1 or 0. Raises ValueError where nobody has answered.
    """
    if not given:
        raise ValueError("a question has no answers to be compared with; give at least one")
    mine, theirs = vqa_normalised(answer), [vqa_normalised(one) for one in given]
    if len(theirs) == 1:
        return float(mine == theirs[0])
    equal = theirs.count(mine)
    scores = [min(1.0, (equal - (one == mine)) / 3) for one in theirs]
    return sum(scores) / len(scores)


def exact(answer: str, given: Sequence[str]) -> float:
    """1 where the answer is one of `given`, case, outer space and a closing full stop aside; else 0."""

    def plain(text: str) -> str:
        return " ".join(text.split()).rstrip(" .").lower()

    return float(plain(answer) in {plain(one) for one in given})


# --- yes or no: MME, POPE

YesNo = Literal["yes", "no", "other"]


def mme_said(answer: str) -> YesNo:
    """What MME's evaluation reads: the answer, or its first four characters, if they hold yes or no.

    `parse_pred_ans` of MME's eval_tool (arXiv:2306.13394).
    """
    text = answer.strip().lower()
    head = text if text in ("yes", "no") else text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def pope_said(answer: str) -> Literal["yes", "no"]:
    """What POPE's evaluation reads: no, where the first sentence has `no` or `not` as a word, and yes otherwise.

    evaluate.py of https://github.com/RUCAIBox/POPE (arXiv:2305.10355).
    """
    words = answer.partition(".")[0].replace(",", "").lower().split()
    return "no" if "no" in words or "not" in words else "yes"


@spec
class Pair:
    """MME's score of a subtask: `accuracy` of questions, `plus` of pictures both of whose questions are right; in per cent.

    `score`, their sum, is what tables show: at most 200.
    """

    accuracy: float
    plus: float
    questions: int

    @property
    def score(self) -> float:
        return self.accuracy + self.plus


def mme(right: Iterable[tuple[str, bool]]) -> Pair:
    """MME's acc and acc+ of one subtask: `right` says of each question its picture and whether it was answered right.

    arXiv:2306.13394, 2.2.
    """
    pictures: dict[str, list[bool]] = defaultdict(list)
    for picture, one in right:
        pictures[picture].append(one)
    every = [one for of_picture in pictures.values() for one in of_picture]
    if not every:
        return Pair(accuracy=0.0, plus=0.0, questions=0)
    plus = sum(all(of_picture) for of_picture in pictures.values()) / len(pictures)
    return Pair(accuracy=100 * sum(every) / len(every), plus=100 * plus, questions=len(every))


@spec
class Binary:
    """POPE's numbers, in [0, 1]: yes is the positive class; `yes` is the share of questions that were answered so."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    questions: int


def pope(said: Sequence[tuple[str, str]]) -> Binary:
    """POPE's metrics of pairs of what was said and what is true, yes or no each (arXiv:2305.10355, 4.2)."""
    true = sum(mine == theirs for mine, theirs in said)
    positive = sum(mine == theirs == "yes" for mine, theirs in said)
    yes, real = sum(mine == "yes" for mine, _ in said), sum(theirs == "yes" for _, theirs in said)
    precision, recall = _share(positive, yes), _share(positive, real)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Binary(
        accuracy=_share(true, len(said)),
        precision=precision,
        recall=recall,
        f1=f1,
        yes=_share(yes, len(said)),
        questions=len(said),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# --- one of several: MMMU, MMBench

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def chosen(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer means, or None: `(B)`, else ` B `, else, in more than five words, a choice's own text.

    Of several the last one said counts. `parse_multi_choice_response` of https://github.com/MMMU-Benchmark/MMMU
    (arXiv:2311.16502), but for an answer that means none: one is drawn by chance there; here `B.`, `B:` and `B)` at its
    beginning are heard, and anything else is wrong.
    """
    text = answer.strip()
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text = f" {text} "
    letters = LETTERS[: len(choices)]
    for pattern in ("({})", " {} "):
        found = [(text.rfind(pattern.format(letter)), letter) for letter in letters if pattern.format(letter) in text]
        if found:
            return max(found)[1]
    if len(text.split()) > 5:
        lower = text.lower()
        said = [
            (lower.rfind(choice.lower()), letter)
            for letter, choice in zip(letters, choices, strict=True)
            if choice and choice.lower() in lower
        ]
        if said:
            return max(said)[1]
    for letter in letters:  # `B.` and `B: because` are not caught above, and every model says them
        if re.match(rf"{letter}\s*[.:)]", text.strip()):
            return letter
    return None


def rotations(choices: Sequence[str]) -> list[tuple[str, ...]]:
    """All turns of the choices, the first as they are: what MMBench's circular evaluation asks.

    MMBench, arXiv:2307.06281, 4.1: a question counts where all its turns are answered right.
    """
    return [(*choices[turn:], *choices[:turn]) for turn in range(len(choices))]


def circular(right: Iterable[tuple[str, bool]]) -> float:
    """Share of questions all of whose turns were answered right; `right` names the question of each turn."""
    questions: dict[str, bool] = {}
    for question, one in right:
        questions[question] = questions.get(question, True) and one
    return _share(sum(questions.values()), len(questions))


def by_subject(right: Iterable[tuple[str, float]]) -> dict[str, tuple[float, int]]:
    """Mean score and number of questions of each subject, in order of their names."""
    subjects: dict[str, list[float]] = defaultdict(list)
    for subject, one in right:
        subjects[subject].append(one)
    return {name: (sum(of) / len(of), len(of)) for name, of in sorted(subjects.items())}
