"""The fault zoo, whole: what became of every fault here, in plain TRL, what it costs there, and the curves of the game.

    python -m tests.benchmarks.zoo [--parts kit clean crossed plain harm curves] [--output measured.json]
    python -m tests.benchmarks.zoo --parts others --other PYTHON  # of an environment with LLaMA-Factory
    python -m tests.benchmarks.zoo_unsloth                        # in an environment with Unsloth

Parts that are not asked for stay in the file as they were. Plain TRL is SFTTrainer with PEFT's LoRA on the same layers
and the settings that it has too (rate, batch, steps, length limit), everything else at its defaults; rows, model folder
and checkpoints are the scene's own. It "warns" when it says something that it does not say on a clean scene.
"""
import argparse
import json
import logging
import random
import shutil
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from finetuning_kit.breakdowns import spoil_weight
from finetuning_kit.faults import Case, Keeper, call_human, change_places, go, judge_fault, look, move_answers, talk
from finetuning_kit.faults import zoo_rows
from finetuning_kit.traps import ANSWER, shift_words
from finetuning_kit.zoo import CLEAN, CLEAN_ROWS, CLEAN_SETTINGS, PLANTED, judge_clean
from tests.benchmarks.zoo_others import others, short_scene

HOME = Path(__file__).parents[2] / "finetuning_kit" / "assets" / "zoo" / "measured.json"
MACHINE = "2 shared x86 cores with AVX-512 BF16, one thread, no GPU"


# --- here ------------------------------------------------------------------------------------------------------------
def kit(keeper) -> list:
    "Judge every fault, run to its end."
    found = []
    for fault in PLANTED:
        verdict = judge_fault(fault, keeper)
        found.append({"name": fault.name, "family": fault.family, "origin": fault.origin, "outcome": verdict.outcome,
                      "when": verdict.when, "sentence": short(verdict.sentence, keeper),
                      "seconds": round(verdict.seconds, 1)})
        print(f"kit    {verdict.outcome:8} {verdict.seconds:5.1f} s  {fault.name}", flush=True)
    return found


def short(sentence, keeper) -> str:
    "A sentence without this machine's folders."
    return sentence.replace(str(keeper.place), "…")[:400]


def clean(keeper) -> list:
    "Run everything in which nothing is wrong."
    found = []
    for name in CLEAN:
        verdict = judge_clean(name, keeper)
        found.append({"name": name, "outcome": verdict.outcome, "sentence": short(verdict.sentence, keeper)})
        print(f"clean  {verdict.outcome:8} {verdict.seconds:5.1f} s  {name}", flush=True)
    return found


def crossed(keeper) -> dict:
    "Run every kind of rows with every kind of settings, each folder removed when it is judged."
    n_runs, stopped = 0, []
    for name in (f"{rows} with {settings}" for rows in CLEAN_ROWS for settings in CLEAN_SETTINGS):
        verdict = judge_clean(name, keeper)
        shutil.rmtree(keeper.place / f"{keeper.n_scenes:03d}")
        n_runs += 1
        if verdict.outcome != "passed":
            stopped.append({"name": name, "sentence": short(verdict.sentence, keeper)})
        print(f"clean  {verdict.outcome:8} {verdict.seconds:5.1f} s  {name}", flush=True)
    return {"n_runs": n_runs, "stopped": stopped}


# --- plain TRL -------------------------------------------------------------------------------------------------------
@contextmanager
def listening():
    "Collect what Python and the libraries say."
    names = ("", "transformers", "trl", "peft", "accelerate", "datasets")
    said, loggers = [], [logging.getLogger(name) for name in names]
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(each.message) for each in caught]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def read_plainly(rows):
    "Rows as `datasets` reads them, in the shape that TRL takes."
    from datasets import Dataset, load_dataset

    return load_dataset("json", data_files=rows, split="train") if isinstance(rows, str) else Dataset.from_list(rows)


