"""What lm-eval writes, as far as the harness reads it; all else is kept as it is.

Checked against lm-eval 0.4: `results` by task (``metric,filter`` and ``metric_stderr,filter``), `configs`,
`versions`, `n-shot`, `n-samples`, `higher_is_better`, `config` (the model and the call) and the fields of its
tracker beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

__all__ = ["NOT_METRICS", "Call", "ResultsFile", "Sample", "first_problem"]

NOT_METRICS = frozenset({"name", "alias", "sample_len", "sample_count", "samples"})
"""What stands among the metrics of a task in `results` without being one."""


def _name(text: str) -> str:
    if not text or "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is empty or holds a character that no database can store")
    return text


Name = Annotated[str, Field(max_length=1000), AfterValidator(_name)]
Whole = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Read(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Samples(_Read):
    """How many documents a task has, and how many of them were asked."""

    original: int | None = None
    effective: Whole | None = None


class Call(_Read):
    """The model and the call."""

    model: str | None = None
    model_args: str | dict[str, JsonValue] | None = None
    model_dtype: str | None = None
    model_sha: str | None = None
    device: str | None = None
    limit: float | int | None = None
    random_seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None


class ResultsFile(_Read):
    """A file of results."""

    results: Annotated[dict[Name, dict[Name, JsonValue]], Field(min_length=1)]
    config: Call = Call()
    n_samples: dict[str, Samples] = Field(default={}, alias="n-samples")
    task_hashes: dict[str, str] = {}
    date: Annotated[float, Field(ge=0, le=253_402_300_799, allow_inf_nan=False)] | None = None
    pretty_env_info: str | None = None
    transformers_version: str | None = None
    lm_eval_version: str | None = None
    model_name: Name | None = None
    model_source: str | None = None


class Sample(_Read):
    """A document with what the model answered and how that was scored, under one filter."""

    doc_id: Annotated[int, Field(ge=0, le=2**63 - 1)]
    filter: Name = "none"
    metrics: list[Name] = []
    doc_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{16,64})?$")] | None = None
    prompt_hash: str | None = None
    target_hash: str | None = None

    def value(self, metric: str) -> Any:
        """What a metric gave, None where it is not there."""
        return (self.model_extra or {}).get(metric)


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, with where it stands."""
    first: Mapping[str, Any] = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"][:4])
    return f"{where[:200]}: {first['msg'].removeprefix('Value error, ')[:300]}"
