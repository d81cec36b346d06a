"""The launches that step replicas: one for all of a rule, width and type. Nothing here waits for the device."""

from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..arguments import Replica
from .backward_launches import Step, Stepping, kept_on_device, step_on_device, stepping_of
from .device_tables import WIDEST_READ
from .launcher import launch
from .launches import stream_of, tile_of, warps_of
from .replicas import step_replicas


class _Form(NamedTuple):
    """The constants of a launch beside those of the step. ``masked``: rules that move a row without a gradient."""

    masked: bool
    gradient_align: int


class ReplicaStepping(NamedTuple):
    """How replicas are stepped, as long as their weights and states lie where they do, and gradients at multiples of
    the same numbers of bytes.

    ``forms``: of each kernel of ``stepping``; ``most_rows``: of its replicas.
    """

    stepping: Stepping
    forms: list[_Form]
    most_rows: list[int]


def replica_stepping_of(replicas: list[Replica]) -> ReplicaStepping:
    """Returns how replicas are stepped, one of which has rows at least."""
    weights, updates = [r.weight for r in replicas], [r.update for r in replicas]
    states = [list(u.state.values()) for u in updates]
    stepping = stepping_of(weights, [u.rule.compiled_number for u in updates], states)
    forms, most_rows = [], []
    for group in range(len(stepping.kernels)):
        own = [r for r, of in zip(replicas, stepping.of_weights, strict=True) if of == group]
        aligned = gcd(WIDEST_READ, *(r.gradient.data_ptr() for r in own))
        forms.append(_Form(own[0].update.rule.moves_without_gradient, aligned))
        most_rows.append(max(r.weight.shape[0] for r in own))
    return ReplicaStepping(stepping, forms, most_rows)


def step_all(replicas: list[Replica], of: ReplicaStepping) -> None:
    """Steps the rows of all replicas."""
    device = replicas[0].weight.device
    none: list[Tensor | None] = [None] * len(replicas)
    step = step_on_device(of.stepping, Step(none, none, [x for r in replicas for x in r.update.numbers()]), device)
    gradients = replicas[0].gradient
    looked_up = next((r.looked_up for r in replicas if r.looked_up is not None), None)
    first = gradients.data_ptr(), 0 if looked_up is None else looked_up.data_ptr()
    fields: list[int] = []
    for r in replicas:
        fields += [r.weight.shape[0], (r.gradient.data_ptr() - first[0]) // 4]
        fields += [0 if r.looked_up is None else r.looked_up.data_ptr() - first[1]]
        fields += [0 if r.mask is None else r.mask.data_ptr()]
    on_device = kept_on_device(tuple(fields), torch.int64, device, stream_of(device))
    for group, (kernel, form, rows) in enumerate(zip(step.kernels, of.forms, of.most_rows, strict=True)):
        tile = tile_of(kernel.WIDTH)
        launch(
            step_replicas,
            (triton.cdiv(rows, tile.lanes), len(replicas)),
            (on_device, gradients, looked_up, step.weights, step.numbers, group),
            (*kernel, *form, tile.lanes, tile.block_d),
            warps_of(tile, 1, kernel.RULE),
        )
