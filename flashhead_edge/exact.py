"""When to verify: the length of a round of exact mode, from what has been measured. Plain numbers, no torch.

Exact mode gives the dense head's greedy text with few dense reads (delayed verification, docs/architecture.md). A round
decodes up to m tokens with the fast head, keeps their hidden states, and checks all of them in one dense pass: the
matrix is read once for m states. The first wrong token is put right by the pass itself; what the body computed after
it is done again.

How long a round should be. Let e be the rate at which the fast head misses the dense token, and count costs in dense
reads: b for one step of the body, f for one of the fast head. A round feeds m states through the body, and delivers
min(first miss, m) tokens:

    tokens(m)  = sum_{j=1..m} (1 - e)^(j-1)                 = (1 - (1 - e)^m) / e
    forwards(m) = m                                          the cache can be cut back
    forwards(m) = m + sum_{j=1..m-1} e (1 - e)^(j-1) (j - 1)  it cannot: the j - 1 right tokens run again on a copy
    cost(m)    = (forwards(m) (b + f) + 1) / tokens(m)       of one delivered token
    repeated(m) = forwards(m) / tokens(m) - 1                share of the body's work done twice, about e (m - 1) / 2

The m of the least cost is taken among those whose repeated(m) stays within the limit; m = 1, a dense read at every
step, repeats nothing and is always among them. For small e the optimum is near sqrt(2 / (e b)).
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_ROUND = 64  # tokens that a reader waits for at most
REPEATED_LIMIT = 0.02  # what is expected; a text of bad luck (half as many misses again) then stays within 3 %
PRIOR_CHECKS = 100.0  # the first rounds act as if this many tokens had been checked,
PRIOR_RATE = 0.01  # and this share of them had been wrong


@dataclass
class Record:
    """What verification has found so far: kept by an engine from one text to the next."""

    checked: int = 0
    missed: int = 0

    @property
    def rate(self) -> float:
        """The estimated rate of misses: the measured one, drawn to the prior while little is known."""
        return (self.missed + PRIOR_CHECKS * PRIOR_RATE) / (self.checked + PRIOR_CHECKS)


def tokens_per_round(m: int, rate: float) -> float:
    """Tokens that a round of `m` delivers on average."""
    return sum((1 - rate) ** j for j in range(m))


def forwards_per_round(m: int, rate: float, replay: bool) -> float:
    """Body steps of a round of `m` on average, with those that a copy of the cache must run again."""
    again = sum(rate * (1 - rate) ** (j - 1) * (j - 1) for j in range(1, m)) if replay else 0.0
    return m + again


def round_length(rate: float, body: float, fast: float, replay: bool = False, repeated_limit: float = REPEATED_LIMIT) -> int:
    """Tokens to decode before verifying: the cheapest number whose repeated work stays within the limit.

    Args:
        rate: share of tokens on which the fast head misses the dense one, 0 to 1.
        body: cost of one step of the body, in reads of the dense head.
        fast: cost of one step of the fast head, in reads of the dense head.
        replay: the cache cannot be cut back, so right tokens run again after a miss.
        repeated_limit: share of the body's steps that may be done twice.
    Returns:
        1 to LONGEST_ROUND.
    """
    best, cost = 1, body + fast + 1.0
    for m in range(2, LONGEST_ROUND + 1):
        tokens, forwards = tokens_per_round(m, rate), forwards_per_round(m, rate, replay)
        now = (forwards * (body + fast) + 1.0) / tokens
        if forwards / tokens - 1 <= repeated_limit and now < cost:
            best, cost = m, now
    return best
