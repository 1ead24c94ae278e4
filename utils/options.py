"""Every option of training and testing: one typed field each, with its meaning and default.

Order of precedence: default < JSON file (``--name_of_args_json_file``) < command line.
Names are those of the official CxGrad and MAML++ programs, because users' scripts and JSON files hold them.
"""

import argparse
import dataclasses
import difflib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from utils import metaoptnet
from utils.errors import UserError
from utils.names import canonical_name

log = logging.getLogger(__name__)
T = TypeVar("T")


def opt(default: T, meaning: str, choices: Sequence[str] = (), aliases: Mapping[str, str] | None = None) -> T:
    """A dataclass field that carries its meaning, which the command line's help prints.

    `aliases` are other programs' words for some of the choices.
    """
    return dataclasses.field(default=default, metadata={"help": meaning, "choices": choices, "aliases": aliases or {}})


@dataclasses.dataclass
class Options:
    """Resolved options of one run. Construct through `parse_args`, `from_object` or `from_mapping`; all validate.

    The defaults are those of a gradient learner; `utils.metaoptnet` holds what differs with ``learner`` = head.
    """

    learner: str = opt(
        "gradient",
        "gradient: inner gradient steps (MAML, CxGrad); head: a base learner solved in each task (MetaOptNet). "
        "Naming a --head without gradient steps' options chooses the latter",
        ("gradient", "head"),
    )

    # --- data -------------------------------------------------------------------------------------------------
    dataset_name: str = opt("mini_imagenet", "data set to train on: a folder under dataset_dir, or a built-in one")
    dataset_dir: str = opt("datasets", "folder that holds the data sets")
    image_height: int = opt(84, "pixels; images are resized to it")
    image_width: int = opt(84, "pixels; images are resized to it")
    image_channels: int = opt(3, "3 = RGB, 1 = grey")
    normalization: str = opt(
        "unit",
        "unit: pixels scaled to [0, 1]; channel: then each channel shifted and scaled by the train split's statistics; "
        "published: by MetaOptNet's for this data set",
        ("unit", "channel", "published"),
    )
    augment: bool = opt(False, "training images are cropped at random, colour-jittered and flipped, as MetaOptNet's")
    skip_bad_images: bool = opt(False, "leave out images that cannot be read, with a warning, instead of stopping")
    num_dataprovider_workers: int | None = opt(
        None, "processes that decode a data set's images once; default: all cores"
    )

    # --- tasks ------------------------------------------------------------------------------------------------
    num_classes_per_set: int = opt(5, "way: classes in a task")
    num_samples_per_class: int = opt(1, "shot: support images per class")
    num_target_samples: int = opt(15, "query images per class")
    test_way: int | None = opt(None, "way in validation and test, where there is a head; default: as in training")
    val_shot: int | None = opt(None, "shot in validation and test; default: as in training")
    val_query: int | None = opt(None, "query images per class in validation and test; default: as in training")
    test_shots: str | None = opt(None, "shots to meta-test with, such as 1,5; default: that of validation")
    batch_size: int = opt(4, "tasks in a training meta-batch, over all devices together")
    test_batch_size: int | None = opt(None, "tasks in a validation or test meta-batch; default: batch_size")
    tasks_per_pass: int | None = opt(
        None, "tasks computed in one vectorised pass, same gradients; default: all on a GPU, one on a CPU"
    )
    checkpoint_inner_steps: bool = opt(False, "store less, compute inner steps twice; same gradients")
    rotate_classes: bool | None = opt(
        None, "training turns each class by 0 to 3 quarters, which makes new classes; default: on for omniglot"
    )
    train_seed: int = opt(0, "seed of the stream of training tasks")
    val_seed: int = opt(0, "seed of the (separate) streams of validation and test tasks")

    # --- network ----------------------------------------------------------------------------------------------
    backbone: str = opt(
        "4-CONV",
        "gradient: network that adapts, 4-CONV or ResNet-12; head: embedding, conv64, R2D2Net or ResNet-12",
        ("4-CONV", "ResNet-12", "conv64", "R2D2Net"),
        {"ProtoNet": "conv64", "R2D2": "R2D2Net", "ResNet": "ResNet-12"},
    )
    resnet_widths: str = opt("64-128-256-512", "ResNet-12: channels of its blocks")
    avg_pool: bool = opt(False, "head: ResNet-12 averages its last map")
    dropblock_schedule: str = opt(
        "training",
        "head: what DropBlock's rate grows with. training: forward passes in training; official: also those in "
        "evaluation, as the official program counts",
        ("training", "official"),
    )
    cnn_num_filters: int = opt(48, "filters of every convolution")
    num_stages: int = opt(4, "convolution blocks")
    conv_padding: bool = opt(True, "pad convolutions by one pixel")
    max_pooling: bool = opt(True, "2x2 max-pooling; off: convolutions of stride 2 and a global average pool")
    use_bias: bool | None = opt(None, "4-CONV: biases in the convolutions; default: as official, on with ALFA and L2F")
    norm_layer: str = opt("batch_norm", "normalisation after each convolution", ("batch_norm",))
    batch_norm: str = opt(
        "transductive",
        "what normalises images in evaluation. transductive: their own statistics; per_step, running: those "
        "accumulated in training, for each inner step or for all",
        ("transductive", "per_step", "running"),
    )
    per_step_bn_statistics: bool = opt(False, "batch-norm weights and running statistics of their own for each step")
    learnable_bn_gamma: bool = opt(True, "train the batch norm's scale")
    learnable_bn_beta: bool = opt(True, "train the batch norm's shift")

    # --- inner loop -------------------------------------------------------------------------------------------
    number_of_training_steps_per_iter: int = opt(5, "inner steps in training")
    number_of_evaluation_steps_per_iter: int = opt(5, "inner steps in validation and test")
    init_inner_loop_learning_rate: float = opt(0.01, "inner learning rate (initial value where it is learned)")
    inner_loop_part: str = opt("all", "what inner steps move: all; head (ANIL); body (BOIL)", ("all", "head", "body"))
    learnable_per_layer_per_step_inner_loop_learning_rate: bool = opt(
        False, "LSLR (MAML++): learn one inner rate per tensor and step"
    )
    meta_sgd: bool = opt(False, "Meta-SGD: learn one inner rate per weight")
    alfa: bool = opt(False, "ALFA: generate inner rates and decays from the task's weights and gradients")
    random_init: bool = opt(False, "ALFA: keep the network's random initialisation, train only the rates")
    init_inner_loop_weight_decay: float = opt(0.0005, "ALFA: decay relative to the inner rate at the start")
    attenuate: bool = opt(False, "L2F: attenuate the initial weights by the task's first gradients")
    enable_inner_loop_optimizable_bn_params: bool = opt(False, "inner steps move the batch norm's scale and shift too")
    contextual_grad: bool = opt(False, "CxGrad: scale the backbone's gradients by the task's context")
    num_context_params: int = opt(100, "CxGrad: length of the context vector")
    context_params_learning_rate: float = opt(1.0, "CxGrad: step size of the context vector")

    # --- head -------------------------------------------------------------------------------------------------
    head: str | None = opt(
        None,
        "base learner on the embeddings of a task; default with --learner head: ProtoNet",
        ("ProtoNet", "Ridge", "R2D2", "SVM-CS", "SVM-He", "SVM-WW"),
        {"SVM": "SVM-CS"},
    )
    svm_solver: str = opt(
        "structured",
        "SVM-CS: structured: exact, in float64; qpth: the interior-point package that the paper used, in float32",
        ("structured", "qpth"),
    )
    svm_max_iter: int | None = opt(
        None, "qpth: iterations at most [15]; MetaOptNet's test program stops after 3, which scores differently"
    )
    svm_on_failure: str = opt(
        "error",
        "what a task does whose SVM was not solved: error: it is left out of the update and the run stops; "
        "skip: it is left out and counted; use: it counts as it is, as skip does in tests. qpth's tasks pass as solved "
        "unless they are no numbers",
        ("error", "skip", "use"),
    )

    # --- outer loop -------------------------------------------------------------------------------------------
    second_order: bool = opt(True, "differentiate through the inner gradients")
    first_order_to_second_order_epoch: int = opt(-1, "second order only in epochs after this one")
    use_multi_step_loss_optimization: bool = opt(False, "MSL (MAML++): weighted query loss after every inner step")
    multi_step_loss_num_epochs: int = opt(15, "MSL: epochs until only the last step counts")
    meta_learning_rate: float = opt(0.001, "learning rate at the start, of Adam; head: of SGD")
    min_learning_rate: float = opt(0.001, "learning rate at the end of the cosine schedule; equal: constant")
    outer_weight_decay: float = opt(0.0, "head: SGD's decay of every parameter")
    label_smoothing: float = opt(0.0, "head: part of a training target that the other classes share")
    precision: str = opt(
        "float32",
        "head: arithmetic of the embedding. tf32: convolutions and products on a GPU in TF32; bf16: autocast to it",
        ("float32", "tf32", "bf16"),
    )
    clamp_outer_gradients: float = opt(0.0, "limit of each entry of the network's outer gradient (MAML++: 10); 0: none")
    lr_schedule: str | None = opt(
        None,
        "cosine stepped per_epoch (MAML++) or per_iteration with total_epochs iterations as half period, as the "
        "official CxGrad program does; default: per_iteration with contextual_grad, else per_epoch. head: steps: times "
        "0.06, 0.012, 0.0024 after 20, 40, 50 epochs; steps_official: one epoch early, as the official program",
        ("per_epoch", "per_iteration", "steps", "steps_official"),
    )

    # --- experiment -------------------------------------------------------------------------------------------
    experiment_name: str = opt("experiment", "results go to experiments_dir/DATASET_NwayKshot/experiment_name")
    experiments_dir: str = opt("experiments", "folder that holds all results")
    save_path: str | None = opt(None, "folder of results instead; its checkpoints lie directly in it")
    seed: int = opt(104, "seed of the initial weights")
    total_epochs: int = opt(100, "epochs; each ends with a validation and a checkpoint")
    total_iter_per_epoch: int = opt(500, "training iterations in an epoch")
    num_evaluation_tasks: int = opt(600, "tasks of a validation or test")
    max_models_to_save: int = opt(5, "epoch checkpoints kept: the best by validation accuracy")
    save_epoch: int = opt(0, "keep the checkpoint of every so many epochs as well; 0: of none")
    top_n_models: int = opt(5, "checkpoints whose logits the ensemble test averages")
    continue_from_epoch: str = opt(
        "latest",
        "latest; from_scratch; or the number of a kept epoch. The last two hold each time the command is given",
    )
    evaluate_on_test_set_only: bool = opt(False, "no training: meta-test the checkpoints of this experiment")
    test_datasets: str | None = opt(
        None, "data sets to meta-test on, such as CUB or CUB,glyphs,digits; default: dataset_name"
    )
    gpu: str | None = opt(None, "GPU ids such as 0 or 0,1, or cpu; default: the first GPU if there is one, else cpu")
    dry_run: bool = opt(False, "two tiny iterations of everything on made-up images, in a folder that is then removed")
    name_of_args_json_file: str | None = opt(None, "JSON file of options; the command line wins over it")

    @classmethod
    def from_object(cls, source: object) -> "Options":
        """Options from an object's attributes of these names; missing ones take the defaults, others are ignored."""
        if isinstance(source, cls):
            source.validate()
            return source
        names = [field.name for field in dataclasses.fields(cls)]
        return cls.from_mapping({name: getattr(source, name) for name in names if hasattr(source, name)})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "options") -> "Options":
        """Options from a mapping of values or their text; raises UserError for an unknown name or a bad value."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {ALIASES.get(name, name): value for name, value in values.items()}
        if unknown := [name for name in values if name not in fields]:
            raise UserError(f"{origin}: " + "; ".join(unknown_name(name, fields) for name in unknown))
        if values.get("learner") == "head":
            values = metaoptnet.defaults(values) | dict(values)
        options = cls(**{name: _convert(fields[name], value) for name, value in values.items()})
        options.validate()
        return options

    def validate(self) -> None:
        """Raise UserError where values are out of range or contradict one another."""
        for name in _AT_LEAST_ONE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.save_epoch < 0:
            raise UserError(f"--save_epoch is {self.save_epoch}; it must be 0 or more")
        names = [canonical_name(name) for name in self.test_dataset_list]
        if "" in names or len(set(names)) < len(names):
            raise UserError(f"--test_datasets is {self.test_datasets!r}; it takes different names such as CUB,glyphs")
        if self.num_evaluation_tasks < 2:
            raise UserError("--num_evaluation_tasks must be at least 2: one task has no confidence interval")
        if self.image_channels not in (1, 3):
            raise UserError(f"--image_channels is {self.image_channels}; it must be 1 (grey) or 3 (RGB)")
        if self.top_n_models > self.max_models_to_save:
            raise UserError(
                f"--top_n_models {self.top_n_models} needs more checkpoints than --max_models_to_save "
                f"{self.max_models_to_save} keeps; raise the latter or lower the former"
            )
        if self.number_of_evaluation_steps_per_iter > self.number_of_training_steps_per_iter and (
            self.per_step_bn_statistics or self.learnable_per_layer_per_step_inner_loop_learning_rate or self.alfa
        ):
            raise UserError(
                "--per_step_bn_statistics, --learnable_per_layer_per_step_inner_loop_learning_rate and --alfa learn "
                f"one value per training step ({self.number_of_training_steps_per_iter}), so "
                f"--number_of_evaluation_steps_per_iter {self.number_of_evaluation_steps_per_iter} has none for the "
                "extra steps; use at most as many steps in evaluation"
            )
        self._validate_learner()
        self._validate_rules()
        if self.continue_from_epoch not in ("latest", "from_scratch") and not self.continue_from_epoch.isdigit():
            raise UserError(f"--continue_from_epoch is {self.continue_from_epoch!r}: latest, from_scratch or a number")
        for name in ("seed", "train_seed", "val_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be from 0 to 2**32 - 1")
        for name in _RATES:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be a number from 0 up")
        if self.min_learning_rate > self.meta_learning_rate:
            raise UserError(
                f"--min_learning_rate {self.min_learning_rate:g} is above --meta_learning_rate "
                f"{self.meta_learning_rate:g}; the schedule goes from the latter down to the former"
            )

    def _validate_learner(self) -> None:
        """Raise UserError for options of one kind of learner given to the other, which would not heed them."""
        heads = self.learner == "head"
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        usual |= metaoptnet.DEFAULTS if heads else {}
        unheeded = {name: f"--learner {self.learner}" for name in (_OF_GRADIENT if heads else _OF_HEADS)}
        if self.backbone != "ResNet-12":
            unheeded |= dict.fromkeys(_OF_RESNET, f"--backbone {self.backbone}")
        for name, chosen in unheeded.items():
            if getattr(self, name) != usual[name]:
                raise UserError(f"--{name} has no effect with {chosen}")
        for name, allowed in (_HEAD_CHOICES if heads else _GRADIENT_CHOICES).items():
            if getattr(self, name) not in allowed:
                words = ", ".join(map(str, filter(None, allowed)))
                raise UserError(
                    f"--{name} is {getattr(self, name)}; with --learner {self.learner} it is one of {words}"
                )
        way = self.num_classes_per_set
        if self.head and not heads and not self.evaluate_on_test_set_only:
            raise UserError(
                "a network trained by gradient steps is tested with a --head, not trained with one. To train with a "
                "head, say --learner head and leave out options of inner steps"
            )
        if heads and self.head is None:
            raise UserError("--learner head needs a --head: ProtoNet, Ridge, R2D2, SVM-CS, SVM-He or SVM-WW")
        if self.head and min(way, self.evaluation_task[0]) < 2:
            raise UserError("a --head needs at least 2 ways to tell apart")
        if self.head is None and self.test_way not in (None, way):
            raise UserError(
                f"the network classifies {way} ways with a linear layer, so it cannot be tested with {self.test_way}; "
                "a head can: --head Ridge, for example"
            )
        if not 0 <= self.label_smoothing <= (way - 1) / way:
            raise UserError(
                f"--label_smoothing is {self.label_smoothing}; with {way} ways it is from 0 to {(way - 1) / way:g}"
            )
        if self.svm_solver == "qpth" and self.head != "SVM-CS":
            raise UserError(f"--svm_solver qpth solves --head SVM-CS only, not {self.head}")
        if self.svm_on_failure != "error" and "SVM" not in str(self.head):
            raise UserError(f"--svm_on_failure has no effect: --head {self.head} solves no SVM")
        if self.svm_max_iter is not None and self.svm_solver != "qpth":
            raise UserError("--svm_max_iter limits --svm_solver qpth only; the structured solver is exact")
        statistics = metaoptnet.published_statistics(self.dataset_name)
        if self.normalization == "published" and (statistics is None or self.image_channels != len(statistics[0])):
            raise UserError(
                f"no pixel statistics of {self.dataset_name} in {self.image_channels} channels are published; use "
                "--normalization channel"
            )
        if not all(shot.isdigit() and int(shot) for shot in (self.test_shots or "1").split(",")):
            raise UserError(f"--test_shots is {self.test_shots!r}; it takes numbers such as 1,5")

    def _validate_rules(self) -> None:
        """Raise UserError for inner-loop rules that do not go together, with the reason."""
        lslr = self.learnable_per_layer_per_step_inner_loop_learning_rate
        rates = {
            "learnable_per_layer_per_step_inner_loop_learning_rate": lslr,
            "meta_sgd": self.meta_sgd,
            "alfa": self.alfa,
        }
        if len(chosen := [f"--{name}" for name, on in rates.items() if on]) > 1:
            raise UserError(f"{' and '.join(chosen)} each set the inner learning rate; choose one")
        head, body = (self.inner_loop_part == part for part in ("head", "body"))
        refusals = [
            (self.random_init and not self.alfa, "--random_init trains ALFA's rates only, so it needs --alfa true"),
            (
                self.contextual_grad and head,
                "--contextual_grad scales the body's gradients, which --inner_loop_part head (ANIL) never takes",
            ),
            (
                self.contextual_grad and self.attenuate,
                "--contextual_grad sets the norm of every tensor of the body, which "
                "undoes what --attenuate (L2F) did to it",
            ),
            (
                self.contextual_grad and self.alfa and bool(self.use_bias),
                "--contextual_grad gives every tensor of the body a norm, also biases, which batch norm cancels and "
                "which hold rounding noise only; --alfa would generate its rates from that. Use --use_bias false",
            ),
            (
                self.random_init and head,
                "--random_init leaves the body untrained and --inner_loop_part head (ANIL) never moves it",
            ),
            (
                self.random_init and body,
                "--random_init leaves the classifier untrained and --inner_loop_part body (BOIL) never moves it",
            ),
            (
                self.per_step_bn_statistics and self.batch_norm == "running",
                "--batch_norm running needs one set of "
                "statistics, --per_step_bn_statistics keeps one per step; choose --batch_norm per_step",
            ),
            (
                self.batch_norm == "per_step" and not self.per_step_bn_statistics,
                "--batch_norm per_step needs the statistics that training keeps with --per_step_bn_statistics true",
            ),
        ]
        for refused, reason in refusals:
            if refused:
                raise UserError(reason)
        widths = self.resnet_widths.split("-")
        if not all(width.isdigit() and int(width) for width in widths):
            raise UserError(f"--resnet_widths is {self.resnet_widths!r}; it takes numbers such as 64-128-256-512")
        if self.learner == "head" and len(widths) != 4:
            raise UserError(f"--resnet_widths is {self.resnet_widths!r}; with --learner head it takes four numbers")

    @property
    def training_task(self) -> tuple[int, int, int]:
        """(way, shot, query) in training."""
        return self.num_classes_per_set, self.num_samples_per_class, self.num_target_samples

    @property
    def evaluation_task(self) -> tuple[int, int, int]:
        """(way, shot, query) in validation and test."""
        given = (self.test_way, self.val_shot, self.val_query)
        way, shot, query = (other or own for other, own in zip(given, self.training_task, strict=True))
        return way, shot, query

    @property
    def test_dataset_list(self) -> list[str]:
        return [name.strip() for name in (self.test_datasets or self.dataset_name).split(",")]

    @property
    def test_shot_list(self) -> list[int]:
        return [int(shot) for shot in self.test_shots.split(",")] if self.test_shots else [self.evaluation_task[1]]

    @property
    def solver_options(self) -> dict[str, Any]:
        """What the head is called with."""
        if self.head != "SVM-CS":
            return {}
        return {"solver": self.svm_solver} | ({"max_iter": self.svm_max_iter} if self.svm_max_iter else {})

    @property
    def tracks_statistics(self) -> bool:
        """Whether training keeps running statistics of batch norm."""
        return self.per_step_bn_statistics or self.batch_norm == "running"

    @property
    def has_conv_bias(self) -> bool:
        official = (self.alfa or self.attenuate) and not self.contextual_grad
        return official if self.use_bias is None else self.use_bias

    @property
    def resnet_width_list(self) -> list[int]:
        return [int(width) for width in self.resnet_widths.split("-")]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.image_channels, self.image_height, self.image_width

    @property
    def evaluation_batch_size(self) -> int:
        return self.test_batch_size or self.batch_size


# What the other kind of learner does not heed.
_OF_GRADIENT = (
    *("cnn_num_filters", "num_stages", "conv_padding", "max_pooling", "use_bias", "per_step_bn_statistics"),
    *("learnable_bn_gamma", "learnable_bn_beta", "tasks_per_pass", "checkpoint_inner_steps"),
    *("number_of_training_steps_per_iter", "number_of_evaluation_steps_per_iter", "init_inner_loop_learning_rate"),
    *("inner_loop_part", "learnable_per_layer_per_step_inner_loop_learning_rate", "meta_sgd", "alfa", "random_init"),
    *("init_inner_loop_weight_decay", "attenuate", "enable_inner_loop_optimizable_bn_params", "contextual_grad"),
    *("num_context_params", "context_params_learning_rate", "second_order", "first_order_to_second_order_epoch"),
    *("use_multi_step_loss_optimization", "multi_step_loss_num_epochs", "clamp_outer_gradients", "min_learning_rate"),
)
_OF_HEADS = ("avg_pool", "dropblock_schedule", "outer_weight_decay", "label_smoothing", "precision")
_OF_RESNET = ("resnet_widths", "avg_pool", "dropblock_schedule")
_HEAD_CHOICES = {
    "backbone": ("conv64", "R2D2Net", "ResNet-12"),
    "batch_norm": ("running",),
    "lr_schedule": ("steps", "steps_official"),
}
_GRADIENT_CHOICES = {
    "backbone": ("4-CONV", "ResNet-12"),
    "lr_schedule": (None, "per_epoch", "per_iteration"),
}
_RATES = (
    *("init_inner_loop_learning_rate", "init_inner_loop_weight_decay", "context_params_learning_rate"),
    *("meta_learning_rate", "min_learning_rate", "clamp_outer_gradients", "outer_weight_decay"),
)
_AT_LEAST_ONE = (
    *("image_height", "image_width", "num_classes_per_set", "num_samples_per_class", "num_target_samples"),
    *(
        "test_way",
        "val_shot",
        "val_query",
        "svm_max_iter",
        "batch_size",
        "test_batch_size",
        "tasks_per_pass",
        "num_dataprovider_workers",
    ),
    *("cnn_num_filters", "num_stages", "num_context_params", "multi_step_loss_num_epochs"),
    *("number_of_training_steps_per_iter", "number_of_evaluation_steps_per_iter"),
    *("total_epochs", "total_iter_per_epoch", "num_evaluation_tasks", "max_models_to_save", "top_n_models"),
)


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Options of a command line (default: this process's); raises UserError for anything that is not right."""
    given, rest = command_line_parser().parse_known_args(argv)
    if rest:
        names = [word.lstrip("-").split("=")[0] for word in rest if word.startswith("--")]
        fields = [field.name for field in dataclasses.fields(Options)]
        problems = [unknown_name(name, fields, "--") for name in names] or [f"'{rest[0]}' belongs to no option"]
        raise UserError("; ".join(problems) + " (--help lists all)")
    values = vars(given)
    file = values.get("name_of_args_json_file")
    from_file = read_json(Path(file)) if file not in (None, "None") else {}
    values = {**from_file, **values}
    gradient = values.keys() & set(_OF_GRADIENT) or _folded(str(values.get("backbone"))) == "4conv"
    if values.get("head") not in (None, "None") and not gradient:
        values.setdefault("learner", "head")
    return Options.from_mapping(values)


