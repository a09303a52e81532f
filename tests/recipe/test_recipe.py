"""Recipes: what is accepted, what is refused, and how the refusal reads."""

import json
import re
import time

import pytest
import yaml
from helpers.common import ROOT
from helpers.recipes import LISTS, MINIMAL, problems, with_key, write

from remix_cli.errors import RecipeError
from remix_cli.recipe import load_recipe
from remix_cli.recipe.loader import all_keys, dump

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def in_lists(dotted: str) -> str:
    """`data.train.path` -> `data.train.0.path`."""
    for prefix in LISTS:
        dotted = dotted.replace(f"{prefix}.", f"{prefix}.0.")
    return dotted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_says_how_it_is_run_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# remix train {path.relative_to(ROOT)}")
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe


LEAVES = [key for key in all_keys() if key.split(".")[-1] not in ("options",)]


@pytest.mark.parametrize("key", LEAVES)
def test_R1_a_misspelt_key_is_named_with_its_line_and_the_right_name(key, tmp_path):
    """R1, generated from the schema: one letter lost from every key."""
    *parents, last = key.split(".")
    wrong = last[:-1] if len(last) > 2 else last + "x"
    found = problems(tmp_path, with_key(".".join([*parents, wrong]), 1))
    lines = [line for line in found if "unknown key" in line]
    assert len(lines) == 1, found
    assert "recipe.yaml:" in lines[0]
    assert lines[0].endswith(f"did you mean {in_lists(key)}?")


@pytest.mark.parametrize("value", [3, "x", [1], {"a": 1}, None])
def test_R2_unknown_keys_are_refused_whatever_their_value(value, tmp_path):
    assert "unknown key" in problems(tmp_path, with_key("adapter.colour", value))[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.active", True),
        ("adapter.active", "2"),
        ("adapter.active", 2.5),
        ("adapter.active", 0),
        ("adapter.rank", -1),
        ("adapter.target_modules", "q_proj"),
        ("adapter.target_modules", []),
        ("adapter.target_modules", [""]),
        ("adapter.omega", "big"),
        ("train.learning_rate", 0),
        ("train.learning_rate", -1),
        ("train.max_steps", 0),
        ("train.warmup_ratio", 1.5),
        ("router.learning_rate", -0.1),
        ("router.selections", 0),
        ("data.validation_fraction", 1.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_R3_R5_R7_wrong_values_are_refused_with_the_key(key, value, tmp_path):
    found = problems(tmp_path, with_key(key, value))
    assert len(found) == 1
    assert f"{key}: " in found[0].replace("target_modules.0", "target_modules")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e400", "nan"])
def test_R5_rates_are_finite(text, tmp_path):
    recipe = yaml.safe_dump(MINIMAL) + f"train:\n  learning_rate: {text}\n"
    assert "train.learning_rate" in problems(tmp_path, recipe)[0]


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("5.", 5.0), ("1", 1.0)])
def test_R4_numbers_are_numbers(text, value, tmp_path):
    recipe = yaml.safe_dump(MINIMAL) + f"train:\n  learning_rate: {text}\n"
    assert load_recipe(write(tmp_path, recipe)).train.learning_rate == value


def test_yaml_surprises_are_not_followed(tmp_path):
    recipe = yaml.safe_dump(MINIMAL) + "seed: 010\n"
    assert load_recipe(write(tmp_path, recipe)).seed == 10
    recipe = yaml.safe_dump(with_key("output_dir", None)).replace("null", "no")
    assert load_recipe(write(tmp_path, recipe)).output_dir == "no"


def test_all_problems_at_once_with_their_lines(tmp_path):
    text = (
        "model: {name_or_path: m}\nadapter:\n  pool_size: 4\n  active: 9\nrouter:\n  selection: 2\n"
        "data:\n  train:\n    - {path: a.jsonl, reasoning_gym: b}\n"
    )
    found = "\n".join(problems(tmp_path, text))
    assert "recipe.yaml:4: adapter.active: k = 9" in found
    assert "recipe.yaml:6: router.selection: unknown key; did you mean router.selections?" in found
    assert "recipe.yaml:9: data.train.0: give either path or reasoning_gym" in found
    assert "output_dir: required" in found


