"""Replayed gradients equal eager ones bit for bit; captures follow plans and shapes; a refusal is one warning.

On the CPU a list of operations stands in for the capture: a replay runs them again on the memory that was there, and
nothing else, so whatever Python decides in an iteration, outside the plan, shows as a difference from eager training.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import captured_gradients
from captured_gradients import CapturedGradients, Results
from few_shot_learning_system import MAMLFewShotClassifier
from tests.test_few_shot_learning_system import tiny_batch, tiny_model

LSLR = "learnable_per_layer_per_step_inner_loop_learning_rate"
MAMLPP: dict[str, Any] = {LSLR: True, "per_step_bn_statistics": True, "use_multi_step_loss_optimization": True}
MAMLPP |= {"multi_step_loss_num_epochs": 3, "clamp_outer_gradients": 0.01, "first_order_to_second_order_epoch": 0}
METHODS: dict[str, dict[str, Any]] = {
    "MAML": {}, "CxGrad": {"contextual_grad": True},
    "CxGrad MAML++": {**MAMLPP, "contextual_grad": True},
    "ALFA": {"alfa": True}, "L2F": {"attenuate": True}, "ANIL": {"inner_loop_part": "head"},
    "BOIL": {"inner_loop_part": "body"}, "Meta-SGD": {"meta_sgd": True}, "running": {"batch_norm": "running"},
    "CxGrad two tasks per pass": {"contextual_grad": True, "tasks_per_pass": 2},
    "CxGrad checkpointed": {"contextual_grad": True, "checkpoint_inner_steps": True},
    "MAML++ checkpointed": {**MAMLPP, "checkpoint_inner_steps": True, "tasks_per_pass": 2},
}  # fmt: skip
EPOCHS = (0, 0, 0, 1, 1, 1, 3, 3, 3)


class Recording(TorchDispatchMode):
    """All operations that run within it, with the tensors that they took and made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to make sure of that takes time in each call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args_now, kwargs_now = aliases(args), {name: aliases(value) for name, value in kwargs.items()}
        made = func(*args, **kwargs)
        taken = {memory(tensor) for tensor in tensors_in([args, *kwargs.values()])}
        # none of a view, and of what is written in place
        places = [None if memory(place) in taken else place.detach() for place in tensors_in([made])]
        self.calls.append((func, args_now, kwargs_now, places))
        return made

    def replay(self) -> None:
        """Run the operations again; each puts what it makes where it was put before."""
        for func, args, kwargs, places in self.calls:
            made = func(*aliases(args), **{name: aliases(value) for name, value in kwargs.items()})
            if any(place is not None for place in places):
                for place, value in zip(places, tensors_in([made]), strict=True):
                    if place is not None:
                        place.copy_(value)


def aliases(value: Any) -> Any:
    """The same memory in the shapes of now, which operations such as `squeeze_` change."""
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(aliases, value)) if isinstance(value, list | tuple) else value


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Operators take and return tensors and lists of them; torch's functions for trees of any kind take far longer."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class StandIn:
    """This recorder lists the operations that a function runs; a replay runs them again on the same memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.captures, self.replays, self.warm_ups = model, 0, 0, 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.warm_ups += 1
        yield

    def record(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with Recording() as recording:
            results = function()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)  # a CUDA capture lists operations only, here they have run as well
        for place in (*results, *(p.grad for p in self.model.parameters() if p.grad is not None)):
            place.detach().fill_(torch.nan)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                recording.replay()

        return results, replay


def captured_model(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[MAMLFewShotClassifier, StandIn]:
    model = tiny_model(dtype, **options)
    recorder = StandIn(model)
    model.captured = CapturedGradients(model._meta_gradients, model, recorder)
    return model, recorder


def train(model: MAMLFewShotClassifier, epochs: Sequence[int], first: int = 0, tasks: int = 2) -> list[Any]:
    """Run an iteration in each epoch; return all reports and logits, which the experiment reads later too."""
    kept = []
    for number, epoch in enumerate(epochs, first):
        kept.append(model.run_train_iter(tiny_batch(tasks, seed=number, dtype=torch.float32), epoch))
        model.zero_grad()
        if number % 4 == 3:
            model.run_validation_iter(tiny_batch(2, seed=100 + number, dtype=torch.float32))
    return kept


def everything(model: MAMLFewShotClassifier, kept: Sequence[Any]) -> list[Tensor]:
    """Return weights, statistics, Adam's state, and all losses, accuracies and logits."""
    adam = [x for state in model.optimizer.state_dict()["state"].values() for x in state.values()]
    scores = [x for report, logits in kept for x in (report["loss"], report["accuracy"], *logits)]
    return [*model.state_dict().values(), *adam, *scores]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.usefixtures("no_coverage")
