"""A judge as a metric in `evaluate` and `compare`; replies on the disk; fences that no text can leave."""
import contextlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning_kit.asking import Answer
from finetuning_kit.conversations import spoil
from finetuning_kit.endpoints import Endpoint, EndpointSettings, Reply, ask_all, plan_calls, read_replies
from finetuning_kit.evaluation import Evaluation, compare, evaluate
from finetuning_kit.formatting import to_messages
from finetuning_kit.judging import (
    Judge, calibrate_judge, fence, judge_answers, judge_pairs, key_judge, local_judge, pair_messages, quality,
    read_choice, read_grade, win_rate)
from finetuning_kit.loading import load_records
from finetuning_kit.metrics import Exchange
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.settings import FinetuningError


@pytest.fixture(scope="module")
def right():
    "Forty questions with their references as answers."
    turns = [to_messages(record) for record in load_records("pocket:test")[:40]]
    return [Exchange(asked["content"], wanted["content"], Answer(wanted["content"], 9, True), (asked,))
            for asked, wanted in turns]


@pytest.fixture
def sound(right):
    "A judge with the key, examined."
    judge = Judge(key_judge({each.prompt: each.reference for each in right}))
    for kind in ("pairs", "grades"):
        calibrate_judge(judge, right, kind, n_pairs=20)
    return judge


class Server(BaseHTTPRequestHandler):
    "Says what `say` makes of the body"
    say = staticmethod(lambda body: (200, {"choices": [{"message": {"content": "A"}}]}))

    def do_POST(self):
        status, answer = self.say(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        sent = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *arguments):
        "Say nothing"


@pytest.fixture
def served():
    "Address of a server in a thread, and its class"
    kind = type("Server", (Server,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield EndpointSettings(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="m", wait_s=0, n_retries=1), kind
    server.shutdown()
    server.server_close()


def test_compare_takes_a_judge(right, sound):
    metrics = (win_rate(sound), quality(sound))
    table = compare(Evaluation(spoil(right, "swapped"), metrics), Evaluation(right, metrics))
    assert table.changes["win_rate"].low > 0.3 and table.changes["quality"].low > 4


def test_evaluate_pays_nothing_before_the_model_has_answered(sound):
    asked = []
    spy = Judge(lambda messages: asked.append(len(asked)) or Reply("A"), examined=sound.examined)
    tokenizer, model = load_tokenizer("pocket"), load_model("pocket")
    seen = []
    evaluate(model, tokenizer, load_records("pocket:test")[:4], max_new_tokens=4, metrics=(win_rate(spy),),
             on_progress=lambda *at: seen.append(len(asked)))
    assert seen == [0] and len(asked) == 8


def test_pocket_model_is_refused_as_judge(right):
    judge = Judge(local_judge(load_model("pocket"), load_tokenizer("pocket")))
    assert not calibrate_judge(judge, right, n_pairs=6).is_trusted
    with pytest.raises(FinetuningError, match="cannot be trusted with pairs"):
        win_rate(judge)
    assert win_rate(judge, untrusted=True).name == "win_rate"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=3, max_size=3))
def test_no_text_leaves_its_fence(texts):
    content = fence(dict(zip(("question", "answer A", "answer B"), texts)))
    code = content.split(">")[0].rpartition(" ")[2]
    inside = [content.split(f"<{name} {code}>\n")[1].split(f"\n</{name} {code}>")[0]
              for name in ("question", "answer A", "answer B")]
    assert inside == texts and content.count(code) == 6


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.dictionaries(st.sampled_from(["1", "5", " 7", "10", "A"]), st.floats(0, 1), max_size=4))
def test_any_reply_is_read_or_not_readable(text, first):
    assert read_choice(Reply(text, first=first)) in ("A", "B", "T", None)
    grade = read_grade(Reply(text, first=first))
    assert grade is None or 1 <= grade <= 10


def test_verdicts_of_a_broken_run_are_not_asked_for_again(right, tmp_path, served):
    settings, server = served
    n, broken = [], [25]

    def say(body):
        n.append(1)
        return (403, {"error": "quota"}) if len(n) == broken[0] else (200, {"choices": [{"message": {"content": "A"}}]})

    server.say = staticmethod(say)
    judge = Judge(Endpoint(settings.replace(n_parallel=3)), path=tmp_path / "v.jsonl")
    rows = [[each.prompt for each in right], [each.reference for each in right], ["no"] * len(right)]
    with pytest.raises(FinetuningError, match="403"):
        judge_pairs(judge, *rows)
    n_known = len(read_replies(judge.path))
    assert 20 < n_known < 30
    broken[0] = -1
    before = len(n)
    assert judge_pairs(judge, *rows).position_bias == 1
    assert len(n) - before == 2 * len(right) - n_known == len(read_replies(judge.path)) - n_known


