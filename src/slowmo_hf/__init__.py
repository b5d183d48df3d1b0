"""Train Hugging Face models on machines joined by slow links: Local SGD with slow momentum, one callback away."""

from .accelerate_checkpoints import register_for_checkpointing
from .callback import SlowMoCallback
from .checkpoint import verify_checkpoint
from .config import SlowMoConfig
from .optimizer import SlowMoOptimizer, consensus, last_round
from .round_report import RoundReport

__all__ = [
    "RoundReport",
    "SlowMoCallback",
    "SlowMoConfig",
    "SlowMoOptimizer",
    "consensus",
    "last_round",
    "register_for_checkpointing",
    "verify_checkpoint",
]
__version__ = "0.1.0"
