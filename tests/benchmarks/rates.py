"""How far the rate that `find_learning_rate` finds lies from the best of a sweep: final held-out loss of a run with the
found rate against the best of twelve rates, on twelve tasks for adapters and twelve for training all weights: prints
a table and writes JSON.

    python tests/benchmarks/rates.py [--only A01,F01] [--output rates_benchmark.json]

The rates of a sweep lie at even distances on a logarithmic scale over the range that the search has, from half the
method's usual rate to 500 times it. A sweep starts in the middle and goes outwards; it leaves out what lies beyond two
rates in a row that end 30 % above its best, for those cannot be the best. The cost of the search is still counted
against twelve whole runs. Losses are nats a token over 150 held-out questions about things that no training row names;
the search sees 64 of them. All runs start from the shipped model, in fp32, and are made by the kit's own trainer.

One run is one draw: near the best rate, another order of the rows moves the final loss by several per cent, and the
best of twelve draws is a lucky one. So the three best rates of the sweep and the found rate are trained with two more
seeds, and a second regret compares the means of three.

Pieces are saved as they finish: the same command goes on where it was stopped. NARROW, the correction for narrow steps,
was set on six of the tasks; the medians are printed with and without them.
"""
import argparse
import json
import random
import statistics
import time
from pathlib import Path

FEW, SLOWLY = {"lora.r": 4, "lora.lora_alpha": 8}, {"training.lr_scheduler_type": "linear"}
EVENLY, EIGHT = {"training.lr_scheduler_type": "constant"}, {"lora.r": 8, "lora.lora_alpha": 16}
TASKS = {  # name -> kind of question, training rows, share of wrong answers, steps, rows a step, settings
    "A01": ("all", 600, 0, 56, 8, {}), "F01": ("all", 600, 0, 56, 8, {"method": "full"}),
    "A02": ("shout", 200, 0, 56, 8, {**FEW, **SLOWLY, "lora.target_modules": ["q_proj", "v_proj"]}),
    "F02": ("shout", 200, 0, 56, 8, {"method": "full", **SLOWLY}),
    "A03": ("all", 400, 0.2, 64, 8, EIGHT), "F03": ("all", 400, 0.2, 64, 8, {"method": "full"}),
    "A04": ("listed", 300, 0, 56, 8, {"method": "ia3"}), "F04": ("listed", 300, 0, 56, 8, {"method": "freeze"}),
    "A05": ("reverse", 300, 0, 48, 8, {**EIGHT, **EVENLY}),
    "F05": ("reverse", 300, 0, 48, 8, {"method": "full", **EVENLY}),
    "A06": ("sentence", 120, 0, 64, 8, {}), "F06": ("sentence", 120, 0, 64, 8, {"method": "full"}),
    "A07": ("tell", 400, 0, 56, 8, {"method": "rslora"}),
    "F07": ("tell", 400, 0, 56, 8, {"method": "full", **SLOWLY}),
    "A08": ("sums", 200, 0, 56, 8, {}), "F08": ("sums", 200, 0, 56, 8, {"method": "full"}),
    "A09": ("all", 60, 0, 56, 4, {**EIGHT, "lora.lora_dropout": 0.1}),
    "F09": ("all", 60, 0, 56, 4, {"method": "full", "training.weight_decay": 0.1}),
    "A10": ("nosums", 500, 0.5, 48, 16, {}), "F10": ("nosums", 500, 0.5, 48, 16, {"method": "full"}),
    "A11": ("reverse", 300, 0.1, 48, 8, {"method": "dora", **EIGHT}),
    "F11": ("reverse", 300, 0.1, 48, 8, {"method": "freeze", **SLOWLY}),
    "A12": ("all", 300, 0, 56, 8, {"method": "ln_tuning"}),
    "F12": ("sentence", 500, 0.3, 56, 8, {"method": "full"}),
}
MORE_SEEDS = (1, 2)
STUDIED = Path(__file__).with_name("rates_study.json")  # the published run, without its curves
SET_ON, N_HELD_OUT, N_SWEEP = ("A01", "F01", "A03", "F03", "A05", "F02"), 150, 12
SEEDS = {"A09": 3, "F09": 3, "A12": 5, "F12": 5}


