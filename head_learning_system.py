"""The head learner: an embedding trained through a base learner that is solved inside each task (MetaOptNet).

Adapting is embedding the support images; predicting solves the base learner on them and scores the query images.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from classification_heads import ClassificationHead
from learner import DataBatch, FewShotLearner, Tasks, cross_entropy
from meta_neural_network_architectures import DropBlock, ProtoNetConv64, R2D2Net, ResNet12Embedding
from utils import distributed, metaoptnet
from utils.errors import UserError
from utils.official_checkpoints import without_prefix
from utils.options import Options

MOMENTUM = 0.9
UNSOLVED = 1e-6  # relative KKT residual above which a task's SVM counts as not solved; 1e-9 and less is usual


class Support(NamedTuple):
    """What prediction needs of the support images of some tasks."""

    features: Tensor  # (tasks, n, d)
    labels: Tensor  # (tasks, n)


class HeadFewShotClassifier(FewShotLearner):
    """An embedding and a base learner; the interface is that of `MAMLFewShotClassifier`.

    Args:
        im_shape: (batch, C, H, W) of the images.
        device: where everything runs.
        args: any object with attributes named as in `utils.options.Options`; missing ones take the defaults.
    """

    file_names: ClassVar = {"latest": "last_epoch.pth", "best": "best_model.pth"}
    suffix = ".pth"

    def __init__(self, im_shape: Sequence[int], device: torch.device | str, args: object) -> None:
        super().__init__(im_shape, device, args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)  # the initial weights are a function of the seed alone
            self.embedding = build_embedding(self.image_shape, self.options)
        self.head = ClassificationHead(str(self.options.head))
        self.to(self.device)
        if self.device.type == "cpu" or self.options.precision != "float32":
            self.embedding.to(memory_format=torch.channels_last)  # faster there; not measured on a GPU
        groups = [{"params": self.embedding.parameters()}, {"params": self.head.parameters()}]
        self.optimizer = torch.optim.SGD(
            groups,
            lr=self.options.meta_learning_rate,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=self.options.outer_weight_decay,
        )

    def features(self, images: Tensor) -> Tensor:
        """Images (tasks, n, C, H, W) -> features (tasks, n, d); the images of all tasks are one batch."""
        with self._precision():
            embedded = self.embedding(images.flatten(0, 1))
        return embedded.unflatten(0, images.shape[:2]).to(images.dtype)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _passes(self, tasks: Tasks) -> Iterator[Tasks]:
        """Evaluation tasks: singly where DropBlock counts them, as the official program does."""
        if any(isinstance(module, DropBlock) and module.counts_evaluation for module in self.embedding.modules()):
            return map(Tasks._make, zip(*(tensor.split(1) for tensor in tasks), strict=True))
        return super()._passes(tasks)

    def adapt(self, x_support: Tensor, y_support: Tensor) -> Support:
        """Embed support images (tasks, n, C, H, W); batch norm uses its running statistics."""
        self.eval()
        with torch.no_grad():
            return Support(self.features(x_support), y_support)

    @torch.no_grad()
    def predict(self, state: Support, x_query: Tensor) -> Tensor:
        """Logits (tasks, n, way) of query images (tasks, n, C, H, W)."""
        logits, unsolved = solve(
            self.head, self.options, state, self.features(x_query), self.options.evaluation_task[0]
        )
        self._count_unsolved(unsolved)
        return logits

    def run_train_iter(
        self, data_batch: DataBatch, epoch: float, current_iter: int | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """One step of SGD on a meta-batch; returns (losses, per-task query logits), left on the device.

        `losses` counts the tasks whose SVM was `unsolved`. Epoch (its whole part) decides on the learning rate.
        """
        if current_iter is not None:
            self.iterations_done = current_iter
        self.train()
        self._set_learning_rate(int(epoch))
        self.optimizer.zero_grad()
        tasks = self._to_device(data_batch)
        losses, logits, unsolved = self.query_losses(tasks)
        left_out = unsolved if self.options.svm_on_failure != "use" else torch.zeros_like(unsolved)
        loss = losses.sum() / (~left_out).sum().clamp_min(1)
        loss.backward()
        distributed.average_gradients(self.parameters())
        distributed.average([buffer for buffer in self.buffers() if buffer.is_floating_point()])
        self.optimizer.step()
        self.iterations_done += 1
        report, predictions = self._report(losses.detach(), logits.detach(), tasks.y_query)
        return report | {"loss": loss.detach(), "unsolved": unsolved.sum()}, predictions

    def query_losses(self, tasks: Tasks) -> tuple[Tensor, Tensor, Tensor]:
        """Training loss of each task (tasks,), its logits (tasks, n, way) and whether it was not solved (tasks,).

        Support and query images pass the embedding separately, so batch norm sees them as two batches (as official).
        """
        options = self.options
        support = Support(self.features(tasks.x_support), tasks.y_support)
        logits, unsolved = solve(self.head, options, support, self.features(tasks.x_query), options.num_classes_per_set)
        losses = cross_entropy(logits, tasks.y_query, options.label_smoothing)
        if options.svm_on_failure != "use":
            losses = torch.where(unsolved & losses.isfinite(), torch.zeros_like(losses), losses)
        return losses, logits, unsolved

    def _set_learning_rate(self, epoch: int) -> None:
        official = self.options.lr_schedule == "steps_official"
        self.set_learning_rate(metaoptnet.learning_rate(self.options.meta_learning_rate, epoch, official))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {"embedding": self.embedding.state_dict(), "head": self.head.state_dict()}

    def weights_in(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if "embedding" not in state:
            raise UserError("it was trained by gradient steps, this model with --learner head")
        given = {
            f"{part}.{name}": tensor
            for part in ("embedding", "head")
            for name, tensor in without_prefix(state.get(part, {"scale": torch.ones(1)})).items()
        }
        counters = {name: torch.zeros_like(t) for name, t in self.state_dict().items() if name.endswith(".forwards")}
        return counters | given  # official files do not hold DropBlock's counters


def solve(
    head: ClassificationHead, options: Options, support: Support, query: Tensor, way: int
) -> tuple[Tensor, Tensor]:
    """Logits (tasks, n, way) of query features (tasks, n, d), and which tasks' heads were not solved (tasks,)."""
    shot = support.labels.shape[1] // way
    logits, residuals = head.solve_and_score(
        query, support.features, support.labels, way, shot, **options.solver_options
    )
    bound = math.inf if options.svm_solver == "qpth" else UNSOLVED  # qpth's float32 never comes that far
    return logits, ~((residuals <= bound) & logits.isfinite().all(dim=(1, 2)))


def build_embedding(image_shape: tuple[int, int, int], options: Options) -> nn.Module:
    try:
        if options.backbone == "conv64":
            return ProtoNetConv64(image_shape)
        if options.backbone == "R2D2Net":
            return R2D2Net(image_shape)
        widths = options.resnet_width_list
        return ResNet12Embedding(
            image_shape,
            (widths[0], widths[1], widths[2], widths[3]),
            avg_pool=options.avg_pool,
            dropblock_schedule=options.dropblock_schedule,
        )
    except ValueError as error:
        raise UserError(f"{error}: use larger images") from error
