"""The voting panel in a real browser: blind votes, a score that moves, names at the end.

FINETUNING_KIT_VOTES=nbs/images/voting_panel.png keeps its picture for the chapter.
"""
import os
import re

from tests.browser import in_kernel, notebook_page
from tests.test_browser import keep_picture

CELLS = ["""
import tempfile
from finetuning_kit.votes import Ballot, VotePair, VotingPanel

path = tempfile.mkdtemp() + "/votes.jsonl"
facts = {"France": "Paris", "Peru": "Lima", "Norway": "Oslo", "Kenya": "Nairobi", "Japan": "Tokyo", "Cuba": "Havana",
         "Egypt": "Cairo", "Chile": "Santiago", "Ghana": "Accra", "Nepal": "Kathmandu"}
pairs = [VotePair(f"What is the capital of {land}?", (f"Question: What is the capital of {land}? <b>Answer:</b>",
                  f"The capital of {land} is {city}.")) for land, city in facts.items()]
panel = VotingPanel(Ballot(pairs, path=path), ask=lambda prompt: ("<script>alert(1)</script>", prompt.upper()))
panel""", "print('a later cell')"]


def press_better(form) -> None:
    "Vote for the side that answers."
    left = form.locator(".ftk-side").first.inner_text()
    form.locator(f"button.ftk-{'left' if 'is' in left.split() and 'Question' not in left else 'right'}").click()


def test_voting_panel():
    with notebook_page(CELLS, height=640) as page:
        form = page.locator(".ftk-votes")
        form.wait_for()
        for n in range(1, 8):
            press_better(form)
            form.locator(".ftk-score", has_text=re.compile(rf"^{n} of 10 voted")).wait_for()
        assert "tuned" not in form.inner_text() and "<b>Answer:</b>" in form.inner_text()
        keep_picture(form, os.environ.get("FINETUNING_KIT_VOTES"))
        form.locator("button.ftk-undo").click()
        form.locator(".ftk-score", has_text=re.compile("^6 of 10 voted")).wait_for()
        form.locator(".ftk-own input").fill("how are you?")
        form.locator("button.ftk-ask").click()
        form.locator(".ftk-asked", has_text="how are you?").wait_for()
        assert "<script>alert(1)</script>" in form.inner_text()
        form.locator("button.ftk-tie").click()
        form.locator(".ftk-score", has_text=re.compile("^7 of 11 voted, 1 ties")).wait_for()
        form.locator("button.ftk-reveal-names").click()
        form.locator(".ftk-score", has_text="tuned wins 6 to 0").wait_for()
        assert form.locator("button.ftk-left").is_disabled()
        in_kernel(page, "again = Ballot(pairs, path=path)\nassert again.counts == (6, 0, 0), again.counts")
