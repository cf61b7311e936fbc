"""The results store: every sweep, variant, cell, record, raw sample and item outcome.

======================  ==========================================================================
`harness.store.store`   `Store`: opens, migrates and writes; one per process that writes
`harness.store.queries` what is in it, as tidy pandas DataFrames
`harness.store.tables`  the schema (SQLAlchemy Core); `harness.store.migrations` builds it
======================  ==========================================================================
"""
