"""The `data` group of a recipe and the sources of rows, which evaluation tasks name too; what every group rests on."""

import os
import string
from datetime import date
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from remix_cli.data.formats.registry import DEFAULT, FORMATS, OF_ANY_ROW

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _place(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path or name has")
    return os.path.expanduser(text)


Place = Annotated[str, Field(min_length=1), AfterValidator(_place)]


def _places(value: Any) -> str | list[str]:
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(one, str) and one for one in several):
        raise PydanticCustomError("places", "Input should be a path or a list of paths")
    found = [_place(one) for one in several]
    return found if isinstance(value, list) else found[0]


ONE = {"type": "string", "minLength": 1}
Places = Annotated[
    str | list[str],
    PlainValidator(_places),
    WithJsonSchema({"anyOf": [ONE, {"type": "array", "items": ONE, "minItems": 1}]}),
]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def refuse_unread(group: BaseModel, unread: dict[str, str], *inside: str, **usual: Any) -> None:
    """No key is ignored: those of `group` that say something although nothing reads them. `inside`: where it stands.

    Their defaults are accepted, as run folders have them in their recipe.yaml; `usual`: those of the method.
    """
    fields = type(group).model_fields
    said = [key for key in unread if getattr(group, key) not in (fields[key].default, usual.get(key))]
    if said:
        also = f" (nor is {', '.join(said[1:])})" if said[1:] else ""
        context = {"also": also, "why": unread[said[0]], "below": (*inside, said[0])}
        raise PydanticCustomError("unread", "is not read{also}: it {why}; leave it out", context)


def name_in(registry: dict[str, Any]) -> Any:
    """A type: one of the registry's names, as they are when a value is checked."""

    def check(name: Any) -> Any:
        if not isinstance(name, str) or name not in registry:
            *most, last = (repr(known) for known in registry)
            known = f"{', '.join(most)} or {last}"
            raise PydanticCustomError("literal_error", "Input should be {known}", {"known": known})
        return name

    return Annotated[str, BeforeValidator(check), WithJsonSchema({"enum": list(registry), "type": "string"})]


# What is read of a file, by its ending; all but parquet, which compresses by itself, also with .gz behind it.
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet"}