def build_plainly(place, method, lora, in_4bit, settings):
    "A model, the adapter that TRL shall put on it, and its tokenizer, as PEFT's and TRL's guides load them."
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    bits = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if in_4bit else {}
    adapters = {"lora": LoraConfig(task_type="CAUSAL_LM", **lora), "full": None,
                "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
                "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **bits)
    return model, adapters[method], AutoTokenizer.from_pretrained(place)


def trl_trainer(scene, build=build_plainly):
    "SFTTrainer for a scene, and nothing of ours."
    from trl import SFTConfig, SFTTrainer

    from finetuning_kit.models import pocket_model_path

    settings = dict(scene.settings)
    method, lora = settings.pop("method", "lora"), {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    lora |= {name: settings.pop(name) for name in list(lora) if name in settings}
    name = settings.pop("model_name", "pocket")
    place = str(pocket_model_path()) if name == "pocket" else name
    for ours in ("on_spike", "over_length", "dataset_format", "split_ratio", "early_stopping"):
        settings.pop(ours, None)
    model, adapter, tokenizer = build(place, method, lora, settings.pop("load_in_4bit", False), settings)
    arguments = {"eval_strategy": "steps" if scene.held_out else "no", **settings}
    config = SFTConfig(output_dir=str(scene.folder.checkpoints), use_cpu=True, max_length=128, disable_tqdm=True,
                       **{"bf16": False, **arguments})
    return SFTTrainer(model=model, args=config, peft_config=adapter, train_dataset=read_plainly(scene.rows),
                      eval_dataset=read_plainly(scene.held_out) if scene.held_out else None,
                      processing_class=tokenizer)


def merge_plainly(scene) -> None:
    "Merge as PEFT's guide does."
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetuning_kit.models import pocket_model_path

    place = scene.settings.get("model_name", str(pocket_model_path()))
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    PeftModel.from_pretrained(model, scene.place / "adapter").merge_and_unload().save_pretrained(scene.place / "merged")


def run_plainly(scene, fault, build=build_plainly, merge=merge_plainly) -> list:
    "Do with plain libraries what the case does; returns the losses."
    if fault.family == "merge":
        merge(scene)
        return []
    trainer = trl_trainer(scene, build)
    trainer.train(resume_from_checkpoint=True if scene.resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def asks_plainly(fault) -> bool:
    "Whether plain TRL can be given the case at all."
    merges = ("another base of the same shape", "half of the adapter is missing", "a number of the adapter is none",
              "an earlier adapter is merged", "the merged model is the base", "the merged model's folder is taken",
              "the adapter is a pickle")
    not_there = ("the memory is full at a step", "the memory is full at the first evaluation",
                 "the disk has a megabyte left")
    return fault.name in merges or fault.family != "merge" and fault.act in (look, go) and fault.name not in not_there


def plain(keeper, name="plain", asks=asks_plainly, run=run_plainly) -> dict:
    "Give every case to plain TRL, or to what stands in its place."
    usual, found = set(), {}
    nothing = Case("nothing", "data", "", "", lambda scene: None, go)
    for fault in [nothing, *PLANTED]:
        if fault is not nothing and not asks(fault):
            found[fault.name] = {"outcome": "not asked"}
            continue
        scene, words, began = short_scene(keeper, fault), "", time.time()
        try:
            with listening() as said:
                run(scene, fault)
            new = [each for each in said if each.split("\n")[0][:60] not in usual and "is deprecated" not in each]
            outcome, words = ("warns", new[0]) if new and fault is not nothing else ("silent", "")
            usual |= {each.split("\n")[0][:60] for each in said} if fault is nothing else set()
        except Exception as error:  # noqa: BLE001 (that it stops, in whatever way, is what is asked)
            outcome, words = "error", f"{type(error).__name__}: {error}"
        if fault is not nothing:
            found[fault.name] = {"outcome": outcome, "words": short(words, keeper)[:200]}
        print(f"{name}  {outcome:8} {time.time() - began:5.1f} s  {fault.name}: {words[:90]!r}", flush=True)
    return found


# --- what it costs ---------------------------------------------------------------------------------------------------
def often(change, every=4):
    "Spoil every fourth row."
    return lambda scene: [change(scene, n) for n in range(0, len(scene.rows), every)]


def cut_in_half(scene, n):
    "Stop an answer in its middle."
    answer = scene.rows[n]["messages"][1]["content"]
    scene.say(n, answer[:len(answer) // 2])


def set_all(**settings):
    "Change settings."
    return lambda scene: scene.set(**settings)


def leak(scene):
    "Train on the held-out rows as well."
    given_away = [talk(*(turn["content"] for turn in row["messages"])) for row in scene.held_out]
    scene.rows = scene.rows[:-len(scene.held_out)] + given_away


HARMS = {
    "nothing wrong": (lambda scene: None, ""),
    "every fourth answer empty": (often(lambda scene, n: scene.say(n, "")), "it learns to say nothing"),
    "every fourth answer a refusal": (often(lambda scene, n: scene.say(n, "I'm sorry, but I can't help with that.")),
                                      "it learns to refuse"),
    "every fourth answer cut in the middle": (often(cut_in_half), "it learns to stop early"),
    "answers that moved seven rows down": (move_answers, "the form is learned, the answers are not"),
    "questions and answers that changed places": (change_places, "it asks instead of answering"),
    "speakers called human and gpt": (call_human, "it never saw the heading that it is asked with"),
    "held-out rows among the training rows": (leak, "the figures lie: these rows were seen"),
    "a template without an end": (lambda scene: scene.template(ANSWER, ANSWER.replace(" + '<|im_end|>'", "")),
                                  "it never stops"),
    "another model's tokenizer": (shift_words, "it starts from noise"),
    "a rate of 1e-5": (set_all(learning_rate=1e-5), "nothing is learned"),
    "a rate of 0.3": (set_all(learning_rate=0.3), "what it knew is gone"),
    "a warm-up longer than the run": (set_all(warmup_steps=400), "the rate never gets there"),
    "an adapter that whispers (alpha 1, rank 64)": (set_all(r=64, lora_alpha=1), "hardly anything is learned"),
    "an adapter that shouts (alpha 512, rank 8)": (set_all(r=8, lora_alpha=512), "it overshoots"),
    "a number that is none in the base": (lambda scene: scene.weights(spoil_weight),
                                          "loss 0 is reported, and the model is NaN")}


def harm(keeper, n_rows=320, n_asked=48) -> dict:
    "Train with plain TRL on what somebody would have trained on, and ask what was held out."
    from finetuning_kit.evaluation import evaluate
    from finetuning_kit.loading import load_records
    from finetuning_kit.models import load_tokenizer

    found = {}
    for name, (spoil_scene, why) in HARMS.items():
        scene, began = keeper.scene(), time.time()
        scene.rows, scene.held_out = zoo_rows(n=n_rows), zoo_rows("pocket:test", n_asked)
        scene.set(max_steps=48, learning_rate=4e-3, eval_steps=48, save_steps=48, logging_steps=16,
                  gradient_checkpointing=False)
        asked = load_records(zoo_rows("pocket:test", n_asked))
        spoil_scene(scene)
        trainer = trl_trainer(scene)
        trainer.train()
        tokenizer = load_tokenizer(scene.settings.get("model_name", "pocket"))
        scores = evaluate(trainer.model, tokenizer, asked, max_new_tokens=32).scores
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[name] = {"exact_match": scores["exact_match"], "stop_rate": scores["stop_rate"], "train_loss": losses[-1],
                       "loss": held_out_loss(trainer.model, tokenizer, asked), "why": why}
        print(f"harm   {time.time() - began:5.1f} s  {name}: {found[name]}", flush=True)
    return found


def held_out_loss(model, tokenizer, records) -> float:
    "Nats a token of the right answers, asked as they should be."
    from finetuning_kit.tokens import encode_records
    from finetuning_kit.watching import mean_log_probability

    rows = encode_records(tokenizer, records, max_length=128).rows
    value = -mean_log_probability(model, rows, tokenizer.pad_token_id)
    return round(value, 3) if value == value else None


# --- the game --------------------------------------------------------------------------------------------------------
CURVES = {
    "nothing wrong": (lambda scene: None, "", ""),
    "the tokenizer belongs to another model": (
        shift_words, "It begins near 14 nats, far above guessing blindly (7.6), and settles at 6: the new words are "
        "learned from nothing.",
        "where does it begin, and what would guessing blindly cost?"),
    "a rate that is too high": (
        set_all(learning_rate=8e-2), "The loss climbs first and stays far above the grey curve: every step destroys "
        "more than it teaches.", "does the loss go down from the first steps on?"),
    "rows learned by heart": (
        lambda scene: setattr(scene, "rows", scene.rows[:12]), "The training loss falls to nothing, the held-out loss "
        "stays where it was: the two curves part.", "compare the line with the dots."),
    "answers that belong to other questions": (
        move_answers, "The form of the answers is learned, then both losses stay on a shelf: what is left cannot be "
        "known.",
        "how low does the grey curve get, and this one?")}


def curves(keeper) -> dict:
    "The loss of every step, and the held-out loss, of a few runs."
    found, names = {}, list(CURVES)
    for name in [names[0], *random.Random(7).sample(names[1:], 4)]:
        spoil_scene, hint, where = CURVES[name]
        scene = keeper.scene()
        scene.rows, scene.held_out = zoo_rows(n=320), zoo_rows("pocket:test", 24)
        scene.set(max_steps=60, learning_rate=4e-3, eval_steps=6, save_steps=60, on_spike="warn", logging_steps=1)
        spoil_scene(scene)
        history = go(scene).found.run.history
        held_out = [[entry["step"], round(entry["eval_loss"], 3)] for entry in history if "eval_loss" in entry]
        found[name] = {"loss": [round(entry["loss"], 3) for entry in history if "loss" in entry], "eval": held_out,
                       "hint": hint, "look": where}
        print(f"curve  {name}: {found[name]['loss'][::12]} {found[name]['eval'][-1]}", flush=True)
    return found


PARTS = {"kit": kit, "clean": clean, "crossed": crossed, "plain": plain, "harm": harm, "curves": curves}


def keep_part(path, part, found) -> None:
    "Write what was found beside what is known already."
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept |= {"date": "2026-11-28", "machine": MACHINE, part: found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "others"], default=list(PARTS))
    parser.add_argument("--other", help="Python of an environment in which LLaMA-Factory is installed")
    parser.add_argument("--output", type=Path, default=HOME)
    options = parser.parse_args()
    if "others" in options.parts and not options.other:
        parser.error("the part others needs --other PYTHON")
    torch.set_num_threads(1)
    for part in options.parts:
        with tempfile.TemporaryDirectory() as place:
            keeper = Keeper(place)
            found = others(keeper, options.other, asks_plainly) if part == "others" else PARTS[part](keeper)
        keep_part(options.output, part, found)


if __name__ == "__main__":
    main()