@pytest.mark.parametrize("estimator", ["paper", "rtg", "control_variate"])
def test_R6_one_selection_is_refused_where_a_baseline_is_needed(estimator, tmp_path):
    recipe = with_key("router.selections", 1) | {"router": {"selections": 1, "estimator": estimator}}
    assert "router.selections: M = 1" in problems(tmp_path, recipe)[0]
    recipe["router"]["estimator"] = "straight_through"
    assert load_recipe(write(tmp_path, yaml.safe_dump(recipe))).router.selections == 1


@pytest.mark.parametrize(
    "template", ["{", "{}", "{a.b}", "{0}", "{prompt:>300000000}", "{prompt:d}", "{prompt!r}", "{prompt:{prompt}}"]
)
def test_templates_name_columns(template, tmp_path):
    assert "data.train.0.prompt: not a template" in problems(tmp_path, with_key("data.train.prompt", template))[0]


FILE, GYM, HUB = {"path": "a.jsonl"}, {"reasoning_gym": "chain_sum"}, {"path": "owner/name"}
ARC, EVAL = {"format": "arc"}, "eval.tasks.0.source"


@pytest.mark.parametrize(
    ("source", "key", "value", "message"),
    [
        (FILE, "size", 500, "belongs to a reasoning_gym source"),
        (HUB, "seed", 3, "belongs to a reasoning_gym source"),
        (FILE, "options", {"min_terms": 2}, "belongs to a reasoning_gym source"),
        (GYM, "subset", "main", "belongs to a data set with a path"),
        (GYM, "split", "test", "belongs to a data set with a path"),
        (FILE, "subset", "main", "the path is local"),
        ({"path": "./rows"}, "subset", "main", "the path is local"),
        (FILE, "split", "test", "the path names files"),
        *[
            (FILE | {"format": form}, key, "{question}", f"belongs to format prompt_completion, and this is {form}")
            for form in ("messages", "gsm8k", "arc", "codealpaca")
            for key in ("prompt", "completion")
        ],
    ],
)
def test_what_a_source_or_format_does_not_read_is_refused(source, key, value, message, tmp_path):
    text = yaml.safe_dump(with_key("data.train", [source]), sort_keys=False)
    entry = f"  - {key}: {json.dumps(value)}"
    text = text.replace("data:\n  train:\n  - ", f"data:\n  train:\n{entry}\n    ")
    line = text.splitlines().index(entry) + 1
    (found,) = problems(tmp_path, text)
    assert found.startswith(f"{tmp_path / 'recipe.yaml'}:{line}: data.train.0.{key}: is not read: it ")
    assert message in found
    # in held-out rows and tasks alike
    held = MINIMAL | {"data": {"train": [FILE], "validation": [source | {key: value}]}}
    assert f"data.validation.0.{key}: is not read" in "\n".join(problems(tmp_path, held))
    # Older run folders have every default in their recipe.yaml.
    from remix_cli.recipe.schema import Source

    same = MINIMAL | {"data": {"train": [source | {key: Source.model_fields[key].default}]}}
    loaded = load_recipe(write(tmp_path, yaml.safe_dump(same)))
    assert key not in yaml.safe_load(dump(loaded))["data"]["train"][0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"data": {"train": [FILE], "validation": [HUB | {"weight": 2.0}]}}, "data.validation.0.weight: is not read"),
        (
            {"data": {"train": [FILE], "validation": [HUB], "validation_fraction": 0.1}},
            "data.validation_fraction: is not",
        ),
        ({"data": {"train": [FILE], "allow_overlap": True}}, "data.allow_overlap: is not read"),
        ({"eval": {"tasks": [{"task": "nll", "source": FILE | {"weight": 2.0}}]}}, f"{EVAL}.weight: is not read"),
        ({"eval": {"tasks": [{"task": "arc", "source": FILE | {"format": "gsm8k"}}]}}, f"{EVAL}.format: is not read"),
        ({"eval": {"tasks": [{"task": "arc", "source": FILE | {"prompt": "{a}"}}]}}, f"{EVAL}.prompt: is not read"),
        ({"eval": {"tasks": [{"task": "humaneval", "source": FILE | ARC}]}}, f"{EVAL}.format: is not read"),
    ],
)
def test_nor_is_a_key_of_held_out_rows_ignored(recipe, message, tmp_path):
    assert any(message in line for line in problems(tmp_path, MINIMAL | recipe))