# Other names of options: MetaOptNet's, and one of our own earlier ones. On the command line '-' is as good as '_'.
ALIASES = metaoptnet.FLAGS | {"test_dataset": "test_datasets"}


def command_line_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Options take a value; booleans are true or false.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Options):
        help_text = f"{field.metadata['help']} [{field.default}]".replace("%", "%%")
        names = [field.name, *(flag for flag, name in ALIASES.items() if name == field.name)]
        spelt = [f"--{name}" for name in names] + [f"--{name.replace('_', '-')}" for name in names if "_" in name]
        parser.add_argument(*spelt, dest=field.name, help=help_text, metavar=_type_name(field))
    return parser


def read_json(path: Path) -> dict[str, Any]:
    """The options in a JSON file; raises UserError naming the file and what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the options file {path}: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object of option names and values")
    fields = [*(field.name for field in dataclasses.fields(Options)), *ALIASES]
    if unknown := [name for name in values if name not in fields and name not in DEAD_KEYS]:
        raise UserError(f"{path}: " + "; ".join(unknown_name(name, [*fields, *DEAD_KEYS]) for name in unknown))
    for name in values:
        if name in DEAD_KEYS:
            log.warning("%s: '%s' has no effect: %s", path, name, DEAD_KEYS[name])
    return {name: value for name, value in values.items() if name not in DEAD_KEYS}


# Keys of the official JSON files that decide nothing here, and why.
_NEVER_READ = "the official programs never read it"
DEAD_KEYS = {
    **dict.fromkeys(("cnn_blocks_per_stage", "cnn_num_blocks", "weight_decay", "dropout_rate_value"), _NEVER_READ),
    **dict.fromkeys(("meta_opt_bn", "learnable_batch_norm_momentum", "minimum_per_task_contribution"), _NEVER_READ),
    **dict.fromkeys(("evalute_on_test_set_only", "train_in_stages", "total_unique_tasks"), _NEVER_READ),
    **dict.fromkeys(("gpu_to_use", "num_of_gpus", "use_cuda", "use_gpu"), "--gpu says where to compute"),
    **dict.fromkeys(
        ("dataset_path", "sets_are_pre_split", "train_val_test_split"), "data sets are class folders by split"
    ),
    **dict.fromkeys(
        ("reset_stored_paths", "load_from_npz_files", "load_into_memory"), "images are cached by themselves"
    ),
    **dict.fromkeys(("indexes_of_folders_indicating_class", "labels_as_int"), "data sets are class folders by split"),
    **dict.fromkeys(("use_gdrive", "reverse_channels", "architecture_name"), "it has no counterpart"),
    "augment_images": "--rotate_classes says whether training turns classes",
    "samples_per_iter": "--batch_size counts the tasks of a meta-batch",
    "task_learning_rate": "--init_inner_loop_learning_rate is the inner rate",
    "continue_from_epoch": "a file cannot say where a run stands; the command line can",
}


def unknown_name(name: str, known: Iterable[str], prefix: str = "") -> str:
    """One sentence saying that an option does not exist, with the nearest that does."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean '{prefix}{nearest[0]}'?" if nearest else ""
    return f"there is no option '{prefix}{name}'{hint}"


