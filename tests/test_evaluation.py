"""Tasks, tokenizer and judgement of the accuracy bench."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench.accuracy.evaluation.cells import Z95, Cell, Results, progress, solved, wilson
from bench.accuracy.evaluation.judge import Outcome, follow
from bench.accuracy.evaluation.methods import LOOK_AHEAD, METHODS, RECENT, SETTINGS
from bench.accuracy.evaluation.plan import AT, common_depths, make_plan
from bench.accuracy.evaluation.tables import (
    accuracy_table,
    difference_table,
    far,
    overall_table,
    percent,
)
from bench.accuracy.reference_model.batches import SEED_BITS
from bench.accuracy.reference_model.evaluate import HELD_OUT, instance
from bench.accuracy.reference_model.tasks import TASKS, chat, example
from bench.accuracy.reference_model.tokenizer import (
    VOCABULARY,
    chat_ids,
    output_ids,
    prompt_ids,
    write_tokenizer,
)
from bench.accuracy.reference_model.train import TRAINING
from bench.models.tiny import make_model
from bench.simulator import Oracle, Stats
from tests.tiny_stats import calibration_text, make_stats

POLICIES = [name for name in METHODS if name not in {*LOOK_AHEAD, *SETTINGS}]
PROMPT = list(calibration_text(60, seed=5).encode())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("evaluation")
    model = make_model("qwen3", folder / "model")
    made = Oracle(model, make_stats(model, folder / "stats.pt", tokens=512))
    assert made.stats is not None
    square = made.stats.abs_mean.square() * 1.2
    made.stats = Stats(made.stats.mean, made.stats.abs_mean, square)
    return made


def evaluate_tree(question: str) -> tuple[str, int]:
    """The root and its value, from the definitions alone."""
    header, *lines = question.split("\n")
    root = header.removeprefix("Evaluate ").removesuffix(".")
    leaves = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    inner = {line[0]: line[1:] for line in lines if len(line) == 4}

    def value(name: str) -> int:
        if name in leaves:
            return leaves[name]
        first, sign, second = inner[name]
        a, b = value(first), value(second)
        return (a + b if sign == "+" else a - b) % 10

    return root, value(root)


def run_program(question: str) -> dict[str, int]:
    """What every register or variable holds in the end."""
    held: dict[str, int] = {}
    for line in question.split("\n")[1:]:
        statement = line[2:] if line[1] == ":" else line
        if "#" in line:
            continue
        if "=" not in statement:
            held[statement[0]] = int(statement[1])
        elif len(statement) == 3:
            held[statement[0]] = held[statement[2]]
        else:
            target, first, sign, second = statement[0], *statement[2:]
            both = held[first], held[second]
            held[target] = (sum(both) if sign == "+" else both[0] - both[1]) % 10
    return held


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_right(seed: int) -> None:
    tree = example("tree", 1 + seed, seed)
    root, value = evaluate_tree(tree.question)
    assert tree.answer == f"{root}{value}"
    assert tree.chain.endswith(f"={tree.answer}\n")
    for task in ("registers", "variables"):
        made = example(task, 4 + 3 * seed, seed)
        asked = made.question.split("\n")[0].split()[-1].removesuffix(".")
        assert made.answer == f"{asked}{run_program(made.question)[asked]}"


def test_every_value_in_a_tree_is_computed_once_and_used_once() -> None:
    made = example("tree", 12, 3)
    closes = [line for line in made.chain.splitlines() if len(line) == 8]
    results = {line[-2:] for line in closes}
    operands = [line[start : start + 2] for line in closes for start in (0, 3)]
    assert len(results) == len(closes)
    assert len(set(operands)) == len(operands)
    assert results - set(operands) == {made.answer}


@pytest.mark.parametrize("task", TASKS)
def test_chains_grow_with_depth(task: str) -> None:
    sizes = [
        len(output_ids(example(task, depth, 0)))
        for depth in (5, 20, 60 if task == "registers" else 40)
    ]
    assert sizes == sorted(sizes)
    assert example(task, 20, 7) == example(task, 20, 7)
    assert example(task, 20, 7) != example(task, 20, 8)


def test_tokenizer(tmp_path: Path) -> None:
    """What the tasks encode is what the written tokenizer and its chat template make of it."""
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for task in TASKS:
        made = example(task, 30, 5)
        asked = [{"role": "user", "content": made.question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert list(prompt) == prompt_ids(made.question)
        text = f"{made.chain}</think>\n{made.answer}<|im_end|>"
        assert tokenizer(text).input_ids == output_ids(made)
        assert tokenizer.decode(output_ids(made)) == text
    assert max(tokenizer.get_vocab().values()) < VOCABULARY
    turns = chat([4, 3], 5)
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        # What follows </think> begins with a line end, if a server does not strip it.
        own = {"content": f"\n{turn.answer}", "reasoning_content": turn.chain}
        messages.append({"role": "assistant", **own})
    ids, written = chat_ids(turns)
    assert tokenizer.apply_chat_template(messages, return_dict=False) == [*ids, ord("\n")]
    outputs = [token for turn in turns for token in output_ids(turn)]
    assert [token for token, own in zip(ids, written, strict=True) if own] == outputs


def test_a_chat_goes_on_with_its_registers() -> None:
    first, second = chat([6, 5], 3)
    whole = "\n".join(["", *first.question.split("\n")[1:], *second.question.split("\n")[1:]])
    held = run_program(whole)
    for turn in (first, second):
        asked = turn.question.split("\n")[0].split()[-1].removesuffix(".")
        assert turn.answer == f"{asked}{held[asked]}"
    assert len(second.chain.splitlines()) == 5
    known = set(run_program(first.question))
    assert any(operand in known for line in second.chain.splitlines() for operand in line[2:7:3])


@pytest.mark.parametrize("method", POLICIES)
def test_judged_as_the_model_decodes(oracle: Oracle, method: str) -> None:
    """An output is right if and only if it is what greedy decoding gives, token for token."""
    policy = METHODS[method](24, 16)
    decoded = oracle.generate(PROMPT, 150, policy)
    expected = decoded.output_ids.tolist()
    outcome = follow(oracle, METHODS[method](24, 16), PROMPT, expected)
    assert outcome == Outcome(True, 150, 150, len(decoded.rounds))
    assert outcome.rounds == 0 if method == "full" else outcome.rounds > 5
    for place in (0, 97, 149):
        wrong = [*expected[:place], (expected[place] + 1) % 128, *expected[place + 1 :]]
        found = follow(oracle, METHODS[method](24, 16), PROMPT, wrong)
        assert (found.solved, found.correct) == (False, place)


@pytest.mark.slow
def test_methods_differ(oracle: Oracle) -> None:
    """Every name is a method of its own, and each evicts otherwise than the others."""
    outputs = {
        name: tuple(oracle.generate(PROMPT, 200, METHODS[name](24, 16)).output_ids.tolist())
        for name in POLICIES
    }
    assert len(set(outputs.values())) == len(POLICIES)
    assert {METHODS[name](24, 16).recent for name in POLICIES} <= {0, 4, RECENT, 12, 16}


def test_settings_are_what_their_names_say() -> None:
    for name in SETTINGS:
        policy, (setting, value) = METHODS[name](200, 16), name.split()
        assert vars(policy)[setting] == int(value)
        assert (policy.budget, policy.interval == 16) == (200, setting == "recent")


def test_results_go_on(tmp_path: Path) -> None:
    cell = Cell("random", "tree", 3, 0.1, 20, 16)
    results = Results(tmp_path / "outcomes.jsonl")
    results.add(cell, 0, Outcome(True, 9, 9, 2))
    results.add(cell, 2, Outcome(False, 3, 9, 1))
    again = Results(tmp_path / "outcomes.jsonl")
    assert again.outcomes == results.outcomes
    assert list(again.missing(cell, range(4))) == [1, 3]
    assert again.solved(cell) == (1, 2)
    assert accuracy_table(again, [cell], "share", percent).splitlines() == [
        " " * 15 + "10% = 20",
        "random  50.0 (9.5-90.5)",
    ]
    # 1 and 1/3: a mean of 2/3, of deviation sqrt(2) / 3.
    assert accuracy_table(again, [cell], "share", far).splitlines()[1] == "random  66.7 ± 65.3"


@pytest.mark.parametrize(
    ("solved", "of", "low", "high"), [(0, 10, 0.0, 0.2775), (950, 1000, 0.9347, 0.9619)]
)
def test_wilson(solved: int, of: int, low: float, high: float) -> None:
    """Newcombe 1998 (Stat. Med. 17) has the formula; with none solved it is z^2 / (n + z^2)."""
    assert wilson(solved, of) == pytest.approx((low, high), abs=1e-4)


def test_intervals_say_how_many_instances_they_lack(tmp_path: Path) -> None:
    results, cell = Results(tmp_path / "outcomes.jsonl"), Cell("random", "tree", 3, 0.1, 20, 16)
    for number in range(100):
        results.add(cell, number, Outcome(number < 50, 9 if number < 50 else 6, 9, 1))
    wanted = results.instances_for(cell, 0.03)
    low, high = wilson(wanted // 2, wanted)
    assert high - low == pytest.approx(0.06, abs=5e-4)


def test_methods_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    """By hand: three questions at two budgets; the others were not asked of both, or at both."""
    results = Results(tmp_path / "outcomes.jsonl")
    cells = {
        (method, share): Cell(method, "tree", 3, share, round(100 * share), 16)
        for method in ("snapkv", "triattention")
        for share in (0.1, 0.2)
    }
    outcomes = {
        ("snapkv", 0.1): (True, True, False, True),
        ("snapkv", 0.2): (True, True, True, True, True),
        ("triattention", 0.1): (False, True, False),
        ("triattention", 0.2): (False, True, True, False, False),
    }
    for place, verdicts in outcomes.items():
        for number, right in enumerate(verdicts):
            results.add(cells[place], number, Outcome(right, 8 if right else 4, 8, 1))
    pairs = [(cells["snapkv", share], cells["triattention", share]) for share in (0.1, 0.2)]
    found = results.compare(pairs, solved)
    # Gains of 1, 0 and 0: deviation sqrt(1/3), of the mean a third.
    assert (found.middle, found.half) == pytest.approx((1 / 3, Z95 / 3))
    assert results.compare(pairs, progress).middle == pytest.approx(1 / 6)
    head, row = difference_table(results, list(cells.values()), "triattention").splitlines()
    assert head.split() == ["tree", "all", "questions"]
    assert re.split(r"\s{2,}", row) == ["snapkv", "+16.7 ± 32.7", "+16.7 ± 32.7", "3"]


def test_means_over_tasks(tmp_path: Path) -> None:
    """By hand: 1/2 and 1 on one task, 0 and 1/2 on the other; two tasks, or no figure."""
    results = Results(tmp_path / "outcomes.jsonl")
    cells = [Cell("random", task, 3, 0.1, 20, 16) for task in ("tree", "registers")]
    for cell, right in zip(cells, ((2, 4), (0, 2)), strict=True):
        for number, correct in enumerate(right):
            results.add(cell, number, Outcome(correct == 4, correct, 4, 1))
    alone = Cell("random", "tree", 3, 0.2, 40, 16)
    for number in range(2):
        results.add(alone, number, Outcome(True, 4, 4, 1))
    half = 100 * Z95 * (0.125 / 2 + 0.125 / 2) ** 0.5 / 2
    head, row = overall_table(results, [*cells, alone]).splitlines()
    assert head.split() == ["10%", "20%"]
    assert re.split(r"\s{2,}", row) == ["random", f"50.0 ± {half:.1f}", "-"]


def test_plan_covers_what_is_compared() -> None:
    depths = {"tree": (4, 9, 14, 18)}
    plan = make_plan(["full", "triattention"], ["tree"], depths)
    shares = {cell.share for cell in plan.budgets if cell.method == "triattention"}
    assert min(shares) == 0.03
    assert max(shares) == 0.5
    assert len(shares) >= 5
    assert sum(cell.method == "full" for cell in plan.budgets) == 1
    assert all(cell.budget > RECENT for cell in plan.cells if cell.share)
    assert {cell.share for cell in plan.decisive} == {0.0, AT}
    plan = make_plan(["recent 64"], ["tree"], depths)
    assert plan.depths == plan.decisive == []
    assert {cell.budget >= 64 for cell in plan.budgets} == {True}
    assert max(cell.share for cell in plan.budgets) == 0.5


def test_models_are_compared_where_all_are_in_range(tmp_path: Path) -> None:
    for name, tree in (("one", [4, 9, 14, 18]), ("other", [5, 10, 12, 20])):
        (tmp_path / name).mkdir()
        content = json.dumps({"depths": {"tree": tree, "registers": [1, 2, 3, 4]}})
        (tmp_path / name / TRAINING).write_text(content)
    found = common_depths([tmp_path / "one", tmp_path / "other"])
    assert found == {"tree": (4, 9, 12, 18), "registers": (1, 2, 3, 4)}


def test_held_out_instances_are_not_trained_on() -> None:
    trained = {random.Random(n).getrandbits(SEED_BITS) for n in range(1000)}
    assert max(trained) < HELD_OUT
    assert instance("tree", 3, 0) == example("tree", 3, HELD_OUT)
