"""Network surgery that all methods share: anatomy of the families, replacing modules, blocks."""
