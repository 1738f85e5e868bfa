"""SharedBudget: which snapshots a budget of bytes holds, in the order of their use; what they share counts once."""

from __future__ import annotations

from deepspeed_inference.state.snapshot import Payload, Snapshot


class SharedBudget:
    """What one tier holds.

    Holding a snapshot makes its payloads count, and keeps them while others go; listing it makes it one that may go.
    Order is that of the calls, so it is the same on every rank.

    Args:
        budget_bytes: that payloads may take, each counted once. `nbytes` may pass it between `hold` and `over`.

    Attributes:
        nbytes: what the payloads held take.
    """

    def __init__(self, budget_bytes: int):
        if not isinstance(budget_bytes, int) or budget_bytes < 0:
            raise ValueError(f"budget_bytes: expected an integer that is not negative, found {budget_bytes!r}")
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._holders: dict[Payload, int] = {}  # how many snapshots hold each
        self._listed: dict[Snapshot, None] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._listed)

    def __contains__(self, snapshot: Snapshot) -> bool:
        return snapshot in self._listed

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """All that are listed, the least recently used first."""
        return tuple(self._listed)

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """All that are held."""
        return tuple(self._holders)

    def holds(self, payload: Payload) -> bool:
        """Whether some snapshot here has it."""
        return payload in self._holders

    def fits(self, snapshot: Snapshot) -> bool:
        """Whether there is room for it when all others are gone."""
        return snapshot.nbytes <= self.budget_bytes

    def hold(self, snapshot: Snapshot) -> list[Payload]:
        """Count a snapshot's payloads; returns those that were not held yet."""
        new = [payload for payload in snapshot.payloads if payload not in self._holders]
        for payload in snapshot.payloads:
            self._holders[payload] = self._holders.get(payload, 0) + 1
        self.nbytes += sum(payload.nbytes for payload in new)
        return new

    def use(self, snapshot: Snapshot) -> None:
        """List a snapshot that is held, as the last that was used."""
        self._listed.pop(snapshot, None)
        self._listed[snapshot] = None

    def over(self) -> Snapshot | None:
        """The snapshot to go next, while the payloads held take more than the budget."""
        if self.nbytes <= self.budget_bytes:
            return None
        return next(iter(self._listed))  # there is one: a snapshot that does not fit alone is never held

    def release(self, snapshot: Snapshot) -> list[Payload]:
        """Hold and list a snapshot no longer; returns the payloads that nothing holds any more."""
        self._listed.pop(snapshot, None)
        gone = []
        for payload in snapshot.payloads:
            self._holders[payload] -= 1
            if not self._holders[payload]:
                del self._holders[payload]
                gone.append(payload)
        self.nbytes -= sum(payload.nbytes for payload in gone)
        return gone
