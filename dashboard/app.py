"""What Streamlit runs: the navigation between the pages."""

from __future__ import annotations

import streamlit as st
from harness_dashboard.theme_watch import follow_theme
from harness_dashboard.views import compare, environment, method, overview, pareto, scaling, survey, sweep

st.set_page_config(page_title="harness", layout="wide")
with st.sidebar:
    follow_theme()
st.navigation(
    [
        st.Page(overview.render, title="Overview", url_path="overview", default=True),
        st.Page(pareto.render, title="Pareto", url_path="pareto"),
        st.Page(compare.render, title="Compare", url_path="compare"),
        st.Page(scaling.render, title="Scaling", url_path="scaling"),
        st.Page(method.render, title="Method", url_path="method"),
        st.Page(sweep.render, title="Sweep", url_path="sweep"),
        st.Page(survey.render, title="Survey", url_path="survey"),
        st.Page(environment.render, title="Environment", url_path="environment"),
    ]
).run()
