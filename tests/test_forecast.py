"""The forecast: every method, the command, and what it says of settings and models that make no sense."""
import json
import tempfile

import pytest
from transformers import LlamaConfig

from finetuning_kit.budget import Tally, base_shape, memory_budget, planned_model
from finetuning_kit.cli import main
from finetuning_kit.config import USUAL_RATE, VARIANTS, FineTuningConfig
from finetuning_kit.encoding import EncodedRow
from finetuning_kit.forecast import GPUS, estimate
from finetuning_kit.machine import has_bitsandbytes
from finetuning_kit.methods import prepare_method
from finetuning_kit.models import count_parameters, load_model, quiet_libraries
from finetuning_kit.profiles import demo_config
from finetuning_kit.settings import FinetuningError
from finetuning_kit.training import train

DEEP = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
                   num_key_value_heads=2)


@pytest.mark.parametrize("method", [*USUAL_RATE, *VARIANTS])
def test_every_method_has_a_budget(method):
    "Each way to train is planned, traced, and takes memory for what it trains."
    config = demo_config(method=method)
    budget = memory_budget(config, DEEP, rows=2, length=16)
    assert 0 < budget.count.trainable <= budget.count.total
    assert budget.peak > budget.parts["weights"] > 0 and budget.work["flops"] > 0
    assert budget.moments["update"]["gradients"] == 4 * budget.count.trainable


@pytest.mark.parametrize("method", ["lora", "full", "freeze", "adalora", "ia3", "prefix", "prompt", "p_tuning",
                                    "ln_tuning"])
def test_counts_are_those_of_the_real_model(method):
    "A model of shapes has the parameters of the model that a run would train."
    config = demo_config(method=method)
    with quiet_libraries():
        real = prepare_method(config, load_model("pocket"))[0]
    assert count_parameters(planned_model(config, base_shape("pocket"))) == count_parameters(real)


def test_what_saves_memory_saves_it():
    "Checkpointing, fewer rows, shorter rows, a smaller optimizer: each takes less."
    config = demo_config(method="full", bf16=True)
    start = memory_budget(config, DEEP, 8, 64)
    for changes, rows, length in (({"gradient_checkpointing": True}, 8, 64), ({}, 4, 64), ({}, 8, 32)):
        less = memory_budget(config.replace(**changes), DEEP, rows, length)
        assert less.moments["loss"]["activations"] < start.moments["loss"]["activations"]
    less = memory_budget(config.replace(optim="adafactor"), DEEP, 8, 64)
    assert less.moments["update"]["optimizer"] < start.moments["update"]["optimizer"] / 4


