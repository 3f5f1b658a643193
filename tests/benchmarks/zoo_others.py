"""The fault zoo in LLaMA-Factory: each case in the tool's own format, run by the tool's own trainer.

The tool lives in an environment of its own, whose Python is given (`python -m tests.benchmarks.zoo --parts others
--other PYTHON`; beside a CPU build of torch, `torchvision` has to be uninstalled and the libraries in `torchaudio/lib`
deleted, for both ask for CUDA). Conversations become a ShareGPT data set with speakers called user and assistant,
settings get the tool's names, what is not said keeps its default; `template` is left out, so that the model's own is
read. Runs that a case starts from (a killed one, a finished one) are made by the tool as well. It "warns" when a line
that calls itself a warning is printed that is not printed in a clean scene; what ends in an exception is an "error".
"""
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from finetuning_kit.breakdowns import lent_adapter
from finetuning_kit.faults import Case, Keeper, go
from finetuning_kit.models import pocket_model_path
from finetuning_kit.zoo import PLANTED

# Loads the tool once, and forks for every job: what `llamafactory-cli train` and `export` call, without their start.
DRIVER = """
import json, os, signal, sys, traceback
from importlib.metadata import version
import scipy.io, torchdata.stateful_dataloader  # imported before the forks, which need them all
from llamafactory.train.tuner import export_model, run_exp
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform
for kind in (AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform):
    list(kind._model_mapping.keys())
names = ("llamafactory", "trl", "peft", "transformers", "torch")
print(json.dumps({name: version(name) for name in names}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        log = os.open(job["log"], os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        status = 1
        try:
            (export_model if "export_dir" in job["settings"] else run_exp)(job["settings"])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush(), os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
NAMES = {"r": "lora_rank", "target_modules": "lora_target", "early_stopping": "early_stopping_steps",
         "load_in_4bit": "quantization_bit", "method": "finetuning_type", "max_seq_length": "cutoff_len",
         "model_name": "model_name_or_path"}  # ours -> theirs
OURS = ("on_spike", "over_length", "dataset_format", "split_ratio")  # nothing there goes by such a name
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "system_tag": "system"}

NOT_THERE = ("prefix tuning with gradient checkpointing", "packing under trained positions",  # no such methods
             "a library was exchanged between two halves")  # its checkpoints do not name their library


class LentKeeper(Keeper):
    "Lends runs that the other tool made."

    def __init__(self, place, python):
        super().__init__(place)
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.place / "home")}
        self.tool = subprocess.Popen([python, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                     env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | quiet)
        self.versions = json.loads(self.tool.stdout.readline())

    def run(self, scene, settings) -> tuple[int, str]:
        "Let the tool run: its status, and what it said."
        log = scene.place / "log.txt"
        log.unlink(missing_ok=True)
        self.tool.stdin.write(json.dumps({"settings": settings, "log": str(log)}) + "\n")
        self.tool.stdin.flush()
        return int(self.tool.stdout.readline()), log.read_text(encoding="utf-8", errors="replace")

    def lend(self, name, n_steps):
        "Run a clean scene once, as far as it got."
        if name not in self.kept:
            scene = self.kept[name] = self.scene()
            scene.set(save_steps=2 if n_steps < 8 else 4)
            status, said = self.run(scene, train_settings(scene))
            assert status == 0, said
            shutil.copytree(scene.folder.checkpoints / f"checkpoint-{n_steps}", scene.folder.adapter)
            for item in scene.folder.checkpoints.iterdir():  # a killed run has nothing but checkpoints
                if n_steps < 8 and item.name not in ("checkpoint-2", "checkpoint-4"):
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        return self.kept[name]

    def half(self):
        return self.lend("half", 4)

    def trained(self):
        return self.lend("trained", 8), None


def write_rows(scene, name, rows) -> dict:
    "Write rows as they are, and say how the tool has to read them."
    if isinstance(rows, str):
        rows, path = None, Path(rows)
    else:
        path = scene.place / f"{name}.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
    if rows and "chosen" in rows[0]:
        return {"file_name": path.name, "ranking": True, "columns": {key: key for key in rows[0]}}
    if rows and "prompt" in rows[0]:
        return {"file_name": path.name, "columns": {"prompt": "prompt", "response": "completion"}}
    return {"file_name": path.name, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}


def train_settings(scene) -> dict:
    "What would stand in the tool's YAML file."
    given = {NAMES.get(name, name): value for name, value in scene.settings.items() if name not in OURS}
    if given.get("quantization_bit"):
        given["quantization_bit"] = 4
    if isinstance(given.get("lora_target"), list):
        given["lora_target"] = ",".join(given["lora_target"])
    sets = {"rows": write_rows(scene, "rows", scene.rows)}
    if scene.held_out:
        sets["held_out"] = write_rows(scene, "held_out", scene.held_out)
        given = {"eval_dataset": "held_out", "eval_strategy": "steps", **given}
    (scene.place / "dataset_info.json").write_text(json.dumps(sets), encoding="utf-8")
    if scene.resume and scene.resume != "auto":  # "auto" is what it does by itself
        given["resume_from_checkpoint"] = str(scene.folder.checkpoints / scene.resume)
    if scene.settings.get("dataset_format") == "completion":
        given["template"] = "empty"
    return {"stage": "sft", "do_train": True, "dataset_dir": str(scene.place), "dataset": "rows", "cutoff_len": 128,
            "output_dir": str(scene.folder.checkpoints), "finetuning_type": "lora", "lora_target": "all",
            "lora_rank": 16, "lora_alpha": 32, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "model_name_or_path": str(pocket_model_path()), **given}


def merge_settings(scene) -> dict:
    "What would stand in the YAML file of an export."
    return {"model_name_or_path": scene.settings.get("model_name", str(pocket_model_path())),
            "adapter_name_or_path": str(scene.place / "adapter"), "finetuning_type": "lora",
            "export_dir": str(scene.place / "merged"), "export_device": "cpu"}


def warnings_of(said) -> list:
    "The lines that call themselves warnings, without times and places."
    lines = [line for line in said.splitlines() if re.search(r"\[WARNING|Warning:|^WARNING", line)]
    return [re.split(r" >> |Warning: ", line, maxsplit=1)[-1].strip() for line in lines]


def short_scene(keeper, fault):
    "A scene with its fault, for another tool: two steps show whether it stops, unless the run itself is at fault."
    scene = keeper.scene()
    fault.plant(scene)
    if fault.family not in ("run", "checkpoint"):
        scene.settings |= {"max_steps": min(2, scene.settings["max_steps"])}
    if fault.family == "merge":
        lent_adapter(scene)
    return scene


def others(keeper, python, asks) -> dict:
    "Give every case to the tool that can be put in its words."
    keeper, usual, found = LentKeeper(keeper.place / "others", python), set(), {}
    nothing = Case("nothing", "data", "", "", lambda scene: None, go)
    for fault in [nothing, *PLANTED]:
        if fault.name in NOT_THERE or not asks(fault):
            found[fault.name] = {"outcome": "not asked"}
            continue
        scene, words, began = short_scene(keeper, fault), "", time.time()
        status, said = keeper.run(scene, (merge_settings if fault.family == "merge" else train_settings)(scene))
        new = [each for each in warnings_of(said) if each[:60] not in usual]
        if fault is nothing:
            assert status == 0, said
            usual |= {each[:60] for each in new}
            continue
        outcome = "error" if status else "warns" if new else "silent"
        words = said.strip().splitlines()[-1] if status else new[0] if new else ""
        found[fault.name] = {"outcome": outcome, "words": words.replace(str(keeper.place), "…")[:200]}
        print(f"others {outcome:8} {time.time() - began:5.1f} s  {fault.name}: {words[:90]!r}", flush=True)
    keeper.tool.stdin.close()
    keeper.tool.wait()
    return {"tool": "LLaMA-Factory", "versions": keeper.versions, "cases": found}
