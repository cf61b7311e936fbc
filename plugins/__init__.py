"""The survey as a tree: one method a file. Dropping a file in registers it."""
