"""Train Hugging Face models on machines joined by slow links: Local SGD with slow momentum, one callback away."""

import importlib
from typing import TYPE_CHECKING, Any

from .accelerate_checkpoints import register_for_checkpointing
from .checkpoint import verify_checkpoint
from .config import SlowMoConfig
from .functions import consensus, join, last_round, stop_requested
from .in_process import run_in_process, together
from .optimizer import SlowMoOptimizer
from .round_report import RoundReport
from .stop_signals import REQUEUE_EXIT_CODE

if TYPE_CHECKING:
    from .callback import SlowMoCallback

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


def __getattr__(name: str) -> Any:
    """`SlowMoCallback` comes when it is asked for, and transformers with it: custom loops need no Trainer."""
    if name == "SlowMoCallback":
        from .callback import SlowMoCallback

        globals()[name] = SlowMoCallback
        return SlowMoCallback
    if name in ("callback", "trainer_checkpoints", "trainer_end", "trainer_saves", "trainer_start"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, those that have not been imported yet among them."""
    return sorted({*globals(), *__all__})
