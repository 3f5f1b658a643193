"""The search for a learning rate: it leaves nothing behind for any method, and its command ends in sentences."""
import json
import math
import tempfile
from pathlib import Path
from statistics import median

import pytest
import torch

from finetuning_kit.cli import main
from finetuning_kit.encoding import EncodedRow
from finetuning_kit.loading import load_records
from finetuning_kit.machine import resolve_config
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.profiles import demo_config
from finetuning_kit.rates import (
    EDGE, STUDY, Fork, SearchPlan, find_learning_rate, for_whole_run, lr_find, rate_lines, valley, walk_downhill)
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_records
from finetuning_kit.trials import chance_state, trial_config, try_rate
from tests.benchmarks.rates import SET_ON, STUDIED, mean_regret, regret_of

METHODS = ("lora", "full", "freeze", "adalora", "ia3", "prefix", "prompt", "p_tuning", "ln_tuning", "dora", "pissa",
           "eva", "lora+")


@pytest.fixture(scope="module")
def parts():
    "A short run that is planned: config, tokenizer, rows."
    tokenizer = load_tokenizer("pocket")
    rows = [encode_records(tokenizer, load_records(name)[:n], max_length=128).rows
            for name, n in (("pocket", 64), ("pocket:test", 16))]
    config, _ = resolve_config(demo_config(max_steps=24, per_device_train_batch_size=4, output_dir=tempfile.mkdtemp()),
                               tokenizer=tokenizer)
    return config, tokenizer, rows


