"""A method: a named optimisation with typed options and a transform.

A plugin registers values of `Method`; everything the harness knows of a method is in that value.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PydanticUserError, ValidationError
from pydantic_core import PydanticSerializationError

from harness.errors import ConfigError, HarnessError, PluginError

if TYPE_CHECKING:
    from torch import nn

    from harness.context import Context
    from harness.models.info import ModelInfo

__all__ = ["FAMILIES", "NEEDS", "Method", "Options", "Paper", "code_hash"]

FAMILIES = (
    "baseline",
    "quantization",
    "pruning",
    "distillation",
    "sparsity",
    "moe",
    "attention",
    "recurrence",
    "adaptive",
    "serving",
    "external",
    "other",
)

NEEDS = ("calibration", "training", "teacher", "cuda", "encoder", "decoder")
"""What a method can ask for; the grid explains a skip from these before anything is loaded."""

COMMON_ALIASES: Mapping[str, str] = {
    "w_bits": "bits",
    "wbits": "bits",
    "act_bits": "a_bits",
    "group": "group_size",
    "groupsize": "group_size",
    "symmetric": "sym",
    "desc_act": "act_order",
    "actorder": "act_order",
    "percdamp": "damp",
    "damp_percent": "damp",
    "dampening_frac": "damp",
    "smoothing_strength": "alpha",
    "sparsity_ratio": "sparsity",
    "amount": "sparsity",
    "temperature": "T",
    "sliding_window": "window",
    "w": "window",
}


_LARGEST_INTEGER = 2**63 - 1
_NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


class Options(BaseModel):
    """The knobs of a method: frozen, unknown names refused, ranges validated by pydantic.

    The usual names of other libraries (`w_bits`, `group`, `desc_act`, `percdamp`, ...) are accepted
    for a field that exists and are stored under the field's own name; a class adds its own in
    `aliases`.
    """

    # Infinity and NaN are no settings: no range refuses a NaN, and JSON, the identity, has neither.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    aliases: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, method: str = "") -> Options:
        """Build options from plain values (strings from the command line included).

        Raises:
            ConfigError: an unknown name (with near matches), a value of the wrong type or range.
        """
        prefix = f"{method}: " if method else ""
        known = cls.model_fields
        canonical: dict[str, Any] = {}
        for given, value in values.items():
            name = given.replace("-", "_")
            if name not in known:
                name = {**COMMON_ALIASES, **cls.aliases}.get(name, name)
            if name not in known:
                near = difflib.get_close_matches(given, list(known), n=2, cutoff=0.5)
                advice = (
                    "did you mean " + " or ".join(repr(match) for match in near) + "?"
                    if near
                    else "it has " + (", ".join(known) or "no options")
                )
                raise ConfigError(f"{prefix}unknown option {given!r}; {advice}")
            if name in canonical:
                raise ConfigError(f"{prefix}option {name!r} is given twice")
            if not _is_text(value):
                raise ConfigError(f"{prefix}option {name!r} holds characters that are no text")
            if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
                raise ConfigError(f"{prefix}option {name!r} is a number of more than 64 bits")
            canonical[name] = value
        try:
            return cls(**canonical)
        except ValidationError as error:
            raise ConfigError(prefix + _first_problem(error)) from None

    def canonical(self) -> dict[str, Any]:
        """All options as JSON values, in the order of the class: the identity of the options."""
        return _json_values(self)

    @classmethod
    def problem(cls) -> str | None:
        """Why options of this class cannot be written as JSON, which is how they are stored and listed."""
        try:
            _json_values(cls.model_construct(), warnings=False)
            cls.model_json_schema()
        except (PydanticUserError, PydanticSerializationError) as error:
            return str(error).partition("\n")[0]
        return None

    def non_default(self) -> dict[str, Any]:
        """The options that differ from the defaults, for labels."""
        dumped = self.canonical()
        default = _json_values(type(self).model_construct(), warnings=False)
        return {name: value for name, value in dumped.items() if default.get(name) != value}


def _json_values(options: Options, *, warnings: bool = True) -> dict[str, Any]:
    values = options.model_dump(mode="json", warnings=warnings)
    return {name: _ordered(getattr(options, name, None), written) for name, written in values.items()}


def _ordered(value: Any, written: Any) -> Any:
    """The JSON of a value with its sets in one order: Python's own is another one in each process."""
    if isinstance(value, (set, frozenset)):
        return sorted(written, key=json.dumps)
    if isinstance(value, (list, tuple)):
        return [_ordered(*pair) for pair in zip(value, written, strict=True)]
    if isinstance(value, Mapping):
        pairs = zip(value.values(), written.items(), strict=True)
        return {name: _ordered(inner, dumped) for inner, (name, dumped) in pairs}
    return written


