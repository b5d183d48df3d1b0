"""What a topology's exchanges come to: the matrix of one, and how many until everybody has heard of everybody."""

from __future__ import annotations

from slowmo_hf.algorithm.topology import Schedule, Topology


def mixing_matrix(topology: Schedule, exchange: int) -> list[list[float]]:
    """
    P_k of `Topology`, `workers` rows of `workers` shares: row i is what worker i gets. Columns sum to 1, and rows too.
    """
    matrix = [[0.0] * topology.workers for _ in range(topology.workers)]
    for sender in range(topology.workers):
        weight = topology.weight(sender, exchange)
        for receiver in [sender, *topology.targets(sender, exchange)]:
            matrix[receiver][sender] = weight
    return matrix


def connected_within(topology: Topology) -> int:
    """
    Exchanges after which, from any exchange on, every worker has heard (directly or not) of every other; 0 in a world
    of one. Often exact, else an upper bound: the comments say what is proved and what was simulated.
    """
    n, odd = topology.workers, topology.workers % 2
    degree = n - 1 if topology.name == "complete" else min(topology.peers, n - 1)
    one_at_a_time = topology.name == "ring" and topology.symmetric and topology.peers == 1
    paired = topology.name == "bipartite_exponential" or one_at_a_time
    if degree == n - 1:
        return min(1, n - 1)  # everybody hears everybody; a world of one has nobody to hear
    if topology.name == "exponential":
        # L powers of two lie below n, and every distance is a sum of some of them, in any order: it is travelled
        # if each power has an exchange to itself. In L exchanges each power comes up `peers` times, and each
        # exchange offers `peers` of them: a regular bipartite graph, so Hall's theorem gives each its own. With
        # peers > L every exchange offers all powers.
        return (n - 1).bit_length()
    if topology.name == "ring" and not paired:
        return n // 2 if topology.peers == 2 else n - 1
    if topology.name == "ring":
        # News spreads as an interval with two ends. Even world: both move at every exchange. Odd world: idling
        # makes an end wait, but of the 2t moves of t exchanges at most 3 are lost before the ends meet.
        return n // 2 + 2 * odd
    if topology.peers == n // 2:
        # Everybody hears the whole other side, and at the next exchange, through it, its own. Odd: who idles in
        # between and the idler before, who takes that seat, reach the last ones at a third exchange.
        return 2 + odd
    # m distances 1 + a with a = 0, 2, 4, 8, ... Even world: a path picks exchanges and walks +d, -d, +d, ..., so
    # the ones cancel and alternating sums of the a remain. Powers of two in order make every even number in reach
    # that way (a run of ones in binary is 2^end - 2^start), and m + 1 exchanges, the list and its first entry
    # again, reach all n seats. This proves peers = 1 and, as every exchange then offers all m, peers >= m; in
    # between, even worlds to 2048 were simulated. Odd worlds were simulated to 129: idling costs at most as much
    # again.
    m = (n - 2).bit_length()
    return (1 + odd) * m + 1
