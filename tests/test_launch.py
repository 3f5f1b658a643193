"""Several processes, one run: the losses of a single process, one set of files, one voice; each run is real."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetuning_kit.launch import CONFIGURATIONS, launch_command, launch_config

RUN = """
import os, sys, time
from dataclasses import replace
from finetuning_kit.profiles import demo_config
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.processes import process_index
from finetuning_kit.cli import told_in_sentences
from finetuning_kit.tokens import encode_records
from finetuning_kit.trainer import WeightedTrainer
from finetuning_kit.training import train

output_dir, passes, fault, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] or None
rows = encode_records(load_tokenizer("pocket"), load_records("pocket")[:66], max_length=128).rows
if fault == "weights":
    rows = [replace(row, weights=[0.0 if label == -100 else 0.5 + n % 3 for n, label in enumerate(row.labels)])
            for row in rows]
config = demo_config(output_dir=output_dir, num_train_epochs=2, per_device_train_batch_size=4, save_steps=2,
                     logging_steps=1, eval_steps=3, per_device_eval_batch_size=3, gradient_accumulation_steps=passes,
                     packing=False, **{"lora.lora_dropout": 0.0})
n_steps = 0
if fault == "nan" and process_index() == 1:
    whole = WeightedTrainer.compute_loss
    WeightedTrainer.compute_loss = lambda self, *words, **more: whole(self, *words, **more) * (
        float("nan") if self.state.global_step == 2 else 1)


def stop():
    global n_steps
    n_steps += 1
    if fault == "error" and n_steps == 3 and process_index() == 1:
        raise ValueError("row 17 broke process 1")
    return fault == "stop" and n_steps == 3 and process_index() == 1


def hear(event):
    if event["type"] == "step":
        print(f"{process_index()}: {event['step']}", flush=True)
        time.sleep(2 * (fault == "slow"))  # a launcher takes its time to pass a signal on


with told_in_sentences():
    print(train(config, rows[:53], rows[53:], on_event=hear, resume=resume, should_stop=stop).status, flush=True)
