"""An adapter taken out of two models: it does what the fine-tuned model does, or it is refused in a sentence."""
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from finetuning_kit.extraction import choose_directions, energy_against_rank, extract_adapter, leading_svd
from finetuning_kit.bases import check_base, read_adapter
from finetuning_kit.merging import merge_lora_weights
from finetuning_kit.models import load_model, quiet_libraries
from finetuning_kit.settings import FinetuningError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2, with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "gpt2, transposed": lambda: GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32, initializer_range=0.1, bos_token_id=0,
        eos_token_id=0))}
IDS = torch.arange(2, 22)[None]


def logits(model):
    "What a model says about some tokens."
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def moved(model, only=""):
    "Every parameter moves a little, as in full fine-tuning."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=KINDS)
def models(request, tmp_path):
    "A base and a form of it in which everything moved, on disk."
    torch.manual_seed(0)
    with quiet_libraries():
        base = KINDS[request.param]()
        base.save_pretrained(tmp_path / "base")
        moved(base).save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    return tmp_path


def test_all_directions_and_the_rest_kept_give_the_tuned_model(models):
    found = extract_adapter(models / "base", models / "tuned", models / "out", energy=1 - 1e-9, rest="keep")
    assert found.energy > 1 - 1e-6 and found.whole and not found.dropped
    base, tuned = load_model(str(models / "base")), load_model(str(models / "tuned"))
    effect = (logits(base) - logits(tuned)).abs().max()
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(base, models / "out")
    apart = (logits(adapted) - logits(tuned)).abs().max().item()  # fp32 tells shares of energy apart to a millionth,
    assert apart < 1e-3 * effect.item()  # so what is cut off may be a thousandth of the change
    check_base(read_adapter(models / "out"), models / "base")
    with pytest.raises(FinetuningError, match="is not the base"):
        check_base(read_adapter(models / "out"), models / "tuned")


def test_energy_grows_with_rank_and_every_layer_gets_its_own(models):
    curve = energy_against_rank(models / "base", models / "tuned")
    shares = [curve.at(rank) for rank in range(1, 33)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    found = extract_adapter(models / "base", models / "tuned", models / "out", energy=0.5, rest="drop")
    assert found.ranks == curve.ranks(0.5) and len(set(found.ranks.values())) > 1 and min(found.kept.values()) >= 0.5
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(load_model(str(models / "base")), models / "out")
    assert {layer.scaling["default"] for layer in adapted.modules() if isinstance(layer, LoraLayer)} == {1.0}
    assert found.dropped and not found.whole


def test_what_lora_cannot_hold_is_named_unless_told_otherwise(models):
    with pytest.raises(FinetuningError, match="other tensors changed too: .*keep stores them whole"):
        extract_adapter(models / "base", models / "tuned", models / "out")
    assert not (models / "out").exists()


def test_chosen_layers_only(models):
    ends = ["c_attn"] if (models / "base/config.json").read_text().count("gpt2") else ["q_proj", "v_proj"]
    found = extract_adapter(models / "base", models / "tuned", models / "out", rank=2, target_modules=ends, rest="drop")
    assert {layer.rpartition(".")[2] for layer in found.ranks} == set(ends) and set(found.ranks.values()) == {2}
    assert json.loads((models / "out/adapter_config.json").read_text())["target_modules"]
    with pytest.raises(FinetuningError, match="names no linear layer"):
        extract_adapter(models / "base", models / "tuned", models / "two", target_modules=["query"], rest="drop")


@pytest.fixture
def pocket(tmp_path):
    "A pocket model with an adapter of rank 8 merged in; nothing else changed."
    torch.manual_seed(0)
    with quiet_libraries():
        model = get_peft_model(load_model("pocket"), LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_lora_weights("pocket", tmp_path / "adapter", tmp_path / "tuned", precision="fp32")
    return tmp_path


def test_the_adapter_comes_back(pocket):
    found = extract_adapter("pocket", pocket / "tuned", pocket / "out", rank=8)
    assert len(found.ranks) == 8 and found.energy > 0.999999 and not found.whole + found.dropped
    merged = merge_lora_weights("pocket", pocket / "out", pocket / "again")
    tuned = logits(load_model(str(pocket / "tuned")))
    assert (logits(load_model(str(merged))) - tuned).abs().max() < 1e-5 * max(1, tuned.abs().max())
    weights = load_file(pocket / "out/adapter_model.safetensors")
    for name in (name for name in weights if "lora_A" in name):
        assert torch.allclose(weights[name].norm(), weights[name.replace("lora_A", "lora_B")].norm(), rtol=1e-4)
    assert read_adapter(pocket / "out")["precision"] == "fp32"


def test_twice_the_same_bytes(pocket):
    for name in ("one", "two"):
        extract_adapter("pocket", pocket / "tuned", pocket / name, rank=4)
    assert len({(pocket / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")}) == 1


def edit(folder, change):
    "Change the tensors of a model's only file."
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def halve(folder):
    "Lose the end of a model's only file."
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])


def shard(folder):
    "Lose one of a model's files."
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("damage, words", [
    (halve, "is no whole safetensors file"),
    (shard, "has no two.safetensors"),
    (lambda folder: edit(folder, lambda t: t[Q].view(-1)[:1].fill_(float("nan"))), "values that are no numbers"),
    (lambda folder: edit(folder, lambda t: t.pop(Q)), "1 tensors are in one model only"),
    (lambda folder: edit(folder, lambda t: t.update({Q: t[Q][:100].clone()})), "the models differ in size"),
    (lambda folder: edit(folder, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100]
                                                     .clone()})), "the vocabulary was resized"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "unheard"}'), "makes no language model"),
    (lambda folder: (folder / "config.json").unlink(), "is not on this machine|without config.json")])
