"""What is written is read back, and what earlier versions wrote still is."""

import json
from pathlib import Path

import pytest
from helpers.common import written_again

from remix_cli.evaluation.compare import Comparison
from remix_cli.evaluation.headroom import Headroom
from remix_cli.evaluation.report import Evaluation, Report, read_report
from remix_cli.stored_json import Damaged
from remix_cli.tasks.base import TaskStamp

STORED = Path(__file__).parent / "stored"  # as version 0.1.0 wrote them on 27 November 2026
KINDS = {
    "report.json": Report,
    "evaluation.json": Evaluation,
    "comparison.json": Comparison,
    "headroom.json": Headroom,
}


@pytest.mark.parametrize("name", KINDS)
def test_stored_results_are_read_and_written_again_to_the_byte(name):
    assert written_again(KINDS[name], STORED / name) == (STORED / name).read_text()


def test_a_report_of_the_first_version_is_read_and_gains_nothing():
    """It did not say how the base works, what method was scored, nor as what the task was asked."""
    document = json.loads((STORED / "report.json").read_text())
    for result in document["results"]:
        del result["task_digest"], result["protocol"]["base_works"], result["protocol"]["method"]
    report = Report.from_dict(document)
    assert report.to_dict() == document
    now = Report.from_dict(json.loads((STORED / "report.json").read_text()))
    stamps = [found.results[0].protocol.answered_by for found in (report, now)]
    assert stamps[0].same_model(stamps[1])


def test_every_key_that_a_comparison_needs_is_missed(tmp_path):
    text = (STORED / "report.json").read_text()
    first = json.loads(text)["results"][0]
    for key in first["protocol"].keys() - {"samples", "protocol", "isolation", "base_works", "method"}:
        document = json.loads(text)
        del document["results"][0]["protocol"][key]
        with pytest.raises(Damaged, match=f"^{key} is missing or damaged$"):
            Report.from_dict(document)


def test_a_score_without_its_interval_is_named(tmp_path):
    document = json.loads((STORED / "report.json").read_text())
    document["results"][0]["intervals"]["pass@1"] = [0.0, None]
    with pytest.raises(Damaged, match=r"^no pass@1 of humaneval with its interval$"):
        Report.from_dict(document)


def test_a_stamp_forbids_comparisons_by_what_was_asked_alone():
    asked = {
        "task": "arc", "items": 4, "data": "d", "prompt_template": "t", "prompts": "p", "shots": 0,
        "chat_template": True, "decoding": "log-likelihood",
    }  # fmt: skip
    one = TaskStamp(**asked, protocol="letters")
    assert one.differences(TaskStamp(**asked, protocol="letters", more={"isolation": 1})) == ""
    other = TaskStamp(**asked | {"data": "e", "items": 5, "shots": 2}, protocol="text")
    assert one.differences(other) == "other data, other shots, other protocol"


def test_stored_reports_are_read_from_their_file(tmp_path):
    (tmp_path / "eval").mkdir()
    path = tmp_path / "eval" / "adapter.json"
    path.write_text((STORED / "report.json").read_text())
    report = read_report(path)
    assert report.result("nll@test").scores["loss"].count == 12
    assert report.result("nll") is None
