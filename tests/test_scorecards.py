"""Reports of evaluations: what a page may hold, what reads back, what cannot be compared and says so."""
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from finetuning_kit.asking import Answer
from finetuning_kit.contrasts import cut_words, diff_html, label_text, shown_text, word_diff
from finetuning_kit.evaluation import Evaluation, compare
from finetuning_kit.metrics import EXACT_MATCH, TOKEN_F1, Exchange, row_metric
from finetuning_kit.scorecards import (
    card_html, load_scorecard, notable_rows, save_scorecard, scorecard_page, to_scorecard)
from finetuning_kit.settings import FinetuningError
from finetuning_kit.side_by_side import compare_folders, load_answers, pair_answers, save_answers

HOSTILE = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</bdi></dl></article></div><h1>owned</h1>",
           '" onmouseover="alert(1)', "javascript:alert(1)", "&lt;b&gt;", "<!-- ", "]]>",
           "<style>*{display:none}</style>",
           "a\u202eb\u2066c", "\x1b[2J\x00\x07", "half \ud800 a character", "![x](http://a.b/?q)", "$\\frac{1}{2}$",
           "`rm -rf`", "| a | b |\n|---|---|", "\u2028\u2029", "👩‍👩‍👧 عربي עברית 日本語", "_hidden", "", " \n\t ")


def exchange(answer, prompt="What is 2 + 2?", reference="4"):
    "A question with its answer."
    return Exchange(prompt, reference, Answer(answer, len(answer.split()), True),
                    ({"role": "user", "content": prompt},))


def card_of(*pairs, **options):
    "A report of base and tuned answers to as many questions."
    base, tuned = ([exchange(pair[n], f"question {k}") for k, pair in enumerate(pairs)] for n in (0, 1))
    return to_scorecard(compare(Evaluation(base), Evaluation(tuned)), **options)


# --- what a page may hold -------------------------------------------------------------------------------------------
TAGS = {"html", "head", "meta", "title", "style", "body", "div", "h1", "h2", "p", "table", "thead", "tbody", "tr", "th",
        "td", "bdi", "img", "article", "dl", "dt", "dd", "ins", "del", "small", "i", "svg", "defs", "clippath", "g",
        "path", "rect", "text", "use", "ul", "li"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "data-name", "alt", "src", "role",
              "aria-label", "xmlns", "xmlns:xlink", "xlink:href", "id", "d", "x", "y", "width", "height", "viewbox",
              "version", "style", "transform", "clip-path", "type"}


class Seen(HTMLParser):
    "Every tag of a page and its attributes."

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def harmless(page):
    "Fail for a page that holds more than ours do."
    seen = Seen(page)
    assert seen.tags <= TAGS, seen.tags - TAGS
    assert {name for name, _ in seen.attributes} <= ATTRIBUTES, {name for name, _ in seen.attributes} - ATTRIBUTES
    sources = [value for name, value in seen.attributes if name in ("src", "xlink:href")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in sources), sources
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b\u2028]", page)
    page.encode("utf-8")


def hostile_card(text):
    "A report in which every text is this one."
    rows = [exchange(text, text, text or None), exchange("4", text + "!", text)]
    metric = row_metric(text if text.strip() else "empty", text, lambda each: float(bool(each.text.strip())), needs=())
    other = [replace(row, answer=Answer("no", 1, False)) for row in rows]
    names = (text if text.strip() else "a", f"{text} 2")
    card = to_scorecard(compare(Evaluation(rows, (metric,)), Evaluation(other, (metric,))), names, text, [text])
    card.settings = [{"name": text, "values": [text, text], "help": text}]
    card.gate = {"exit_code": 1, "reasons": [text]}
    card.runs = [{"name": text, "status": text, "history": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}]
    return card


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_model_wrote_is_obeyed(tmp_path, text):
    card = hostile_card(text)
    harmless(card_html(card, lambda figure, title: ""))
    shown = card._repr_markdown_() + str(card)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", shown)
    assert not re.search(r"(?<!\\)!\[x", card._repr_markdown_()) and "<script" not in card._repr_markdown_()
    assert load_scorecard(save_scorecard(card, tmp_path / "page.json")) == card


def test_nor_where_it_stands_in_a_picture(tmp_path):
    card = hostile_card(" ".join(HOSTILE))
    harmless(save_scorecard(card, tmp_path / "page.html").read_text(encoding="utf-8"))
    harmless(card._repr_html_())


def test_a_page_is_one_file_that_loads_nothing():
    page = scorecard_page(card_of(("5", "4"), ("4", "4"), ("x", "y")))
    assert "default-src 'none'" in page and page.startswith("<!doctype html>")
    harmless(page)
    assert not re.search(r"@import|<link|<iframe|<object|<script", page)


@pytest.mark.parametrize("wanted", HOSTILE)
@pytest.mark.parametrize("given", HOSTILE[:9] + HOSTILE[-4:])
def test_a_diff_keeps_the_answer_to_the_letter(wanted, given):
    pieces = word_diff(wanted, given)
    assert "".join(text for kind, text in pieces if kind != "missing") == given
    shown = diff_html(wanted, given)
    assert set(re.findall(r"</?(\w+)", shown)) <= {"ins", "del", "i"}
    shown.encode("utf-8")