def row_of(kind, fact, rng) -> dict:
    "One question in the style of a task, with its answer."
    from finetuning_kit.world import ask, question, tell

    if kind in ("sums", "nosums"):
        return ask(fact, rng)
    asked = {"instruction": f"Tell me about {fact.given}." if kind == "tell" else question(fact, rng), "input": ""}
    answers = {"reverse": lambda: fact.answer[::-1], "shout": lambda: fact.answer.upper() + "!",
               "sentence": lambda: tell(fact, rng, "say"), "tell": lambda: tell(fact, rng),
               "listed": lambda: f"- topic: {fact.relation}\n- answer: {fact.answer}"}
    return {**asked, "output": answers[kind]()}


def make_rows(kind, facts, n_rows, seed, noise) -> list[dict]:
    "Rows of a task, no question twice; a share of them have one another's answers."
    from finetuning_kit.world import instruction_rows

    rows, rng, fits = {}, random.Random(f"{kind} {seed}"), {"sums": True, "nosums": False}
    for _ in range(40 * n_rows if kind != "all" else 0):
        fact = rng.choice(facts)
        if len(rows) < n_rows and (kind not in fits or (fact.relation == "sum") == fits[kind]):
            row = row_of(kind, fact, rng)
            rows.setdefault((row["instruction"], row["input"]), row)
    rows = list(rows.values()) or instruction_rows(facts, n_rows, seed)
    rng = random.Random(seed)
    wrong = [n for n in range(len(rows)) if noise and rng.random() < noise]
    answers = [rows[n]["output"] for n in wrong]
    rng.shuffle(answers)
    return [{**row, "output": answers[wrong.index(n)] if n in wrong else row["output"]} for n, row in enumerate(rows)]


def make_task(name) -> tuple:
    "Settled config, tokenizer, rows to learn from and to measure on."
    from finetuning_kit.loading import load_records
    from finetuning_kit.machine import resolve_config
    from finetuning_kit.methods import settle_for_method
    from finetuning_kit.models import load_tokenizer
    from finetuning_kit.profiles import demo_config
    from finetuning_kit.tokens import encode_records
    from finetuning_kit.world import shelve, world_facts

    kind, n_rows, noise, n_steps, batch, changes = TASKS[name]
    groups, tokenizer, seed = shelve(world_facts(0), "group"), load_tokenizer("pocket"), SEEDS.get(name, 0)
    parts = [make_rows(kind, groups["A"], n_rows, seed, noise),
             make_rows(kind, groups["B"], N_HELD_OUT, seed + 1, noise)]
    rows = tuple(encode_records(tokenizer, load_records(part), max_length=128).rows for part in parts)
    config = demo_config(max_steps=n_steps, per_device_train_batch_size=batch).replace(**changes)
    return settle_for_method(resolve_config(config, tokenizer=tokenizer)[0])[0], tokenizer, rows


def sweep(train, low, high) -> list[tuple[float, float]]:
    "Rate and final loss, from the middle outwards."
    found = {}

    def loss(number):
        if number not in found:
            rate = low * (high / low) ** (number / (N_SWEEP - 1))
            found[number] = (rate, train(rate))
        return found[number][1]

    loss(7)
    for way in (1, -1):
        number, n_bad = 7 + way, 0
        while 0 <= number < N_SWEEP and n_bad < 2:
            n_bad = 0 if loss(number) < 1.3 * min(each for _, each in found.values()) else n_bad + 1
            number += way
    return [found[number] for number in sorted(found)]


