"""Step lists and step math."""

from wan_autoregressive.schedulers.self_forcing_scheduler import SelfForcingScheduler, SelfForcingSchedulerOutput
from wan_autoregressive.schedulers.step_solver import StepSolver

__all__ = ["SelfForcingScheduler", "SelfForcingSchedulerOutput", "StepSolver"]