def test_a_source_on_another_file_keeps_only_what_is_read_there():
    from remix_cli.recipe.schema import Source

    hub = Source(path="openai/gsm8k", subset="main", split="test", format="gsm8k", weight=2.0)
    gym = Source(reasoning_gym="chain_sum", size=5, seed=3, options={"a": 1}, prompt="Q: {prompt}")
    for source in (hub, gym):
        there = source.at("b.jsonl")
        assert Source(**there.model_dump()) == there
        assert (there.format, there.prompt) == (source.format, source.prompt)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(with_key("output_dir", "~/runs/x"))))
    assert recipe.output_dir == "/somewhere/runs/x"


def test_R15_overrides_are_read_as_yaml_and_checked_alike(tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["train.learning_rate=1e-4", "data.train.0.path=b.jsonl", "seed=3"])
    assert (recipe.train.learning_rate, recipe.data.train[0].path, recipe.seed) == (1e-4, "b.jsonl", 3)
    for wrong in ("train.learning_rat=1", "train.max_steps=yes", "seed", "data.train.5.path=x", "seed.x=1"):
        assert problems(tmp_path, MINIMAL, wrong)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- 1\n- 2",
        "",
        "a: !!python/object/apply:os.system ['true']",
        "[" * 5000,
        "seed: 1\nseed: 2",
        "\x00",
    ],
)
def test_R11_files_that_are_no_recipes(text, tmp_path):
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert "recipe.yaml" in found[0]


def aliases(first: str, again: str, count: int) -> str:
    return f"a0: &a0 {first}\n" + "".join(f"a{i}: &a{i} {again.format(i - 1)}\n" for i in range(1, count))


HEAVY = {
    "alias bomb of lists": aliases("[x, x]", "[" + ", ".join(["*a{0}"] * 9) + "]", 12),
    "alias bomb of mappings": aliases("{a: x, b: x}", "{{a: *a{0}, b: *a{0}}}", 40),
    "alias of itself": "a: &a [*a]\n",
    "unknown keys": "".join(f"k{i}: 1\n" for i in range(15_000)),
    "misspelt keys": "train:\n" + "".join(f"  learning_rat{i}: 1\n" for i in range(8000)),
    "a megabyte": "".join(f"k{i}: 1\n" for i in range(100_000)),
    "a list": f"seed: [{'1,' * 95_000}]\n",
    "depth": "seed: " + "{a: " * 45_000,
}


@pytest.mark.parametrize("heavy", HEAVY)
def test_a_heavy_recipe_is_refused_at_once(heavy, tmp_path):
    text = yaml.safe_dump(MINIMAL) + HEAVY[heavy]
    begun = time.process_time()
    found = problems(tmp_path, text)
    assert time.process_time() - begun < 10  # a few seconds on a quiet machine
    assert 1 <= len(found) <= 51
    assert all(len(line) < 500 for line in found)
    if "bomb" in heavy:
        assert problems(tmp_path, MINIMAL, "train={" + HEAVY[heavy].replace("\n", ", ") + "}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: !!int abc", "'abc' is not a whole number"),
        ("seed: !!float abc", "'abc' is not a number"),
        ("seed: !!bool maybe", "'maybe' is not true or false"),
        ("seed: !!timestamp abc", "could not determine a constructor"),
        ("seed: !!set {a}", "could not determine a constructor"),
        ("seed: " + "9" * 5000, "is not a whole number that can be read"),
        ("seed: -" + "9" * 5000, "is not a whole number that can be read"),
        ("seed: " + "9" * 4000, "seed: should be less than"),
        ("? [a, b]\n: 1", "a key should be a name, this is a list"),
        ("? {a: b}\n: 1", "a key should be a name, this is a mapping"),
        ("1: 2", "a key should be a name, this is 1; put it in quotes"),
        ("~: 2", "a key should be a name"),
        ("true: 2", "a key should be a name"),
        ("²: 2", "²: unknown key"),
        ("eval: {tasks: [3]}", "eval.tasks.0: should be a mapping of keys, got 3"),
        ("train: 3", "train: should be a mapping of keys, got 3"),
        ("router: []", "router: should be a mapping of keys, got a list"),
    ],
)
def test_R11_what_yaml_allows_and_a_recipe_does_not(line, message, tmp_path):
    (found,) = problems(tmp_path, yaml.safe_dump(MINIMAL) + line)
    assert message in found
    assert re.search(r"recipe\.yaml:[0-9]+: ", found), "with its line"
    if line.startswith("seed"):
        (found,) = problems(tmp_path, MINIMAL, line.replace(": ", "=", 1))
        assert message in found