def ending_of(path: str) -> str:
    """In lower case; `.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    inner, ending = os.path.splitext(path)
    packed = ending.lower() == ".gz"
    return (os.path.splitext(inner)[1] if packed else ending).lower()


def is_pattern(path: str) -> bool:
    """Does it stand for several files, as in a shell?"""
    return any(character in path for character in "*?[") and not os.path.exists(path)


def named_locally(path: str) -> bool:
    """A hub id is `owner/name` or `name`; what is rooted, ends like a file, is a pattern or lies deeper is local."""
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return True
    return ending_of(path) in LOADERS or is_pattern(path)


def _names_files(path: str) -> bool:
    return is_pattern(path) or (ending_of(path) in LOADERS and not os.path.isdir(path))


def _short_name(path: str) -> str:
    return os.path.basename(os.path.abspath(path)) if named_locally(path) else path


def _may_hold_cells(path: str) -> bool:
    kind = LOADERS.get(ending_of(path))
    folder = kind is None and (named_locally(path) or os.path.isdir(path))
    return kind == "csv" or folder


FormatName: Any = name_in(FORMATS)


OF_HUB = ("subset", "revision", "streaming")
YOUNGER = ("columns", "separator", "system", "learn", "revision", "streaming")  # keys of a source that came later


class Source(Strict):
    """Rows from one place: a hub data set, a local file or folder, or a reasoning-gym task."""

    path: Places | None = Field(
        None,
        description="Hub id, local file (json, jsonl, csv, tsv, txt, parquet; also .gz), folder of them, or a pattern; "
        "or a list of local ones.",
    )
    subset: str | None = Field(None, description="The hub data set's configuration, e.g. `main`.")
    revision: str | None = Field(None, description="Of the hub data set: a branch, a tag or a commit.")
    streaming: bool = Field(
        False, description="Take the first `limit` rows of a hub data set without fetching the rest of it."
    )
    split: str = "train"
    reasoning_gym: str | None = Field(None, description="A task of the reasoning-gym package, made on the fly.")
    options: dict[str, Any] = Field({}, description="Options of the reasoning-gym task.")
    size: Positive = Field(1000, description="How many reasoning-gym rows to make.")
    seed: Seed = Field(0, description="Seed of the reasoning-gym rows; another seed gives other rows.")
    format: FormatName = Field(
        DEFAULT, description="How a row becomes a conversation; left out, the columns of the first rows tell it."
    )
    prompt: str = Field("{prompt}", description="Template over the row's columns, for prompt_completion.")
    completion: str = Field("{completion}", description="Template over the row's columns, for prompt_completion.")
    columns: dict[str, str | None] = Field(
        {},
        description="The format's name of a column: the rows' own, e.g. `messages: dialogue`. Also of `task`, a row's "
        "own task name, and `weight`, by which its token losses are multiplied; null: the column is something else.",
    )
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="Between the cells of a csv or tsv file; by default a comma, or a tab."
    )
    system: str | None = Field(None, description="System prompt of every conversation that brings none of its own.")
    learn: Literal["all", "last"] = Field("all", description="Which of the assistant's turns are learnt.")
    task: str | None = Field(None, description="Name for statistics by task; by default made from the source.")
    limit: Positive | None = Field(None, description="Use the first rows only.")
    weight: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="How often each row is seen in an epoch; 0.5 takes a new random half every epoch."
    )

    @field_validator("prompt", "completion")
    @classmethod
    def _names_columns(cls, template: str) -> str:
        try:
            fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"not a template: {error}; write a column as {{name}}, a brace as {{{{") from None
        if not all(str(name).isidentifier() for name, _, _ in fields):
            raise ValueError("not a template: write a column as {name}, a brace as {{")
        if any(form or conversion for _, form, conversion in fields):
            raise ValueError("not a template: a column is filled in as it is; write {name}, without `:` or `!`")
        return template

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.reasoning_gym is None):
            raise ValueError("give either path or reasoning_gym")
        if self.streaming and self.limit is None:
            raise ValueError("streaming: say in limit how many of the first rows to take")
        return self

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        refuse_unread(self, self._unread())
        known = FORMATS[self.format].columns
        for name, own in self.columns.items():
            if own is None and name not in OF_ANY_ROW:
                raise PydanticCustomError(
                    "unread", "names no column for {name}; leave it out", {"name": name, "below": ("columns",)}
                )
            if known and name not in (*known, *OF_ANY_ROW):
                raise PydanticCustomError(
                    "unread",
                    "names {name}, which format {form} does not read; it reads {known}",
                    {"name": name, "form": self.format, "known": ", ".join(known), "below": ("columns",)},
                )
        return self

    @model_serializer(mode="wrap")
    def _dump_what_is_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unread = self._unread()
        kept = {key: value for key, value in dump(self).items() if key not in unread}
        # younger keys that say nothing: a run that knew none of them is the same run
        silent = [key for key in YOUNGER if kept.get(key) == type(self).model_fields[key].default]
        return {key: value for key, value in kept.items() if key not in silent}

    def _unread(self) -> dict[str, str]:
        """Keys that this source does not read, each with the reason."""
        keys: dict[str, str] = {}
        if self.path is None:
            keys |= dict.fromkeys(("path", "split", *OF_HUB), "belongs to a data set with a path")
        else:
            keys |= dict.fromkeys(("reasoning_gym", "options", "size", "seed"), "belongs to a reasoning_gym source")
            if all(map(named_locally, self.paths)):
                keys |= dict.fromkeys(OF_HUB, "belongs to a hub data set, and the path is local")
            if all(map(_names_files, self.paths)):
                keys["split"] = "chooses among the files of a folder or a hub data set, and the path names files"
        if not any(map(_may_hold_cells, self.paths)):
            keys["separator"] = "belongs to csv and tsv files"
        if self.format == "text":
            keys |= dict.fromkeys(("system", "learn"), "belongs to conversations, and format text has none")
        for key in ("prompt", "completion"):
            if key not in FORMATS[self.format].reads:
                owners = ", ".join(name for name, facts in FORMATS.items() if key in facts.reads)
                keys[key] = f"belongs to format {owners}, and this is {self.format}"
        return keys

    def at(self, path: str) -> "Source":
        """The same columns and format, read whole from another file."""
        names = ("reasoning_gym", "options", "size", "seed", "limit", "weight", *OF_HUB)
        update = {name: Source.model_fields[name].default for name in names} | {"path": path}
        if _names_files(path):
            update["split"] = Source.model_fields["split"].default
        return self.model_copy(update=update)

    @property
    def paths(self) -> tuple[str, ...]:
        """What `path` names, one or several."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def named(self) -> str:
        """As messages name it: what the recipe says in `path` or `reasoning_gym`."""
        return ", ".join(self.paths) or self.reasoning_gym or ""

    @property
    def place(self) -> str:
        """Where its rows come from, in short: names of files or folders, a hub id, or a reasoning-gym task."""
        return ", ".join(map(_short_name, self.paths)) or self.reasoning_gym or ""

    @property
    def label(self) -> str:
        return self.task or self.reasoning_gym or (self.format if self.format != DEFAULT else "data")

    @property
    def is_local(self) -> bool:
        """Need nothing be fetched?"""
        return all(named_locally(path) or os.path.exists(path) for path in self.paths)

    @property
    def says_format(self) -> bool:
        """Or do its rows' columns tell it?"""
        return self.path is None or bool({"format", "prompt", "completion"} & self.model_fields_set)

    @property
    def template_columns(self) -> frozenset[str]:
        """The columns that its templates fill in."""
        if "prompt" not in FORMATS[self.format].reads:
            return frozenset()
        return columns_in(self.prompt) | columns_in(self.completion)

    @property
    def answered_in(self) -> str:
        """The rows' names of the columns that hold the answer; empty where the format does not say."""
        answer = FORMATS[self.format].answer
        names = sorted(columns_in(self.completion)) if self.format == DEFAULT else [answer] if answer else []
        return ", ".join(repr(self.columns.get(name, name)) for name in names)


