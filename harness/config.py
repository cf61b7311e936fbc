"""What a sweep is asked to do: one validated, frozen value, from the command line and a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.chain import split_list
from harness.errors import ConfigError, UnknownName

__all__ = ["SweepConfig", "load_config", "parse_int_list"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


class SweepConfig(BaseModel):
    """The inputs of a sweep. Empty `models` and `tasks` mean the defaults for the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] = (1,)
    prompt_lens: tuple[int, ...] | None = None
    new_tokens: int = Field(default=64, ge=1)
    limit: int | None = Field(default=None, ge=1)
    eval_batch_size: int = Field(default=16, ge=1)
    seeds: tuple[int, ...] = (0,)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    include_path: tuple[Path, ...] = ()
    plugin: tuple[str, ...] = ()
    jobs: int = Field(default=1, ge=1)
    timeout_s: float = Field(default=3600.0, gt=0)
    train_steps: int = Field(default=100, ge=0)
    train_batch_size: int = Field(default=8, ge=1)
    train_len: int = Field(default=128, ge=2)
    calibration_samples: int = Field(default=128, ge=1)
    calibration_len: int | None = Field(default=None, ge=2)
    text: Path | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    fresh: bool = False
    retry_failed: bool = False
    executor: Literal["local"] = "local"

    @field_validator("methods", "models", "tasks", "plugin", mode="before")
    @classmethod
    def _split_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(split_list(value))
        return value

    @field_validator("methods")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("batch_sizes", "prompt_lens", "seeds", mode="before")
    @classmethod
    def _integers(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_int_list(value)
        return (value,) if isinstance(value, int) else value

    @field_validator("batch_sizes", "prompt_lens")
    @classmethod
    def _positive(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 1):
            raise ValueError("must be a list of numbers of at least 1")
        return value


def parse_int_list(text: str) -> tuple[int, ...]:
    """``"1,8"`` as (1, 8)."""
    try:
        return tuple(int(part) for part in split_list(text))
    except ValueError:
        raise ValueError(f"must be whole numbers separated by commas, not {text!r}") from None


_SINGULAR = {
    "seed": "seeds",
    "timeout": "timeout_s",
    "plugins": "plugin",
    "batch_size": "batch_sizes",
}


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
        for name, value in _read_yaml(file).items():
            field = str(name).replace("-", "_")
            field = _SINGULAR.get(field, field)
            if field not in SweepConfig.model_fields:
                raise UnknownName(f"option in {file}:", str(name), SweepConfig.model_fields)
            values[field] = value
    values.update(given)
    try:
        return SweepConfig(**values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            where = str(problem["loc"][0]) if problem["loc"] else ""
            message = problem["msg"].removeprefix("Value error, ")
            option = {"timeout_s": "timeout", "seeds": "seed"}.get(where, where).replace("_", "-")
            problems.append(f"--{option}: {message}" if where else message)
        raise ConfigError("; ".join(dict.fromkeys(problems))) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the configuration file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise ConfigError(f"the configuration file {file} is not YAML{where}: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration file {file} must hold a mapping of option names")
    return content
