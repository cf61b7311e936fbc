"""``harness sweep``: the main job."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import discard_output, say

if TYPE_CHECKING:
    from harness.config import SweepConfig
    from harness.interrupts import Interrupts

__all__ = ["sweep"]

DEFAULT_DB = "results.db"
_LOSE = "1%"


def sweep(
    methods: Annotated[
        str | None,
        typer.Option(help="Methods: gptq,rtn:bits=3:group_size=64,smoothquant+gptq. The baseline is added."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Models: zoo:NAME, a hub id, ./directory, shape:llama-7b, scratch:NAME."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks by name (bundled, your own, or lm-eval's); none for none."),
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Batch sizes to time, such as 1,8.")] = None,
    prompt_lens: Annotated[
        str | None, typer.Option(help="Prompt lengths to time, in tokens; none to time nothing.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to decode in a timed run.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.")] = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="Full sequences scored at a time.")] = None,
    seed: Annotated[str | None, typer.Option(help="Seed, or several: 0,1,2.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    db: Annotated[
        str | None, typer.Option(help="The results store: a path or a URL (or HARNESS_DB).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file with these options; the command line wins.")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="A folder with lm-eval task files of your own.")
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="A plugin: FILE.py or a module. May be repeated.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Variants at a time.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for making a variant, and for a cell.")
    ] = None,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GiB of main memory for each worker. Default: its share of 90 % of what is free."),
    ] = None,
    train_steps: Annotated[int | None, typer.Option(help="Budget of methods that train.")] = None,
    train_batch_size: Annotated[int | None, typer.Option(help="Sequences in a training batch.")] = None,
    train_len: Annotated[int | None, typer.Option(help="Tokens in a training sequence.")] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    calibration_len: Annotated[int | None, typer.Option(help="Tokens in each of them.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="The text to calibrate on and train with (.txt, .xz, .gz).")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code that a hub model brings.")
    ] = None,
    allow_pickle: Annotated[
        bool | None, typer.Option("--allow-pickle", help="Load weights that are not safetensors.")
    ] = None,
    fresh: Annotated[
        bool | None, typer.Option("--fresh", help="Measure again what is already stored.")
    ] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Measure failed cells again.")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="Where variants run: local.")] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="End with which method to take, as `harness choose`: for decode, prefill, end-to-end, "
            "weights, memory or energy.",
        ),
    ] = None,
    lose: Annotated[
        str | None, typer.Option(help="With --for: the most that a task's score may lose.  [default: 1%]")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the matrix and what each cell needs; run nothing."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="A broken plugin ends the sweep before it starts.")
    ] = False,
) -> int:
    """Measure methods x models x tasks and store every number in the results store."""
    given: dict[str, Any] = {
        "methods": methods,
        "models": models,
        "tasks": tasks,
        "batch_sizes": batch_sizes,
        "prompt_lens": prompt_lens,
        "new_tokens": new_tokens,
        "limit": limit,
        "eval_batch_size": eval_batch_size,
        "seeds": seed,
        "dtype": dtype,
        "device": device,
        "include_path": tuple(include_path) if include_path else None,
        "plugin": tuple(plugin) if plugin else None,
        "jobs": jobs,
        "timeout_s": timeout,
        "memory_limit_gib": memory_limit,
        "train_steps": train_steps,
        "train_batch_size": train_batch_size,
        "train_len": train_len,
        "calibration_samples": calibration_samples,
        "calibration_len": calibration_len,
        "text": text,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
        "fresh": fresh,
        "retry_failed": retry_failed,
        "executor": executor,
    }
    return _sweep(
        config,
        {name: value for name, value in given.items() if value is not None},
        db,
        _Ending(dry_run, quiet, goal, lose),
        strict,
    )


def database(db: str | None) -> str:
    """The store that is meant: `--db`, `HARNESS_DB`, or results.db here."""
    return db or os.environ.get("HARNESS_DB") or DEFAULT_DB


@dataclass(frozen=True, slots=True)
class _Ending:
    """What is shown: the matrix alone; progress and the table; which method to take."""

    dry_run: bool
    quiet: bool
    goal: str | None
    lose: str | None

    def check(self, config: SweepConfig) -> None:
        """Refuse, before anything is measured, what could not be answered afterwards.

        Raises:
            ConfigError: no such goal or limit, or a goal that this sweep measures nothing of.
        """
        from harness.cli.choose import parse_goal
        from harness.errors import ConfigError

        if self.goal is None:
            if self.lose is not None:
                raise ConfigError("--lose goes with --for: add, for instance, --for decode")
            return
        goal, _ = parse_goal(self.goal, self.lose or _LOSE)
        if goal.is_of_shapes and config.prompt_lens == ():
            raise ConfigError(f"--for {self.goal} needs a timed shape: leave out --prompt-lens none")

    def choose(self, target: str, models: Sequence[str]) -> None:
        """Say which method to take, where that was asked. Without an answer the sweep is a success still."""
        from harness.cli.choose import parse_goal, print_choices
        from harness.errors import ConfigError

        if self.goal is None:
            return
        lose = self.lose or _LOSE
        try:
            print_choices(target, *parse_goal(self.goal, lose), lose, models)
        except ConfigError as error:
            say(f"nothing to choose: {error}", err=True)


def _sweep(file: Path | None, given: dict[str, Any], db: str | None, ending: _Ending, strict: bool) -> int:
    from harness.interrupts import Interrupted, Interrupts

    with Interrupts() as interrupts:
        try:
            return _run(file, given, db, ending, strict, interrupts)
        except Interrupted as stopped:
            say(f"interrupted ({stopped}); the same command goes on where this stopped", err=True)
            return stopped.exit_code


def _run(
    file: Path | None,
    given: dict[str, Any],
    db: str | None,
    ending: _Ending,
    strict: bool,
    interrupts: Interrupts,
) -> int:
    from harness.config import load_config

    config = load_config(file, given)
    ending.check(config)
    if not ending.dry_run:
        # The server's imports take seconds: they run beside the parent's own.
        from harness.executors.server import start_fork_server

        start_fork_server()
    from harness.planning import plan_sweep

    plan = plan_sweep(config, strict=strict)
    for report in plan.plugins.broken:
        where = f"{report.name} ({report.location})"
        say(f"warning: plugin {where} could not be loaded: {report.error}", err=True)
    target = database(db)
    if ending.dry_run:
        from harness.cli.matrix import print_matrix

        print_matrix(plan, target)
        return 0
    from harness.cli.results import print_summary
    from harness.privacy import without_passwords
    from harness.progress import make_reporter
    from harness.store.store import Store
    from harness.sweep import run_sweep

    command = without_passwords(shlex.join(["harness", *sys.argv[1:]]))
    with Store.open(target) as store, make_reporter(quiet=ending.quiet) as reporter:
        outcome = run_sweep(plan, store, reporter, command, interrupts)
        reporter.close()
        models = list(dict.fromkeys(variant.model.info.label for variant in plan.grid.variants))
        try:
            if not ending.quiet:
                print_summary(store, outcome)
            ending.choose(target, models)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Nobody reads the tables: a pipe or a terminal was closed. The exit code still says how it went.
            discard_output()
    return outcome.exit_code
