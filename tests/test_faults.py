"""The fault zoo: what is caught, by its own guard, and what nobody must stop. The whole zoo is a benchmark's affair."""
import json

import pytest

from finetuning_kit.breakdowns import CHECKPOINTS, MERGES, RUNS
from finetuning_kit.faults import CAUGHT, FAMILIES, Keeper, go, judge_fault, look
from finetuning_kit.zoo import CLEAN, CLEAN_ROWS, CLEAN_SETTINGS, COMPLAINTS, PLANTED
from finetuning_kit.zoo import caught_share, judge_clean, measured

MISSED = set()  # names of faults that nobody catches
QUICK = [fault for fault in PLANTED if fault.act is look]
SOME = ["answers moved seven rows down", "a new token has no place in the model",
        "the tokenizer belongs to another model",
        "a weight of the base is no number", "no gradient reaches the adapter", "the memory is full at a step",
        "one bit of the optimizer's file changed",
        "the rate changed between two halves", "the rows changed between two halves", "another base of the same shape",
        "half of the adapter is missing", "an earlier adapter is merged", "the adapter is added twice"]


@pytest.fixture(scope="module")
def keeper(tmp_path_factory):
    "Lends a finished run and a broken one."
    return Keeper(tmp_path_factory.mktemp("zoo"))


def test_there_are_enough_faults_of_every_family_each_under_a_name_of_its_own():
    assert len(PLANTED) >= 40 and len({fault.name for fault in PLANTED}) == len(PLANTED)
    assert {fault.family for fault in PLANTED} == set(FAMILIES)
    assert all(bool(fault.words) != bool(fault.proof) for fault in PLANTED)


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.name)
def test_a_fault_that_shows_before_the_first_step_is_caught_by_its_own_guard(fault, keeper):
    verdict = judge_fault(fault, keeper)
    assert verdict.caught == (fault.name not in MISSED), verdict.sentence
    assert verdict.outcome != "crashed"


@pytest.mark.parametrize("name", SOME)
def test_a_fault_of_a_run_a_checkpoint_or_a_merge_is_caught(name, keeper):
    verdict = judge_fault(next(fault for fault in PLANTED if fault.name == name), keeper)
    assert verdict.caught, verdict.sentence


@pytest.mark.parametrize("fault", [fault for fault in PLANTED if fault.act is not look and fault.name not in SOME],
                         ids=lambda fault: fault.name)
def test_every_other_fault_is_caught(fault, keeper, request):
    if "slow" not in request.config.getoption("--flags"):
        pytest.skip("takes minutes: --flags slow")
    verdict = judge_fault(fault, keeper)
    assert verdict.caught, verdict.sentence


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_stopped_before_the_first_step_in_which_nothing_is_wrong(name, keeper):
    verdict = judge_clean(name, keeper, look)
    assert verdict.outcome == "passed", verdict.sentence


@pytest.mark.parametrize("name", ["as shipped", "Arabic", "all weights", "prompt tuning"])
def test_a_clean_run_ends_well(name, keeper):
    verdict = judge_clean(name, keeper)
    assert verdict.outcome == "passed", verdict.sentence


def test_no_clean_scene_is_told_what_a_fault_is_told(keeper):
    words = {fault.words for fault in PLANTED if fault.words and fault.act in (look, go)}
    said = look(keeper.scene()).said
    assert not [word for word in words if any(word in each for each in said)]


def test_the_published_figures_keep_the_goal():
    found = measured()
    assert {case["name"] for case in found["kit"]} == {fault.name for fault in PLANTED}
    assert caught_share([case["outcome"] for case in found["kit"]]) >= 0.95
    assert {case["name"] for case in found["kit"] if case["outcome"] not in CAUGHT} == MISSED
    assert len(found["clean"]) >= 30 and {run["name"] for run in found["clean"]} == set(CLEAN)
    assert sum(run["outcome"] != "passed" for run in found["clean"]) == 0
    n_runs, n_stopped = found["crossed"]["n_runs"], len(found["crossed"]["stopped"])
    assert n_runs == len(CLEAN_ROWS) * len(CLEAN_SETTINGS) and n_stopped == 0 and 1 - 0.05 ** (1 / n_runs) < 0.01
    assert set(found["others"]["cases"]) == set(found["unsloth"]["cases"]) == {fault.name for fault in PLANTED}
    assert len(json.dumps(found)) < 200_000


def test_every_complaint_has_a_case_or_a_chapter():
    planted = {part for fault in PLANTED for part in fault.origin.split("; ")}
    assert set(COMPLAINTS) == set(range(1, 26))
    assert {n for n in COMPLAINTS if f"complaint {n}" not in planted} == {8, 24}
    assert len(RUNS) + len(CHECKPOINTS) + len(MERGES) >= 30