def _is_text(value: Any) -> bool:
    """Whether every text in a value can be written; a lone surrogate (from bytes no UTF-8 has) cannot."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, Mapping):
        return all(_is_text(key) and _is_text(inner) for key, inner in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_is_text, value))


def _first_problem(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        # Of a choice of types pydantic adds its own names: constrained-float, literal['auto'].
        where = ".".join(part for part in map(str, problem["loc"]) if not set(part) & set("-["))
        message = problem["msg"].removeprefix("Value error, ")
        got = "" if problem["type"] == "missing" or not where else f", not {problem['input']!r}"
        problems.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(problems)


def own_code(function: Any) -> Any:
    """What somebody wrote of a callable: the function under decorators (`torch.no_grad`) and partials, whose
    own file says nothing of it, or the class of an object that is called.
    """
    while (inner := inspect.unwrap(function)) is not function or isinstance(function, partial):
        function = function.func if isinstance(function, partial) else inner
    return function if inspect.isroutine(function) or inspect.isclass(function) else type(function)


def code_hash(function: Any, what: str) -> str:
    """SHA-256 of the file in which a plugin's callable is written, and of the helpers (``_*.py``) beside it.

    Raises:
        PluginError: there is no such file; `what` says of what.
    """
    return _hash_of(_sources_of(function, what))


def _sources_of(function: Any, what: str) -> list[Path]:
    try:
        file = inspect.getsourcefile(own_code(function))
    except TypeError:  # built in
        file = None
    if file is None or not Path(file).is_file():
        raise PluginError(f"{what} cannot be found")
    own = Path(file)
    return [own, *sorted(own.parent.glob("_*.py"))]


def _hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from."""

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    venue: str | None = None

    def __str__(self) -> str:
        source = f"arXiv:{self.arxiv}" if self.arxiv else (self.venue or "")
        return f"{self.authors} ({self.year}). {self.title}. {source}".rstrip(". ") + "."


