"""One sweep: how far it is, how its cells ended, why some did not work, and how to go on."""

from __future__ import annotations

import streamlit as st

from harness.cli.output import format_value
from harness.store.store import Store

from .. import page, sweep_data, tables
from ..boards import badge
from ..sweep_data import Progress

__all__ = ["render"]

_EVERY_S = 2
_ALL, _THIS = "the newest of each cell", "this sweep"


def render() -> None:
    """Draw the page."""
    st.title("Sweep")
    with page.opened() as store:
        number = page.ask_sweep(store) or sweep_data.last_sweep(store)
        if not number:
            page.how_to_fill("The store has no results yet.")
            return
        about = sweep_data.progress(store, number)
    # While a sweep runs its part of the page is drawn again and again, on a connection of its own.
    if about.is_alive:
        st.fragment(_draw_live, run_every=_EVERY_S)(number, about.failed)
    else:
        with page.opened() as store:
            _draw_sweep(store, about)
    with page.opened() as store:
        _draw_failures(store, number)


def _draw_live(number: int, failed: int) -> None:
    with page.opened() as store:
        about = sweep_data.progress(store, number)
        if about.is_alive and about.failed == failed:
            _draw_sweep(store, about)
            return
    # The whole page: it stops refreshing itself, or shows the new failures.
    st.rerun()


# --- progress ---------------------------------------------------------------------------------


def _draw_sweep(store: Store, about: Progress) -> None:
    st.subheader(f"Sweep {about.sweep}: {about.state}")
    origin = "" if about.origin is None else f", imported from {about.origin}"
    st.text(f"On {about.machine}, started {about.started_at[:19].replace('T', ' ')} UTC{origin}")
    st.progress(about.share, text=f"{about.done:,} of {about.planned:,} cells done")
    figures = [
        (
            "Cells done",
            f"{about.done:,} / {about.planned:,}",
            f"Of those planned; {about.reused:,} were measured by earlier sweeps.",
        ),
        ("Failed", f"{about.failed:,}", "Cells that ended failed, oom, timeout or crashed."),
        ("Time", _duration(about.elapsed_s), "From the start of the sweep to its end, or until now."),
    ]
    pace = about.cells_per_minute
    if pace is not None:
        figures.append(("Cells a minute", format_value(pace), "Measured cells over the time so far."))
    if about.is_alive:
        left = "not known yet" if about.left_s is None else _duration(about.left_s)
        help_ = "The cells that are left at the pace so far; cells differ, so this is rough."
        figures.append(("Left, about", left, help_))
    with st.container(horizontal=True, gap="large"):  # on a narrow screen they wrap
        for label, value, help_ in figures:
            st.metric(label, value, help=help_, width="content")
    if about.is_alive:
        quiet = (
            "" if about.quiet_s is None else f" The last cell was finished {_duration(about.quiet_s)} ago."
        )
        st.caption(f"This part is drawn again every {_EVERY_S} seconds while the sweep runs.{quiet}")
    _draw_commands(about)
    _draw_grid(store, about)


def _draw_commands(about: Progress) -> None:
    if command := sweep_data.resume_command(about):
        st.write("It was interrupted. The same command goes on where it stopped, in the same folder:")
        st.code(command, language=None, wrap_lines=True)
    if command := sweep_data.retry_command(about):
        st.write("To measure what failed again:")
        st.code(command, language=None, wrap_lines=True)
    elif about.command and sweep_data.resume_command(about) is None:
        with st.expander("The command of this sweep"):
            st.code(about.command, language=None, wrap_lines=True)


def _draw_grid(store: Store, about: Progress) -> None:
    counts = sweep_data.status_counts(store, about.sweep)
    st.subheader("How the cells ended")
    if counts.empty:
        st.info("No cell has ended yet.")
    else:
        shown = counts.assign(
            status=[badge(each) for each in counts["status"]],
            reason=counts["reason"].fillna(""),
        )
        tables.show_table(shown.rename(columns={"reason": "most frequent reason"}), "statuses")
    grid, total = sweep_data.status_grid(store, about.sweep)
    if grid.empty:
        return
    if len(grid) < total:
        st.caption(f"{len(grid):,} of {total:,} variants, those with failures first.")
    if not about.is_alive:
        # "waiting" would promise what nobody is going to do.
        grid = grid.replace(sweep_data.WAITING, "")
    tables.show_table(grid, "grid")


# --- failures ---------------------------------------------------------------------------------


def _draw_failures(store: Store, number: int) -> None:
    st.subheader("What did not work")
    left, right = st.columns(2)
    which = page.choose_one("Among", [_THIS, _ALL], "among", left)
    statuses = page.choose_many("Status", sweep_data.UNWELL, "status", right, format_func=badge)
    found, total = sweep_data.failures(store, number if which == _THIS else None, statuses)
    if found.empty:
        st.success("No cell has this status." if statuses else "Every cell is ok.")
        return
    st.write(
        "`failed`, `oom`, `timeout`, `crashed` and `no_effect` should have worked; "
        "`not_applicable` and `skipped` say why there is nothing to measure."
    )
    if len(found) < total:
        st.caption(f"{len(found):,} of {total:,}; choose a status to see fewer.")
    shown = (
        found.assign(status=found["status"].map(badge))
        .drop(columns="cell")
        .rename(columns={"place": "cell", "seconds": "took [s]", "started_at": "started (UTC)"})
    )
    tables.show_table(shown, "failures")
    labels = {
        str(row.cell): f"{badge(row.status)} · {row.model} · {row.method} · {row.place} (cell {row.cell})"
        for row in found.itertuples()
    }
    chosen = page.choose_one("Cell", list(labels), "cell", format_func=lambda cell: labels[cell])
    assert chosen is not None
    about = sweep_data.failure(store, int(chosen))
    st.text(about.reason or "No reason was given.")
    for title, content in (("Traceback", about.traceback), ("End of the log", about.log_tail)):
        st.markdown(f"**{title}**")
        if content:
            st.code(content, language=None, wrap_lines=True)
        else:
            st.text("There is none.")


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _duration(3.2), _duration(75), _duration(7322)
    ('3 s', '1 min 15 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
