"""Results of lm-evaluation-harness as results of our own; needs no harness."""

import json
import math
import sys

import pytest

from remix_cli.evaluation.compare import compare
from remix_cli.evaluation.harness_scores import (
    declared_measures,
    decoding_of,
    found_of,
    label_of,
    lines_of,
    measures_of,
    scores_of,
    stamp_of,
)
from remix_cli.evaluation.report import ModelStamp, Protocol, Report, TaskResult


def sample(item, filter_name="none", **metrics):
    return {
        "doc_id": item,
        "target": 1,
        "arguments": [("q", f" {item}"), ("q", " b")],
        "resps": [[(-1.5, True)], [(-2.0, False)]],
        "filtered_resps": [(-1.5, True), (-2.0, False)],
        "filter": filter_name,
        "metrics": list(metrics),
        "doc_hash": f"hash {item}",
    } | metrics


def results_with(samples, aggregates, **higher):
    return {
        "versions": {"some": 2.0},
        "configs": {"some": {"output_type": "multiple_choice", "dataset_path": "who/what", "dataset_name": "part"}},
        "n-shot": {"some": 3},
        "results": {"some": {"alias": "some"} | aggregates},
        "higher_is_better": {"some": higher},
        "samples": {"some": samples},
    }


def read(samples, aggregates, **higher):
    found = found_of(results_with(samples, aggregates, **higher), "some")
    lines = lines_of(found)
    measures = measures_of(found, lines)
    return found, lines, measures, *scores_of(found, lines, measures)


def test_metrics_of_each_filter_are_scores_of_their_own():
    samples = [sample(0, "strict", em=0.0), sample(1, "strict", em=1.0), sample(0, "loose", em=1.0)]
    samples.append(sample(1, "loose", em=1.0))
    _, lines, measures, scores, notes = read(samples, {"em,strict": 0.5, "em,loose": 1.0, "em_stderr,strict": 0.1})
    assert [line["em/strict"] for line in lines] == [0.0, 1.0]
    assert {name: score.value for name, score in scores.items()} == {"em/strict": 0.5, "em/loose": 1.0}
    assert all(score.share and score.low <= score.value <= score.high for score in scores.values())
    assert lines[0]["prompt"] != lines[1]["prompt"]
    assert lines[0]["filtered"].keys() == {"strict", "loose"}
    assert (list(measures), notes) == (["em/strict", "em/loose"], [])


def test_a_mean_beyond_one_is_no_share_and_says_which_way_is_better():
    samples = [sample(i, error=value) for i, value in enumerate((0.5, 3.0, 4.0))]
    _, _, measures, scores, _ = read(samples, {"error,none": 2.5}, error=False)
    assert scores["error"].value == pytest.approx(2.5)
    assert not scores["error"].share
    assert measures["error"].lower_is_better


def test_what_is_no_mean_is_not_paired():
    """A corpus score with a standard error is shown with it; one without is a note."""
    samples = [sample(i, bleu=("a", "b"), f1=float(i)) for i in range(3)]
    aggregates = {"bleu,none": 12.0, "bleu_stderr,none": 1.0, "f1,none": 0.7, "f1_stderr,none": "N/A"}
    _, lines, measures, scores, notes = read(samples, aggregates)
    assert "bleu" not in lines[0]
    assert measures == {}
    assert (scores["bleu"].low, scores["bleu"].high) == pytest.approx((12 - 1.96, 12 + 1.96))
    assert "f1" not in scores
    assert notes == ["some: f1 0.7000, of which lm-eval gives no standard error"]


