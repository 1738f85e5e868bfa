"""Process groups of a launch: replicas of tensor-parallel ranks, the errors, and no launch at all."""

import socket

import pytest
import torch
import torch.distributed as dist
from ranks import RankContext, launch_ranks

from megatron_ssm.collectives import OUT_PROJ, ParallelGroups, init_groups, make_reduction


def stand(context: RankContext, tensor_size: int | None) -> tuple:
    groups = init_groups(tensor_size, "cpu", timeout=30)
    with make_reduction(groups.tensor_group, "cpu") as reduction:
        assert (reduction.rank, reduction.size) == (groups.tensor_rank, groups.tensor_size)
        total = reduction.reduce(torch.tensor([10.0**context.rank]), OUT_PROJ).item()
    gathered = groups.gather_objects({"world rank": context.rank})
    local = groups.on_this_host(f"world rank {context.rank}")
    return groups.tensor_rank, groups.tensor_size, groups.replica, groups.replicas, total, gathered, local


@pytest.mark.parametrize(
    "tensor_size, expected",
    [
        (None, [(0, 4, 0, 1, 1111), (1, 4, 0, 1, 1111), (2, 4, 0, 1, 1111), (3, 4, 0, 1, 1111)]),
        (2, [(0, 2, 0, 2, 11), (1, 2, 0, 2, 11), (0, 2, 1, 2, 1100), (1, 2, 1, 2, 1100)]),
        (1, [(0, 1, 0, 4, 1), (0, 1, 1, 4, 10), (0, 1, 2, 4, 100), (0, 1, 3, 4, 1000)]),
    ],
)
def test_consecutive_ranks_share_a_model(ranks, tensor_size, expected):
    found = ranks(stand, 4, tensor_size)
    assert [entry[:5] for entry in found] == expected
    leaders = [{"world rank": rank} for rank in range(0, 4, tensor_size or 4)]
    assert [entry[5] for entry in found] == [leaders, None, None, None]
    assert [entry[6] for entry in found] == [([f"world rank {rank}" for rank in range(4)], rank) for rank in range(4)]


def ask_for_three(context: RankContext) -> None:
    for tensor_size in (3, 0, 8):
        with pytest.raises(ValueError, match=f"expected a divisor of the world size 4, found {tensor_size}"):
            init_groups(tensor_size, "cpu", timeout=30)


def test_world_size_is_a_multiple(ranks):
    ranks(ask_for_three, 4)


def clear_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("tensor_size", [None, 1])
def test_without_a_launcher(monkeypatch, tensor_size):
    clear_launch(monkeypatch)
    groups = init_groups(tensor_size, "cpu")
    assert groups == ParallelGroups(None, 0, 1, 0, 1)
    assert groups.gather_objects("answer") == ["answer"]
    assert groups.on_this_host("value") == (["value"], 0)
    assert not dist.is_initialized()


def test_more_ranks_need_a_launcher(monkeypatch):
    clear_launch(monkeypatch)
    with pytest.raises(ValueError, match="found 2; start the program with deepspeed or torchrun"):
        init_groups(2, "cpu")
    with pytest.raises(ValueError, match="expected cpu or cuda, found meta"):
        init_groups(1, "meta")


def launched() -> None:
    groups = init_groups(device="cpu", timeout=30)
    with make_reduction(groups.tensor_group, "cpu") as reduction:
        total = reduction.reduce(torch.tensor([groups.tensor_rank + 1.0]), OUT_PROJ).item()
        print(groups.tensor_rank, groups.tensor_size, dist.get_backend(), total, *groups.on_this_host(0))
    dist.destroy_process_group()


def launched_wrongly() -> None:
    init_groups(3, "cpu", timeout=30)


def test_a_launch_initialises_torch_distributed(monkeypatch):
    clear_launch(monkeypatch)
    ended = launch_ranks(launched, 2)
    assert [rank.stdout for rank in ended] == ["0 2 gloo 3.0 [0, 0] 0\n", "1 2 gloo 3.0 [0, 0] 1\n"], ended
    assert [rank.returncode for rank in ended] == [0, 0]


def test_a_wrong_launch_fails_on_every_rank(monkeypatch):
    clear_launch(monkeypatch)
    for rank in launch_ranks(launched_wrongly, 2):
        assert rank.returncode == 1
        assert "ValueError: tensor-parallel size: expected a divisor of the world size 2, found 3" in rank.stderr


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=rf"cannot meet at 127.0.0.1:{port}, which another run may use"):
            init_groups(timeout=5)