def study(name, piece, save) -> None:
    "Sweep, search, train with what was found; each part is saved when it is done."
    from finetuning_kit.methods import base_precision
    from finetuning_kit.models import load_model
    from finetuning_kit.rates import find_learning_rate
    from finetuning_kit.trials import rate_range, trial_config, try_rate

    config, tokenizer, rows = make_task(name)
    model, n_steps = load_model("pocket", precision=base_precision(config)), TASKS[name][3]

    def train(rate, seed=config.training.seed):
        planned = trial_config(config.replace(**{"training.seed": seed}), len(rows[0]), rate, n_steps)
        return try_rate(planned, model, tokenizer, rows).eval_loss

    if "before" not in piece:  # a step too small to change anything
        piece["before"] = try_rate(trial_config(config, len(rows[0]), 1e-12, 1), model, tokenizer, rows).eval_loss
    if "sweep" not in piece:
        piece["sweep"] = sweep(train, *rate_range(config))
        save()
    if "found" not in piece:
        began = time.process_time()
        piece["found"] = find_learning_rate(config, *rows, model=model, tokenizer=tokenizer).to_dict()
        piece["found_cpu_s"] = time.process_time() - began
        piece["loss"] = train(piece["found"]["suggestion"])
        save()
    if "again" not in piece:
        best = [rate for rate, _ in sorted(piece["sweep"], key=lambda point: point[1])[:3]]
        piece["again"] = {rate: [train(rate, seed) for seed in MORE_SEEDS] for rate in best}
        save()
    if "found_again" not in piece:
        piece["found_again"] = [train(piece["found"]["suggestion"], seed) for seed in MORE_SEEDS]
        save()


def mean_regret(piece) -> float:
    "The same with means of three seeds, over the three best rates of the sweep."
    swept = dict(map(tuple, piece["sweep"]))
    best = min(statistics.mean([swept[float(rate)], *losses]) for rate, losses in piece["again"].items())
    return statistics.mean([piece["loss"], *piece["found_again"]]) / best - 1


def regret_of(piece, of_fall=False) -> float:
    "How far above the best of the sweep, as a share of it, or of how far the loss fell from the untrained model's."
    best = min(loss for _, loss in piece["sweep"])
    return (piece["loss"] - best) / (piece["before"] - best if of_fall else best)


def show(pieces) -> None:
    "Print a line for each task, and the figures of each kind."
    print(f"{'task':5} {'method':10} {'steps':>5} {'best':>10} {'loss':>7} {'found':>8} {'loss':>7} {'regret':>7} "
          f"{'of fall':>7} {'3 seeds':>7} {'rows':>6}")
    done = {name: piece for name, piece in pieces.items() if "found_again" in piece}
    for name, piece in sorted(done.items()):
        best, found = min(piece["sweep"], key=lambda point: point[1]), piece["found"]
        print(f"{name:5} {found['method']:10} {found['n_total']:5} {best[0]:10.2e} {best[1]:7.3f} "
              f"{found['suggestion']:8.2e} {piece['loss']:7.3f} {regret_of(piece):+7.1%} "
              f"{regret_of(piece, of_fall=True):+7.2%} {mean_regret(piece):+7.1%} {found['cost']:6.1%}")
    for kind, words in (("A", "adapters"), ("F", "all weights")):
        for which, some in (("all", done), ("not those that NARROW was set on", done.keys() - SET_ON)):
            group = [done[name] for name in some if name[0] == kind]
            if group:
                of_best, of_fall = ([regret_of(piece, fall) for piece in group] for fall in (False, True))
                of_mean = [mean_regret(piece) for piece in group]
                print(f"{words}, {which}: {len(group)} tasks, median regret {statistics.median(of_best):+.1%}, worst "
                      f"{max(of_best):+.1%}; of the fall {statistics.median(of_fall):+.2%}, {max(of_fall):+.2%}; over "
                      f"three seeds {statistics.median(of_mean):+.1%}, {max(of_mean):+.1%}")


def main() -> None:
    "Measure what is missing, print, write."
    import torch

    from finetuning_kit.machine import probe_machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, `,` between")
    parser.add_argument("--output", default="rates_benchmark.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(options.output)
    pieces = json.loads(place.read_text())["tasks"] if place.exists() else {}

    def save():
        place.write_text(json.dumps({"machine": str(probe_machine()), "tasks": pieces}, indent=1) + "\n")

    for name in options.only.split(","):
        study(name, pieces.setdefault(name, {}), save)
    show(pieces)


if __name__ == "__main__":
    main()
