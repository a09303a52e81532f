"""The study behind docs/results/estimators.md: every router-gradient estimator on a real model, each at its best rate.

    python scripts/study_estimators.py configs/gsm8k-smollm2.yaml --out DIR --test test.jsonl [key=value ...]

Stage 1 finds each method's LoRA learning rate (router rate fixed). Stage 2 compares estimators, router rates,
M, seeds and router parametrisations at the rate stage 1 found best for ReMix, LoRA and the soft mixture at
theirs. Stage 3 measures greedy accuracy of the best run of each method. Needs a GPU, about 40 minutes on one.
"""

import time

from sweep import Sweep, accuracy, parser, print_table, run_all, sweep_of

LORA_RATES = (6e-3, 1.2e-2, 1.7e-2)
LORA = ["adapter.pool_size=1", "adapter.active=1", "adapter.rank=32", "router.selections=1"]
LORA += ["router.learning_rate=0", "router.estimator=straight_through"]
ST = ["router.estimator=straight_through", "router.selections=1"]
SOFT = ["adapter.method=mixlora", "router.selections=1"]
METHODS = {  # name -> overrides, the router rate of stage 1
    "lora": LORA,
    "soft": [*SOFT, "router.learning_rate=0.1"],
    "frozen": [*ST, "router.learning_rate=0"],
    "st-m1": [*ST, "router.learning_rate=0.3"],
    "rtg-m2": ["router.learning_rate=0.3"],
}


def first_stage() -> dict[str, list[str]]:
    return {
        f"{name}-lr{rate:g}": [*overrides, f"train.learning_rate={rate}"]
        for rate in LORA_RATES
        for name, overrides in METHODS.items()
    }


def best_rate(rows: dict, name: str) -> float:
    """The LoRA rate of stage 1 with the lowest held-out loss."""
    done = {rate: rows.get(f"{name}-lr{rate:g}", {}).get("eval_loss", 99.0) for rate in LORA_RATES}
    return min(done, key=lambda rate: done[rate])


def second_stage(rows: dict) -> dict[str, list[str]]:
    """Longest runs first, then by importance; seed 0 unless the name says otherwise."""
    rate = best_rate(rows, "rtg-m2")
    at = [f"train.learning_rate={rate}"]
    runs: dict[str, list[str]] = {}

    def add(estimator: str, m: int, router_rate: float, seed: int = 0, extra: tuple[str, ...] = ()) -> None:
        name = f"{estimator}-m{m}-r{router_rate:g}" + (f"-seed{seed}" if seed else "")
        name += "".join("-" + x.removeprefix("router.").replace("=", "_") for x in extra)
        chosen = [f"router.estimator={estimator}", f"router.selections={m}", f"router.learning_rate={router_rate}"]
        runs[name] = [*chosen, *at, f"seed={seed}", *extra]

    for estimator in ("paper", "rtg"):
        add(estimator, 8, 0.3)
    add("control_variate", 8, 0.3)
    add("straight_through", 8, 0.3)
    for router_rate in (0.3, 0.1, 1.0, 0.03, 0.01):
        for estimator in ("rtg", "control_variate", "paper"):
            add(estimator, 2, router_rate)
        add("straight_through", 1, router_rate)
    for seed in (1,):
        for router_rate in (0.3, 0.1):
            for estimator in ("rtg", "control_variate", "paper"):
                add(estimator, 2, router_rate, seed)
            add("straight_through", 1, router_rate, seed)
        lora, soft = best_rate(rows, "lora"), best_rate(rows, "soft")
        runs[f"lora-seed{seed}"] = [*LORA, f"train.learning_rate={lora}", f"seed={seed}"]
        runs[f"frozen-seed{seed}"] = [*METHODS["frozen"], *at, f"seed={seed}"]
        for router_rate in (0.1, 0.3):
            soft_run = [*SOFT, f"router.learning_rate={router_rate}", f"train.learning_rate={soft}"]
            runs[f"soft-r{router_rate:g}-seed{seed}"] = [*soft_run, f"seed={seed}"]
            runs[f"soft-r{router_rate:g}"] = soft_run
        runs["soft-r0.03"] = [*SOFT, "router.learning_rate=0.03", f"train.learning_rate={soft}"]
    for router_rate in (1e-3, 1e-2, 3e-2):
        add("rtg", 2, router_rate, extra=("router.unit_input=false",))
        add("straight_through", 1, router_rate, extra=("router.unit_input=false",))
    for std in (0.0, 0.3):
        add("rtg", 2, 0.3, extra=(f"router.init_std={std}",))
        add("straight_through", 1, 0.3, extra=(f"router.init_std={std}",))
    for estimator in ("paper", "rtg", "control_variate"):
        add(estimator, 8, 0.1)
    for estimator in ("rtg", "control_variate", "paper", "straight_through"):
        add(estimator, 1 if estimator == "straight_through" else 2, 1e-3)
    return runs


def third_stage(rows: dict) -> dict[str, list[str]]:
    """The run of lowest held-out loss of each method, seed 0."""
    best: dict[str, str] = {}
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("eval_loss", 99)):
        if "eval_loss" in row and "seed" not in name:
            best.setdefault(name.split("-")[0].replace("straight_through", "st"), name)
    return {f"{name}:accuracy": [] for name in best.values()}


def main() -> None:
    args = parser(__doc__ or "").parse_intermixed_args()
    sweep: Sweep = sweep_of(args)
    end = time.monotonic() + args.seconds
    reserve = min(120.0, args.seconds / 8)  # for stage 3
    rows = run_all(sweep, first_stage(), end - reserve)
    print({name: best_rate(rows, name) for name in METHODS}, flush=True)
    rows = run_all(sweep, second_stage(rows), end - reserve)
    run_all(sweep, third_stage(rows), end, accuracy)
    print_table(sweep.finished())


if __name__ == "__main__":
    main()
