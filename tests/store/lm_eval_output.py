"""Genuine output of the installed lm-eval: a tiny model, three kinds of tasks and a group."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

from tests.robustness.tiny import save_model

ROBUSTNESS = Path(__file__).parents[1] / "robustness"
GROUP = "group: tiny_group\ntask: [tiny_words, tiny_again]\naggregate_metric_list:\n- metric: acc\n"
ROLLING = """
task: tiny_text
custom_dataset: !function tiny_words.load
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{good}}{{bad}}.{{good}}"
metric_list:
- metric: word_perplexity
- metric: byte_perplexity
metadata: {version: 1.0}
"""
WORDS = """
task: tiny_written
custom_dataset: !function tiny_words.load
output_type: generate_until
test_split: test
doc_to_text: "{{good}}"
doc_to_target: "{{bad}}"
generation_kwargs: {until: ["."], max_gen_toks: 2, do_sample: false}
filter_list:
- name: first
  filter: [{function: take_first}]
- name: letters
  filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]
metric_list:
- metric: exact_match
  aggregation: mean
  higher_is_better: true
metadata: {version: 2.0}
"""


def write_tasks(folder):
    """The tasks' files; the task that the harness scores too is among them."""
    for name in ("tiny_words.yaml", "tiny_words.py"):
        shutil.copy(ROBUSTNESS / name, folder)
    again = (folder / "tiny_words.yaml").read_text().replace("task: tiny_words", "task: tiny_again")
    (folder / "tiny_again.yaml").write_text(again)
    (folder / "tiny_text.yaml").write_text(ROLLING)
    (folder / "tiny_written.yaml").write_text(WORDS)
    (folder / "tiny_group.yaml").write_text(GROUP)
    return folder


def evaluate(folder):
    """Run lm-eval as its command line does; the folder with its output."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    model, tasks = save_model(folder / "model"), write_tasks(folder)
    tracker = EvaluationTracker(output_path=str(folder / "output"))
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args=f"pretrained={model},dtype=float32",
                tasks=["tiny_group", "tiny_text", "tiny_written"],
                task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
                device="cpu",
                batch_size=4,
                log_samples=True,
                bootstrap_iters=10,
                evaluation_tracker=tracker,
            )
    finally:
        logging.disable(disabled)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return folder / "output"
