"""Streamed merges: PEFT's bit for bit in fp32, one rounding in 16 bits, whole or absent, of no wrong base."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning_kit.bases import check_base, read_header, read_stored, record_base, weight_files
from finetuning_kit.hollow import CannotStream
from finetuning_kit.models import load_adapter, load_model, quiet_libraries
from finetuning_kit.settings import FinetuningError
from finetuning_kit.streaming import stream_merge

SMALL = dict(vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)
MODELS = {
    "llama": {**SMALL}, "llama_tied": {**SMALL, "tie_word_embeddings": True}, "qwen2": {**SMALL},
    "qwen3": {**SMALL, "head_dim": 8}, "gpt2": dict(vocab_size=160, n_embd=32, n_layer=2, n_head=4),
    "gemma2": {**SMALL, "head_dim": 8}, "gemma3_text": {**SMALL, "head_dim": 8},
    "phi": {**SMALL, "num_key_value_heads": 4}, "phi3": {**SMALL, "pad_token_id": 0},
    "mixtral": {**SMALL, "num_local_experts": 2},
    "qwen3_moe": {**SMALL, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = {"mixtral": ["q_proj", "v_proj"], "qwen3_moe": ["q_proj", "o_proj"]}  # experts are fused when they load
QV = ["q_proj", "v_proj", "down_proj"]


def make_base(folder, name="llama", dtype=torch.float32, seed=0, shards=True, **options):
    "A small random model in several files"
    kind = name.removesuffix("_tied")
    torch.manual_seed(seed)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**MODELS[name], **options}))
        model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    return folder


def load(folder, dtype=None):
    "A model as Transformers loads it"
    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()


def make_adapter(folder, base, config=None, size=0.05, n_tokens=None):
    "An adapter with random weights, saved; the attached model is given back"
    torch.manual_seed(3)
    with quiet_libraries():
        model = load(base, torch.float32)
        if n_tokens:
            model.resize_token_embeddings(n_tokens)
        model = get_peft_model(model, config or LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight += torch.randn_like(weight) * size
        model.eval().save_pretrained(folder)
    return model


def merge_with_peft(base, adapter, dtype=None, n_tokens=None):
    "What PEFT's merge gives"
    with quiet_libraries():
        model = load(base, dtype)
        if n_tokens:
            model.resize_token_embeddings(n_tokens)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def logits(model, n=24):
    "Of a fixed row"
    with torch.no_grad(), quiet_libraries():
        return model(torch.arange(n).view(1, n)).logits.float()


def assert_same(found, wanted):
    "The same numbers under the same names"
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture
def llama(tmp_path):
    "A base and a plain adapter"
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", tmp_path / "base")
    return tmp_path / "base", tmp_path / "adapter"


# --- equality -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_is_pefts_merge_bit_for_bit(tmp_path, name):
    base = make_base(tmp_path / "base", name)
    config = LoraConfig(r=4, target_modules=ATTENTION.get(name, "all-linear"), task_type="CAUSAL_LM")
    attached = make_adapter(tmp_path / "adapter", base, config)
    plan = stream_merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert_same(merged, merge_with_peft(base, tmp_path / "adapter"))
    away, effect = (logits(merged) - logits(attached)).abs().max(), (logits(load(base)) - logits(attached)).abs().max()
    assert plan.changed and away <= 1e-5 and away <= 1e-5 * max(effect, 0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_are_within_one_rounding(tmp_path, name, precision):
    dtype = DTYPES[precision]
    base = make_base(tmp_path / "base", name, dtype)
    make_adapter(tmp_path / "adapter", base)
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged, by_peft = load(tmp_path / "merged").state_dict(), merge_with_peft(base, tmp_path / "adapter").state_dict()
    exact = merge_with_peft(base, tmp_path / "adapter", torch.float32).state_dict()
    for key in by_peft:
        assert merged[key].dtype == dtype
        step = torch.finfo(dtype).eps * exact[key].abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((merged[key].float() - exact[key]).abs() <= 0.51 * step).all(), key
        off, theirs = (merged[key].float() - exact[key]).norm(), (by_peft[key].float() - exact[key]).norm()
        assert off <= theirs * 1.001


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("precision, at_most, share", [("bf16", 3e-2, 5e-2), ("fp16", 5e-3, 1e-2)])
def test_logits_in_sixteen_bits(tmp_path, name, precision, at_most, share):
    base = make_base(tmp_path / "base", name, DTYPES[precision])
    make_adapter(tmp_path / "adapter", base)
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged")
    found, alone = (logits(load(folder).float()) for folder in (tmp_path / "merged", base))
    exact = logits(merge_with_peft(base, tmp_path / "adapter", torch.float32))
    away, effect = (found - exact).abs().max(), (alone - exact).abs().max()
    assert away <= at_most and away <= share * effect, (away, effect)


def kinds_of_adapters():
    "Adapters of every kind that merges"
    T = {"task_type": "CAUSAL_LM", "target_modules": QV}
    found = {f"lora {key}": LoraConfig(r=4, **{**T, **options}) for key, options in {
        "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"}, "bias": {"target_modules": ["q_proj"], "lora_bias": True},
        "biases": {"bias": "lora_only"}, "pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        "embeddings": {"target_modules": ["embed_tokens", "q_proj"]}, "head": {"target_modules": ["lm_head"]},
        "saved": {"modules_to_save": ["lm_head", "norm"]}, "saved embeddings": {"modules_to_save": ["embed_tokens"]},
        "tokens": {"trainable_token_indices": [1, 5, 7]}}.items()}
    for key, name, options in (
            ("IA3", "IA3Config", {"feedforward_modules": ["down_proj"]}),
            ("AdaLoRA", "AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 100}),
            ("LN", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
            ("VeRA", "VeraConfig", {"target_modules": ["q_proj", "down_proj"], "r": 8}), ("LoHa", "LoHaConfig", {}),
            ("LoKr", "LoKrConfig", {}), ("OFT", "OFTConfig", {"oft_block_size": 4, "r": 0}),
            ("BOFT", "BOFTConfig", {"boft_block_size": 4}), ("HRA", "HRAConfig", {}),
            ("FourierFT", "FourierFTConfig", {"n_frequency": 50}), ("MiSS", "MissConfig", {"r": 4, "mini_r": 1}),
            ("VB-LoRA", "VBLoRAConfig", {"vector_length": 16, "num_vectors": 8, "topk": 2}),
            ("RandLoRA", "RandLoraConfig", {"r": 4}), ("C3A", "C3AConfig", {"block_size": 16})):
        found[key] = getattr(peft, name)(**{**T, **options})
    found["trained tokens"] = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1, 2])
    return found


@pytest.mark.parametrize("kind", kinds_of_adapters())
def test_every_kind_of_adapter(tmp_path, kind):
    base = make_base(tmp_path / "base", "qwen2", tie_word_embeddings=False)
    attached = make_adapter(tmp_path / "adapter", base, kinds_of_adapters()[kind])
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert_same(merged, merge_with_peft(base, tmp_path / "adapter"))
    assert (logits(merged) - logits(attached)).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]},
                                     {"modules_to_save": ["embed_tokens", "lm_head"]},
                                     {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
                                     {"trainable_token_indices": [1, 5]}], ids=lambda options: "-".join(
                                         f"{key}-{value}" for key, value in options.items()))
@pytest.mark.parametrize("shards", [True, False])
def test_tied_ends(tmp_path, options, shards):
    base = make_base(tmp_path / "base", "llama_tied", shards=shards)
    attached = make_adapter(tmp_path / "adapter", base, LoraConfig(
        r=4, target_modules=QV, task_type="CAUSAL_LM", **options))
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged, parts = load(tmp_path / "merged"), not (options.keys() & {"ensure_weight_tying", "trainable_token_indices"})
    assert (logits(merged) - logits(attached)).abs().max() <= 1e-5
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is not parts
    assert ("lm_head.weight" in read_stored(tmp_path / "merged")) is parts
    assert_same(merged, merge_with_peft(base, tmp_path / "adapter"))


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [160, 161]}], ids=["lora", "tokens"])
def test_embeddings_that_grew(tmp_path, name, options):
    base = make_base(tmp_path / "base", name)
    config = LoraConfig(r=4, target_modules=QV, task_type="CAUSAL_LM", **options)
    attached = make_adapter(tmp_path / "adapter", base, config, n_tokens=168)
    with quiet_libraries():
        attached.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.config.vocab_size == 168 and len(merged.get_input_embeddings().weight) == 168
    assert (logits(merged) - logits(attached)).abs().max() <= 1e-5


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", DTYPES)
def test_other_precision(tmp_path, stored, asked):
    base = make_base(tmp_path / "base", dtype=DTYPES[stored])
    make_adapter(tmp_path / "adapter", base)
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged", precision=asked)
    merged, wanted = load(tmp_path / "merged"), merge_with_peft(base, tmp_path / "adapter", DTYPES[asked])
    assert merged.dtype == DTYPES[asked] and {w.dtype for w in merged.parameters()} == {DTYPES[asked]}
    if asked == "fp32":
        assert_same(merged, wanted)
    eps = torch.finfo(DTYPES[asked]).eps
    for (key, found), weight in zip(merged.state_dict().items(), wanted.state_dict().values()):
        assert torch.allclose(found.float(), weight.float(), rtol=2.1 * eps, atol=2e-4 if eps > 1e-5 else 0), key
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(s.end - s.start for s in read_stored(tmp_path / "merged").values())


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_on_four_bits(tmp_path, name, precision):
    pytest.importorskip("bitsandbytes")
    sizes = dict(hidden_size=64, intermediate_size=128)
    base = make_base(tmp_path / "base", name, **sizes)
    make_adapter(tmp_path / "adapter", base)
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged", precision, in_4bit=True)
    model = load_model(str(base), load_in_4bit=True, precision=precision)
    with quiet_libraries():
        model = model.dequantize(dtype=DTYPES[precision])
        wanted = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload(safe_merge=True).state_dict()
    found = load(tmp_path / "merged").state_dict()
    for key in wanted:
        if precision == "fp32":
            assert torch.equal(found[key], wanted[key]), key
        else:
            assert torch.allclose(found[key].float(), wanted[key].float(), rtol=2 ** -7, atol=3e-4), key


# --- what must not happen ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_added_exactly_once_and_nowhere_else(tmp_path, name):
    base = make_base(tmp_path / "base", name)
    make_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    stream_merge(base, tmp_path / "adapter", tmp_path / "merged")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = load(base).state_dict(), load(tmp_path / "merged").state_dict()
    for key in before:
        half = f"base_model.model.{key.removesuffix('.weight')}.lora_%s.weight"
        if half % "A" in adapter:
            delta = 2.0 * adapter[half % "B"] @ adapter[half % "A"]
            times = ((after[key] - before[key]) * delta).sum() / (delta * delta).sum()
            assert abs(times - 1) <= 1e-3, key
        else:
            assert torch.equal(after[key], before[key]), key


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zero_adapter_gives_the_base_byte_for_byte(tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype=dtype)
    make_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules="all-linear"), size=0.0)
    assert stream_merge(base, tmp_path / "adapter", tmp_path / "merged").changed == []
    for file in weight_files(base):
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_wrong_bases_are_refused(llama, tmp_path):
    base, adapter = llama
    make_adapter(adapter, base, LoraConfig(r=4, target_modules=QV))
    record_base(adapter, base)
    record = json.loads((adapter / "base.json").read_text())
    check_base(record, base)
    wrong = {"same shape": {"seed": 5}, "deeper": {"num_hidden_layers": 3}, "wider": {"hidden_size": 64},
             "another vocabulary": {"vocab_size": 176}, "another revision": {}}
    for name, options in wrong.items():
        other = make_base(tmp_path / name, **options)
        if name == "another revision":
            tensors = load_file(weight_files(other)[0])
            next(iter(tensors.values())).view(-1)[0] += 1e-3
            save_file(tensors, weight_files(other)[0], metadata={"format": "pt"})
        with pytest.raises(FinetuningError, match="not the base that this adapter was trained on"):
            check_base(record, other)
    for name in ("deeper", "wider"):  # even when nothing was recorded
        with pytest.raises(FinetuningError):
            stream_merge(tmp_path / name, adapter, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_lora_on_tied_ends_is_refused(tmp_path, end):
    base = make_base(tmp_path / "base", "llama_tied")
    make_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=[end, "q_proj"]))
    with pytest.raises(FinetuningError, match="both ends share one"):
        stream_merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_forward_pass_before_the_merge_changes_nothing(llama, tmp_path):
    base, adapter = llama
    stream_merge(base, adapter, tmp_path / "before", "bf16", in_4bit=True)
    used = load_model(str(base), load_in_4bit=True, precision="bf16")
    logits(load_adapter(used, str(adapter), "adapter"))
    stream_merge(base, adapter, tmp_path / "after", "bf16", in_4bit=True)
    for file in weight_files(tmp_path / "before"):
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()


def test_damaged_files_are_named(llama, tmp_path):
    base, adapter = llama
    files = weight_files(base)
    whole = files[1].read_bytes()
    cases = {"truncated": whole[:-10], "empty": b"", "no header": b"nonsense" * 20, "longer": whole + b"12345678",
             "foreign": files[0].read_bytes()}
    for name, content in cases.items():
        files[1].write_bytes(content)
        with pytest.raises(FinetuningError, match=files[1].name.replace(".", r"\.")):
            stream_merge(base, adapter, tmp_path / name)
        assert not (tmp_path / name).exists()
    files[1].unlink()
    with pytest.raises(FinetuningError, match=files[1].name):
        stream_merge(base, adapter, tmp_path / "missing")
    files[1].write_bytes(whole)
    other = make_base(tmp_path / "other", intermediate_size=64)
    shutil.copy(other / "config.json", base / "config.json")
    with pytest.raises(FinetuningError):
        stream_merge(base, adapter, tmp_path / "another config")


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_is_no_number_is_refused_by_name(llama, tmp_path, use_dora):
    base, adapter = llama
    make_adapter(adapter, base, LoraConfig(r=4, target_modules=["up_proj"], use_dora=use_dora))
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1.mlp.up_proj.lora_B" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(FinetuningError, match=r"cannot be merged: .*model\.layers\.1\.mlp\.up_proj"):
        stream_merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / ".part").exists()


def test_overflow_in_fp16_is_refused(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.float16)
    make_adapter(tmp_path / "adapter", base, LoraConfig(r=4, lora_alpha=4e9, target_modules=["up_proj"]))
    with pytest.raises(FinetuningError, match="infinite numbers in model.layers.0.mlp.up_proj"):
        stream_merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_fused_experts_cannot_stream(tmp_path):
    base = make_base(tmp_path / "base", "qwen3_moe")
    make_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"]))
    with pytest.raises(CannotStream, match="experts"):
        stream_merge(base, tmp_path / "adapter", tmp_path / "merged")


# --- whole or absent --------------------------------------------------------------------------------------------------

def in_a_child(work) -> int:
    "Run a function in a fork; the signal or exit code that ended it"
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def is_whole(folder, wanted) -> bool:
    "Whether a folder is absent (False) or holds just what it should; anything in between fails"
    if not folder.exists():
        return False
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
    return True


@pytest.fixture
def killing(tmp_path):
    "A small merge, what it should give, and how long it takes"
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    make_adapter(tmp_path / "adapter", base)
    merge = lambda name: stream_merge(base, tmp_path / "adapter", tmp_path / name)
    merge("whole")
    began = time.time()
    assert in_a_child(lambda: merge("again")) == 0
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert is_whole(tmp_path / "again", wanted)
    return merge, wanted, time.time() - began


def test_killed_at_any_moment(killing, tmp_path):
    merge, wanted, seconds = killing
    complete = 0
    for trial in range(20):
        target = tmp_path / "out" / "merged"
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        child = os.fork()
        if child == 0:
            merge("out/merged")
            os._exit(0)
        time.sleep(seconds * (0.2 + 0.9 * ((trial * 7) % 20) / 20))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        complete += is_whole(target, wanted)
    print(f"20 kills: {complete} found the merge complete, the others found no folder")


def test_dies_at_every_write(killing, tmp_path):
    merge, wanted, _ = killing
    calls = ("fsync", "replace", "mkdir", "sendfile")

    def dying(n):
        "Merge, and die at the n-th call that reaches the disk"
        left = [n]

        def counted(call):
            def wrapped(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return call(*args, **options)
            return wrapped

        from finetuning_kit import streaming

        for name in calls:
            setattr(os, name, counted(getattr(os, name)))
        streaming.write_all = counted(streaming.write_all)
        Path.write_text = counted(Path.write_text)
        merge("out/merged")

    (tmp_path / "out").mkdir()
    for n in range(1, 200):
        shutil.rmtree(tmp_path / "out" / "merged", ignore_errors=True)
        ended = in_a_child(lambda: dying(n))
        found = is_whole(tmp_path / "out" / "merged", wanted)
        if ended == 0:
            assert found and n > 20
            return
        assert ended == 9
    raise AssertionError("the merge never came to its end")


def test_a_full_disk(llama, tmp_path):
    base, adapter = llama
    before = {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()}
    largest = max(file.stat().st_size for file in weight_files(base))

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
        try:
            stream_merge(base, adapter, tmp_path / "merged")
        except FinetuningError as problem:
            os._exit(7 if "no file may become so large here" in str(problem) else 8)

    assert in_a_child(full) == 7
    assert not (tmp_path / "merged").exists() and not (tmp_path / ".part").exists()
    assert before == {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()}


MEMORY = """
import resource, sys, torch, transformers, peft, bitsandbytes
from transformers import AutoModelForCausalLM
from peft import PeftModel
from finetuning_kit.streaming import stream_merge
torch.set_num_threads(1)
way, base, adapter, target, room = sys.argv[1:]
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(room)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
if way == "stream":
    stream_merge(base, adapter, target)
else:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).merge_and_unload(
        ).save_pretrained(target)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")
def test_a_model_larger_than_the_memory(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16, shards=False, vocab_size=16_384, hidden_size=1024,
                     intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=8)
    size = sum(file.stat().st_size for file in weight_files(base))
    model = load(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            weight.data.normal_(0, 0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    del model, adapted
    room, ends = size // 2, {}
    for way in ("stream", "peft"):
        ends[way] = subprocess.run([sys.executable, "-c", MEMORY, way, base, tmp_path / "adapter", tmp_path / way,
                                    str(room)], capture_output=True, text=True)
    assert ends["stream"].returncode == 0, ends["stream"].stderr[-2000:]
    assert ends["peft"].returncode != 0 and not (tmp_path / "peft" / "model.safetensors").exists()
    assert read_header(tmp_path / "stream" / "model.safetensors").keys() == read_header(
        base / "model.safetensors").keys()
