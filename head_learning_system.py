"""The head learner: an embedding trained through a base learner that is solved inside each task (MetaOptNet).

Adapting is embedding the support images; predicting solves the base learner on them and scores the query images. The
body of a network that was trained by gradient steps serves as an embedding too, frozen.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from classification_heads import ClassificationHead, HeadOptions, head_options
from inner_loop_optimizers import chosen_rules, official_bias
from learner import DataBatch, FewShotLearner, Tasks, cross_entropy, largest_of_tasks
from meta_neural_network_architectures import DropBlock, Pass, build_backbone, build_embedding
from utils import metaoptnet
from utils.errors import UserError
from utils.official_checkpoints import without_prefix
from utils.options import Options, declaration, unmet

log = logging.getLogger(__name__)

MOMENTUM = 0.9
UNSOLVED = 1e-6  # relative KKT residual above which a task's head counts as not solved; 1e-9 and less is usual


class Support(NamedTuple):
    """This is what prediction needs of the support images of some tasks."""

    features: Tensor  # (tasks, n, d)
    labels: Tensor  # (tasks, n)


class Losses(NamedTuple):
    """These are the losses of some training tasks, and what they were made of."""

    losses: Tensor  # (tasks,)
    logits: Tensor  # (tasks, n, way)
    unsolved: Tensor  # (tasks,), whether the base learner was not solved
    embeddings: Tensor  # (tasks,), the largest absolute entry of a task's features


class FrozenBody(nn.Module):
    """This module makes features of a network with an inner loop: (tasks, n, C, H, W) -> (tasks, n, d)."""

    def __init__(self, image_shape: tuple[int, int, int], options: Options) -> None:
        super().__init__()
        self.classifier = build_backbone(image_shape, options, official_bias(chosen_rules(options)))
        self.at = Pass(use_running=options.batch_norm != "transductive")

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(task.unsqueeze(0), self.at) for task in images])


class HeadFewShotClassifier(FewShotLearner):
    """An embedding and a base learner; the interface is that of `MAMLFewShotClassifier`.

    Args:
        im_shape: (batch, C, H, W) of the images.
        device: where everything runs.
        args: any object with attributes named as in `utils.options.Options`; missing ones take the defaults. With
            ``learner`` = gradient the embedding is the frozen body of such a learner, and the head learns nothing.
    """

    options: HeadOptions
    counts = ("unsolved",)
    checked = ("pixels", "embeddings", "solver", "losses", "gradients")

    def __init__(self, im_shape: Sequence[int], device: torch.device | str, args: object) -> None:
        super().__init__(im_shape, device, args)
        self.on_body = self.options.learner == "gradient"
        if not self.on_body:
            self.file_names, self.suffix = {"latest": "last_epoch.pth", "best": "best_model.pth"}, ".pth"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)  # the initial weights are a function of the seed alone
            build = FrozenBody if self.on_body else build_embedding
            self.embedding = build(self.image_shape, self.options)
        drops = [module for module in self.embedding.modules() if isinstance(module, DropBlock)]
        self.counts_evaluation = any(drop.counts_evaluation for drop in drops)
        self.head = ClassificationHead(str(self.options.head), enable_scale=not self.on_body)
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
        """Images (tasks, n, C, H, W) -> features (tasks, n, d); weights are shared, so all images are one batch."""
        if self.on_body:
            features: Tensor = self.embedding(images)
            return features
        with self._precision():
            embedded = self.embedding(images.flatten(0, 1))
        return embedded.unflatten(0, images.shape[:2]).to(images.dtype)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _passes(self, tasks: Tasks) -> Iterator[Tasks]:
        """Evaluation tasks: singly where DropBlock counts them, as the official program does."""
        if not self.counts_evaluation:
            return super()._passes(tasks)
        return map(Tasks._make, zip(*(tensor.split(1) for tensor in tasks), strict=True))

    def adapt(self, x_support: Tensor, y_support: Tensor) -> Support:
        """Embed support images (tasks, n, C, H, W); batch norm uses its running statistics."""
        self.eval()
        with torch.no_grad():
            return Support(self.features(x_support), y_support)

    def predict(self, state: Support, x_query: Tensor) -> Tensor:
        """Return logits (tasks, n, way) of query images (tasks, n, C, H, W); NaN where a head was not solved."""
        logits, unsolved = self._score(state, x_query)
        return logits if self.options.svm_on_failure == "use" else logits.masked_fill(unsolved[:, None, None], math.nan)

    @torch.no_grad()
    def _score(self, state: Support, x_query: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and whether the head of each task (tasks,) was not solved."""
        self.eval()
        way = self.options.evaluation_task[0]
        return solve(self.head, self.options, state, self.features(x_query), way)

    def run_validation_iter(
        self, data_batch: DataBatch, current_iter: int | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Score a meta-batch as `FewShotLearner` does; `losses` counts the tasks whose head was `unsolved`."""
        tasks = self._to_device(data_batch, self.options.evaluation_task[0])
        parts = [self._score(self.adapt(part.x_support, part.y_support), part.x_query) for part in self._passes(tasks)]
        logits, unsolved = (torch.cat(part) for part in zip(*parts, strict=True))
        report, predictions = self._report(cross_entropy(logits, tasks.y_query), logits, tasks.y_query)
        return report | {"unsolved": unsolved.sum()}, predictions

    def _set_gradients(self, tasks: Tasks, epoch: int) -> tuple[dict[str, Any], list[Tensor]]:
        """As in `FewShotLearner`; the metrics count the tasks whose head was `unsolved`."""
        self.train()
        self.optimizer.zero_grad()
        losses, logits, unsolved, embeddings = self.query_losses(tasks)
        left_out = unsolved if self.options.svm_on_failure != "use" else torch.zeros_like(unsolved)
        loss = losses.sum() / (~left_out).sum().clamp_min(1)
        loss.backward()
        failed = unsolved if self.options.svm_on_failure == "error" else torch.zeros_like(unsolved)
        report, predictions = self._report(losses.detach(), logits.detach(), tasks.y_query)
        report |= {"embeddings": embeddings, "solver": torch.zeros_like(embeddings).masked_fill(failed, math.inf)}
        return report | {"loss": loss.detach(), "unsolved": unsolved.sum()}, predictions

    def query_losses(self, tasks: Tasks) -> Losses:
        """Return the training losses of tasks, in the graph.

        Support and query images pass the embedding separately, so batch norm sees them as two batches (as official).
        """
        options = self.options
        support, query = Support(self.features(tasks.x_support), tasks.y_support), self.features(tasks.x_query)
        logits, unsolved = solve(self.head, options, support, query, options.num_classes_per_set)
        losses = cross_entropy(logits, tasks.y_query, options.label_smoothing)
        if options.svm_on_failure != "use":
            losses = torch.where(unsolved & losses.isfinite(), torch.zeros_like(losses), losses)
        embeddings = torch.maximum(largest_of_tasks(support.features.detach()), largest_of_tasks(query.detach()))
        return Losses(losses, logits, unsolved, embeddings)

    def protocol(self) -> dict[str, Any]:
        used = sorted(head_options(self.options).items(), key=lambda option: option[0].endswith("_reg"))
        words = [f"{name}={value}" if name.endswith("_reg") else str(value) for name, value in used]
        return super().protocol() | {"head": " ".join([str(self.options.head), *words])}

    def _blame(self, name: str, value: float, places: Sequence[int]) -> tuple[str, str]:
        if name == "embeddings":
            return f"an embedding is {value}", self.cure
        if name == "solver":
            return f"the {self.options.head} was not solved", self._cure_of_solver()
        return super()._blame(name, value, places)

    def _cure_of_solver(self) -> str:
        may_go_on = unmet(declaration("svm_on_failure").only, self.options) is None
        other = "; or --svm_on_failure skip or use" if may_go_on else ""
        return f"Lower --meta_learning_rate if embeddings grow without bound{other}"

    def check_scores(self, counts: Mapping[str, float]) -> None:
        """Raise UserError, or warn where the options say so, if the head of a task that was scored was not solved."""
        if not (count := int(counts["unsolved"])):
            return
        problem = f"the {self.options.head} of {count} tasks was not solved"
        if self.options.svm_on_failure == "error" and self.options.on_nonfinite == "stop":
            raise UserError(f"{problem}. {self._cure_of_solver()}")
        log.warning("%s; they are scored as they are", problem)

    def _set_learning_rate(self, epoch: int) -> None:
        official = self.options.lr_schedule == "steps_official"
        self.set_learning_rate(metaoptnet.learning_rate(self.options.meta_learning_rate, epoch, official))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {"embedding": self.embedding.state_dict(), "head": self.head.state_dict()}

    def weights_in(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if self.on_body:
            network = without_prefix(super().weights_in(state))
            body = {f"embedding.{name}": t for name, t in network.items() if name.startswith("classifier.")}
            return body | {"head.scale": torch.ones(1)}
        if "embedding" not in state:
            raise UserError("it was trained by gradient steps, this model with --learner head")
        found = {
            f"{part}.{name}": tensor
            for part in ("embedding", "head")
            for name, tensor in without_prefix(state.get(part, {"scale": torch.ones(1)})).items()
        }
        counters = {name: torch.zeros_like(t) for name, t in self.state_dict().items() if name.endswith(".forwards")}
        return counters | found  # official files do not hold DropBlock's counters


def solve(
    head: ClassificationHead, options: HeadOptions, support: Support, query: Tensor, way: int
) -> tuple[Tensor, Tensor]:
    """Return logits (tasks, n, way) of query features (tasks, n, d), and which tasks (tasks,) were not solved."""
    shot = support.labels.shape[1] // way
    logits, residuals = head.solve_and_score(
        query, support.features, support.labels, way, shot, **head_options(options)
    )
    bound = math.inf if options.svm_solver == "qpth" else UNSOLVED  # qpth's float32 never comes that far
    return logits, ~((residuals <= bound) & logits.isfinite().all(dim=(1, 2)))
