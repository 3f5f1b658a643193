"""Code that means harm, run behind the walls: it gets no pass, and the machine stays as it was."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
from finetuning_kit.code_tests import CodeTests, run_tests  # noqa: E402
from finetuning_kit.walls import CodeLimits, missing_walls  # noqa: E402
from finetuning_kit.settings import FinetuningError  # noqa: E402

pytestmark = pytest.mark.skipif(bool(missing_walls()), reason=f"no walls here: {missing_walls()}")
ASKED = CodeTests(("assert f(2) == 4",), entry_point="f")


def run(code, tests=ASKED, **limits):
    "What comes of some code."
    return run_tests(code, tests, CodeLimits(**{"time_s": 30, **limits}), allow_running_code=True)


def processes():
    "The numbers of the processes that Python's referee runs in."
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"referee_main" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            pass
    return found


def folders():
    "The working folders that are there."
    import tempfile

    return set(Path(tempfile.gettempdir()).glob("answer_*"))


def test_an_honest_answer_passes_and_leaves_nothing():
    before = folders()
    result = run("def f(x):\n    return x * x")
    assert result.passed and result.n_passed == 1
    assert folders() <= before


def test_nothing_runs_unasked():
    with pytest.raises(FinetuningError, match="allow_running_code=True"):
        run_tests("def f(x): return 4", ASKED)


CHEATS = {
    "leaves with code 0": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when asked": "import os\ndef f(x): os._exit(0)",
    "leaves when asked, politely": "def f(x): raise SystemExit(0)",
    "stops the tests": "def f(x): raise KeyboardInterrupt",
    "equal to all": "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Yes()",
    "a number equal to all": "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes(7)",
    "a text equal to all": "class Yes(str):\n    def __eq__(self, other): return True\ndef f(x): return Yes('7')",
    "its own class's name is int": "class int:\n    def __eq__(self, other): return True\ndef f(x): return int()",
    "new builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.len = lambda x: 4\ndef f(x): return 7",
    "tests of its own": "def test_f(): pass\ndef check(candidate): pass\ntests = []\ndef f(x): return 7",
    "looks for the tests": "import gc\ndef f(x):\n    held = [o for o in gc.get_objects() if isinstance(o, dict) and"
                           " 'nonce' in o]\n    return 4 if held else 7",
    "writes a verdict": "import os\ndef f(x):\n    for fd in range(64):\n"
                        "        try: os.write(fd, b'{\"errors\": [\"\"]}')\n        except OSError: pass\n"
                        "    return 7",
    "answers out of turn": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[\"value\", \"{}\", []]\\n')\n"
                           "    except OSError: pass\nos._exit(0)",
    "kills its parent": "import os, signal\ndef f(x):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 7",
    "kills its group": "import os, signal\ndef f(x):\n    os.killpg(0, signal.SIGKILL)\n    return 7",
    "overwrites the referee": "import sys\nsys.modules['__main__'].__dict__.clear()\ndef f(x): return 7",
    "names that are no names": "globals()['__builtins__'] = {}\nglobals()['f)'] = 1\ndef f(x): return 7",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_answer_fakes_a_pass(name):
    assert not run(CHEATS[name]).passed


def test_an_answer_out_of_turn_is_only_an_answer():
    result = run("import os\ndef f(x):\n    os.write(11, b'[\"value\", 4, []]\\n')\n    os._exit(0)")
    assert result.errors == ("",)  # it said 4 when it was asked for f(2): a right answer, said in another way
    assert not run("import os\ndef f(x):\n    os.write(11, b'[\"value\", 4, []]\\n' * 9)\n    return 7", CodeTests(
        ("assert f(2) == 4", "assert f(3) == 9"), entry_point="f")).passed


def test_names_of_python_stay_pythons():
    for name, test in {"abs": "assert abs(f(2) - 4) < 1e-6", "math": "import math\nassert math.isclose(f(2), 4)",
                       "len": "assert len([f(2)]) == 4", "sorted": "assert sorted([f(2)]) == [4]"}.items():
        code = "class Yes:\n    def __getattr__(self, name): return lambda *a: True\n" \
               f"    def __call__(self, *a): return 4\n{name} = Yes()\ndef f(x): return 7"
        assert not run(code, CodeTests((test,), entry_point="f")).passed, name


def test_helpers_of_the_prompt_are_not_replaced():
    tests = CodeTests(("assert helper(f(2)) == 5",), "def helper(x):\n    return x + 1", "f")
    assert run("def f(x): return 4", tests).passed
    assert not run("def helper(x): return 5\ndef f(x): return 7", tests).passed


def test_an_endless_loop_ends():
    start = time.monotonic()
    result = run("def f(x):\n    while True: pass", time_s=1)
    assert result.errors == ("it took longer than 1 s",) or "process ended" in result.errors[0]
    assert time.monotonic() - start < 20 and not processes()


def test_sleeping_through_signals_ends():
    code = "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n" \
           "    except Exception: pass\ndef f(x):\n    time.sleep(600)"
    assert run(code, time_s=1).errors == ("it took longer than 1 s",)
    assert not processes()


def test_memory_is_refused():
    assert "MemoryError" in run("def f(x): return len(bytearray(2 << 30))").errors[0]
    code = "def f(x):\n    held = []\n    while True: held.append(bytearray(1 << 20))"
    assert "MemoryError" in run(code).errors[0]


def test_a_small_value_does_not_unfold_in_the_referee():
    tests = CodeTests(("assert list(f(2)) == [4]", "assert sum(f(2)) == 4", "assert f(2) * 4 == 4"), entry_point="f")
    result = run("def f(x): return range(10 ** 12)", tests, time_s=3)
    assert not any(not error for error in result.errors)


def test_there_is_no_second_process():
    for code in ("import os\ndef f(x):\n    os.fork()\n    return 4",
                 "import subprocess\ndef f(x): return subprocess.run(['true']) and 4",
                 "import os\ndef f(x): return 4 if os.system('true') == 0 else 7",
                 "import os\ndef f(x):\n    os.setsid()\n    return 4",
                 "import multiprocessing as m\ndef f(x):\n    m.get_context('fork').Process(target=int).start()\n"
                 "    return 4"):
        assert not run(code).passed, code


def test_threads_are_bounded_by_memory_and_die():
    code = "import threading, time\ndef f(x):\n    n = 0\n    while n < 100_000:\n" \
           "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n        n += 1\n    return 4"
    assert not run(code, time_s=10).passed
    assert not processes()


def test_a_gigabyte_of_output_goes_nowhere():
    result = run("import sys\nline = 'x' * (1 << 20)\nfor _ in range(1024): sys.stdout.write(line)\n"
                 "def f(x): return x * x")
    assert result.passed
    assert "too large" in run("def f(x): return 'x' * (1 << 25)").errors[0]


def test_files_are_bounded_and_vanish():
    assert "OSError" in run("def f(x):\n    open('a', 'wb').write(bytes(5 << 20))\n    return 4").errors[0]
    code = "def f(x):\n    n = 0\n    while True:\n        open(str(n), 'wb').write(bytes(1 << 20))\n        n += 1"
    assert run(code, folder_mib=16).errors == ("it filled its folder with more than 16 MiB",)
    before = folders()
    deep = "import os\ndef f(x):\n    for n in range(3000):\n        os.mkdir('d')\n        os.chdir('d')\n    return 4"
    run(deep)
    assert folders() <= before


def test_nothing_outside_can_be_touched(tmp_path):
    secret = tmp_path / "key"
    secret.write_text("hidden")
    for attempt in (f"open({str(secret)!r}).read()", f"open({str(secret)!r}, 'w')", f"os.unlink({str(secret)!r})",
                    f"os.listdir({str(tmp_path)!r})", f"os.mkdir({str(tmp_path / 'x')!r})",
                    f"os.chmod({str(secret)!r}, 0o777)",
                    f"os.symlink({str(secret)!r}, 'way') or open('way').read()", f"os.link({str(secret)!r}, 'way')",
                    f"os.rename({str(secret)!r}, 'way')", f"os.truncate({str(secret)!r}, 0)",
                    "open('/etc/passwd').read()",
                    "open('/proc/self/environ').read()", "open(f'/proc/{os.getppid()}/mem', 'rb')",
                    f"os.utime({str(secret)!r})", "os.listdir(os.path.expanduser('~'))"):
        result = run(f"import os\ndef f(x):\n    {attempt}\n    return 4")
        assert "Error" in result.errors[0] and "Assertion" not in result.errors[0], (attempt, result)
    assert secret.read_text() == "hidden" and list(tmp_path.iterdir()) == [secret]


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "hidden")
    assert run("import os\ndef f(x): return 4 if not set(os.environ) - {'LC_CTYPE', 'PWD', 'SHLVL', '_'} else 7").passed


def test_no_file_is_inherited(tmp_path):
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\ndef f(x):\n    held = []\n    for fd in range(3, 64):\n        try:\n" \
               "            os.fstat(fd)\n            held.append(fd)\n        except OSError: pass\n" \
               "    return len(held)"
        assert run(code, CodeTests(("assert f(2) <= 2",))).passed  # its line to the referee


def test_there_is_no_network():
    for code in ("socket.socket()", "socket.create_connection(('127.0.0.1', 80), 1)",
                 "socket.getaddrinfo('example.com', 80)",
                 "socket.socket(socket.AF_UNIX)"):
        assert "Error" in run(f"import socket\ndef f(x):\n    {code}\n    return 4").errors[0], code


def test_native_code_is_held_too():
    code = "import ctypes\ndef f(x):\n    libc = ctypes.CDLL(None, use_errno=True)\n" \
           "    return [libc.socket(2, 1, 0), libc.fork(), libc.kill(1, 0), libc.ptrace(16, 1, 0, 0)]"
    assert run(code, CodeTests(("assert f(2) == [-1, -1, -1, -1]",))).passed
    assert not run("import ctypes\ndef f(x): return ctypes.string_at(0)").passed  # a crash is no verdict


def test_the_players_end_with_their_caller():
    script = "from finetuning_kit.code_tests import *\nfrom finetuning_kit.walls import CodeLimits\n" \
             "print('go', flush=True)\nrun_tests('def f(x):\\n    while True: pass', CodeTests(('f(1)',)), " \
             "CodeLimits(time_s=120), True)"
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert caller.stdout.readline() == b"go\n"
    end = time.monotonic() + 60
    while not processes() and time.monotonic() < end:
        time.sleep(0.05)
    assert processes()
    caller.kill()
    caller.wait()
    while processes() and time.monotonic() < end:
        time.sleep(0.05)
    assert not processes()


def test_a_program_needs_the_wall(monkeypatch):
    monkeypatch.setattr("finetuning_kit.code_tests.missing_walls", lambda: ["the kernel has no Landlock"])
    with pytest.raises(FinetuningError, match="not run here: the kernel has no Landlock"):
        run("def f(x): return 4")
    assert run("def f(x): return x * x", file_wall=False).passed
    monkeypatch.setattr("finetuning_kit.code_tests.missing_walls", lambda: ["calls are refused on Linux only"])
    with pytest.raises(FinetuningError, match="on Linux only"):
        run("def f(x): return 4", file_wall=False)
