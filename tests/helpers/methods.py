"""Every method at a size that a tiny model can carry."""

from remix_cli.methods.registry import method_named

FAST = {"prompt": 0.3, "p_tuning": 0.03, "prefix": 0.1, "ia3": 0.1}
SMALL = {
    "rank": 3,
    "virtual_tokens": 3,
    "vectors": 12,
    "vector_length": 8,
    "pool_size": 4,
    "active": 2,
}


def small_method(method):
    return {"method": method} | {key: value for key, value in SMALL.items() if key in method_named(method).settings}
