"""Quality: the bridge to lm-eval, the bundled tasks and paired statistics."""