@lru_cache(maxsize=256)
def columns_in(template: str) -> frozenset[str]:
    """The columns that a template names."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name)


NONE_HELD_OUT = "data.validation_fraction: 0 holds none out"


def _day(text: str) -> str:
    try:
        return str(date.fromisoformat(text))
    except ValueError:
        raise PydanticCustomError("day", "should be a day such as 2026-11-28") from None


class Data(Strict):
    train: Annotated[list[Source], Field(min_length=1)]
    validation: list[Source] = Field([], description="Held-out rows; empty: cut from train.")
    validation_fraction: Share = Field(0.05, description="Share of train held out when `validation` is empty.")
    split_seed: Seed | None = Field(None, description="Of the rows cut from train; by default the recipe's seed.")
    allow_overlap: bool = Field(False, description="Accept `validation` rows that are also in `train`.")
    validation_limit: Positive = Field(512, description="At most so many held-out rows.")
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens; longer rows lose their end.")
    use_chat_template: bool | None = Field(
        None, description="Wrap prompts in the tokenizer's chat template; by default if it has one."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Settings that the chat template reads, e.g. `enable_thinking: false`."
    )
    template_date: Annotated[str, AfterValidator(_day)] | None = Field(
        None,
        description="The day, YYYY-MM-DD, that a chat template takes for today; by default that of the run's begin.",
    )
    allow_special_tokens: bool = Field(
        False, description="Let texts spell out control tokens such as <|im_end|>; by default these stay text."
    )

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        refuse_unread(self, self._unread())
        for i, source in enumerate(self.validation):
            refuse_unread(source, {"weight": "says how often a row is trained on"}, "validation", str(i))
        return self

    @model_serializer(mode="wrap")
    def _dump_what_is_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sweeps used to set the split's seed beside `validation`, too."""
        return dump(self) | ({"split_seed": None} if self.validation else {})

    @property
    def holds_out(self) -> bool:
        return bool(self.validation) or self.validation_fraction > 0

    def _unread(self) -> dict[str, str]:
        """Keys that count for nothing here, each with the reason."""
        keys = self._unread_of_held_out()
        if self.use_chat_template is False:
            reason = "is for the chat template, and data.use_chat_template is false"
            keys |= dict.fromkeys(("chat_template_kwargs", "template_date"), reason)
        return keys

    def _unread_of_held_out(self) -> dict[str, str]:
        if self.validation:
            reason = "is of rows cut from train, and there is data.validation"
            return dict.fromkeys(("validation_fraction", "split_seed"), reason)
        keys = {"allow_overlap": "is for data.validation, and there is none"}
        if not self.holds_out:
            keys |= dict.fromkeys(("validation_limit", "split_seed"), f"is of held-out rows, and {NONE_HELD_OUT}")
        return keys
