"""Processes that each hold the whole model and train it on their share of a step.

On a few busy cores one-threaded processes that meet once per step are faster than threads, which
meet at every operation.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo

from training.parallel import average_gradients


def share_gradients(model: Any, rank: int, world: int, path: str) -> None:
    """From now on a backward pass of `model` leaves the mean of all replicas' gradients.

    They meet through the file `path`. The group is not torch's default one, under which the trainer
    would split the model.
    """
    store = FileStore(path, world)
    group: Any = ProcessGroupGloo(store, rank, world, timedelta(minutes=30))
    parameters = list(model.parameters())

    def share(_: Tensor) -> None:
        average_gradients(parameters, world, lambda whole: group.allreduce([whole]).wait())

    # The embedding is where a forward begins, so its gradient is the last to be complete.
    model.model.embed_tokens.weight.register_post_accumulate_grad_hook(share)