"""
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def arguments_of(name, *words):
    "What `accelerate launch` makes of one of our lines."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    line = shlex.split(launch_command(name, 2, arguments=" ".join(["train", *words])))
    return _validate_launch_command(launch_command_parser().parse_args(line[2:]))[0]


def fsdp_environment():
    "What our configuration tells a process about FSDP, on CPUs and in fp32."
    from accelerate.utils.launch import prepare_multi_gpu_env

    asked = prepare_multi_gpu_env(arguments_of("fsdp"))
    return {**{name: value for name, value in asked.items() if name.startswith(("FSDP_", "ACCELERATE_USE_"))},
            "ACCELERATE_TORCH_DEVICE": "cpu"}


SPREAD = """
from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *words: ("gloo", DistributedType.MULTI_GPU)  # no GPU is needed
"""


def start(output_dir, n=2, fault="", resume="", before=""):
    "Start a run of 16 rows a step in `n` processes."
    words = [sys.executable, "-c", before + RUN, str(output_dir), str(4 // n), fault, resume]
    asked = {**QUIET, **(fsdp_environment() if before else {})}
    return subprocess.Popen([*(TORCHRUN if n > 1 else []), *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=asked)


def finish(process):
    "Wait for a run; its exit code, what it said, and what it complained about."
    out, complaint = process.communicate(timeout=300)
    return process.returncode, out, [line for line in complaint.splitlines() if line.startswith("finetuning-kit: ")]


def story(output_dir):
    "What a run wrote about its losses, [(type, step, loss)]."
    lines = Path(output_dir, "instruct_pocket", "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(event["type"], event["step"], event.get("loss", event.get("eval_loss"))) for event in events
            if event["type"] in ("log", "eval")]


def adapter(output_dir):
    "The weights of the adapter that a run left."
    from safetensors.torch import load_file

    return load_file(Path(output_dir, "instruct_pocket", "adapter", "adapter_model.safetensors"))


def distance(one, other):
    "How far two adapters are apart, at most."
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The folders of a run in two processes and of the same run in one."
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    assert finish(start(two)) [0] == finish(start(one, n=1))[0] == 0
    return two, one


def assert_same(two, one):
    "Two runs told the same losses, at the same steps, and came to the same weights."
    assert [entry[:2] for entry in story(two)] == [entry[:2] for entry in story(one)]
    for left, right in zip(story(two), story(one)):
        assert left[2] == pytest.approx(right[2], abs=1e-5), left
    assert distance(adapter(two), adapter(one)) < 5e-5


def test_two_processes_learn_what_one_learns_from_uneven_shares(pair):
    assert_same(*pair)
    assert [entry[1] for entry in story(pair[0]) if entry[0] == "log"] == list(range(1, 9))  # 2 epochs of ceil(53 / 16)


def test_row_weights_count_the_same_in_two_processes(tmp_path):
    assert finish(start(tmp_path / "two", fault="weights"))[0] == 0
    assert finish(start(tmp_path / "one", n=1, fault="weights"))[0] == 0
    assert_same(tmp_path / "two", tmp_path / "one")


def test_files_are_written_once(pair):
    two, one = (path / "instruct_pocket" for path in pair)
    texts = [(run / "events.jsonl").read_text() for run in (two, one)]
    kinds = [[json.loads(line)["type"] for line in text.splitlines()] for text in texts]
    assert kinds[0].count("note") == kinds[1].count("note") + 1  # how the rows are shared out
    assert [[kind for kind in some if kind != "note"] for some in kinds].count(
        [kind for kind in kinds[0] if kind != "note"]) == 2
    names = {path.relative_to(two).as_posix() for path in two.rglob("*")}
    extra = {name for name in names if "rng_state" in name}
    assert names - extra == {path.relative_to(one).as_posix() for path in one.rglob("*")
                             if "rng_state" not in path.name}
    assert "rows: 2 processes × 4 rows × 2 passes = 16 a step" in json.loads((two / "run.json").read_text())["notes"]


def test_a_stop_in_one_process_stops_all_and_resumes_exactly(tmp_path, pair):
    code, out, _ = finish(start(tmp_path, fault="stop"))
    assert code == 0 and out.count("stopped") == 2 and "0: 4" not in out
    run = tmp_path / "instruct_pocket"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    code, out, _ = finish(start(tmp_path, resume="auto"))
    assert code == 0 and "0: 4" in out and "0: 3" not in out
    assert distance(adapter(tmp_path), adapter(pair[0])) == 0
    assert [path for path in run.rglob("*") if ".part" in path.name] == []


def test_a_checkpoint_of_two_processes_is_refused_by_one(tmp_path, pair):
    code, _, complaints = finish(start(pair[0], n=1, resume="auto"))
    assert code == 2 and len(complaints) == 1
    assert "`n_processes` was 2 and is 1" in complaints[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_the_launcher_ends_all_with_one_checkpoint(tmp_path, number):
    process = start(tmp_path, fault="slow")
    for line in process.stdout:
        if line.strip() == "0: 3":
            break
    process.send_signal(number)
    _, out, complaints = finish(process)
    assert out.count("interrupted") == 2 and complaints == []
    run = tmp_path / "instruct_pocket"
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    last = json.loads((run / "run.json").read_text())
    assert last["status"] == "interrupted" and saved[-1] == f"checkpoint-{last['n_steps']}"


def test_an_error_in_one_process_ends_all_with_one_sentence(tmp_path):
    began = time.monotonic()
    code, _, complaints = finish(start(tmp_path, fault="error"))
    assert code != 0 and len(complaints) == 1
    assert complaints[0].startswith("finetuning-kit: unexpected ValueError: row 17 broke process 1")
    passport = json.loads((tmp_path / "instruct_pocket" / "run.json").read_text())
    assert passport["status"] == "failed" and passport["reason"] == "row 17 broke process 1"
    assert time.monotonic() - began < 120


def test_a_refusal_is_said_once(tmp_path):
    (tmp_path / "instruct_pocket").mkdir()
    (tmp_path / "instruct_pocket" / "beach.png").write_text("sand")
    code, _, complaints = finish(start(tmp_path))
    assert code != 0 and len(complaints) == 1 and "files that no run wrote" in complaints[0]


def test_a_loss_that_is_no_number_in_one_process_stops_all(tmp_path):
    code, _, complaints = finish(start(tmp_path, fault="nan"))
    assert code != 0 and len(complaints) == 1 and "the loss became nan at step 3" in complaints[0]
    assert json.loads((tmp_path / "instruct_pocket" / "run.json").read_text())["status"] == "failed"
    assert [path.name for path in (tmp_path / "instruct_pocket" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_weights_in_pieces_learn_the_same_and_resume_exactly(tmp_path, pair):
    """FSDP2 itself, between CPU processes, with what our configuration asks for."""
    assert finish(start(tmp_path / "whole", before=SPREAD))[0] == 0
    assert_same(tmp_path / "whole", pair[1])
    assert finish(start(tmp_path / "broken", before=SPREAD, fault="stop"))[0] == 0
    assert finish(start(tmp_path / "broken", before=SPREAD, resume="auto"))[0] == 0
    assert distance(adapter(tmp_path / "broken"), adapter(tmp_path / "whole")) == 0
    assert (tmp_path / "whole/instruct_pocket/checkpoints/checkpoint-8/adapter_model.safetensors").is_file()


def test_the_command_in_two_processes(tmp_path):
    """The line that a user pastes, with the configuration for CPUs: one voice, and the losses of one process."""
    from finetuning_kit.loading import load_records

    for name, source, n in (("train", "pocket", 40), ("test", "pocket:test", 7)):
        records = load_records(source)[:n]
        lines = [json.dumps({"instruction": r.instruction, "input": r.input, "output": r.output}) for r in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = ("train --dataset train.jsonl --eval-dataset test.jsonl --num-train-epochs 1 --logging-steps 1 "
             "--eval-steps 2 --per-device-train-batch-size 4 --lora-dropout 0 --packing false --max-seq-length 128")
    several = shlex.split(launch_command("cpu", 2, port=29541,
                                         arguments=f"{words} --output-dir two --gradient-accumulation-steps 2"))[1:]
    alone = ["-m", "finetuning_kit.cli", *words.split(), "--output-dir", "one", "--gradient-accumulation-steps", "4"]
    launched = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *several]
    told = [subprocess.run(line, cwd=tmp_path, text=True, capture_output=True, env=QUIET)
            for line in (launched, [sys.executable, *alone])]
    assert [done.returncode for done in told] == [0, 0], told[0].stderr[-2000:]
    losses = [[(e["step"], e.get("loss", e.get("eval_loss"))) for e in map(json.loads, (
        tmp_path / name / "instruct_train" / "events.jsonl").read_text().splitlines()) if e["type"] in ("log", "eval")]
        for name in ("two", "one")]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
    assert [loss for _, loss in losses[0]] == pytest.approx([loss for _, loss in losses[1]], abs=1e-5)
    for word in ("settings", "before", "merged model verified", "README.md"):
        assert told[0].stdout.count(word) == told[1].stdout.count(word), word
    refused = subprocess.run([*launched, "--learning-rate", "fast"], cwd=tmp_path, text=True, capture_output=True,
                             env=QUIET)
    assert refused.returncode != 0 and refused.stderr.count("finetuning-kit: ") == 1


# --- passes, configurations, several GPUs: no process is started ---------------------------------------------------
@pytest.fixture(scope="module")
def encoded():
    "Rows with answers of unequal length, plain and with weights."
    from dataclasses import replace

    from finetuning_kit.loading import load_records
    from finetuning_kit.models import load_tokenizer
    from finetuning_kit.tokens import encode_records

    rows = encode_records(load_tokenizer("pocket"), load_records("pocket")[:20], max_length=128).rows
    assert len({row.n_loss_tokens for row in rows}) > 4
    weighted = [replace(row, weights=[0.0 if label == -100 else 0.5 + n % 3 for n, label in enumerate(row.labels)])
                for row in rows]
    return {"plain": rows, "weighted": weighted}


def trainer_for(folder, rows, batch, passes, packing=False):
    "Our trainer on the pocket model: three steps of eight rows."
    import torch

    from finetuning_kit.profiles import demo_config
    from finetuning_kit.models import load_model, load_tokenizer
    from finetuning_kit.runs import RunFolder
    from finetuning_kit.trainer import make_trainer
    from finetuning_kit.progress import RunProgress
    from finetuning_kit.methods import add_lora

    config = demo_config(output_dir=str(folder), max_steps=3, per_device_train_batch_size=batch, packing=packing,
                         gradient_accumulation_steps=passes, max_grad_norm=1e9, logging_steps=1, device_map="cpu",
                         **{"lora.lora_dropout": 0.0})
    torch.manual_seed(0)
    model = add_lora(load_model("pocket"), config.lora)
    progress = RunProgress(RunFolder(folder).open())
    return make_trainer(config, model, load_tokenizer("pocket"), (rows, []), progress)


def three_steps(folder, *words, broken=False, **more):
    "The first and the last gradient, the losses and the weights of three steps."
    import torch
    from transformers import TrainerCallback

    from finetuning_kit.models import quiet_libraries
    from finetuning_kit.speed import labelled_positions

    caught = []

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            caught.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    with quiet_libraries(), labelled_positions():
        trainer = trainer_for(folder, *words, **more)
        trainer.add_callback(Catch())
        if broken:
            trainer._get_num_items_in_batch = lambda *arguments: None
        trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return caught[0], caught[-1], torch.tensor([entry["loss"] for entry in trainer.progress.history]), weights


@pytest.mark.parametrize("kind", ["plain", "weighted"])
def test_passes_change_nothing_that_is_learned(tmp_path, encoded, kind):
    whole = three_steps(tmp_path / "whole", encoded[kind], 8, 1)
    assert len(whole[2]) == 3
    for batch, passes in ((4, 2), (2, 4), (1, 8)):
        for packing in (False, True):
            other = three_steps(tmp_path / f"{batch}{packing}", encoded[kind], batch, passes, packing)
            for mine, theirs in zip(whole, other):
                assert (mine - theirs).abs().max() < 1e-4, (batch, passes, packing)
    broken = three_steps(tmp_path / "broken", encoded[kind], 1, 8, broken=True)
    assert (whole[0] - broken[0]).norm() / whole[0].norm() > 0.02
    assert (whole[2] - broken[2]).abs().max() > 0.02


def test_configurations_are_what_accelerate_reads():
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    for name in CONFIGURATIONS:
        assert isinstance(load_config_from_file(str(launch_config(name))), ClusterConfig)
        assert arguments_of(name).num_processes == 2


def test_fsdp_means_what_it_says(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin

    for name, value in fsdp_environment().items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert "SHARDED_STATE_DICT" in str(plugin.state_dict_type) and "transformer" in str(plugin.auto_wrap_policy)


@pytest.mark.parametrize("name, where", [("zero3", "none"), ("zero3_offload", "cpu")])
def test_zero_3_means_what_it_says(monkeypatch, name, where):
    """As far as `accelerate` goes without DeepSpeed: the environment, and the schema that it makes of it."""
    import yaml
    from accelerate import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    arguments = arguments_of(name)
    arguments.deepspeed_fields_from_accelerate_config = ""
    for key, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("accelerate.utils.dataclasses.is_deepspeed_available", lambda: True, raising=False)
    plugin = DeepSpeedPlugin(zero3_init_flag=False)
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == where
    asked = yaml.safe_load(launch_config(name).read_text())["deepspeed_config"]
    assert not asked.keys() - vars(arguments).keys()  # no key that the launcher does not know


def test_several_gpus_in_one_process_are_used_as_one(tmp_path, encoded, monkeypatch):
    """TRL refuses a process that sees several GPUs, for it would copy the model to each; ours never comes to that."""
    from trl import SFTConfig, SFTTrainer

    settle = SFTConfig.__post_init__

    def see_two(self):
        settle(self)
        self._n_gpu = 2

    monkeypatch.setattr(SFTConfig, "__post_init__", see_two)
    trainer = trainer_for(tmp_path, encoded["plain"], 8, 1)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 8
    with pytest.raises(ValueError, match="DataParallel"):
        SFTTrainer(model=trainer.model, args=SFTConfig(output_dir=str(tmp_path / "two"), use_cpu=True),
                   train_dataset=trainer.train_dataset)
    trainer.train()
    assert trainer.state.global_step == 3
