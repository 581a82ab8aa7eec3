"""Training virtual tokens: examples, the loop, held-out evaluation and the picture of it."""

from __future__ import annotations

from ..hf.trained_layers import train_layers
from .activations import CachedActivations, CacheError, cache_activations
from .average_callback import AverageCallback
from .chat import unroll
from .curve import Curve, draw_curve, write_curve
from .data import DataError, Example, TokenizedExample, collate, split, tokenize
from .describe import describe_data
from .evaluate import Evaluation, evaluate, held_out_loss, predict
from .loop import fit, train
from .optimization import optimize
from .options import TrainingOptions, TrainingRecord
from .questions import Question, read_questions
from .reading import read_examples, read_jsonl
from .remeasure import Remeasured, remeasure
from .starting import best_start, starting_text
from .weights import base_parameters, weights_digest

__all__ = [
    "AverageCallback",
    "CacheError",
    "CachedActivations",
    "Curve",
    "DataError",
    "Evaluation",
    "Example",
    "Question",
    "Remeasured",
    "TokenizedExample",
    "TrainingOptions",
    "TrainingRecord",
    "base_parameters",
    "best_start",
    "cache_activations",
    "collate",
    "describe_data",
    "draw_curve",
    "evaluate",
    "fit",
    "held_out_loss",
    "optimize",
    "predict",
    "read_examples",
    "read_jsonl",
    "read_questions",
    "remeasure",
    "split",
    "starting_text",
    "tokenize",
    "train",
    "train_layers",
    "unroll",
    "weights_digest",
    "write_curve",
]
