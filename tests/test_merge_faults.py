"""What hostile hands try on merges: bad files, bad settings, bad places, two writers; a sentence each, no harm done."""
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from finetuning_kit import merging
from finetuning_kit.bases import attach_adapter, read_adapter, record_base
from finetuning_kit.extraction import extract_adapter
from finetuning_kit.four_bit import merge_trained_in_4bit
from finetuning_kit.merging import merge_lora_weights
from finetuning_kit.mixing import mix_adapters
from finetuning_kit.models import load_model, load_tokenizer, pocket_model_path, quiet_libraries
from finetuning_kit.runs import staged
from finetuning_kit.settings import FinetuningError
from finetuning_kit.streaming import stream_merge
from finetuning_kit.verification import verify_merge

WEIGHTS, SETTINGS, INDEX = "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"


def make(folder, base, **settings):
    "An adapter with weights of some size."
    torch.manual_seed(0)
    config = settings.pop("config", None) or LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings})
    with quiet_libraries():
        model = get_peft_model(load_model(str(base)), config)
        with torch.no_grad():
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight += 0.05 * torch.randn_like(weight)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "A base, an adapter without a record, one that brings whole modules, and a model with the first one merged in."
    home = tmp_path_factory.mktemp("faults")
    shutil.copytree(pocket_model_path(), home / "base")
    make(home / "adapter", home / "base")
    make(home / "saved", home / "base", modules_to_save=["norm"])
    stream_merge(home / "base", home / "adapter", home / "tuned", "fp32")
    return home


