"""Train Hugging Face models on machines joined by slow links: Local SGD with slow momentum, one callback away."""

from .accelerate_checkpoints import register_for_checkpointing
from .callback import SlowMoCallback
from .checkpoint import verify_checkpoint
from .config import SlowMoConfig
from .in_process import run_in_process, together
from .optimizer import SlowMoOptimizer, consensus, join, last_round, stop_requested
from .round_report import RoundReport
from .stop_signals import REQUEUE_EXIT_CODE

__all__ = [
    "REQUEUE_EXIT_CODE",
    "RoundReport",
    "SlowMoCallback",
    "SlowMoConfig",
    "SlowMoOptimizer",
    "consensus",
    "join",
    "last_round",
    "register_for_checkpointing",
    "run_in_process",
    "stop_requested",
    "together",
    "verify_checkpoint",
]
__version__ = "0.1.0"