def test_damaged_models_are_refused_and_nothing_is_written(pocket, damage, words):
    damage(pocket / "tuned")
    before = sorted(path.name for path in pocket.iterdir())
    with pytest.raises(FinetuningError, match=words):
        extract_adapter("pocket", pocket / "tuned", pocket / "out")
    assert sorted(path.name for path in pocket.iterdir()) == before


@pytest.mark.parametrize("given, words", [
    ({"rank": 0}, "`rank` must be a whole number, at least 1, got 0"), ({"rank": 2.5}, "`rank` must be"),
    ({"rank": True}, "`rank` must be"),
    ({"rank": 193}, "`rank` 193 is more than `model.layers.0.self_attn.q_proj` has"),
    ({"energy": 1.5}, "`energy` must lie between 0 and 1"), ({"energy": 0}, "`energy` must lie"),
    ({"energy": "much"}, "`energy` must lie"), ({"rest": "maybe"}, "`rest` must be refuse, keep or drop")])
def test_settings_that_mean_nothing(pocket, given, words):
    with pytest.raises(FinetuningError, match=words):
        extract_adapter("pocket", pocket / "tuned", pocket / "out", **given)
    assert not (pocket / "out").exists()


def test_a_folder_in_use_is_left_alone(pocket):
    (pocket / "out").mkdir()
    (pocket / "out/mine.txt").write_text("mine")
    with pytest.raises(FinetuningError, match="exists already, nothing was written"):
        extract_adapter("pocket", pocket / "tuned", pocket / "out")
    assert [path.name for path in (pocket / "out").iterdir()] == ["mine.txt"]


def test_progress_names_every_layer_that_changed(pocket):
    heard = []
    found = extract_adapter("pocket", pocket / "tuned", pocket / "out", rank=1, rest="drop",
                            on_progress=lambda *told: heard.append(told))
    done = [n for n, _, _ in heard]
    assert [layer for _, _, layer in heard] == list(found.ranks) and {total for _, total, _ in heard} == {28}
    assert done == sorted(set(done)) and 1 <= done[0] and done[-1] <= 28


def test_a_source_is_never_written_into(pocket):
    for inside in ("tuned/adapter", "tuned/deep/adapter"):
        with pytest.raises(FinetuningError, match="lies inside"):
            extract_adapter("pocket", pocket / "tuned", pocket / inside, rest="drop")


def test_a_model_has_no_difference_from_itself(pocket):
    with pytest.raises(FinetuningError, match="no linear layer"):
        extract_adapter("pocket", "pocket", pocket / "out")
    with pytest.raises(FinetuningError, match="no linear layer"):
        energy_against_rank("pocket", "pocket")


def test_a_broken_write_leaves_nothing(pocket, monkeypatch):
    monkeypatch.setattr("finetuning_kit.extraction.record_base", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract_adapter("pocket", pocket / "tuned", pocket / "out")
    assert not (pocket / "out").exists() and not (pocket / ".part").exists()


def test_leading_directions_of_a_large_matrix_are_those_of_the_whole():
    torch.manual_seed(0)
    matrix = torch.randn(1300, 50) @ torch.diag(0.9 ** torch.arange(50.0)) @ torch.randn(50, 1100)
    left, values, right = leading_svd(matrix, 10)
    whole = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(values, whole[1][:10], rtol=1e-4)
    exact = whole[0][:, :10] @ torch.diag(whole[1][:10]) @ whole[2][:10]
    assert ((left * values) @ right - exact).norm() < 1e-3 * exact.norm()
    found = choose_directions(matrix, None, 0.9)[1]
    sums = whole[1].square().cumsum(0) / whole[1].square().sum()
    assert len(found) == int((sums < 0.9).sum()) + 1


def test_the_vocabulary_of_another_tokenizer(tmp_path):
    torch.manual_seed(0)
    with quiet_libraries():
        base = KINDS["llama"]()
        base.save_pretrained(tmp_path / "base")
        moved(base, only="q_proj")
        base.resize_token_embeddings(80, mean_resizing=False)
        base.save_pretrained(tmp_path / "tuned")
    words = r"is \[80, 32\] in .* and \[64, 32\] in .*resize the base's embeddings alike"
    with pytest.raises(FinetuningError, match=words):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
