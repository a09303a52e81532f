"""The comparison that a plain recipe stands for: which arms, at which rates, and that the file written for it is it."""

import pytest
from helpers.tiny import recipe_text, write_recipe

from remix_cli.errors import RecipeError
from remix_cli.recipe import load_recipe
from remix_cli.recipe.sweep_grammar import describe, load_sweep


@pytest.fixture
def plain(stage, tmp_path):
    """Path of a plain recipe in which these groups stand in place of the usual ones."""

    def write(**groups):
        model, rows, _ = stage
        recipe = recipe_text(model, rows, tmp_path / "run") | groups
        return write_recipe(tmp_path / "recipe.yaml", recipe)

    return write


def kinds(sweep):
    """What each arm trains, in short."""
    found = {}
    for name, points in sweep.points.items():
        config, router = points[0].recipe.adapter_config(), points[0].recipe.router
        learns = "" if config.method != "remix" else f" {'fixed' if router.fixed else 'learnt'} {config.level}"
        clusters = f" of {config.clusters}" if config.clusters else ""
        found[name] = f"{config.method} {config.pool_size}/{config.active} r{config.rank}{learns}{clusters}"
    return found


POOL = {
    "rsLoRA-r6": "rslora 1/1 r6",
    "rsLoRA-r12": "rslora 1/1 r12",
    "fixed": "remix 4/2 r3 fixed token",
    "clusters": "remix 4/2 r3 fixed sequence of 32",
    "ReMix": "remix 4/2 r3 learnt token",
}


def test_a_pool_stands_beside_one_lora_of_its_active_rank_and_one_of_its_whole_rank(plain, tmp_path):
    sweep = load_sweep(plain())
    assert kinds(sweep) == POOL
    for points in sweep.points.values():
        assert [point.recipe.train.learning_rate for point in points] == [0.00667, 0.02, 0.06]
    assert (sweep.seeds, sweep.folder) == ([0, 1, 2], tmp_path / "run-sweep")
    assert sweep.points["ReMix"][1].recipe == load_recipe(plain()).model_copy(
        update={
            "output_dir": str(sweep.points["ReMix"][1].folder),
            "data": sweep.points["ReMix"][1].recipe.data,
        }
    )


def test_the_recipes_own_settings_stay_in_every_arm_that_reads_them(plain):
    adapter = {"pool_size": 4, "active": 2, "rank": 3, "target_modules": ["up_proj"], "dropout": 0.1}
    sweep = load_sweep(plain(adapter=adapter, router={"estimator": "rtg", "init_std": 2.0}), ["seed=5"])
    for name, points in sweep.points.items():
        adapter = points[0].recipe.adapter
        assert (adapter.target_modules, adapter.dropout) == (["up_proj"], 0.1), name
    assert sweep.points["ReMix"][0].recipe.router.estimator == "rtg"
    assert sweep.points["fixed"][0].recipe.router.init_std == 2.0
    assert sweep.seeds == [5, 6, 7]


def test_a_router_that_the_recipe_leaves_fixed_is_trained_in_one_arm(plain):
    clustered = {"fixed": True, "level": "sequence", "clusters": 5}
    found = kinds(load_sweep(plain(router=clustered)))
    assert found["clusters"] == "remix 4/2 r3 fixed sequence of 5"
    assert found["ReMix"] == "remix 4/2 r3 learnt sequence of 5"
    assert found["fixed"] == POOL["fixed"]
    found = kinds(load_sweep(plain(router={"fixed": True, "level": "sequence"})))
    assert found["by-prompt"] == "remix 4/2 r3 fixed sequence"
    assert list(kinds(load_sweep(plain(router={"fixed": True})))) == list(POOL)


def test_where_tasks_are_scored_so_is_the_base_model(plain):
    points = load_sweep(plain(eval={"tasks": [{"task": "nll"}]})).points
    assert list(points) == [*POOL, "base"]
    (base,) = points["base"]
    assert not base.recipe.method.trains
    assert [len(some) for name, some in points.items() if name != "base"] == [3] * len(POOL)
    none = load_sweep(plain(adapter={"method": "none"}, router={}, eval={"tasks": [{"task": "nll"}]})).points
    assert "base" not in none


