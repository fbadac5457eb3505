"""Reads nothing on import: what every stage computes, run by an executor (in this process, or on Ray)."""

from cca_core.stages.graph import STAGES, StageSpec, plan
from cca_core.stages.run import Context, Executor, LocalExecutor, run_stage

__all__ = ["STAGES", "Context", "Executor", "LocalExecutor", "StageSpec", "plan", "run_stage"]
