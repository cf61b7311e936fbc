"""The web dashboard on a results store.

==============  ================================================================
`app`           navigation only; what Streamlit runs
`launch`        starts the server: ``harness dashboard``
`queries`       store in, DataFrames out; no Streamlit, no Plotly
`metrics`       units, directions and order of metrics
`charts`        DataFrames in, Plotly figures out; pure
`page`          what all views share: the store, the filters, text as text
`views`         one page a file
`scaling_data`  what the page Scaling shows, with `scaling_charts`
`method_data`   what Method shows, with `method_catalogue` and `method_charts`
`sweep_data`    what Sweep shows
`store_health`  what Environment shows, with `environment_data`
==============  ================================================================
"""