@pytest.mark.parametrize("wrong", ["data.train.²=1", "data.train." + "9" * 5000 + "=1", "²=1", ".=1", "a..b=1"])
def test_R15_odd_places_are_no_places(wrong, tmp_path):
    assert problems(tmp_path, MINIMAL, wrong)


def test_all_linear_is_one_name_for_every_target(tmp_path):
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(with_key("adapter.target_modules", "all-linear"))))
    assert recipe.adapter_config().target_modules == ("all-linear",)
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe
    (line,) = problems(tmp_path, with_key("adapter.target_modules", "q_proj"))
    assert "adapter.target_modules: should be a valid list" in line


def test_missing_recipe_file(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path)


ROUTED, LORA, ALL = {"pool_size": 4, "active": 2}, {"method": "lora"}, {"pool_size": 4, "active": 4}
OTHER = {  # for each key a value that is not its default
    "adapter": {"pool_size": 9, "active": 3, "rank": 2, "omega": "lora", "target_modules": ["q_proj"], "dropout": 0.1}
    | {"virtual_tokens": 3, "vectors": 3, "vector_length": 3, "use_rslora": True, "init_from": ["a", "b"]}
    | {"shortcut": "block", "previous": 2},
    "router": {"selections": 4, "estimator": "rtg", "fixed": True, "lora_gradient": "one", "scope": "module"}
    | {"level": "sequence", "learning_rate": 0.2, "init_std": 1.0, "unit_input": False, "max_grad_norm": 2.0}
    | {"balance": 0.5, "clusters": 3},
    "alarm": {"ess": 2.0, "commonest": 0.5, "dead": 0.4, "patience": 3},
    "train": {"warmup_ratio": 0.1, "eval_steps": 5, "eval_tasks_limit": 5, "per_device_eval_batch_size": 2}
    | {"project": "mine"}
    | {"metric_for_best_model": "nll/loss", "early_stopping_threshold": 0.1, "early_stopping_patience": 2}
    | {"learning_rate": 0.2, "weight_decay": 0.1, "max_grad_norm": 2.0, "precondition": "riemannian"},
    "data": {"validation_fraction": 0.2, "split_seed": 3, "allow_overlap": True, "validation_limit": 9}
    | {"chat_template_kwargs": {"enable_thinking": False}, "template_date": "2026-11-28"},
}
LEARNT = ("fixed", "selections", "estimator", "lora_gradient", "learning_rate", "max_grad_norm")
HELD = {"train": [FILE], "validation": [HUB]}
# key -> a situation in which nothing reads it
UNREAD = {f"router.{key}": {"adapter": ALL} for key in LEARNT}
UNREAD |= {f"router.{key}": {"adapter": LORA} for key in ("scope", "level", "init_std", "unit_input")}
UNREAD |= {"router.balance": {}, "router.clusters": {"router": {"level": "token"}}}
UNREAD |= {f"alarm.{key}": {"adapter": LORA} for key in ("ess", "commonest", "dead", "patience")}
UNREAD |= {f"adapter.{key}": {"adapter": {"method": "none"}} for key in OTHER["adapter"]}
UNREAD |= {"train.project": {"train": {"report_to": "tensorboard"}}}
UNREAD |= {"train.warmup_ratio": {"train": {"lr_scheduler_type": "constant"}}}
UNREAD |= {"train.eval_tasks_limit": {"eval": {"tasks": [{"task": "nll"}, {"task": "humaneval"}]}}}
UNREAD |= {
    f"train.{key}": {"data": {"train": [FILE], "validation_fraction": 0.0}}
    for key in ("eval_steps", "per_device_eval_batch_size", "metric_for_best_model", "early_stopping_patience")
}
UNREAD |= {"train.early_stopping_threshold": {}}
FROZEN = {"adapter": ROUTED | {"init_from": "run", "train_loras": False}}
UNREAD |= {f"train.{key}": FROZEN for key in ("learning_rate", "weight_decay", "max_grad_norm", "precondition")}
UNREAD |= {f"data.{key}": {"data": HELD} for key in ("validation_fraction", "split_seed")}
UNREAD |= {"data.allow_overlap": {}, "data.validation_limit": {"data": {"train": [FILE], "validation_fraction": 0.0}}}
UNREAD |= {
    f"data.{key}": {"data": {"train": [FILE], "use_chat_template": False}}
    for key in ("chat_template_kwargs", "template_date")
}
# other situations in which the same keys are unread
MORE = [
    *[(f"alarm.{key}", {"adapter": ALL}) for key in OTHER["alarm"]],
    ("alarm.dead", {"adapter": {"method": "hydralora"}}),
    ("alarm.ess", {"adapter": {"active": 1}}),
    ("router.clusters", {"adapter": {"method": "mixlora"}, "router": {"level": "sequence"}}),
    ("router.unit_input", {"router": {"level": "sequence", "clusters": 3}}),
    ("router.estimator", {"router": {"learning_rate": 0}}),
    ("router.max_grad_norm", {"router": {"learning_rate": 0}}),
    ("train.eval_tasks_limit", {"eval": {"tasks": []}}),
    *[("train.precondition", {"adapter": {"method": name}}) for name in ("hydralora", "dora", "prompt", "none")],
    ("data.split_seed", {"data": {"train": [FILE], "validation_fraction": 0.0}}),
]
# Every other key, and who reads it whatever else is set. Sources and tasks have tests of their own (above, and in
# test_eval_tasks).
ALWAYS_READ = {
    "model.*": "models.load_model, models.skeleton",
    "adapter.method": "methods.apply",
    "data.train": "data.splits",
    "data.validation": "data.splits",
    "data.max_length data.use_chat_template data.allow_special_tokens": "data.encode",
    "data.train.* data.validation.* eval.tasks.*": "data.sources, tasks",
    "train.num_train_epochs train.max_steps": "data.splits; max_steps is said to override num_train_epochs",
    "train.per_device_train_batch_size train.gradient_accumulation_steps train.group_by_length": "data.batches",
    "train.tokens_per_batch": "data.batches",
    "adapter.train_loras": "train.setup; false without init_from or without a router that learns is refused",
    "train.lr_scheduler_type": "train.optim",
    "train.torch_compile train.cuda_graphs train.shard_base": "train.trainer",
    "train.gradient_checkpointing train.logging_steps train.save_steps train.save_total_limit": "train.trainer",
    "train.report_to": "train.trackers",
    "eval.tasks eval.batch_size eval.selection": "evaluation.evaluator",
    "output_dir seed": "train.trainer; beside sweep.seeds a seed is refused, see test_sweep",
}


