"""Models with tensors that training moves and no optimizer holds."""

from __future__ import annotations

import torch
from torch import nn

SYNC_EVERY = 4


def in_place(teacher, student):
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 0.25)


def by_data(teacher, student):
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.data.lerp_(fast.data, 0.25)


def by_load(teacher, student):
    own, its = teacher.state_dict(), student.state_dict()
    teacher.load_state_dict({name: own[name].lerp(its[name], 0.25) for name in own})


def by_other_memory(teacher, student):
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.data = slow.data.lerp(fast.data, 0.25)


def by_another_parameter(teacher, student):
    mean = teacher.weight.detach().lerp(student.weight.detach(), 0.25)
    teacher.weight = nn.Parameter(mean, requires_grad=False)


WAYS = {
    "in place": in_place,
    "by .data": by_data,
    "by load_state_dict": by_load,
    "to other memory": by_other_memory,
    "to another parameter": by_another_parameter,
}


class Taught(nn.Module):
    """A student with BatchNorm, and a teacher that every training pass moves from `first` on."""

    def __init__(self, way="in place", first=1, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.norm = nn.Linear(4, 4, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype)
        self.teacher = nn.Linear(4, 4, dtype=dtype).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.way, self.first, self.passes = WAYS[way], first, 0

    def forward(self, x, labels=None):
        self.passes += self.training
        if self.training and self.passes >= self.first:
            self.way(self.teacher, self.student)
        out = self.norm(self.student(x))
        return {"loss": (out - self.teacher(x)).square().mean() + (out.sum(1, keepdim=True) - 1).square().mean()}


def state_of(model):
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def mean(values):
    return sum(values) / len(values)
