"""Where rows come from: lists of files, folders, the hub; each row knows where it stands."""

import gzip
import json

import pytest

from remix_cli.data.encode import load_examples
from remix_cli.data.formats import Origin
from remix_cli.data.sources import check_source, iterate_rows, load_rows
from remix_cli.data.splits import held_out_examples
from remix_cli.errors import DataError
from remix_cli.recipe import Recipe
from remix_cli.recipe.sources import Source


def write(path, *texts):
    """A row for each text, which answers itself."""
    lines = [json.dumps({"prompt": text, "completion": text}) for text in texts]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def prompts(**source):
    return [row["prompt"] for row in load_rows(Source(**source))]


def test_a_list_names_several_files_read_in_its_order(tmp_path):
    last, first = write(tmp_path / "a.jsonl", "3"), write(tmp_path / "b.jsonl", "1", "2")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rows.csv").write_text("prompt,completion\n4,4\n")
    source = Source(path=[first, last, str(tmp_path / "more")])
    assert source.place == "b.jsonl, a.jsonl, more"
    assert [row["prompt"] for row in load_rows(source)] == ["1", "2", "3", "4"]
    assert source.at(first).paths == (first,)


def test_a_row_knows_its_file_and_its_number_in_it(tmp_path):
    one = write(tmp_path / "a.jsonl", "1", "2")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('\n{"prompt": "3", "completion": "3"}\n')
    two = str(tmp_path / "b.jsonl.gz")
    found = [origin for _, origin in iterate_rows(Source(path=[one, two]))]
    assert found == [Origin(one, 1), Origin(one, 2), Origin(two, 1)]
    assert found[0].place is found[1].place, "a million rows share one text"
    examples, counts = load_examples([Source(path=[one, two])])
    assert [str(example.origin) for example in examples][-1] == f"{two}: row 1"
    assert counts == [3]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a.jsonl", "*.jsonl"], r"data\.train\.0\.path: names .*a\.jsonl twice; for rows that count more, set weight"),
        (["a.jsonl", "b.jsonl"], r"data\.train\.0\.path: .*b\.jsonl: no such file"),
        (["a.jsonl", "c*.jsonl"], r"c\*\.jsonl: no file matches"),
    ],
)
def test_a_list_is_checked_before_it_is_read(names, problem, tmp_path):
    write(tmp_path / "a.jsonl", "1")
    source = Source(path=[str(tmp_path / name) for name in names])
    with pytest.raises(DataError, match=problem):
        raise DataError(*check_source(source, "data.train.0"))


def test_a_list_names_no_hub_data_set(tmp_path):
    source = Source(path=[write(tmp_path / "a.jsonl", "1"), "owner/name"])
    (problem,) = check_source(source, "data.train.0")
    assert problem == "data.train.0.path: owner/name: a list names local files, and there is none of this name"


@pytest.mark.parametrize("path", [[], [""], 3, ["a.jsonl", 3]])
def test_a_path_is_a_path_or_a_list_of_paths(path):
    with pytest.raises(ValueError, match="should be a path or a list of paths"):
        Source(path=path)


def test_a_list_of_files_is_no_axis_of_a_sweep(tmp_path):
    from remix_cli.recipe.sweep_grammar import load_sweep

    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(
        "model: {name_or_path: model}\n"
        "data: {train: [{path: [a.jsonl, b.jsonl]}]}\n"
        "train: {learning_rate: [0.1, 0.2]}\n"
        "output_dir: out\n"
    )
    (points,) = load_sweep(recipe).points.values()
    assert [point.setting for point in points] == [{"train.learning_rate": 0.1}, {"train.learning_rate": 0.2}]
    assert {point.recipe.data.train[0].paths for point in points} == {("a.jsonl", "b.jsonl")}


def test_files_are_read_no_further_than_the_limit(tmp_path):
    for name, text in (("rows.jsonl", '{"prompt": "1"}\n{'), ("rows.csv", 'prompt\n1\n"'), ("rows.txt", "1\n2\n")):
        (tmp_path / name).write_text(text)
        assert len(load_rows(Source(path=str(tmp_path / name), limit=1))) == 1


