"""Step lists and step math."""

from wan_autoregressive.schedulers.self_forcing_scheduler import SelfForcingScheduler, SelfForcingSchedulerOutput

__all__ = ["SelfForcingScheduler", "SelfForcingSchedulerOutput"]
