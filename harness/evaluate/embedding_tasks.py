"""Tasks that judge an encoder by its sentence embeddings: what a task file may say, and its data.

The files look like lm-eval's, which knows no such tasks: ``output_type`` is ``embedding_classification``
(labelled sentences, a linear probe) or ``embedding_similarity`` (scored pairs of sentences). Read without
torch; `datasets` is imported where the data are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.evaluate.hub_data import pinned
from harness.evaluate.revision import require_unchanged
from harness.evaluate.yaml_files import FunctionRef, YamlReader
from harness.importing import import_file

if TYPE_CHECKING:
    from harness.evaluate.index import ResolvedTask

__all__ = [
    "CLASSIFICATION",
    "EMBEDDING_TYPES",
    "SIMILARITY",
    "EmbeddingData",
    "EmbeddingDefinition",
    "embedding_definition",
    "load_embedding_data",
]

CLASSIFICATION, SIMILARITY = "embedding_classification", "embedding_similarity"
EMBEDDING_TYPES = frozenset({CLASSIFICATION, SIMILARITY})

_SHARED_FIELDS = frozenset(
    {
        "task", "tag", "output_type", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset",
        "test_split", "validation_split", "doc_to_text", "doc_to_target", "metadata",
    }
)  # fmt: skip
_CLASSIFICATION_FIELDS = frozenset({"training_split", "training_limit"})


@dataclass(frozen=True, slots=True)
class EmbeddingDefinition:
    """What a task file says, checked.

    `text_fields` are the columns of the sentences (one, or two of a pair), `target_field` that of the
    label or of the score. `training_limit` is how many training sentences are used at most.
    """

    name: str
    output_type: str
    text_fields: tuple[str, ...]
    target_field: str
    test_split: str
    training_split: str | None
    training_limit: int | None
    group_field: str | None


@dataclass(frozen=True, slots=True)
class EmbeddingData:
    """Sentences and what is known of them.

    `texts` holds one tuple for each document (one sentence, or the two of a pair) with its `targets`: a
    class number, or a human score. `labels` are the classes in order; the `training_…` are empty for pairs.
    """

    texts: tuple[tuple[str, ...], ...]
    targets: tuple[float, ...]
    groups: tuple[Any, ...] | None
    training_texts: tuple[str, ...] = ()
    training_targets: tuple[int, ...] = ()
    labels: tuple[Any, ...] = ()


def embedding_definition(name: str, content: Mapping[str, Any]) -> EmbeddingDefinition:
    """Check the content of a task file of one of `EMBEDDING_TYPES`.

    Raises:
        ConfigError: a field that such a task does not have, or one that is absent or of another type.
    """
    output_type = content["output_type"]
    classifies = output_type == CLASSIFICATION
    allowed = _SHARED_FIELDS | _CLASSIFICATION_FIELDS if classifies else _SHARED_FIELDS
    if unknown := sorted(content.keys() - allowed):
        known = ", ".join(sorted(allowed))
        raise ConfigError(f"task {name!r}: {output_type} has no field {unknown[0]!r} (it has {known})")
    texts = content.get("doc_to_text")
    fields = tuple(texts) if isinstance(texts, list) else (texts,)
    wanted = 1 if classifies else 2
    if len(fields) != wanted or not all(isinstance(each, str) for each in fields):
        example = "sentence" if classifies else "[sentence1, sentence2]"
        raise ConfigError(
            f"task {name!r}: doc_to_text of {output_type} names {wanted} column(s) of the data, "
            f"as in doc_to_text: {example}; not {texts!r}"
        )
    limit = content.get("training_limit")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 2):
        raise ConfigError(f"task {name!r}: training_limit must be a number of sentences, not {limit!r}")
    metadata = content.get("metadata")
    return EmbeddingDefinition(
        name=name,
        output_type=output_type,
        text_fields=fields,
        target_field=_text(name, content, "doc_to_target"),
        test_split=_text(name, content, "test_split" if "test_split" in content else "validation_split"),
        training_split=_text(name, content, "training_split") if classifies else None,
        training_limit=limit,
        group_field=metadata.get("item_group") if isinstance(metadata, Mapping) else None,
    )


def _text(name: str, content: Mapping[str, Any], field: str) -> str:
    value = content.get(field)
    if not isinstance(value, str):
        raise ConfigError(f"task {name!r}: {field} must be a name, not {value!r}")
    return value


# --- data --------------------------------------------------------------------------------------------


def load_embedding_data(task: ResolvedTask, limit: int | None) -> EmbeddingData:
    """Read the data of a task: the first `limit` documents that are judged, all that train the probe.

    Raises:
        ConfigError: the data cannot be loaded, lack a split or a column, hold no such labels or scores, or a
            file of the task was changed since it was resolved.
    """
    content = YamlReader().read(task.yaml_path).content
    definition = embedding_definition(task.name, content)
    rows = _Rows(task.name, _dataset(task, content))
    require_unchanged(task.name, task.files)
    fields = definition.text_fields
    judged = rows.of(definition.test_split, (*fields, definition.target_field), limit)
    group = definition.group_field
    groups = None if group is None else tuple(rows.of(definition.test_split, (group,), limit)[0])
    texts = tuple(zip(*(map(str, column) for column in judged[: len(fields)]), strict=True))
    targets = judged[-1]
    if definition.training_split is None:
        return EmbeddingData(texts, _scores(task.name, targets), groups)
    training = rows.of(
        definition.training_split, (fields[0], definition.target_field), definition.training_limit
    )
    labels = _labels(task.name, training[1], targets)
    places = {label: place for place, label in enumerate(labels)}
    return EmbeddingData(
        texts=texts,
        targets=tuple(float(places[target]) for target in targets),
        groups=groups,
        training_texts=tuple(map(str, training[0])),
        training_targets=tuple(places[target] for target in training[1]),
        labels=labels,
    )


@dataclass(frozen=True)
class _Rows:
    name: str
    splits: Any

    def of(self, split: str, columns: Sequence[str], limit: int | None) -> list[list[Any]]:
        """The columns of the first rows of a split."""
        if split not in self.splits:
            known = ", ".join(map(str, self.splits))
            raise ConfigError(f"task {self.name!r}: its data have no split {split!r} (they have {known})")
        data = self.splits[split]
        if absent := next((each for each in columns if each not in data.column_names), None):
            known = ", ".join(data.column_names)
            raise ConfigError(f"task {self.name!r}: its data have no column {absent!r} (they have {known})")
        count = len(data) if limit is None else min(limit, len(data))
        if count == 0:
            raise ConfigError(f"task {self.name!r}: the split {split!r} is empty")
        return [data[:count][column] for column in columns]


def _dataset(task: ResolvedTask, content: Mapping[str, Any]) -> Any:
    """The splits, found as lm-eval finds them: a function of the task's own, or `datasets`."""
    import datasets
    import datasets.exceptions

    options = dict(content.get("dataset_kwargs") or {})
    function = content.get("custom_dataset")
    try:
        if isinstance(function, FunctionRef):
            load = getattr(import_file(function.file, "harness_task"), function.name)
            return load(**(content.get("metadata") or {}), **options)
        if "dataset_path" not in content:
            raise ConfigError(f"task {task.name!r} names no data: it needs dataset_path or custom_dataset")
        with pinned(task.data):
            return datasets.load_dataset(content["dataset_path"], content.get("dataset_name"), **options)
    except (datasets.exceptions.DatasetsError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"the data of task {task.name!r} cannot be loaded: {reason}") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"task {task.name!r} cannot be built: {reason}") from error


def _scores(name: str, values: Sequence[Any]) -> tuple[float, ...]:
    try:
        scores = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task {name!r}: a score is no number ({error})") from None
    if len(set(scores)) < 2:
        raise ConfigError(
            f"task {name!r}: {len(scores)} equal score(s) correlate with nothing; raise --limit"
        )
    return scores


def _labels(name: str, training: Sequence[Any], judged: Sequence[Any]) -> tuple[Any, ...]:
    """The classes in order.

    Raises:
        ConfigError: fewer than two, a class that is never trained, or one that stands for "unknown" (-1).
    """
    known = set(training)
    if any(isinstance(label, (int, float)) and label < 0 for label in (*known, *judged)):
        raise ConfigError(f"task {name!r}: a label is negative, which is how unlabelled data are marked")
    if len(known) < 2:
        raise ConfigError(f"task {name!r}: the training sentences have one label only")
    if strange := sorted(set(judged) - known, key=str):
        raise ConfigError(f"task {name!r}: no training sentence has the label {strange[0]!r}")
    return tuple(sorted(known, key=lambda label: (str(type(label)), label)))
