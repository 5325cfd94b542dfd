"""Several processes, started by torchrun, as one: FSDP2 gives each a slice of every weight."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from training.objective import Objective


def join() -> torch.device:
    """This process's device; where torchrun started it, it also meets the others."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def average_gradients(
    parameters: Sequence[nn.Parameter], world: int, add_all: Callable[[Tensor], Any]
) -> None:
    """Of processes that each hold the whole model; `add_all` makes a tensor the sum of all's."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    add_all(whole)
    whole /= world
    first = 0
    for gradient in gradients:
        gradient.copy_(whole[first : first + gradient.numel()].view_as(gradient))
        first += gradient.numel()


def shard(objective: Objective, device: torch.device, bfloat16: bool) -> None:
    """Spread the model of process 0 over all processes; the others' may be without weights."""
    model = objective.model
    rotary = deepcopy(model.model.rotary_emb)  # its frequencies are in no state dict
    whole = model.state_dict() if dist.get_rank() == 0 else {}
    model.to("meta")
    model.tie_weights()  # moving unties
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32 if bfloat16 else None,
    )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
    model.model.rotary_emb = rotary.to(device)
