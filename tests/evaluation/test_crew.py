"""Several processes score what one does."""

import json
import shutil

import pytest
from helpers.runs import launch

from remix_cli.evaluation import crew as crews
from remix_cli.evaluation.crew import BATCHES, Crew


class Scorer:
    batch_size = 2

    def run(self, todo):
        yield from ((item, {"answer": item * item}) for item in todo)


def test_every_process_answers_its_share_and_all_get_all(monkeypatch):
    """Gathered slice by slice: after a kill, those that were finished are kept."""
    todo = list(range(100, 170))
    shares = {}

    def share_of(rank):
        crew = Crew()
        crew.size, crew.rank = 3, rank
        mine = []
        monkeypatch.setattr(crews, "gather_object", lambda some: mine.append(some) or some)
        monkeypatch.setattr(crews, "broadcast_object_list", lambda told: told.__setitem__(0, todo))
        list(crew.answers(Scorer(), todo if rank == 0 else []))
        return mine

    for rank in range(3):
        shares[rank] = share_of(rank)
    assert len({len(slices) for slices in shares.values()}) == 1, "each slice is gathered by all"
    assert max(len(some) for slices in shares.values() for some in slices) == BATCHES * Scorer.batch_size
    everything = [answer for slices in shares.values() for some in slices for answer in some]
    assert dict(everything) == {item: {"answer": item * item} for item in todo}
    assert len(everything) == len(todo)


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(crews, "broadcast_object_list", lambda told: pytest.fail("nobody is there"))
    assert dict(Crew().answers(Scorer(), [3])) == {3: {"answer": 9}}


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(finished, tmp_path, verb):
    reports = {}
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
        shutil.rmtree(tmp_path / name / "eval", ignore_errors=True)
    tasks = ["--task", "nll", "--task", "gsm8k", "--max-new-tokens", "5"]
    verb("eval", tmp_path / "one", *tasks)
    said = launch(tasks, tmp_path / "two", 2, verb="eval")
    assert said.count("written:") == 1
    for name in ("one", "two"):
        reports[name] = json.loads((tmp_path / name / "eval" / "adapter.json").read_text())["results"]
        assert not list((tmp_path / name / "eval").glob("*.partial*"))
    for one, two in zip(reports["one"], reports["two"], strict=True):
        assert (two["task"], two["count"], two["asked"]) == (one["task"], one["count"], one["count"])
        assert two["scores"] == {key: pytest.approx(value, rel=1e-5) for key, value in one["scores"].items()}
