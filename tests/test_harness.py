"""lm-evaluation-harness on a model in memory: its numbers, and ours for the same rows."""
import json
import random

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'finetuning_kit[harness]'")
from finetuning_kit.evaluation import compare  # noqa: E402
from finetuning_kit.harness import run_harness, write_task  # noqa: E402
from finetuning_kit.likelihood import choice_accuracy, choice_exchanges  # noqa: E402
from finetuning_kit.loading import load_records  # noqa: E402
from finetuning_kit.models import load_model, load_tokenizer, quiet_libraries  # noqa: E402
from finetuning_kit.settings import FinetuningError  # noqa: E402


@pytest.fixture(scope="module")
def pocket():
    return load_model("pocket"), load_tokenizer("pocket")


@pytest.fixture(scope="module")
def choices():
    "Questions with four answers each."
    draw = random.Random(0)
    records = [record for record in load_records("pocket:test") if len(record.output.split()) < 3][:24]
    answers = sorted({record.output for record in records})
    wrong = [draw.sample([each for each in answers if each != record.output], 3) for record in records]
    return [{"question": f"{record.instruction} {record.input or ''}".strip(), "answer": record.output,
             "choices": draw.sample([record.output, *others], 4)} for record, others in zip(records, wrong)]


def test_an_adapter_is_judged_where_it_is(pocket, choices, tmp_path):
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = pocket
    write_task(tmp_path, "choices", choices)
    with quiet_libraries():
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear"))
    adapted.train()
    base = run_harness(model, tokenizer, ["choices"], tmp_path)
    same = run_harness(adapted, tokenizer, ["choices"], tmp_path)
    assert adapted.training
    assert [each.extra for each in same.evaluations["choices"].exchanges] == [
        each.extra for each in base.evaluations["choices"].exchanges]
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    moved = run_harness(adapted, tokenizer, ["choices"], tmp_path)
    change = compare(base.evaluations["choices"], moved.evaluations["choices"]).changes["acc"]
    assert change.low <= change.difference <= change.high
    assert [each.extra for each in moved.evaluations["choices"].exchanges] != [
        each.extra for each in base.evaluations["choices"].exchanges]


def test_a_limit_and_examples(pocket, choices, tmp_path):
    model, tokenizer = pocket
    write_task(tmp_path, "choices", choices)
    few = run_harness(model, tokenizer, ["choices"], tmp_path, limit=5)
    assert len(few.evaluations["choices"].exchanges) == 5 and few.settings["limit"] == 5
    assert json.dumps(few.to_dict())


def test_our_multiple_choice_agrees(pocket, choices, tmp_path):
    model, tokenizer = pocket
    page = json.loads(write_task(tmp_path, "choices", choices).read_text())
    page["target_delimiter"] = " "
    (tmp_path / "choices.yaml").write_text(json.dumps(page))
    theirs = run_harness(model, tokenizer, ["choices"], tmp_path, chat=False).evaluations["choices"].exchanges
    rows = [{**row, "label": row["answer"]} for row in choices]
    ours = choice_exchanges(model, tokenizer, rows, plain=True)
    for name, by in (("acc", "sum"), ("acc_norm", "character")):
        right = choice_accuracy(by).count(ours)[:, 0]
        assert np.array_equal(right, [each.extra["harness"][name] for each in theirs])


def test_a_task_that_breaks_is_told(pocket, tmp_path):
    write_task(tmp_path, "mine", [{"question": "Two and two?", "answer": "4"}])
    with pytest.raises(FinetuningError, match="failed on mine .*num_fewshot"):
        run_harness(*pocket, ["mine"], tmp_path, num_fewshot=5)
    (tmp_path / "mine.jsonl").write_text("{torn")
    with pytest.raises(FinetuningError, match="failed on mine .*mend the task's files"):
        run_harness(*pocket, ["mine"], tmp_path)
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(FinetuningError, match="mine.jsonl"):
        run_harness(*pocket, ["mine"], tmp_path)
    assert pocket[0].training is False