def test_another_judge_rubric_or_model_is_asked_anew(tmp_path, served):
    settings, _ = served
    path, messages = tmp_path / "v.jsonl", pair_messages("q", "a", "b")
    ask_all(Endpoint(settings), [messages], path)
    assert plan_calls(Endpoint(settings), [messages], path).n_calls == 0
    for other in (settings.replace(model="other"), settings.replace(temperature=0.5), settings.replace(max_tokens=9)):
        assert plan_calls(Endpoint(other), [messages], path).n_calls == 1
    assert plan_calls(Endpoint(settings), [pair_messages("q", "a", "b", "is it kind?")], path).n_calls == 1


def test_key_is_in_no_file_and_no_message(tmp_path, served, monkeypatch):
    settings, server = served
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server.say = staticmethod(lambda body: (500, {"error": "bad key sk-very-secret"}))
    with pytest.raises(FinetuningError) as caught:
        ask_all(Endpoint(settings), [[{"role": "user", "content": "?"}]], tmp_path / "v.jsonl")
    server.say = staticmethod(Server.say)
    endpoint = Endpoint(settings)
    ask_all(endpoint, [[{"role": "user", "content": "?"}]], tmp_path / "v.jsonl")
    shown = [str(caught.value), repr(endpoint), repr(vars(endpoint)), (tmp_path / "v.jsonl").read_text()]
    assert not any("very-secret" in text for text in shown) and os.environ["OPENAI_API_KEY"]


def test_nameless_judges_do_not_share_replies(tmp_path):
    judge = Judge(lambda messages: Reply("A"), path=tmp_path / "v.jsonl")
    with pytest.raises(FinetuningError, match="somebody with a name"):
        judge_pairs(judge, ["q"], ["a"], ["b"])


ODD = {  # what a server sends as the whole answer -> what is told; "": it is read all the same
    b"<html>no": "no JSON", b"": "no JSON", b"[" * 100_000: "no JSON", b"[]": "no text", b"null": "no text",
    b'{"choices": []}': "no text", b'{"choices": [{"message": {"content": null}}]}': "no text",
    b'{"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": Infinity}}': "no text",
    b'{"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": -5000000}}': "",
    b'{"choices": [{"message": {"content": "7"}, "logprobs": {"content": [{"top_logprobs": '
    b'[{"token": "7", "logprob": 1e9}]}]}}]}': "",
    b'{"choices": [{"message": {"content": "7"}, "logprobs": {"content": [{"top_logprobs": '
    b'[{"token": 7, "logprob": -0.1}]}]}}]}': ""}


def test_odd_answers_of_a_server(served, monkeypatch):
    settings, kind = served
    for sent, told in ODD.items():
        def send(handler, sent=sent):
            handler.rfile.read(int(handler.headers["Content-Length"]))
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(sent)))
            handler.end_headers()
            handler.wfile.write(sent)

        monkeypatch.setattr(kind, "do_POST", send)
        endpoint = Endpoint(settings)
        if told:
            with pytest.raises(FinetuningError, match=told):
                judge_answers(Judge(endpoint), ["a"], ["b"])
        else:
            assert judge_answers(Judge(endpoint), ["a"], ["b"]) == [7.0] and endpoint.n_tokens >= 0


@pytest.mark.parametrize("how", ["hangs", "closes", "breaks off", "drips"])
def test_servers_that_do_not_answer(served, monkeypatch, how, tmp_path):
    settings, kind = served

    def send(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        if how == "hangs":
            return time.sleep(0.6)
        if how == "closes":
            return handler.connection.close()
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(20 if how == "drips" else 1):
                handler.wfile.write(b" ")
                time.sleep(0.1 * (how == "drips"))

    monkeypatch.setattr(kind, "do_POST", send)
    began = time.monotonic()
    with pytest.raises(FinetuningError, match="failed 2 times"):
        judge_answers(Judge(Endpoint(settings.replace(timeout_s=0.3)), path=tmp_path / "kept.jsonl"), ["a"], ["b"])
    assert time.monotonic() - began < 2
