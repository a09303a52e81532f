"""The study behind docs/results/estimators.md: every router-gradient estimator on a real model, at several rates.

    python scripts/study_estimators.py configs/gsm8k-smollm2.yaml --out DIR --test test.jsonl \\
        [--only REGEX] [--accuracy REGEX] [key=value ...]

Runs go longest first, then by importance, so a shorter time limit loses the least: the LoRAs' learning rate of
every method, then estimators, router rates, M, seeds and router parametrisations at one LoRA rate. Then the runs
that `--accuracy` names are scored for greedy accuracy on the test rows. Needs a GPU.
"""

import re
import time

from sweep import Sweep, accuracy, parser, print_table, run_all, sweep_of

RATE = 1.2e-2  # of the LoRAs, unless the run's name says otherwise
SOFT_RATE = 6e-3  # at which the soft mixture is best
OTHER_RATES = (1.7e-2, SOFT_RATE)
LORA = ["adapter.pool_size=1", "adapter.active=1", "adapter.rank=32", "router.selections=1"]
LORA += ["router.learning_rate=0", "router.estimator=straight_through"]
SOFT = ["adapter.method=mixlora", "router.selections=1"]


def all_runs() -> dict[str, list[str]]:
    """Run name -> overrides; seed 0 unless the name says otherwise."""
    runs: dict[str, list[str]] = {}

    def add(
        method: str, m: int, router_rate: float, *, seed: int = 0, rate: float = RATE, extra: tuple[str, ...] = ()
    ) -> None:
        fixed = {"lora": LORA, "soft": SOFT, "frozen": ["router.estimator=straight_through"]}
        overrides = fixed.get(method, [f"router.estimator={method}"])
        name = f"{method}-m{m}-r{router_rate:g}" + (f"-lr{rate:g}" if rate != RATE else "")
        name += (f"-seed{seed}" if seed else "") + "".join("-" + x.replace("router.", "") for x in extra)
        chosen = [f"router.selections={m}", f"router.learning_rate={router_rate}", f"train.learning_rate={rate}"]
        runs[name.replace("=", "_")] = [*overrides, *chosen, f"seed={seed}", *extra]

    for seed in (0, 1):
        for method in ("control_variate", "rtg", "paper"):
            add(method, 8, 0.3, seed=seed)
    add("straight_through", 8, 0.3)
    for rate in (RATE, *OTHER_RATES):
        add("rtg", 2, 0.3, rate=rate)
        add("straight_through", 1, 0.3, rate=rate)
        add("lora", 1, 0, rate=rate)
        add("soft", 1, 0.1, rate=rate)
    add("frozen", 1, 0)
    for router_rate in (0.3, 0.1, 1.0):
        add("paper", 2, router_rate)
        add("control_variate", 2, router_rate)
        add("rtg", 2, router_rate)
        add("straight_through", 1, router_rate)
        add("soft", 1, router_rate)
    for seed in (1, 2):
        for method, m, router_rate in (
            ("rtg", 2, 0.3),
            ("paper", 2, 0.3),
            ("control_variate", 2, 0.3),
            ("straight_through", 1, 0.3),
            ("lora", 1, 0),
            ("frozen", 1, 0),
        ):
            add(method, m, router_rate, seed=seed)
        add("soft", 1, 0.1, seed=seed, rate=SOFT_RATE)
    add("soft", 1, 0.1, seed=1)
    for router_rate in (SOFT_RATE, 1e-3):  # the router as MixLoRA has it, at the LoRAs' rate and below
        add("soft", 1, router_rate, rate=SOFT_RATE, extra=("router.unit_input=false",))
    for router_rate in (0.03, 0.01):
        for method in ("rtg", "paper", "control_variate"):
            add(method, 2, router_rate)
        add("straight_through", 1, router_rate)
    for router_rate in (1e-3, 1e-2):
        add("rtg", 2, router_rate, extra=("router.unit_input=false",))
    for std in (0.0, 0.3):
        add("rtg", 2, 0.3, extra=(f"router.init_std={std}",))
    for method in ("rtg", "paper", "control_variate"):
        add(method, 2, 1e-3)
    return runs


def to_score(sweep: Sweep, pattern: str) -> dict[str, list[str]]:
    """Those of the finished runs that `pattern` names and whose folders are still there."""
    names = [name for name in sweep.finished() if re.search(pattern, name) and not name.endswith(":accuracy")]
    return {f"{name}:accuracy": [] for name in names if (sweep.out / name / "summary.json").exists()}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", default="", help="regular expression on the names of the runs")
    arguments.add_argument("--accuracy", default="^$", help="the same, of the runs to score; by default none")
    args = arguments.parse_intermixed_args()
    sweep: Sweep = sweep_of(args)
    end = time.monotonic() + args.seconds
    wanted = {name: overrides for name, overrides in all_runs().items() if re.search(args.only, name)}
    run_all(sweep, wanted, end - min(180.0, args.seconds / 4))
    run_all(sweep, to_score(sweep, args.accuracy), end, accuracy)
    print_table(sweep.finished())


if __name__ == "__main__":
    main()