@pytest.fixture
def own(sources, tmp_path, monkeypatch):
    "A copy to be spoiled, in the folder that the process stands in."
    shutil.copytree(sources, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def listing(folder):
    "Every path below a folder."
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def calls(home):
    "Every way to write a model or an adapter, but for its place."
    base, adapter = home / "base", home / "adapter"
    return {"merge": lambda out: merge_lora_weights(base, adapter, out, verify=False),
            "stream": lambda out: stream_merge(base, adapter, out),
            "mix": lambda out: mix_adapters(base, {adapter: 1}, out),
            "extract": lambda out: extract_adapter(base, home / "tuned", out),
            "4 bits": lambda out: merge_trained_in_4bit(base, adapter, out, load_in_4bit=True)}


WAYS = ("merge", "stream", "mix", "extract", "4 bits")


# --- places -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", WAYS)
def test_a_place_that_is_none_does_no_harm(own, way):
    (own / "loop").symlink_to("loop")
    before = listing(own)
    for place in ("", " ", ".", "base/..", None, 5, b"x", "a\0b", "a\udcffb", "loop/x", "base/config.json/x",
                  "base/new", own / ("tuned" if way == "extract" else "adapter") / "deep" / "new"):
        with pytest.raises(FinetuningError):
            calls(own)[way](place)
        assert listing(own) == before, place


def test_a_folder_without_a_name_is_never_filled(own):
    (own / "adapter" / ".part").mkdir()
    before = listing(own)
    for place in ("", ".", "adapter/.."):
        with pytest.raises(FinetuningError, match="is no name of a new folder"), staged(place):
            raise AssertionError("nothing may be written")
    assert listing(own) == before


def test_a_save_that_fails_between_two_renames_keeps_the_old_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("mine")
    replace = os.replace

    def stumble(source, target):
        if Path(source).name == "a" and Path(source).parent.name == ".part":
            raise KeyboardInterrupt
        replace(source, target)

    with patch("os.replace", stumble), pytest.raises(KeyboardInterrupt), staged(tmp_path / "a") as stage:
        (stage / "new").write_text("other")
    assert listing(tmp_path) == ["a", "a/old"]


@pytest.mark.parametrize("way", ["merge", "stream"])
def test_a_refusal_leaves_no_folder_above(own, way):
    spoil(own / "adapter" / WEIGHTS, lambda found: {name: w * float("nan") for name, w in found.items()})
    before = listing(own)
    with pytest.raises(FinetuningError, match="cannot be merged: NaNs"):
        calls(own)[way](own / "new" / "deep" / "out")
    assert listing(own) == before


def at_once(*works):
    "Run functions in processes of their own at the same time; what each came to."
    fork, barrier = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Barrier(len(works))
    told = fork.Queue()

    def run(work):
        barrier.wait()
        try:
            told.put(str(work() and ""))
        except BaseException as error:
            told.put(f"{type(error).__name__}: {error}")

    started = [fork.Process(target=run, args=(work,)) for work in works]
    [each.start() for each in started], [each.join() for each in started]
    return sorted(told.get() for _ in works)


def test_two_that_fill_folders_beside_each_other(tmp_path):
    def fill(name):
        with staged(tmp_path / "new" / name) as stage:
            for number in range(40):
                (stage / f"{number}").write_text(name)
                os.sync() if number == 0 else None
        return True

    for _ in range(3):
        assert at_once(lambda: fill("a"), lambda: fill("b")) == ["", ""]
        assert [len(listing(tmp_path / "new" / name)) for name in ("a", "b")] == [40, 40]
        assert listing(tmp_path / "new")[0] == "a"
        shutil.rmtree(tmp_path / "new")


@pytest.mark.parametrize("way", ["mix", "extract"])
def test_a_folder_that_another_process_is_filling(own, way):
    with merging.unfinished(own / "out") as stage:
        stage.mkdir()
        with pytest.raises(FinetuningError, match="is being written by another process"):
            calls(own)[way](own / "out")
    assert (own / "out").is_dir()


def test_a_folder_that_appeared_meanwhile_is_left_alone(own):
    sign = merging.sign_merge

    def appear(*given):
        sign(*given)
        (own / "out").mkdir()

    with patch.object(merging, "sign_merge", appear), pytest.raises(FinetuningError, match="exists already"):
        calls(own)["merge"](own / "out")
    assert list((own / "out").iterdir()) == [] and not list(own.glob(".out*"))


# --- adapters ---------------------------------------------------------------------------------------------------------

def spoil(path, edit):
    "Rewrite a safetensors file."
    save_file({name: w.contiguous() for name, w in edit(load_file(path)).items()}, path, metadata={"format": "pt"})


def settings(folder, **values):
    "Change an adapter's settings."
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NO_ADAPTER = {"empty": "", "a list": "[1]", "nothing": "null", "a word": '"x"', "too deep": "[" * 100_000,
              "bytes": "\udcff"}
ODD = [{"peft_type": "FOO"}, {"peft_type": None}, {"peft_type": []}, {"r": "x"}, {"r": None}, {"r": 4.0}, {"r": -1},
       {"lora_alpha": "x"}, {"target_modules": 5}, {"target_modules": "(("}, {"target_modules": [5]},
       {"rank_pattern": 5}, {"rank_pattern": {"((": 2}}, {"alpha_pattern": []}, {"layers_to_transform": "x"},
       {"modules_to_save": 5}, {"task_type": "FOO"}, {"init_lora_weights": "loftq"},
       {"trainable_token_indices": [10**9]}, {"eva_config": 5}, {"exclude_modules": 5},
       {"layer_replication": [[0, 2], [1, 3]]}]


@pytest.mark.parametrize("name", NO_ADAPTER)
def test_settings_that_are_none(own, name):
    (own / "adapter" / SETTINGS).write_text(NO_ADAPTER[name], errors="surrogateescape")
    for way in ("merge", "stream", "mix"):
        with pytest.raises(FinetuningError, match=SETTINGS):
            calls(own)[way](own / "out")


@pytest.mark.parametrize("values", ODD, ids=str)
def test_settings_that_mean_nothing(own, values):
    settings(own / "adapter", **values)
    before = listing(own)
    for way in ("merge", "stream"):
        with pytest.raises(FinetuningError) as told:
            calls(own)[way](own / "out")
        assert str(own / "adapter") in str(told.value) or "PEFT cannot put this adapter" in str(told.value)
    assert listing(own) == before


@pytest.mark.parametrize("values", [{"r": "x"}, {"rank_pattern": {"((": 2}}, {"task_type": "FOO"}], ids=str)
def test_a_mix_of_settings_that_mean_nothing(own, values):
    settings(own / "adapter", **values)
    with pytest.raises(FinetuningError):
        calls(own)["mix"](own / "out")


def test_adapters_that_work_beside_the_weights(own):
    with pytest.raises(FinetuningError, match="ADAPTION_PROMPT works beside the weights.*cannot be merged"):
        read_adapter(make(own / "k", own / "base", config=AdaptionPromptConfig(
            adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")))


@pytest.mark.parametrize("text, words", [
    ("[1]", "one JSON object"), ("null", "one JSON object"), ("", "is not readable"),
    ('{"precision": []}', "says nothing that training writes"), ('{"precision": 5}', "says nothing"),
    ('{"load_in_4bit": "yes"}', "says nothing")])
def test_records_that_say_nothing(own, text, words):
    (own / "adapter" / "base.json").write_text(text)
    for way in ("merge", "mix"):
        with pytest.raises(FinetuningError, match=words):
            calls(own)[way](own / "out")


def test_a_record_is_written_whole_or_not_at_all(own):
    record_base(own / "adapter", own / "base")
    before = (own / "adapter" / "base.json").read_text()
    with patch("pathlib.Path.write_text", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(FinetuningError, match="the disk is full"):
            record_base(own / "adapter", own / "base", "bf16")
    assert (own / "adapter" / "base.json").read_text() == before
    for given in (("", "pocket"), ("gone", "pocket"), (None, "pocket"), (own / "adapter", own / "adapter"),
                  (own / "adapter", "pocket", []), (own / "adapter", "pocket", "fp32", "yes")):
        with pytest.raises(FinetuningError):
            record_base(*given)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_numbers_that_nobody_trains(own, kind):
    spoil(own / "adapter" / WEIGHTS, lambda found: {name: w.to(kind) for name, w in found.items()})
    for way in ("merge", "stream", "mix"):
        with pytest.raises(FinetuningError, match="holds numbers of the kind"):
            calls(own)[way](own / "out")


def whole(change):
    "Change what an adapter holds entirely."
    return lambda found: {name: w if "lora" in name else change(w) for name, w in found.items()}


def test_whole_modules_in_other_numbers_are_merged(own):
    spoil(own / "saved" / WEIGHTS, whole(lambda w: w.double()))
    out = merge_lora_weights(own / "base", own / "saved", own / "out", "fp32", verify=False)
    kept = load_file(own / "saved" / WEIGHTS)["base_model.model.model.norm.weight"]
    assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], kept.float())


def test_whole_modules_that_are_no_numbers(own):
    spoil(own / "saved" / WEIGHTS, whole(lambda w: w * float("nan")))
    with pytest.raises(FinetuningError, match="infinite numbers in model.*norm.weight"):
        merge_lora_weights(own / "base", own / "saved", own / "out", verify=False)
    spoil(own / "adapter" / WEIGHTS, lambda found: {name: w * (float("nan") if "_A" in name else 0)
                                                    for name, w in found.items()})
    with pytest.raises(FinetuningError, match="cannot be merged"):
        calls(own)["stream"](own / "out")


def test_pickled_weights_are_named(own):
    (own / "adapter" / WEIGHTS).rename(own / "adapter" / "adapter_model.bin")
    with pytest.raises(FinetuningError, match="adapter_model.bin is pickled and never loaded"):
        calls(own)["merge"](own / "out")


# --- bases ------------------------------------------------------------------------------------------------------------

def rewrite(name, **values):
    "Change a JSON file of a base."
    return lambda base: (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | values))


def index(content):
    "Give a base an index."
    return lambda base: (base / INDEX).write_text(json.dumps(content))


def header(**values):
    "Let a base's file lie about its norm."
    def lie(base):
        raw = (base / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        told = json.loads(raw[8:8 + length])
        told["model.norm.weight"] |= values
        text = json.dumps(told).encode()
        (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length:])
    return lie


BASES = {
    "settings are a list": lambda base: (base / "config.json").write_text("[1]"),
    "a word for a size": rewrite("config.json", hidden_size="x"),
    "no heads": rewrite("config.json", num_attention_heads=0),
    "no vocabulary": rewrite("config.json", vocab_size=-1), "an unknown type": rewrite("config.json", dtype="x"),
    "a list for a type": rewrite("config.json", dtype=[]),
    "stored in fives": rewrite("config.json", quantization_config=5),
    "a far pad": rewrite("config.json", pad_token_id=10**6),
    "no weights": lambda base: save_file({}, base / "model.safetensors"),
    "an index of nothing": index({}), "an index that is a list": index([]), "an empty map": index({"weight_map": {}}),
    "a map that is a list": index({"weight_map": []}), "numbers for files": index({"weight_map": {"a": 5}}),
    "a file elsewhere": index({"weight_map": {"a": "../tuned/model.safetensors"}}),
    "negative sizes": header(shape=[-1, -192]), "broken sizes": header(shape=[192.0]),
    "a number for a type": header(dtype=5), "another type": header(dtype="I64")}


@pytest.mark.parametrize("name", BASES)
def test_bases_that_cannot_be_read(own, name):
    shutil.copytree(own / "base", own / "sound")
    BASES[name](own / "base")
    before = listing(own)
    for call in (calls(own)["merge"], calls(own)["stream"],
                 lambda out: extract_adapter(own / "sound", own / "base", out),
                 lambda out: extract_adapter(own / "base", own / "sound", out)):
        with pytest.raises(FinetuningError):
            call(own / "out")
    assert listing(own) == before


@pytest.mark.parametrize("in_memory", [False, True])
def test_generation_settings_of_the_base_travel(own, in_memory):
    rewrite("generation_config.json", do_sample=True, temperature=0.6, top_k=7, eos_token_id=[1, 2])(own / "base")
    why = merging.CannotStream("as asked") if in_memory else None
    with patch.object(merging, "stream_merge", side_effect=why, wraps=stream_merge):
        out = calls(own)["merge"](own / "out")
    found = json.loads((out / "generation_config.json").read_text())
    assert (found["do_sample"], found["temperature"], found["top_k"]) == (True, 0.6, 7)
    assert {1, 2} <= set(found["eos_token_id"])
    with quiet_libraries():
        assert load_model(str(out)).generation_config.temperature == 0.6


def test_an_adapter_is_no_base(own):
    for call in (lambda: stream_merge(own / "adapter", own / "adapter", own / "out"),
                 lambda: extract_adapter(own / "base", own / "adapter", own / "out")):
        with pytest.raises(FinetuningError, match="is an adapter and no whole model"):
            call()


# --- arguments --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given", [
    {"precision": []}, {"load_in_4bit": "no"}, {"load_in_4bit": 1}, {"prompts": 5}, {"prompts": {"a": 1}},
    {"prompts": [[True]]}, {"trained": "x"}, {"on_event": 5}, {"verify": "no"}, {"allow_difference": None}], ids=str)
