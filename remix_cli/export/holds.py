"""Which format can hold which method, by what the methods say of themselves; and what PEFT's cannot hold."""

from typing import TYPE_CHECKING

from remix_cli.errors import RecipeError
from remix_cli.methods.registry import method_named

if TYPE_CHECKING:  # which loads torch
    from remix_cli.core.store import StoredAdapter

PEFT_FORMS = ("peft", "peft-merged", "peft-experts")
EXPERT_LAYERS = {"gate_proj", "up_proj", "down_proj"}  # what the experts' layers were called while they were modules


def check_holds(form: str, name: str) -> None:
    """Raises RecipeError unless `--format <form>` can hold a run by the method `name`."""
    method = method_named(name)
    if form in method.exports:
        return
    if not method.exports:
        raise RecipeError(f"--format {form}: {name} {method.unexported}; no format can hold it")
    *most, last = method.exports
    others = f"{', '.join(most)} or {last}" if most else last
    raise RecipeError(f"--format {form}: {name} {method.unexported}; use --format {others}")


def check_peft_loads(form: str, stored: "StoredAdapter") -> None:
    """Raises RecipeError for LoRAs that PEFT would lose: on layers called as experts' are, in a base that has experts.

    PEFT takes such names for the experts', which in many models are one parameter by now: it puts empty LoRAs on that,
    and those of the folder, of dense layers or shared experts, nowhere, without an error
    (utils/transformers_weight_conversion.py, `_convert_peft_config_moe`; seen with PEFT 0.21).
    """
    if form not in PEFT_FORMS or stored.config.pool is None:
        return
    if "num_experts_per_tok" not in (stored.identity.base_settings or {}):
        return
    lost = sorted(EXPERT_LAYERS & {part for name in stored.tensors for part in name.split(".")})
    others = [other for other in method_named(stored.config.method).exports if other not in PEFT_FORMS]
    if lost:
        raise RecipeError(
            f"--format {form}: the base model has experts, and PEFT takes LoRAs on {', '.join(lost)} for theirs and "
            f"loses them on loading; use --format {' or '.join(others)}"
        )


def usual_form(name: str) -> str:
    """The format of a run by the method `name` where none is asked for: the first that its method names."""
    exports = method_named(name).exports
    return exports[0] if exports else "hf"
