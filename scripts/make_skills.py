"""Rows of many skills for experiments with routers, made by reasoning-gym: one file a skill, and one test file.

    python scripts/make_skills.py DIR      DIR/train/SKILL.jsonl and DIR/test.jsonl: {"prompt", "completion", "task"}

36 skills, up to 1,200 rows each to train on (some have fewer that differ) and 100 to test; seed 7.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import reasoning_gym

# Skill -> its settings where the task's own are beyond a model of 135M parameters in one epoch.
SKILLS: dict[str, dict[str, Any]] = {
    "base_conversion": {"max_value": 255},
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2, "operators": ("+", "-"), "allow_parentheses": False},
    "binary_alternation": {"min_n": 4, "max_n": 10},
    "bitwise_arithmetic": {"difficulty": 1},
    "caesar_cipher": {"min_words": 1, "max_words": 5, "max_rotation": 4},
    "calendar_arithmetic": {},
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "coin_flip": {},
    "complex_arithmetic": {"operations": ("+", "-"), "operations_weights": [0.5, 0.5]},
    "count_bits": {"max_n": 4095},
    "decimal_chain_sum": {"max_terms": 2, "max_digits": 2, "max_decimal_places": 1},
    "dice": {"num_dice": 3},
    "family_relationships": {},
    "fraction_simplification": {"max_value": 30, "max_factor": 10, "styles": ("plain",)},
    "gcd": {"max_value": 100},
    "isomorphic_strings": {"max_string_length": 5},
    "knights_knaves": {},
    "lcm": {"max_value": 50},
    "leg_counting": {"min_animals": 2, "max_animals": 3, "max_instances": 5},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "letter_jumble": {"max_word_len": 6, "min_words": 2, "max_words": 4, "max_corruption_level": 0.5},
    "number_filtering": {"max_numbers": 5, "max_decimals": 1},
    "number_format": {"max_num_candidates": 3},
    "number_sequence": {"max_complexity": 2},
    "palindrome_generation": {"max_length": 6},
    "prime_factorization": {},
    "products": {"max_digits": 2},
    "ransom_note": {"max_note_length": 5, "max_magazine_length": 12},
    "sentence_reordering": {"max_words_in_sentence": 6},
    "simple_equations": {"max_terms": 2, "max_value": 20},
    "simple_geometry": {"max_sides": 4},
    "spell_backward": {"max_word_len": 5},
    "syllogism": {},
    "time_intervals": {"task_types": ["time"]},
    "word_sequence_reversal": {"max_words": 5},
    "word_sorting": {"max_words": 4},
}
TRAIN, TEST, SEED = 1200, 100, 7
LONGEST = {"question": 600, "answer": 160}  # characters


def rows_of(skill: str, count: int, settings: dict[str, Any]) -> list[dict[str, str]]:
    """Up to `count` rows with questions that differ."""
    drawn = 3 * count
    found: dict[str, dict[str, str]] = {}
    for item in reasoning_gym.create_dataset(skill, size=drawn, seed=SEED, **settings):
        question, answer = item["question"].strip(), str(item["answer"]).strip()
        fits = len(question) <= LONGEST["question"] and 0 < len(answer) <= LONGEST["answer"]
        if fits:
            found.setdefault(question, {"prompt": question, "completion": answer, "task": skill})
        if len(found) == count:
            break
    return list(found.values())


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(target: Path, skills: Mapping[str, dict[str, Any]] = SKILLS, train: int = TRAIN, test: int = TEST) -> None:
    (target / "train").mkdir(parents=True, exist_ok=True)
    tested = []
    for skill, settings in skills.items():
        rows = rows_of(skill, train + test, settings)
        tested += rows[:test]
        write(target / "train" / f"{skill}.jsonl", rows[test:])
        print(f"{skill}: {len(rows) - len(rows[:test])} and {len(rows[:test])}")
    write(target / "test.jsonl", tested)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--own-settings", action="store_true", help="the tasks' own, which are harder; 60 test rows")
    args = parser.parse_args()
    if args.own_settings:
        main(args.folder, {skill: {} for skill in SKILLS}, test=60)
    else:
        main(args.folder)
