"""The estimators by name, and what each claims of itself."""

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remix_cli.core.estimators.base import Estimator


@dataclass(frozen=True)
class EstimatorFacts:
    where: str  # module:class
    summary: str
    unbiased: bool
    min_selections: int = 2  # of the M samples, where no pass under the top k stands beside them
    linear: bool = False  # reads h, the loss's gradient by selection
    samples_beside_top: bool = True  # False: with a pass under the top k it needs no sample


ESTIMATORS = {
    "paper": EstimatorFacts(
        "remix_cli.core.estimators.paper:Paper", "batch loss as reward, ordered log-probability, as published", True
    ),
    "rtg": EstimatorFacts(
        "remix_cli.core.estimators.rtg:RewardToGo", "per-position reward-to-go, set log-probability", True
    ),
    "control_variate": EstimatorFacts(
        "remix_cli.core.estimators.control_variate:ControlVariate",
        "rtg with a linear control variate from the LoRA gradient",
        True,
        linear=True,
    ),
    "straight_through": EstimatorFacts(
        "remix_cli.core.estimators.straight_through:StraightThrough",
        "BIASED: first-order gradient through inclusion probabilities",
        False,
        min_selections=1,
        linear=True,
        samples_beside_top=False,
    ),
}


def make_estimator(name: str) -> "Estimator":
    """A new one, which has learnt nothing yet. Raises KeyError for a name that is not in `ESTIMATORS`."""
    return pkgutil.resolve_name(ESTIMATORS[name].where)()
