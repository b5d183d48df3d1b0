"""Train Hugging Face models on machines joined by slow links: Local SGD with slow momentum, one callback away."""

from typing import TYPE_CHECKING, Any

from .adapters.accelerate_checkpoints import register_for_checkpointing
from .adapters.functions import consensus, finish, join, last_round, stop_requested
from .adapters.optimizer import SlowMoOptimizer
from .adapters.stop_signals import REQUEUE_EXIT_CODE
from .checkpoints.manifest import verify_checkpoint
from .config import SlowMoConfig
from .contents import CheckpointError
from .training.report import RoundReport
from .wire.in_process import run_in_process, together

if TYPE_CHECKING:
    from .adapters.callback import SlowMoCallback

__all__ = [
    "REQUEUE_EXIT_CODE",
    "CheckpointError",
    "RoundReport",
    "SlowMoCallback",
    "SlowMoConfig",
    "SlowMoOptimizer",
    "consensus",
    "finish",
    "join",
    "last_round",
    "register_for_checkpointing",
    "run_in_process",
    "stop_requested",
    "together",
    "verify_checkpoint",
]
__version__ = "0.1.0"


if not TYPE_CHECKING:  # a checker of types would take any name

    def __getattr__(name: str) -> Any:
        """`SlowMoCallback` comes when it is asked for, and transformers with it: custom loops need no Trainer."""
        if name == "SlowMoCallback":
            try:
                from .adapters.callback import SlowMoCallback
            except AttributeError as error:  # Python would drop it, and its cause
                raise ImportError(
                    f"SlowMoCallback does not work with the installed transformers: {error}. docs/compatibility.md "
                    "names the tested versions."
                ) from error
            globals()[name] = SlowMoCallback
            return SlowMoCallback
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone, those that have not been imported yet among them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
