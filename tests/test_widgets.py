"""The panels work on ipywidgets 7, which Colab has; everything else here runs on ipywidgets 8."""
import os
import subprocess
import sys
from pathlib import Path

from tests.notebooks import ROOT

OLD = Path(sys.prefix) / "ipywidgets7"  # where the Makefile puts it
PANELS = """
import tempfile

import ipywidgets

from finetuning_kit.profiles import demo_config
from finetuning_kit.knobs import panel
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.review import Review
from finetuning_kit.tokens import encode_records
from finetuning_kit.cockpit import TrainingPanel

settings = panel(demo_config(), 100)
sliders = [child for box in settings.widget.children for child in getattr(box, "children", [])]
assert len(sliders) > 5, sliders
settings.set("lora.r", 8)
_, rank, _ = settings.view.controls["lora.r"]
assert rank.value == 8
rank.value = 4
assert settings.config.lora.r == 4

rows = encode_records(load_tokenizer("pocket"), load_records("pocket")[:64], max_length=128).rows
training = TrainingPanel(demo_config(output_dir=tempfile.mkdtemp(), max_steps=4), rows)
training.widget
training.press()
training.thread.join()
assert training.status.startswith("finished") and training.view.bar.value == 1, training.status
assert training.view.plot.value.startswith(b"\\x89PNG") and len(training.view.plot.value) > 1000

review = Review("pocket:faults", "pocket:test")
view = (review.widget, review.view)[1]
view.code.value = "encoding_issues"
view.buttons["repair these"].click()
assert review.decisions == [("repair", "encoding_issues")] and "<mark" in view.texts["show"].value, review
print(ipywidgets.__version__)
"""


def test_panels_on_ipywidgets_7():
    assert OLD.is_dir(), f"{OLD} is missing; `make .venv/ready-to-test` installs it"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLD), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", PANELS], text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7."), done.stdout
