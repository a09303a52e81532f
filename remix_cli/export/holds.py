"""Which format can hold which method, by what the methods say of themselves."""

from remix_cli.errors import RecipeError
from remix_cli.methods.registry import method_named


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


def usual_form(name: str) -> str:
    """The format of a run by the method `name` where none is asked for: the first that its method names."""
    exports = method_named(name).exports
    return exports[0] if exports else "hf"