def test_the_command_prints_tables_and_json(capsys):
    "`estimate` for a device, in words and as JSON."
    assert main(["estimate", "--rows", "320", "--length", "60", "--gpu", "l4"]) == 0
    shown = capsys.readouterr().out
    assert "parameters train" in shown and "60 optimizer steps" in shown and "P100" in shown
    assert main(["estimate", "--rows", "320", "--gpu", "L4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["here"]["device"] == "L4" and [each["device"] for each in told["gpus"]] == list(GPUS)


@pytest.mark.parametrize("words, reason", [
    (["--gpu", "abacus"], "no GPU called 'abacus'"), (["--base-model", "./no/such/folder"], "neither"),
    (["--rows", "0"], "at least one row"), (["--r", "0"], "`lora.r` must be at least 1")])
def test_nonsense_ends_in_a_sentence(words, reason, capsys):
    "Bad input: exit code 2, one sentence."
    with pytest.raises(SystemExit) as end:
        main(["estimate", *words])
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_a_model_that_cannot_be_traced_is_told():
    "A model whose path depends on numbers is refused in a sentence, not with a traceback."
    with pytest.raises(FinetuningError, match="no `hidden_size`"):
        estimate(demo_config(), machine="T4", shape=LlamaConfig(hidden_size=0, num_attention_heads=1))


@pytest.mark.skipif(not has_bitsandbytes(), reason="needs bitsandbytes")
def test_four_bits_are_counted_as_they_lie():
    "Rounded weights take what bitsandbytes gives them."
    config = demo_config(method="qlora")
    real = load_model("pocket", load_in_4bit=True)
    lying = sum(p.numel() * p.element_size() for p in real.parameters() if p.dtype.itemsize == 1)
    whole = sum(p.numel() for p in real.parameters() if p.dtype.itemsize > 1)
    told = memory_budget(config, base_shape("pocket"), 1, 16).parts["weights"]
    assert abs(told - (lying * 1.0317 + 4 * whole)) < 0.02 * told


@pytest.mark.parametrize("changes", [
    {}, {"bf16": True}, {"method": "full", "gradient_checkpointing": True}, {"method": "ia3"}], ids=str)
def test_the_budget_is_what_training_holds(changes):
    "A tally of every tensor around `train`, loading included, agrees with the budget."
    config = demo_config(output_dir=tempfile.mkdtemp(), max_steps=2, packing=False, per_device_train_batch_size=8,
                         gradient_accumulation_steps=2, max_seq_length=256, eval_strategy="no", logging_steps=100,
                         **changes)
    ids = [[(7 * row + at) % 2000 + 8 for at in range(256)] for row in range(32)]
    with Tally() as real:
        train(config, [EncodedRow(row, row) for row in ids])
    held = max(sum(accounts.values()) for accounts in real.peaks.values())
    assert 0.95 < memory_budget(config, base_shape("pocket"), on_gpu=False).peak / held < 1.05


def of_experts(kind):
    "A tiny mixture of experts: sixteen chosen from by twos, or four."
    from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

    tiny = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "num_experts_per_tok": 2}
    some = {"moe_intermediate_size": 32, "num_experts": 16}
    return {"mixtral": lambda: MixtralConfig(**tiny, num_local_experts=4),
            "qwen2_moe": lambda: Qwen2MoeConfig(**tiny, **some, shared_expert_intermediate_size=64),
            "qwen3_moe": lambda: Qwen3MoeConfig(**tiny, **some, head_dim=16)}[kind]()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("method", ["lora", "full", "qlora", "ia3"])
def test_experts_are_counted_exactly_and_their_work_too(kind, method):
    from transformers import AutoModelForCausalLM

    shape = of_experts(kind)
    adapter = {"target_modules": "all-linear", "lora_dropout": 0} if method in ("lora", "qlora") else {}
    config = FineTuningConfig(model_name="pocket", method=method, bf16=True, **adapter)
    told = memory_budget(config, shape, rows=2, length=32, on_gpu=False)
    plain = config.replace(load_in_4bit=False)
    model, _ = prepare_method(plain, AutoModelForCausalLM.from_config(shape))
    assert vars(told.count) == vars(count_parameters(model))
    experts = 2 * 64 * 2 * 3 * 64 * shape.to_dict().get("moe_intermediate_size", 128)  # layers, tokens, by twos, three
    assert told.work["flops"] > 2 * experts  # forward, and backward to the input at least


def test_what_the_experts_adapter_lacks_is_said():
    config = FineTuningConfig(model_name="pocket", bf16=True, target_modules="all-linear", lora_dropout=0.1)
    with pytest.raises(FinetuningError, match="whose adapter PEFT gives no `lora_dropout`"):
        memory_budget(config, of_experts("mixtral"), rows=2, length=32)


def test_experts_take_kernels_beside_tensors_on_a_cpu_in_half_precision():
    from finetuning_kit.forecast import memory_span

    plain, routed = (memory_span(2**29, False, experts) for experts in (False, True))
    assert 0.4 * 2**30 < routed.likely - plain.likely < 0.5 * 2**30
    assert memory_span(2**29, True, True) == memory_span(2**29, True)


def test_training_on_a_cpu_scores_labels_in_the_kits_own_way(monkeypatch):
    import finetuning_kit.speed

    calls, apply = [], finetuning_kit.speed.LabelScores.apply
    monkeypatch.setattr(finetuning_kit.speed.LabelScores, "apply", lambda *args: calls.append(1) or apply(*args))
    train(demo_config(output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=2, eval_strategy="no"),
          [EncodedRow([row + 8] * 9, [row + 8] * 9) for row in range(4)])
    assert calls