def weights(model):
    "Every number of a model, with what trains."
    return {name: (p.detach().clone(), p.requires_grad, p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_leaves_a_model_as_it_was(parts, method):
    config, tokenizer, rows = parts
    model = load_model("pocket", precision="bf16" if method in ("full", "freeze") else "fp32")
    before, state, kinds = weights(model), chance_state(), [type(part) for part in model.modules()]
    first, second = (try_rate(trial_config(config.replace(method=method), 64, 1e-3, 3), model, tokenizer, rows)
                     for _ in range(2))
    after = weights(model)
    assert list(after) == list(before) and [type(part) for part in model.modules()] == kinds
    for name, (value, trains, dtype) in before.items():
        assert torch.equal(after[name][0], value) and after[name][1:] == (trains, dtype), name
    assert torch.equal(chance_state()[2], state[2]) and chance_state()[0] == state[0]
    assert (first.losses, first.eval_loss) == (second.losses, second.eval_loss) and len(first.losses) == 3


def test_a_base_in_four_bits_is_as_it_was(parts):
    pytest.importorskip("bitsandbytes")
    config, tokenizer, rows = parts
    model = load_model("pocket", load_in_4bit=True)
    before = weights(model)
    short = trial_config(config.replace(load_in_4bit=True), 64, 1e-3, 2)
    assert len(try_rate(short, model, tokenizer, rows).losses) == 2
    for name, (value, trains, dtype) in weights(model).items():
        assert torch.equal(before[name][0], value) and before[name][1:] == (trains, dtype), name


def test_a_search_keeps_to_its_budget_and_tells_its_price(parts):
    config, tokenizer, rows = parts
    found = lr_find(config, *rows, tokenizer=tokenizer)
    assert found.n_spent <= SearchPlan(24).budget == 28 and found.cost <= 0.1
    assert found.interval[0] <= found.suggestion <= found.interval[1]
    assert {"suggestion", "as good", "error", "cost"} <= rate_lines(found).keys()
    assert json.loads(json.dumps(found.to_dict()))["n_total"] == 24
    assert "% of a sweep" in repr(found) and "| fork at rate |" in found._repr_markdown_()


@pytest.mark.parametrize("start", (1e-5, 1e-3, 1e-1))
@pytest.mark.parametrize("steep", (0.4, 1.5))
def test_the_bottom_is_found_from_anywhere_and_within_the_budget(start, steep):
    plan, spent = SearchPlan(200), []
    bottom = 2e-3 / for_whole_run(1, plan.fork_steps, 200)

    def ask(rate):
        spent.append(plan.worth(plan.fork_steps))
        return Fork(rate, 200, math.inf if rate > 0.2 else 0.5 * math.exp(steep * math.log(rate / bottom) ** 2))

    def can_pay():
        return plan.n_rising + sum(spent) + plan.worth(plan.fork_steps) <= plan.budget

    forks = walk_downhill(ask, start / EDGE, (1e-4, 1.0), can_pay)
    rate = for_whole_run(valley(forks)[0], plan.fork_steps, 200)
    assert plan.n_rising + sum(spent) <= plan.budget
    far = start < 1e-4 or start > 1e-2
    assert 2e-3 / (6 if far else 1.3) < rate < 2e-3 * (6 if far else 1.3)


@pytest.mark.parametrize("batch_size, shape", ((1, (1, 50)), (2, (1, 100)), (3, (1, 150)), (7, (1, 200)), (8, (2, 200)),
                                               (64, (16, 200))))
def test_a_fork_costs_a_quarter_of_a_run_at_most(batch_size, shape):
    plan = SearchPlan(200, batch_size)
    assert (plan.fork_rows, plan.fork_steps) == shape and plan.worth(plan.fork_steps) <= 50


def test_forks_that_all_broke_send_the_search_down():
    asked = walk_downhill(lambda rate: Fork(rate, 8, math.inf if rate > 1e-3 else 1 / rate), 0.1, (1e-5, 1.0),
                          iter((True, True, True, False)).__next__)
    assert [fork.rate for fork in asked] == sorted((fork.rate for fork in asked), reverse=True) and len(asked) == 5


def test_a_valley_of_broken_forks_names_the_lowest_rate():
    with pytest.raises(FinetuningError, match="down to 0.01; look at the rows, or search lower"):
        valley([Fork(0.01, 5, math.inf), Fork(0.1, 5, math.inf)])


def test_what_breaks_at_the_first_step_is_no_answer(parts):
    config, tokenizer, rows = parts
    model = load_model("pocket")
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FinetuningError, match="the loss became nan at step 1"):
        find_learning_rate(config, *rows, model=model, tokenizer=tokenizer)


def test_rows_that_teach_nothing_are_refused(parts):
    config, tokenizer, rows = parts
    with pytest.raises(FinetuningError, match="no token for the loss"):
        find_learning_rate(config, [EncodedRow([5, 6], [-100, -100])] * 8, rows[1], tokenizer=tokenizer)


def said(capsys, *words):
    "Exit code and standard error of the command."
    base = ["lr-find", "--base-model", "pocket", "--dataset", "pocket", "--max-seq-length", "128"]
    with pytest.raises(SystemExit) as end:
        main([*base, *words])
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("words, sentence", (
    (("--low", "1e-2", "--high", "1e-3"), "from `low` 0.01 to `high` 0.001"),
    (("--low", "fast"), "a rate must be a number such as 2e-4"),
    (("--high", "3"), "at most at 1"),
    (("--output", "/nowhere/at/all"), "is no folder; make it first"),
    (("--split-ratio", "0", "--max-steps", "24"), "forks are compared on held-out rows, and there are none"),
    (("--max-steps", "10"), "a run of 10 steps leaves 12 for a search"),
    (("--batch-size", "9000", "--max-steps", "24"), "are fewer than the 9000 of one step"),
    (("--methd", "full"), "unknown flag --methd; did you mean --method?"),
))
def test_bad_input_ends_in_one_sentence_and_exit_code_2(capsys, words, sentence):
    code, error = said(capsys, *words)
    assert code == 2 and sentence in error and "Traceback" not in error


def test_the_command_writes_a_picture_and_numbers_and_names_the_flag(tmp_path, capsys):
    rows = "".join(json.dumps({"instruction": f"Say the number {n} backwards.", "output": str(n)[::-1]}) + "\n"
                   for n in range(1000, 1080))
    (tmp_path / "rows.jsonl").write_text(rows)
    assert main(["lr-find", "--base-model", "pocket", "--dataset", str(tmp_path / "rows.jsonl"), "--max-steps", "24",
                 "--batch-size", "4", "--max-seq-length", "64", "--output", str(tmp_path / "rates")]) == 0
    told, found = capsys.readouterr().out, json.loads((tmp_path / "rates.json").read_text())
    assert f"--learning-rate {found['suggestion']:.2g}" in told and "of twelve whole runs" in told
    assert (tmp_path / "rates.png").read_bytes()[1:4] == b"PNG" and told.count("held-out loss") >= 3


def study_group(kind, all_tasks=True):
    "The stored tasks of one kind: A for adapters, F for all weights."
    tasks = json.loads(STUDIED.read_text(encoding="utf-8"))["tasks"]
    return {name: piece for name, piece in tasks.items() if name[0] == kind and (all_tasks or name not in SET_ON)}


@pytest.mark.parametrize("kind, others", [("A", (0.0, 0.025)), ("F", (0.018, 0.010))])
def test_the_published_regrets_are_those_of_the_stored_study(kind, others):
    pieces = study_group(kind).values()
    of_best, of_fall = ([regret_of(piece, fall) for piece in pieces] for fall in (False, True))
    found = round(median(of_best), 3), round(max(of_best), 3), round(median(of_fall), 4), len(of_best)
    assert found == STUDY[kind == "A"]
    unseen = median(map(regret_of, study_group(kind, all_tasks=False).values()))
    assert (round(unseen, 3), round(median(map(mean_regret, pieces)), 3)) == others


def test_the_chapters_table_is_that_of_the_stored_study():
    nb = json.loads((Path(__file__).parents[1] / "nbs" / "062_rates.ipynb").read_text(encoding="utf-8"))
    rows = [line.strip() for cell in nb["cells"] for line in cell["source"] if line.startswith("|") and "%" in line]
    ends = [f"| {regret_of(piece):+.1%} | {regret_of(piece, of_fall=True):+.2%} | {mean_regret(piece):+.1%} |"
            for kind in "AF" for piece in study_group(kind).values()]
    assert len(rows) == len(ends) == 24
    assert [row for row, end in zip(rows, ends) if not row.endswith(end)] == []
