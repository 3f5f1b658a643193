"""What a run shows: nothing that nobody asked for, plain lines in a pipe, and the same story to a second process."""
import re
import subprocess
import sys
import time

import nbformat
import pytest
from nbclient import NotebookClient

from finetuning_kit.cockpit import watch_run
from finetuning_kit.settings import FinetuningError
from tests.notebooks import environment

CELLS = ["""
import os
from finetuning_kit.profiles import demo_config
from finetuning_kit.cockpit import TrainingPanel
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.tokens import encode_records
from finetuning_kit.training import train
""", """
tokenizer = load_tokenizer("pocket")
rows = encode_records(tokenizer, load_records("pocket")[:64], max_length=128).rows
config = demo_config(output_dir="out", max_steps=4, eval_steps=2, save_steps=2, eval_answers=2, track="pocket:probe",
                     per_device_train_batch_size=4, gradient_checkpointing=True)
""", """
run = train(config, rows, rows[:8], tokenizer=tokenizer)
run = train(config.replace(output_dir="four_bit", load_in_4bit=True), rows, rows[:8], tokenizer=tokenizer)
os.environ["FINETUNING_KIT_WIDGETS"] = "on"
panel = TrainingPanel(config.replace(output_dir="panel"), rows, rows[:8])
panel.widget
panel.press()
panel.thread.join()
assert panel.status.startswith("finished"), panel.status
"""]


def test_libraries_are_silent_in_a_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment(tmp_path))
    told = [output for cell in notebook.cells for output in cell.outputs]
    assert not told, told


SCRIPT = """
import sys
from finetuning_kit.profiles import demo_config
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.screens import RunScreen
from finetuning_kit.tokens import encode_records
from finetuning_kit.training import train

tokenizer = load_tokenizer("pocket")
rows = encode_records(tokenizer, load_records("pocket")[:400], max_length=128).rows
config = demo_config(output_dir=sys.argv[1], max_steps=20, logging_steps=1, eval_steps=10, eval_answers=2,
                     per_device_train_batch_size=4, report_to="trackio")
train(config, rows, rows[:8], tokenizer=tokenizer, on_event=RunScreen())
"""


def test_second_process_watches_and_a_pipe_gets_plain_lines(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "runs")]
    env = {**environment(tmp_path), "COLUMNS": "80"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    seen, steps = None, set()
    while process.poll() is None:
        time.sleep(0.05)
        try:
            seen = watch_run(tmp_path / "runs" / "instruct_pocket") if seen is None else seen.read()
            steps.add(seen.standing.step)
        except FinetuningError:  # the run has not written a word yet
            continue
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert not err, err
    assert len(steps) > 2, f"watched while it ran: {steps}"
    assert watch_run(tmp_path / "runs" / "instruct_pocket").words().startswith("finished: step 20 of 20")
    assert seen.read().standing.history and len(seen.standing.samples) == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out), "control characters in a pipe"
    last = [line for line in out.splitlines() if line.startswith("  train")][-1]
    words = r"step 20 of 20, loss [\d.]+, held out [\d.]+, \d+% right, [\d.]+ st.*, [\d,]+ tokens/s"
    assert re.search(words, last), out
    assert "trackio was switched off" in " ".join(out.split()), out


@pytest.mark.parametrize("width", [60, 80, 140])
def test_terminal_line_fits(width):
    import io

    from rich.console import Console

    from finetuning_kit.screens import RunScreen

    page = io.StringIO()
    screen = RunScreen(Console(file=page, force_terminal=True, width=width, legacy_windows=False))
    screen({"type": "start", "step": 0, "n_steps": 3})
    for step in (1, 2, 3):
        screen({"type": "step", "step": step, "n_steps": 3, "loss": 1.234})
        screen({"type": "log", "step": step, "n_steps": 3, "loss": 1.234, "tokens_per_second": 123456.0})
        screen({"type": "eval", "step": step, "eval_loss": 1.5})
    screen({"type": "end", "step": 3, "status": "finished"})
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", page.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= width
    assert any("step 3 of 3" in line for line in lines)
    assert width < 100 or any("tokens/s" in line for line in lines), lines
