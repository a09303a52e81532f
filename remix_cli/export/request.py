"""What the flags of `remix export` ask for. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from remix_cli.errors import RecipeError

FORMATS = ("hf", "merged", "peft-merged", "peft-experts", "peft")
MERGED = ("merged", "peft-merged")  # one LoRA in place of the pool


@dataclass(frozen=True)
class Request:
    """The verb's flags; None or False where one was not given."""

    output: Path
    form: str = "hf"
    rank: int | None = None
    rows: int | None = None
    prompt: str | None = None
    selection: Path | None = None
    reference_base: bool = False
    push_to_hub: str | None = None
    public: bool = False
    best: bool = False
    any_base: bool = False

    @property
    def for_one_prompt(self) -> bool:
        return self.prompt is not None or self.selection is not None

    def check(self) -> None:
        """Raises RecipeError for flags that do not go together, or an output that is there already."""
        if self.form not in FORMATS:
            raise RecipeError(f"--format: {self.form!r} is not known; use {', '.join(FORMATS)}")
        both = self.prompt is not None and self.selection is not None
        if both or (self.for_one_prompt and self.form not in MERGED):
            raise RecipeError("--prompt, --selection: give one of them, with --format merged or peft-merged")
        for flag, needed in self._unread().items():
            raise RecipeError(f"{flag}: is for {needed}; leave it out")
        if self.output.exists() or self.output.is_symlink():
            raise RecipeError(f"--output: {self.output} exists; choose a new folder")

    def refuse_fitting(self, method: str) -> None:
        """Raises RecipeError for flags that say how one LoRA is to stand for several, where there is one."""
        given = {"--rank": self.rank, "--rows": self.rows, "--prompt": self.prompt, "--selection": self.selection}
        for flag, value in given.items():
            if value is not None:
                raise RecipeError(f"{flag}: {method} is one LoRA, which is merged as it is; leave it out")

    def _unread(self) -> dict[str, str]:
        """Flags that were given and are not read, each with what reads it."""
        found = {}
        fits = self.form in MERGED and not self.for_one_prompt
        if self.rank is not None and not fits:
            found["--rank"] = "--format merged or peft-merged, for all prompts"
        if self.rows is not None and not fits:
            found["--rows"] = "--format merged or peft-merged, for all prompts"
        if self.reference_base and self.form != "hf":
            found["--reference-base"] = "--format hf"
        if self.any_base and self.form == "peft-experts":
            found["--any-base"] = "a format that loads the base model"
        if self.public and self.push_to_hub is None:
            found["--public"] = "--push-to-hub"
        return found
