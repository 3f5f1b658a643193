"""The fault zoo in Unsloth, as its guides have it: `FastLanguageModel`, and TRL's SFTTrainer over it.

    python -m tests.benchmarks.zoo_unsloth [--output measured.json]

Unsloth changes the libraries that it is imported with, so it has a process of its own, in an environment of its own: a
copy of this project's with `pip install --no-deps unsloth unsloth_zoo`. It trains LoRA and all weights on a CPU, and no
other method; merging is `save_pretrained_merged`. Everything else is as in plain TRL: rows, layers, settings.
"""
import unsloth  # noqa: I001 (first, for it changes what the others define)

import argparse
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from finetuning_kit.faults import Keeper
from finetuning_kit.models import pocket_model_path
from tests.benchmarks.zoo import HOME, asks_plainly, keep_part, plain, run_plainly

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(place, in_4bit=False, full=False):
    "A model and its tokenizer."
    return unsloth.FastLanguageModel.from_pretrained(str(place), max_seq_length=128, dtype=torch.float32,
                                                     load_in_4bit=in_4bit, full_finetuning=full)


def build(place, method, lora, in_4bit, settings):
    "A model with its adapter on it, and its tokenizer."
    model, tokenizer = load(place, in_4bit, method == "full")
    if method == "lora":
        named = LINEAR if lora["target_modules"] == "all-linear" else lora["target_modules"]
        model = unsloth.FastLanguageModel.get_peft_model(
            model, **{**lora, "target_modules": named},
            use_gradient_checkpointing=settings.get("gradient_checkpointing", False))
    return model, None, tokenizer


def merge(scene) -> None:
    "Merge an adapter."
    from peft import PeftModel

    model, tokenizer = load(scene.settings.get("model_name", pocket_model_path()))
    adapted = PeftModel.from_pretrained(model, scene.place / "adapter")
    adapted.save_pretrained_merged(str(scene.place / "merged"), tokenizer, save_method="merged_16bit")


def asks(fault) -> bool:
    "Whether it can be given the case at all: there are no trained positions."
    return asks_plainly(fault) and fault.name not in (
        "prefix tuning with gradient checkpointing", "packing under trained positions")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HOME)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        cases = plain(Keeper(place), "unsloth", asks, partial(run_plainly, build=build, merge=merge))
    names = ("unsloth", "trl", "peft", "transformers", "torch")
    keep_part(options.output, "unsloth", {"tool": "Unsloth", "versions": {name: version(name) for name in names},
                                          "cases": {name: case for name, case in cases.items() if name != "nothing"}})


if __name__ == "__main__":
    main()
