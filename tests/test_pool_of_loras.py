"""scripts/pool_of_loras.py: what it asks to be trained, and the table that it prints."""

import runpy

import pytest
from helpers.common import ROOT


@pytest.fixture(scope="module")
def study():
    return runpy.run_path(str(ROOT / "scripts" / "pool_of_loras.py"))


def test_every_arm_is_a_recipe_that_loads_and_the_names_say_who_is_trained(study, tmp_path):
    arms = study["arms_over"]([tmp_path / skill for skill in study["SKILLS"]])
    for name, (adapter, router, rate) in arms.items():
        groups = {"adapter": adapter, "train": rate} | ({"router": {"level": "sequence"} | router} if router else {})
        config = study["recipe_of"](tmp_path, tmp_path / "run", [*study["SKILLS"]], 0, 2, **groups).adapter_config()
        assert config.routed == name.startswith("pool")
        assert (config.scope == "model") == ("one router" in name)
        assert (config.clusters == study["CLUSTERS"]) == ("clusters" in name)
        assert adapter.get("train_loras", True) == ("alone" not in name)


def test_the_table_has_a_column_for_each_seed_and_names_the_best_single_lora(study):
    skills = list(study["SKILLS"])
    found = {}
    for seed in (3, 5):
        losses = {"arm": dict.fromkeys(skills, float(seed))}
        for number, skill in enumerate(skills):  # each is at 0 on its own skill, and worse elsewhere by its number
            losses[f"alone: {skill}"] = dict.fromkeys(skills, 8.0 * (number + 1)) | {skill: 0.0}
        found[seed] = losses
    assert study["table"](found).splitlines() == [
        "| | seed 3 | seed 5 |",
        "|---|---|---|",
        "| arm | 3.000 | 5.000 |",
        "| the best single LoRA | 7.000 | 7.000 |",
        "| each row by its own LoRA | 0.000 | 0.000 |",
    ]
