"""scripts/scale_check.py, but for its launches: the rows, who is to be killed, which steps count, the table."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from helpers.common import ROOT

from remix_cli.recipe import Recipe

GRANDCHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
GRANDCHILD += "start_new_session=True).wait()"


@pytest.fixture(scope="module")
def script():
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))  # it imports a neighbour
    yield runpy.run_path(str(ROOT / "scripts" / "scale_check.py"))
    sys.path[:] = before


def test_joined_rows_hold_every_text_once_and_all_but_the_first_question_is_learnt(script, tmp_path):
    rows = [{"question": f"q{i}?", "answer": f"a\u2028{i}"} for i in range(script["JOINED"] * 2 + 3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    script["join_rows"](tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert [row["prompt"] for row in found] == ["q0?", f"q{script['JOINED']}?"]
    text = "".join(row["prompt"] + row["completion"] for row in found)
    assert all(text.count(f"q{i}?\na\u2028{i}\n") == 1 for i in range(script["JOINED"] - 1))


@pytest.mark.parametrize("layout", ["whole", "sharded", "4-bit sharded"])
def test_recipes_are_recipes(script, layout, tmp_path):
    asked = Namespace(cpu=False, steps=12, batch=8)
    case = script["Case"]("8b", layout, 2)
    recipe = Recipe.model_validate(script["recipe_of"](case, tmp_path, tmp_path, tmp_path / "out", asked))
    assert recipe.train.shard_base is ("sharded" in layout)
    assert (recipe.model.quantization == "4bit") is ("4-bit" in layout)
    assert recipe.train.save_steps == 6


def test_a_process_of_a_session_of_its_own_belongs_to_the_family(script):
    """As ranks have: a signal to the launcher's group alone would leave them alive."""
    launcher = subprocess.Popen([sys.executable, "-c", GRANDCHILD], start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while len(script["family"](launcher.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        family = script["family"](launcher.pid)
        assert len(family) == 2
        assert family[0] == launcher.pid
        assert len({os.getpgid(one) for one in family}) == 2
    finally:
        for one in script["family"](launcher.pid):
            os.kill(one, signal.SIGKILL)
        launcher.wait()


def test_the_table_has_ratios_to_one_whole_card_and_says_what_failed(script):
    speed = {"peak_gib": 1.0, "estimate_gib": 1.0, "host_gib": 1.0, "first_step_s": 1.0, "checkpoint_s": 1.0}
    results = [
        {"shape": "8b", "layout": "whole", "cards": 1, "tokens_per_second": 100.0} | speed,
        {"shape": "8b", "layout": "whole", "cards": 2, "tokens_per_second": 190.0} | speed,
        {"shape": "8b", "layout": "4-bit sharded", "cards": 1, "tokens_per_second": 50.0} | speed,
        {"shape": "8b", "layout": "sharded", "cards": 2, "failed": "error: no memory"},
        {"shape": "8b", "layout": "whole", "cards": 2, "killed_on": 2, "resumed_on": 1, "failed": "exit 1"},
        {"shape": "8b", "layout": "whole", "cards": 2, "killed_on": 2, "resumed_on": 2, "same_bits": True},
    ]
    table = script["table"](results)
    assert "| 8b | whole | 2 | 190 | 1.90 |" in table
    assert "| 8b | 4-bit sharded | 1 | 50 | 0.50 |" in table
    assert "| 8b | sharded | 2 | error: no memory |" in table
    assert "killed on 2, resumed on 1: exit 1" in table
    assert "killed on 2, resumed on 2: same bits" in table
