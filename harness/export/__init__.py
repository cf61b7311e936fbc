"""A variant of a results store as a checkpoint that the ecosystem loads: formats, writing, checking."""