def test_perplexities_and_bits_have_intervals_over_the_items():
    pairs = [(-10.0, 4.0), (-30.0, 6.0), (-8.0, 5.0)]
    samples = [sample(i, word_perplexity=pair, bits_per_byte=pair) for i, pair in enumerate(pairs)]
    bits = 48 / 15 / math.log(2)
    aggregates = {"word_perplexity,none": math.exp(48 / 15), "bits_per_byte,none": bits}
    _, _, measures, scores, _ = read(samples, aggregates, bits_per_byte=False)
    assert scores["word_perplexity"].value == pytest.approx(math.exp(48 / 15))
    assert scores["bits_per_byte"].value == pytest.approx(bits)
    assert scores["word_perplexity"].low < math.exp(48 / 15) < scores["word_perplexity"].high
    assert (list(measures), measures["bits_per_byte"].below) == (["bits_per_byte"], "bits_per_byte weight")


def write_report(folder, model, hits, shots=3):
    results = results_with([sample(i, acc=hit) for i, hit in enumerate(hits)], {"acc,none": sum(hits) / len(hits)})
    results["n-shot"]["some"] = shots
    found = found_of(results, "some")
    lines = lines_of(found)
    measures = measures_of(found, lines)
    scores, _ = scores_of(found, lines, measures)
    versions = {"remix": "0"}
    of = ModelStamp(
        model="m", base_fingerprint="b", adapter=None, routing="none", dtype="float32", device="cpu", versions=versions
    )
    stamp = stamp_of(found, lines, measures, None, "0.4.13")
    result = TaskResult(label_of("some"), len(lines), scores, 1.0, len(lines), Protocol(stamp, of))
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / f"{model}-{result.task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "eval" / f"{model}.json"
    path.write_text(json.dumps(Report(model, [result]).to_dict()))
    return path, stamp, measures


def test_what_is_written_is_read_and_paired(tmp_path):
    one, stamp, measures = write_report(tmp_path / "one", "base", [0.0, 1.0, 0.0, 1.0])
    other, _, _ = write_report(tmp_path / "other", "base", [1.0, 1.0, 0.0, 1.0])
    assert declared_measures(stamp) == measures
    assert (stamp.shots, stamp.protocol, stamp.more["dataset"]) == (3, "lm-eval task, version 2.0", "who/what part")
    compared = compare([one, other]).tasks["lm-eval-some"]
    assert compared.items == 4
    assert compared.scores["acc"][1].difference.value == pytest.approx(0.25)


def test_other_shots_are_another_question(tmp_path):
    _, stamp, _ = write_report(tmp_path / "one", "base", [0.0, 1.0])
    _, other, _ = write_report(tmp_path / "other", "base", [0.0, 1.0], shots=5)
    assert stamp.differences(other) == "other shots"


def test_names_are_fit_for_files_and_decoding_is_told():
    assert label_of("leaderboard|mmlu/pro") == "lm-eval-leaderboard_mmlu_pro"
    said = decoding_of({"output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}})
    assert said == "generation (max_gen_toks 8, until ['\\n'])"
    assert decoding_of({"output_type": "multiple_choice"}) == "log-likelihood"


def test_a_name_that_is_no_task_gets_near_ones():
    from remix_cli.evaluation.harness import _not_a_task

    assert _not_a_task("arc_eazy", ["arc_easy", "boolq"]).endswith("did you mean arc_easy?")
    assert _not_a_task("qqq", ["arc_easy"]).endswith("lm_eval ls tasks lists all")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lm-eval", "arc_easy", "--task", "nll"], "--task: "),
        (["--lm-eval", "arc_easy", "--temperature", "0"], "--temperature: "),
        (["--lm-eval", "arc_easy", "--selection", "sample"], "--selection: "),
        (["--lm-eval", "arc_easy", "--allow-code-execution"], "--allow-code-execution: "),
        (["--lm-eval-chat"], "--lm-eval-chat: "),
        (["--lm-eval", "arc_easy"], "pip install 'remix-cli[lm-eval]'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(verb, finished, monkeypatch, flags, said):
    """So is every task where lm-eval is not installed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    _, err = verb("eval", finished, *flags, expect=2)
    assert said in err
    assert len(err.splitlines()) == 1