@dataclass(frozen=True)
class Method:
    """A named optimisation: what `register_methods` returns a list of.

    Args:
        name: lower-case words joined by hyphens, unique over all plugins.
        options: the class of the knobs.
        transform: ``transform(model, options, context) -> nn.Module``; may change its argument.
        family: one of `FAMILIES`, the branch of the survey.
        paper: a `Paper` or a plain citation.
        summary: one sentence on what it claims; by default the first line of the plugin's docstring.
        needs: names of `NEEDS`, or a function of the options that returns them.
        applies: ``applies(model_info, options) -> None`` (yes) or the reason why not.
        architectural: True where the transform changes what the network computes by design and the
            result must be trained or is expected to lose accuracy (so drift is not a defect).
        trains_scratch: True where the transform itself trains a `scratch:` model, which is then not trained
            again: what it holds in place (zeros, a student's weights) would not outlast that.
        inputs: ``inputs(options) -> {what: identity}``: what else decides the result and lies outside options
            and source, such as the content of a model that an option names; part of the key.
        leaves_layers: of a method that works on the full-precision linear layers of the blocks, as every
            quantization and every pruner (`leaves_zeros`) does, ``leaves_layers(options) -> bool``: whether
            it leaves some to another such method that follows in the chain. By default a quantization leaves
            some only where an option `targets` names some layers of all, a pruner leaves all, and what else
            there is works on no such layers.
        leaves_zeros: True where weights are pruned in place. They stay zero while later methods of the chain
            train (`Context.train`); a distillation, whose student has weights of its own, may not follow.
    """

    name: str
    options: type[Options]
    transform: Callable[[nn.Module, Any, Context], nn.Module]
    family: str = "other"
    paper: Paper | str | None = None
    summary: str = ""
    needs: Iterable[str] | Callable[[Any], Iterable[str]] = ()
    applies: Callable[[ModelInfo, Any], str | None] | None = None
    architectural: bool = False
    leaves_layers: Callable[[Any], bool] | None = None
    leaves_zeros: bool = False
    trains_scratch: bool = False
    inputs: Callable[[Any], Mapping[str, str]] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise PluginError(f"method name {self.name!r} must be lower-case words joined by hyphens")
        if not (isinstance(self.options, type) and issubclass(self.options, Options)):
            raise PluginError(f"method {self.name!r}: options must be a subclass of harness.Options")
        if not callable(self.transform):
            raise PluginError(f"method {self.name!r}: transform must be callable")
        # Of the bundled ones the page of methods is made of it, and asking takes time at every start.
        if not self.is_bundled and (problem := self.options.problem()):
            raise PluginError(f"method {self.name!r}: its options are no JSON: {problem}")
        if self.family not in FAMILIES:
            raise PluginError(
                f"method {self.name!r}: unknown family {self.family!r}; known: {', '.join(FAMILIES)}"
            )
        if not callable(self.needs):
            self._checked_needs(self.needs)

    @property
    def is_bundled(self) -> bool:
        """Whether it is one of the package's own."""
        return str(getattr(own_code(self.transform), "__module__", "")).startswith("harness_plugins.")

    def needs_of(self, options: Options) -> frozenset[str]:
        """What the method needs with these options."""
        needs = self._asked("needs", self.needs, options) if callable(self.needs) else self.needs
        return self._checked_needs(needs)

    def reason_against(self, info: ModelInfo, options: Options) -> str | None:
        """Why the method does not fit a model with these options; None where it fits.

        Raises:
            PluginError: `applies` fails, or answers something else than None or a text.
        """
        reason = None if self.applies is None else self._asked("applies", self.applies, info, options)
        if reason is not None and not (isinstance(reason, str) and reason.strip()):
            raise PluginError(
                f"method {self.name!r}: applies must return None, which means yes, or the reason as a text, "
                f"not {reason!r}"
            )
        return reason

    def inputs_of(self, options: Options) -> dict[str, str]:
        """What else decides the result with these options, by what it is.

        Raises:
            PluginError: `inputs` fails, or answers something else than texts by name.
        """
        if self.inputs is None:
            return {}
        inputs = self._asked("inputs", self.inputs, options)
        if not isinstance(inputs, Mapping) or not all(
            isinstance(text, str) for pair in inputs.items() for text in pair
        ):
            raise PluginError(f"method {self.name!r}: inputs must return texts by name, not {inputs!r}")
        return dict(inputs)

    @property
    def works_on_layers(self) -> bool:
        """Whether it needs linear layers in full precision, which a quantizer before it may have packed."""
        return self.family == "quantization" or self.leaves_zeros or self.leaves_layers is not None

    def leaves_layers_for_others(self, options: Options) -> bool:
        """Whether a method that follows and works on full-precision layers finds some."""
        if self.leaves_layers is not None:
            return bool(self._asked("leaves_layers", self.leaves_layers, options))
        return self.family != "quantization" or getattr(options, "targets", None) is not None

    def _asked(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the method answers; `PluginError` where it raises what is not the harness's."""
        try:
            return function(*arguments)
        except HarnessError:
            raise
        except Exception as error:  # the border to code that is not ours
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
            raise PluginError(f"method {self.name!r}: {what} failed: {problem}") from error

    def _checked_needs(self, needs: Any) -> frozenset[str]:
        if isinstance(needs, str) or not isinstance(needs, Iterable):
            raise PluginError(f"method {self.name!r}: needs must be a list of names, not {needs!r}")
        checked = frozenset(needs)
        if unknown := checked - set(NEEDS):
            raise PluginError(
                f"method {self.name!r}: unknown needs {sorted(unknown)}; known: {', '.join(NEEDS)}"
            )
        return checked

    @property
    def card(self) -> str:
        """The docstring of the module that defines the transform."""
        module = sys.modules.get(own_code(self.transform).__module__)
        return inspect.cleandoc(module.__doc__ or "") if module else ""

    @property
    def claim(self) -> str:
        """One sentence: the summary, or the first line of the card."""
        return self.summary or self.card.partition("\n")[0]

    @cached_property
    def source_hash(self) -> str:
        """SHA-256 of the source that decides what the transform does.

        The plugin's own file, its family's helpers (``_*.py`` beside it), and for bundled plugins the
        numerics they stand on (`harness.nn`, `harness.kernels`).
        """
        return _hash_of(self._sources())

    def _sources(self) -> list[Path]:
        sources = _sources_of(self.transform, f"method {self.name!r}: the source of its transform")
        if self.is_bundled:
            host = Path(__file__).parent
            sources += sorted((host / "nn").rglob("*.py")) + sorted((host / "kernels").rglob("*.py"))
        return sources