def _base_type(field: "dataclasses.Field[Any]") -> type:
    """The type of a field, without the None of an optional one."""
    options = [kind for kind in get_args(field.type) if kind is not type(None)]
    return options[0] if options else field.type  # type: ignore[return-value]


def _type_name(field: "dataclasses.Field[Any]") -> str:
    return "|".join(field.metadata["choices"]) or _base_type(field).__name__.upper()


def _convert(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """A value or its text as the field's type; raises UserError naming the option and what it takes."""
    kind = _base_type(field)
    if value is None or (value == "None" and kind is not bool and field.default is None):
        if field.default is not None:
            raise UserError(f"--{field.name} needs a value ({kind.__name__})")
        return None
    try:
        converted = _boolean(value) if kind is bool else _number_or_text(kind, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--{field.name} is {value!r}; it takes {_EXPECTED[kind]}") from error
    if field.metadata["choices"]:
        converted = field.metadata["aliases"].get(converted, converted)
        converted = {_folded(choice): choice for choice in field.metadata["choices"]}.get(
            _folded(str(converted)), converted
        )
    if field.metadata["choices"] and converted not in field.metadata["choices"]:
        raise UserError(f"--{field.name} is {value!r}; it is one of {', '.join(field.metadata['choices'])}")
    return converted


def _folded(choice: str) -> str:
    """4-CONV, 4conv and 4_conv are one choice."""
    return choice.lower().replace("-", "").replace("_", "")


def _number_or_text(kind: type, value: Any) -> Any:
    if isinstance(value, (bool, list, dict)) or (kind is int and float(value) != int(float(value))):
        raise ValueError(value)
    return kind(value)


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"
