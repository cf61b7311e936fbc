"""What Streamlit runs: the navigation between the pages."""

from __future__ import annotations

import streamlit as st
from harness_dashboard.views import compare, failures, overview, pareto, survey

st.set_page_config(page_title="harness", layout="wide")
st.navigation(
    [
        st.Page(overview.render, title="Overview", url_path="overview", default=True),
        st.Page(pareto.render, title="Pareto", url_path="pareto"),
        st.Page(compare.render, title="Compare", url_path="compare"),
        st.Page(survey.render, title="Survey", url_path="survey"),
        st.Page(failures.render, title="Failures", url_path="failures"),
    ]
).run()
