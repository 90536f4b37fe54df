"""A question waits for an answer, says what it was asked to say, and can be read without a browser."""

import pytest
from IPython.core.interactiveshell import InteractiveShell

from usjepa_nb.widgets.quiz import Sheet, predict, quiz

THREE = [
    ("Which loss is `l_jepa`?", ["Eq. 1", "Eq. 2", "Eq. 3"], 0, "Eq. 1 compares features."),
    ("Is a < b?", ["yes", "no"], 1, "It is not, as a & b are equal."),
    ("Who moves $\\theta$?", ["the gradient", "nobody"], 0, "The optimiser does."),
]


@pytest.fixture(autouse=True)
def at_rest(monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)


def test_a_quiz_gives_the_reason_for_right_and_wrong_and_asks_again_where_nothing_is_chosen():
    sheet = quiz(THREE)
    assert [choice.index for choice in sheet.choices] == [None] * 3
    sheet.choices[0].index, sheet.choices[1].index = 0, 0
    sheet.button.click()
    right, wrong, open_ = (feedback.value for feedback in sheet.feedback)
    assert "✓ Right. Eq. 1 compares features." in right
    assert "✗" in wrong and "“no”" in wrong and "a &amp; b are equal" in wrong
    assert "Choose one first." in open_ and "optimiser" not in open_
    sheet.choices[1].index = 1
    sheet.button.click()
    assert "✓ Right." in sheet.feedback[1].value


def test_a_prediction_is_noted_and_not_judged():
    sheet = predict("Which row is last?", ["random", "V-JEPA"])
    sheet.button.click()
    assert "Choose one first." in sheet.feedback[0].value
    said = set()
    for index, choice in enumerate(["random", "V-JEPA"]):
        sheet.choices[0].index = index
        sheet.button.click()
        assert f"“{choice}”" in sheet.feedback[0].value
        said.add(sheet.feedback[0].value.replace(choice, ""))
    (same,) = said  # nothing gives away which is right
    assert "Run the next cell and compare" in same and "✓" not in same


def test_the_questions_are_readable_as_plain_text_without_the_answers():
    data, _ = InteractiveShell.instance().display_formatter.format(quiz(THREE))
    assert data["text/plain"].startswith("1. Which loss is `l_jepa`?\n   ( ) Eq. 1\n   ( ) Eq. 2")
    assert "3. Who moves" in data["text/plain"] and "Eq. 1 compares" not in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    data, _ = InteractiveShell.instance().display_formatter.format(predict("Now?", ["yes", "no"]))
    assert data["text/plain"] == "Now?\n   ( ) yes\n   ( ) no"


def test_markup_is_shown_and_not_run():
    questions = [child.value for child in quiz(THREE).children if "<b>" in str(getattr(child, "value", ""))]
    assert questions == ["<b>1. Which loss is <code>l_jepa</code>?</b>", "<b>2. Is a &lt; b?</b>",
                         "<b>3. Who moves $\\theta$?</b>"]


def test_exercise_chooses_and_checks_every_option_and_leaves_nothing_chosen(monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    seen = []
    monkeypatch.setattr(Sheet, "check", lambda self: seen.append(tuple(choice.index for choice in self.choices)))
    for sheet in (quiz(THREE), predict("Now?", ["yes", "no"])):
        assert {choice.index for choice in sheet.choices} == {None}
        assert {feedback.value for feedback in sheet.feedback} == {""}
    assert {chosen[0] for chosen in seen[:3]} == {0, 1, 2}
    assert len(seen) == 9
    assert [chosen[1] for chosen in seen[3:5]] == [0, 1] and [chosen[2] for chosen in seen[5:7]] == [0, 1]
    assert seen[7:] == [(0,), (1,)]


@pytest.mark.parametrize("right", [3, -1, True, "Eq. 1", None, 1.0])
def test_a_right_answer_that_is_no_choice_is_refused(right):
    with pytest.raises(ValueError, match="'Q': the right answer is an index from 0 to 2"):
        quiz([("Q", ["a", "b", "c"], right, "why")])


@pytest.mark.parametrize("choices", [["a"], [], ["a", "a"], "ab"])
def test_choices_that_leave_no_choice_are_refused(choices):
    with pytest.raises(ValueError, match="give two or more different ones"):
        predict("Q", choices)
    with pytest.raises(ValueError, match="give two or more different ones"):
        quiz([("Q", choices, 0, "why")])


def test_a_quiz_without_questions_reasons_or_a_part_is_refused():
    with pytest.raises(ValueError, match="no question"):
        quiz([])
    with pytest.raises(ValueError, match="no reason"):
        quiz([("Q", ["a", "b"], 0, "")])
    with pytest.raises(ValueError, match="is not \\(question"):
        quiz([("Q", ["a", "b"], 0)])
