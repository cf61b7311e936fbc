"""Finding, loading and collecting plugins.

Three kinds: the bundled ones (every module under `harness_plugins`, found by scanning, plus the host's
own bundled tasks and meters), third parties (entry points of the group ``harness.plugins``), and
one-offs (`--plugin FILE.py` or `--plugin module`). Each is loaded inside its own try: a broken one is a
row in ``harness plugins`` and a warning, never a dead command line. The manager is built by a function
and passed on; nothing here is a singleton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy

from harness import hookspecs
from harness.claims.claim import Claim
from harness.errors import HarnessError, PluginError, UnknownName
from harness.evaluate.task import TaskSource
from harness.importing import import_file
from harness.measure.meter import Meter
from harness.method import Method, code_hash
from harness.models.registry import ModelEntry
from harness.models.spec import parse_model

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["LoadedPlugins", "PluginReport", "import_bundled", "load_claims", "load_plugins"]

LONGEST_ERROR = 500
ENTRY_POINT_GROUP = "harness.plugins"
BUNDLED_PACKAGE = "harness_plugins"
BUNDLED_CLAIMS = f"{BUNDLED_PACKAGE}.claims."
HOST_PLUGINS = ("harness.evaluate.bundled", "harness.measure.bundled", "harness.models.bundled")


@dataclass(frozen=True, slots=True)
class PluginReport:
    """One row of ``harness plugins``: what was found, where, and what came of it."""

    name: str
    origin: str  # bundled | entry point | --plugin
    location: str
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    meters: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class LoadedPlugins:
    """Everything that plugins registered, by name."""

    manager: pluggy.PluginManager
    methods: Mapping[str, Method]
    models: Mapping[str, ModelEntry]
    task_sources: tuple[TaskSource, ...]
    meters: tuple[Meter, ...]
    reports: tuple[PluginReport, ...]
    claims: Mapping[str, Claim] = field(default_factory=dict)  # in the order of registering

    @property
    def broken(self) -> tuple[PluginReport, ...]:
        return tuple(report for report in self.reports if report.error is not None)

    def meter_identities(self) -> tuple[str, ...]:
        """What decides what meters record: their names, and of those that are not bundled their source.

        Raises:
            PluginError: the source of one cannot be found.
        """
        bundled = {name for report in self.reports if report.origin == "bundled" for name in report.meters}
        return tuple(
            sorted(
                meter.name
                if meter.name in bundled
                else f"{meter.name} {code_hash(meter.measure, f'meter {meter.name!r}: its source')}"
                for meter in self.meters
            )
        )

    def loader_identities(self) -> tuple[str, ...]:
        """The source of every plugin that may load a model (`load_model`), in the order of asking them.

        Raises:
            PluginError: the source of one cannot be found.
        """
        return tuple(
            code_hash(each.function, f"plugin {each.plugin_name}: the source of its load_model")
            for each in reversed(self.manager.hook.load_model.get_hookimpls())
        )

    def method(self, name: str) -> Method:
        """The method of this name.

        Raises:
            UnknownName: there is none; names the near matches, and a broken plugin if there is one.
        """
        if name not in self.methods:
            hint = (
                f"({len(self.broken)} plugin(s) could not be loaded: see harness plugins)"
                if self.broken
                else ""
            )
            raise UnknownName("method", name, self.methods, hint)
        return self.methods[name]


def load_plugins(extra: Sequence[str] = (), *, strict: bool = False) -> LoadedPlugins:
    """Build the manager and load everything.

    Args:
        extra: what `--plugin` was given: files or module names.
        strict: raise on the first broken plugin instead of reporting it.

    Raises:
        PluginError: `strict` and a plugin is broken; or one named in `extra` does not exist.
    """
    manager = pluggy.PluginManager("harness")
    manager.add_hookspecs(hookspecs)
    reports: list[PluginReport] = []
    collected = _Collected()
    for found in (*_bundled(), *_entry_points(), *_one_offs(extra)):
        report = _load(manager, found, collected)
        if report.error is not None and (strict or found.origin == "--plugin"):
            raise PluginError(f"plugin {report.name} ({report.location}): {report.error}")
        reports.append(report)
    return LoadedPlugins(
        manager=manager,
        methods=MappingProxyType(dict(sorted(collected.methods.items()))),
        models=MappingProxyType(dict(sorted(collected.models.items()))),
        task_sources=tuple(collected.task_sources.values()),
        meters=tuple(collected.meters.values()),
        reports=tuple(reports),
        claims=MappingProxyType(dict(collected.claims)),
    )


def load_claims(*, bundled_only: bool = False) -> Mapping[str, Claim]:
    """The claims of the bundled plugins and of entry points, without importing the bundled methods.

    For what only reads stores: importing every method takes seconds.
    """
    manager = pluggy.PluginManager("harness")
    manager.add_hookspecs(hookspecs)
    collected = _Collected()
    bundled = [found for found in _bundled() if found.name.startswith(BUNDLED_CLAIMS)]
    for found in (*bundled, *(() if bundled_only else _entry_points())):
        _load(manager, found, collected)
    return MappingProxyType(dict(collected.claims))


def import_bundled() -> None:
    """Import the bundled plugins, so that processes that are forked later find them imported.

    What cannot be imported here is reported where it is loaded.
    """
    for found in _bundled():
        with suppress(Exception):
            found.load()


# --- finding ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """A plugin that was found and not yet imported."""

    name: str
    origin: str
    location: str
    module: str | None = None
    entry_point: EntryPoint | None = None
    file: Path | None = None
    error: str | None = None  # why not even its name could be read

    def load(self) -> Any:
        if self.error is not None:
            raise PluginError(self.error)
        if self.entry_point is not None:
            return self.entry_point.load()
        if self.file is not None:
            return import_file(self.file, "harness_plugin")
        assert self.module is not None
        return importlib.import_module(self.module)


def _bundled() -> Iterator[_Found]:
    for module in HOST_PLUGINS:
        yield _Found(module, "bundled", module, module=module)
    package = importlib.import_module(BUNDLED_PACKAGE)
    for info in pkgutil.walk_packages(package.__path__, f"{BUNDLED_PACKAGE}."):
        leaf = info.name.rpartition(".")[2]
        # A leading underscore marks a family's shared numerics, which register nothing.
        if not info.ispkg and not leaf.startswith("_"):
            yield _Found(info.name, "bundled", info.name, module=info.name)


def _entry_points() -> Iterator[_Found]:
    try:
        found = [_as_found(entry) for entry in entry_points(group=ENTRY_POINT_GROUP)]
    except Exception:  # whoever wrote one of the files: one distribution must not end every command
        found = list(_one_by_one())
    yield from sorted(found, key=lambda each: each.name)


def _as_found(entry: EntryPoint) -> _Found:
    source = (_name_of(entry.dist) if entry.dist else "") or "?"
    return _Found(entry.name, "entry point", f"{source}: {entry.value}", entry_point=entry)


def _one_by_one() -> Iterator[_Found]:
    """The entry points of each distribution that can be read; of those that cannot be, the reason."""
    seen: set[str] = set()
    for distribution in distributions():
        name = _name_of(distribution)
        # Of two of one name Python imports the one that is first on its path.
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.update([key] if key else [])
        try:
            yield from map(_as_found, distribution.entry_points.select(group=ENTRY_POINT_GROUP))
        except Exception as error:
            if _mentions_group(distribution):
                reason = f"its entry_points.txt cannot be read: {type(error).__name__}: {error}"
                yield _Found(name or "?", "entry point", name or "?", error=reason)


def _name_of(distribution: Distribution) -> str:
    """The name of a distribution; empty where its metadata is missing or damaged."""
    try:
        return str(distribution.metadata["Name"] or "")
    except Exception:  # whoever wrote its file
        return ""


def _mentions_group(distribution: Distribution) -> bool:
    """Whether the file of entry points that cannot be read is about plugins of the harness."""
    try:
        return ENTRY_POINT_GROUP in (distribution.read_text("entry_points.txt") or "")
    except UnicodeDecodeError as error:
        return ENTRY_POINT_GROUP.encode() in error.object
    except Exception:  # whoever wrote it
        return False


def _one_offs(extra: Iterable[str]) -> Iterator[_Found]:
    seen: set[Path] = set()
    for text in dict.fromkeys(extra):
        path = Path(os.path.expanduser(text))
        if text.endswith(".py") or "/" in text:
            if not os.path.isfile(path):
                found = "it is a directory; name a file" if os.path.isdir(path) else "there is no such file"
                raise PluginError(f"--plugin {text}: {found}")
            if path.resolve() in seen:
                continue  # the same file, written in another way
            seen.add(path.resolve())
            yield _Found(path.stem, "--plugin", str(path), file=path.resolve())
        elif not _module_exists(text):
            raise PluginError(f"--plugin {text}: neither a file (FILE.py) nor an importable module")
        else:
            yield _Found(text, "--plugin", text, module=text)


def _module_exists(name: str) -> bool:
    try:
        # Only the package: to look inside of it would import it, outside of the loader's guard.
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


# --- loading ----------------------------------------------------------------------------------------


class _Collected:
    """What has been registered so far; refuses a name that is taken."""

    def __init__(self) -> None:
        self.methods: dict[str, Method] = {}
        self.models: dict[str, ModelEntry] = {}
        self.meters: dict[str, Meter] = {}
        self.claims: dict[str, Claim] = {}
        self.task_sources: dict[Path, TaskSource] = {}
        self.owners: dict[tuple[str, str], str] = {}

    def check(self, kind: str, name: str, owner: str) -> None:
        first = self.owners.get((kind, name))
        if first is not None:
            raise PluginError(f"{kind} {name!r} is registered by both {first} and {owner}")


def _load(manager: pluggy.PluginManager, found: _Found, collected: _Collected) -> PluginReport:
    try:
        plugin = found.load()
        if (before := manager.get_name(plugin)) is not None:
            raise PluginError(f"it is loaded already, as {before}")
        manager.register(plugin, name=f"{found.origin} {found.location}")
        try:
            return _collect(manager, plugin, found, collected)
        except Exception:
            manager.unregister(plugin)
            raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the border to code that is not ours
        reason = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        # In one line, but whole: what pluggy and pydantic object to stands below their first line.
        return PluginReport(
            found.name, found.origin, found.location, error=" ".join(reason.split())[:LONGEST_ERROR]
        )


def _collect(
    manager: pluggy.PluginManager, plugin: Any, found: _Found, collected: _Collected
) -> PluginReport:
    unknown = [
        name
        for name in dir(plugin)
        if getattr(getattr(plugin, name, None), "harness_impl", None) and not hasattr(hookspecs, name)
    ]
    if unknown:
        raise PluginError(f"{', '.join(unknown)} is marked @hookimpl but is no hook of the harness")
    if found.origin == "--plugin" and not _implements_any(plugin):
        raise PluginError("it registers nothing: no function in it is marked @hookimpl")
    methods = _called(plugin, "register_methods", Method)
    models = _called(plugin, "register_models", ModelEntry)
    sources = _called(plugin, "register_tasks", TaskSource)
    meters = _called(plugin, "register_meters", Meter)
    claims = _called(plugin, "register_claims", Claim)
    named = [("method", m.name) for m in methods]
    named += [("model", m.name) for m in models] + [("meter", m.name) for m in meters]
    named += [("claim", claim.id) for claim in claims]
    # Check everything before taking anything: a broken plugin leaves nothing behind.
    if duplicate := next((pair for pair in named if named.count(pair) > 1), None):
        raise PluginError(f"{duplicate[0]} {duplicate[1]!r} is registered twice by {found.location}")
    for kind, name in named:
        collected.check(kind, name, found.location)
    for model in models:
        if not (_is_plain(model.name) and isinstance(model.spec, str)):
            raise PluginError(
                f"register_models: {model.name!r} for {model.spec!r}: a name is letters, digits, '.', '-', "
                "'_', without a colon, a slash or a plus sign, and stands for the written form of a model"
            )
    for source in sources:
        if not Path(source.path).is_dir():
            raise PluginError(f"register_tasks: {source.path} is no directory")
    collected.owners.update(dict.fromkeys(named, found.location))
    collected.methods.update({method.name: method for method in methods})
    collected.models.update({model.name: model for model in models})
    collected.meters.update({meter.name: meter for meter in meters})
    collected.claims.update({claim.id: claim for claim in claims})
    collected.task_sources.update({Path(source.path): source for source in sources})
    return PluginReport(
        found.name,
        found.origin,
        found.location,
        methods=tuple(method.name for method in methods),
        models=tuple(model.name for model in models),
        tasks=tuple(str(source.path) for source in sources),
        meters=tuple(meter.name for meter in meters),
        claims=tuple(claim.id for claim in claims),
    )


def _is_plain(name: Any) -> bool:
    """Whether `--models` would look a name up among those that plugins registered."""
    try:
        spec = parse_model(name)
    except (AttributeError, HarnessError):
        return False
    return spec.source == "plugin" and spec.name == name


def _implements_any(plugin: Any) -> bool:
    return any(getattr(getattr(plugin, name, None), "harness_impl", None) for name in dir(plugin))


def _called(plugin: Any, hook: str, kind: type) -> list[Any]:
    function = getattr(plugin, hook, None)
    if function is None or not getattr(function, "harness_impl", None):
        return []
    values = list(function() or ())
    for value in values:
        if not isinstance(value, kind):
            raise PluginError(f"{hook} must return a list of {kind.__name__}, not {type(value).__name__}")
    return values