def test_arguments_of_another_kind(own, given):
    before = listing(own)
    with pytest.raises(FinetuningError):
        merge_lora_weights(own / "base", own / "adapter", own / "out", **given)
    assert listing(own) == before


def test_arguments_of_a_proof(own):
    trained, tokenizer = attach_adapter(load_model(str(own / "base")), own / "adapter"), load_tokenizer("pocket")
    for prompts in (["What?"], [[]], [[10**9]], [5], "abc", [[1.5]], [[-1]], [[True]], None, []):
        with pytest.raises(FinetuningError, match="`prompts"):
            verify_merge(trained, own / "base", tokenizer, prompts)
    for given in ({"merged": None}, {"tokenizer": "x"}, {"limit": "x"}, {"limit": float("nan")}, {"max_new_tokens": 0}):
        with pytest.raises(FinetuningError):
            verify_merge(**{"adapter_model": trained, "merged": own / "base", "tokenizer": tokenizer,
                            "prompts": [[1, 2]], **given})


@pytest.mark.parametrize("given", [{"seed": None}, {"seed": "x"}, {"weight": 10**400}, {"weight": 1e300}], ids=str)
def test_arguments_of_a_mix(own, given):
    weight = given.pop("weight", 1)
    with pytest.raises(FinetuningError):
        mix_adapters(own / "base", {own / "adapter": weight}, own / "out", **given)
    with pytest.raises(FinetuningError, match="cancel each other out"):
        mix_adapters(own / "base", [(own / "adapter", 1), (own / "adapter", -1)], own / "out", "linear")