def test_for_every_key_it_is_known_who_reads_it_and_when():
    patterns = " ".join(ALWAYS_READ).split()
    for key in all_keys():
        always = [p for p in patterns if key == p or (p.endswith("*") and key.startswith(p[:-1]))]
        group = key in ("model", "adapter", "router", "data", "train", "eval", "alarm")
        assert len(always) + (key in UNREAD) + group == 1, key
    assert UNREAD.keys() <= set(all_keys())


@pytest.mark.parametrize(
    ("key", "situation"), [*UNREAD.items(), *MORE], ids=lambda x: x if isinstance(x, str) else json.dumps(x)
)
def test_a_key_that_nothing_reads_is_refused_there_but_not_its_default(key, situation, tmp_path):
    from remix_cli.recipe.schema import Recipe

    group, name = key.split(".")
    recipe = MINIMAL | situation
    load_recipe(write(tmp_path, yaml.safe_dump(recipe)))
    said = recipe | {group: recipe.get(group, {}) | {name: OTHER[group][name]}}
    (line,) = problems(tmp_path, said)
    refused = "not a setting of none" if group == "adapter" else "is not read: it "
    assert f"recipe.yaml:{line.split(':')[1]}: {key}: {refused}" in line
    assert "leave it out" in line
    if group != "adapter":  # run folders hold every default
        default = type(getattr(Recipe.model_validate(MINIMAL), group)).model_fields[name].default
        same = recipe | {group: recipe.get(group, {}) | {name: default}}
        written = dump(load_recipe(write(tmp_path, yaml.safe_dump(same))))
        assert load_recipe(write(tmp_path, written)) == load_recipe(write(tmp_path, yaml.safe_dump(recipe)))
        # and runs of earlier versions more than that
        stored = load_recipe(write(tmp_path, yaml.safe_dump(said)), stored=True)
        assert stored == load_recipe(write(tmp_path, yaml.safe_dump(recipe)))


