"""Training: objectives, optax transforms, the compiled loop, checkpoints, placement on a mesh."""

from jaxft.train.checkpoints import Checkpoints
from jaxft.train.loop import FitState, NonFiniteLossError, TrainState, fit, init_fit, init_state, make_segment
from jaxft.train.objectives import OBJECTIVES, accuracy, cross_entropy, masked_cross_entropy, mse
from jaxft.train.preconditioners import adafactor_preconditioner, adam_preconditioner, second_moment
from jaxft.train.sharding import fully_shard, replicate, shard_examples
from jaxft.train.transforms import adam_ntk, make_optimizer, make_schedule, sign_descent

__all__ = [
    "OBJECTIVES",
    "Checkpoints",
    "FitState",
    "NonFiniteLossError",
    "TrainState",
    "accuracy",
    "adafactor_preconditioner",
    "adam_ntk",
    "adam_preconditioner",
    "cross_entropy",
    "fit",
    "fully_shard",
    "init_fit",
    "init_state",
    "make_optimizer",
    "make_schedule",
    "make_segment",
    "masked_cross_entropy",
    "mse",
    "replicate",
    "second_moment",
    "shard_examples",
    "sign_descent",
]