@pytest.mark.parametrize("method", METHODS)
def test_replayed_training_equals_eager_training_bit_for_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_gradients, "WARM_UP", 1)
    eager = tiny_model(torch.float32, **METHODS[method])
    replayed, recorder = captured_model(**METHODS[method])
    # of MAML++: first order with MSL, second order with MSL, second order without
    epochs, plans = (EPOCHS, 3) if "MAML++" in method else (EPOCHS[:4], 1)
    expected = everything(eager, train(eager, epochs))
    assert same(everything(replayed, train(replayed, epochs)), expected)
    assert (recorder.captures, recorder.warm_ups, recorder.replays) == (plans, plans, len(epochs) - plans)


def test_a_capture_follows_three_eager_calls_and_every_change_of_shape_or_dtype() -> None:
    model, recorder = captured_model()
    train(model, [0] * 5)
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (3, 1, 2)
    train(model, [0] * 4, tasks=1)
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (6, 2, 3)
    model.double()
    model.optimizer.state.clear()  # moments stay float32
    train(model, [0] * 4, tasks=1)
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (9, 3, 4)


def test_the_gradients_of_a_replay_are_those_that_the_next_one_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_gradients, "WARM_UP", 0)
    model, _ = captured_model(contextual_grad=True)
    train(model, [0])
    assert all(p.grad is None for p in model.parameters())
    batches = [tiny_batch(seed=seed, dtype=torch.float32) for seed in (0, 1)]
    model.run_train_iter(batches[0], 0)
    gradients = [p.grad for p in model.parameters()]
    model.run_train_iter(batches[1], 0)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nstack"), torch.OutOfMemoryError("full")])
def test_a_refused_capture_is_one_warning_and_the_run_goes_on(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(captured_gradients, "WARM_UP", 1)
    eager = tiny_model(torch.float32, **MAMLPP)
    model, recorder = captured_model(**MAMLPP)

    def refuse(function: Callable[[], Results]) -> Any:
        function()  # the gradients are then tensors that nothing fills
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
        raise error

    expected = everything(eager, train(eager, EPOCHS))
    kept = train(model, EPOCHS[:1])
    before = [buffer.clone() for buffer in model.buffers()]
    monkeypatch.setattr(recorder, "record", refuse)
    kept += train(model, EPOCHS[1:], first=1)
    assert same(everything(model, kept), expected)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning == f"going on without CUDA graphs: {str(error).splitlines()[0]}"


def test_no_capture_takes_memory_while_an_eager_form_is_measured() -> None:
    model, recorder = captured_model(contextual_grad=True)
    held = []
    meta_gradients = model._meta_gradients

    def noting(*inputs: Any) -> Results:
        held.append(model.captured is not None and model.captured.captured is not None)
        return meta_gradients(*inputs)

    model._meta_gradients = noting  # type: ignore[assignment, method-assign]
    tasks = model._to_device(tiny_batch(2, dtype=torch.float32))
    for form, run in model._forms(tasks, [1, 2]):
        for _ in range(captured_gradients.WARM_UP + 1):
            run()
        assert bool(recorder.replays) and not any(held), form


def test_an_error_of_the_learner_itself_is_no_refusal() -> None:
    model, _ = captured_model(inner_loop_part="head")
    model._planned_losses = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        train(model, [0])


@pytest.mark.usefixtures("no_coverage")
def test_a_run_that_is_resumed_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_gradients, "WARM_UP", 1)
    through, _ = captured_model(**METHODS["CxGrad MAML++"])
    kept = train(through, [1] * 6)
    stopped, _ = captured_model(**METHODS["CxGrad MAML++"])
    first = train(stopped, [1] * 3)
    stopped.save_model(tmp_path / "run_latest", {})
    resumed, recorder = captured_model(seed=1, **METHODS["CxGrad MAML++"])
    train(resumed, [1] * 3)  # a capture before loading is one of the same tensors
    resumed.load_model(tmp_path, "run", "latest")
    rest = train(resumed, [1] * 3, first=3)
    assert recorder.replays > 3
    assert same(everything(resumed, [*first, *rest]), everything(through, kept))


def test_without_a_gpu_nothing_is_captured() -> None:
    assert tiny_model().captured is None and tiny_model(cuda_graph="off").captured is None
