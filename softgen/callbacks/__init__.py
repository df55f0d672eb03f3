"""Lightning callbacks: averaged weights, resume, export, sample grids, progress, memory, a stop on NaN, a watch."""

from softgen.callbacks.accuracy import AccuracyWatch
from softgen.callbacks.checkpoints import ResumeCheckpoint, latest_checkpoint, read_checkpoint
from softgen.callbacks.ema import StudentEMA
from softgen.callbacks.export import ExportModel
from softgen.callbacks.finite import StopOnNonFinite
from softgen.callbacks.memory import MemoryPlan, PartMemory, memory_plan
from softgen.callbacks.progress import StepProgress
from softgen.callbacks.samples import SampleGrid

__all__ = [
    "AccuracyWatch",
    "ExportModel",
    "MemoryPlan",
    "PartMemory",
    "ResumeCheckpoint",
    "SampleGrid",
    "StepProgress",
    "StopOnNonFinite",
    "StudentEMA",
    "latest_checkpoint",
    "memory_plan",
    "read_checkpoint",
]
