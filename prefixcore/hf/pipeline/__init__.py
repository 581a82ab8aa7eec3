"""Models whose layers are shared out to several processes: pipeline parallelism by `torch.distributed.pipelining`."""

from .cutting import pipeline_stage
from .stage import ModelStage

__all__ = ["ModelStage", "pipeline_stage"]
