r"""
Push-sum gossip between rounds: SGP, D-PSGD and, with messages in flight during the next steps, OSGP (Assran et al.
2019, stochastic gradient push).

Worker i keeps a numerator x_i and a push-sum weight w_i (1 after a round); its parameters hold the de-biased
z_i = x_i / w_i, where gradients are taken. After optimizer step k (an inner step moved the parameters from z to z'):

    x <- x + (z' - z)                          the base optimizer's whole step, taken at z    GossipBase._absorb
    send p (x, w) to each peer; keep p (x, w)  p = 1 / (1 + peers)                            GossipBase._send
    x, w <- x, w + the messages of step k - staleness                                         GossipBase._take_in
    z <- x / w

A message is applied exactly `staleness` steps after it was sent, never earlier and never later, so a run is
deterministic. Messages in flight hold part of the mass (w < 1 meanwhile): sum x and sum w over workers and messages
never change but by gradients. With staleness 0 and uniform weights on a regular graph, or a two-sided one, w is 1
throughout and stays home.

D-PSGD is the same with a two-sided topology, whose mixing matrices are doubly stochastic: no second machinery.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from ..algorithm.layout import Bucket, FlatAnchor, Piece, rounded
from ..algorithm.starts import Base
from ..algorithm.topology import Schedule, Topology, check_schedule
from ..config import SlowMoConfig
from ..contents import Contents, Restored, Saved
from ..finite import finiteness
from ..names import TOPOLOGIES, find
from .communicator import Communicator
from .exchange import Exchange
from .reduction import MESSAGE_BYTES


def make_topology(config: SlowMoConfig, workers: int) -> Schedule:
    """The schedule of exchanges that `config` names; `ValueError` where it does not fit this number of workers."""
    symmetric = config.base == "dpsgd"
    name = config.topology if config.topology != "auto" else "bipartite_exponential" if symmetric else "exponential"
    made: Schedule = find(TOPOLOGIES[name])(name, workers, config.peers, symmetric)
    if type(made) is not Topology:
        check_schedule(made, name, is_synchronous=config.base != "osgp" or config.staleness == 0)
    return made


class GossipBase(Base):
    """
    One worker's numerators, weight and messages in flight.

    Args:
        config (`SlowMoConfig`): Its topology, peers, staleness and `exact_average`.
        communicator (`Communicator`): The workers, on a process group of their own.
        anchors (`list[FlatAnchor]`): The parameters' layout; the numerators start from them.
        trained (`list[torch.Tensor]`): What must be finite to be sent: all parameters of this process.
        lost (`Callable`): Makes the error of a worker and a step at which its parameters were not.
    """

    def __init__(
        self,
        config: SlowMoConfig,
        communicator: Communicator,
        anchors: list[FlatAnchor],
        trained: list[torch.Tensor],
        lost: Callable[[int, int], Exception],
    ) -> None:
        self.communicator, self._trained, self._lost = communicator, trained, lost
        self.exact_average = config.exact_average
        self.topology = make_topology(config, communicator.world_size)
        self.staleness = config.staleness if config.base == "osgp" else 0
        self.weight = self._mass = 1.0
        self.is_apart = False  # the parameters' memory has another order than the numerators': neither is written
        self.in_flight: deque[Exchange] = deque()
        self.numerators = {item: item.flat.clone() for item in anchors}
        # Behind the computation few large ones are better (`bytes_per_message`).
        message_bytes = config.bucket_bytes if self.staleness else min(MESSAGE_BYTES, config.bucket_bytes)
        self._buckets = [bucket for item in anchors for bucket in item.buckets(message_bytes)]
        self._chunks = {bucket: bucket.chunks() for bucket in self._buckets}
        self._degree = max(len(self.topology.sources(communicator.rank, k)) for k in range(self.topology.cycle_length))
        self._free: list[Exchange] = []

    # ---- one exchange ----

    @torch.no_grad()
    def mix_(self, number: int, step: int = 0) -> None:
        """
        Absorb the inner step, send, apply what is due, de-bias; exchange `number` of the schedule, after optimizer
        step `step`. Where what is due comes from parameters that were not finite, here or there, nothing is applied.
        """
        share = self.topology.weight(self.communicator.rank, number)
        if self.staleness:
            self._mix_behind(number, share, step)
            return
        exchange = self._new_exchange()
        exchange.address(self.topology, self.communicator.rank, number, step, messages=len(self._buckets) + 1)
        for bucket in self._buckets:
            for chunk in self._chunks[bucket]:
                self._absorb(exchange, chunk, share)
            self._send(exchange, bucket)
        self._refuse_lost(exchange)
        for bucket, transfer in zip(self._buckets, exchange.buckets, strict=True):
            self.communicator.finish(transfer)
            for chunk in self._chunks[bucket]:
                self._take_in(exchange.received, chunk, self.weight)
        self._free.append(exchange)

    def _mix_behind(self, number: int, share: float, step: int) -> None:
        """The same with messages in flight. Bucket by bucket, what is due makes room for what is sent."""
        due = self.in_flight.popleft() if len(self.in_flight) == self.staleness else None
        exchange = Exchange(due.outgoing, due.incoming) if due else self._new_exchange()
        exchange.address(self.topology, self.communicator.rank, number, step, messages=len(self._buckets) + 1)
        weight = self.weight * share
        exchange.send_weight(self.communicator, weight)
        if due and due.weight:
            self.communicator.finish(due.weight)
            weight += sum(float(received) for received in due.weight.received)
            self._refuse_lost(due)
        for index, bucket in enumerate(self._buckets):
            if due:
                self.communicator.finish(due.buckets[index])
            for chunk in self._chunks[bucket]:
                self._absorb(exchange, chunk, share)
                self._take_in(due.received if due else [], chunk, weight)
            self._send(exchange, bucket)
        self.weight = weight
        self.in_flight.append(exchange)

    def _absorb(self, exchange: Exchange, chunk: Bucket, share: float) -> None:
        """
        x <- p (x + z' - z), with z as it was handed back: rounded to the parameters' dtype. The message is the same.
        """
        x = chunk.of(self.numerators[chunk.item])
        if not self.is_apart and self.weight == 1 and chunk.dtype == x.dtype:
            chunk.pack_(x)  # x = z
        elif not self.is_apart:
            moved = torch.empty_like(x)
            chunk.pack_(moved)
            x.add_(moved.sub_(rounded(x / self.weight, chunk.dtype)))
        x.mul_(share)
        if exchange.outgoing is not self.numerators:
            chunk.of(exchange.outgoing[chunk.item]).copy_(x)

    def _take_in(self, received: list[dict[FlatAnchor, torch.Tensor]], chunk: Bucket, weight: float) -> None:
        """x <- x + the messages that are due; the parameters are z = x / w."""
        x = chunk.of(self.numerators[chunk.item])
        for flat in received:
            x.add_(chunk.of(flat[chunk.item]).to(x.device))
        if not self.is_apart:
            chunk.unpack_(_debiased(x, weight))

    # ---- messages ----

    def _new_exchange(self, sources: int = 0) -> Exchange:
        """
        Memory for one: the numerators themselves go out, unless they move on meanwhile or lie where they cannot travel
        from.
        """
        if self._free:
            used = self._free.pop()
            made = Exchange(used.outgoing, used.incoming)
        else:
            wire, in_place = self.communicator.wire_device, self.staleness == 0
            made = Exchange.make(self.numerators, wire=wire, degree=self._degree, in_place=in_place)
        made.received = made.incoming[:sources]
        return made

    def _send(self, exchange: Exchange, bucket: Bucket) -> None:
        if not exchange.buckets:
            exchange.mark_(bucket, finiteness(self._trained))
        exchange.send(self.communicator, bucket)

    def _refuse_lost(self, exchange: Exchange) -> None:
        """Its first message says whose parameters were not finite, before anything is mixed."""
        for transfer in exchange.buckets[:1]:
            self.communicator.finish(transfer)
        worker = exchange.lost(self._buckets[:1], self.communicator.rank)
        if worker is not None:
            raise self._lost(worker, exchange.step)

    # ---- what the outer loop asks ----

    def origin(self, piece: Piece) -> torch.Tensor:
        """The anchor, where all workers have the same; else 0."""
        return piece.anchor if self.exact_average else torch.zeros_like(piece.anchor[:1])

    def displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """
        Write W origin - (x + the messages in flight to this worker) into `out`, W their mass. Over workers the W sum
        to m, so the mean is that of origin - x; and a worker with more or less than its share shows no distance for
        it.
        """
        out.copy_(self.origin(piece)).mul_(self._mass).sub_(self._numerator(piece))
        for exchange in self.in_flight:
            for flat in exchange.received:
                out.sub_(piece.of(flat[piece.item]).to(out.device))

    def own_displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write anchor - z into `out`."""
        torch.sub(piece.anchor, self._numerator(piece) / self.weight, out=out)

    def _numerator(self, piece: Piece) -> torch.Tensor:
        """x, with what the parameters have moved since the last exchange; nothing is written."""
        x, z = piece.of(self.numerators[piece.item]), piece.values()
        if not self.is_apart and self.weight == 1 and z.dtype == x.dtype:
            return z.to(x.device)
        return x if self.is_apart else x + (z.to(x) - rounded(x / self.weight, z.dtype))

    def hand_back_(self, piece: Piece) -> None:
        """x = w anchor; the parameter is the anchor."""
        weight = 1.0 if self.exact_average else self.weight
        x = torch.mul(piece.anchor, weight, out=piece.of(self.numerators[piece.item]))
        if not self.is_apart:
            piece.values().copy_(_debiased(x, weight))

    def settle(self) -> None:
        """Wait for the messages in flight; they stay due when they were."""
        self.wait_for_messages()
        for exchange in self.in_flight:
            self._refuse_lost(exchange)

    def wait_for_messages(self) -> None:
        """Wait for the messages in flight, which stay due when they were. No parameter is read: views may be shown."""
        for exchange in self.in_flight:
            for transfer in [*([exchange.weight] if exchange.weight else []), *exchange.buckets]:
                self.communicator.finish(transfer)
        self._mass = self.weight + sum(float(w) for e in self.in_flight if e.weight for w in e.weight.received)

    def end_average(self) -> None:
        """A round has taken in what was in flight; w = 1 again."""
        self._free.extend(self.in_flight)
        self.in_flight.clear()
        self.weight = 1.0

    def begin_anew(self) -> None:
        """As `Base.begin_anew`; messages in flight belong to what is left."""
        self._drop_messages()
        for bucket in self._buckets:
            bucket.pack_(bucket.of(self.numerators[bucket.item]))

    def _drop_messages(self) -> None:
        self.wait_for_messages()
        self.end_average()

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`: numerators, weight and messages in flight; nothing where they are the model, 1 and none."""
        if agree:
            return Saved()
        self.wait_for_messages()
        weights = [[float(weight) for weight in e.weight.received] if e.weight else [] for e in self.in_flight]
        own = Contents({"weight": self.weight, "in_flight": weights})
        for index, item in enumerate(self.numerators):
            own.tensors[f"numerator.{index}"] = self.numerators[item]
            for number, exchange in enumerate(self.in_flight):
                for source, received in enumerate(exchange.received):
                    own.tensors[f"message.{number}.{source}.{index}"] = received[item]
        return Saved(own=own)

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`; what was in flight belongs to the run that is left."""
        own = saved.own
        if not same_number or "weight" not in own.settings:
            return self._begin_from_anchors if same_number else self.begin_anew
        weight = own.fraction("weight", most=self.topology.workers)
        in_flight = own.number_lists("in_flight", most=self.staleness, least=0)
        numerators = {item: item.of_checkpoint(own, f"numerator.{i}") for i, item in enumerate(self.numerators)}
        messages = [
            [
                {item: item.of_checkpoint(own, f"message.{number}.{source}.{i}") for i, item in enumerate(numerators)}
                for source in range(len(weights))
            ]
            for number, weights in enumerate(in_flight)
        ]
        if any(len(weights) > self._degree for weights in in_flight):
            own.refuse("in_flight", f"has more messages than the {self._degree} that a worker gets at a step")

        def take_up() -> None:
            self._drop_messages()
            self.weight = weight
            for item, numerator in numerators.items():
                self.numerators[item].copy_(numerator)
            for weights, received in zip(in_flight, messages, strict=True):
                self.in_flight.append(self._new_exchange(len(weights)))
                self.in_flight[-1].fill(weights, received, len(self._buckets))

        return take_up

    def _begin_from_anchors(self) -> None:
        """As after a round."""
        self._drop_messages()
        for item, numerator in self.numerators.items():
            numerator.copy_(item.flat)


def _debiased(x: torch.Tensor, weight: float) -> torch.Tensor:
    """z of a numerator and its weight; the numerator itself where that is 1."""
    return x if weight == 1 else x / weight
