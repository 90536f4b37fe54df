"""Questions to answer before the next cell (`predict`) and after the last one (`quiz`).

Both are radio buttons and one button, so Tab, the arrow keys and Space are enough. Nothing else in a notebook depends
on what is chosen. Without a browser the questions and the choices stand in the cell's text; the answers stand folded
in the prose, so that a printed page has them too.
"""

import html
import os
import re

import ipywidgets

# A long choice breaks into lines instead of leaving the page.
WRAP = """<style>.widget-radio-box label {height: auto !important; white-space: normal !important; line-height: 1.4}
.widget-radio-box {height: auto !important}</style>"""


class Sheet(ipywidgets.VBox):
    """Questions, their radio buttons, one button.

    Attributes:
        choices: one `RadioButtons` per question, unselected at first.
        button: what the learner presses.
        feedback: one `HTMLMath` per question, empty until then.
    """

    def __init__(self, questions, label, answer):
        """questions: [(text, choices)]; answer(k, index): what is said to a choice in question k."""
        self.choices = [ipywidgets.RadioButtons(options=list(choices), value=None, layout={"width": "auto"})
                        for _, choices in questions]
        self.feedback = [ipywidgets.HTMLMath(layout={"margin": "0 0 12px 0"}) for _ in questions]
        self.button = ipywidgets.Button(description=label)
        number = [f"{k + 1}. " if len(questions) > 1 else "" for k in range(len(questions))]
        self.text = "\n\n".join(_plain(n + text, choices) for n, (text, choices) in zip(number, questions, strict=True))
        self._answer = answer
        rows = [ipywidgets.HTML(WRAP)]
        for n, (text, _), choice, feedback in zip(number, questions, self.choices, self.feedback, strict=True):
            rows += [ipywidgets.HTMLMath(f"<b>{_markup(n + text)}</b>"), choice, feedback]
        super().__init__([*rows, self.button])
        self.button.on_click(lambda _: self.check())

    def check(self):
        """What pressing the button does."""
        for k, (choice, feedback) in enumerate(zip(self.choices, self.feedback, strict=True)):
            said = "Choose one first." if choice.index is None else self._answer(k, choice.index)
            feedback.value = f'<div role="status">{_markup(said)}</div>'

    def exercise(self):
        """Choose and check every option once, and back to nothing chosen."""
        for choice in self.choices:
            for index in range(len(choice.options)):
                choice.index = index
                self.check()  # a click would swallow an exception
        for choice, feedback in zip(self.choices, self.feedback, strict=True):
            choice.index, feedback.value = None, ""

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/plain": self.text} if isinstance(bundle, dict) else bundle


def predict(question, choices):
    """Ask for a guess before the next cell is run; it says nothing about right or wrong, the next cell does.

    Args:
        question: one sentence; `$...$` is typeset, `` `...` `` is code.
        choices: two or more different answers.

    Raises:
        ValueError: fewer than two choices, or two that are equal.
    """
    _checked(question, choices)
    return _exercised(Sheet([(question, choices)], "Commit", lambda k, index: (
        f"Noted: “{choices[index]}”. Run the next cell and compare.")))


def quiz(questions):
    """Ask, then say what is right and why.

    Args:
        questions: [(question, choices, index of the right choice, reason)]; a reason of one or two sentences that
            fits a right and a wrong choice.

    Raises:
        ValueError: no question, a right answer that is not among the choices, no reason, or what `predict` refuses.
    """
    if not questions:
        raise ValueError("quiz: no question; give [(question, choices, index of the right choice, reason), ...].")
    for item in questions:
        if len(item) != 4:
            raise ValueError(f"quiz: {item!r} is not (question, choices, index of the right choice, reason).")
        question, choices, right, reason = item
        _checked(question, choices)
        if type(right) is not int or not 0 <= right < len(choices):
            raise ValueError(f"{question!r}: the right answer is an index from 0 to {len(choices) - 1}, not {right!r}.")
        if not reason:
            raise ValueError(f"{question!r}: no reason; say in a sentence why the answer is right.")

    def answer(k, index):
        _, choices, right, reason = questions[k]
        return f"✓ Right. {reason}" if index == right else f"✗ Not this one: it is “{choices[right]}”. {reason}"

    return _exercised(Sheet([(question, choices) for question, choices, _, _ in questions], "Check", answer))


def _exercised(sheet):
    if os.environ.get("USJEPA_EXERCISE") == "1":
        sheet.exercise()
    return sheet


def _checked(question, choices):
    if isinstance(choices, str) or len(choices) < 2 or len({*choices}) < len(choices):
        raise ValueError(f"{question!r}: choices={choices!r}; give two or more different ones.")


def _plain(text, choices):
    return "\n".join([text, *(f"   ( ) {choice}" for choice in choices)])


def _markup(text):
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
