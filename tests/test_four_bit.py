"""Adapters trained on a base in 4 bits: what each way of handing them on costs, and what is refused."""
import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import finetuning_kit.four_bit as four_bit
from finetuning_kit.bases import attach_adapter, record_base
from finetuning_kit.four_bit import (DEQUANTISED, FULL_PRECISION, IN_4_BITS, UNMERGED, WAYS_FILE, FourBitReport,
                                     FourBitWay, compare_ways, merge_trained_in_4bit, open_way)
from finetuning_kit.loading import load_records
from finetuning_kit.merging import fold_adapter, merge_lora_weights
from finetuning_kit.models import four_bit_config, load_model, load_tokenizer, pocket_model_path, quiet_libraries
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_prompt
from finetuning_kit.verification import MergeCheck, verify_merge

pytest.importorskip("bitsandbytes")


def make_adapter(folder, base="pocket", std=0.4, load_in_4bit=True, precision="fp32", targets=("q_proj", "down_proj")):
    "An adapter that no training made, and the record that training would have left"
    torch.manual_seed(0)
    with quiet_libraries():
        lora = LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")
        model = get_peft_model(load_model(str(base)), lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=std) if std else None
        model.save_pretrained(folder, save_embedding_layers=False)
    record_base(folder, base, precision, load_in_4bit)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("pocket")


@pytest.fixture(scope="module")
def questions():
    return load_records("pocket:test")[:4]


@pytest.fixture(scope="module")
def prompts(tokenizer, questions):
    return [encode_prompt(tokenizer, each) for each in questions]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def report(adapter, prompts):
    return compare_ways("pocket", adapter, prompts, max_new_tokens=4)


def made_up(**found):
    "A report with these relative differences"
    ways = [FourBitWay(name, MergeCheck(4, 40, 1.0, 2.0, far, 1.0, 4, 0.05, kl=far), 10, {})
            for name, far in found.items()]
    return FourBitReport(tuple(ways), 0.05, 5)


@pytest.mark.parametrize("dequantised, full, best", [
    (0.01, 0.02, DEQUANTISED), (0.02, 0.01, FULL_PRECISION), (0.06, 0.01, FULL_PRECISION), (0.06, 0.07, UNMERGED),
    (0.05, 0.07, DEQUANTISED), (float("inf"), float("nan"), UNMERGED), (float("nan"), 0.01, FULL_PRECISION)])
def test_the_best_is_the_closest_merge_within_the_limit(dequantised, full, best):
    report = made_up(**{DEQUANTISED: dequantised, FULL_PRECISION: full, UNMERGED: 0.0, IN_4_BITS: 0.0})
    assert report.best.name == best
    assert report.recommendation.startswith("ship the adapter" if best == UNMERGED else f"merge into the {best}")


def test_written_out_is_what_was_trained_and_the_others_are_not(report):
    far = {each.name: each.check.relative_difference for each in report.ways}
    assert far[DEQUANTISED] < 1e-3 and far[UNMERGED] == 0
    assert min(far[FULL_PRECISION], far[IN_4_BITS]) > 0.05
    assert report.best.name == DEQUANTISED and report[UNMERGED].n_bytes < report.n_base_bytes < report.best.n_bytes
    assert json.loads(json.dumps(report.to_dict()))["best"] == DEQUANTISED
    assert report.recommendation in str(report) and report.recommendation in report._repr_markdown_()


