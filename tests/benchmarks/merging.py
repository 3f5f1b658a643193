"""What a merge costs: the streamed one, PEFT's in memory, and `cp`.

    python tests/benchmarks/merging.py [--layers 16] [--rounds 2] [--folder DIR] [--skip-4bit] [--output FILE]

A random Llama of 2048 x 16 in bf16 (1.6 GB, files of 500 MB) and a LoRA adapter of rank 16 on every linear layer are
built on the spot. Each contestant runs in a process of its own, on one thread, and they take turns:

- stream: `stream_merge`;
- peft: Transformers' `from_pretrained`, PEFT's `merge_and_unload`, `save_pretrained`;
- cp: the base's folder, copied by `cp`;
- stream 4-bit, peft 4-bit: the same for an adapter whose base was held in four bits: `stream_merge(in_4bit=True)`
  against `load_in_4bit`, `dequantize`, `merge_and_unload`, `save_pretrained`.

CPU seconds (user and system) and wall-clock seconds are counted after the imports, and for the whole process; memory
is the growth of the largest resident size after the imports. Each figure is the least of the rounds. It is no test: a
slow machine is not a fault.
"""
import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("stream", "peft", "cp", "stream 4-bit", "peft 4-bit")


def build(folder, n_layers):
    "A base and an adapter of random weights; a row of numbers is drawn once and repeated"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=n_layers,
                         num_attention_heads=32, num_key_value_heads=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model, block = model.to_empty(device="cpu"), 1 << 20
    row = (torch.randn(block, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for weight in model.parameters():
        for at in range(0, weight.numel(), block):
            part = weight.data.view(-1)[at:at + block]
            part.copy_(row[:len(part)])
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear",
                                               task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
        if "lora_B" in name:
            weight.data.normal_(0, 0.01)
    adapted.save_pretrained(folder / "adapter")


def merge_in_memory(base, adapter, target, in_4bit):
    "PEFT's way"
    from peft import PeftModel

    from finetuning_kit.models import load_model

    import torch
    from transformers import AutoModelForCausalLM

    if in_4bit:
        model = load_model(base, load_in_4bit=True, precision="bf16").dequantize(dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)


def contend(way, folder, target) -> dict:
    "Run one contestant in this process"
    if way == "cp":
        began = time.time()
        subprocess.run(["cp", "-r", folder / "base", target], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime
        return {"cpu_s": cpu, "wall_s": time.time() - began, "peak_mb": used.ru_maxrss / 1024, "whole_cpu_s": cpu}
    import torch
    import transformers
    import transformers.models.llama.modeling_llama  # noqa: F401 (imports are not what is measured)

    from finetuning_kit.streaming import stream_merge

    if "4-bit" in way:
        import bitsandbytes  # noqa: F401
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    before, cpu, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.time()
    if way.startswith("stream"):
        stream_merge(folder / "base", folder / "adapter", target, "bf16" if "4-bit" in way else None, "4-bit" in way)
    else:
        merge_in_memory(str(folder / "base"), str(folder / "adapter"), target, "4-bit" in way)
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.time() - began, "whole_cpu_s": time.process_time(),
            "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main():
    "Build, let the contestants take turns, print a table"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to build; kept and used again; default: a temporary one")
    parser.add_argument("--skip-4bit", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp())
    target = folder / "target"
    if chosen.way:
        print(json.dumps(contend(chosen.way, folder, target)))
        return
    if not (folder / "adapter").exists():
        build(folder, chosen.layers)
    found = {way: [] for way in WAYS if not (chosen.skip_4bit and "4-bit" in way)}
    for _ in range(chosen.rounds):
        for way in found:
            shutil.rmtree(target, ignore_errors=True)
            ended = subprocess.run([sys.executable, __file__, "--folder", folder, "--way", way], check=True,
                                   stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[way].append(json.loads(ended.stdout.splitlines()[-1]))
    shutil.rmtree(target, ignore_errors=True)
    best = {way: {name: min(each[name] for each in rounds) for name in rounds[0]} for way, rounds in found.items()}
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    print(f"base {size / 1e9:.2f} GB; {platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    print("| way | CPU s | whole process, CPU s | wall s | memory, MB |\n| --- | --- | --- | --- | --- |")
    for way, figures in best.items():
        print(f"| {way} | {figures['cpu_s']:.2f} | {figures['whole_cpu_s']:.2f} | {figures['wall_s']:.1f} | "
              f"{figures['peak_mb']:,.0f} |")
    if chosen.output:
        chosen.output.write_text(json.dumps({"size": size, "rounds": found}, indent=2), encoding="utf-8")
    if not chosen.folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
