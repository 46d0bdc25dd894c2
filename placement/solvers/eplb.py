"""The published hierarchical algorithm: groups to nodes, replicas within nodes, replicas to GPUs."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import Infeasible
from moesim.spec.plan import ExpertPlacement, PlacementRequest


@njit(cache=True)
def pack_equal(
    weight: NDArray[np.float32], packs: int, pack_of: NDArray[np.int64], place_of: NDArray[np.int64]
) -> None:
    """Put each row's items, heaviest first, into the lightest pack that has room; every pack gets as many items.

    weight: [rows, items]; pack_of and place_of, both [rows, items], are filled with the pack and the place in it.
    """
    rows, items = weight.shape
    room = items // packs
    for row in range(rows):
        load = np.zeros(packs, dtype=np.float32)
        used = np.zeros(packs, dtype=np.int64)
        if room == 1:  # nothing to choose: item i is pack i
            for item in range(items):
                pack_of[row, item] = item
                place_of[row, item] = 0
            continue
        order = np.argsort(-weight[row], kind="mergesort")
        for item in order:
            best = -1
            for pack in range(packs):
                if used[pack] < room and (best < 0 or load[pack] < load[best]):
                    best = pack
            pack_of[row, item] = best
            place_of[row, item] = used[best]
            load[best] += weight[row, item]
            used[best] += 1


@njit(cache=True)
def replicate(weight: NDArray[np.float32], slots: int, expert_of: NDArray[np.int64], count: NDArray[np.int64]) -> None:
    """Give each spare slot to the expert whose replicas carry most.

    weight: [rows, experts]; expert_of [rows, slots] and count [rows, experts] are filled.
    """
    rows, experts = weight.shape
    for row in range(rows):
        share = weight[row].copy()
        for expert in range(experts):
            expert_of[row, expert] = expert
            count[row, expert] = 1
        for slot in range(experts, slots):
            hottest = np.argmax(share)
            expert_of[row, slot] = hottest
            count[row, hottest] += 1
            share[hottest] = weight[row, hottest] / np.float32(count[row, hottest])


def hierarchical(weight: NDArray[np.float64], slots: int, groups: int, nodes: int, gpus: int) -> NDArray[np.int64]:
    """Place [layers, experts] loads: the expert of each slot, [layers, slots], slots contiguous by GPU.

    The three steps of DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB, eplb.py): groups are
    packed to nodes, each node's spare slots go one by one to its most loaded replicas, each node's replicas are packed
    to its GPUs. The published code computes in single precision, so this does. It lets one GPU hold an expert twice.
    """
    layers, experts = weight.shape
    single = weight.astype(np.float32)
    group_size, node_experts, node_slots = experts // groups, experts // nodes, slots // nodes

    group_load = single.reshape(layers, groups, group_size).sum(axis=-1, dtype=np.float32)
    node_of = np.empty((layers, groups), dtype=np.int64)
    place_of = np.empty((layers, groups), dtype=np.int64)
    pack_equal(group_load, nodes, node_of, place_of)
    # The experts of each node, groups in the order in which they were packed: [layers, nodes x node_experts].
    group_at = np.argsort(node_of * (groups // nodes) + place_of, axis=-1)
    members = (group_at[:, :, None] * group_size + np.arange(group_size)).reshape(layers, experts)

    node_load = np.take_along_axis(single, members, axis=-1).reshape(layers * nodes, node_experts)
    local = np.empty((layers * nodes, node_slots), dtype=np.int64)
    count = np.empty((layers * nodes, node_experts), dtype=np.int64)
    replicate(node_load, node_slots, local, count)

    replica_load = np.take_along_axis((node_load / count).astype(np.float32), local, axis=-1)
    gpu_of = np.empty_like(local)
    place = np.empty_like(local)
    pack_equal(replica_load, gpus // nodes, gpu_of, place)
    slot_of = gpu_of * (slots // gpus) + place
    placed = np.empty_like(local)
    np.put_along_axis(placed, slot_of, local, axis=-1)

    first = (np.arange(nodes) * node_experts)[:, None]
    index = (placed.reshape(layers, nodes, node_slots) + first).reshape(layers, slots)
    return np.asarray(np.take_along_axis(members, index, axis=-1), dtype=np.int64)


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Fit the mix of all loads by the published algorithm; groups that do not divide by the nodes fall back to one.

    `notes["hierarchy"]` says which of the two ran. Raises Infeasible where the ranks do not divide by the nodes or the
    experts by the groups.
    """
    groups, nodes = request.groups, request.nodes
    if groups == 1 or groups % nodes:
        groups = nodes = 1
    if request.ranks % nodes:
        raise Infeasible(
            f"{request.ranks} GPUs do not divide by {nodes} nodes",
            mend="give a number of GPUs that the nodes share evenly",
            reason="ranks_not_divisible",
        )
    if request.experts % groups:
        raise Infeasible(
            f"{request.experts} experts do not divide by {groups} groups",
            mend="give the model's own number of groups",
            reason="groups_not_divisible",
        )
    table = hierarchical(request.mix(), request.slots, groups, nodes, request.ranks)
    ran = f"{groups} groups on {nodes} nodes" if groups > 1 else "one group"
    return request.placement(table, "eplb", hierarchy=ran)