@pytest.mark.parametrize(
    ("adapter", "wanted"),
    [
        ({"method": "rslora", "rank": 8}, {"rsLoRA-r8": "rslora 1/1 r8", "rsLoRA-r16": "rslora 1/1 r16"}),
        ({"method": "rslora", "rank": 9}, {"rsLoRA-r9": "rslora 1/1 r9", "rsLoRA-r16": "rslora 1/1 r16"}),
        ({"method": "lora", "rank": 8}, {"lora": "lora 1/1 r8", "rsLoRA-r8": "rslora 1/1 r8"}),
        ({"method": "mixlora", "active": 2}, {"mixlora": "mixlora 8/2 r8", "rsLoRA-r16": "rslora 1/1 r16"}),
        ({"method": "prompt"}, {"prompt": "prompt 1/1 r8", "rsLoRA-r32": "rslora 1/1 r32"}),
        ({"method": "none"}, {"none": "none 1/1 r8", "rsLoRA-r32": "rslora 1/1 r32"}),
    ],
)
def test_another_method_stands_in_front_of_a_pool_of_its_size(plain, adapter, wanted):
    sweep = load_sweep(plain(adapter=adapter, router={}))
    found = kinds(sweep)
    assert next(iter(found)) == next(iter(wanted))
    assert found | wanted == found
    assert "ReMix" in found
    assert sweep.points[next(iter(wanted))][-1].recipe.method.trains == (adapter["method"] != "none")


@pytest.mark.parametrize(
    ("method", "ours"),
    [("mixlora", "token"), ("milora", "sequence"), ("remix_modules", "sequence"), ("reslora", "token")],
)
def test_every_arm_beside_another_method_is_what_its_name_says(plain, method, ours):
    """Whatever the method has by default, which the file does not say; and no two arms are the same run."""
    sweep = load_sweep(plain(adapter={"method": method, "rank": 4}, router={}))
    found = {name: points[0].recipe for name, points in sweep.points.items()}
    learnt, fixed = found["ReMix"].router, found["fixed"].router
    assert (learnt.fixed, learnt.level) == (False, ours)
    assert (fixed.fixed, fixed.level) == (True, "token")
    if method == "remix_modules":
        by_prompt = found["by-prompt"]
        assert (by_prompt.adapter.method, by_prompt.router.fixed, by_prompt.router.level) == ("remix", True, "sequence")
    said = [recipe.model_dump_json(exclude={"output_dir", "train"}) for recipe in found.values()]
    assert len(set(said)) == len(said)
    targets = {tuple(recipe.adapter.target_modules) for recipe in found.values()}
    assert len(targets) == 1, "methods are compared, not places"


def test_rates_of_other_methods_are_as_far_apart_as_their_defaults(plain):
    points = load_sweep(plain(adapter={"method": "lora", "rank": 8}, router={})).points
    rates = {name: [point.recipe.train.learning_rate for point in some] for name, some in points.items()}
    assert rates["lora"] == [0.00667, 0.02, 0.06]
    assert rates["ReMix"] == rates["rsLoRA-r8"] == [0.00222, 0.00667, 0.02]
    none = load_sweep(plain(adapter={"method": "none"}, router={})).points["none"]
    assert [describe(point.setting) for point in none] == [""]


def test_where_there_is_nothing_to_choose_there_is_no_router_to_compare(plain):
    assert list(load_sweep(plain(adapter={"pool_size": 3, "active": 3, "rank": 2}, router={})).points) == [
        "rsLoRA-r6",
        "pool",
    ]


def test_plain_text_has_no_prompts_to_cluster(plain, stage):
    data = {"max_length": 32, "train": [{"path": str(stage[1]), "format": "text", "columns": {"text": "answer"}}]}
    assert "clusters" not in load_sweep(plain(data=data)).points


def test_what_is_spelt_out_is_the_same_sweep(plain, tmp_path):
    for groups in ({}, {"adapter": {"method": "lora", "rank": 8}, "router": {}}):
        sweep = load_sweep(plain(**groups), ["seed=3"])
        path = tmp_path / "spelt.yaml"
        path.write_text(sweep.spelt_out)
        again = load_sweep(path)
        assert (again.points, again.seeds, again.spelt_out) == (sweep.points, sweep.seeds, None)


def test_lists_and_a_sweep_section_are_ones_own(plain):
    assert list(load_sweep(plain(), ["train.learning_rate=[0.1, 0.2]"]).points) == ["run"]
    assert list(load_sweep(plain(sweep={})).points) == ["run"]


def test_the_number_of_seeds_may_be_given_unless_the_file_says_which(plain):
    assert load_sweep(plain(), ["seed=4"], seeds=2).seeds == [4, 5]
    assert load_sweep(plain(sweep={"arms": {"A": {}}}), ["seed=4"], seeds=3).seeds == [4, 5, 6]
    with pytest.raises(RecipeError, match=r"^--hours: .*recipe.yaml:\d+ says in sweep.seeds under which; leave one"):
        load_sweep(plain(sweep={"seeds": [1]}), seeds=1, flag="--hours")


def test_a_wrong_recipe_is_refused_in_its_own_words(plain):
    with pytest.raises(RecipeError) as refused:
        load_sweep(plain(), ["adapter.active=9", "trian=3"])
    assert not any("sweep" in line for line in refused.value.problems)
