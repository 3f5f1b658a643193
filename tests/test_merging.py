"""Merging: what cannot be merged is refused, what differs leaves no folder, and the sources stay as they are."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning_kit.bases import attach_adapter, record_base
from finetuning_kit.merging import (
    MERGE_RECORD, load_check, merge_event_words, merge_lora_weights, prepare_merge, refuse_difference)
from finetuning_kit.models import load_model, load_tokenizer, pocket_model_path, quiet_libraries
from finetuning_kit.runs import file_hash
from finetuning_kit.settings import FinetuningError
from finetuning_kit.verification import MergeCheck, compare_logits, extreme_prompts, proof_prompts, verify_merge

ASK = ["What is the capital of Italy?", "Name the opposite of hot."]


def hashes(folder):
    "Name and hash of every file below a folder."
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_hash(path) for path in files}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "A copy of the pocket model, and an adapter of it with weights of some size."
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("sources")
    shutil.copytree(pocket_model_path(), home / "base")
    torch.manual_seed(0)
    with quiet_libraries():
        model = get_peft_model(load_model(str(home / "base")), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(home / "adapter", save_embedding_layers=False)
    record_base(home / "adapter", home / "base")
    return home


@pytest.fixture
def copies(sources, tmp_path):
    "The same, to be spoiled."
    shutil.copytree(sources, tmp_path / "in")
    return tmp_path / "in"


def change(path, edit):
    "Rewrite a safetensors file."
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def cut(path):
    "Leave half of a file."
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def prefix_tuning(home):
    "Turn an adapter into one that changes no weight."
    path = home / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "PREFIX_TUNING"}))


def lose_shard(home):
    "An index that names a file which is not there."
    names = list(load_file(home / "base" / "model.safetensors"))
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {
            name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}}))
    shutil.move(home / "base" / "model.safetensors", home / "base" / "model-00001-of-00002.safetensors")


def other_numbers(home):
    "A base of the same shape."
    change(home / "base" / "model.safetensors", lambda found: {name: w * 1.01 for name, w in found.items()})


BAD = {
    "prefix tuning": (prefix_tuning, "cannot be merged"),
    "missing shard": (lose_shard, "model-00002-of-00002.safetensors"),
    "truncated base": (lambda home: cut(home / "base" / "model.safetensors"), ""),
    "truncated base of an adapter without record": (lambda home: (
        (home / "adapter" / "base.json").unlink(), cut(home / "base" / "model.safetensors")), ""),
    "truncated adapter": (lambda home: cut(home / "adapter" / "adapter_model.safetensors"), ""),
    "adapter is text": (lambda home: (home / "adapter" / "adapter_model.safetensors").write_text("hello"), ""),
    "adapter's config is no JSON": (lambda home: (home / "adapter" / "adapter_config.json").write_text("{"),
                                    "is not readable JSON"),
    "base.json is no JSON": (lambda home: (home / "adapter" / "base.json").write_text("{"), "is not readable JSON"),
    "no adapter": (lambda home: shutil.rmtree(home / "adapter"), "is no adapter"),
    "no base": (lambda home: shutil.rmtree(home / "base"), "neither"),
    "wrong base": (other_numbers, "not the base that this adapter was trained on"),
    "foreign adapter": (lambda home: change(home / "adapter" / "adapter_model.safetensors", lambda found: {
        name.replace("layers", "blocks"): w for name, w in found.items()}), "does not fit"),
    "half an adapter": (lambda home: change(home / "adapter" / "adapter_model.safetensors", lambda found: dict(
        list(found.items())[::2])), "does not fit"),
    "no numbers": (lambda home: change(home / "adapter" / "adapter_model.safetensors", lambda found: {
        name: w * float("nan") for name, w in found.items()}), "cannot be merged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused_and_left_alone(name, copies, tmp_path):
    spoil, words = BAD[name]
    spoil(copies)
    before = hashes(copies)
    with pytest.raises(FinetuningError) as told:
        merge_lora_weights(copies / "base", copies / "adapter", tmp_path / "out", prompts=ASK)
    assert words in str(told.value) and len(str(told.value)) < 500
    assert hashes(copies) == before and sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_merge_proves_itself_and_says_so(sources, tmp_path):
    before, heard = hashes(sources), []
    out = merge_lora_weights(
        sources / "base", sources / "adapter", tmp_path / "out", prompts=ASK, on_event=heard.append)
    check = load_check(out)
    assert check.passed and check.n_prompts == 2 and check.adapter_effect > 0.1 and check.kl < 1e-9
    assert check.extreme["relative_difference"] < 1e-4 and check.before["relative_difference"] < 1e-5
    told = json.loads((out / MERGE_RECORD).read_text())
    assert told["adapter_sha256"] == file_hash(sources / "adapter" / "adapter_model.safetensors")
    assert (told["base"], told["precision"], told["way"]) == ("a local model", "fp32", "plain")
    card = (out / "README.md").read_text()
    assert "## Merged and verified" in card and str(tmp_path) not in card + json.dumps(told)
    kinds = [event["type"] for event in heard if event["type"] != "tensors"]
    assert kinds == ["write", "proof", "proof", "check", "merged"]
    assert all(all(map(str, merge_event_words(event))) for event in heard)
    assert hashes(sources) == before and sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    trained = attach_adapter(load_model(str(sources / "base")), sources / "adapter")
    again = verify_merge(trained, out, load_tokenizer(str(out)), proof_prompts(
        load_tokenizer("pocket"), trained.config.to_dict(), tmp_path, ASK)[0])
    assert replace(again, before=check.before) == check


def test_a_difference_leaves_no_folder_unless_allowed(sources, copies, tmp_path):
    change(copies / "adapter" / "adapter_model.safetensors",
           lambda found: {name: w * 0.9 if "lora_B" in name else w for name, w in found.items()})
    trained = attach_adapter(load_model(str(sources / "base")), sources / "adapter")
    give = (copies / "base", copies / "adapter", tmp_path / "out")
    with pytest.raises(FinetuningError, match="differs from the trained one.*nothing was kept"):
        merge_lora_weights(*give, prompts=ASK, trained=trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    out = merge_lora_weights(*give, prompts=ASK, trained=trained, allow_difference=True)
    assert not load_check(out).passed and "different from what was trained" in (out / "README.md").read_text()
    assert "the difference was allowed" in json.loads((out / MERGE_RECORD).read_text())["notes"][-1]


def test_what_was_written_is_what_is_compared(sources, tmp_path):
    from finetuning_kit import merging

    write = merging.write_merged

    def careless(base, lora, folder, *rest, **more):
        write(base, lora, folder, *rest, **more)
        change(Path(folder) / "model.safetensors", lambda found: {name: w * 1.001 for name, w in found.items()})

    with patch.object(merging, "write_merged", careless), pytest.raises(FinetuningError, match="differs"):
        merge_lora_weights(sources / "base", sources / "adapter", tmp_path / "out", prompts=ASK)
    assert not list(tmp_path.iterdir())


def test_without_a_proof_there_is_a_note(sources, tmp_path):
    give = sources / "base", sources / "adapter"
    out = merge_lora_weights(*give, tmp_path / "a", verify=False)
    assert load_check(out) is None and "not verified, as was asked for" in (out / "README.md").read_text()
    with patch("finetuning_kit.merging.proof_room", return_value="not verified: the proof needs 9 GiB"):
        out = merge_lora_weights(*give, tmp_path / "b")
    assert load_check(out) is None and "## Merged, not verified" in (out / "README.md").read_text()
    assert json.loads((out / MERGE_RECORD).read_text())["notes"] == ["not verified: the proof needs 9 GiB"]


def test_places_that_cannot_be_used(sources, tmp_path):
    give = sources / "base", sources / "adapter"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    before = hashes(sources)
    for out, words in ((tmp_path / "file", "exists already"), (tmp_path / "dangling", "exists already"),
                       (tmp_path, "exists already"), (tmp_path / "file" / "x", "is no folder"),
                       (sources / "base" / "x", "lies inside"), (sources / "adapter" / "x" / "y", "lies inside")):
        with pytest.raises(FinetuningError, match=words):
            merge_lora_weights(*give, out, prompts=ASK)
    assert hashes(sources) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(sources, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(FinetuningError, match="cannot be written to"):
        merge_lora_weights(sources / "base", sources / "adapter", tmp_path / "locked" / "out", prompts=ASK)


def test_a_folder_that_another_merge_is_writing(sources, tmp_path):
    from finetuning_kit.merging import unfinished

    with unfinished(tmp_path / "out") as stage:
        stage.mkdir()
        with pytest.raises(FinetuningError, match="being written by another process"):
            merge_lora_weights(sources / "base", sources / "adapter", tmp_path / "out", verify=False)
        merge_lora_weights(sources / "base", sources / "adapter", tmp_path / "beside", verify=False)
        assert stage.is_dir()
    assert (tmp_path / "out").is_dir() and (tmp_path / "beside" / "config.json").is_file()


def test_a_full_disk(sources, tmp_path):
    give = sources / "base", sources / "adapter", tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with patch("shutil.disk_usage", return_value=usage), pytest.raises(FinetuningError, match="make room"):
        merge_lora_weights(*give, prompts=ASK)
    full = OSError(28, "No space left on device")
    with patch("finetuning_kit.merging.write_merged", side_effect=full), pytest.raises(FinetuningError) as told:
        merge_lora_weights(*give, prompts=ASK)
    assert "the disk is full" in str(told.value) and "then merge again" in str(told.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_merge_leaves_nothing(sources, tmp_path):
    for place in ("write_merged", "verify_merge", "sign_merge", "os.rename"):
        with patch(f"finetuning_kit.merging.{place}", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            merge_lora_weights(sources / "base", sources / "adapter", tmp_path / "out", prompts=ASK)
        assert not list(tmp_path.iterdir()), place


def test_prompts_of_every_kind(sources, tmp_path):
    config = load_model("pocket").config.to_dict() | {"max_position_embeddings": 40}
    tokenizer = load_tokenizer("pocket")
    found, notes = proof_prompts(tokenizer, config, tmp_path, ["word " * 100, [1, 2, 3]], max_new_tokens=10)
    assert (len(found[0]), found[1]) == (30, [1, 2, 3])
    assert "longer than 30 tokens, compared from their ends: 1 of 2" in notes[0]
    tokenizer.chat_template = None
    plain, notes = proof_prompts(tokenizer, config, tmp_path)
    assert "general prompts" in notes[0] and "capital of France" in tokenizer.decode(plain[0])
    for wrong in ("text", [], [[]], [["a"]], [[10**9]]):
        with pytest.raises(FinetuningError, match="`prompts"):
            merge_lora_weights(sources / "base", sources / "adapter", tmp_path / "out", prompts=wrong)
    assert not list(tmp_path.iterdir())


def test_a_coarse_merge_that_differs_names_both_causes(sources, tmp_path):
    job = prepare_merge(sources / "base", sources / "adapter", tmp_path / "out", "bf16")
    apart = MergeCheck(8, 90, 1.0, 2.0, 0.5, 0.9, 5, limit=0.05, extreme={"relative_difference": 0.5})
    with pytest.raises(FinetuningError, match="in fp32: `precision`; where it differs there too, look whether this is"):
        refuse_difference(apart, job)


def test_ends_of_the_vocabulary_are_looked_at(sources):
    trained = attach_adapter(load_model(str(sources / "base")), sources / "adapter")
    sound, tokenizer = load_model(str(sources / "base")), load_tokenizer("pocket")
    with quiet_libraries():
        merged = attach_adapter(sound, sources / "adapter").merge_and_unload()
    prompts = proof_prompts(tokenizer, merged.config.to_dict(), sources, ASK)[0]
    assert verify_merge(trained, merged, tokenizer, prompts).passed
    untied = torch.nn.Embedding.from_pretrained(merged.get_input_embeddings().weight.detach().clone())
    untied.weight[-1] += 1  # an input row that no prompt contains
    merged.set_input_embeddings(untied)
    check = verify_merge(trained, merged, tokenizer, prompts)
    assert check.relative_difference < 1e-5 < 1e-2 < check.extreme["relative_difference"] and not check.passed
    assert compare_logits(trained, merged, extreme_prompts(merged)[:1])["relative_difference"] < 1e-5


def test_eighty_layers_round_more_and_hide_nothing(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer("pocket")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=384, num_hidden_layers=80, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with quiet_libraries():
        trained = get_peft_model(load_model(str(tmp_path / "base")), LoraConfig(r=8, target_modules="all-linear"))
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    record_base(tmp_path / "adapter", tmp_path / "base")
    check = load_check(merge_lora_weights(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"))
    assert check.passed and 1e-5 < check.relative_difference < check.allowed < 1e-3
    merged, base = (load_model(str(tmp_path / name)) for name in ("merged", "base"))
    merged.model.layers[40].mlp.down_proj = base.model.layers[40].mlp.down_proj  # one matrix of 560 forgot its adapter
    asked = proof_prompts(tokenizer, merged.config, tmp_path, ASK)[0]
    assert not verify_merge(trained, merged, tokenizer, asked).passed


def test_tensors_are_told_as_they_are_written(sources, tmp_path):
    from finetuning_kit import merging

    write = merging.write_merged

    def telling(base, lora, folder, precision, in_4bit, on_progress=None):
        write(base, lora, folder, precision, in_4bit)
        on_progress(1, 2, "model.norm.weight")

    heard = []
    with patch.object(merging, "write_merged", telling):
        merge_lora_weights(sources / "base", sources / "adapter", tmp_path / "out", verify=False, on_event=heard.append)
    assert heard[1] == {"type": "tensors", "done": 1, "total": 2, "name": "model.norm.weight"}
    assert merge_event_words(heard[1])[0] == "weights"


def dies_at(point, give):
    "Merge in a process that dies at the n-th call that brings something to the disk; its exit code, 9 when it did."
    child, calls = os.fork(), [0]

    def deadly(call):
        def count(*given, **named):
            calls[0] += 1
            if calls[0] == point:
                os._exit(9)
            return call(*given, **named)
        return count

    if child == 0:
        try:
            for name in ("replace", "rename", "fsync", "unlink"):
                setattr(os, name, deadly(getattr(os, name)))
            merge_lora_weights(*give, verify=False)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_moment_leaves_a_whole_model_or_none(sources, tmp_path):
    give, ended, point, n_absent = (sources / "base", sources / "adapter", tmp_path / "out"), 9, 0, 0
    while ended == 9:
        point += 1
        ended = dies_at(point, give)
        if not (tmp_path / "out").exists():
            n_absent += 1
            continue  # what was left behind is in nobody's way
        assert (tmp_path / "out" / MERGE_RECORD).is_file() and load_model(str(tmp_path / "out")) is not None
        shutil.rmtree(tmp_path / "out")
    assert ended == 0 and n_absent >= 10 and point > n_absent + 1
    assert not [path.name for path in tmp_path.iterdir()]
