"""The web dashboard on a results store.

==============  ================================================================
`launch`        starts the server: ``harness dashboard``
`server`        what Streamlit runs: the pages behind the gate
`gate`          stands before every request: the sign-in, and other sites' requests
`access`        addresses, tokens, sessions, the limit on wrong tokens; pure
`app`           navigation only
`queries`       store in, DataFrames out; no Streamlit, no Plotly
`kept`          answers of the store that are kept until something is added to it
`charts`        DataFrames in, Plotly figures out; pure. `pareto_charts`: the front;
                `detail_charts`: readings, kernels and the device's ceilings
`boards`        frames in units and words for people; pure
`theme`         light and dark, and figures in the colours of either; pure
`theme_watch`   draws a page again when the reader's theme changes
`tables`        tables on a page
`figures`       figures in the reader's theme
`buttons`       the downloads below tables and figures
`downloads`     tables as CSV and JSON, figures as HTML; pure
`page`          what all views share: the store, the filters, text as text
`views`         one page a file
`scaling_data`  what the page Scaling shows, with `scaling_charts`
`method_data`   what Method shows, with `method_catalogue` and `method_charts`
`sweep_data`    what Sweep shows
`store_health`  what Environment shows, with `environment_data`
==============  ================================================================
"""
