"""A command imports what it uses, and nothing fetches code unasked."""

import json
import os
import subprocess
import sys

from helpers.tiny import recipe_text, write_recipe

LOOK = """
import json, sys
from remix_cli.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["remix", *command]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, command
    print("imported", *[name for name in ("peft", "bitsandbytes", "fetched") if name in sys.modules], file=sys.stderr)
"""
KERNELS = """
import sys, types
sys.modules["fetched"] = types.ModuleType("fetched")
raise RuntimeError("native code would be fetched and run")
"""


def test_commands_import_what_they_use_and_fetch_no_code(stage, tmp_path):
    """One process in which `kernels` is installed: what is imported after each command.

    A run on a quantised base finds bitsandbytes although PEFT was first imported without it.
    """
    plain = recipe_text(*stage[:2], tmp_path / "plain", train={"max_steps": 1})
    recipes = {
        "plain": plain,
        "ia3": plain | {"adapter": {"method": "ia3"}},
        "dora": plain | {"adapter": {"method": "dora", "rank": 2}},
        "quantised": plain | {"adapter": {"method": "ia3"}, "model": plain["model"] | {"quantization": "8bit"}},
    }
    for name, recipe in recipes.items():
        write_recipe(tmp_path / f"{name}.yaml", recipe | {"output_dir": str(tmp_path / name)})
    commands = [
        (["validate", "plain.yaml"], []),
        (["train", "plain.yaml"], []),
        (["eval", "plain", "--task", "nll"], []),
        (["export", "plain", "--format", "hf", "--output", "exported"], []),
        (["train", "ia3.yaml"], ["peft"]),
        (["train", "dora.yaml"], ["peft"]),
        (["export", "dora", "--format", "peft", "--output", "exported-peft"], ["peft"]),
        (["budget", "plain.yaml"], ["peft"]),
        (["train", "quantised.yaml"], ["peft", "bitsandbytes"]),
    ]
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "kernels.py").write_text(KERNELS)
    path = os.pathsep.join([str(tmp_path / "installed"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps([words for words, _ in commands])],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("imported")] == [found for _, found in commands]
    assert not [line for line in lines if "kernel" in line]
