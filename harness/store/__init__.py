"""The results store: every sweep, variant, cell, record, raw sample and item outcome.

======================  ==========================================================================
`harness.store.store`   `Store`: opens, migrates and writes; one per process that writes
`harness.store.queries` what is in it, as tidy pandas DataFrames
`harness.store.tables`  the schema (SQLAlchemy Core); `harness.store.migrations` builds it
======================  ==========================================================================

Results as text: `exchange_export` writes a file and `exchange_import` adds one that `exchange_read` has
checked; `exchange_layout` says what stands in it, `exchange_rows` how rows are known again, and
`exchange_text` what its lines look like.
"""
