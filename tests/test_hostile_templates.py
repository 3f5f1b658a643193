"""Chat templates by strangers run no code, take two seconds at most, and stay within 256 MB."""
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from finetuning_kit.models import load_tokenizer, pocket_model_path
from finetuning_kit.rendering import MEMORY_LIMIT, RENDERER, Renderer, render
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tracing import literals_watched

ASKED = [{"role": "user", "content": "Hi"}]
TOUCH = "open(os.environ['HOME'] + '/touched', 'w')"
LOOP = "{% for a in range(99999) %}"

GREEDY = {  # these would run for hours, or fill the memory
    "loops in loops": LOOP * 4 + "{% endfor %}" * 4,
    "loops that write": LOOP * 2 + "aaaaaaaaaaaaaaaa" + "{% endfor %}" * 2,
    "a long text": "{{ 'a' * 10 ** 12 }}",
    "a text of half a gigabyte": "{{ ('a' * 1000) * 600000 }}",
    "a long list": "{{ ([0] * 10 ** 9) | length }}",
    "a list of lists": "{% set ns = namespace(a=[0]) %}" + LOOP + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "a text that doubles": "{% set ns = namespace(a='aaaaaaaa') %}" + LOOP + "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "a large power": "{{ 9 ** (9 ** 9) }}",
    "a power made in steps": "{% set ns = namespace(a=9) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}"
                             "{% endfor %}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide centre": "{{ 'a' | center(10 ** 10) }}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 2) }}{% endmacro %}{{ f(0) }}",
    "indents of indents": "{% set ns = namespace(a='a\n' * 1000) %}{% for i in range(999) %}"
                          "{% set ns.a = ns.a | indent(9999) %}{% endfor %}",
    "words of words": "{{ lipsum(n=10 ** 9) }}",
    "a sum of sums": "{{ range(99999) | map('string') | join(',') | list | batch(2) | list | sum(start=[]) | length }}",
}
CURIOUS = {  # these reach for Python
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class by filter": "{{ '' | attr('__class__') }}",
    "a class by item": "{{ ''['__class__']['__mro__'] }}",
    "globals of a function": "{{ lipsum.__globals__['os'].system('true') }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__ }}",
    "globals of ours": "{{ raise_exception.__globals__['json'] }}",
    "a frame": "{{ (messages | map('string')).gi_frame.f_globals }}",
    "a format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "a format by name": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "the template itself": "{{ self.__init__.__globals__ }}",
    "the context": "{{ self._TemplateReference__context.environment }}",
    "the loop": "{% for a in messages %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "a parent": "{% extends '/etc/passwd' %}",
    "builtins": "{{ __builtins__ }}{{ __import__('os').system('true') }}",
    "an eval": "{{ eval(\"__import__('os')." + TOUCH + "\") }}",
    "a list that is changed": "{{ messages.append(1) }}",
    "a message that is changed": "{{ messages[0].update(role='system') }}",
}


@pytest.fixture
def tokenizer():
    "The pocket tokenizer, whose template the tests replace."
    return load_tokenizer("pocket")


class Watch(threading.Thread):
    "Looks at the memory of the process in which templates run."

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self):
        while not self.ended.wait(0.02):
            process = RENDERER.process
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) if process else 0
            except OSError:
                pages = 0
            self.peak = max(self.peak, pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_template_ends_soon_in_little_memory(name, tokenizer):
    tokenizer.chat_template = GREEDY[name]
    RENDERER.render("{{ 1 }}", {})  # the process is there
    watch = Watch()
    watch.start()
    started = time.monotonic()
    with pytest.raises(FinetuningError, match="takes more than|refuses this row"):
        render(tokenizer, ASKED)
    seconds = time.monotonic() - started
    watch.ended.set()
    watch.join()
    assert seconds < 2.5 and watch.peak < MEMORY_LIMIT
    assert RENDERER.render("{{ 1 }}", {}) == {"text": "1"}  # the next template finds a process that works


@pytest.mark.parametrize("name", CURIOUS)
def test_a_curious_template_finds_nothing(name, tokenizer):
    tokenizer.chat_template = CURIOUS[name]
    try:
        text = render(tokenizer, ASKED)
    except FinetuningError:
        text = ""
    assert not any(word in text for word in ("class", "module", "function", "root:", "built", "os", "json", "/"))
    assert ASKED == [{"role": "user", "content": "Hi"}] and not Path(os.environ["HOME"], "touched").exists()


@pytest.mark.parametrize("name", [*GREEDY, *CURIOUS])
def test_the_proof_reads_it_without_running_it(name):
    source, started = {**GREEDY, **CURIOUS}[name], time.monotonic()
    literals_watched(source)
    literals_watched("{{ " + "(" * 9999 + " }}")
    assert time.monotonic() - started < 2


def test_a_template_that_was_lost_three_times_is_not_tried_again():
    renderer, started = Renderer(), time.monotonic()
    for _ in range(20):
        assert renderer.render(GREEDY["loops in loops"], {})["kind"] == "Lost"
    assert time.monotonic() - started < 15
    renderer.stop()

@pytest.mark.parametrize("template, words", [
    (GREEDY["loops in loops"], "takes more than 1 s"), (GREEDY["a long text"], "takes more than 1 s"),
    ("{% if messages %}", "not valid Jinja, line 1")])
def test_a_tokenizer_with_such_a_template_is_refused_in_time(tmp_path, tokenizer, template, words):
    shutil.copytree(pocket_model_path(), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    started = time.monotonic()
    with pytest.raises(FinetuningError, match=words):
        load_tokenizer(str(tmp_path / "model"))
    assert time.monotonic() - started < 10
