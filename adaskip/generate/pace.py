"""Choose how many tokens to draft before the dense model verifies them: by running acceptance and measured seconds."""

from __future__ import annotations

_LONGEST = 12
_PRIOR, _WEIGHT = 0.9, 3.0
"""Acceptance assumed before anything was drafted, and how many drafted tokens that assumption counts for."""
_FORGET = 0.95
"""What an earlier drafted token counts for beside the next: about the last twenty are remembered."""
_STEP = 0.3
"""How far a measured second moves the running one."""
_MARGIN = 1.03
"""Drafting must promise so much more tokens a second than plain decoding."""
_SHARE = 0.01
"""The share of plain seconds that may be spent on drafts that try whether drafting has come to pay."""
_REMEASURE = 50
"""Rounds after which one plain pass measures anew what drafts are compared with."""


def expected_tokens(acceptance: float, length: int) -> float:
    """Return how many tokens a round of ``length`` drafted ones yields: 1 + a + ... + a^length, the dense one included.

    An identity where each drafted token is accepted with probability ``a`` whatever came before; else an estimator.

    >>> expected_tokens(0.5, 2), expected_tokens(1.0, 3)
    (1.75, 4.0)
    """
    return float(sum(acceptance**i for i in range(length + 1)))


class Pace:
    """Choose draft lengths for texts of one batch size; it goes on learning from call to call.

    A heuristic on running means. A long draft risks what all of its passes take, so it may be no longer than what
    drafts have gained so far pays for. Where none promises to pay, single tokens are tried now and then, from a credit
    that plain passes earn: trying again costs 1 % of them at most.

    Args:
        share: the decoder layers that a draft runs, over all; says what a draft costs until one was measured.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.accepted, self.tried = _PRIOR * _WEIGHT, _WEIGHT
        self.draft_s: float | None = None
        self.passes: dict[int, float] = {}  # seconds of a dense pass by the number of its tokens
        self.credit = 0.0
        self.gained: float | None = None  # seconds; None before the first draft
        self.rounds = 0  # since the last plain pass

    @property
    def acceptance(self) -> float:
        """Return the running share of drafted tokens that were accepted."""
        return self.accepted / self.tried

    def choose(self, room: int) -> int:
        """Return how many tokens to draft next, at most ``room``; 0: run one plain pass."""
        if room < 1 or 1 not in self.passes or self.rounds >= _REMEASURE:
            return 0
        lengths = range(1, min(room, _LONGEST) + 1)
        best = max((n for n in lengths if n == 1 or self._risk_s(n) <= self._gained_s()), key=self.rate)
        if self.rate(best) > _MARGIN * self.rate(0):
            return best
        return 1 if self.credit >= self._risk_s(1) else 0

    def rate(self, length: int) -> float:
        """Return the tokens a second that rounds of so many drafted tokens promise."""
        return expected_tokens(self.acceptance, length) / (length * self._draft_s() + self._pass_s(length + 1))

    def note(self, length: int, tried: int, accepted: int, emitted: int, draft_s: float, verify_s: float) -> None:
        """Learn from a round.

        Args:
            length: drafted tokens; 0: a plain pass.
            tried: of these, the tokens up to the first one refused, itself included.
            accepted: tokens accepted.
            emitted: tokens that the text grew by.
            draft_s: seconds of the drafts.
            verify_s: seconds of the dense pass and of choosing tokens.
        """
        self.passes[length + 1] = _move(self.passes.get(length + 1), verify_s)
        if not length:
            self.rounds = 0
            self._earn(_SHARE * verify_s)
            return
        self.rounds += 1
        self.draft_s = _move(self.draft_s, draft_s / length)
        kept = _FORGET**tried
        self.accepted, self.tried = kept * self.accepted + accepted, kept * self.tried + tried
        gain = emitted * self._pass_s(1) - draft_s - verify_s
        self.gained = min(max(self._gained_s() + gain, 0.0), self._risk_s(_LONGEST))
        self._earn(gain)

    def _earn(self, seconds: float) -> None:
        """Put seconds gained (or lost) on the credit, which pays for one trial and never for more."""
        self.credit = min(self.credit + seconds, self._risk_s(1))

    def _risk_s(self, length: int) -> float:
        """Return what a round costs beyond a plain pass where its first drafted token is refused."""
        return length * self._draft_s() + self._pass_s(length + 1) - self._pass_s(1)

    def _gained_s(self) -> float:
        """Return the seconds that a draft may risk; at the start, those of two tokens."""
        return self._risk_s(2) if self.gained is None else self.gained

    def _draft_s(self) -> float:
        """Return the seconds of drafting one token."""
        return self.share * self._pass_s(1) if self.draft_s is None else self.draft_s

    def _pass_s(self, size: int) -> float:
        """Return the seconds of a dense pass of so many tokens: no more than a larger one's, no less than a smaller's.

        A size that was never measured is taken to cost what the next smaller one does, and so is tried.
        """
        larger = [seconds for known, seconds in self.passes.items() if known >= size]
        return min(larger) if larger else self.passes[max(self.passes)]


def _move(mean: float | None, value: float) -> float:
    """Return a running mean with one more value; one that is far out, as when the machine was busy, counts for less."""
    return value if mean is None else mean + _STEP * (min(value, 2 * mean) - mean)
