"""What passes between processes, recorded on made-up groups; real processes are in test_experiment_builder.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.testing._internal.distributed import fake_pg

from data import Episodes
from few_shot_learning_system import build_learner
from meta_test import query_logits
from tests.stand_in_cuda import CUDA, stand_in_cuda
from tests.test_stand_in_cuda import gradient_options, head_options, made_split
from utils import distributed
from utils.devices import choose_device
from utils.errors import UserError
from utils.options import Options

Message = tuple[str, torch.dtype, tuple[int, ...]]


@contextmanager
def recorded(rank: int) -> Iterator[list[Message]]:
    """Inside, this is process `rank` of two on stand-in GPUs; the list receives what it sends to the other."""
    messages: list[Message] = []

    def note(name: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.device == CUDA and tensor.is_contiguous()
            messages.append((name, tensor.dtype, tuple(tensor.shape)))

    def gather(gathered: Tensor, local: Tensor) -> None:
        assert gathered.numel() == 2 * local.numel()
        note("all_gather", gathered, local)

    dist.init_process_group("fake", rank=rank, world_size=2, store=fake_pg.FakeStore())
    try:
        with (
            mock.patch.object(dist, "all_reduce", lambda tensor, *_: note("all_reduce", tensor)),
            mock.patch.object(dist, "all_gather_into_tensor", gather),
            mock.patch.object(dist, "broadcast_object_list", side_effect=AssertionError("an object travels")),
        ):
            yield messages
    finally:
        dist.destroy_process_group()


HEAD = head_options("conv64", "Ridge", num_evaluation_tasks=2)
CXGRAD = gradient_options(contextual_grad=True, batch_norm="running", num_evaluation_tasks=2)


@pytest.mark.parametrize("options", [HEAD, CXGRAD], ids=["head", "CxGrad"])
def test_processes_send_the_same_messages_from_their_gpus_without_a_wait(options: Options) -> None:
    sent = [messages_of(options, rank) for rank in range(2)]
    assert sent[0] == sent[1]
    iteration, scoring = sent[0]
    assert [name for name, *_ in iteration] == ["all_reduce"] * 2  # the gradients, the running statistics
    assert all(dtype == torch.float32 for _, dtype, _ in iteration)
    assert {name for name, *_ in scoring} == {"all_gather"}


def messages_of(options: Options, rank: int) -> tuple[list[Message], list[Message]]:
    """Return what a training iteration sends, and what the scoring of two tasks does."""
    with stand_in_cuda() as mode, recorded(rank) as messages:
        model = build_learner("cuda", options)
        split = made_split(options.image_height)
        task = options.training_task
        episodes = Episodes(split, *task, 0, (0.5,) * 3, (0.25,) * 3, torch.device("cuda"))
        mode.forbid = True
        model.run_train_iter(episodes.batch(rank, 1), 0)
        iteration = list(messages)
        messages.clear()
        mode.forbid = False  # scores are read, at the end
        with mock.patch.object(Tensor, "item", lambda _: 0.0):
            query_logits([model], episodes, options, "")
        return iteration, list(messages)


@pytest.mark.parametrize(("rank", "machine", "place", "key"), [(1, 0, 1, 0), (2, 1, 0, 0), (3, 1, 1, 1)])
def test_a_process_waits_for_the_one_before_it(
    rank: int, machine: int, place: int, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines of two: the first of each machine waits for the main process, the second for the first."""
    monkeypatch.setenv("GROUP_RANK", str(machine))
    monkeypatch.setenv("LOCAL_RANK", str(place))
    store = mock.Mock()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    with distributed.main_first():
        ((keys, patience),) = [call.args for call in store.wait.call_args_list]
        assert keys[0].endswith(f" on {key}") and patience > distributed.PATIENCE
        assert not store.set.called
    assert store.set.called == (place == 0)


def test_a_process_takes_the_gpu_of_its_place_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two machines with two GPUs each."""
    chosen: list[Any] = []
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("2,3") == torch.device("cuda", 3)
    assert choose_device(None) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 3), torch.device("cuda", 1)]
    with pytest.raises(UserError, match=r"names 4 GPUs but 2 process"):
        choose_device("0,1,2,3")


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        ((-9, 3), "process 0 .* was killed by SIGKILL"),  # the second missed it and said so
        ((3, 1), "process 1 .* failed; its traceback is above"),
        ((-15, -9), "process 1 .* was killed by SIGKILL"),  # torchrun ended the first for it
        ((1, -15), "process 0 .* failed"),
        ((-15, -15), "process 0 .* was killed by SIGTERM"),
        ((3, -15), 3),  # an error that it has told by itself
        ((2, 3), 2),
    ],
)
def test_the_process_that_ended_by_itself_is_named_before_those_that_missed_it(
    ended: tuple[int, int], told: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of two processes torchrun sees end first cannot be arranged, so its error is made here."""
    failures = {rank: ProcessFailure(rank, 1000 + rank, status, "<N/A>") for rank, status in enumerate(ended)}
    monkeypatch.setattr(torch.distributed.run, "main", mock.Mock(side_effect=ChildFailedError("train", failures)))
    with pytest.raises(UserError if isinstance(told, str) else SystemExit) as error:
        distributed.launch(2)
    if isinstance(told, str):
        assert error.match(told)
    else:
        assert error.value.code == told  # type: ignore[attr-defined]
