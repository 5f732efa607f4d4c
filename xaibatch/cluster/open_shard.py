"""What the driver remembers of one shard while it is being worked on: what is left, what was tried, what was lost."""

from collections import Counter
from dataclasses import dataclass, field

from xaibatch.cluster import cells
from xaibatch.cluster.pool import Place, Slot
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.work import ShardWork


@dataclass(kw_only=True, eq=False)
class OpenShard:
    """A shard that is being worked on, or that waits for another attempt.

    lost_in: places whose replica was lost under it; avoids: nodes that its steps were kept away from when they were
    sent.
    """

    work: ShardWork
    groups: dict[str, MetricGroup]
    left: set[str]
    attempts: Counter[str] = field(default_factory=Counter)
    errors: dict[str, Exception] = field(default_factory=dict)
    running: int = 0
    alone: bool = False
    num_node_losses: int = 0
    lost_in: set[Place] = field(default_factory=set)
    avoids: set[frozenset[str]] = field(default_factory=set)
    opened: float = 0.0
    not_before: float = 0.0
    explained: cells.Explained | None = None
    slot: Slot | None = None

    def is_known_to(self, slot: Slot) -> bool:
        """Whether the replica has explained the shard."""
        return self.explained is not None and self.explained.slot is slot