@pytest.mark.parametrize("kind, double", [("fp4", False), ("fp4", True), ("nf4", False)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_kind_of_four_bits_is_written_out_within_the_limit(adapter, prompts, kind, double, precision):
    held = four_bit_config(precision)
    held.bnb_4bit_quant_type, held.bnb_4bit_use_double_quant = kind, double
    trained = open_way(UNMERGED, "pocket", adapter, held, precision)
    assert next(each for each in trained.parameters() if hasattr(each, "quant_type")).quant_type == kind
    check = verify_merge(trained, open_way(DEQUANTISED, "pocket", adapter, held, precision), load_tokenizer("pocket"),
                         prompts[:2], 4, 0.05)
    assert check.relative_difference <= {"fp32": 1e-3, "bf16": 0.05}[precision]


def test_two_models_at_most_are_held(adapter, prompts, monkeypatch):
    alive, most = [], []

    def counted(*given):
        gc.collect()
        most.append(1 + sum(each() is not None for each in alive))
        model = load_model(*given)
        alive.append(weakref.ref(model.get_input_embeddings()))
        return model

    monkeypatch.setattr(four_bit, "load_model", counted)
    compare_ways("pocket", adapter, prompts[:1], max_new_tokens=2)
    assert max(most) == 2 and len(most) == 5


def test_a_merge_is_written_whole_with_its_figures(adapter, prompts, tokenizer, tmp_path):
    report = merge_trained_in_4bit("pocket", adapter, tmp_path / "merged", prompts, max_new_tokens=4)
    assert report.folder == tmp_path / "merged"
    assert json.loads((report.folder / WAYS_FILE).read_text()) == report.to_dict()
    trained = open_way(UNMERGED, "pocket", adapter)
    assert verify_merge(trained, report.folder, tokenizer, prompts, 4).relative_difference < 1e-3


def test_past_the_limit_nothing_is_written_unless_forced(adapter, prompts, tmp_path):
    def merge(name, **more):
        return merge_trained_in_4bit("pocket", adapter, tmp_path / name, prompts[:2], max_new_tokens=2, **more)

    for more in ({"limit": 1e-9}, {"way": FULL_PRECISION}, {"limit": 1e-9, "force": True}):
        with pytest.raises(FinetuningError, match="nothing was merged"):
            merge("refused", **more)
    for way in (UNMERGED, IN_4_BITS, "other"):
        with pytest.raises(FinetuningError, match="`way` must be best"):
            merge("refused", way=way, force=True)
    assert not (tmp_path / "refused").exists()
    forced = merge("forced", way=FULL_PRECISION, force=True)
    assert not forced[FULL_PRECISION].check.passed and (tmp_path / "forced" / "model.safetensors").is_file()
    written = load_model(str(tmp_path / "forced")).state_dict()
    wanted = open_way(FULL_PRECISION, "pocket", adapter).state_dict()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    with pytest.raises(FinetuningError, match="exists already"):
        merge("forced")


def test_an_adapter_that_met_no_four_bits_is_told_so(prompts, tmp_path):
    plain = make_adapter(tmp_path / "plain", load_in_4bit=False)
    with pytest.raises(FinetuningError, match="was not trained on a base in 4 bits.*fp32.*merge_lora_weights"):
        compare_ways("pocket", plain, prompts)
    with pytest.raises(FinetuningError, match="`load_in_4bit` is False"):
        compare_ways("pocket", plain, prompts, load_in_4bit=False)
    (plain / "base.json").unlink()
    with pytest.raises(FinetuningError, match="does not say how its base was held"):
        compare_ways("pocket", plain, prompts)


def test_bad_input_is_refused_in_a_sentence(adapter, prompts, questions, tmp_path, monkeypatch):
    with pytest.raises(FinetuningError, match="`prompts` must be a list"):
        compare_ways("pocket", adapter, [])
    for limit in (0, 2, "much", float("nan")):
        with pytest.raises(FinetuningError, match="`limit` must be above 0"):
            compare_ways("pocket", adapter, prompts, limit=limit)
    with pytest.raises(FinetuningError, match="`precision` must be one of"):
        compare_ways("pocket", adapter, prompts, precision="int4")
    with pytest.raises(FinetuningError, match="`records` is empty"):
        compare_ways("pocket", adapter, prompts, [])
    with pytest.raises(FinetuningError, match="lack an answer"):
        compare_ways("pocket", adapter, prompts, [{"messages": [{"role": "user", "content": "Who?"}]}])
    with pytest.raises(FinetuningError, match="is no adapter"):
        compare_ways("pocket", tmp_path, prompts)
    monkeypatch.setattr("finetuning_kit.models.has_bitsandbytes", lambda: False)
    with pytest.raises(FinetuningError, match="needs bitsandbytes"):
        compare_ways("pocket", adapter, prompts)


def test_another_base_is_refused(prompts, adapter, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                 vocab_size=100)).save_pretrained(tmp_path / "other")
    with pytest.raises(FinetuningError, match="is not the base that this adapter was trained on"):
        compare_ways(tmp_path / "other", adapter, prompts)


def test_a_base_that_four_bits_turn_round_is_refused(prompts, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100, bos_token_id=1, eos_token_id=2)
                    ).save_pretrained(tmp_path / "gpt2")
    make_adapter(tmp_path / "adapter", tmp_path / "gpt2", targets=["c_attn"])
    with pytest.raises(FinetuningError, match="keeps its weights transposed"):
        compare_ways(tmp_path / "gpt2", tmp_path / "adapter", prompts, tokenizer=load_tokenizer("pocket"))


def test_a_base_stored_in_four_bits_has_two_ways_and_is_written_out(prompts, tokenizer, tmp_path):
    base = tmp_path / "base"
    with quiet_libraries():
        load_model("pocket", load_in_4bit=True).save_pretrained(base)
        tokenizer.save_pretrained(base)
    adapter = make_adapter(tmp_path / "adapter")
    record_base(adapter, base, load_in_4bit=True)
    report = merge_trained_in_4bit(base, adapter, tmp_path / "merged", prompts[:2], max_new_tokens=2)
    assert [each.name for each in report.ways] == [DEQUANTISED, UNMERGED, IN_4_BITS]
    assert "stored in 4 bits itself" in report.notes[-1]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(FinetuningError, match="the base is held in 4 bits"):
        merge_lora_weights(base, adapter, tmp_path / "never", load_in_4bit=False)
    assert not (tmp_path / "never").exists()


def test_an_adapter_that_does_nothing_is_no_reason_to_merge(prompts, tmp_path):
    still = make_adapter(tmp_path / "still", std=0)
    report = compare_ways("pocket", still, prompts[:2], max_new_tokens=2)
    assert report[UNMERGED].check.max_logit_difference == 0
    assert report[DEQUANTISED].check.max_logit_difference < 1e-4
    assert report.recommendation


def test_four_bits_are_never_merged_in_place(adapter, prompts):
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        base = AutoModelForCausalLM.from_pretrained(pocket_model_path(), quantization_config=four_bit_config(),
                                                    dtype=torch.float32, device_map={"": "cpu"}).eval()
    asked = attach_adapter(base, adapter)
    for _ in range(2):
        with pytest.raises(FinetuningError, match="the base is held in 4 bits"):
            fold_adapter(asked)
        with torch.no_grad():
            asked(input_ids=torch.tensor([prompts[0]]))  # on some CPUs the weights are rearranged now


def test_a_report_draws_itself(report):
    figure = report.plot()
    assert [each.get_text() for each in figure.axes[0].get_yticklabels()] == [each.name for each in report.ways][::-1]
    assert replace(report, ways=tuple(each for each in report.ways if each.name != FULL_PRECISION)).plot()