def test_a_line_in_another_code_is_named_wherever_it_stands(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\n" + b"a,b\n" * 50_000 + b"a,\xff\n")
    with pytest.raises(DataError, match=r"rows\.csv: line 50002: not UTF-8"):
        load_rows(Source(path=str(path)))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`owner/name` is a folder here, read by the library itself; what it was asked for is written down."""
    import datasets

    asked = []
    load = datasets.load_dataset

    def from_folder(path, **options):
        asked.append((path, options["revision"], options["streaming"]))
        options["revision"] = None
        return load(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"), **options)

    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return tmp_path / "hub", asked


def test_a_hub_data_set_of_a_revision(hub):
    folder, asked = hub
    write(folder / "train.jsonl", "1", "2")
    assert prompts(path="owner/name", revision="v1.0") == ["1", "2"]
    assert asked == [("owner/name", "v1.0", False)]
    origins = [str(origin) for _, origin in iterate_rows(Source(path="owner/name"))]
    assert origins == ["owner/name: row 1", "owner/name: row 2"]


def test_streaming_takes_the_first_rows_and_leaves_the_rest_where_it_is(hub):
    folder, asked = hub
    write(folder / "train-0.jsonl", "1", "2", "3")
    (folder / "train-1.jsonl").write_text("no JSON")
    assert prompts(path="owner/name", streaming=True, limit=2) == ["1", "2"]
    assert asked == [("owner/name", None, True)]
    with pytest.raises(DataError, match="owner/name: cannot be read"):
        prompts(path="owner/name", limit=2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "owner/name", "streaming": True}, "streaming: say in limit how many of the first rows to take"),
        ({"path": "a.jsonl", "streaming": True, "limit": 3}, "belongs to a hub data set, and the path is local"),
        ({"path": "a.jsonl", "revision": "main"}, "belongs to a hub data set, and the path is local"),
        ({"reasoning_gym": "gcd", "revision": "main"}, "belongs to a data set with a path"),
    ],
)
def test_keys_of_the_hub_are_refused_elsewhere(keys, message):
    with pytest.raises(ValueError, match=message):
        Source(**keys)


def test_a_local_folder_that_is_named_like_a_hub_data_set_has_no_revision(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "train.jsonl", "1")
    monkeypatch.chdir(tmp_path)
    for keys in ({"revision": "main"}, {"streaming": True, "limit": 3}, {"subset": "main"}):
        (problem,) = check_source(Source(path="owner/name", **keys), "data.train.0")
        assert problem.startswith(f"data.train.0.{next(iter(keys))}: is not read")
    assert prompts(path="owner/name") == ["1"]


def test_parquet_packs_itself(tmp_path):
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    (problem,) = check_source(Source(path=str(tmp_path / "rows.parquet.gz")), "data.train.0")
    assert problem.endswith("rows.parquet.gz: parquet packs itself; unpack the file with gunzip")


@pytest.mark.parametrize(
    ("sizes", "more", "held_out"),
    [
        ([10, 20, 12], {"validation_limit": 2}, ["1", "2"]),
        ([10, 20, 12], {"validation_fraction": 0.02}, ["1"]),
        ([10, 20, 12], {"validation_fraction": 0.1}, ["0", "1", "1", "2"]),
    ],
)
def test_something_is_held_out_of_many_small_sources(tmp_path, sizes, more, held_out):
    """Where no source's share is half a row, the largest give one each."""
    sources = [{"path": write(tmp_path / f"{i}.jsonl", *[str(i)] * size)} for i, size in enumerate(sizes)]
    model = {"name_or_path": "unread"}
    recipe = Recipe.model_validate({"model": model, "data": {"train": sources} | more, "output_dir": "unwritten"})
    assert [example.messages[0]["content"] for example in held_out_examples(recipe)] == held_out