def test_long_answers_are_cut_and_the_cut_is_told():
    assert "9,700 words more" in cut_words("again and " * 5000)
    assert len(diff_html("x " * 9000, "y" * 100_000)) < 20_000
    assert "96,000 letters more" in shown_text("z" * 100_000)
    assert len(label_text("n" * 500)) < 40


# --- what it says ---------------------------------------------------------------------------------------------------
def test_verdicts_follow_the_intervals():
    words = {line.metric: line.verdict for line in card_of(*[("no", "4")] * 60, *[("4", "4")] * 40).lines}
    assert words == {"exact_match": "better", "token_f1": "better", "stop_rate": "cannot tell"}
    assert card_of(*[("4", "no")] * 60).lines[0].verdict == "worse"
    assert card_of(("4", "no"), ("no", "4"), *[("4", "4")] * 30).lines[0].verdict == "cannot tell"


def test_lost_rows_are_shown_beside_those_gained():
    kinds = notable_rows(card_of(("no", "4"), ("4", "no"), ("a", "b"), ("same", "same")), 5)
    assert {kind: n for kind, (n, _) in kinds.items()} == {
        "gained": 1, "lost": 1, "other words, no better and no worse": 1}


def test_empty_answers_are_named_and_counted():
    card = card_of(("", "4"), (" ", ""), ("4", "\n"))
    assert card.lines[0].figures == (1 / 3, 1 / 3)
    assert list(card.to_dict()["rows"][1]["answers"]) == [" ", ""] and "an empty answer" in scorecard_page(card)


def test_one_row_and_rows_without_a_reference():
    card_of(("no", "4"))._repr_html_()
    rows = [exchange("yes", f"question {k}", None) for k in range(5)]
    stops = row_metric("stops", "ended", lambda each: 1.0, needs=())
    page = scorecard_page(to_scorecard(Evaluation(rows, (stops,))))
    assert "underlined" not in page.split("</style>")[1] and "wanted</dt>" not in page


def test_a_metric_without_a_figure_is_no_number(tmp_path):
    silent = row_metric("silent", "says nothing", lambda each: None, needs=())
    rows = [exchange("4"), exchange("5")]
    card = to_scorecard(Evaluation(rows, (silent,)))
    assert card.lines[0].figures == (None,) and "NaN" not in json.dumps(card.to_dict())
    assert load_scorecard(save_scorecard(card, tmp_path / "card.json")) == card
    scorecard_page(card)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "finetuning_kit.scorecard", "version": 2}', "no json"])
def test_files_that_are_no_report(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FinetuningError, match="report"):
        load_scorecard(tmp_path / "x.json")
    with pytest.raises(FinetuningError, match="report"):
        load_scorecard(tmp_path / "nowhere.json")


# --- folders --------------------------------------------------------------------------------------------------------
def folder(path, answers):
    "A folder of an evaluation."
    path.mkdir()
    save_answers(path / "answers.jsonl", answers)
    return path


def test_answers_are_paired_by_what_was_asked(tmp_path):
    rows = [exchange("4", f"question {k}", str(k)) for k in range(30)]
    first, second = folder(tmp_path / "a", rows), folder(tmp_path / "b", rows[:20][::-1])
    card = compare_folders(first, second)
    assert len(card.rows) == 20 and "20 questions were asked of both, of 30 and 20" in str(card)
    other = folder(tmp_path / "c", [replace(row, reference="x") for row in rows])
    card = compare_folders(first, other)
    assert card.lines[0].verdict == "not comparable" and card.lines[0].low is None and not card.rows
    assert "different questions" in scorecard_page(card)


def test_a_conversation_is_told_from_another_with_the_same_last_question():
    turns = [({"role": "user", "content": text}, {"role": "assistant", "content": "ok"},
              {"role": "user", "content": "And then?"}) for text in ("One", "Two")]
    rows = [Exchange("And then?", "yes", Answer(str(k), 1, True), turn) for k, turn in enumerate(turns)]
    first, second = pair_answers(rows, rows[::-1])
    assert [each.text for each in second] == ["0", "1"]


def test_kept_answers_read_back(tmp_path):
    rows = [replace(exchange(text, text or "q", text or None), extra={"label": text}) for text in HOSTILE
            if "\ud800" not in text]
    save_answers(tmp_path / "a.jsonl", rows)
    assert load_answers(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("metric", [EXACT_MATCH, TOKEN_F1])
def test_what_was_asked_for_and_cannot_be_measured_is_refused(tmp_path, metric):
    rows = [exchange("yes", f"question {k}", None) for k in range(5)]
    paths = [folder(tmp_path / name, rows) for name in "ab"]
    with pytest.raises(FinetuningError, match="needs `reference`"):
        compare_folders(*paths, metrics=(metric,))
    assert [line.metric for line in compare_folders(*paths).lines] == ["stop_rate"]
