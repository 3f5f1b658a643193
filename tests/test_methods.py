"""Each training method: it learns, its files say the same, it goes on where it stopped, it merges if it can."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetuning_kit.config import VARIANTS
from finetuning_kit.profiles import demo_config
from finetuning_kit.finetuner import LLMFineTuner
from finetuning_kit.loading import load_records
from finetuning_kit.merging import merge_lora_weights
from finetuning_kit.methods import METHOD_WORDS, add_lora, base_precision, can_merge, prepare_method
from finetuning_kit.models import count_parameters, load_model, load_tokenizer, quiet_libraries
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_records
from finetuning_kit.training import train
from finetuning_kit.workflow import fine_tune

METHODS = {  # method or variant -> learning rate, how far the loss falls at least in 10 steps of 8 rows, nats
    "full": (1e-3, 3.0), "freeze": (1e-3, 1.5), "lora": (2e-3, 2.0), "qlora": (2e-3, 2.0), "rslora": (2e-3, 2.5),
    "dora": (2e-3, 2.0), "pissa": (2e-3, 2.5), "olora": (2e-3, 2.5), "loftq": (2e-3, 2.0), "eva": (2e-3, 2.5),
    "lora+": (5e-4, 2.0), "adalora": (2e-2, 1.0), "ia3": (3e-2, 1.2), "prefix": (3e-2, 0.6), "prompt": (3e-2, 1.0),
    "p_tuning": (5e-3, 1.0), "ln_tuning": (1e-2, 1.0)}
ATTENTION = {"lora.target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def rows():
    "Rows to learn from, to measure on."
    tokenizer = load_tokenizer("pocket")
    return [encode_records(tokenizer, load_records(name)[:n], max_length=128).rows
            for name, n in (("pocket", 80), ("pocket:test", 8))]


def settings(word, output_dir, **changes):
    "The demo with another method, and ten small steps."
    config = demo_config(output_dir=str(output_dir), method=word, max_steps=10, per_device_train_batch_size=8,
                         logging_steps=1, learning_rate=METHODS[word][0])
    return config.replace(**changes)


@torch.no_grad()
def logits(model, rows):
    "What a model says at every position of the held-out rows, its own positions left out."
    found = []
    for row in rows[1]:
        ids = torch.tensor([row.input_ids])
        found.append(model(input_ids=ids).logits[0, -ids.shape[1]:].float())
    return torch.cat(found)


def place_of(run):
    "Where a run left what it trained."
    return run.folder.adapter if run.folder.adapter.is_dir() else run.folder.final_model


def apart(one, other):
    "The largest difference."
    return (one - other).abs().max().item()


def test_every_method_and_every_variant_is_tried():
    assert set(METHODS) == set(METHOD_WORDS) and set(VARIANTS) <= set(METHODS)


@pytest.mark.parametrize("word", METHODS)
def test_it_learns_and_reloads_and_merges(word, rows, tmp_path):
    config = settings(word, tmp_path)
    run = train(config, *rows)
    losses = [entry["loss"] for entry in run.history if "loss" in entry]
    assert losses[0] - min(losses[-3:]) > METHODS[word][1], losses
    assert all(p.dtype == torch.float32 for p in run.model.parameters() if p.requires_grad)
    said = logits(run.model, rows)
    reloaded = load_model(str(place_of(run)), load_in_4bit=config.load_in_4bit)
    assert apart(logits(reloaded, rows), said) <= 1e-5
    if can_merge(config):
        merge_lora_weights("pocket", run.folder.adapter, tmp_path / "merged", base_precision(config),
                           config.load_in_4bit)
        assert apart(logits(load_model(str(tmp_path / "merged")), rows), said) <= 1e-4  # of logits around 10
    elif config.trains_adapter:
        with pytest.raises(FinetuningError, match="it cannot be merged, load it as an adapter"):
            merge_lora_weights("pocket", run.folder.adapter, tmp_path / "merged")


@pytest.mark.parametrize("word", ["full", "ia3", "adalora", "prefix", "p_tuning", "pissa", "lora+", "loftq"])
def test_a_stopped_run_ends_like_an_unbroken_one(word, rows, tmp_path):
    whole = train(settings(word, tmp_path / "whole"), *rows)
    config, asked = settings(word, tmp_path / "broken"), []
    part = train(config, *rows, should_stop=lambda: asked.append(1) or len(asked) == 5)
    done = train(config, *rows, resume="auto")
    assert (part.status, done.status) == ("stopped", "finished")
    one, other = [load_file(next(place_of(run).glob("*model.safetensors"))) for run in (whole, done)]
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("word", ["prefix", "prompt"])
def test_weights_in_the_rows_count_for_virtual_tokens_too(word, rows, tmp_path):
    from dataclasses import replace

    plain = train(settings(word, tmp_path / "a", max_steps=3), rows[0])
    weighted = [replace(row, weights=[0.5] * row.n_tokens) for row in rows[0]]
    same = train(settings(word, tmp_path / "b", max_steps=3), weighted)
    for one, other in zip(plain.history, same.history):  # weights that are all equal change nothing
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_packing_and_checkpointing_give_way_with_a_word(rows, tmp_path):
    config = settings("prefix", tmp_path, packing=True, gradient_checkpointing=True, max_steps=1, warmup_steps=0)
    run = train(config, *rows)
    assert not run.config.training.packing and not run.config.training.gradient_checkpointing
    assert {note.split(":")[0] for note in run.notes} >= {"packing", "gradient_checkpointing"}
    for word in ("prompt", "ia3", "freeze"):
        run = train(settings(word, tmp_path / word, gradient_checkpointing=True, max_steps=1, warmup_steps=0), *rows)
        assert run.config.training.gradient_checkpointing and run.status == "finished"


@pytest.mark.parametrize("ends", [{"lora.modules_to_save": ["embed_tokens"]}, {"lora.modules_to_save": ["lm_head"]},
                                  {"lora.trainable_token_indices": [3, 50, 60]}], ids=str)
def test_both_ends_of_a_tied_model_stay_one_matrix(ends, rows, tmp_path):
    run = train(settings("lora", tmp_path, **ATTENTION, **ends), *rows)
    assert any("trained as one" in note for note in run.notes)
    said, told = logits(run.model, rows), [e["eval_loss"] for e in run.history if "eval_loss" in e][-1]
    labels = torch.tensor([label for row in rows[1] for label in row.labels[1:] + [-100]])
    assert torch.nn.functional.cross_entropy(said, labels).item() == pytest.approx(told, abs=1e-4)
    assert apart(logits(load_model(str(run.folder.adapter)), rows), said) <= 1e-5
    merge_lora_weights("pocket", run.folder.adapter, tmp_path / "merged", "fp32")
    assert apart(logits(load_model(str(tmp_path / "merged")), rows), said) <= 1e-4


@pytest.mark.parametrize("changes, words", [
    ({"lora.target_modules": ["lm_head"]}, "is the output head"),
    ({"lora.target_modules": ["q_proj", "embed_tokens"]}, "is the matrix of the output head as well"),
    ({"lora.target_modules": ["self_attn"]}, "it has down_proj, embed_tokens, gate_proj"),
    ({"lora.modules_to_save": ["score"]}, "`modules_to_save` names 'score'"),
    ({"lora.trainable_token_indices": [2048]}, "tokens are 0 to 2047"),
    ({"lora.init_lora_weights": "loftq"}, "set `load_in_4bit` to true"),
    ({"method": "adalora", "lora.use_dora": True}, "`lora.use_dora` is a variant of LoRA"),
])
def test_what_cannot_be_trained_is_a_sentence(changes, words):
    config = demo_config(**{"lora.target_modules": "all-linear", "method": "lora", **changes})
    with pytest.raises(FinetuningError, match=words):
        prepare_method(config, load_model("pocket"), [])


def test_a_bf16_base_gets_fp32_where_it_trains(tmp_path):
    for word in ("lora", "ia3", "prefix", "ln_tuning", "freeze"):
        config = settings(word, tmp_path, bf16=True)
        base = load_model("pocket", precision=base_precision(config))
        model, _ = prepare_method(config, base)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        model(input_ids=torch.tensor([[5, 6, 7]]))  # outside of autocast, as when it answers
    assert base_precision(settings("lora", tmp_path, bf16=True)) == "bf16"


def gpt2(**changes):
    "A random model of GPT-2's architecture."
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**changes))


def test_the_numbers_of_gpt2_are_the_right_ones(capsys):
    with torch.device("meta"):
        tuner, model = LLMFineTuner("pocket"), gpt2()
    tuner.model = model
    assert tuner.get_target_modules() == ["c_attn", "c_proj"]
    tuner.setup_lora(target_modules=["c_attn"])
    told = "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
    assert capsys.readouterr().out.strip() == told
    with torch.device("meta"):
        tuner.model = gpt2()
    tuner.setup_lora()
    assert "trainable params: 811,008 ||" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["lora", "adalora", "ia3", "ln_tuning", "prefix", "prompt", "p_tuning", "freeze"])
def test_another_architecture_gets_its_own_layers(word):
    model = gpt2(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=64)
    config = demo_config(method=word, lora={}) if word in ("lora", "adalora") else demo_config(method=word)
    config = config.replace(**{"lora.target_modules": "all-linear"}) if word == "adalora" else config
    with quiet_libraries():
        model, notes = prepare_method(config, model)
    assert 0 < count_parameters(model).trainable and notes
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()


def test_default_layers_give_way_to_the_models_own():
    from finetuning_kit.config import FineTuningConfig

    config = FineTuningConfig(model_name="x", load_in_4bit=False)
    model, notes = prepare_method(config, gpt2(n_layer=1, n_embd=32, n_head=2))
    assert notes[0] == "lora on c_attn (1 layer); c_proj (2 layers)" and "own attention layers were taken" in notes[1]
    with pytest.raises(FinetuningError, match="no layer of this model is called; it has c_attn"):
        add_lora(gpt2(n_layer=1, n_embd=32, n_head=2), demo_config(**ATTENTION).lora)


def test_a_run_without_a_merge_ends_well(tmp_path):
    result = fine_tune(settings("prefix", tmp_path, max_steps=4), max_answers=8)
    assert (result.status, result.merge_check) == ("finished", None)
    assert "final_model" not in result.places() and "adapter" in result.places()
    assert any("nothing to merge" in note for note in result.notes)
    card = (result.folder.adapter / "README.md").read_text()
    assert "keys and values before the text" in card and "load_model(\"adapter\")" in card
    assert json.loads((result.folder / "run.json").read_text())["complete"]
    assert (result.folder.adapter / "base.json").is_file() and "nothing to merge" in Path(
        result.folder / "README.md").read_text()


def test_full_and_merged_runs_leave_a_verified_model(tmp_path):
    full = fine_tune(settings("freeze", tmp_path / "a", max_steps=4), max_answers=8)
    assert (full.merge_check, full.status) == (None, "finished") and "the upper layers" in (
        full.folder.final_model / "README.md").read_text()
    tuned = fine_tune(settings("pissa", tmp_path / "b"), max_answers=8)
    assert tuned.merge_check.passed and "load_model" in (tuned.folder.adapter / "README.md").read_text()


@pytest.mark.parametrize("word, rate", [("prefix", 0.3), ("prompt", 0.1), ("p_tuning", 3e-3)])
def test_answers_in_batches_are_those_of_one_by_one(word, rate, rows, tmp_path):
    from finetuning_kit.asking import generate_answers

    run = train(settings(word, tmp_path, learning_rate=rate), rows[0])
    ids = [row.input_ids[: row.n_tokens - row.n_loss_tokens] for row in rows[1]]
    assert generate_answers(run.model, run.tokenizer, ids, 8) == [
        generate_answers(run.model, run.tokenizer, [one], 8)[0] for one in ids]
