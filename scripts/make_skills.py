"""Rows of many skills for experiments with routers, made by reasoning-gym: one file a skill, and one test file.

    python scripts/make_skills.py DIR      DIR/train/SKILL.jsonl and DIR/test.jsonl: {"prompt", "completion", "task"}

36 skills, up to 1,200 rows each to train on (some have fewer that differ) and 60 to test; seed 7.
"""

import argparse
import json
from pathlib import Path

import reasoning_gym

# fmt: off
SKILLS = [
    "base_conversion", "basic_arithmetic", "binary_alternation", "bitwise_arithmetic", "caesar_cipher",
    "calendar_arithmetic", "chain_sum", "coin_flip", "complex_arithmetic", "count_bits", "decimal_chain_sum",
    "dice", "family_relationships", "fraction_simplification", "gcd", "isomorphic_strings", "knights_knaves",
    "lcm", "leg_counting", "letter_counting", "letter_jumble", "number_filtering", "number_format",
    "number_sequence", "palindrome_generation", "prime_factorization", "products", "ransom_note",
    "sentence_reordering", "simple_equations", "simple_geometry", "spell_backward", "syllogism",
    "time_intervals", "word_sequence_reversal", "word_sorting",
]
# fmt: on
TRAIN, TEST, SEED = 1200, 60, 7
LONGEST = {"question": 600, "answer": 160}  # characters


def rows_of(skill: str, count: int) -> list[dict[str, str]]:
    """Up to `count` rows with questions that differ."""
    drawn = 3 * count
    found: dict[str, dict[str, str]] = {}
    for item in reasoning_gym.create_dataset(skill, size=drawn, seed=SEED):
        question, answer = item["question"].strip(), str(item["answer"]).strip()
        fits = len(question) <= LONGEST["question"] and 0 < len(answer) <= LONGEST["answer"]
        if fits:
            found.setdefault(question, {"prompt": question, "completion": answer, "task": skill})
        if len(found) == count:
            break
    return list(found.values())


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(target: Path, skills: list[str] = SKILLS, train: int = TRAIN, test: int = TEST) -> None:
    (target / "train").mkdir(parents=True, exist_ok=True)
    tested = []
    for skill in skills:
        rows = rows_of(skill, train + test)
        tested += rows[:test]
        write(target / "train" / f"{skill}.jsonl", rows[test:])
        print(f"{skill}: {len(rows) - len(rows[:test])} and {len(rows[:test])}")
    write(target / "test.jsonl", tested)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
