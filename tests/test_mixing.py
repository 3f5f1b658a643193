"""Several adapters become one: what they add up to is kept, or the mix is refused in a sentence."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from finetuning_kit.bases import read_adapter, record_base
from finetuning_kit.merging import merge_lora_weights
from finetuning_kit.mixing import COMBINATIONS, SPARSE, mix_adapters, mix_difference
from finetuning_kit.models import load_model, load_tokenizer, pocket_model_path, quiet_libraries
from finetuning_kit.settings import FinetuningError
from finetuning_kit.verification import verify_merge


def make(folder, seed, base="pocket", config=LoraConfig, **settings):
    "An adapter with random weights, and the record of its base."
    torch.manual_seed(seed)
    usual = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    usual |= {"lora_alpha": 6} if config is LoraConfig else {}
    with quiet_libraries():
        model = get_peft_model(load_model(str(base)), config(**{**usual, **settings}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder, save_embedding_layers=False)
    record_base(folder, base)
    return folder


@pytest.fixture
def pair(tmp_path):
    "Two plain adapters."
    return [make(tmp_path / f"adapter{seed}", seed) for seed in (1, 2)]


def changes(folder, base="pocket"):
    "What an adapter adds to each layer, by PEFT's own reckoning."
    with quiet_libraries():
        model = PeftModel.from_pretrained(load_model(str(base)), folder)
    return {name: layer.get_delta_weight("default") for name, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight")}


def weighted_sum(adapters, base="pocket"):
    "The sum of what adapters add, layer by layer."
    found = {}
    for folder, weight in adapters.items():
        for name, change in changes(folder, base).items():
            found[name] = found.get(name, 0) + weight * change
    return found


def gpt2(folder):
    "A small GPT-2, whose layers are stored transposed."
    torch.manual_seed(0)
    with quiet_libraries():
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32, bos_token_id=0,
                                   eos_token_id=0)).save_pretrained(folder)
    return folder


ALIKE = {
    "plain": ({}, {}), "rsLoRA": ({"use_rslora": True}, {"use_rslora": True}), "one rsLoRA": ({"use_rslora": True}, {}),
    "other ranks": ({"r": 2}, {"r": 5}),
    "other layers": ({"target_modules": ["q_proj"]}, {"target_modules": ["o_proj"]}),
    "layer 0, layer 1": ({"layers_to_transform": [0]}, {"layers_to_transform": [1, 2]}),
    "a pattern": ({"target_modules": r".*\.[01]\.self_attn\.q_proj"}, {}),
    "ranks by layer": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
                       {"rank_pattern": {"down_proj": 8}}),
    "all but some": ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, {})}


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("weights", [(1, 1), (0.7, -0.3)])
def test_cat_and_a_wide_svd_are_the_weighted_sum(tmp_path, kind, weights):
    adapters = {make(tmp_path / f"a{n}", n, **ALIKE[kind][n]): weight for n, weight in enumerate(weights)}
    wanted = weighted_sum(adapters)
    for way, rank in (("cat", None), ("svd", 16)):
        mixed = mix_adapters("pocket", adapters, tmp_path / way, way, rank=rank)
        found = changes(mixed)
        assert found.keys() == wanted.keys()
        for name, change in wanted.items():
            assert torch.allclose(found[name], change, atol=2e-6), name
        assert mix_difference("pocket", adapters, mixed) < 1e-4


def test_gpt2(tmp_path):
    base = gpt2(tmp_path / "base")
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapters = {make(tmp_path / f"a{n}", n, base, **settings): 1 for n in (1, 2)}
    wanted = weighted_sum(adapters, base)
    for way, rank in (("cat", None), ("svd", 8)):
        found = changes(mix_adapters(base, adapters, tmp_path / way, way, rank=rank), base)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], atol=2e-6) for name in wanted)


@pytest.mark.parametrize("way", COMBINATIONS)
def test_every_way_equals_peft_on_the_real_base(tmp_path, pair, way):
    density = 0.5 if way.removesuffix("_svd") in SPARSE else None
    mixed = mix_adapters("pocket", dict(zip(pair, (0.6, 0.9))), tmp_path / "mixed", way, density, seed=5)
    with quiet_libraries():
        model = PeftModel.from_pretrained(load_model("pocket"), pair[0], adapter_name="one")
        model.load_adapter(pair[1], adapter_name="two")
        torch.manual_seed(5)
        model.add_weighted_adapter(["one", "two"], [0.6, 0.9], "mixed", way, density=density)
    found = changes(mixed)
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            assert torch.allclose(found[name], layer.get_delta_weight("mixed"), atol=1e-5), name


def test_the_mix_is_an_adapter_like_any_other(tmp_path, pair):
    mixed = mix_adapters("pocket", [(pair[0], 0.5), (pair[1], 1.5)], tmp_path / "mixed")
    assert read_adapter(mixed)["precision"] == "fp32"
    merged = merge_lora_weights("pocket", mixed, tmp_path / "merged")
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(load_model("pocket"), mixed)
    check = verify_merge(adapted, merged, load_tokenizer("pocket"), [[5, 9, 12, 40], [7, 8]], max_new_tokens=4)
    assert check.passed
    told = json.loads((mixed / "mix.json").read_text())
    assert [each["weight"] for each in told["adapters"]] == [0.5, 1.5] and told["combination"] == "cat"
    again = mix_adapters("pocket", {mixed: 1, pair[0]: -0.5}, tmp_path / "again")
    found, wanted = changes(again), changes(pair[1])
    assert all(torch.allclose(found[name], 1.5 * wanted[name], atol=5e-6) for name in wanted)


def test_a_seed_draws_the_same_and_leaves_the_callers_numbers(tmp_path, pair):
    torch.manual_seed(3)
    state, weights = torch.random.get_rng_state(), []
    for n, seed in enumerate((0, 0, 1)):
        mixed = mix_adapters("pocket", dict.fromkeys(pair, 1), tmp_path / f"m{n}", "dare_ties", 0.5, seed=seed)
        weights.append((mixed / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2] and torch.equal(state, torch.random.get_rng_state())


def test_a_weight_of_zero_leaves_an_adapter_out(tmp_path, pair):
    alone = changes(mix_adapters("pocket", dict(zip(pair, (2, 0))), tmp_path / "mixed"))
    first = changes(pair[0])
    assert all(torch.allclose(alone[name], 2 * first[name], atol=1e-6) for name in first)


def test_equal_ranks_that_differ_by_layer(tmp_path):
    pattern = {"rank_pattern": {"q_proj": 2}}
    adapters = {make(tmp_path / f"a{n}", n, **pattern): 1 for n in (1, 2)}
    mixed = mix_adapters("pocket", adapters, tmp_path / "mixed", "linear")
    assert {change.shape[0] for change in changes(mixed).values()} == {192}
    settings = json.loads((mixed / "adapter_config.json").read_text())
    assert sorted({settings["r"], *settings["rank_pattern"].values()}) == [2, 4]


BAD = {"empty": ([], {}, "`adapters` is empty"), "no pairs": (["a"], {}, "must be {folder: weight} or pairs"),
       "no number": ("x", {}, "must be a number, got 'x'"), "nan": (float("nan"), {}, "must be a number, got nan"),
       "infinite": (float("inf"), {}, "must be a number, got inf"), "yes": (True, {}, "must be a number, got True"),
       "zero": (0, {}, "all weights are 0"), "unknown": (1, {"combination": "sum"}, "`combination` must be one of"),
       "no density": (1, {"combination": "ties"}, "needs a `density`"),
       "density 0": (1, {"combination": "ties", "density": 0}, "needs a `density` above 0"),
       "density 2": (1, {"combination": "dare_linear", "density": 2}, "up to 1, the share of entries that stay, got 2"),
       "density for cat": (1, {"density": 0.5}, "has no use for `density`"),
       "rank for cat": (1, {"rank": 8}, "leave `rank` out"),
       "rank 0": (1, {"combination": "svd", "rank": 0}, "`rank` must be a whole number"),
       "rank too large": (1, {"combination": "svd", "rank": 1000}, "`rank` 1000 is more than"),
       "negative ties": (-1, {"combination": "ties", "density": 0.5}, "would turn the winner round"),
       "too sparse": (1, {"combination": "magnitude_prune", "density": 1e-9}, "nothing is left of the adapters")}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_a_sentence_and_nothing_is_written(tmp_path, pair, kind):
    given, settings, words = BAD[kind]
    adapters = given if isinstance(given, list) else dict.fromkeys(pair, given)
    with pytest.raises(FinetuningError, match=words):
        mix_adapters("pocket", adapters, tmp_path / "mixed", **settings)
    assert not (tmp_path / "mixed").exists() and not (tmp_path / ".part").exists()


def test_adapters_that_a_mix_would_falsify(tmp_path, pair):
    odd = [({"use_dora": True}, "`use_dora`"), ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
           ({"init_lora_weights": "pissa"}, "`init_lora_weights`"),
           ({"init_lora_weights": "olora"}, "`init_lora_weights`"),
           ({"bias": "all"}, "`bias`"), ({"config": LoHaConfig}, "`peft_type` LOHA")]
    for n, (settings, words) in enumerate(odd):
        folder = make(tmp_path / f"odd{n}", n, **settings)
        for adapters in ({pair[0]: 1, folder: 1}, {folder: 1}):
            with pytest.raises(FinetuningError, match=f"{words}.*take it out again with `extract_adapter`"):
                mix_adapters("pocket", adapters, tmp_path / "mixed")


def test_other_ranks_want_another_way(tmp_path, pair):
    thick = make(tmp_path / "thick", 3, r=8)
    for way, density in (("linear", None), ("ties", 0.5), ("magnitude_prune", 0.5)):
        with pytest.raises(FinetuningError, match="ranks 4 and 8 .* take cat or svd"):
            mix_adapters("pocket", {pair[0]: 1, thick: 1}, tmp_path / "mixed", way, density)
    mix_adapters("pocket", {pair[0]: 1, thick: 1}, tmp_path / "mixed", "ties_svd", 0.5)


def damage_base(folder):
    record = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(record | {"weights_sha256": "0" * 64}))


def damage_form(folder):
    record_base(folder, "pocket", load_in_4bit=True)


def damage_end(folder):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-40])


def damage_numbers(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


def damage_places(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")


def damage_shape(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:, :10].clone()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("damage, words", [
    (damage_base, "is not the base that this adapter was trained on"),
    (damage_form, "was trained on the base in 4 bits"),
    (damage_end, "is no whole safetensors file"), (damage_numbers, "values that are no numbers"),
    (damage_places, "does not fit this base, 1 of its places"),
    (damage_shape, "does not fit this base, 1 of its places"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
    (shutil.rmtree, "is no adapter: it has no adapter_config.json")])
def test_damaged_adapters(tmp_path, pair, damage, words):
    damage(pair[1])
    with pytest.raises(FinetuningError, match=words):
        mix_adapters("pocket", dict.fromkeys(pair, 1), tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_a_folder_in_use_and_a_broken_write(tmp_path, pair, monkeypatch):
    (tmp_path / "mixed").mkdir()
    with pytest.raises(FinetuningError, match="exists already, nothing was written"):
        mix_adapters("pocket", dict.fromkeys(pair, 1), tmp_path / "mixed")
    monkeypatch.setattr("finetuning_kit.mixing.record_base", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mix_adapters("pocket", dict.fromkeys(pair, 1), tmp_path / "other")
    assert not (tmp_path / "other").exists() and not (tmp_path / ".part").exists()


def test_another_base(tmp_path, pair):
    shutil.copytree(pocket_model_path(), tmp_path / "other")
    weights = load_file(tmp_path / "other/model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FinetuningError, match="is not the base"):
        mix_adapters(tmp_path / "other", dict.fromkeys(pair, 1), tmp_path / "mixed")
    (pair[0] / "base.json").unlink(), (pair[1] / "base.json").unlink()
    assert isinstance(mix_adapters(tmp_path / "other", dict.fromkeys(pair, 1), tmp_path / "mixed"), Path)
