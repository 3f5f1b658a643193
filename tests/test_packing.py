"Packing and weights through the trainer: what must come out the same, comes out the same."
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from finetuning_kit.profiles import demo_config
from finetuning_kit.loading import load_records
from finetuning_kit.machine import resolve_config
from finetuning_kit.models import load_model, load_tokenizer, quiet_libraries
from finetuning_kit.packing import check_packing, plan_packs
from finetuning_kit.runs import RunFolder
from finetuning_kit.tokens import encode_records, to_dataset
from finetuning_kit.trainer import make_trainer, own_forward
from finetuning_kit.progress import RunProgress
from finetuning_kit.speed import labelled_positions
from finetuning_kit.training import train


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("pocket")


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_records(tokenizer, load_records("pocket")[:48], max_length=128).rows


def weighted(rows, weights):
    "A data set whose row n weighs `weights[n]`, or one list of weights a row."
    data = to_dataset(rows)
    lists = [weight if isinstance(weight, list) else [float(weight)] * row.n_tokens
             for row, weight in zip(rows, weights)]
    return data.remove_columns([name for name in data.column_names if name == "weights"]).add_column("weights", lists)


def outcome(tokenizer, rows, tmp_path, weights=None, eval_weights=None, lora=True, **changes):
    "Losses, the trained numbers, and the held-out loss of a short run."
    settings = dict(max_steps=3, per_device_train_batch_size=8, logging_steps=1, warmup_steps=0)
    config = resolve_config(demo_config(**{**settings, **changes}))[0]
    set_seed(1)
    progress = RunProgress(RunFolder(tmp_path / f"run{len(list(tmp_path.iterdir()))}").open())
    with quiet_libraries():
        model = load_model("pocket")
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        with own_forward(model), labelled_positions():
            trainer = make_trainer(config, model, tokenizer, (rows, rows[:11]), progress)
            if weights:
                trainer.train_dataset = weighted(rows, weights)
            if eval_weights:
                trainer.eval_dataset = weighted(rows[:11], eval_weights)
            trainer.train()
            held_out = trainer.evaluate()["eval_loss"]
    trained = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return [entry["loss"] for entry in progress.history if "loss" in entry], trained, held_out


def same(one, other, loss=1e-5, weights=2e-4):
    assert one[0] == pytest.approx(other[0], abs=loss)
    assert one[2] == pytest.approx(other[2], abs=10 * loss)
    assert (one[1] - other[1]).abs().max() < weights


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("steps", [{}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}])
def test_packing_changes_no_loss(tokenizer, rows, tmp_path, lora, steps):
    rate = {} if lora else {"learning_rate": 1e-4}
    same(outcome(tokenizer, rows, tmp_path, lora=lora, **steps, **rate),
         outcome(tokenizer, rows, tmp_path, lora=lora, packing=True, **steps, **rate))


@pytest.mark.parametrize("packing", [False, True])
def test_weights_of_one_change_nothing(tokenizer, rows, tmp_path, packing):
    plain = outcome(tokenizer, rows, tmp_path, packing=packing)
    ones = outcome(tokenizer, rows, tmp_path, [1] * len(rows), [1] * 11, packing=packing)
    same(plain, ones, loss=1e-6, weights=1e-5)
    sevens = outcome(tokenizer, rows, tmp_path, [7] * len(rows), [0.01] * 11, packing=packing)
    same(plain, sevens)


