"""What a sweep is asked to do: one validated, frozen value, from the command line and a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from harness.chain import split_list
from harness.errors import ConfigError, UnknownName
from harness.strict_yaml import read_mapping

__all__ = ["SweepConfig", "load_config", "parse_int_list"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST = 2**31 - 1  # of anything that is counted: what is larger is a slip of the finger
MOST_JOBS = 1024
LONGEST_S = 1e6  # more than eleven days; the operating system's waits overflow at twenty-five
MOST_GIB = 1e6  # a pebibyte; the operating system's limits overflow at eight thousand


class SweepConfig(BaseModel):
    """The inputs of a sweep.

    No `models`, and None for `tasks` and `prompt_lens`, mean the defaults for the machine; an empty list of
    `tasks` scores nothing, an empty one of `prompt_lens` times nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] = (1,)
    prompt_lens: tuple[int, ...] | None = None
    new_tokens: int = Field(default=64, ge=1, le=MOST)
    limit: int | None = Field(default=None, ge=1, le=MOST)
    eval_batch_size: int = Field(default=16, ge=1, le=MOST)
    seeds: tuple[int, ...] = (0,)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    include_path: tuple[Path, ...] = ()
    plugin: tuple[str, ...] = ()
    jobs: int = Field(default=1, ge=1, le=MOST_JOBS)
    timeout_s: float = Field(default=3600.0, gt=0, le=LONGEST_S)
    memory_limit_gib: float | None = Field(default=None, gt=0, le=MOST_GIB)
    train_steps: int = Field(default=100, ge=0, le=MOST)
    train_batch_size: int = Field(default=8, ge=1, le=MOST)
    train_len: int = Field(default=128, ge=2, le=MOST)
    calibration_samples: int = Field(default=128, ge=1, le=MOST)
    calibration_len: int | None = Field(default=None, ge=2, le=MOST)
    text: Path | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    fresh: bool = False
    retry_failed: bool = False
    executor: Literal["local"] = "local"

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts true as 1: `limit: true` in a file would score one item.
        wanted = cls.model_fields[info.field_name].annotation if info.field_name else bool
        if wanted is not bool and any(isinstance(each, bool) for each in _listed(value)):
            raise ValueError("cannot be true or false")
        return value

    @field_validator("methods", "models", "tasks", "plugin", mode="before")
    @classmethod
    def _split_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            if info.field_name == "tasks" and value.strip().lower() == "none":
                return ()
            return tuple(split_list(value))
        return value

    @field_validator("include_path", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value  # may hold commas, as `--include-path` may

    @field_validator("models", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        # An unset variable of the shell must not turn into the default models.
        if isinstance(value, str) and not split_list(value):
            raise ValueError("names no model; leave it out for the default")
        return value

    @field_validator("methods")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("batch_sizes", "prompt_lens", "seeds", mode="before")
    @classmethod
    def _integers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            if info.field_name == "prompt_lens" and value.strip().lower() == "none":
                return ()
            found = parse_int_list(value)
            if not found:  # an unset variable of the shell
                raise ValueError("must be whole numbers separated by commas, not empty")
            return found
        return (value,) if isinstance(value, int) else value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 0 or max(value) >= 2**32:
            raise ValueError(f"must be numbers from 0 to {2**32 - 1}")
        return value

    @field_validator("batch_sizes", "prompt_lens")
    @classmethod
    def _positive(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if value is None or (not value and info.field_name == "prompt_lens"):
            return value
        if not value or min(value) < 1 or max(value) > MOST:
            raise ValueError(f"must be a list of numbers of at least 1, and at most {MOST}")
        return value


def parse_int_list(text: str) -> tuple[int, ...]:
    """``"1,8"`` as (1, 8)."""
    try:
        return tuple(int(part) for part in split_list(text))
    except ValueError:
        raise ValueError(f"must be whole numbers separated by commas, not {text!r}") from None


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


_SINGULAR = {
    "seed": "seeds",
    "timeout": "timeout_s",
    "memory_limit": "memory_limit_gib",
    "plugins": "plugin",
    "batch_size": "batch_sizes",
}


_MESSAGES = {"tuple_type": "must be a list", "path_type": "must be a path"}  # for what pydantic says
_OPTIONS = {"timeout_s": "timeout", "memory_limit_gib": "memory-limit", "seeds": "seed"}


def load_config(file: Path | None, given: Mapping[str, Any]) -> SweepConfig:
    """Join a YAML file with what the command line gave; the command line wins.

    Args:
        file: a YAML mapping with the names of the options (hyphens and underscores alike).
        given: only what the user gave on the command line.

    Raises:
        ConfigError: unreadable YAML, or a value that is out of range.
        UnknownName: an unknown name in the file.
    """
    values: dict[str, Any] = {}
    if file is not None:
        for name, value in read_mapping(file).items():
            field = str(name).replace("-", "_")
            field = _SINGULAR.get(field, field)
            if field not in SweepConfig.model_fields:
                raise UnknownName(f"option in {file}:", str(name), SweepConfig.model_fields)
            if field in values:
                raise ConfigError(f"the configuration file {file} gives {name!r} twice")
            values[field] = value
    values.update(given)
    try:
        return SweepConfig(**values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            where = str(problem["loc"][0]) if problem["loc"] else ""
            message = _MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
            option = _OPTIONS.get(where, where).replace("_", "-")
            problems.append(f"--{option}: {message}" if where else message)
        raise ConfigError("; ".join(dict.fromkeys(problems))) from None
