"""reasoning-gym's seeds."""

import numpy as np


def seed_apart(seed: int) -> int:
    """A seed for reasoning-gym whose rows do not overlap with those of a neighbouring `seed`.

    Its data sets make row i from seed + i (each generator's `__getitem__`): seeds 0 and 1 share all rows but one, so
    held-out rows under the next seed would be training rows. Seen with reasoning-gym 0.1.
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
