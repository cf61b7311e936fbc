"""Under what results were made: manifests, what tells sweeps apart, and the state of the store."""

from __future__ import annotations

import streamlit as st

from harness.store.store import Store

from .. import environment_data, page, store_health, sweep_data, tables

__all__ = ["render"]


def render() -> None:
    """Draw the page."""
    st.title("Environment")
    with page.opened() as store:
        number = page.ask_sweep(store) or sweep_data.last_sweep(store)
        if number:
            _draw_warnings(store)
            _draw_manifest(store, number)
            _draw_differences(store, number)
        else:
            page.how_to_fill("The store has no results yet.")
        _draw_health(store)


def _draw_warnings(store: Store) -> None:
    st.subheader("May these results stand side by side?")
    found = environment_data.comparability_warnings(store)
    if found.empty:
        st.success("Yes: the sweeps behind the current results were made under the same conditions.")
        return
    st.warning(
        "Not all of them: the sweeps behind the current results differ in what is listed here. "
        "`harness compare` refuses such pairs; the other pages flag them."
    )
    tables.show_table(found, "conditions")


def _draw_manifest(store: Store, number: int) -> None:
    st.subheader(f"Manifest of sweep {number}")
    [facts] = environment_data.read_sweeps(store, [number])
    table = environment_data.manifest_table(facts)
    if table.empty:
        st.info("This sweep has no manifest: what is not recorded cannot be compared.")
        return
    if facts.end is None:
        st.info("There is no second look: the sweep has not come to its end, or was killed.")
    parts = list(dict.fromkeys(table["part"]))
    chosen = page.choose_many("Parts", parts, "part", help="All parts where none is chosen.")
    shown = table[table["part"].isin(chosen)] if chosen else table
    tables.show_table(shown, f"manifest {number}")


def _draw_differences(store: Store, number: int) -> None:
    st.subheader("Against another sweep")
    sweeps = {str(each.sweep): each for each in reversed(environment_data.read_sweeps(store))}
    others = [name for name in sweeps if name != str(number)]
    chosen = page.choose_one("Sweep", others, "against", format_func=lambda each: f"sweep {each}")
    if chosen is None:
        st.info("The store has no other sweep.")
        return
    found = environment_data.differing(sweeps[str(number)], sweeps[chosen])
    if found.empty:
        st.success("Nothing that is recorded differs.")
        return
    judged = int((found["matters for"] != "nothing").sum())
    if judged:
        st.warning(f"{judged} of these keep results of the two sweeps from being compared.")
    else:
        st.success("Nothing that differs keeps results of the two sweeps from being compared.")
    tables.show_table(found, f"sweeps {number} and {chosen}")


def _draw_health(store: Store) -> None:
    st.subheader("The store")
    tables.show_table(store_health.health(store), "store")
    st.markdown("**Imported sweeps**")
    imported = store_health.import_table(store)
    if imported.empty:
        st.text("None: everything in this store was measured by it.")
    else:
        tables.show_table(imported, "imports")
    left, right = st.columns(2)
    if left.button("Count all rows", width="stretch", help="Reads every table; takes long on large stores."):
        tables.show_table(store_health.row_counts(store), "rows")
    if right.button("Check the store", width="stretch", help="Reads everything and looks for damage."):
        with st.spinner("Reading the whole store …"):
            fault = store_health.fault_of(store)
        if fault is None:
            st.success("No damage was found.")
        else:
            st.error("The store is damaged; restore a backup, or sweep into a new one.")
            st.text(fault)