def test_there_is_nothing_to_balance_where_every_lora_is_active(tmp_path):
    every = MINIMAL | {"adapter": {"method": "mixlora", "pool_size": 4, "active": 4}}
    (line,) = problems(tmp_path, every | {"router": {"balance": 0.5}})
    assert "router.balance: is not read: it evens out a choice" in line
    for same in ({}, {"balance": 0.01}, {"balance": 0.0}):
        load_recipe(write(tmp_path, yaml.safe_dump(every | {"router": same})))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!null 5", "'5' is not null"),
        ("!!int 1_000", "'1_000' is not a whole number"),
        ("!!int ' 5 '", "is not a whole number"),
        ("!!float 1_0.5", "'1_0.5' is not a number"),
        ("!!float nan", "'nan' is not a number"),
        ("!!float infinity", "'infinity' is not a number"),
    ],
)
def test_R11_a_tag_converts_nothing(value, message, tmp_path):
    (found,) = problems(tmp_path, yaml.safe_dump(MINIMAL) + f"train:\n  max_steps: {value}\n")
    assert message in found
    (found,) = problems(tmp_path, MINIMAL, f"train.max_steps={value}")
    assert message in found
    plain = {"!!null ~": None, "!!int 7": 7}
    for text, expected in plain.items():
        recipe = write(tmp_path, yaml.safe_dump(MINIMAL) + f"train:\n  max_steps: {text}\n")
        assert load_recipe(recipe).train.max_steps == expected


@pytest.mark.parametrize(
    ("groups", "fixed"),
    [
        ({}, True),
        ({"router": {"level": "sequence", "clusters": 4, "init_std": 1.0}}, True),
        ({"router": {"fixed": False}}, False),
        ({"router": {"selections": 2}}, False),  # says how it is trained, though as the default does
        ({"router": {"estimator": "rtg"}}, False),
        ({"router": {"lora_gradient": "top"}}, False),
        ({"router": {"learning_rate": 0.1}}, False),
        ({"router": {"max_grad_norm": 2.0}}, False),
        ({"adapter": {"train_loras": False, "init_from": "run"}}, False),  # nothing else is left to train
    ],
)
def test_a_router_that_nothing_is_said_of_is_not_trained(groups, fixed, tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL | groups))
    recipe = load_recipe(path)
    assert recipe.router.fixed is fixed
    stored = write(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json")))  # as a run keeps it
    assert load_recipe(stored, stored=True).router == recipe.router


def test_an_override_that_says_how_the_router_learns_trains_it(tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    assert not load_recipe(path, ["router.learning_rate=0.1"]).router.fixed


def test_recorded_steps_refuse_micro_batches_that_have_each_its_shape(tmp_path):
    (line,) = problems(tmp_path, MINIMAL | {"train": {"cuda_graphs": True, "tokens_per_batch": 64}})
    assert "train.cuda_graphs: cannot be combined with train.tokens_per_batch" in line