@pytest.mark.parametrize("packing", [False, True])
def test_weight_zero_is_no_label(tokenizer, rows, tmp_path, packing):
    def half(row):
        "The row's first labels are taken away."
        last = max(at for at, label in enumerate(row.labels) if label != -100)
        return type(row)(row.input_ids, [-100] * last + row.labels[last:])

    silent = [half(row) if n % 3 == 0 else row for n, row in enumerate(rows)]
    weights = [[float(label != -100) for label in row.labels] for row in silent]
    config = {"packing": packing, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    by_weight = outcome(tokenizer, rows, tmp_path, weights, weights[:11], **config)
    by_label = outcome(tokenizer, silent, tmp_path, **config)
    same(by_weight, by_label, loss=1e-6, weights=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("steps", [(4, 1), (1, 4)])
def test_weight_two_is_the_row_twice(tokenizer, rows, tmp_path, packing, steps):
    "All rows in one step, so that only the sums can differ."
    batch, passes = steps
    four = rows[:4]
    once = outcome(tokenizer, four, tmp_path, [2, 1, 1, 1], max_steps=2, packing=packing,
                   per_device_train_batch_size=batch, gradient_accumulation_steps=passes)
    batch, passes = (5, 1) if passes == 1 else (1, 5)
    twice = outcome(tokenizer, [*four, four[0]], tmp_path, max_steps=2, packing=packing,
                    per_device_train_batch_size=batch, gradient_accumulation_steps=passes)
    assert once[0] == pytest.approx(twice[0], abs=1e-5)
    assert (once[1] - twice[1]).abs().max() < 2e-4


def test_loss_by_hand(tokenizer, rows, tmp_path):
    "Weights that differ from token to token, over two accumulated passes, against a sum written out."
    pair = rows[:2]
    weights = [[0.5 + n % 3 for n in range(row.n_tokens)] for row in pair]
    model, top, bottom = load_model("pocket"), 0.0, 0.0
    with torch.no_grad():
        for row, of_row in zip(pair, weights):
            log_p = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for at, label in enumerate(row.labels):
                if label != -100:
                    top, bottom = top - of_row[at] * log_p[at - 1, label].item(), bottom + of_row[at]
    for packing in (False, True):
        losses = outcome(tokenizer, pair, tmp_path, weights, max_steps=1, packing=packing,
                         per_device_train_batch_size=1, gradient_accumulation_steps=2)[0]
        assert losses[0] == pytest.approx(top / bottom, abs=1e-5)


def test_held_out_loss_is_weighted(tokenizer, rows, tmp_path):
    held = [float(n % 3) for n in range(11)]
    losses = {outcome(tokenizer, rows, tmp_path, None, held, max_steps=1, packing=packing,
                      per_device_eval_batch_size=size)[2] for packing in (False, True) for size in (1, 4)}
    assert max(losses) - min(losses) < 1e-4


def test_a_packed_run_resumes_exactly(tokenizer, rows, tmp_path):
    config = demo_config(max_steps=6, per_device_train_batch_size=5, gradient_accumulation_steps=2, packing=True,
                         save_steps=3, logging_steps=2, output_dir=str(tmp_path))
    config = config.replace(**{"lora.lora_dropout": 0.1})
    whole = train(config, rows, rows[:8], folder=RunFolder(tmp_path / "whole"))
    heard = []
    parts = RunFolder(tmp_path / "parts")
    train(config, rows, rows[:8], folder=parts, on_event=heard.append,
          should_stop=lambda: any(event.get("step") == 3 for event in heard))
    resumed = train(config, rows, rows[:8], folder=parts, resume="auto")
    assert (whole.n_steps, resumed.n_steps) == (6, 6)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, other)
    assert whole.history == resumed.history


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"load_in_4bit": True}])
def test_packed_rows_are_isolated(rows, options):
    if options.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    with quiet_libraries():
        check = check_packing(load_model("pocket", **options), rows)
    assert check.passed and check.leak == 0.0, repr(check)


def test_no_row_is_lost_or_cut(rows):
    lengths = [row.n_tokens for row in rows]
    for pack_length in (max(lengths), 64, 128, 1000):
        plan = plan_packs(lengths, pack_length)
        assert sorted(row for pack in plan for row in pack) == list(range(len(rows)))
        assert max(sum(lengths[row] for row in pack) for pack in plan) <= pack_length
