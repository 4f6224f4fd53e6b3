"""A process group cut into nodes: neighbours with fast links, and one rank of each node.

ranks 0 1 2 3 | 4 5 6 7    node size 4: rank 5 has (4, 5, 6, 7) inside and (1, 5) across
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist


class NodeGroups(NamedTuple):
    """inside: the ranks of this rank's node. across: those in its place in every node."""

    inside: Any
    across: Any


_made: "WeakKeyDictionary[Any, dict[int, NodeGroups]]" = WeakKeyDictionary()


def node_groups(group: Any, node_size: int) -> NodeGroups:
    """Those of this rank in `group`, nodes being each `node_size` neighbours, which must divide it.

    Made at the first call, which all ranks of `group` make, and no others need to.
    """
    made = _made.setdefault(group, {})
    if node_size not in made:
        ranks, place = dist.get_process_group_ranks(group), group.rank()
        first = place - place % node_size
        made[node_size] = NodeGroups(
            _new_group(ranks[first : first + node_size]),
            _new_group(ranks[place % node_size :: node_size]),
        )
    return made[node_size]


def _new_group(ranks: list[int]) -> Any:
    return dist.new_group(ranks, use_local_synchronization=True, group_desc="ULTRAMEM_NODE")
