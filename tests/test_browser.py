"""Panels in a real browser: a run is started, watched, stopped, and started again; faults are looked at and mended.

FINETUNING_KIT_SCREENSHOT=nbs/images/training_panel.png keeps the picture of a run for the README, and
FINETUNING_KIT_REVIEW=nbs/images/review_panel.png that of a review for its chapter.
"""
import os
import re
from pathlib import Path

from PIL import Image

from tests.browser import in_kernel, notebook_page

SETUP = """
import tempfile
from finetuning_kit.profiles import demo_config
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.tokens import encode_records
from finetuning_kit.cockpit import TrainingPanel

tokenizer = load_tokenizer("pocket")
rows = encode_records(tokenizer, load_records("pocket"), max_length=128).rows
held_out = encode_records(tokenizer, load_records("pocket:test")[:32], max_length=128).rows
config = demo_config(output_dir=tempfile.mkdtemp(), num_train_epochs=EPOCHS, logging_steps=2, eval_steps=20,
                     eval_answers=4)
"""
KEEP = os.environ.get("FINETUNING_KIT_SCREENSHOT")
CELLS = [SETUP.replace("EPOCHS", "3" if KEEP else "20"), "panel = TrainingPanel(config, rows, held_out)\npanel",
         "print('a later cell')"]


def wait_for_step(page, n):
    "Wait until the panel reports step `n` or a later one."
    page.wait_for_function("n => +(document.querySelector('.ftk-training .ftk-status')?.innerText"
                           ".match(/step (\\d+)/)?.[1] || 0) >= n", arg=n)


def picture(form) -> str:
    "Where the browser has the plot from: another address for another picture."
    return form.locator("img.ftk-plot, .ftk-plot img").get_attribute("src") or ""


def keep_picture(form, path) -> None:
    "Keep a picture of a panel where the environment asks for it."
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        form.screenshot(path=path)
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes
        assert Path(path).stat().st_size <= 150 * 1024, f"{path} has more than 150 KB"


def test_training_panel():
    with notebook_page(CELLS, height=1750) as page:  # all of the panel fits into a picture
        form = page.locator(".ftk-training")
        form.wait_for()
        form.locator(".ftk-lora-r .noUi-handle").focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        form.locator(".ftk-follows", has_text=re.compile(r"32 / 20 = 1\.6")).wait_for()

        form.locator(".ftk-run").click()
        wait_for_step(page, 4)
        form.locator(".ftk-plot >> visible=true").wait_for()
        first = picture(form)
        wait_for_step(page, 12)
        assert picture(form) != first, "the plot did not change"
        form.locator(".ftk-samples td", has_text="osmium").first.wait_for()  # what the base says, and what is wanted
        if KEEP:
            wait_for_step(page, 120)
        keep_picture(form, KEEP)
        form.locator(".ftk-stop").click()
        form.locator(".ftk-status", has_text=re.compile("stopped at step .* kept")).wait_for()
        in_kernel(page, "panel.thread.join(); run = panel.result\n"
                        "assert run.config.lora.r == 20 and run.status == 'stopped', run\n"
                        "assert run.checkpoint.name == f'checkpoint-{run.n_steps}' and run.checkpoint.is_dir()")

        in_kernel(page, "panel.settings.set('training.max_steps', 6)")
        form.locator(".ftk-run").click()  # the second press: where most panels break
        form.locator(".ftk-status", has_text="finished: 6 steps").wait_for()
        in_kernel(page, "assert panel.result.folder.path.name == 'instruct_pocket-2'")
        in_kernel(page, "assert panel.result.folder.adapter.is_dir()")
        form.locator("button.ftk-run", has_text="Run again").wait_for()

        form.locator(".ftk-method select").select_option("full: every weight")
        form.locator(".ftk-lora-r").wait_for(state="hidden")  # a rank means nothing when every weight is trained
        form.locator(".ftk-follows", has_text="6, set by max_steps").wait_for()
        in_kernel(page, "config = panel.settings.config\n"
                        "assert config.method == 'full' and config.training.learning_rate == 1e-4, config")
        form.locator(".ftk-run").click()
        form.locator(".ftk-status", has_text="instruct_pocket-3/final_model").wait_for()
        form.locator(".ftk-method select").select_option("lora: thin matrices beside frozen layers")
        form.locator(".ftk-lora-r").wait_for()
        in_kernel(page, "assert panel.settings.config.lora.r == 20, 'the rank was forgotten on the way'")
        assert form.locator("img.ftk-plot, .ftk-plot img").count() == 1
        assert page.locator(".jp-Cell-outputArea").last.inner_text().strip() == "a later cell", "output leaked"


REVIEW = ["from finetuning_kit.review import Review\nreview = Review('pocket:faults', 'pocket:test')\nreview"]


def test_review_panel():
    with notebook_page(REVIEW) as page:
        form = page.locator(".ftk-review")
        form.locator(".ftk-follows", has_text="52 rows read = 50 kept + 2 left out").wait_for()
        form.locator(".ftk-code select").select_option("encoding_issues (4)")
        form.locator(".ftk-show mark").first.wait_for()
        assert form.locator(".ftk-show mark").count() == 4, "a row's fault is not marked"
        keep_picture(form, os.environ.get("FINETUNING_KIT_REVIEW"))
        form.locator(".ftk-repair-these").click()
        form.locator(".ftk-follows", has_text="2 repaired").wait_for()
        form.locator(".ftk-code select").select_option("cut_answers (2)")
        form.locator("button.ftk-repair-these:disabled").wait_for()  # nobody can finish a sentence by a click
        form.locator(".ftk-drop-these-rows").click()
        form.locator(".ftk-follows", has_text="48 kept + 4 left out").wait_for()
        form.locator(".ftk-step-back").click()
        form.locator(".ftk-follows", has_text="50 kept + 2 left out").wait_for()
        in_kernel(page, "assert review.decisions == [('repair', 'encoding_issues')], review.decisions")