# --- the command ------------------------------------------------------------------------------------------------------

def test_a_folder_that_one_stands_in_is_an_adapter_like_any_other(typed, own):
    os.chdir(own / "adapter")
    code, out, err = typed("merge", ".", "--base", own / "base", "--no-verify")
    assert (code, err) == (0, "") and "and adapter, in" in out and (own / "adapter_merged" / "config.json").is_file()
    (own / "adapter" / "sub").mkdir()
    os.chdir(own / "adapter" / "sub")
    assert "adapter_merged exists already" in typed("merge", "..", "--base", own / "base")[2]


def test_a_fault_after_the_proof_is_no_success(typed, own):
    (own / "ask.txt").write_text("Capital of Italy?\n")
    full = FinetuningError("the disk is full")
    words = ("merge", own / "adapter", "--base", own / "base", "--precision", "fp32", "--prompts", own / "ask.txt",
             "--output", own / "out")
    with patch.object(merging, "sign_merge", side_effect=full):
        for more in ((), ("--allow-difference",)):
            code, out, err = typed(*words, *more)
            assert code == 2 and "the disk is full" in err and "verified" in out and not (own / "out").exists()


def test_files_of_another_program_beside_an_adapter(typed, own):
    (own / "config.yaml").write_text("a: [")
    (own / "answers.jsonl").write_text("{")
    words = ("merge", own / "adapter", "--base", own / "base", "--precision", "fp32", "--output", own / "out")
    code, out, err = typed(*words)
    assert (code, err) == (0, "") and "general prompts" in out
