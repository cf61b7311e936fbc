"""Methods of other libraries, measured by the same harness as the harness's own."""
