"""Imported by the fork server before it forks, so that workers start with everything imported.

CUDA is not touched and no thread is started here: forked children could not use either.
"""

from __future__ import annotations

import lm_eval.evaluator
import lm_eval.models.huggingface
import lm_eval.tasks
import torch
import transformers
import transformers.models.auto.tokenization_auto
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import harness.executors.starting
import harness.measure.explaining
import harness.measure.footprint
import harness.measure.latency
import harness.measure.scenario
import harness.nn.outliers
import harness.plugins
import harness.scoring
import harness.transforming
import harness.worker

__all__: list[str] = []

_PRELOADED = (lm_eval, torch, transformers, harness)

harness.plugins.import_bundled()
# The table of renamed weights, built of hundreds of patterns when the first checkpoint is loaded.
get_checkpoint_conversion_mapping("llama")
