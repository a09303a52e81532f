"""What `remix verify-estimator` prints, for 80 columns."""

from rich.table import Table

from remix_cli.verify.exact import TOLERANCE, Bias
from remix_cli.verify.variance import VarianceRatio


def bias_table(biases: list[Bias]) -> Table:
    table = _table("Bias: mean over all pairs of selections against the gradient of the expected loss")
    table.add_column("estimator")
    table.add_column("claims")
    table.add_column("relative bias", justify="right")
    table.add_column("")
    for bias in biases:
        claim = "unbiased" if bias.claims_unbiased else "biased"
        verdict = "as claimed" if bias.holds else f"WRONG: over {TOLERANCE:.0e}"
        table.add_row(bias.arm, claim, f"{bias.relative:.1e}", verdict)
    return table


def variance_table(ratios: list[VarianceRatio]) -> Table:
    """One row an arm, one column a number of selections; intervals are 95 %."""
    selections = sorted({r.selections for r in ratios})
    table = _table("Variance relative to `paper` at the same M (95 % interval)")
    table.add_column("estimator")
    for m in selections:
        table.add_column(f"M = {m}", justify="right")
    for arm in dict.fromkeys(r.arm for r in ratios):
        cells = ["1" if arm == "paper" else _ratio(r) for r in ratios if r.arm == arm]
        table.add_row(arm, *cells)
    return table


def _ratio(found: VarianceRatio) -> str:
    return f"{found.ratio:.3f} ± {(found.high - found.low) / 2:.3f}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)
